"""The stages of a rule that needs sums over layers: stage1, reduce and stage2.

A channel is cut into pieces, see ``csrc/reduce.h``, whose sums are taken in tiles of several pieces by
several columns and then added in order. No mathematics here: the rules have it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decide import average_weight_of, record_norms
from .memory import (
    LayerProjection,
    Partial,
    arithmetic,
    arrives_last,
    as_mask,
    average_dtype,
    field,
    grad_of,
    item_size,
    load_struct,
    load_tile,
    scalars_of,
    store_struct,
    store_tile,
)
from .reduce import (
    PIECE,
    add_products,
    add_sums,
    channel_part,
    combine,
    combine_all,
    combine_sums,
    count_pieces,
    first_piece,
    load_sums,
    norm_terms,
    tile_places,
    vector_part,
    zero_part,
    zero_products,
    zero_sums,
)
from .rounding import (
    UPDATE_PASS,
    are_rounded,
    is_of_kind,
    load_param,
    load_states,
    rounds_anything,
    state_bits,
    store_param,
    store_states,
    vector_alignment,
)
from .rules import CHANNEL_VIEW, NO_VIEW, average_update, coef_in_view, projection_view
from .sphere import finish_spheres, is_on_sphere, store_sum_sq
from .totals import combine_slots, fold_norms, number_at, sums_of_layer


@triton.jit
def stage1_tiles(
    step,
    row,
    key,
    grad,
    chunk,
    row_scalars,
    done,
    part,
    UPDATE_MOMENTS: tl.constexpr,
    DIRECTION: tl.constexpr,
    REDUCTIONS: tl.constexpr,
    N_SUMS: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    N_STATES: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update the moments of a chunk, and sum the products of its update over pieces; returns its norms.

    The first ``done`` elements of each channel part are left out, and those behind its first ``part``; the
    stored sums of the first ones are added.
    """
    C: tl.constexpr = arithmetic(DTYPE)
    s = scalars_of(row_scalars, C)
    begun = done // PIECE
    skipped = done - begun * PIECE
    count = count_pieces(chunk, part)
    first = first_piece(row, chunk)
    norms = zero_products(PIECES, COLUMNS, 2, ALIGNED)
    for start in range(begun, count, PIECES):
        i = start + tl.arange(0, PIECES)
        sums = zero_products(PIECES, COLUMNS, N_SUMS, ALIGNED)
        for column in range(skipped, tl.minimum(part - begun * PIECE, PIECE), COLUMNS):
            places, mask = tile_places(i, column, part, count, COLUMNS, ALIGNED)
            bits = state_bits(key, chunk.offset, places, N_STATES, STATE_DTYPE, ALIGNED)
            param = load_param(row, chunk.offset, places, mask, DTYPE, ROUNDING, C, ALIGNED)
            at = grad + chunk.offset * item_size(GRAD_DTYPE)
            g = load_tile(at, places, mask, GRAD_DTYPE, C, ALIGNED)
            state = load_states(row, chunk.offset, places, mask, N_STATES, STATE_DTYPE, C, ALIGNED)
            if ACCUMULATE:
                norms = add_products(norms, norm_terms(g.to(tl.float64)), mask)
            state = UPDATE_MOMENTS(param, g, state, s)
            # stage2 recomputes the direction from the moments as they are stored
            state = store_states(row, bits, chunk.offset, places, mask, state, N_STATES, STATE_DTYPE, ALIGNED)
            update = DIRECTION(param, g, state, s)
            products = REDUCTIONS(param.to(tl.float64), g.to(tl.float64), update.to(tl.float64), row_scalars)
            sums = add_products(sums, products, mask)
        for k in tl.static_range(N_SUMS):
            out = (step.sums + ((first + i) * N_SUMS + k) * 8).to(tl.pointer_type(tl.float64))
            total = tl.sum(sums[k], axis=1)
            if not ALIGNED:
                # the elements of the piece that were read as vectors
                total += tl.load(out, (i < count) & as_mask(skipped > 0), 0.0)
                # wait until all threads have read the sums that some of them overwrite
                tl.debug_barrier()
            tl.store(out, total, i < count)
    # by rows, as the sums over pieces, which takes fewer registers; the non-finite count is unused here
    l1, l2_sq = tl.sum(norms[0], axis=1), tl.sum(norms[1], axis=1)
    return Partial(l1=tl.sum(l1), l2_sq=tl.sum(l2_sq), nonfinite=tl.full((), 0, tl.int64))


@triton.jit
def judge_channels(
    step, h, row, channel, known, size, sums, SCALE_INVARIANT: tl.constexpr, PROJECTION_COEF: tl.constexpr
):
    """Write the coefficients that channels are projected with if every channel is.

    Returns:
        1 for each channel that is not scale-invariant, else 0.
    """
    coef = coef_in_view(CHANNEL_VIEW, h, sums, sums, PROJECTION_COEF)
    each = tl.cdiv(row.channel_size, PIECE)
    for j in range(0, each):
        piece = row.first_piece + channel * each + j
        tl.store((step.projection_coefs + piece * 8).to(tl.pointer_type(tl.float64)), coef, known)
    return tl.where(known & (SCALE_INVARIANT(h, sums, size) == 0), 1.0, 0.0).to(tl.float64)


@triton.jit
def layer_of(step, index, row, SPREAD: tl.constexpr):
    """Elements, channels and elements of a channel of the layer that a row is, or is a part of."""
    if SPREAD:
        spread = load_struct(step.spreads, index, "Spread")
        return spread.numel, spread.channels, spread.numel // spread.channels
    else:
        return row.numel, row.numel // row.channel_size, row.channel_size


@triton.jit
def sum_chunk(
    step,
    index,
    SCALE_INVARIANT: tl.constexpr,
    PROJECTION_COEF: tl.constexpr,
    N_SUMS: tl.constexpr,
    PROJECTS: tl.constexpr,
    SPREAD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Add up the sums over the pieces of a chunk, and judge the channels that it has whole."""
    # wait for the sums that other threads have stored
    tl.debug_barrier()
    # loaded again, so that stage1 need not keep them in registers
    step = load_struct(step, 0, "Step")
    chunk = load_struct(step.chunks, index, "Chunk")
    row = load_struct(step.rows, chunk.row, "Row")
    part = channel_part(row, chunk)
    count, each = chunk.count // part, tl.cdiv(part, PIECE)
    first, first_channel = first_piece(row, chunk), chunk.offset // row.channel_size
    found = zero_sums(LANES, N_SUMS)
    failed = tl.zeros((LANES,), tl.float64)
    for start in range(0, count, LANES):
        i = start + tl.arange(0, LANES)
        sums = combine_sums(step.sums, first + i * each, each, i < count, LANES, N_SUMS)
        found = add_sums(found, sums)
        if PROJECTS:
            # a layer of one channel is tested as a layer
            if (part == row.channel_size) & (layer_of(step, chunk.row, row, SPREAD)[1] > 1):
                h = load_struct(step.hypers, row.group, "Hyper")
                failed += judge_channels(
                    step, h, row, first_channel + i, i < count, row.channel_size, sums, SCALE_INVARIANT,
                    PROJECTION_COEF,
                )  # fmt: skip
    found = found + (failed,)
    for k in tl.static_range(N_SUMS + 1):
        out = (step.chunk_sums + (index * (N_SUMS + 1) + k) * 8).to(tl.pointer_type(tl.float64))
        tl.store(out, tl.sum(found[k]))


@triton.jit
def stage1_chunk(
    address,
    index,
    UPDATE_MOMENTS: tl.constexpr,
    DIRECTION: tl.constexpr,
    REDUCTIONS: tl.constexpr,
    N_SUMS: tl.constexpr,
    KINDS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Run stage1 on the elements of a chunk that are read as vectors, or on the others; stores their norms.

    Both load everything for themselves, because what one kept for the other would take registers.
    """
    step = load_struct(address, 0, "Step")
    chunk = load_struct(step.chunks, index, "Chunk")
    row = load_struct(step.rows, chunk.row, "Row")
    grad = tl.load(grad_of(step, chunk.row))
    s = load_struct(step.scalars, chunk.row, "Scalars")
    key = (step.rows, chunk.row, tl.load(field(step.decision, 0, "StepDecision", "t")))
    part = channel_part(row, chunk)
    addresses = row.param | grad | row.state0 | row.state1 | vector_alignment(row, rounds_anything(KINDS))
    whole = vector_part(addresses, chunk, part)
    done, part = (0, whole) if ALIGNED else (whole, part)
    norms = zero_part()
    for k in tl.static_range(len(KINDS)):
        if (grad != 0) & is_of_kind(row, KINDS, k) & (done < part):
            norms = stage1_tiles(
                step, row, key, grad, chunk, s, done, part, UPDATE_MOMENTS, DIRECTION, REDUCTIONS, N_SUMS,
                KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4], ACCUMULATE, PIECES, COLUMNS,
                ALIGNED,
            )  # fmt: skip
    if ACCUMULATE:
        if not ALIGNED:
            norms = combine(load_struct(step.partials, index, "Partial"), norms)
            tl.debug_barrier()
        store_struct(step.partials, index, norms, "Partial")


@triton.jit
def stage1_kernel(
    step,
    UPDATE_MOMENTS: tl.constexpr,
    DIRECTION: tl.constexpr,
    REDUCTIONS: tl.constexpr,
    SCALE_INVARIANT: tl.constexpr,
    PROJECTION_COEF: tl.constexpr,
    N_SUMS: tl.constexpr,
    PROJECTS: tl.constexpr,
    KINDS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ODD_COLUMNS: tl.constexpr,
    SPREAD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Run stage1 on every chunk."""
    address = step.to(tl.int64)
    step = load_struct(address, 0, "Step")
    if load_struct(step.decision, 0, "StepDecision").skipped == 0:
        for i in range(tl.program_id(0), step.n_chunks, tl.num_programs(0)):
            stage1_chunk(
                address, i, UPDATE_MOMENTS, DIRECTION, REDUCTIONS, N_SUMS, KINDS, ACCUMULATE,
                PIECES, COLUMNS, True,
            )  # fmt: skip
        # a loop of its own, and loaded again: the first loop has no registers left for what this one needs
        step = load_struct(address, 0, "Step")
        for i in range(tl.program_id(0), step.n_chunks, tl.num_programs(0)):
            # wait for the sums that other threads have stored
            tl.debug_barrier()
            stage1_chunk(
                address, i, UPDATE_MOMENTS, DIRECTION, REDUCTIONS, N_SUMS, KINDS, ACCUMULATE,
                PIECES, ODD_COLUMNS, False,
            )  # fmt: skip
            chunk = load_struct(step.chunks, i, "Chunk")
            if tl.load(grad_of(step, chunk.row)) != 0:
                sum_chunk(address, i, SCALE_INVARIANT, PROJECTION_COEF, N_SUMS, PROJECTS, SPREAD, LANES)


@triton.jit
def sum_layer(
    step,
    i,
    row,
    SCALE_INVARIANT: tl.constexpr,
    PROJECTION_COEF: tl.constexpr,
    N_SUMS: tl.constexpr,
    PROJECTS: tl.constexpr,
    SPREAD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Add up the sums over one tensor, the last of which counts its channels that are not scale-invariant.

    A single channel is not tested on its own, because its sums are those of the layer.
    """
    lanes = tl.arange(0, LANES)
    h = load_struct(step.hypers, row.group, "Hyper")
    _, layer_channels, channel_size = layer_of(step, i, row, SPREAD)
    channels = row.numel // row.channel_size
    # channels longer than a chunk, which no program of stage1 has whole
    is_cut = (layer_channels > 1) & (row.n_chunks > channels)
    each = tl.where(is_cut, row.n_chunks // channels, 1)
    # the last one counts the channels that are not scale-invariant
    found = zero_sums(LANES, N_SUMS + 1)
    failed = tl.zeros((LANES,), tl.float64)
    for start in range(0, row.n_chunks // each, LANES):
        part = start + lanes
        known = part < row.n_chunks // each
        sums = combine_sums(step.chunk_sums, row.first_chunk + part * each, each, known, LANES, N_SUMS + 1)
        found = add_sums(found, sums)
        if PROJECTS:
            if is_cut:
                failed += judge_channels(
                    step, h, row, part, known, channel_size, sums, SCALE_INVARIANT, PROJECTION_COEF
                )
    layer = ()
    for k in tl.static_range(N_SUMS):
        layer = layer + (tl.sum(found[k]),)
    return layer + (tl.sum(found[N_SUMS] + failed),)


@triton.jit
def read_layer(
    step,
    i,
    row,
    SCALE_INVARIANT: tl.constexpr,
    PROJECTION_COEF: tl.constexpr,
    N_SUMS: tl.constexpr,
    PROJECTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Read the sums over one tensor that the processes have added up, see ``sum_layer``."""
    spread = load_struct(step.spreads, i, "Spread")
    at = sums_of_layer(step, spread)
    known = spread.is_cut == 0
    layer = load_sums(at, 0, known, N_SUMS)
    failed = tl.load(number_at(at) + N_SUMS, known, 0.0)
    if PROJECTS:
        h = load_struct(step.hypers, row.group, "Hyper")
        size = spread.numel // spread.channels
        found = zero_sums(LANES, N_SUMS)
        lost = tl.zeros((LANES,), tl.float64)
        for start in range(0, tl.where(known, 0, spread.channels), LANES):
            channel = start + tl.arange(0, LANES)
            inside = channel < spread.channels
            sums = load_sums(at, channel, inside, N_SUMS)
            found = add_sums(found, sums)
            here = channel - spread.first_channel
            own = inside & (here >= 0) & (here < row.numel // row.channel_size)
            judge_channels(step, h, row, here, own, size, sums, SCALE_INVARIANT, PROJECTION_COEF)
            lost += tl.where(inside & (SCALE_INVARIANT(h, sums, size) == 0), 1.0, 0.0).to(tl.float64)
        whole = ()
        for k in tl.static_range(N_SUMS):
            whole = whole + (layer[k] + tl.sum(found[k]),)
        layer = whole
        failed += tl.sum(lost)
    return layer + (failed,)


@triton.jit
def reduce_layer(
    step,
    i,
    row,
    SCALE_INVARIANT: tl.constexpr,
    PROJECTION_COEF: tl.constexpr,
    LAYER_SCALARS: tl.constexpr,
    N_SUMS: tl.constexpr,
    PROJECTS: tl.constexpr,
    SPREAD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Turn the sums of one tensor into its scalars and what its update is projected in."""
    if SPREAD:
        found = read_layer(step, i, row, SCALE_INVARIANT, PROJECTION_COEF, N_SUMS, PROJECTS, LANES)
    else:
        found = sum_layer(step, i, row, SCALE_INVARIANT, PROJECTION_COEF, N_SUMS, PROJECTS, SPREAD, LANES)
    layer = ()
    for k in tl.static_range(N_SUMS):
        layer = layer + (found[k],)
    numel, channels, _ = layer_of(step, i, row, SPREAD)
    h = load_struct(step.hypers, row.group, "Hyper")
    view = projection_view(
        PROJECTS & (row.projects != 0),
        (channels > 1) & (found[N_SUMS] == 0.0),
        SCALE_INVARIANT(h, layer, numel),
    )
    s = load_struct(step.scalars, i, "Scalars")
    # wait until all threads have read the scalars that one of them overwrites
    tl.debug_barrier()
    store_struct(step.scalars, i, LAYER_SCALARS(h, layer, view != NO_VIEW, s), "Scalars")
    if PROJECTS:
        projection = LayerProjection(coef=coef_in_view(view, h, layer, layer, PROJECTION_COEF), view=view)
        store_struct(step.layer_projections, i, projection, "LayerProjection")


@triton.jit
def fold_layers_kernel(
    step,
    SCALE_INVARIANT: tl.constexpr,
    PROJECTION_COEF: tl.constexpr,
    N_SUMS: tl.constexpr,
    PROJECTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the sums of every row of this process, which the processes add up."""
    step = load_struct(step.to(tl.int64), 0, "Step")
    if tl.load(field(step.decision, 0, "StepDecision", "skipped")) == 0:
        for i in range(tl.program_id(0), step.n_rows, tl.num_programs(0)):
            row = load_struct(step.rows, i, "Row")
            spread = load_struct(step.spreads, i, "Spread")
            at = sums_of_layer(step, spread)
            is_here = (tl.load(grad_of(step, i)) != 0) & (row.numel > 0)
            channels = tl.where(is_here, row.numel // tl.maximum(row.channel_size, 1), 0)
            each = tl.cdiv(row.channel_size, PIECE)
            for start in range(0, tl.where(spread.is_cut != 0, spread.channels, 0), LANES):
                channel = start + tl.arange(0, LANES)
                here = channel - spread.first_channel
                own = (here >= 0) & (here < channels)
                sums = combine_sums(step.sums, row.first_piece + here * each, each, own, LANES, N_SUMS)
                for k in tl.static_range(N_SUMS):
                    tl.store(number_at(at) + channel * N_SUMS + k, sums[k], channel < spread.channels)
            if spread.is_cut == 0:
                for k in tl.static_range(N_SUMS + 1):
                    tl.store(number_at(at) + k, 0.0)
                if is_here:
                    # wait until the zeros of other threads are written
                    tl.debug_barrier()
                    found = sum_layer(
                        step, i, row, SCALE_INVARIANT, PROJECTION_COEF, N_SUMS, PROJECTS, True, LANES
                    )
                    for k in tl.static_range(N_SUMS + 1):
                        tl.store(number_at(at) + k, found[k])
        if ACCUMULATE:
            if tl.program_id(0) == 0:
                fold_norms(step, step.n_chunks, LANES)


@triton.jit
def reduce_layers_kernel(
    step,
    SCALE_INVARIANT: tl.constexpr,
    PROJECTION_COEF: tl.constexpr,
    LAYER_SCALARS: tl.constexpr,
    N_SUMS: tl.constexpr,
    PROJECTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SPREAD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Turn the sums of every row into its scalars and what its update is projected in."""
    step = load_struct(step.to(tl.int64), 0, "Step")
    decision = load_struct(step.decision, 0, "StepDecision")
    if decision.skipped == 0:
        for i in range(tl.program_id(0), step.n_rows, tl.num_programs(0)):
            row = load_struct(step.rows, i, "Row")
            if (tl.load(grad_of(step, i)) != 0) & (row.numel > 0):
                reduce_layer(
                    step, i, row, SCALE_INVARIANT, PROJECTION_COEF, LAYER_SCALARS, N_SUMS, PROJECTS, SPREAD,
                    LANES,
                )  # fmt: skip
        if ACCUMULATE:
            if tl.program_id(0) == 0:
                if SPREAD:
                    record_norms(step, decision, combine_slots(step))
                else:
                    record_norms(step, decision, combine_all(step.partials, step.n_chunks, LANES))


@triton.jit
def stage2_tiles(
    step,
    row,
    key,
    grad,
    chunk,
    row_scalars,
    average_weight,
    on_sphere,
    needs_grad,
    done,
    part,
    DIRECTION: tl.constexpr,
    APPLY: tl.constexpr,
    PROJECTS: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    N_STATES: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    AVERAGE: tl.constexpr,
    SPHERES: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Recompute the direction of a chunk, update and average the parameter; returns its sum of squares.

    Elements are left out as by ``stage1_tiles``.
    """
    C: tl.constexpr = arithmetic(DTYPE)
    AVERAGE_DTYPE: tl.constexpr = average_dtype(DTYPE)
    s = scalars_of(row_scalars, C)
    weight = average_weight.to(C)
    begun = done // PIECE
    skipped = done - begun * PIECE
    count = count_pieces(chunk, part)
    first = first_piece(row, chunk)
    if PROJECTS:
        layer = load_struct(step.layer_projections, chunk.row, "LayerProjection")
        by_channel = as_mask(layer.view == CHANNEL_VIEW)
    sum_sq = zero_products(PIECES, COLUMNS, 1, ALIGNED)
    for start in range(begun, count, PIECES):
        i = start + tl.arange(0, PIECES)
        projection_coef = tl.zeros((PIECES,), tl.float64)
        if PROJECTS:
            projection_coefs = (step.projection_coefs + (first + i) * 8).to(tl.pointer_type(tl.float64))
            own = tl.load(projection_coefs, (i < count) & as_mask(grad != 0) & by_channel, 0.0)
            projection_coef = tl.where(by_channel, own, layer.coef)
        for column in range(skipped, tl.minimum(part - begun * PIECE, PIECE), COLUMNS):
            places, mask = tile_places(i, column, part, count, COLUMNS, ALIGNED)
            param = load_param(row, chunk.offset, places, mask, DTYPE, ROUNDING, C, ALIGNED)
            if grad != 0:
                # a gradient that is not needed is masked out and not read
                at = grad + chunk.offset * item_size(GRAD_DTYPE)
                g = load_tile(at, places, mask & needs_grad, GRAD_DTYPE, C, ALIGNED)
                state = load_states(row, chunk.offset, places, mask, N_STATES, STATE_DTYPE, C, ALIGNED)
                update = DIRECTION(param, g, state, s)
                param = APPLY(param, update, projection_coef.to(C)[:, None], s)
                # the average is of the parameter as it is stored
                param = store_param(
                    row, key, chunk.offset, places, mask, param, DTYPE, ROUNDING, UPDATE_PASS, C, ALIGNED
                )
            if SPHERES:
                if on_sphere:
                    x = param.to(tl.float64)
                    sum_sq = add_products(sum_sq, (x * x,), mask)
            if AVERAGE:
                if weight > 0.0:
                    at = row.average + chunk.offset * item_size(AVERAGE_DTYPE)
                    average = load_tile(at, places, mask, AVERAGE_DTYPE, C, ALIGNED)
                    average = average_update(average, param, weight)
                    store_tile(at, places, mask, average, AVERAGE_DTYPE, ALIGNED)
    return tl.sum(sum_sq[0])


@triton.jit
def stage2_kernel(
    step,
    DIRECTION: tl.constexpr,
    APPLY: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    PROJECTS: tl.constexpr,
    KINDS: tl.constexpr,
    AVERAGE: tl.constexpr,
    SPHERES: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ODD_COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Run stage2 on every chunk, the last one first."""
    address = step.to(tl.int64)
    step = load_struct(address, 0, "Step")
    decision = load_struct(step.decision, 0, "StepDecision")
    if decision.skipped == 0:
        for n in range(tl.program_id(0), step.n_chunks, tl.num_programs(0)):
            # loaded again where rounding needs the registers
            own = load_struct(address, 0, "Step") if are_rounded(KINDS) else step
            chunk = load_struct(own.chunks, step.n_chunks - 1 - n, "Chunk")
            row = load_struct(own.rows, chunk.row, "Row")
            grad = tl.load(grad_of(own, chunk.row))
            s = load_struct(own.scalars, chunk.row, "Scalars")
            needs_grad = as_mask(NEEDS_GRAD(load_struct(own.hypers, row.group, "Hyper"), row.n_states))
            addresses = row.param | grad | row.state0 | row.state1 | row.average
            addresses = addresses | vector_alignment(row, are_rounded(KINDS))
            key = (own.rows, chunk.row, decision.t)
            part = channel_part(row, chunk)
            whole = vector_part(addresses, chunk, part)
            weight = average_weight_of(row)
            sum_sq = tl.full((), 0.0, tl.float64)
            wanted = grad != 0
            on_sphere = False
            if SPHERES:
                # parameters of a group on a sphere are averaged later, in rescale_kernel
                on_sphere = is_on_sphere(own, row.group)
                weight = tl.where(on_sphere, 0.0, weight)
                wanted = wanted | on_sphere
            if AVERAGE:
                wanted = wanted | (weight > 0.0)
            for k in tl.static_range(len(KINDS)):
                if wanted & is_of_kind(row, KINDS, k):
                    if whole > 0:
                        sum_sq = stage2_tiles(
                            own, row, key, grad, chunk, s, weight, on_sphere, needs_grad, 0, whole,
                            DIRECTION, APPLY, PROJECTS, KINDS[k][0], KINDS[k][1], KINDS[k][2],
                            KINDS[k][3], KINDS[k][4], AVERAGE, SPHERES, PIECES, COLUMNS, True,
                        )  # fmt: skip
                    if whole < part:
                        sum_sq += stage2_tiles(
                            own, row, key, grad, chunk, s, weight, on_sphere, needs_grad, whole, part,
                            DIRECTION, APPLY, PROJECTS, KINDS[k][0], KINDS[k][1], KINDS[k][2],
                            KINDS[k][3], KINDS[k][4], AVERAGE, SPHERES, PIECES, ODD_COLUMNS, False,
                        )  # fmt: skip
            if SPHERES:
                if on_sphere:
                    store_sum_sq(own, step.n_chunks - 1 - n, sum_sq)
        if SPHERES:
            if arrives_last(field(step.decision, 0, "StepDecision", "finished")):
                finish_spheres(step, False, LANES)

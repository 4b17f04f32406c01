"""Launches of a step: two kernels, or three where the norms must be known beforehand.

Rules that need sums over layers take two more, groups on a sphere one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...plan.address_cache import address_of
from ...plan.plan import Plan
from ...plan.structs import DTYPES, FINISH_STAGE, LAYER_STAGE, MEASURE_STAGE, ROUNDINGS, UPDATE_STAGE
from ...plan.vector_tables import OPERATIONS, PreconditionerTable, VectorTable
from ...reference import rules as reference
from .decide import decide_kernel
from .layerwise import fold_layers_kernel, reduce_layers_kernel, stage1_kernel, stage2_kernel
from .measure import measure_kernel
from .preconditioner import preconditioner_kernel
from .rules import LAYER_RULES, RULES
from .sphere import rescale_kernel
from .step import finish_kernel, update_kernel
from .totals import fold_kernel
from .vectors import vector_kernel

# elements that a program takes at a time: eight a thread, that is 16 bytes of bfloat16 or 32 of float32
BLOCK = 2048
# elements at a time without alignment or at the end of a chunk: fewer, because each needs its own address
TAIL = 512
# rows, groups or partial sums that are taken at a time, one a thread
LANES = 256
NUM_WARPS = 8
# more programs than run at a time, so that the device balances their different running times
PROGRAMS_PER_MULTIPROCESSOR = 16


# pieces and columns of a tile, which has as many elements as a block, and columns of an unaligned tile
_TILES = {"PIECES": 16, "COLUMNS": BLOCK // 16, "ODD_COLUMNS": TAIL // 16}
# the sources fix the rounding: the compiler must not fuse other multiplications and additions
_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

Kinds = tuple[tuple[int, ...], ...]
# codes of the rounding modes that draw random bits
_DRAWING = (ROUNDINGS["stochastic"], ROUNDINGS["kahan"])
# a launch and its stage
_Bound = tuple[int, Callable[[], Any]]


def measure_constants(kinds: Kinds) -> dict[str, Any]:
    """Return constants and options of ``measure_kernel`` for ``Plan.kinds``."""
    dtypes = tuple(sorted({grad_dtype for _, grad_dtype, *_ in kinds}))
    registers = 64 if len(dtypes) == 1 and DTYPES[torch.float64] not in dtypes else 128
    return {"GRAD_DTYPES": dtypes, "BLOCK": BLOCK, "TAIL": TAIL, "maxnreg": registers, **_OPTIONS}


def decide_constants(rule: str, *, spheres: bool = False, spread: bool = False) -> dict[str, Any]:
    """Return constants and options of ``decide_kernel`` for a rule."""
    made = RULES.get(rule) or LAYER_RULES[rule]
    return {
        "SCALARS": made.scalars,
        "LR_NORM_POWER": made.lr_norm_power,
        "SPHERES": spheres,
        "SPREAD": spread,
        "LANES": LANES,
        # few programs, which may use all registers
        "maxnreg": 255,
        **_OPTIONS,
    }


def update_constants(
    rule: str, kinds: Kinds, *, accumulate: bool, average: bool, spheres: bool = False, tiled: bool = False
) -> dict[str, Any]:
    """Return constants and options of ``update_kernel``.

    Args:
        rule: Name of the rule.
        kinds: ``Plan.kinds``.
        accumulate: Whether it sums the norms, because there was no measure stage.
        average: Whether parameters are averaged.
        spheres: Whether any group is on a sphere.
        tiled: Whether a program takes a tile, which it cannot where it sums.

    Returns:
        Arguments by keyword.
    """
    return {
        "UPDATE": RULES[rule].update,
        "KINDS": kinds,
        "ACCUMULATE": accumulate,
        "AVERAGE": average,
        "SPHERES": spheres,
        "TILED": tiled,
        "BLOCK": BLOCK,
        "TAIL": TAIL,
        "LANES": LANES,
        "maxnreg": _registers(kinds, accumulate or spheres, spheres),
        **_OPTIONS,
    }


def finish_constants(
    *, accumulate: bool = True, spheres: bool = False, spread: bool = False
) -> dict[str, Any]:
    """Return constants and options of ``finish_kernel``, see ``update_constants``."""
    constants = {"ACCUMULATE": accumulate, "SPHERES": spheres, "SPREAD": spread, "LANES": LANES}
    return {**constants, "maxnreg": 128, **_OPTIONS}


def fold_constants(*, measured: bool, norms: bool, squares: bool) -> dict[str, Any]:
    """Return constants and options of ``fold_kernel``.

    Args:
        measured: Whether it comes before the decision.
        norms: Whether it adds up the norms.
        squares: Whether it adds up the squares of groups on a sphere.
    """
    constants = {"MEASURED": measured, "NORMS": norms, "SQUARES": squares, "LANES": LANES}
    return {**constants, "maxnreg": 128, **_OPTIONS}


def fold_layers_constants(rule: str, *, accumulate: bool) -> dict[str, Any]:
    """Return constants and options of ``fold_layers_kernel``, see ``update_constants``."""
    constants = reduce_layers_constants(rule, accumulate=accumulate)
    return {name: value for name, value in constants.items() if name not in ("LAYER_SCALARS", "SPREAD")}


def stage1_constants(rule: str, kinds: Kinds, *, accumulate: bool, spread: bool = False) -> dict[str, Any]:
    """Return constants and options of ``stage1_kernel``, see ``update_constants``."""
    made, truth = LAYER_RULES[rule], reference.LAYER_RULES[rule]
    return {
        "UPDATE_MOMENTS": made.update_moments,
        "DIRECTION": made.direction,
        "REDUCTIONS": made.reductions,
        "SCALE_INVARIANT": made.scale_invariant,
        "PROJECTION_COEF": made.projection_coef,
        "N_SUMS": truth.n_sums,
        "PROJECTS": truth.projects,
        "KINDS": kinds,
        "ACCUMULATE": accumulate,
        "SPREAD": spread,
        "LANES": LANES,
        "maxnreg": _layer_registers(kinds),
        **_TILES,
        **_OPTIONS,
    }


def reduce_layers_constants(rule: str, *, accumulate: bool, spread: bool = False) -> dict[str, Any]:
    """Return constants and options of ``reduce_layers_kernel``, see ``update_constants``."""
    made, truth = LAYER_RULES[rule], reference.LAYER_RULES[rule]
    return {
        "SCALE_INVARIANT": made.scale_invariant,
        "PROJECTION_COEF": made.projection_coef,
        "LAYER_SCALARS": made.layer_scalars,
        "N_SUMS": truth.n_sums,
        "PROJECTS": truth.projects,
        "ACCUMULATE": accumulate,
        "SPREAD": spread,
        "LANES": LANES,
        "maxnreg": 255,
        **_OPTIONS,
    }


def stage2_constants(rule: str, kinds: Kinds, *, average: bool, spheres: bool = False) -> dict[str, Any]:
    """Return constants and options of ``stage2_kernel``, see ``update_constants``."""
    made = LAYER_RULES[rule]
    return {
        "DIRECTION": made.direction,
        "APPLY": made.apply,
        "NEEDS_GRAD": made.needs_grad,
        "PROJECTS": reference.LAYER_RULES[rule].projects,
        "KINDS": kinds,
        "AVERAGE": average,
        "SPHERES": spheres,
        "LANES": LANES,
        "maxnreg": _layer_registers(kinds),
        **_TILES,
        **_OPTIONS,
    }


def rescale_constants(kinds: Kinds, *, average: bool) -> dict[str, Any]:
    """Return constants and options of ``rescale_kernel``, see ``update_constants``."""
    own = tuple(sorted({(dtype, rounding) for dtype, *_, rounding in kinds}))
    constants = {"PARAM_KINDS": own, "AVERAGE": average, "BLOCK": BLOCK, "TAIL": TAIL}
    return {**constants, "maxnreg": 128 if DTYPES[torch.float64] in dict(own) else 80, **_OPTIONS}


def _layer_registers(kinds: Kinds) -> int:
    """Return the most registers of a thread of ``stage1_kernel`` and ``stage2_kernel``."""
    return 128 if len(kinds) == 1 and kinds[0][0] != DTYPES[torch.float64] else 255


def _registers(kinds: Kinds, accumulate: bool, spheres: bool) -> int:
    """Return the most registers of a thread: as few as it needs without spills, so that more programs fit.

    Without a bound ptxas spills some registers to save others.
    """
    double = any(dtype == DTYPES[torch.float64] for dtype, *_ in kinds)
    most_states = max((n_states for _, _, n_states, *_ in kinds), default=0)
    streams = most_states + len(kinds)
    drawn = spheres and any(
        state_dtype == DTYPES[torch.bfloat16] or rounding in _DRAWING for *_, state_dtype, rounding in kinds
    )
    if double or (accumulate and streams + 2 * drawn > 4):
        return 255
    return 128 if accumulate or streams > 3 else 80


def vector_constants(operation: str, dtypes: tuple[int, ...], doubles: bool) -> dict[str, Any]:
    """Return constants and options of ``vector_kernel``, see ``VectorTable``."""
    # 16 bytes of the narrowest parameter for each thread
    narrow = any(code in (DTYPES[torch.bfloat16], DTYPES[torch.float16]) for code in dtypes)
    return {
        "OPERATION": OPERATIONS.index(operation),
        "KINDS": dtypes,
        "WIDE": DTYPES[torch.float64 if doubles else torch.float32],
        "BLOCK": BLOCK if narrow else BLOCK // 2,
        "TAIL": TAIL,
        "LANES": LANES,
        "maxnreg": 255,
        **_OPTIONS,
    }


def preconditioner_constants(rule: str, kinds: Kinds, doubles: bool) -> dict[str, Any]:
    """Return constants and options of ``preconditioner_kernel``, see ``PreconditionerTable``."""
    return {
        "SCALARS": RULES[rule].scalars,
        "UPDATE": RULES[rule].update,
        "KINDS": kinds,
        "WIDE": DTYPES[torch.float64 if doubles else torch.float32],
        "BLOCK": BLOCK,
        "TAIL": TAIL,
        "LANES": LANES,
        "maxnreg": 255,
        **_OPTIONS,
    }


@functools.cache
def _programs(device: torch.device) -> int:
    """Return the most programs of a launch; few in the interpreter, which runs one after the other."""
    if device.type == "cpu":
        return 3
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


class TritonBackend:
    """Triton kernels for CUDA tensors, or for CPU tensors where ``TRITON_INTERPRET=1``.

    Args:
        programs: Most programs of a launch; None takes a multiple of the number of multiprocessors. The
            results are the same bit for bit.
    """

    name = "triton"
    max_inline_pointers = 0
    max_captured_pointers = 0

    def __init__(self, programs: int | None = None) -> None:
        self._programs = programs
        # by whether a step measures: the properties of the plan that its launches depend on, and the launches
        self._kept: dict[bool, tuple[tuple[Any, ...], list[_Bound]]] = {}

    def prepare(self, plan: Plan) -> None:
        """Compile and load all kernels that the steps of a plan may need under any settings."""
        with _on(plan.device):
            for measure in (False, True):
                self._bound_launches(plan, measure)

    def step(self, plan: Plan) -> None:
        """Queue one step on the current stream."""
        with _on(plan.device):
            launches = self._bound_launches(plan, plan.settings.measure)
            for stages in plan.stages():
                for stage, launch in launches:
                    if stage & stages:
                        launch()

    def vectors(self, operation: str, table: VectorTable) -> None:
        """Queue one of ``vector_tables.OPERATIONS`` on the current stream, same bits for any grid."""
        programs = max(1, min(table.n_chunks, self._programs or _programs(table.device)))
        column = table.call_column().view(torch.int64)
        with _on(table.device):
            constants = vector_constants(operation, table.dtypes, table.doubles)
            vector_kernel[(programs,)](column, **constants)

    def preconditioner(self, plan: Plan, table: PreconditionerTable) -> bool:
        """Queue the preconditioner of the next step, if its rule has one."""
        if plan.rule not in RULES:
            return False
        programs = max(1, min(plan.n_chunks, self._programs or _programs(plan.device)))
        columns = (c.view(torch.int64) for c in (plan.step_column(), table.call_column()))
        with _on(plan.device):
            constants = preconditioner_constants(plan.rule, plan.kinds, table.doubles)
            preconditioner_kernel[(programs,)](*columns, **constants)
        return True

    def _bound_launches(self, plan: Plan, measure: bool) -> list[_Bound]:
        """Return the launches of a step, the same ones until a property changes that they depend on."""
        column = plan.step_column()
        properties = (
            *(address_of(column), plan.device, plan.rule, plan.kinds, plan.n_chunks, plan.n_tiles),
            *(len(plan.rows), plan.record["ring_buffer"] is None, plan.average[0], plan.groups.has_spheres),
            plan.reduction is None,
        )
        kept = self._kept.get(measure)
        if kept is None or kept[0] != properties:
            address = column.view(torch.int64)
            launches = [(stage, _bind(address, *launch)) for stage, *launch in self._launches(plan, measure)]
            kept = self._kept[measure] = properties, launches
        return kept[1]

    def _launches(self, plan: Plan, measure: bool) -> Iterator[tuple[int, Any, int, dict[str, Any]]]:
        """Yield stage, kernel, number of programs and constants of each launch of a step.

        Args:
            plan: The plan.
            measure: Whether the update must know the norms beforehand.

        Yields:
            The launches in order.
        """
        programs = max(1, min(plan.n_chunks, self._programs or _programs(plan.device)))
        telemetry, averages = plan.record["ring_buffer"] is not None, plan.average[0] is not None
        spheres, spread, kinds = plan.groups.has_spheres, plan.reduction is not None, plan.kinds
        if measure:
            yield MEASURE_STAGE, measure_kernel, programs, measure_constants(kinds)
        if spread:
            constants = fold_constants(measured=True, norms=True, squares=False)
            yield MEASURE_STAGE, fold_kernel, 1, constants
        blocks = max(1, min(-(-len(plan.rows) // LANES), self._programs or _programs(plan.device)))
        constants = decide_constants(plan.rule, spheres=spheres, spread=spread)
        yield UPDATE_STAGE, decide_kernel, blocks, constants
        accumulate = telemetry and not measure
        if plan.rule in RULES:
            tiled = plan.n_tiles > 1 and not (accumulate or spheres)
            # as many programs as tiles: the device starts one where another ends
            tiles = plan.n_chunks * plan.n_tiles
            constants = update_constants(
                plan.rule, kinds, accumulate=accumulate, average=averages, spheres=spheres, tiled=tiled
            )
            most = min(tiles, self._programs or tiles) if tiled else programs
            yield UPDATE_STAGE, update_kernel, most, constants
            last = UPDATE_STAGE
        else:
            constants = stage1_constants(plan.rule, kinds, accumulate=accumulate, spread=spread)
            yield UPDATE_STAGE, stage1_kernel, programs, constants
            most = max(1, min(len(plan.rows), self._programs or _programs(plan.device)))
            if spread:
                constants = fold_layers_constants(plan.rule, accumulate=accumulate)
                yield UPDATE_STAGE, fold_layers_kernel, most, constants
            constants = reduce_layers_constants(plan.rule, accumulate=accumulate, spread=spread)
            yield LAYER_STAGE, reduce_layers_kernel, most, constants
            constants = stage2_constants(plan.rule, kinds, average=averages, spheres=spheres)
            yield LAYER_STAGE, stage2_kernel, programs, constants
            last, accumulate = LAYER_STAGE, False
        if spread and (accumulate or spheres):
            constants = fold_constants(measured=False, norms=accumulate, squares=spheres)
            yield last, fold_kernel, 1, constants
        if accumulate or (spread and spheres):
            constants = finish_constants(accumulate=accumulate, spheres=spread and spheres, spread=spread)
            yield FINISH_STAGE, finish_kernel, 1, constants
        if spheres:
            yield FINISH_STAGE, rescale_kernel, programs, rescale_constants(kinds, average=averages)


def _bind(column: Tensor, kernel: Any, programs: int, constants: dict[str, Any]) -> Callable[[], Any]:
    """Compile and load a kernel, and return its launch.

    The compiled kernel is launched as Triton's tutorial on softmax does: a launch by the kernel itself takes
    several times as long, because it looks the compiled one up and compares all global variables.
    """
    compiled = kernel.warmup(column, grid=(1,), **constants)
    if compiled is None:
        # the interpreter compiles nothing
        return functools.partial(kernel[(programs,)], column, **constants)
    # all arguments by position, constants included
    arguments = [constants[name] for name in kernel.arg_names[1:]]
    return functools.partial(compiled[(programs, 1, 1)], column, *arguments)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context that makes a device current, because Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

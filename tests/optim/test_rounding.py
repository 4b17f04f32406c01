"""Rounding of 16-bit parameters: random bits, each mode against exact arithmetic, and what is kept beside them.

The tests of backends run once more by Triton in ``interpreted.py``.
"""

import copy
import math

import pytest
import torch
from cases import CASES, assert_close, assert_same_bits, device_of, make_params, set_grads, through_file
from torch.nn import Parameter

import fused_warmup as fw
from fused_warmup.distributed import spread
from fused_warmup.plan import plan as table
from fused_warmup.reference.rounding import (
    MODES,
    RESIDUES,
    SPHERE_PASS,
    UPDATE_PASS,
    Rounding,
    load,
    philox,
    random_bits,
    round_stochastically,
    split,
    store,
)

BF16, F16 = torch.bfloat16, torch.float16
# modes that a dtype has
PAIRS = [(mode, dtype) for mode in MODES for dtype in (BF16, F16) if (mode, dtype) != ("split", F16)]
EXACT = ("split", "master")
each_pair = pytest.mark.parametrize(("mode", "dtype"), PAIRS, ids=lambda x: str(x).replace("torch.", ""))
SHAPES = [(0,), (), (7,), (2, 3, 5), (257,), (33000,)]


@pytest.fixture(params=fw.available_backends())
def backend(request):
    return request.param


def bits(tensor):
    return tensor.detach().cpu().view(torch.int16)


# random bits


def test_philox_has_the_answers_of_its_authors():
    """The first three of the known answers of Random123, for 7 and 10 rounds."""
    counters = [[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]
    words = torch.tensor(counters).t()
    keys = [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0xA4093822, 0x299F31D0)]
    answers = {
        7: ["5f6fb709 0d893f64 4f121f81 4f730a48"],
        10: [
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ],
    }
    for rounds, expected in answers.items():
        for i, answer in enumerate(expected):
            found = philox(words[:, i : i + 1], keys[i], rounds)[:, 0]
            assert " ".join(f"{int(word):08x}" for word in found) == answer


def test_random_bits_depend_on_all_of_their_key():
    elements = torch.arange(4096)
    base = random_bits(elements, 7, 1, 5, UPDATE_PASS)
    others = [
        random_bits(elements, 8, 1, 5, UPDATE_PASS),
        random_bits(elements, 7 + 2**32, 1, 5, UPDATE_PASS),
        random_bits(elements, 7, 2, 5, UPDATE_PASS),
        random_bits(elements, 7, 1, 6, UPDATE_PASS),
        random_bits(elements, 7, 1, 5, SPHERE_PASS),
        random_bits(elements + 4096, 7, 1, 5, UPDATE_PASS),
        random_bits(elements + (1 << 35), 7, 1, 5, UPDATE_PASS),
    ]
    for other in others:
        # two independent draws of 16 bits agree in one of 65,536 elements
        assert (base == other).double().mean() < 0.002
    assert (random_bits(elements[5:9], 7, 1, 5, UPDATE_PASS) == base[5:9]).all()
    mean, deviation = base.double().mean() / 65536, base.double().std() / 65536
    assert abs(mean - 0.5) < 4 * math.sqrt(1 / 12 / 4096)
    assert abs(deviation - math.sqrt(1 / 12)) < 0.01


# the functions of each mode


def values(count=1 << 16, seed=0):
    """float32 numbers of all magnitudes, the special ones included."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    found = pattern.to(torch.int32).view(torch.float32)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, -3.39e38, 65504.0, 65519.0, 65520.0]
    special += [1.00390625, -1.00390625, 2.0**-24, 2.0**-25, 1e-45, -1e-45, 6e-5, 2.0**-14]
    found[: len(special)] = torch.tensor(special)
    return found


def test_a_split_value_is_the_float32_bit_for_bit():
    value = values()
    param, remainder = split(value)
    number = ~value.isnan()
    assert_same_bits("value", load("split", param, remainder)[number], value[number])
    assert load("split", param, remainder)[~number].isnan().all()
    error = (param.double() - value.double()).abs()
    nearest = (value.to(BF16).double() - value.double()).abs()
    finite = value.isfinite() & param.isfinite()
    assert (error[finite] == nearest[finite]).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_residues_lie_beside_the_nearest_parameter(dtype):
    value = values()
    rounding = Rounding("kahan", 3, 0, 1, torch.arange(value.numel()))
    for mode in ("kahan", "master"):
        param, residue = store(value, dtype, Rounding(mode, *(3, 0, 1), rounding.elements))
        assert_same_bits(mode, param, value.to(dtype))
        found = load(mode, param, residue)
        # 8 more bits for a compensation, all for a master copy
        assert residue is not None
        assert residue.dtype == RESIDUES[mode][1]
        finite = param.isfinite() & value.isfinite()
        lacking = (value.double() - param.double()).abs()
        least = 2.0**-24 * value.double().abs() + 2.0**-133
        bound = lacking * 2.0**-7 + least if mode == "kahan" else 0.0 * lacking
        assert ((found.double() - value.double()).abs() <= bound)[finite].all()
        assert (found.to(dtype) == param)[finite].all()
    assert rounding.elements is not None


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_stochastic_rounding_takes_a_neighbour(dtype):
    value = values()
    drawn = Rounding("stochastic", 3, 0, 1, torch.arange(value.numel())).bits(value)
    found = round_stochastically(value, dtype, drawn)
    nearest = value.to(dtype)
    below = round_stochastically(value, dtype, torch.zeros_like(drawn))
    above = (bits(below) + 1).view(dtype)
    assert value.isnan().sum() == found.isnan().sum()
    number = ~value.isnan()
    is_neighbour = (found == below) | (found == above)
    assert is_neighbour[number].all()
    # what 16 bits hold stays, and nothing but an infinity or the nearest number gets infinite
    kept = number & (nearest.float() == value)
    assert (found == nearest)[kept].all()
    assert (found.isinf() == nearest.isinf())[number].all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_mean_over_all_random_bits_is_the_number(dtype):
    """Over all 65,536 patterns; below the smallest normal float16 to 2**-16 of its last digit."""
    every = torch.arange(65536, dtype=torch.int32)
    for number in (1.0, 1.001, -3.14159, 2.5e-3, 7e-5, 6.2e-5, -3.3e-6, 4e-8, 1e-9, 60001.0):
        value = torch.full((65536,), number)
        mean = float(round_stochastically(value, dtype, every).double().mean())
        least = 2.0**-40 if dtype == F16 and abs(number) < 2.0**-14 else 0.0
        assert abs(mean - float(value[0])) <= least, number


def test_a_parameter_written_from_outside_has_its_new_value():
    for dtype in (BF16, F16):
        for mode in ("kahan", "master", *(["split"] if dtype == BF16 else [])):
            value = torch.tensor([1.001, -0.5003, 3e-3, -7.77, 1.001])
            _, residue = store(value, dtype, Rounding(mode, 0, 0, 0, torch.arange(5)))
            new = torch.tensor([0.0, -0.0, 0.25, 0.0, -3.0], dtype=dtype)
            found = load(mode, new, residue)
            # what another value lacked is used only if it is less than the last digit of the new one
            relative = 0.0 if mode == "master" else 2.0**-8
            assert_close(f"{mode} {dtype}", found, new.float(), 1e-38, relative)


# stochastic rounding on the backends


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_stochastic_rounding_is_unbiased(backend, dtype):
    """The mean over elements, steps and seeds within four standard errors, and the variance that of the theory."""
    digit = 2.0**-8 if dtype == BF16 else 2.0**-11
    fractions = torch.tensor([0.0, 0.03125, 0.25, 0.5, 0.71875, 0.96875])
    n, seeds = 1500, 4
    moved = []
    for seed in range(seeds):
        start = torch.full((len(fractions), n), 0.75, dtype=dtype, device=device_of(backend))
        param = Parameter(start.clone())
        opt = fw.SGD([param], lr=digit, backend=backend, param_rounding="stochastic", rounding_seed=seed)
        for _ in range(2):
            with torch.no_grad():
                param.copy_(start)
            param.grad = -fractions[:, None].expand_as(param).to(param).contiguous()
            opt.step()
            moved.append((param.detach().double() - 0.75).cpu() / digit)
    found = torch.cat(moved, 1)
    count = found.shape[1]
    # the last digit of 0.75 is `digit`: one step up or none
    assert ((found == 0.0) | (found == 1.0)).all()
    p = fractions.double()
    error = (found.mean(1) - p).abs()
    assert (error <= 4 * (p * (1 - p) / count).sqrt()).all()
    variance = found.var(1)
    spread = p * (1 - p) * ((1 - 2 * p) ** 2 / count).sqrt() + p * (1 - p) * 4 / math.sqrt(count)
    assert ((variance - p * (1 - p)).abs() <= spread + 1e-12).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_beyond_the_largest_number_the_nearest_one_is_taken(backend, dtype):
    limit, digit = torch.finfo(dtype).max, 2.0**120 if dtype == BF16 else 2.0**5
    for fraction, expected in ((0.25, limit), (0.75, math.inf), (-0.75, -math.inf)):
        sign = math.copysign(1.0, fraction)
        param = Parameter(torch.full((261,), sign * limit, dtype=dtype, device=device_of(backend)))
        opt = fw.SGD([param], lr=1.0, backend=backend, param_rounding="stochastic")
        param.grad = torch.full_like(param, -fraction * digit)
        opt.step()
        assert (param == expected).all()


def trained(case, mode, dtype, backend, steps=4, *, threads=2, seed=11, shapes=SHAPES, **options):
    torch.set_num_threads(threads)
    params = make_params(dtype, shapes, device=device_of(backend))
    opt = case.make(params, backend=backend, param_rounding=mode, rounding_seed=seed, **options)
    for t in range(steps):
        set_grads(params, t)
        opt.step()
    return params, opt


@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_random_bits_do_not_depend_on_threads(mode):
    first, _ = trained(CASES[0], mode, BF16, "cpu", threads=1, shapes=[(100_003,), (5,)])
    for threads in (2, 5):
        again, _ = trained(CASES[0], mode, BF16, "cpu", threads=threads, shapes=[(100_003,), (5,)])
        for a, b in zip(first, again, strict=True):
            assert_same_bits("param", a, b)
    other, _ = trained(CASES[0], mode, BF16, "cpu", seed=12, shapes=[(100_003,), (5,)])
    same = mode == "kahan"
    # the nearest parameter hardly depends on the bits, a stochastic one does
    assert bool((bits(first[0]) == bits(other[0])).float().mean() > 0.99) == same


def test_bits_of_an_element_do_not_depend_on_its_neighbours(backend, monkeypatch):
    """A tensor cut by rows, and one cut by columns, are rounded as the whole one."""
    whole = make_params(BF16, [(6, 50)], device=device_of(backend))
    opt = fw.SGD(whole, lr=0.1, backend=backend, param_rounding="stochastic", rounding_seed=5)
    set_grads(whole, 0)
    opt.step()
    start = make_params(BF16, [(6, 50)], device=device_of(backend))
    set_grads(start, 0)
    for cut, place in (
        ((slice(1, 4), slice(0, 50)), (50, 150, 150)),
        ((slice(0, 6), slice(3, 20)), (3, 17, 50)),
    ):
        part = Parameter(start[0].detach()[cut].clone())
        part.grad = start[0].grad[cut].clone()
        own = fw.SGD([part], lr=0.1, backend=backend, param_rounding="stochastic", rounding_seed=5)
        for module in (table, spread):
            monkeypatch.setattr(module, "place_of", lambda param, place=place: place)
        own.step()
        assert_same_bits("part", part.detach(), whole[0].detach()[cut].contiguous())
        monkeypatch.undo()


# every optimizer with an exact mode is the float32 optimizer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", EXACT)
def test_exact_modes_follow_float32_bit_for_bit(case, mode, backend):
    shapes = [s for s in SHAPES if s != (33000,)] if backend == "triton" else SHAPES
    params, opt = trained(case, mode, BF16, backend, shapes=shapes)
    wide = make_params(torch.float32, shapes, device=device_of(backend))
    plain = case.make(wide, backend=backend)
    for t in range(4):
        set_grads(wide, t)
        plain.step()
    for found, expected, param in zip(opt.exact_parameters(), wide, params, strict=True):
        assert_same_bits("value", found, expected.detach())
        error = (param.detach().double() - expected.detach().double()).abs()
        nearest = (expected.detach().to(BF16).double() - expected.detach().double()).abs()
        assert torch.equal(error, nearest)


@each_pair
@pytest.mark.parametrize("option", ["average", "sphere", "clip"])
@pytest.mark.parametrize("case", ["adam", "sgd-momentum", "lamb", "adamp"])
@pytest.mark.parametrize("backend", [name for name in fw.available_backends() if name != "reference"])
def test_every_backend_rounds_as_the_reference(case, option, mode, dtype, backend):
    """One step, so that the first rounding which falls the other way does not grow."""
    options = {
        "average": {"average": fw.EMA(0.5)},
        "sphere": {"projection": "sphere", "weight_decay": 0.0, "average": fw.EMA(0.5)},
        "clip": {"max_grad_norm": 0.5},
    }[option]
    found_case = next(c for c in CASES if c.name == case)
    sides = []
    for name in (backend, "reference"):
        params, opt = trained(found_case, mode, dtype, name, 1, shapes=[(7,), (2, 3, 5), (257,)], **options)
        sides.append((params, opt, opt.exact_parameters()))
    # relative: two last digits of what a mode stores, which a difference in the last digit of float32 decides
    digits = {"nearest": 2.0**-7, "stochastic": 2.0**-7, "kahan": 2.0**-15, "split": 0.0, "master": 0.0}
    # absolute: parameters and updates are below 4
    near, beside = 4 * 2.0**-23, digits[mode] if dtype == BF16 else digits[mode] / 8
    for a, b, x, y in zip(sides[0][0], sides[1][0], sides[0][2], sides[1][2], strict=True):
        assert_close("parameter", a, b, near, 2.0**-7 if dtype == BF16 else 2.0**-10)
        assert_close("value", x, y, near, beside)
        if option != "clip":
            average = [side[1].state[p]["average"] for side, p in zip(sides, (a, b), strict=True)]
            assert_close("average", average[0], average[1], near, beside)
    if option == "sphere":
        own, theirs = (sum(float(v.double().square().sum()) for v in side[2]) for side in sides)
        assert own == pytest.approx(theirs, rel=1e-3)


def check_rounded_bits(mode, dtype, backend, shapes=SHAPES):
    """Steps of SGD, whose update is one product and sum with one rounding, against the reference bit for bit."""
    sides = []
    for name in (backend, "reference"):
        params = make_params(dtype, shapes, device=device_of(name))
        opt = fw.SGD(params, lr=2.0**-9, backend=name, param_rounding=mode, rounding_seed=2**63 + 5)
        for t in range(3):
            set_grads(params, t)
            opt.step()
        sides.append((params, opt))
    for p, q in zip(sides[0][0], sides[1][0], strict=True):
        assert_same_bits("param", p.detach(), q.detach())
        for key, value in sides[1][1].state[q].items():
            assert_same_bits(key, sides[0][1].state[p][key], value)


@each_pair
def test_bits_are_those_of_the_reference(mode, dtype, backend):
    check_rounded_bits(mode, dtype, backend)


@each_pair
def test_numbers_that_are_not_finite_are_those_of_the_reference(mode, dtype, backend):
    """Also next to the largest ones; a NaN of any pattern stays one, although adding to it would wrap around."""
    limit = torch.finfo(dtype)
    numbers = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, limit.max, -limit.max, limit.tiny, 1.0], dtype=dtype
    )
    start, grads = (x.flatten() for x in torch.meshgrid(numbers, numbers, indexing="ij"))
    found = []
    for name in (backend, "reference"):
        param = Parameter(start.clone().to(device_of(name)))
        opt = fw.SGD([param], lr=0.5, momentum=0.5, backend=name, param_rounding=mode)
        param.grad = grads.to(param.device)
        opt.step()
        patterns = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
        opt.state[param]["momentum_buffer"][-3:] = patterns
        opt.step()
        found.append(param.detach().cpu())
    assert found[0][-3:].isnan().all()
    assert torch.equal(found[0].isnan(), found[1].isnan())
    number = ~found[0].isnan()
    if backend == "cpu":
        # the same with every instruction set
        assert set((bits(found[0])[~number] & 0x7FFF).tolist()) == {0x7FC0 if dtype == BF16 else 0x7E00}
    assert torch.equal(bits(found[0])[number], bits(found[1])[number])


@each_pair
def test_one_special_number_among_ordinary_ones_is_that_of_the_reference(mode, dtype, backend):
    """Wherever it lies: kernels that convert a block of ordinary numbers alike must notice the one."""
    limit = torch.finfo(dtype).max
    # a NaN of all ones, to whose bits nothing can be added
    ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    specials = [*ones, *torch.tensor([math.inf, -math.inf, limit, -limit])]
    sides = []
    for name in (backend, "reference"):
        params = make_params(dtype, [(261,)] * 4 * len(specials), device=device_of(name))
        opt = fw.SGD(params, lr=0.5, momentum=0.5, backend=name, param_rounding=mode)
        set_grads(params, 0)
        opt.step()
        set_grads(params, 1)
        for k, param in enumerate(params):
            place = (0, 100, 255, 260)[k % 4]
            param.grad[place] = math.copysign(limit, specials[k // 4])
            opt.state[param]["momentum_buffer"][place] = specials[k // 4]
        opt.step()
        values = opt.exact_parameters()
        set_grads(params, 2)
        opt.step()
        found = [x.detach().cpu() for x in (*values, *params)]
        # of a NaN the sign is that of the instruction
        sides.append([torch.where(x.isnan(), 7.0, x) for x in found])
    for x, y in zip(*sides, strict=True):
        assert_same_bits("value", x, y)


@each_pair
def test_what_was_written_from_outside_is_the_value_of_the_next_step(mode, dtype, backend):
    """Zeros of both signs beside what other numbers lacked, and numbers that belong to other ones."""
    values = []
    for name in (backend, "reference"):
        (param,) = params = make_params(dtype, [(261,)], device=device_of(name))
        opt = fw.SGD(params, lr=0.1, backend=name, param_rounding=mode)
        set_grads(params, 0)
        opt.step()
        place = torch.arange(261, device=param.device) % 3
        with torch.no_grad():
            param.copy_(torch.where(place == 0, 0.0, torch.where(place == 1, -0.0, param.roll(1))))
        param.grad.zero_()
        opt.step()
        (value,) = opt.exact_parameters()
        values.append(value.cpu())
    assert torch.equal(*values)


# updates that vanish


def test_nearest_leaves_a_parameter_where_it_is(backend):
    """1,000 unit gradients at 1e-3 move a float32 from 1 to 0, and a bfloat16 not at all."""
    param = Parameter(torch.ones(4, dtype=BF16, device=device_of(backend)))
    opt = fw.SGD([param], lr=1e-3, backend=backend)
    param.grad = torch.ones_like(param)
    for _ in range(20):
        opt.step()
    assert (param == 1.0).all()


@pytest.mark.parametrize("lr", [1e-3, 1e-5, 3e-7])
@pytest.mark.parametrize("mode", ["stochastic", "kahan", "split", "master"])
def test_ten_thousand_tiny_updates(mode, lr):
    """Each mode against float32; updates of 3e-7 are below the last digit of a compensation."""
    steps, n = (1000 if lr == 1e-3 else 10_000), 256
    param = Parameter(torch.ones(n, dtype=BF16))
    wide = Parameter(torch.ones(n))
    opts = [
        fw.SGD([param], lr=lr, param_rounding=mode, rounding_seed=3, telemetry=False),
        fw.SGD([wide], lr=lr, telemetry=False),
    ]
    param.grad, wide.grad = torch.ones_like(param), torch.ones_like(wide)
    for t in range(steps):
        for opt in opts:
            opt.step()
        if mode in EXACT and t % 997 == 0:
            assert_same_bits("value", opts[0].exact_parameters()[0], wide.detach())
    value, expected = opts[0].exact_parameters()[0].double(), wide.detach().double()
    if mode in EXACT:
        assert torch.equal(value, expected)
        return
    # a step up or down at random: variance f (1 - f) of a last digit, of 2**-8 or of that of the compensation
    digit = 2.0**-8 if mode == "stochastic" else 2.0**-17
    deviation = digit * math.sqrt(min(0.25, lr / digit) * steps)
    assert (value.mean() - expected.mean()).abs() < 4 * deviation / math.sqrt(n) + 1e-4
    assert value.std() < 2 * deviation + 1e-6
    assert (value != 1.0).any()


# states


def test_states_have_the_names_and_dtypes_of_the_mode():
    for mode, dtype in PAIRS:
        params, opt = trained(CASES[0], mode, dtype, "cpu", 1, shapes=[(5,)])
        wide, _ = trained(CASES[0], mode, torch.float32, "cpu", 1, shapes=[(5,)])
        own = {key for key in opt.state[params[0]] if key not in ("step", "exp_avg", "exp_avg_sq")}
        assert own == ({RESIDUES[mode][0]} if mode in RESIDUES else set())
        for key in own:
            assert opt.state[params[0]][key].dtype == RESIDUES[mode][1]
        assert wide[0].dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_a_group_may_have_parameters_of_several_dtypes(mode, backend):
    params = [
        *make_params(BF16, [(9,)], device=device_of(backend)),
        *make_params(torch.float32, [(9,)], device=device_of(backend)),
    ]
    alone = make_params(torch.float32, [(9,)], device=device_of(backend))
    opts = [
        fw.Adam(params, lr=1e-2, backend=backend, param_rounding=mode),
        fw.Adam(alone, lr=1e-2, backend=backend),
    ]
    for t in range(3):
        for p in (*params, *alone):
            p.grad = torch.linspace(-1, 1, 9, device=p.device).to(p.dtype) * (t + 1)
        for opt in opts:
            opt.step()
    assert_same_bits("float32", params[1], alone[0])


@each_pair
def test_a_resumed_run_has_the_same_bits(mode, dtype, backend):
    shapes = [(7,), (2, 3, 5), (257,)]
    params, opt = trained(CASES[0], mode, dtype, backend, 3, shapes=shapes)
    saved = through_file([[p.detach() for p in params], opt.state_dict()])
    again = [Parameter(p.to(device_of(backend))) for p in saved[0]]
    resumed = fw.Adam(again, backend=backend)
    resumed.load_state_dict(saved[1])
    copied_params, copied = copy.deepcopy((params, opt))
    for t in range(3, 6):
        for own, each in ((params, opt), (again, resumed), (copied_params, copied)):
            set_grads(own, t)
            each.step()
    assert resumed.param_groups[0]["param_rounding"] == mode
    assert resumed.param_groups[0]["rounding_seed"] == 11
    for p, q, r in zip(params, again, copied_params, strict=True):
        assert_same_bits("resumed", q, p)
        assert_same_bits("copied", r, p)
        for key, value in opt.state[p].items():
            assert_same_bits(key, resumed.state[q][key], value)


@pytest.mark.parametrize("before", ["nearest", "stochastic", "kahan", "split", "master"])
@pytest.mark.parametrize("after", ["nearest", "stochastic", "kahan", "split", "master"])
@pytest.mark.parametrize("how", ["option", "state dict"])
def test_changing_the_mode_keeps_the_value(before, after, how):
    params, opt = trained(CASES[0], before, BF16, "cpu", 5, shapes=[(257,)])
    value = opt.exact_parameters()[0]
    moments = {key: opt.state[params[0]][key].clone() for key in ("exp_avg", "exp_avg_sq", "step")}
    if how == "state dict":
        saved = opt.state_dict()
        saved["param_groups"][0]["param_rounding"] = after
        params = [Parameter(params[0].detach().clone())]
        opt = fw.Adam(params)
        opt.load_state_dict(saved)
    else:
        opt.param_groups[0]["param_rounding"] = after
    # builds the table without making a step
    opt.init_state()
    names = {key for key in opt.state[params[0]] if key in ("kahan_comp", "remainder", "master_param")}
    assert names == ({RESIDUES[after][0]} if after in RESIDUES else set())
    found = opt.exact_parameters()[0]
    if after in EXACT:
        assert_same_bits("value", found, value)
    elif after == "kahan":
        assert_close("value", found, value, 0.0, 2.0**-16)
        if before == "kahan":
            assert_same_bits("value", found, value)
    else:
        assert_same_bits("value", found, params[0].detach().float())
    for key, moment in moments.items():
        assert_same_bits(key, opt.state[params[0]][key], moment)
    set_grads(params, 9)
    opt.step()


@each_pair
def test_a_checkpoint_of_torch_loads_into_each_mode(mode, dtype):
    theirs = make_params(dtype, [(17,)])
    torch_opt = torch.optim.Adam(theirs, lr=1e-2)
    set_grads(theirs, 0)
    torch_opt.step()
    params = [Parameter(theirs[0].detach().clone())]
    opt = fw.Adam(params, param_rounding=mode)
    opt.load_state_dict(torch_opt.state_dict())
    opt.init_state()
    assert opt.param_groups[0]["param_rounding"] == mode
    assert_same_bits("value", opt.exact_parameters()[0], params[0].detach().float())
    back = torch.optim.Adam(theirs)
    back.load_state_dict(opt.state_dict())
    assert_close("exp_avg", back.state[theirs[0]]["exp_avg"], opt.state[params[0]]["exp_avg"], 0.0, 2.0**-8)


@each_pair
def test_float32_values_go_in_and_come_out(mode, dtype):
    values = [torch.randn(33), torch.randn(4, 5)]
    params = [Parameter(torch.zeros(33, dtype=dtype)), Parameter(torch.zeros(5, 4, dtype=dtype).t())]
    opt = fw.Adam(params, param_rounding=mode)
    opt.set_exact_parameters(values)
    for found, value, param in zip(opt.exact_parameters(), values, params, strict=True):
        nearest = value.to(dtype)
        assert ((param - nearest).abs().double() <= 2.0**-7 * nearest.abs().double()).all()
        if mode in EXACT:
            assert torch.equal(found, value)
        else:
            assert_close("value", found, value, 0.0, 2.0**-15 if mode == "kahan" else 2.0**-8)
    set_grads(params, 0)
    opt.step()


def test_exact_parameters_of_other_dtypes_are_the_parameters():
    params = [Parameter(torch.randn(3)), Parameter(torch.randn(3, dtype=torch.float64))]
    opt = fw.Adam(params, param_rounding="kahan")
    for found, param in zip(opt.exact_parameters(), params, strict=True):
        assert_same_bits("param", found, param.detach())
    opt.set_exact_parameters([torch.ones(3), torch.ones(3)])
    assert all((p == 1.0).all() for p in params)


# what is kept, skipped, swapped and scaled


@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_step_changes_no_residue(mode, backend):
    params, opt = trained(CASES[0], mode, BF16, backend, 2, shapes=[(257,)], nonfinite="skip")
    before = copy.deepcopy((params[0].detach(), dict(opt.state[params[0]])))
    params[0].grad.view(-1)[3] = math.nan
    opt.step()
    assert_same_bits("param", params[0].detach(), before[0])
    for key, value in before[1].items():
        assert_same_bits(key, opt.state[params[0]][key], value)


@pytest.mark.parametrize("mode", EXACT)
def test_a_sphere_begins_at_the_norm_of_the_exact_value(mode, backend):
    params, opt = trained(CASES[0], mode, BF16, backend, 3, shapes=[(257,)])
    opt.param_groups[0].update(projection="sphere", lr=0.0)
    norm = float(opt.exact_parameters()[0].double().norm())
    params[0].grad = torch.zeros_like(params[0])
    opt.step()
    assert float(opt.param_groups[0]["norm"]) == pytest.approx(norm, rel=1e-12)
    assert norm != pytest.approx(float(params[0].detach().double().norm()), rel=1e-9)


@pytest.mark.parametrize("mode", ["kahan", "split", "master"])
def test_an_average_is_of_the_exact_value(mode, backend):
    params, opt = trained(CASES[0], mode, BF16, backend, 3, shapes=[(257,)], average=fw.SWA(3))
    average, value = opt.state[params[0]]["average"], opt.exact_parameters()[0]
    assert_same_bits("average", average, value)
    assert not torch.equal(value, params[0].detach().float())
    before = params[0].detach().clone()
    with opt.averaged_parameters():
        assert_same_bits("param", params[0].detach(), average.to(BF16))
        with pytest.raises(RuntimeError, match="exact_parameters"):
            opt.exact_parameters()
    assert_same_bits("param", params[0].detach(), before)
    assert_same_bits("value", opt.exact_parameters()[0], value)


def test_strided_parameters_keep_residues(backend):
    base = torch.randn(12, 10).to(BF16).to(device_of(backend))
    plain = Parameter(base[::2, ::2].clone())
    strided = Parameter(base[::2, ::2])
    opts = [fw.SGD([p], lr=1e-4, backend=backend, param_rounding="split") for p in (plain, strided)]
    for t in range(30):
        for p, opt in zip((plain, strided), opts, strict=True):
            p.grad = torch.full_like(plain, 1.0 + t % 3)
            opt.step()
    assert_same_bits("param", strided.detach().contiguous(), plain.detach())
    assert_same_bits("value", opts[1].exact_parameters()[0], opts[0].exact_parameters()[0])


def test_a_parameter_that_becomes_float32_drops_its_residue():
    params, opt = trained(CASES[0], "kahan", BF16, "cpu", 2, shapes=[(9,)])
    params[0].data = params[0].data.float()
    params[0].grad = torch.ones(9)
    opt.step()
    assert "kahan_comp" not in opt.state[params[0]]
    params[0].data = params[0].data.to(F16)
    params[0].grad = torch.ones(9, dtype=F16)
    opt.step()
    assert opt.state[params[0]]["kahan_comp"].dtype == BF16


# errors


def test_bad_input_is_named():
    params = make_params(BF16, [(3,)])
    halves = make_params(F16, [(3,)])
    with pytest.raises(ValueError, match=r"param_rounding must be one of 'nearest', .* got 'up'"):
        fw.Adam(params, param_rounding="up")
    with pytest.raises(ValueError, match="param_rounding must be one of"):
        fw.Adam(params, param_rounding=None)  # type: ignore[arg-type]
    for seed, condition in ((-1, ">= 0"), (2**64, "<= 18446744073709551615")):
        with pytest.raises(ValueError, match=f"rounding_seed must be {condition}, got {seed}"):
            fw.Adam(params, rounding_seed=seed)
    with pytest.raises(TypeError, match="rounding_seed must be an integer"):
        fw.Adam(params, rounding_seed=1.5)  # type: ignore[arg-type]
    fw.Adam(params, rounding_seed=2**64 - 1)
    message = r"param_rounding of parameter 0 \(torch.float16\) must be .* got 'split'"
    with pytest.raises(ValueError, match=message):
        fw.Adam(halves, param_rounding="split")
    opt = fw.Adam(params, param_rounding="split")
    with pytest.raises(ValueError, match=r"parameter 1 \(torch.float16\)"):
        opt.add_param_group({"params": halves})
    opt.add_param_group({"params": halves, "param_rounding": "kahan"})
    set_grads([*params, *halves], 0)
    opt.step()
    before = [p.detach().clone() for p in (*params, *halves)]
    opt.param_groups[1]["param_rounding"] = "split"
    with pytest.raises(ValueError, match=r"parameter 1 \(torch.float16\)"):
        opt.step()
    for p, q in zip((*params, *halves), before, strict=True):
        assert_same_bits("param", p.detach(), q)
    opt.param_groups[1]["param_rounding"] = "kahan"
    opt.step()


def test_a_state_dict_of_two_modes_is_refused():
    params, opt = trained(CASES[0], "kahan", BF16, "cpu", 1, shapes=[(5,)])
    saved = opt.state_dict()
    saved["state"][0] = {**saved["state"][0], "remainder": torch.zeros(5, dtype=BF16)}
    before = params[0].detach().clone()
    with pytest.raises(
        ValueError, match="hold the state of one param_rounding, got 'kahan_comp and remainder'"
    ):
        opt.load_state_dict(saved)
    assert_same_bits("param", params[0].detach(), before)
    for bad in ({"kahan_comp": torch.zeros(4)}, {"kahan_comp": "none"}):
        wrong = opt.state_dict()
        wrong["state"][0] = {**wrong["state"][0], **bad}
        with pytest.raises((ValueError, TypeError), match="kahan_comp"):
            opt.load_state_dict(wrong)


def test_values_that_do_not_fit_are_refused():
    params = make_params(BF16, [(3,), (2, 2)])
    opt = fw.Adam(params, param_rounding="kahan")
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="values must be 2 tensors, got 1"):
        opt.set_exact_parameters([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"values\[1\] must have the shape \(2, 2\)"):
        opt.set_exact_parameters([torch.zeros(3), torch.zeros(4)])
    with pytest.raises(TypeError, match=r"values\[0\] must be a tensor of real numbers"):
        opt.set_exact_parameters([1.0, torch.zeros(2, 2)])  # type: ignore[list-item]
    for p, q in zip(params, before, strict=True):
        assert_same_bits("param", p.detach(), q)

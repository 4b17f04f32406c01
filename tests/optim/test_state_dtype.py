"""States in bfloat16: stochastic rounding of every optimizer's moments, and what is read and kept of them.

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
from fused_warmup.reference.rounding import STATE_PASSES, Rounding, round_stochastically

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(0,), (), (7,), (2, 3, 5), (257,), (2049,)]
SEED = 2**63 + 5
LAYERED = (fw.LAMB, fw.AdamP, fw.SGDP)
# coupled decay enters the moments by a product and a sum, which backends may round once or twice
UNDECAYED = [case for case in CASES if case.cls in LAYERED and "decay_mode" not in case.options]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(params=fw.available_backends())
def backend(request):
    return request.param


def trained(case, dtype, backend, steps=1, *, shapes=SHAPES, seed=SEED, first=0, **options):
    params = make_params(dtype, shapes, device=device_of(backend))
    opt = case.make(params, **{"backend": backend, "rounding_seed": seed, **options})
    for t in range(first, first + steps):
        set_grads(params, t)
        opt.step()
    return params, opt


def moments_of(opt, param):
    return {key: opt.state[param][key] for key in opt.spec.states if key in opt.state[param]}


def rounded(value, number, seed, step, k):
    """State number ``k`` of parameter ``number`` after a step, as it must be stored."""
    elements = torch.arange(value.numel())
    bits = Rounding("stochastic", seed, number, step, elements, STATE_PASSES[k]).bits(value.cpu())
    return round_stochastically(value.cpu(), BF16, bits)


# what a step stores


@each_case
@pytest.mark.parametrize(
    ("dtype", "mode"), [(F32, "nearest"), (F16, "kahan"), (BF16, "stochastic"), (BF16, "split")], ids=str
)
def test_a_step_rounds_the_moments_of_float32(case, dtype, mode, backend):
    """Bit for bit, with the bits of each state; the update itself is that of exact moments."""
    sides = [trained(case, dtype, backend, param_rounding=mode, state_dtype=kept) for kept in (F32, BF16)]
    (wide, exact), (params, opt) = sides
    for number, (p, q) in enumerate(zip(params, wide, strict=True)):
        held = moments_of(opt, p)
        assert held.keys() == moments_of(exact, q).keys()
        for k, (key, value) in enumerate(moments_of(exact, q).items()):
            assert held[key].dtype == BF16
            assert_same_bits(key, held[key].cpu(), rounded(value, number, SEED, 0, k))
        if not isinstance(opt, LAYERED):
            assert_same_bits("param", p.detach(), q.detach())


@pytest.mark.parametrize("case", UNDECAYED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("backend", [name for name in fw.available_backends() if name != "reference"])
def test_layers_move_by_the_moments_as_they_are_stored(case, dtype, backend):
    """One step, whose moments have the same bits on every backend; (300, 200) has several chunks."""
    shapes = [(7,), (2, 3, 5), (257,), *([] if backend == "triton" else [(300, 200)])]
    sides = [
        trained(case, dtype, name, shapes=shapes, state_dtype=BF16, param_rounding="master")
        for name in (backend, "reference")
    ]
    for p, q in zip(sides[0][0], sides[1][0], strict=True):
        for key, value in moments_of(sides[1][1], q).items():
            assert_same_bits(key, sides[0][1].state[p][key], value)
    values = [opt.exact_parameters() for _, opt in sides]
    for x, y in zip(*values, strict=True):
        # parameters and updates are below 4
        assert_close("value", x, y, 4 * 2.0**-23, 2.0**-20)


def test_the_direction_of_a_layer_is_that_of_rounded_moments():
    """AdamP with plain channels: the parameter moves by the ratio of what is stored."""
    param = Parameter(torch.linspace(-1.0, 1.0, 64, dtype=F64).float())
    opt = fw.AdamP([param], lr=0.5, betas=(0.9, 0.99), eps=0.0, delta=0.0, state_dtype=BF16, rounding_seed=3)
    before = param.detach().clone()
    param.grad = torch.randn(64, generator=torch.Generator().manual_seed(0))
    opt.step()
    held = moments_of(opt, param)
    ratio = (held["exp_avg"].double() / 0.1) / (held["exp_avg_sq"].double() / 0.01).sqrt()
    moved = (before.double() - param.detach().double()) / 0.5
    assert_close("direction", moved, ratio, 1e-6, 1e-6)
    # exact moments would give the sign of the gradient
    assert (ratio.abs() - 1.0).abs().max() > 1e-3


# what rounding to nearest would lose


def test_a_second_moment_decays(backend):
    """0.999 of 1 rounds to 1 in bfloat16; its mean over elements follows the decay within four standard errors."""
    steps, n = (40 if backend == "triton" else 400), 1024
    param = Parameter(torch.zeros(n, device=device_of(backend)))
    opt = fw.Adam([param], lr=0.0, backend=backend, state_dtype=BF16, rounding_seed=4)
    opt.init_state()
    opt.state[param]["exp_avg_sq"].fill_(1.0)
    param.grad = torch.zeros_like(param)
    for _ in range(steps):
        opt.step()
    found = opt.state[param]["exp_avg_sq"].double()
    assert abs(found.mean() - 0.999**steps) < 4 * found.std() / math.sqrt(n)
    assert found.std() > 0.0
    theirs = torch.optim.Adam([Parameter(torch.zeros(n, dtype=BF16))], lr=0.0)
    theirs.param_groups[0]["params"][0].grad = torch.zeros(n, dtype=BF16)
    theirs.step()
    moment = theirs.state[theirs.param_groups[0]["params"][0]]["exp_avg_sq"].fill_(1.0)
    theirs.step()
    assert (moment == 1.0).all()


def test_moments_are_unbiased(backend):
    """The mean over elements, steps and seeds is that of float32 moments, its variance that of the theory."""
    n, digit = 4000, 2.0**-8
    errors = []
    for seed in range(3):
        param = Parameter(torch.zeros(n, device=device_of(backend)))
        opt = fw.SGD([param], lr=0.0, momentum=0.5, backend=backend, state_dtype=BF16, rounding_seed=seed)
        # the last digit of numbers in [0.5, 1) is 2**-8
        param.grad = torch.full_like(param, 0.75 + 0.3 * digit)
        opt.step()
        found = opt.state[param]["momentum_buffer"].double().cpu()
        errors.append((found - 0.75) / digit)
    up = torch.cat(errors)
    assert ((up == 0.0) | (up == 1.0)).all()
    assert abs(up.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(up))
    assert abs(up.var() - 0.3 * 0.7) < 4 * 0.3 * 0.7 * math.sqrt(0.4**2 / (0.3 * 0.7) / len(up))


def test_the_largest_moment_stays(backend):
    """A maximum that no later moment exceeds keeps its bits; it never falls."""
    param = Parameter(torch.zeros(100, device=device_of(backend)))
    opt = fw.Adam([param], amsgrad=True, betas=(0.5, 0.5), backend=backend, state_dtype=BF16)
    generator = torch.Generator().manual_seed(0)
    param.grad = 1.0 + torch.rand(100, generator=generator).to(param)
    opt.step()
    largest = opt.state[param]["max_exp_avg_sq"].clone()
    for _ in range(5):
        param.grad = 0.01 * torch.randn(100, generator=generator).to(param)
        opt.step()
        assert_same_bits("max_exp_avg_sq", opt.state[param]["max_exp_avg_sq"], largest)
    param.grad = torch.full_like(param, 8.0)
    opt.step()
    assert (opt.state[param]["max_exp_avg_sq"] > largest).all()


# the bits of an element are its own


@pytest.mark.parametrize("case", ["adam", "lamb", "adamp"])
def test_bits_do_not_depend_on_threads(case):
    found_case = next(c for c in CASES if c.name == case)
    threads, sides = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        sides.append(trained(found_case, F32, "cpu", 3, shapes=[(100_003,), (40, 3001)], state_dtype=BF16))
    torch.set_num_threads(threads)
    for params, opt in sides[1:]:
        for p, q in zip(params, sides[0][0], strict=True):
            assert_same_bits("param", p.detach(), q.detach())
            for key, value in moments_of(sides[0][1], q).items():
                assert_same_bits(key, opt.state[p][key], value)
    _, other = trained(found_case, F32, "cpu", 3, shapes=[(100_003,)], state_dtype=BF16, seed=1)
    mine, theirs = (opt.state[opt.param_groups[0]["params"][0]]["exp_avg"] for opt in (sides[0][1], other))
    assert 0.1 < (mine == theirs).float().mean() < 0.9


def test_bits_of_an_element_do_not_depend_on_its_neighbours(backend, monkeypatch):
    """A tensor cut by rows, and one cut by columns, have the moments of the whole one."""
    options = {"backend": backend, "state_dtype": BF16, "rounding_seed": 5}
    whole = make_params(F32, [(6, 50)], device=device_of(backend))
    opt = fw.Adam(whole, **options)
    set_grads(whole, 0)
    grad = whole[0].grad.clone()
    opt.step()
    for cut, place in (
        ((slice(1, 4), slice(0, 50)), (50, 150, 150)),
        ((slice(0, 6), slice(3, 20)), (3, 17, 50)),
    ):
        part = Parameter(whole[0].detach()[cut].clone())
        part.grad = grad[cut].clone()
        own = fw.Adam([part], **options)
        for module in (table, spread):
            monkeypatch.setattr(module, "place_of", lambda param, place=place: place)
        own.step()
        for key, value in moments_of(own, part).items():
            assert_same_bits(key, value, opt.state[whole[0]][key][cut].contiguous())
        monkeypatch.undo()


def test_strided_parameters_and_moved_states(backend):
    """Moments of a strided parameter, and of states that are not aligned to 16 bytes, are those of plain ones."""
    base = torch.randn(12, 10, generator=torch.Generator().manual_seed(0)).to(device_of(backend))
    sides = [Parameter(base[::2, ::2].clone()), Parameter(base[::2, ::2]), Parameter(base[::2, ::2].clone())]
    opts = [fw.Adam([p], backend=backend, state_dtype=BF16, max_grad_norm=1.0) for p in sides]
    for opt in opts:
        opt.init_state()
    for key in ("exp_avg", "exp_avg_sq"):
        moved = torch.zeros(31, dtype=BF16, device=base.device)[1:].view(6, 5)
        opts[2].state[sides[2]][key] = moved
    for t in range(3):
        grad = (1.0 + t) * (0.1 + sides[0].detach().abs())
        for p, opt in zip(sides, opts, strict=True):
            p.grad = grad.clone()
            opt.step()
    assert opts[2].state[sides[2]]["exp_avg"] is moments_of(opts[2], sides[2])["exp_avg"]
    for p, opt in zip(sides[1:], opts[1:], strict=True):
        assert_same_bits("param", p.detach().contiguous(), sides[0].detach())
        for key, value in moments_of(opts[0], sides[0]).items():
            assert_same_bits(key, opt.state[p][key].contiguous(), value)


# state dicts and changes


@pytest.mark.parametrize("case", ["adam-amsgrad", "sgd-momentum", "lamb"])
def test_a_resumed_run_has_the_same_bits(case, backend):
    found_case, shapes = next(c for c in CASES if c.name == case), [(7,), (2, 3, 5), (257,)]
    params, opt = trained(found_case, BF16, backend, 3, shapes=shapes, state_dtype=BF16)
    saved = through_file([[p.detach() for p in params], opt.state_dict()])
    again = [Parameter(p.to(device_of(backend))) for p in saved[0]]
    resumed = found_case.make(again, backend=backend)
    resumed.load_state_dict(saved[1])
    copied_params, copied = copy.deepcopy((params, opt))
    for t in range(3, 6):
        for own, each in ((params, opt), (again, resumed), (copied_params, copied)):
            set_grads(own, t)
            each.step()
    assert saved[1]["param_groups"][0]["state_dtype"] == "torch.bfloat16"
    assert resumed.param_groups[0]["state_dtype"] is BF16
    for p, q, r in zip(params, again, copied_params, strict=True):
        assert_same_bits("resumed", q, p)
        assert_same_bits("copied", r, p)
        for key, value in opt.state[p].items():
            assert_same_bits(key, resumed.state[q][key], value)


@pytest.mark.parametrize("how", ["option", "state dict", "running"])
def test_changing_the_dtype_keeps_the_moments(how):
    """Exactly into float32, to nearest into bfloat16."""
    for before, after in ((F32, BF16), (BF16, F32)):
        params, opt = trained(CASES[0], F32, "cpu", 5, shapes=[(257,)], state_dtype=before)
        moments = {key: value.clone() for key, value in moments_of(opt, params[0]).items()}
        if how == "option":
            opt.param_groups[0]["state_dtype"] = after
        else:
            saved = opt.state_dict()
            saved["param_groups"][0]["state_dtype"] = str(after)
            if how == "state dict":
                params = [Parameter(params[0].detach().clone())]
                opt = fw.Adam(params)
            saved["state"][0] = {key: value.clone() for key, value in saved["state"][0].items()}
            opt.load_state_dict(saved)
        opt.init_state()
        for key, value in moments_of(opt, params[0]).items():
            assert value.dtype == after
            assert_same_bits(key, value, moments[key].to(after))
        set_grads(params, 9)
        opt.step()


def test_exact_moments_of_a_state_dict_are_not_rounded_on_the_way():
    """float32 moments load exactly where the optimizer had bfloat16 ones and the state dict asks for float32."""
    params, opt = trained(CASES[0], F32, "cpu", 2, shapes=[(257,)], state_dtype=BF16)
    others, exact = trained(CASES[0], F32, "cpu", 2, shapes=[(257,)], first=7)
    opt.load_state_dict(copy.deepcopy(exact.state_dict()))
    for key, value in moments_of(exact, others[0]).items():
        assert_same_bits(key, opt.state[params[0]][key], value)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_checkpoints_of_torch_load_and_are_loaded(dtype):
    theirs = make_params(dtype, [(17,)])
    other = torch.optim.Adam(theirs)
    set_grads(theirs, 0)
    other.step()
    params = make_params(dtype, [(17,)])
    opt = fw.Adam(params, state_dtype=BF16)
    opt.load_state_dict(other.state_dict())
    set_grads(params, 1)
    opt.init_state()
    for key in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(key, opt.state[params[0]][key], other.state[theirs[0]][key].to(BF16))
    opt.step()
    back = torch.optim.Adam(make_params(dtype, [(17,)]))
    back.load_state_dict(opt.state_dict())
    for key, value in moments_of(opt, params[0]).items():
        found = back.state[back.param_groups[0]["params"][0]][key]
        assert found.dtype == dtype
        assert_same_bits(key, found, value.to(dtype))


def test_groups_of_several_dtypes(backend):
    """Groups with and without rounded states in one table are updated as alone; averages are float32."""
    shapes = [(5,), (33,)]
    for options in ({}, {"max_grad_norm": 1e9, "average": fw.EMA(0.5)}):
        members = [make_params(d, shapes, device=device_of(backend)) for d in (F32, F64, BF16, F32)]
        own = [{}, {}, {"state_dtype": BF16, "param_rounding": "split"}, {"state_dtype": BF16}]
        groups = [{"params": ps, **each} for ps, each in zip(members, own, strict=True)]
        together = fw.Adam(groups, backend=backend, **options)
        for t in range(2):
            set_grads([p for ps in members for p in ps], t)
            together.step()
        assert together.state[members[1][0]]["exp_avg"].dtype == F64
        assert together.state[members[3][0]]["exp_avg"].dtype == BF16
        for g in (0, 1):
            alone = make_params(members[g][0].dtype, shapes, device=device_of(backend))
            opt = fw.Adam(alone, backend=backend, **options)
            for t in range(2):
                # the gradients of a group depend on its place among all
                every = [torch.nn.Parameter(p.detach().clone()) for ps in members for p in ps]
                set_grads(every, t)
                for p, q in zip(alone, every[2 * g : 2 * g + 2], strict=True):
                    p.grad = q.grad
                opt.step()
            for p, q in zip(members[g], alone, strict=True):
                assert_same_bits("param", p.detach(), q.detach())
        if options:
            assert {together.state[p]["average"].dtype for p in members[3]} == {F32}


def test_a_skipped_step_changes_no_moment(backend):
    params, opt = trained(CASES[0], F32, backend, 2, shapes=[(257,)], state_dtype=BF16, nonfinite="skip")
    before = copy.deepcopy((params[0].detach(), dict(opt.state[params[0]])))
    params[0].grad.view(-1)[3] = math.nan
    opt.step()
    assert_same_bits("param", params[0].detach(), before[0])
    for key, value in before[1].items():
        assert_same_bits(key, opt.state[params[0]][key], value)


def test_special_numbers_are_kept(backend):
    """NaN and infinity stay what they are, and a moment beyond the largest bfloat16 is infinite."""
    param = Parameter(torch.zeros(4, device=device_of(backend)))
    opt = fw.SGD([param], lr=0.0, momentum=0.5, backend=backend, state_dtype=BF16)
    param.grad = torch.tensor([math.nan, math.inf, -math.inf, 3.4028235e38], device=param.device)
    opt.step()
    found = opt.state[param]["momentum_buffer"].cpu().float()
    assert found[0].isnan()
    assert found[1:].tolist() == [math.inf, -math.inf, math.inf]


# starts of the second moment, and what the measurements read


def test_starts_of_the_second_moment(backend):
    params, device = make_params(F32, [(64,)], device=device_of(backend)), device_of(backend)
    opt = fw.GIAdam(params, backend=backend, state_dtype=BF16, betas=(0.9, 0.5))
    # not numbers of bfloat16, whose squares would be rounded twice
    params[0].grad = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(device)
    opt.init_from_gradients()
    square = (params[0].grad.double() ** 2).float()
    assert_same_bits("exp_avg_sq", opt.state[params[0]]["exp_avg_sq"], square.to(BF16))
    random = fw.Adam([Parameter(torch.ones(4096, device=device))], exp_avg_sq_init="random", state_dtype=BF16)
    random.init_state()
    param = random.param_groups[0]["params"][0]
    drawn = random.state[param]["exp_avg_sq"].double()
    # squares of normal numbers have mean 1 and variance 2
    assert abs(drawn.mean() - 1.0) < 4 * math.sqrt(2 / 4096)
    param.grad = torch.ones_like(param)
    random.step()


@pytest.mark.parametrize("case", ["adam", "adam-amsgrad", "radam", "sgd-momentum"])
def test_the_sharpness_reads_rounded_moments(case, backend):
    """The preconditioner is that of float32 states with the same numbers."""
    found_case = next(c for c in CASES if c.name == case)
    readings = []
    for kept in (BF16, F32):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        model = model.to(device_of(backend))
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).to(device_of(backend))
        opt = found_case.make(model.parameters(), backend=backend, state_dtype=BF16)

        def loss(model=model, x=x):
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        for _ in range(7):
            opt.zero_grad()
            loss().backward()
            opt.step()
        opt.param_groups[0]["state_dtype"] = kept
        opt.zero_grad()
        loss().backward()
        readings.append(fw.sharpness.preconditioned(loss, opt, iterations=6).asdict())
    assert readings[0]["value"] == pytest.approx(readings[1]["value"], rel=1e-5)
    assert readings[0]["edge_ratio"] == pytest.approx(readings[1]["edge_ratio"], rel=1e-5)


# errors


def test_bad_input_is_named():
    params, doubles = make_params(F32, [(3,)]), make_params(F64, [(3,)])
    for bad in (torch.float16, torch.float64, torch.int8, "bfloat16", None, 16):
        with pytest.raises(
            ValueError, match=r"state_dtype must be one of torch\.float32, torch\.bfloat16, got"
        ):
            fw.Adam(params, state_dtype=bad)
    message = r"state_dtype of parameter 0 \(torch.float64\) must be torch.float32, got torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        fw.Adam(doubles, state_dtype=BF16)
    opt = fw.Adam(params, state_dtype=BF16)
    with pytest.raises(ValueError, match=r"parameter 1 \(torch.float64\)"):
        opt.add_param_group({"params": doubles})
    opt.add_param_group({"params": doubles, "state_dtype": F32})
    set_grads([*params, *doubles], 0)
    opt.step()
    before = [p.detach().clone() for p in (*params, *doubles)]
    opt.param_groups[1]["state_dtype"] = BF16
    with pytest.raises(ValueError, match=r"parameter 1 \(torch.float64\)"):
        opt.step()
    saved = opt.state_dict()
    opt.param_groups[1]["state_dtype"] = F32
    with pytest.raises(ValueError, match=r"parameter 1 \(torch.float64\)"):
        opt.load_state_dict(saved)
    assert opt.param_groups[1]["state_dtype"] is F32
    for p, q in zip((*params, *doubles), before, strict=True):
        assert_same_bits("param", p.detach(), q)
    opt.step()


def test_a_parameter_that_becomes_float64_is_refused():
    params, opt = trained(CASES[0], F32, "cpu", 1, shapes=[(5,)], state_dtype=BF16)
    params[0].data = params[0].data.double()
    params[0].grad = torch.ones(5, dtype=F64)
    with pytest.raises(ValueError, match=r"state_dtype of parameter 0 \(torch.float64\)"):
        opt.step()
    opt.param_groups[0]["state_dtype"] = F32
    opt.step()
    assert opt.state[params[0]]["exp_avg"].dtype == F64

"""Stop, save, load, go on: equal to a run without the stop; and exchange with torch.optim."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    SCHEDULES,
    SMALL_SHAPES,
    TORCH_CASES,
    assert_close,
    assert_same_bits,
    make_params,
    set_grads,
)

import fused_warmup as fw

SHAPES = [*SMALL_SHAPES, (2049,)]


def options():
    return {
        "schedule": SCHEDULES["warmup_linear"],
        "weight_decay_schedule": SCHEDULES["cosine"],
        "max_grad_norm": 5.0,
        "average": fw.EMA(0.9, every=2),
    }


def run(params, opt, steps):
    for step in steps:
        set_grads(params, step)
        opt.record_loss(float(step))
        opt.step()


def save(opt):
    """Save as a file that only tensors and plain types may be in."""
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_run(a, opt_a, b, opt_b):
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert_same_bits(f"param {i}", p, q)
        assert opt_a.state[p].keys() == opt_b.state[q].keys()
        for name, value in opt_a.state[p].items():
            assert_same_bits(f"{name} {i}", value, opt_b.state[q][name])
    assert_same_bits("telemetry", opt_a.telemetry.rows(), opt_b.telemetry.rows())
    assert opt_a.get_last_lr() == opt_b.get_last_lr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_resume_is_bitwise(case, backend):
    a, b = make_params(torch.float32, SHAPES), make_params(torch.float32, SHAPES)
    whole, first = (case.make(p, backend=backend, **options()) for p in (a, b))
    run(a, whole, range(12))
    run(b, first, range(7))
    second = case.make(b, backend=backend, average=fw.EMA(0.9, every=2), max_grad_norm=5.0)
    second.load_state_dict(save(first))
    run(b, second, range(7, 12))
    assert_same_run(a, whole, b, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_resume_of_other_dtypes(dtype):
    a, b = make_params(dtype, SHAPES), make_params(dtype, SHAPES)
    whole, first = (fw.GIAdam(p, amsgrad=True, **options()) for p in (a, b))
    run(a, whole, range(9))
    run(b, first, range(4))
    second = fw.GIAdam(b, **options())
    second.load_state_dict(save(first))
    run(b, second, range(4, 9))
    assert_same_run(a, whole, b, second)


@pytest.mark.slow
def test_resume_in_a_new_process(tmp_path):
    """The file is enough: torch.load(weights_only=True) in a fresh interpreter, 1,100 telemetry rows included."""
    params = make_params(torch.float32, SHAPES)
    opt = fw.RAdam(params, **options(), telemetry="all")
    run(params, opt, range(1100))
    torch.save({"params": [p.data for p in params], "opt": opt.state_dict()}, tmp_path / "a.pt")
    run(params, opt, range(1100, 1110))
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import torch, fused_warmup as fw
        from cases import set_grads
        torch.set_num_threads(1)
        saved = torch.load({str(tmp_path / "a.pt")!r}, weights_only=True)
        params = [torch.nn.Parameter(p) for p in saved["params"]]
        opt = fw.RAdam(params, average=fw.EMA(0.9, every=2), max_grad_norm=5.0)
        opt.load_state_dict(saved["opt"])
        for step in range(1100, 1110):
            set_grads(params, step)
            opt.record_loss(float(step))
            opt.step()
        torch.save({{"params": params, "rows": opt.telemetry.rows(), "opt": opt.state_dict()}}, {str(tmp_path / "b.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    there = torch.load(tmp_path / "b.pt", weights_only=True)
    for p, q in zip(params, there["params"], strict=True):
        assert_same_bits("param", p, q)
    assert_same_bits("rows", opt.telemetry.rows(), there["rows"])
    here = opt.state_dict()
    for i, state in here["state"].items():
        for name, value in state.items():
            assert_same_bits(name, value, there["opt"]["state"][i][name])


def test_format_is_that_of_torch():
    params = make_params(torch.bfloat16, [(3,), (2,)])
    opt = fw.Adam(params, lr=0.1, schedule=SCHEDULES["cosine"])
    run(params, opt, range(3))
    saved = opt.state_dict()
    state = saved["state"][0]
    assert state["step"].dtype == torch.float32
    assert state["step"].shape == ()
    assert state["step"] == 3.0
    assert state["exp_avg"].dtype == torch.float32
    assert saved["param_groups"][0]["params"] == [0, 1]
    assert saved["fused_warmup"]["version"] == 1
    peer = torch.optim.Adam(make_params(torch.float32, [(3,), (2,)]))
    assert set(peer.state_dict()["param_groups"][0]) <= set(saved["param_groups"][0])


def named(opt, params):
    opt.add_param_group({"params": [("head", torch.nn.Parameter(torch.ones(2)))]})


def tied(opt, params):
    opt.param_groups[0]["params"].append(params[0])
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def in_two_groups(opt, params):
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    opt.param_groups[1]["params"] = [*opt.param_groups[1]["params"], params[1], params[0]]


def of_the_user(opt, params):
    opt.state["note"] = {"epoch": 3}
    opt.state[params[1]]["mine"] = torch.ones(3)


def without_states(opt, params):
    del opt.state[params[0]]


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("arrange", [named, tied, in_two_groups, of_the_user, without_states])
def test_positions_are_those_of_torch(arrange, stepped):
    """The packing of ``torch.optim.Optimizer`` decides, keys and groups in its order."""
    params = [("a", torch.nn.Parameter(torch.ones(3))), ("b", torch.nn.Parameter(torch.ones(4)))]
    opt = fw.Adam(params if arrange is named else [p for _, p in params], backend="cpu")
    params = [p for _, p in params]
    if stepped or arrange in (of_the_user, without_states):
        set_grads(params, 0)
        opt.step()
    arrange(opt, params)
    wanted, packed = torch.optim.Optimizer.state_dict(opt), opt.state_dict()
    assert list(packed["state"]) == list(wanted["state"])
    for key, own in wanted["state"].items():
        assert packed["state"][key] is own
    for ours, theirs in zip(packed["param_groups"], wanted["param_groups"], strict=True):
        assert list(ours) == list(theirs)
        assert ours["params"] == theirs["params"]


def test_a_state_without_a_group_is_refused_as_by_torch():
    params = make_params(torch.float32, [(3,), (4,)])
    opt = fw.Adam(params, backend="cpu")
    set_grads(params, 0)
    opt.step()
    del opt.param_groups[0]["params"][0]
    for pack in (opt.state_dict, lambda: torch.optim.Optimizer.state_dict(opt)):
        with pytest.raises(KeyError, match=str(id(params[0]))):
            pack()


def test_counts_are_those_of_the_memory_in_use():
    """A group that is added moves the exact counts, another device all of them."""
    params = make_params(torch.float32, [(3,), (4,)])
    opt = fw.Adam(params[:1], backend="cpu")
    for added in (False, True):
        if added:
            opt.add_param_group({"params": params[1:]})
        set_grads(params, 0)
        opt.step()
        packed = opt.state_dict()
        assert packed["fused_warmup"]["steps"].tolist() == [int(opt.state[p]["step"]) for p in opt.state]
    session = opt.session
    session.counters, session.telemetry.ring_buffer = session.counters.clone(), torch.ones(1024, 9).double()
    packed = opt.state_dict()
    assert packed["param_groups"][0]["updates"].data_ptr() == session.counters.data_ptr()
    assert bool((packed["fused_warmup"]["telemetry"] == 1.0).all())


def test_a_state_dict_is_an_access_to_the_states():
    """Entries that are replaced in what it returns are those of the next step."""
    params = make_params(torch.float32, [(3,)])
    opt = fw.Adam(params, backend="cpu")
    set_grads(params, 0)
    opt.step()
    opt.state_dict()["state"][0]["exp_avg"] = torch.full((3,), 7.0)
    params[0].grad = torch.zeros(3)
    opt.step()
    torch.testing.assert_close(opt.state[params[0]]["exp_avg"], torch.full((3,), 6.3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: case.name)
def test_exchange_with_torch_both_ways(case, backend):
    """Five steps there, five here, and back: the same as ten of torch alone."""
    here, there, alone = (make_params(torch.float64, SMALL_SHAPES) for _ in range(3))
    torch_alone = case.make_torch(alone, foreach=False)
    torch_opt = case.make_torch(there, foreach=False)
    for step in range(12):
        for params, opt in ((alone, torch_alone), (there, torch_opt)):
            if params is alone or step < 4:
                set_grads(params, step)
                opt.step()
    opt = case.make(here, backend=backend)
    for p, q in zip(here, there, strict=True):
        p.data.copy_(q)
    opt.load_state_dict(copy.deepcopy(torch_opt.state_dict()))
    if case.cls is not fw.SGD:
        assert opt.state_dict()["state"][1]["step"] == 4
    for step in range(4, 8):
        set_grads(here, step)
        opt.step()
    torch_opt = case.make_torch(there, foreach=False)
    for p, q in zip(here, there, strict=True):
        q.data.copy_(p)
    torch_opt.load_state_dict(save(opt))
    for step in range(8, 12):
        set_grads(there, step)
        torch_opt.step()
    for i, (p, q) in enumerate(zip(there, alone, strict=True)):
        assert_close(f"param {i}", p, q, 1e-13, 1e-13)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_by_themselves(copy_of):
    a, b = make_params(torch.float32, SHAPES), make_params(torch.float32, SHAPES)
    alone, first = (fw.GIAdam(p, **options()) for p in (a, b))
    run(a, alone, range(10))
    run(b, first, range(5))
    frozen = [p.detach().clone() for p in b]
    # what it keeps of this call is not that of the copy
    first.state_dict()
    second = copy_of(first)
    params = [p for group in second.param_groups for p in group["params"]]
    run(params, second, range(5, 10))
    assert_same_run(a, alone, params, second)
    for name in ("steps", "counters", "telemetry"):
        rows = [opt.state_dict()["fused_warmup"][name] for opt in (second, alone)]
        assert_same_bits(name, *rows)
    for p, q in zip(b, frozen, strict=True):
        assert_same_bits("the original", p, q)


def test_load_copies_into_the_buffers_that_exist():
    params = make_params(torch.bfloat16, SHAPES)
    opt = fw.Adam(params, average=fw.SWA(1))
    run(params, opt, range(3))
    saved = save(opt)
    before = {id(p): {k: v.data_ptr() for k, v in opt.state[p].items()} for p in params}
    run(params, opt, range(3, 5))
    opt.load_state_dict(saved)
    for i, p in enumerate(params):
        assert {k: v.data_ptr() for k, v in opt.state[p].items()} == before[id(p)]
        assert opt.state[p]["exp_avg"].dtype == torch.float32
        assert_same_bits("exp_avg_sq", opt.state[p]["exp_avg_sq"], saved["state"][i]["exp_avg_sq"])
    assert opt.telemetry.latest()["step"] == 3


def test_average_starts_from_the_parameters_when_the_file_has_none():
    params = make_params(torch.float32, [(5,)])
    plain = fw.Adam(params)
    run(params, plain, range(2))
    opt = fw.Adam(params, average=fw.EMA(0.5))
    opt.load_state_dict(plain.state_dict())
    assert_same_bits("average", opt.state[params[0]]["average"], params[0].detach())


def test_load_drops_buffers_that_the_file_lacks():
    x = torch.nn.Parameter(torch.zeros(1))
    opt = fw.SGD([x], lr=0.1, momentum=0.9)
    x.grad = torch.ones(1)
    opt.step()
    saved = opt.state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    opt.load_state_dict(saved)
    before = x.item()
    opt.step()
    assert before - x.item() == pytest.approx(0.1, rel=1e-5)


def test_hooks_see_what_is_returned():
    params = make_params(torch.float32, [(3,)])
    opt = fw.Adam(params)
    run(params, opt, range(2))
    seen = []
    opt.register_state_dict_post_hook(lambda o, saved: seen.append(saved["state"][0]["step"].dtype))
    opt.register_state_dict_post_hook(lambda o, saved: {**saved, "mine": 1})
    saved = opt.state_dict()
    assert saved["mine"] == 1
    assert seen == [torch.float32]


def test_entries_of_the_user_are_kept():
    """Somebody's own entry beside ours, of any shape and dtype, before the first step and after a rebuild."""
    params = make_params(torch.float32, [(3,), (2,)])
    opt = fw.Adam(params)
    mask = torch.tensor([True, False])
    opt.state[params[0]]["mask"] = mask
    assert opt.state_dict()["state"][0]["mask"] is mask
    run(params, opt, range(2))
    opt.add_param_group({"params": make_params(torch.float32, [(4,)])})
    run(params, opt, range(2, 3))
    assert opt.state[params[0]]["mask"] is mask


def test_scheduler_with_our_schedule_is_saved_and_loaded():
    """LambdaLR stores the schedule itself; torch.load(weights_only=True) must accept it."""
    params = make_params(torch.float32, [(3,)])
    opt = fw.Adam(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, SCHEDULES["warmup_linear"])
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    buffer.seek(0)
    scheduler.load_state_dict(torch.load(buffer, weights_only=True))
    assert scheduler.lr_lambdas[0] == SCHEDULES["warmup_linear"]


def test_telemetry_of_another_shape_is_refused_before_anything_changes():
    params = make_params(torch.float32, [(3,)])
    opt = fw.Adam(params, lr=0.1)
    run(params, opt, range(2))
    saved = opt.state_dict()
    saved["param_groups"][0]["lr"] = 5.0
    saved["fused_warmup"]["telemetry"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="must have the shape"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.1


def test_state_of_a_group_added_after_loading():
    a = make_params(torch.float32, [(4,), (3,)])
    opt = fw.Adam(a[:1])
    run(a[:1], opt, range(3))
    again = fw.Adam(a[:1])
    again.load_state_dict(save(opt))
    again.add_param_group({"params": a[1:], "lr": 0.5})
    run(a, again, range(3, 5))
    assert [int(again.state[p]["step"]) for p in a] == [5, 2]
    assert again.telemetry.latest()["step"] == 5


def test_a_schedule_is_one_text():
    """Exact, also for floats without a short decimal form."""
    s = fw.schedules
    schedule = s.warmup(3).then(s.cosine(1.0, 1 / 3, 20)).then(s.table([0.1, 5e-324, 2 / 3, 1e300]))
    opt = fw.Adam(make_params(torch.float32, [(3,)]), schedule=schedule, weight_decay_schedule=s.constant())
    group = opt.state_dict()["param_groups"][0]
    assert isinstance(group["schedule"], str)
    assert s.from_json(group["schedule"]) == schedule
    assert s.from_json(group["weight_decay_schedule"]) == s.constant()


def test_older_state_dicts_have_schedules_as_dictionaries():
    wu = fw.AutoWU(20, 2)
    for step in range(5):
        wu.step(1.0 / (1 + step))
    groups = [{"params": make_params(torch.float32, [(3,)])} for _ in range(2)]
    saved = fw.Adam(groups).state_dict()
    state, decay = wu.state_dict(), SCHEDULES["cosine"].to_dict()
    for group in saved["param_groups"]:
        del group["updates"]
        group |= {"schedule": state, "weight_decay_schedule": decay}
    opt = fw.Adam([{"params": make_params(torch.float32, [(3,)])} for _ in range(2)])
    opt.load_state_dict(saved)
    first, second = opt.param_groups
    assert first["schedule"] is second["schedule"]
    assert first["schedule"].schedule == wu.schedule
    assert second["weight_decay_schedule"] == SCHEDULES["cosine"]


def test_updates_are_in_the_groups():
    """Checkpoints of torch keep them, and drop the entry of this package."""
    params = make_params(torch.float32, [(3,), (2,)])

    def turns(opt, steps):
        for step in steps:
            set_grads(params, step)
            params[step % 2].grad = None
            opt.step()

    opt = fw.Adam(params, schedule=SCHEDULES["warmup_linear"])
    assert opt.state_dict()["param_groups"][0]["updates"] == 0
    turns(opt, range(5))
    saved = copy.deepcopy(opt.state_dict())
    del saved["fused_warmup"]
    other = fw.Adam(params)
    other.load_state_dict(saved)
    assert other.state_dict()["param_groups"][0]["updates"] == 5
    for each in (opt, other):
        turns(each, range(5, 6))
    assert other.state_dict()["param_groups"][0]["updates"] == 6
    assert opt.get_last_lr() == other.get_last_lr()
    # a group that comes from another optimizer counts anew
    assert fw.Adam(opt.param_groups[:1]).state_dict()["param_groups"][0]["updates"] == 0


def test_updates_tell_what_the_floats_cannot():
    opt = fw.Adam(make_params(torch.float32, [(3,), (2,)]))
    opt.init_state()
    saved = save(opt)
    del saved["fused_warmup"]
    saved["param_groups"][0]["updates"] = 2**24 + 1
    for index, step in enumerate((2**24, 7)):
        saved["state"][index]["step"] = torch.tensor(float(step))
    opt.load_state_dict(saved)
    assert opt.state_dict()["fused_warmup"]["steps"].tolist() == [2**24 + 1, 7]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"schedule": '{"format"'}, "state_dict: a schedule must be complete JSON, got Expecting ':'"),
        ({"schedule": "3"}, "from_json: format must be 'fused_warmup.schedule', got 3"),
        (
            {"updates": -1},
            r"Adam: state_dict\['param_groups'\]\[0\]\['updates'\] must be a whole number >= 0",
        ),
    ],
    ids=["cut short", "another text", "a negative count"],
)
def test_texts_and_counts_are_checked_before_anything_changes(entry, message):
    opt = fw.Adam(make_params(torch.float32, [(3,)]), lr=0.1)
    saved = opt.state_dict()
    saved["param_groups"][0] |= {"lr": 5.0, **entry}
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.1


def test_a_count_of_zero_beside_a_filled_buffer():
    """Checkpoints of torch's SGD have no count, and leave that of a fresh optimizer in place."""
    x = torch.nn.Parameter(torch.zeros(1))
    opt = fw.SGD([x], lr=0.1, momentum=0.9, dampening=0.5)
    for buffer, moved in ((2.0, 0.1 * (0.9 * 2.0 + 0.5)), (0.0, 0.1)):
        x.data.zero_()
        x.grad = torch.ones(1)
        opt.step()
        saved = copy.deepcopy(opt.state_dict())
        saved["state"][0] |= {"momentum_buffer": torch.full((1,), buffer), "step": torch.zeros(())}
        del saved["fused_warmup"]
        x.data.zero_()
        opt.load_state_dict(saved)
        opt.step()
        assert -x.item() == pytest.approx(moved, rel=1e-6)

"""What a state dict holds and what a load takes from it: counts, copies, hooks, and states dropped or refused."""

import copy
import pickle

import pytest
import torch
from cases import THREE_SHAPES, assert_same_bits, make_params, set_grads

import fused_warmup as fw


def test_a_saved_state_follows_training_as_in_torch():
    """Its counts, as its moments do; what was loaded stays as it is, whatever is written in place afterwards."""
    params = make_params(torch.float32, THREE_SHAPES)
    opt = fw.Adam(params, lr=torch.tensor(0.1))
    set_grads(params, 0)
    opt.step()
    saved = opt.state_dict()
    frozen = copy.deepcopy(saved)
    opt.step()
    assert_same_bits("record", saved["fused_warmup"]["telemetry"], frozen["fused_warmup"]["telemetry"])
    assert int(saved["fused_warmup"]["counters"][0]) == 2
    assert [int(step) for step in saved["fused_warmup"]["steps"]] == [2] * len(params)
    assert [float(state["step"]) for state in saved["state"].values()] == [2.0] * len(params)
    other = fw.Adam(make_params(torch.float32, THREE_SHAPES), lr=torch.tensor(0.2))
    other.load_state_dict(saved)
    other.param_groups[0]["lr"].fill_(7.0)
    assert float(saved["param_groups"][0]["lr"]) == pytest.approx(0.1)
    saved["fused_warmup"]["telemetry"].fill_(-1.0)
    other.telemetry.rows().fill_(-2.0)
    assert_same_bits("record", other.telemetry.rows(), frozen["fused_warmup"]["telemetry"])


def test_counts_beyond_those_of_float32_are_saved():
    """``step`` is float32 as in torch, which cannot tell 2**24 + 1 from 2**24."""
    params = make_params(torch.float32, THREE_SHAPES)
    opt, other = fw.Adam(params), fw.Adam(params)
    set_grads(params, 0)
    opt.step()
    opt.state[params[0]]["step"].fill_(2**24)
    opt.step()
    for copied in (other, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        if copied is other:
            copied.load_state_dict(opt.state_dict())
        counts = copied.state_dict()["fused_warmup"]["steps"]
        assert counts.tolist() == [2**24 + 1, 2, 2]
        set_grads(copied.param_groups[0]["params"], 1)
        copied.step()
        copied.step()
        assert copied.state_dict()["fused_warmup"]["steps"].tolist() == [2**24 + 3, 4, 4]
        assert [float(s["step"]) for s in copied.state.values()] == [2**24 + 4, 4, 4]


def test_what_a_hook_before_loading_returns_is_loaded():
    params = make_params(torch.float32, THREE_SHAPES)
    opt = fw.Adam(params, lr=0.1)
    saved = opt.state_dict()
    other = copy.deepcopy(saved)
    other["param_groups"][0]["lr"] = 0.3
    opt.register_load_state_dict_pre_hook(lambda o, state_dict: other)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.3
    assert saved["param_groups"][0]["lr"] == 0.1


def test_states_that_the_file_does_not_have_are_dropped():
    """Those of parameters that it does not know, so that their next step is a first one, and averages not wanted."""
    params = make_params(torch.float32, THREE_SHAPES)
    opt = fw.Adam(params, lr=0.1, average=fw.EMA(0.9))
    fresh = opt.state_dict()
    set_grads(params, 0)
    opt.step()
    trained = opt.state_dict()
    opt.load_state_dict(fresh)
    assert not any(opt.state.get(p) for p in params)
    assert opt.state_dict()["state"] == {}
    opt.load_state_dict(trained)
    opt.average = None
    opt.load_state_dict(trained)
    assert all(set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params)


def test_states_of_another_rule_or_shape_are_refused():
    """Those that no state is missing for, and shapes of as many elements."""
    params = make_params(torch.float32, [(7, 9)])
    theirs = torch.optim.Adam(params)
    set_grads(params, 0)
    theirs.step()
    saved = theirs.state_dict()
    for momentum, wanted in ((0.9, "momentum_buffer"), (0.0, "no tensors")):
        opt = fw.SGD(params, lr=0.1, momentum=momentum)
        with pytest.raises(ValueError, match=f"must hold {wanted}, got 'exp_avg, exp_avg_sq'"):
            opt.load_state_dict(saved)
    turned = fw.Adam(make_params(torch.float32, [(9, 7)]))
    with pytest.raises(ValueError, match=r"must have the shape \(9, 7\) of parameter 0, got \(7, 9\)"):
        turned.load_state_dict(saved)


@pytest.mark.parametrize("cls", ["Adam", "SGD"])
def test_schedules_go_on_from_the_counts_of_torch(cls):
    """From the parameter that made most steps; SGD of torch counts none, and its buffers do not say how many."""
    params = make_params(torch.float32, THREE_SHAPES)
    options = {"lr": 0.1} if cls == "Adam" else {"lr": 0.1, "momentum": 0.9}
    theirs = getattr(torch.optim, cls)(params, **options)
    for step in range(3):
        set_grads(params, step)
        if step:
            params[1].grad = None
        theirs.step()
    opt = getattr(fw, cls)(params, schedule=fw.schedules.warmup(10), **options)
    saved = theirs.state_dict()
    # saved by an optimizer that knows no schedules, which are kept
    opt.load_state_dict(saved)
    set_grads(params, 3)
    opt.step()
    made = 3 if cls == "Adam" else 0
    assert opt.telemetry.latest()["step"] == made + 1
    assert opt.get_last_lr() == pytest.approx([0.1 * (made + 1) / 10])

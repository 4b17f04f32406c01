"""What reaches an optimizer by other ways than its own: wrappers, states, groups, probing steps, late parameters."""

import copy

import numpy as np
import pytest
import torch
from cases import BACKENDS, assert_close
from torch import nn

import fused_warmup as fw

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def parameter(value=1.0, n=1, grad=1.0):
    param = nn.Parameter(torch.full((n,), value))
    param.grad = torch.full((n,), grad)
    return param


# states without counters


@each_backend
def test_counters_follow_states_that_a_wrapper_restores(backend):
    """The schedule goes on at step 3, and so does the average; a count that says less changes nothing."""

    def make(param):
        schedule = fw.schedules.warmup(10)
        return fw.Adam([param], lr=0.01, schedule=schedule, average=fw.SWA(2), backend=backend)

    param = parameter()
    opt = make(param)
    for _ in range(3):
        opt.step()
    again = parameter(param.item())
    other = make(again)
    other.state[again] = copy.deepcopy(opt.state_dict()["state"][0])
    for _ in range(2):
        opt.step()
        other.step()
        assert other.get_last_lr() == opt.get_last_lr()
    assert torch.equal(again, param)
    assert torch.equal(other.state[again]["average"], opt.state[param]["average"])
    other.state[again]["step"] = torch.tensor(1.0)
    other.step()
    assert other.get_last_lr() == [pytest.approx(0.006)]


@each_backend
def test_an_average_without_a_count_was_there_from_the_start(backend):
    param = parameter(0.0)
    opt = fw.SGD([param], lr=1.0, average=fw.SWA(1), backend=backend)
    for _ in range(3):
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][0]["n_averaged"]
    opt.load_state_dict(saved)
    opt.step()
    assert opt.state[param]["average"].item() == -2.5


# the norm of a group on a sphere


@each_backend
@pytest.mark.parametrize(
    "norm", [torch.tensor(2.0), 2, np.float32(2.0), torch.tensor([2.0]), torch.tensor(2)]
)
def test_a_norm_of_any_form(norm, backend):
    param = parameter(3.0, 4)
    opt = fw.SGD([param], lr=0.1, projection="sphere", backend=backend)
    opt.step()
    opt.param_groups[0]["norm"] = norm
    opt.step()
    assert param.norm().item() == pytest.approx(2.0)


@each_backend
@pytest.mark.parametrize(
    "norm", ["2", -1.0, float("nan"), torch.ones(2), torch.ones((), device="meta"), None]
)
def test_a_norm_that_is_none_is_named(norm, backend):
    param = parameter(3.0, 4)
    opt = fw.SGD([param], lr=0.1, projection="sphere", backend=backend)
    opt.step()
    before = param.detach().clone()
    opt.param_groups[0]["norm"] = norm
    with pytest.raises(
        (TypeError, ValueError), match=r"^SGD: param_groups\[0\]\['norm'\] must be a number >= 0"
    ):
        opt.step()
    assert torch.equal(param, before)


# what a class is


@each_backend
@pytest.mark.parametrize("how", ["ours", "base class"])
def test_a_load_does_not_change_what_a_class_is(how, backend):
    def load(opt, state_dict):
        method = opt.load_state_dict if how == "ours" else None
        (method or torch.optim.Optimizer.load_state_dict.__get__(opt))(copy.deepcopy(state_dict))

    params = [parameter(5.0) for _ in range(3)]
    adam = torch.optim.Adam(params[:1], lr=0.1, weight_decay=0.5)
    decoupled = torch.optim.AdamW(params[1:2], lr=0.1, weight_decay=0.5)
    ours = fw.AdamW(params[2:], lr=0.1, weight_decay=0.5, backend=backend)
    adam.step()
    for opt in (decoupled, ours):
        load(opt, adam.state_dict())
        opt.step()
    assert params[2].item() == pytest.approx(params[1].item(), rel=1e-6)
    gi = fw.GIAdam([parameter()], backend=backend)
    load(gi, fw.Adam([parameter()], backend=backend).state_dict())
    assert gi.param_groups[0]["exp_avg_sq_init"] == "grad"


# loss scaling


@each_backend
@pytest.mark.parametrize("kind", ["plain", "bfloat16", "strided"])
def test_gradients_after_a_scaled_step(kind, backend):
    """Scaled by default, as the documentation says; unscaled on request, as torch leaves them."""
    for unscale in (False, True):
        data = torch.ones(3, 4)
        data = data.to(torch.bfloat16) if kind == "bfloat16" else data
        param = nn.Parameter(data[:, ::2] if kind == "strided" else data)
        idle = nn.Parameter(torch.ones(2))
        opt = fw.SGD([param, idle], lr=0.5, unscale_grads=unscale, max_grad_norm=1e6, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(param.float().sum()).backward()
        scaler.step(opt)
        assert param.detach().float().unique().tolist() == [0.5]
        assert param.grad.float().unique().tolist() == [1.0 if unscale else 1024.0]
        assert opt.telemetry.latest()["grad_norm"] == pytest.approx(param.numel() ** 0.5)
        opt.step()
        assert param.grad.float().unique().tolist() == [1.0 if unscale else 1024.0]


# probing steps


@each_backend
@pytest.mark.parametrize("cls", [fw.GIAdam, fw.SGD, fw.RAdam, fw.LAMB])
def test_a_probing_step_is_none(cls, backend):
    """``get_optimizer_state_dict`` steps a fresh optimizer at rate 0 with gradients of 0 to see its states."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    def trained(probe):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        opt = cls(
            model.parameters(), lr=0.1, schedule=fw.schedules.warmup(4), average=fw.SWA(1), backend=backend
        )
        if probe:
            found = get_optimizer_state_dict(model, opt)["state"]
            assert set(found) == {"weight", "bias"}
            assert [float(state["step"]) for state in found.values()] == [0.0, 0.0]
            assert len(opt.telemetry) == 0
        for step in range(3):
            torch.manual_seed(step)
            opt.zero_grad()
            model(torch.randn(5, 3)).square().sum().backward()
            opt.step()
        return [
            *model.parameters(),
            *(opt.state[p]["average"] for p in model.parameters()),
        ], opt.get_last_lr()

    with_probe, without = trained(True), trained(False)
    assert with_probe[1] == without[1]
    assert all(torch.equal(a, b) for a, b in zip(with_probe[0], without[0], strict=True))


@each_backend
def test_a_first_step_at_rate_0_counts(backend):
    """As with an outer warmup that starts at 0, or where all gradients happen to be 0 later."""
    for lr, grad in ((0.0, 1.0), (0.1, 0.0)):
        param = parameter(grad=grad)
        opt = fw.Adam([param], lr=lr, backend=backend)
        opt.step()
        assert int(opt.state[param]["step"]) == 1
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert int(opt.state[param]["step"]) == 2


# averages of parameters that join late


def joined_late(backend, average, steps):
    """A parameter of an average that joins after five steps, and one that was there; both go down by 1 a step."""
    first, late = parameter(0.0), parameter(0.0)
    opt = fw.SGD([first], lr=1.0, average=average, backend=backend)
    for _ in range(5):
        opt.step()
    opt.add_param_group({"params": [late]})
    for _ in range(steps):
        opt.step()
    return [opt.state[p]["average"].item() for p in (first, late)]


@each_backend
def test_a_late_parameter_has_an_average_of_its_own_values(backend):
    assert joined_late(backend, fw.SWA(1), 3) == [-4.5, -2.0]
    assert joined_late(backend, fw.SWA(4, every=2), 4) == [-6.0, -2.0]
    # values -4 and -6, then -8; of the late one -1 (step 6) and -3 (step 8)
    ema = joined_late(backend, fw.EMA(0.5, every=2), 4)
    assert ema == [pytest.approx(-6.25), pytest.approx(-2.0)]


@each_backend
def test_an_average_that_begins_after_a_load(backend):
    param = parameter(0.0)
    opt = fw.SGD([param], lr=1.0, backend=backend)
    for _ in range(5):
        opt.step()
    later = fw.SGD([param], lr=1.0, average=fw.SWA(1), backend=backend)
    later.load_state_dict(opt.state_dict())
    for _ in range(3):
        later.step()
    assert later.state[param]["average"].item() == -7.0


@each_backend
def test_an_average_of_what_has_no_gradient(backend):
    """It is averaged at each step all the same, and a skipped step counts for nothing."""
    moving, still = parameter(0.0), parameter(3.0)
    opt = fw.SGD([moving, still], lr=1.0, average=fw.SWA(1), nonfinite="skip", backend=backend)
    opt.step()
    still.grad = None
    opt.step()
    moving.grad.fill_(torch.inf)
    opt.step()
    assert [int(opt.state[p]["n_averaged"]) for p in (moving, still)] == [2, 2]
    assert [opt.state[p]["average"].item() for p in (moving, still)] == [-1.5, 2.0]


# wrappers that forward attributes


class Forwarding:
    """A wrapper as Lightning makes it: a class of both, of which only the first has its own attributes."""

    def __init__(self, optimizer):
        self._inner = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (Forwarding, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def step(self, closure=None):
        return self._inner.step(closure)


@each_backend
def test_a_wrapper_that_forwards_sees_and_sets_the_same(backend):
    param = parameter(0.0, 4)
    opt = fw.SGD([param], lr=0.1, schedule=fw.schedules.warmup(4), average=fw.EMA(0.5), backend=backend)
    wrapper = Forwarding(opt)
    assert isinstance(wrapper, fw.SGD)
    wrapper.step()
    assert wrapper.get_last_lr() == opt.get_last_lr() == [0.025]
    with (
        wrapper.averaged_parameters(),
        pytest.raises(RuntimeError, match="must not be nested"),
        opt.averaged_parameters(),
    ):
        pass
    with wrapper.averaged_parameters(), pytest.raises(RuntimeError, match="inside averaged_parameters"):
        opt.step()
    wrapper.max_grad_norm, wrapper.nonfinite, wrapper.average = 0.5, "skip", fw.SWA(1)
    assert (opt.max_grad_norm, opt.nonfinite, opt.average) == (0.5, "skip", fw.SWA(1))
    opt.step()
    assert opt.telemetry.latest()["clip_coef"] == pytest.approx(0.25, rel=1e-5)
    new = parameter(1.0)
    wrapper.param_groups = [{"params": [new], "lr": 0.5}]
    wrapper.step()
    assert new.item() < 1.0
    del wrapper.state[param]
    wrapper.record_loss(3)
    wrapper.step()
    assert wrapper.telemetry.latest()["loss"] == 3.0
    other = Forwarding(fw.SGD([parameter()], backend=backend))
    other.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert int(other.session.counters[0]) == 4


# what a load replaces


@each_backend
def test_a_schedule_that_a_load_replaces_is_said_once(backend):
    mine, theirs = fw.schedules.warmup(5), fw.schedules.linear(1.0, 0.0, 9)
    for saved_schedule in (theirs, None):
        saved = fw.SGD([parameter()], schedule=saved_schedule, backend=backend).state_dict()
        opt = fw.SGD([{"params": [parameter()]}, {"params": [parameter()]}], schedule=mine, backend=backend)
        two = fw.SGD(
            [{"params": [parameter()]}, {"params": [parameter()]}], schedule=saved_schedule
        ).state_dict()
        with pytest.warns(
            UserWarning, match=r"^SGD: load_state_dict\(\) replaces the schedule of group 0"
        ) as said:
            opt.load_state_dict(two)
        assert len(said) == 1
        assert [group["schedule"] for group in opt.param_groups] == [saved_schedule] * 2
    # nothing to say: the same schedule, none of one's own, or a file of torch
    for own in (None, saved_schedule):
        fw.SGD([parameter()], schedule=own, backend=backend).load_state_dict(saved)
    opt = fw.SGD([parameter()], schedule=mine, backend=backend)
    opt.load_state_dict(torch.optim.SGD([parameter()]).state_dict())
    assert opt.param_groups[0]["schedule"] == mine


@each_backend
def test_a_live_schedule_stays_that_of_the_user(backend):
    """Also where a wrapper puts the plain types of a state dict into the groups."""
    wu = fw.AutoWU(total_steps=20, steps_per_epoch=5)
    opt = fw.SGD([parameter()], lr=1.0, schedule=wu, backend=backend)
    for loss in range(7):
        opt.record_loss(loss)
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    mine = fw.AutoWU(total_steps=20, steps_per_epoch=5)
    other = fw.SGD([parameter()], lr=1.0, schedule=mine, backend=backend)
    other.record_loss(1.0)
    other.step()
    other.param_groups[0]["schedule"] = saved["param_groups"][0]["schedule"]
    other.record_loss(1.0)
    other.step()
    assert other.param_groups[0]["schedule"] is mine
    assert mine.state_dict()["steps"] == 7


# losses


@each_backend
def test_losses_of_every_kind_are_recorded(backend):
    wu = fw.AutoWU(total_steps=100, steps_per_epoch=5)
    opt = fw.SGD([parameter()], lr=1.0, schedule=wu, backend=backend)
    losses = [
        3,
        np.float32(3.0),
        np.int64(3),
        np.array(3.0),
        torch.tensor([2.0, 4.0]),
        torch.tensor([[3]]),
        3.0,
    ]
    for loss in losses:
        assert opt.step(lambda loss=loss: loss) is loss
    assert opt.telemetry.history()["loss"].tolist() == [3.0] * len(losses)
    assert wu.state_dict()["steps"] == len(losses)


@each_backend
def test_a_schedule_that_nobody_feeds_is_said_once(backend):
    opt = fw.SGD([parameter()], lr=1.0, schedule=fw.AutoWU(total_steps=9, steps_per_epoch=3), backend=backend)
    opt.step()
    with pytest.warns(UserWarning, match="^SGD: AutoWU must be fed, got two steps without a loss"):
        opt.step()
    opt.step()


# the record


@each_backend
@pytest.mark.parametrize("telemetry", [True, "all"])
def test_a_state_dict_holds_the_last_rows(telemetry, backend):
    opt = fw.SGD([parameter()], lr=0.0, telemetry=telemetry, backend=backend)
    for step in range(1030):
        opt.record_loss(step)
        opt.step()
    rows = opt.state_dict()["fused_warmup"]["telemetry"]
    first = 0 if telemetry == "all" else 6
    assert rows[:, -2].tolist() == list(range(first, 1030))
    # a view would keep all of them in the file
    assert rows.untyped_storage().nbytes() == rows.numel() * 8
    assert len(opt.telemetry) == 1030
    again = fw.SGD([parameter()], lr=0.0, backend=backend)
    again.load_state_dict(opt.state_dict())
    again.step()
    assert again.telemetry.history()["step"].tolist() == list(range(first + 1, 1032))


def test_telemetry_is_a_flag_or_all():
    with pytest.raises(TypeError, match=r"^Adam: telemetry must be True or False, got 'some'"):
        fw.Adam([parameter()], telemetry="some")


def test_warmup_of_no_steps_is_none():
    s = fw.schedules
    assert s.warmup(0).values(3).tolist() == [1.0, 1.0, 1.0]
    assert s.warmup(0).then(s.linear(1.0, 0.0, 4)) == s.linear(1.0, 0.0, 4)
    assert s.linear(1.0, 0.0, 4).then(s.warmup(0)) == s.linear(1.0, 0.0, 4)
    assert len(s.warmup(0)) == 0
    assert s.from_json(s.warmup(0).to_json()) == s.warmup(0)
    assert s.parallel_warmup(0, 0.5).values(2).tolist() == [1.0, 1.0]
    param = parameter()
    opt = fw.SGD([param], lr=0.5, schedule=s.warmup(0))
    opt.load_state_dict(opt.state_dict())
    opt.step()
    assert_close("parameter", param, torch.tensor([0.5]), 0.0)


@each_backend
def test_a_parameter_without_a_shape_is_named(backend):
    opt = fw.Adam(nn.LazyLinear(2).parameters(), backend=backend)
    with pytest.raises(ValueError, match=r"^Adam: parameter 0 must hold data, got an uninitialized one"):
        opt.init_state()


@each_backend
def test_a_count_written_in_place_is_saved(backend):
    param = parameter()
    opt = fw.Adam([param], backend=backend)
    opt.step()
    saved = opt.state_dict()
    opt.state[param]["step"].fill_(50)
    assert float(opt.state_dict()["state"][0]["step"]) == 50.0
    opt.step()
    assert float(saved["state"][0]["step"]) == 51.0


@each_backend
def test_sparse_gradients_are_unscaled_too(backend):
    table = nn.Embedding(3, 2, sparse=True)
    opt = fw.SGD(table.parameters(), lr=0.1, unscale_grads=True, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(table(torch.tensor([1, 2, 2])).sum()).backward()
    scaler.step(opt)
    assert table.weight.grad.to_dense()[:, 0].tolist() == [0.0, 1.0, 2.0]

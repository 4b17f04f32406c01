"""What only a GPU can show: graphs, streams, no waits, more than 2**31 elements, AMP. ``make gpu`` runs it."""

import contextlib
import math

import pytest
import torch
import vector_cases
from cases import CASES, assert_close, assert_same_bits, make_params, set_grads, states_of
from optim.test_sphere import RULES as SPHERE_RULES
from optim.test_sphere import check_steps

import fused_warmup as fw
from fused_warmup.backends import resolve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(0,), (), (1,), (63,), (17, 31), (2049,), (40_000,)]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if request.param not in fw.available_backends():
        pytest.skip(f"the backend {request.param} is not available")
    return request.param


@contextlib.contextmanager
def no_waits():
    """Any wait for the device raises inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def params_on(device, shapes=SHAPES, dtype=torch.float32, seed=0):
    return make_params(dtype, shapes, seed, device)


class Loop:
    """A training step without a host: gradients are a function of a count on the device."""

    def __init__(self, make, dtype=torch.float32):
        self.params = params_on("cuda", dtype=dtype)
        self.bases = [p.detach().float() for p in params_on("cuda", seed=1)]
        self.tick = torch.zeros((), device="cuda")
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.opt = make(self.params)

    def step(self):
        self.tick.add_(1)
        for p, base in zip(self.params, self.bases, strict=True):
            p.grad.copy_(base * torch.sin(self.tick))
        self.opt.step()

    def capture(self):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.step()
        return graph


def assert_same_run(a, b):
    torch.cuda.synchronize()
    for p, q in zip(a.params, b.params, strict=True):
        assert_same_bits("param", p, q)
        left, right = states_of(a.opt, p), states_of(b.opt, q)
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert_same_bits(name, value, right[name])
    rows = [loop.opt.telemetry.rows()[-1000:] for loop in (a, b)]
    assert_same_bits("telemetry", *rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("adamw", "giadam", "radam", "sgd-nesterov", "lamb", "adamp")],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("clip", [None, 20.0], ids=["unclipped", "clipped"])
def test_a_thousand_replays_are_a_thousand_steps(case, dtype, clip, backend):
    """Schedule, clipping, the branch of RAdam and the average move on the device, bit for bit."""
    schedule = fw.schedules.warmup(10).then(fw.schedules.cosine(1.0, 0.0, 900))

    def make(params):
        average = fw.EMA(0.99, every=2)
        return case.make(params, backend=backend, schedule=schedule, max_grad_norm=clip, average=average)

    eager, captured = Loop(make, dtype), Loop(make, dtype)
    eager.step()
    captured.step()
    graph = captured.capture()
    for _ in range(1000):
        eager.step()
        graph.replay()
    assert_same_run(eager, captured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [fw.SGD, fw.RAdam, fw.AdamP])
@pytest.mark.parametrize("radius", [None, 3.0])
def test_replays_stay_on_a_sphere(radius, cls, dtype, backend):
    """As many steps from the first one on, no host in between, beside a group that is free."""

    def make(params):
        groups = [{"params": params[::2], "projection": "sphere", "radius": radius}, {"params": params[1::2]}]
        return cls(groups, lr=1e-3, backend=backend, average=fw.EMA(0.99), max_grad_norm=20.0)

    eager, captured = Loop(make, dtype), Loop(make, dtype)
    wanted = radius or math.sqrt(sum(float(p.double().square().sum()) for p in eager.params[::2]))
    captured.opt.init_state()
    graph = captured.capture()
    for _ in range(300):
        eager.step()
        graph.replay()
    assert_same_run(eager, captured)
    for loop in (eager, captured):
        assert float(loop.opt.param_groups[0]["norm"]) == pytest.approx(wanted, rel=1e-14)
        found = math.sqrt(sum(float(p.double().square().sum()) for p in loop.params[::2]))
        assert found == pytest.approx(wanted, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", SPHERE_RULES)
def test_one_step_on_a_sphere(rule, dtype, backend):
    check_steps(rule, dtype, backend, [(17, 31), (), (40_000,)], 4, device="cuda")


def test_no_wait_on_a_sphere(backend):
    params = params_on("cuda")
    opt = fw.RAdam(params, backend=backend, projection="sphere", radius=2.0, max_grad_norm=1.0)
    with no_waits():
        for step in range(5):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.param_groups[0]["radius"] = 2.0 + step
            opt.step()


def test_capture_after_init_state(backend):
    """No eager step before the capture: the first replay is the first step."""
    loops = [Loop(lambda params: fw.GIAdam(params, lr=0.01, backend=backend)) for _ in range(2)]
    eager, captured = loops
    captured.opt.init_state()
    graph = captured.capture()
    for _ in range(10):
        eager.step()
        graph.replay()
    assert_same_run(eager, captured)


def test_more_tensors_than_an_argument_holds(backend):
    """Addresses of gradients travel by an asynchronous copy; replays after eager steps with others too."""
    shapes = [(3,)] * 4500
    params, others = params_on("cuda", shapes), make_params(torch.float32, shapes)
    opt = fw.Adam(params, lr=0.01, backend=backend, max_grad_norm=1.0)
    ref = fw.Adam(others, lr=0.01, backend="reference", max_grad_norm=1.0)
    for step in range(3):
        for p, o in ((params, opt), (others, ref)):
            set_grads(p, step)
            o.step()
    for p, q in zip(params, others, strict=True):
        assert_close("param", p, q, 1e-6, 1e-6)


def test_replay_after_an_eager_step_with_other_gradients(backend):
    loops = [Loop(lambda params: fw.Adam(params, lr=0.01, backend=backend)) for _ in range(2)]
    eager, captured = loops
    for loop in loops:
        loop.step()
    graph = captured.capture()
    for loop in loops:
        held = [p.grad for p in loop.params]
        for p in loop.params:
            p.grad = torch.ones_like(p)
        loop.opt.step()
        for p, grad in zip(loop.params, held, strict=True):
            p.grad = grad
    for _ in range(5):
        eager.step()
        graph.replay()
    assert_same_run(eager, captured)


def test_loading_reaches_the_captured_graph(backend):
    loops = [Loop(lambda params: fw.Adam(params, lr=0.01, backend=backend)) for _ in range(2)]
    eager, captured = loops
    for loop in loops:
        loop.step()
    saved = eager.opt.state_dict()
    graph = captured.capture()
    for _ in range(5):
        graph.replay()
    saved["param_groups"][0]["lr"] = 0.5
    for loop in loops:
        loop.opt.load_state_dict(saved)
        for p, base in zip(loop.params, loop.bases, strict=True):
            p.data.copy_(base)
        loop.tick.zero_()
    for _ in range(5):
        eager.step()
        graph.replay()
    assert_same_run(eager, captured)


def test_a_new_group_is_not_captured(backend):
    loop = Loop(lambda params: fw.Adam(params, lr=0.01, backend=backend))
    loop.step()
    loop.opt.add_param_group({"params": params_on("cuda", [(3,)])})
    torch.cuda.synchronize()
    message = r"Adam: .* before a graph is captured"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        loop.opt.step()


class Problem:
    """A training step as in torch's documentation of graphs: gradients are allocated anew at every step."""

    def __init__(self, backend, n=3, **options):
        self.params = params_on("cuda", [(16,)] * n)
        self.x = torch.zeros(16, device="cuda")
        self.opt = fw.Adam(self.params, lr=0.01, backend=backend, **options)

    def load(self, step):
        self.x.copy_(torch.randn(16, generator=torch.Generator().manual_seed(step)))

    def run(self):
        # no product of matrices, whose bits may be others in a graph
        torch.stack([(p * self.x - 1).square().sum() for p in self.params]).sum().backward()
        self.opt.step()

    def step(self, step):
        self.load(step)
        self.opt.zero_grad(set_to_none=True)
        self.run()

    def warm_up(self):
        """Three steps on a side stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(3):
                self.step(step)
        torch.cuda.current_stream().wait_stream(stream)

    def captured(self, pool=None):
        self.opt.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.run()
        return graph

    def replay(self, graph, step):
        self.load(step)
        graph.replay()


def assert_same_problem(a, b):
    torch.cuda.synchronize()
    for p, q in zip(a.params, b.params, strict=True):
        assert_same_bits("param", p, q)
        for name, value in states_of(a.opt, p).items():
            assert_same_bits(name, value, states_of(b.opt, q)[name])
    assert_same_bits("telemetry", a.opt.telemetry.rows(), b.opt.telemetry.rows())


@pytest.mark.parametrize("clip", [None, 0.1], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("n", [3, 500])
def test_the_pattern_of_torch(n, clip, backend):
    """With addresses in arguments, or copied; two graphs in one pool, eager steps between the replays."""
    eager, problem = (Problem(backend, n, max_grad_norm=clip) for _ in range(2))
    problem.warm_up()
    pool = torch.cuda.graph_pool_handle()
    graphs = [problem.captured(pool) for _ in range(2)]
    for step in range(3, 15):
        if step % 5 == 0:
            problem.step(step)
        else:
            problem.replay(graphs[step % 2], step)
    for step in range(15):
        eager.step(step)
    assert_same_problem(eager, problem)


def test_a_graph_follows_another_schedule(backend):
    eager, problem = (Problem(backend, schedule=fw.schedules.constant(0.5)) for _ in range(2))
    problem.warm_up()
    graph = problem.captured()
    for step in range(3):
        eager.step(step)
    later = (fw.schedules.warmup(9).then(fw.schedules.table([0.5] * 99)), None, fw.schedules.warmup(30))
    for change, schedule in enumerate(later):
        for one in (eager, problem):
            one.opt.param_groups[0]["schedule"] = schedule
        problem.opt.update_captured()
        for step in range(10 * change, 10 * change + 10):
            eager.step(step)
            problem.replay(graph, step)
    assert_same_problem(eager, problem)


@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
def test_no_wait(clip, backend):
    """Steps with new gradients, learning rates from the host, losses, and pages of telemetry copied away."""
    params = params_on("cuda")
    schedule, average = fw.schedules.warmup(100), fw.EMA(0.9)
    opt = fw.RAdam(params, backend=backend, schedule=schedule, max_grad_norm=clip, average=average)
    grads = [torch.randn_like(p) for p in params]
    with no_waits():
        for step in range(1100):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone() if step % 7 == 0 else grad
            opt.param_groups[0]["lr"] = 1e-3 / (1 + step)
            opt.record_loss(grads[3].sum())
            opt.step()
    assert len(opt.telemetry) == 1100
    assert not opt.telemetry.history()["loss"].isnan().any()


@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
def test_the_current_stream(clip, backend):
    """Gradients that a side stream writes late are those that a step on that stream reads."""
    params, others = params_on("cuda"), params_on("cuda")
    opt, plain = (fw.Adam(p, lr=0.1, backend=backend, max_grad_norm=clip) for p in (params, others))
    set_grads(others, 0)
    wanted = [p.grad.clone() for p in others]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.init_state()
    plain.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for p, grad in zip(params, wanted, strict=True):
            p.grad.copy_(grad)
        opt.step()
    stream.synchronize()
    for p, q in zip(params, others, strict=True):
        assert_same_bits("param", p, q)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices(backend):
    """The device of the parameters counts, not the current one."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        params = params_on(device)
        opt = fw.Adam(params, lr=0.1, backend=backend, max_grad_norm=1.0)
        with torch.cuda.device(0):
            for step in range(3):
                set_grads(params, step)
                opt.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert_same_bits("param", p, q)


def test_more_than_two_to_the_31_elements(backend):
    n = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 11 GB of free device memory")
    param = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.zeros_like(param)
    places = [0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 7, n - 1]
    for i, place in enumerate(places):
        param.grad[place] = float(i + 1)
    opt = fw.SGD([param], lr=1.0, backend=backend, max_grad_norm=1e6)
    opt.step()
    assert [param[place].item() for place in places] == [-float(i + 1) for i in range(len(places))]
    assert int(torch.count_nonzero(param.detach())) == len(places)
    norm = math.sqrt(sum((i + 1) ** 2 for i in range(len(places))))
    assert opt.telemetry.latest()["grad_norm"] == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("unscaled", [True, False], ids=["unscaled", "scaled"])
def test_grad_scaler(clip, unscaled, backend):
    """Overflows on the first step and in the middle; no wait inside the step."""
    results = []
    for ours in (True, False):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 1000, device="cuda"))
        opt = (
            fw.Adam([param], lr=0.1, backend=backend, max_grad_norm=clip)
            if ours
            else torch.optim.Adam([param], lr=0.1)
        )
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        for i in range(6):
            opt.zero_grad()
            loss = (param * torch.sin(torch.arange(1000, device="cuda") + i)).sum()
            scaler.scale(loss * (math.inf if i in {0, 3} else 1.0)).backward()
            if unscaled or not ours:
                scaler.unscale_(opt)
            if not ours and clip is not None:
                torch.nn.utils.clip_grad_norm_([param], clip)
            scaler.step(opt)
            scaler.update()
        results.append(param.detach())
        assert scaler.get_scale() == 256.0
        if ours:
            assert opt.telemetry.history()["skipped"].tolist() == [1, 0, 0, 1, 0, 0]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_unaligned_views(dtype, backend):
    """Every offset takes the same values through another path."""
    results = []
    for offset in range(9):
        flat = torch.randn(5000, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)
        held = torch.full((5100,), 7.0, dtype=dtype, device="cuda")
        view = held[offset : offset + 5000]
        view.copy_(flat)
        param = torch.nn.Parameter(view)
        param.grad = flat * 0.5
        opt = fw.Adam([param], lr=0.1, backend=backend, max_grad_norm=1.0)
        for _ in range(3):
            opt.step()
        assert (held[:offset] == 7.0).all()
        assert (held[offset + 5000 :] == 7.0).all()
        results.append(param.detach().clone())
    for other in results[1:]:
        assert_same_bits("param", other, results[0])


def test_backends_agree():
    """CUDA C++ and Triton from the same state: a few units of the last place of the update."""
    if not {"cuda", "triton"} <= set(fw.available_backends()):
        pytest.skip("needs both backends")
    runs = [params_on("cuda"), params_on("cuda")]
    opts = [fw.RAdam(p, lr=0.1, backend=b, max_grad_norm=1.0) for p, b in zip(runs, ("cuda", "triton"))]  # noqa: B905
    for step in range(20):
        for params, opt in zip(runs, opts, strict=True):
            set_grads(params, step)
            opt.step()
    for p, q in zip(*runs, strict=True):
        assert_close("param", p, q, 1e-6, 1e-6)
    for name, value in opts[0].telemetry.latest().items():
        # the magnitudes of a pack of four are summed in float32 by the C++ kernels
        rel = 3 * 2.0**-24 if name == "grad_norm_l1" else 1e-12
        assert value == pytest.approx(opts[1].telemetry.latest()[name], rel=rel, nan_ok=True)


@pytest.mark.parametrize("count", [3, 700])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
def test_launches(count, clip, backend):
    """As many as the ledger says, whatever the number of tensors and groups."""
    params = params_on("cuda", [(5,)] * count)
    opt = fw.Adam([{"params": [p]} for p in params], backend=backend, max_grad_norm=clip)
    set_grads(params, 0)
    for _ in range(3):
        opt.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        pytest.skip("the profiler records no kernels here")
    assert len([k for k in kernels if "emcpy" not in k.name]) == opt.traffic().launches


def kernels_of(backend):
    return resolve(backend, torch.device("cuda"))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtypes", [[d] for d in vector_cases.DTYPES] + [vector_cases.DTYPES], ids=str)
def test_vector_operations(backend, dtypes, scaled):
    vector_cases.check_operations(dtypes, kernels_of(backend), device="cuda", scaled=scaled)


@pytest.mark.parametrize(("mode", "dtypes"), vector_cases.ROUNDED, ids=str)
def test_vectors_begin_at_exact_values(backend, mode, dtypes):
    vector_cases.check_residues(mode, dtypes, kernels_of(backend), device="cuda")


@pytest.mark.parametrize("dtype", vector_cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", vector_cases.PRECONDITIONED, ids=lambda case: case.name)
def test_preconditioner_is_that_of_the_reference(backend, case, dtype):
    def make(case, params, **options):
        return case.make(params, backend=backend, **options), kernels_of(backend)

    clip = None if "weight_decay" in case.options else 5.0
    schedule = fw.schedules.warmup(5)
    vector_cases.check_preconditioner(
        case, make, params_on("cuda", dtype=dtype), max_grad_norm=clip, schedule=schedule
    )


def test_measuring_does_not_wait(backend):
    """Readings of a probe under an optimizer of ours, in telemetry and polled, without one wait for the device."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).cuda()
    x, y = torch.randn(64, 10, device="cuda"), torch.randn(64, 1, device="cuda")
    opt = fw.Adam(model.parameters(), lr=1e-2, max_grad_norm=1.0, backend=backend)
    probe = fw.SharpnessProbe(opt, lambda: torch.nn.functional.mse_loss(model(x), y), every=2)
    for step in range(50):
        torch.nn.functional.mse_loss(model(x), y).backward()
        if step == 1:
            # the first measurement reads step counts, before there is a table, and compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        probe.measure()
        opt.step()
        opt.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    readings = []
    while (reading := probe.poll()) is not None:
        readings.append(reading.asdict())
    assert len(readings) == 25
    assert all(r["value"] > 0.0 for r in readings)
    exact = fw.sharpness.top_eigenvalue(
        lambda: torch.nn.functional.mse_loss(model(x), y),
        model.parameters(),
        method="autograd",
        iterations=20,
    )
    found = fw.sharpness.top_eigenvalue(
        lambda: torch.nn.functional.mse_loss(model(x), y), model.parameters(), iterations=20
    )
    assert found.value.item() == pytest.approx(exact.value.item(), rel=1e-3)


def test_a_graph_follows_autowu(backend):
    """The table is rewritten where a graph reads it; what waits is one call of an epoch of the warmup."""
    wu = fw.AutoWU(400, 10, max_warmup_fraction=0.6)
    loop = Loop(lambda params: fw.SGD(params, lr=1.0, schedule=wu, backend=backend))
    graph = None
    for i in range(400):
        lr = wu.schedule(i)
        loss = torch.tensor(2 - 0.35 * math.log10(lr / 1e-5) + 160 * lr + 0.02 * math.sin(i), device="cuda")
        ends_an_epoch = wu.phase == "warmup" and i % 10 == 9
        torch.cuda.set_sync_debug_mode("default" if ends_an_epoch else "error")
        try:
            loop.opt.record_loss(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if graph is None:
            loop.step()
            graph = loop.capture()
        else:
            graph.replay()
    assert wu.back_at in range(100, 200)
    assert loop.opt.telemetry.history()["lr"].tolist() == wu.schedule.values(400).tolist()

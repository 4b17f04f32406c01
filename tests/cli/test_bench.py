"""Arithmetic and reports of the benchmarks, with times from a fake clock."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, growth
from fused_warmup import _cpu
from fused_warmup.cli import machine
from fused_warmup.cli.bench import cases as bench_cases
from fused_warmup.cli.bench import ceiling, command, timing
from fused_warmup.plan.chunks import CHUNK


class Clock:
    """A fake clock that only steps advance."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def step(self, name, *seconds):
        """Return a step that takes the given times in turn."""

        def run():
            self.calls.append(name)
            self.now += seconds[self.calls.count(name) % len(seconds)]

        return run


def row(**changes):
    values = {"name": "Adam 10x2M", "peer": "torch", "ours_ms": 2.0, "peer_ms": 3.0, "ratio": 1.5}
    return bench_cases.Row(**{**values, "spread": (1.4, 1.6), **changes})


WHERE = {"cpu": "X", "cores": 2, "threads": 2, "instruction_set": "avx2", "versions": {"torch": "2"}}


def test_the_ratio_is_theirs_over_ours_by_medians():
    clock = Clock()
    peers = {"torch": clock.step("torch", 6.0, 6.0, 60.0)}
    # a round takes 9 seconds
    result = timing.interleaved(
        clock.step("ours", 2.0), peers, clock.step("before", 0.5), seconds=81, clock=clock
    )
    assert result.ratio == pytest.approx(3.0)
    assert (result.ours, result.theirs) == pytest.approx((2.0, 6.0))
    assert result.spread == pytest.approx((3.0, 30.0))
    assert result.rounds == pytest.approx([2.0] * 9)


def test_the_fastest_peer_counts():
    clock = Clock()
    peers = {name: clock.step(name, seconds) for name, seconds in (("slow", 9.0), ("fast", 4.0))}
    result = timing.interleaved(clock.step("ours", 8.0), peers, seconds=0.0, clock=clock)
    assert (result.peer, result.ratio) == ("fast", pytest.approx(0.5))


@pytest.mark.parametrize("prepared", [False, True])
def test_rounds_interleave_with_only_the_setup_between(prepared):
    clock = Clock()
    ours, theirs = clock.step("ours", 1.0), clock.step("theirs", 1.0)
    before = [clock.step("before", 1.0)] if prepared else []
    timing.interleaved(ours, {"torch": theirs}, *before, seconds=0.0, clock=clock)
    cycle = ["before", "theirs", "before", "ours"] if prepared else ["theirs", "ours"]
    assert clock.calls == cycle * (len(clock.calls) // len(cycle))
    assert clock.calls.count("ours") > 7


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 7), (100.0, 50), (1e9, 300)])
def test_as_many_rounds_as_fit(seconds, rounds):
    clock = Clock()
    timer = timing.InterleavedTimer(clock.step("ours", 1.0), {"torch": clock.step("torch", 1.0)}, clock=clock)
    assert timer.warm_up(seconds) == rounds


@pytest.mark.parametrize(
    ("expected", "states", "options"),
    [
        (28, 2, {}),
        (32, 2, {"clip": True}),
        (36, 2, {"average": True}),
        (40, 2, {"clip": True, "average": True}),
        (20, 1, {}),
        (12, 0, {}),
        (22, 2, {"itemsize": 2}),
    ],
)
def test_bytes_moved(expected, states, options):
    assert bench_cases.bytes_moved(states, **options) == expected


COLUMNS = [
    {"states": 0},
    {"states": 2, "clip": True},
    {"states": 1, "average": True},
    {"states": 2, "clip": True, "average": True, "layered": True},
]


@pytest.mark.parametrize("numel", [7, CHUNK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_ceiling_moves_the_bytes_of_a_step(columns, dtype, numel):
    params = bench_cases.make_params(2, numel, dtype)
    moved = bench_cases.Columns(**columns)
    passes = moved.passes(params)
    assert sum(part.bytes_moved for part in passes) == moved.bytes_moved(numel, dtype.itemsize) * 2 * numel
    # a layer of one chunk stays in the cache between the sums and the update
    once = {**columns, "layered": columns.get("layered", False) and numel > CHUNK}
    assert moved.bytes_moved(numel, dtype.itemsize) == bench_cases.bytes_moved(
        **once, itemsize=dtype.itemsize
    )
    tensors = {id(t): t for part in passes for column in part.columns for t in column}.values()
    # distinct memory: parameter, gradient, states and average
    assert len(tensors) == 2 * (2 + columns["states"] + columns.get("average", False))


def words(tensor):
    return tensor.detach().view(torch.int16).view(-1)


@pytest.mark.parametrize("numel", [7, 300, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ceiling_reads_every_byte_and_keeps_it(dtype, numel, monkeypatch):
    """Also those of NaN and of numbers that are not normal."""
    params = bench_cases.make_params(3, numel, dtype)
    before = torch.arange(numel * dtype.itemsize // 2, dtype=torch.int16)
    for param in params:
        words(param).copy_(before)
        words(param.grad).copy_(before)
    sums, inner = [], _cpu.stream
    monkeypatch.setattr(_cpu, "stream", lambda *args: sums.append(inner(*args)))
    grads = [param.grad for param in params]
    ceiling.stream([ceiling.Pass([], [grads]), ceiling.Pass([params], [grads])])()
    assert all(words(param).equal(before) and words(param.grad).equal(before) for param in params)
    # sums over a chunk are of 16 bits
    assert [total % 2**16 for total in sums] == [int(before.long().sum()) * 3 % 2**16] * 2


def test_the_ceiling_goes_through_what_it_is_given(monkeypatch):
    """Column by column and pass by pass; the last pass begins at the end, as a step does."""
    called = []
    monkeypatch.setattr(_cpu, "stream", lambda *args: called.append(args[3:7]))
    params = bench_cases.make_params(2, CHUNK + 1, torch.bfloat16)
    ceiling.stream(bench_cases.Columns(2, clip=True, layered=True).passes(params))()
    assert called == [(4, [2], 0, False), (4, [4, 4, 2, 2], 2, False), (4, [2, 4, 4], 1, True)]


def test_the_ceiling_runs_in_the_same_rounds_and_is_no_peer():
    clock = Clock()
    steps = {name: clock.step(name, seconds) for name, seconds in (("ceiling", 1.0), ("torch", 4.0))}
    result = timing.interleaved(
        clock.step("ours", 2.0),
        {"torch": steps["torch"]},
        clock.step("before", 0.5),
        steps["ceiling"],
        seconds=0.0,
        clock=clock,
    )
    cycle = ["before", "ceiling", "before", "torch", "before", "ours"]
    assert clock.calls == cycle * (len(clock.calls) // len(cycle))
    assert result.peer == "torch"
    assert (result.theirs, result.ceiling) == pytest.approx((4.0, 1.0))


def test_share_of_the_ceiling(monkeypatch):
    monkeypatch.setattr(bench_cases, "SHAPES", {"10x2M": (2, 40)})
    case = next(case for case in bench_cases.cases() if case.name == "Adam 10x2M")
    times = {"ours": 2.0, "peer": "torch", "theirs": 3.0, "spread": (1.4, 1.6), "rounds": (2.0, 2.0)}
    line = case.row(timing.Comparison(**times, others=None, ceiling=1.5))
    assert line.ratio == pytest.approx(1.5)
    assert line.gb_per_s == pytest.approx(28 * 80 / 2e9)
    assert line.of_ceiling == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ("", {}),
        ("met", {"goal": 1.5}),
        ("missed", {"goal": 1.6}),
        ("missed", {"goal": 1.6, "others": 0.05}),
        ("disturbed", {"goal": 1.1, "others": 0.5}),
    ],
)
def test_verdict(expected, changes):
    assert row(**changes).verdict == expected


def test_reports_keep_lost_rows():
    rows = [
        row(goal=1.1, gb_per_s=30.0, ceiling=40.0),
        row(name="SGD 10x2M", ratio=0.5, goal=2.0),
        row(name="AdamW 10x2M", ratio=0.9, host_us=12.3456),
    ]
    page = command.to_markdown(rows, WHERE)
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(rows)
    assert "| 0.50× |" in page
    assert "- Goals missed: 1. SGD 10x2M" in page
    assert "| 0.75× |" in lines[1]
    data = json.loads(command.to_json(rows, WHERE))
    assert data["machine"] == WHERE
    assert [entry["verdict"] for entry in data["rows"]] == ["met", "missed", ""]
    assert data["rows"][2]["host_us"] == 12.35


def test_a_row_survives_json():
    entry = json.loads(json.dumps(asdict(row(goal=2.0, others=0.0))))
    assert command.cells(bench_cases.Row(**entry)) == command.cells(row(goal=2.0, others=0.0))


@pytest.mark.parametrize("fresh", [False, True])
def test_host_time_is_part_of_the_step(fresh):
    inner = _cpu.step
    line = bench_cases.run_case(bench_cases.HostCase(6, 3, fresh), seconds=0.0)
    assert _cpu.step is inner
    assert 0 < line.host_us < line.ours_ms * 1e3 * 10
    assert "3 groups" in line.name


def test_new_gradients_have_new_addresses():
    params = bench_cases.make_params(3, 64, torch.float32)
    old = [(param.grad.clone(), param.grad.data_ptr()) for param in params]
    bench_cases.renew(params)
    for param, (grad, address) in zip(params, old, strict=True):
        assert param.grad.equal(grad)
        assert param.grad.data_ptr() != address


@pytest.mark.parametrize("spec", bench_cases.STEP_SPECS, ids=lambda spec: spec.name)
def test_every_spec_runs(spec, monkeypatch):
    monkeypatch.setattr(bench_cases, "SHAPES", {"10x2M": (2, 40)})
    line = bench_cases.run_case(bench_cases.ThroughputCase(spec, "10x2M"), seconds=0.0)
    assert line.ratio > 0
    assert line.of_ceiling > 0


def test_the_command_prints_and_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_cases, "SHAPES", dict.fromkeys(bench_cases.SHAPES, (2, 40)))
    path = tmp_path / "rows.json"
    threads = torch.get_num_threads()
    arguments = ["--quick", "--filter", "adam 10X2m", "--threads", str(threads), "--json", str(path)]
    result = CliRunner().invoke(command.bench, arguments)
    assert result.exit_code == 0, result.output
    assert "Adam" in result.output
    data = json.loads(path.read_text())
    assert data["machine"] == machine.describe()
    names = [entry["name"] for entry in data["rows"]]
    assert names == ["Adam 10x2M", "clip+Adam 10x2M", "RAdam 10x2M"]


def test_a_filter_that_matches_nothing_names_the_rows():
    result = CliRunner().invoke(command.bench, ["--filter", "nothing"])
    assert result.exit_code == 2
    assert "clip+Adam 10x2M" in result.output


@pytest.mark.parametrize("work", ["300 x 6,667: Adam, clip + step + EMA", "465 groups x 65,536: SGD, step"])
def test_gpu_benchmark_runs_without_a_gpu(work, capsys):
    """The same code runs with a clock in place of events, and writes nothing."""
    before = sorted(gpu.RESULTS.iterdir())
    assert gpu.main(["--device", "cpu", "--quick", "--filter", re.escape(work)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {work} |")]
    assert [line.split("|")[2].strip() for line in lines[:2]] == ["cpu", "reference"]
    assert all(float(line.split("|")[3]) > 0 for line in lines)
    assert sorted(gpu.RESULTS.iterdir()) == before


def test_gpu_benchmark_has_the_tensors_of_gpt():
    """124,439,808 parameters in 148 tensors."""
    shapes = gpu.gpt_shapes()
    assert (len(shapes), sum(map(math.prod, shapes))) == (148, 124_439_808)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_gpu_benchmark_needs_a_gpu(capsys):
    assert gpu.main([]) == 1
    assert "must be there, got none" in capsys.readouterr().err


def grown(times):
    """What ``growth.measure`` returns where every measure takes the given times by size."""
    return {
        n: {name: dict.fromkeys(growth.MEASURES, t) for name in growth.OPTIMIZERS} for n, t in times.items()
    }


def test_exponents_of_growth():
    found = grown({10: 5.0, 100: 1e-3, 1_000: 1e-1, 10_000: 10.0})
    assert growth.exponent(found, "ours", "constructor") == pytest.approx(2.0)
    assert growth.would_take(found, 100_000, "ours", "constructor") == pytest.approx(1_000.0)
    # a quadratic part that begins to show, and growth in proportion
    bent = grown({1_000: 1.0, 10_000: 30.0})
    assert growth.would_take(bent, 100_000, "ours", "constructor") == pytest.approx(3_000.0)
    assert growth.would_take(
        grown({1_000: 2.0, 10_000: 20.0}), 100_000, "ours", "constructor"
    ) == pytest.approx(200.0)
    # one size is no growth, and what was left out once stays so
    assert growth.exponent(grown({100: 1.0}), "ours", "constructor") is None
    assert growth.would_take(grown({100: 1.0}), 1_000, "ours", "constructor") == 0.0
    assert growth.would_take(grown({100: 1.0, 1_000: None}), 10_000, "ours", "constructor") > growth.LIMIT


def test_cells_of_growth_that_would_take_too_long_are_left_out(monkeypatch):
    monkeypatch.setattr(growth, "LIMIT", 0.0)
    monkeypatch.setattr(
        growth, "would_take", lambda found, n, name, measure: float(n > 1 and "load" in measure)
    )
    found = growth.measure((1, 2), per_group=True, budget=0.0)
    assert [m for m, value in found[2]["fused"].items() if value is None] == ["load_state_dict, step"]
    assert all(value is not None for value in found[1]["fused"].values())
    rows = growth.growth_rows(found)
    (k,) = [i for i, row in enumerate(rows) if row[0].startswith("load_state_dict")]
    assert "–" not in rows[k][1:3]
    assert rows[k + 1][1] != "–"
    assert rows[k + 1][2] == "–"


def test_page_of_growth(monkeypatch, capsys):
    monkeypatch.setattr(growth, "EXPERTS", (8, 3, 2))
    monkeypatch.setattr(growth, "MOST_LIVES", 1)
    # in a process of its own for each optimizer otherwise
    growth.print_memory("ours", 1_000)
    grown_by = float(capsys.readouterr().out)
    monkeypatch.setattr(growth, "memory", lambda n: dict.fromkeys(growth.OPTIMIZERS, grown_by))
    page = growth.build_page((1, 12), (1, 2), (100,), 0.0)
    for measure in growth.MEASURES:
        assert page.count(f"\n| {measure}") == 2
    assert "| tensors | 1 | 12 | exponent |" in page
    assert "| groups | 1 | 2 | exponent |" in page
    assert "Each of 2 steps has gradients of 3" in page
    assert "nan" not in page.split("##", 1)[1]
    assert all(len(set(chosen)) == 3 for chosen in growth.route(2, 8, 3))

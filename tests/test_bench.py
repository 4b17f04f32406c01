"""The arithmetic of the benchmarks, not the times."""

import importlib
import json

import pytest
from click.testing import CliRunner

from fused_warmup import _cpu

bench = importlib.import_module("fused_warmup.cli.bench")


class Clock:
    """A clock that stands still until a step moves it."""

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
    return bench.Row(**{**values, "spread": (1.4, 1.6), **changes})


WHERE = {"cpu": "X", "cores": 2, "threads": 2, "instruction_set": "avx2", "versions": {"torch": "2"}}


def test_the_ratio_is_theirs_over_ours_by_medians():
    clock = Clock()
    peers = {"torch": clock.step("torch", 6.0, 6.0, 60.0)}
    result = bench.interleaved(
        clock.step("ours", 2.0), peers, clock.step("between", 1.0), rounds=9, clock=clock
    )
    assert result.ratio == pytest.approx(3.0)
    assert (result.ours.median, result.theirs.median, result.between.median) == pytest.approx((2, 6, 1))
    assert result.theirs.low <= result.theirs.median <= result.theirs.high
    assert result.spread == pytest.approx((3.0, 30.0))
    assert len(result.rounds) == 9


def test_the_fastest_peer_counts():
    clock = Clock()
    peers = {name: clock.step(name, seconds) for name, seconds in (("slow", 9.0), ("fast", 4.0))}
    result = bench.interleaved(clock.step("ours", 8.0), peers, rounds=3, clock=clock)
    assert (result.peer, result.ratio) == ("fast", pytest.approx(0.5))


def test_rounds_interleave_and_sweep_before_every_step():
    clock = Clock()
    steps = [clock.step(name, 1.0) for name in ("ours", "torch", "sweep")]
    bench.interleaved(steps[0], {"torch": steps[1]}, steps[2], rounds=4, clock=clock)
    assert clock.calls == ["sweep", "torch", "sweep", "ours"] * (len(clock.calls) // 4)
    assert len(clock.calls) > 4 * 4


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 7), (100.0, 50), (1e9, 300)])
def test_as_many_rounds_as_fit(seconds, rounds):
    clock = Clock()
    race = bench.Race(clock.step("ours", 1.0), {"torch": clock.step("torch", 1.0)}, clock=clock)
    assert race.warm_up(seconds) == rounds


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
    assert bench.bytes_moved(states, **options) == expected


def test_the_ceiling_moves_the_bytes_asked_for():
    sweep = bench.stream(800)
    assert sweep().numel() * 8 == 800


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
    page = bench.to_markdown(rows, WHERE)
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(rows)
    assert "| 0.50× |" in page
    assert "- Goals missed: 1. SGD 10x2M" in page
    assert "| 0.75× |" in lines[1]
    data = json.loads(bench.to_json(rows, WHERE))
    assert data["machine"] == WHERE
    assert [entry["verdict"] for entry in data["rows"]] == ["met", "missed", ""]
    assert data["rows"][2]["host_us"] == 12.35


def test_a_row_survives_json():
    entry = json.loads(json.dumps(bench.asdict(row(goal=2.0, others=0.0))))
    assert bench.cells(bench.Row(**entry)) == bench.cells(row(goal=2.0, others=0.0))


@pytest.mark.parametrize("fresh", [False, True])
def test_host_time_is_part_of_the_step(fresh):
    inner = _cpu.step
    line = bench.run_case(bench.HostCase(6, 3, fresh), seconds=0.0)
    assert _cpu.step is inner
    assert 0 < line.host_us < line.ours_ms * 1e3 * 10
    assert "3 groups" in line.name


def test_new_gradients_have_new_addresses():
    params = bench.make_params(3, 64, bench.torch.float32)
    old = [(param.grad.clone(), param.grad.data_ptr()) for param in params]
    bench._renew(params)
    for param, (grad, address) in zip(params, old, strict=True):
        assert param.grad.equal(grad)
        assert param.grad.data_ptr() != address


@pytest.mark.parametrize("work", bench.WORKS, ids=lambda work: work.name)
def test_every_work_runs(work, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"10x2M": (2, 40)})
    line = bench.run_case(bench.Case(work, "10x2M"), seconds=0.0)
    assert line.ratio > 0
    assert line.of_ceiling > 0


def test_the_command_prints_and_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SHAPES", {name: (2, 40) for name in bench.SHAPES})
    path = tmp_path / "rows.json"
    threads = bench.torch.get_num_threads()
    arguments = ["--quick", "--filter", "adam 10X2m", "--threads", str(threads), "--json", str(path)]
    result = CliRunner().invoke(bench.bench, arguments)
    assert result.exit_code == 0, result.output
    assert "Adam" in result.output
    names = [entry["name"] for entry in json.loads(path.read_text())["rows"]]
    assert names == ["Adam 10x2M", "clip+Adam 10x2M", "RAdam 10x2M"]


def test_a_filter_that_matches_nothing_names_the_rows():
    result = CliRunner().invoke(bench.bench, ["--filter", "nothing"])
    assert result.exit_code == 2
    assert "clip+Adam 10x2M" in result.output

"""Printed numbers are the measured ones: losses, times, ratios, rates."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from cli.commands import EDGE, FEW, SEARCH, WHERE, WIDE, changed, invoke, printed, save

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.cli.bench import cases as bench_cases
from fused_warmup.cli.bench import command
from fused_warmup.cli.train import loops

pytestmark = pytest.mark.usefixtures("width")


def cells(text):
    """Numbers of a table by the words in their first column."""
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if line and line[0]}


def test_the_numbers_of_the_report(tmp_path):
    """Ours takes 2 s and 4 ms, torch 6 s and 20 ms: ours is 3 times as fast in all, 5 times in the median."""
    result = invoke("report", save(tmp_path, changed(edge=EDGE, search=SEARCH, note="A note")))
    assert result.exit_code == 0, result.output
    assert cells(result.stdout) == {
        "training loss, last tenth": ["1.2345", "1.5432", ""],
        "validation loss": ["2.3456", "2.6543", ""],
        "accuracy": ["34.5%", "54.3%", ""],
        "validation loss, averaged": ["3.4567", "3.7654", ""],
        "accuracy, averaged": ["45.6%", "65.4%", ""],
        "optimizer stage, sum": ["2.000 s", "6.000 s", "3.00"],
        "median per step": ["4.000 ms", "20.000 ms", "5.00"],
        "share of the training time": ["12.5%", "25.0%", ""],
    }
    heads = [line.split("┃")[1:-1] for line in result.stdout.splitlines() if "┃" in line]
    heads = [" ".join(part.strip() for part in column) for column in zip(*heads, strict=True)]
    assert heads == [" ", "fused_warmup AdamW", "torch AdamW(fused=True)", "torch / ours"]
    assert "digits, 1,234 parameters, 3 steps of 7, lr 0.0125, warmup 1, cosine" in result.stdout
    text = " ".join(result.stdout.split())
    assert "A note. largest difference of the training losses: 5.00e-01" in text
    assert "critical learning rate 2.5 (11 forward passes)" in text
    assert "initial rate for a warmup to 0.0125: 0.0625 (13)" in text
    assert "A Chip, 3 threads, torch 9.8.7, backend cpu" in text
    assert (
        f"written: {tmp_path / 'run.png'}, {tmp_path / 'run-edge.png'}, {tmp_path / 'run-search.png'}" in text
    )


def test_no_ratio_without_a_second_run(tmp_path):
    result = invoke("report", save(tmp_path, changed(theirs=None)))
    assert cells(result.stdout)["optimizer stage, sum"] == ["2.000 s", ""]
    assert "largest difference" not in result.stdout


class Clock:
    """A fake clock for ``train`` that only slowed functions advance."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def slow(self, function, seconds):
        """Return the function, which takes the given seconds, one after the other, and then none."""
        left = list(seconds)

        def run(*args):
            self.now += left.pop(0) if left else 0.0
            return function(*args)

        return run


def test_the_times_of_train_are_those_of_the_stages(tmp_path, monkeypatch):
    """The stage is timed alone; the step with the model but without the readings of sharpness."""
    clock = Clock()
    monkeypatch.setattr(loops, "perf_counter", clock)
    monkeypatch.setattr(loops.FusedLoop, "step", clock.slow(loops.FusedLoop.step, [1, 2, 3, 4, 5, 8]))
    monkeypatch.setattr(loops.TorchLoop, "step", clock.slow(loops.TorchLoop.step, [2, 4, 6, 8, 10, 18]))
    monkeypatch.setattr(loops.FusedLoop, "measure", clock.slow(loops.FusedLoop.measure, [1000] * 6))
    # each side computes the loss once a step
    monkeypatch.setattr(loops, "loss_of", clock.slow(loops.loss_of, [10.0] * 12))
    result = invoke("train", *FEW, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "digits.json").read_text())
    for side, stage, median in (("ours", 23, 3.5), ("theirs", 48, 7)):
        assert record[side]["stage_seconds"] == pytest.approx(stage)
        assert record[side]["stage_median"] == pytest.approx(median)
        assert record[side]["step_seconds"] == pytest.approx(stage + 60)
    shown = cells(result.stdout)
    assert shown["optimizer stage, sum"] == ["23.000 s", "48.000 s", "2.09"]
    assert shown["median per step"] == ["3500.000 ms", "7000.000 ms", "2.00"]
    assert shown["share of the training time"] == ["27.7%", "44.4%", ""]


def test_train_prints_the_saved_numbers(tmp_path):
    """Loss, rate and norm of the last step in the bar; losses, difference and rate in and below the table."""
    result = invoke("train", *FEW, "--lr", 0.0125, "--weight-decay", 0, "--out", tmp_path)
    record = json.loads((tmp_path / "digits.json").read_text())
    with (tmp_path / "digits.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    bar = next(line for line in result.stdout.splitlines() if "6/6" in line)
    found = re.search(r"loss (\S+) +lr (\S+) +norm (\S+)", bar).groups()
    wanted = (f"{float(last['loss']):.4g}", f"{float(last['lr']):.2e}", f"{float(last['grad_norm']):.3g}")
    assert found == wanted
    # the last of 4 steps of a cosine after the warmup
    rate = 0.0125 * 0.5 * (1 + math.cos(math.pi * 3 / 4))
    assert float(last["lr"]) == pytest.approx(rate)
    assert record["ours"]["train_loss"] == pytest.approx(float(last["loss"]))
    pairs = zip(record["ours"]["losses"], record["theirs"]["losses"], strict=True)
    assert f"training losses: {max(abs(a - b) for a, b in pairs):.2e}" in result.stdout
    assert "6 steps of 2, lr 0.0125, warmup 2, cosine" in result.stdout
    shown = cells(result.stdout)
    for key, label in (("validation", ""), ("averaged", ", averaged")):
        losses = [f"{record[side][key]['loss']:.4f}" for side in ("ours", "theirs")]
        assert shown[f"validation loss{label}"] == [*losses, ""]


def test_evaluation_counts_every_example():
    """Slices of 64 and a shorter one weigh as their examples do."""
    torch.manual_seed(1)
    inputs, targets = torch.randn(100, 5), torch.randint(5, (100,))
    found = loops.evaluate(torch.nn.Identity(), loops.Split(inputs, targets))
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(inputs, targets).item())
    assert found["accuracy"] == pytest.approx((inputs.argmax(1) == targets).double().mean().item())


def test_bench_prints_peer_over_ours(monkeypatch):
    """Ours takes 2 ms, the peer 6: the ratio is 3."""
    result = bench_cases.row_of(
        "Adam", bench_cases.Comparison(0.002, "peer", 0.006, (2.5, 3.5), (0.002,), 0.25)
    )
    assert command.cells(result)[2:6] == ("2", "6", "3.00×", "2.50–3.50")
    assert command.cells(result)[11] == "25%"
    text = printed("utf-8", command.print_table, [WIDE], WHERE)
    for upper, lower in (("1.23e+04", "9.88e+04"), ("123.46×", "111.22–133.44"), ("≥ 16.25×", "disturbed"),
                         ("123.5", "1.23×"), ("123457", "99%")):  # fmt: skip
        lines = text.splitlines()
        first = next(i for i, line in enumerate(lines) if upper in line)
        assert lines[first].index(upper) + len(upper) == lines[first + 1].index(lower) + len(lower)


def test_the_numbers_of_refine(tmp_path):
    """Norms of 1, 2, 4 and 0.5 with power 1: weights of 1/2, 1/4, 1/8 and 1, each times those after it."""
    path, out = tmp_path / "norms.csv", tmp_path / "s.json"
    path.write_text("norm\n1\n2\n4\n0.5\nnan\n")
    result = invoke("refine", path, "-o", out, "--smoothing", 0)
    values = schedules.from_json(out.read_text()).values(5)
    # the norm that is missing is taken from its neighbour
    weights = np.array([0.5, 0.25, 0.125, 1.0, 1.0])
    rates = np.array([w * weights[i + 1 :].sum() for i, w in enumerate(weights)])
    assert values == pytest.approx(rates / rates.max())
    shown = cells(result.stdout)
    assert shown["steps"] == ["5"]
    assert shown["median filter"] == ["1 steps"]
    assert shown["norms left out, not finite"] == ["1"]
    assert shown["norms raised to the floor"] == ["0"]
    assert shown["range of the smoothed norms"] == ["8"]
    assert shown["peak of the rate"] == [f"after {rates.argmax() / 5:.1%}"]
    fit = schedules.from_json(out.read_text())
    fit = fw.tuning.fit_polynomial(fit)
    text = f"warmup {fit.warmup:.0%}, power {fit.power:.2f}, rmse {fit.rmse:.3f}"
    assert shown["closest polynomial"] == [text]

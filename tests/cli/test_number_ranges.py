"""Numbers on the command line: each range has ends, and up to them the commands work."""

import math

import numpy as np
import pytest
import torch
from cli.commands import FEW, check_one_line, check_readable, invoke, names

from fused_warmup import schedules
from fused_warmup.cli.train import config

pytestmark = pytest.mark.usefixtures("width")

HUGE = 10**30


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--seed", HUGE], [f"--seed must be <= {2**64 - 1}, got {HUGE}."]),
        (["--seed", 2**64], [f"--seed must be <= {2**64 - 1}, got {2**64}."]),
        (["--seed", -HUGE], [f"--seed must be >= 0, got {-HUGE}."]),
        (["--seed", "nan"], ["--seed", "nan"]),
        (["--steps", HUGE], [f"--steps must be <= {2**62 - 1}, got {HUGE}."]),
        (["--steps", -HUGE], [f"--steps must be >= 1, got {-HUGE}."]),
        (["--steps", "9" * 5000], ["--steps"]),
        (["--batch-size", HUGE], [f"--batch-size must be <= {2**62 - 1}, got {HUGE}."]),
        (["--batch-size", 2**61], ["train: "]),
        (["--warmup", HUGE], [f"--warmup must be <= {2**62 - 1}, got {HUGE}."]),
        (["--threads", HUGE], [f"--threads must be <= 1024, got {HUGE}."]),
        (["--threads", 1025], ["--threads must be <= 1024, got 1025."]),
        (["--sharpness", "--sharpness-every", HUGE], [f"--sharpness-every must be <= {2**62 - 1}"]),
        (["--lr", "-1e-300"], ["--lr must be finite and >= 0, got -1e-300."]),
        (["--lr", "1e999"], ["--lr must be finite and >= 0, got inf."]),
        (["--ema", "-1"], ["--ema must lie in [0, 1), got -1.0."]),
        (["--ema", "inf"], ["--ema must lie in [0, 1), got inf."]),
        (["--max-grad-norm", "nan"], ["--max-grad-norm must be finite and >= 0, got nan."]),
    ],
)
def test_numbers_of_train_have_ends(tmp_path, args, words):
    check_one_line(invoke("train", "--model", "digits", *args, "--out", tmp_path / "out"), *words)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "args",
    [
        ("--seed", 2**64 - 1),
        ("--lr", 0),
        ("--lr", 1.7e308, "--optimizer", "sgd"),
        ("--lr", 1.7e308, "--find-lr", "--sharpness"),
        ("--max-grad-norm", 1.7e308, "--weight-decay", 1.7e308),
        ("--max-grad-norm", 5e-324),
        ("--ema", 1 - 2**-53),
    ],
    ids=str,
)
def test_numbers_of_train_up_to_their_ends(tmp_path, args):
    """Charts and tables are made also for extreme numbers, and no number is cut."""
    result = invoke("train", *FEW, *args, "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    check_readable(result.stdout)
    again = invoke("report", tmp_path)
    assert (again.exit_code, again.stderr) == (0, "")


def test_a_search_needs_a_rate(tmp_path):
    result = invoke("train", *FEW, "--find-lr", "--lr", 0, "--out", tmp_path / "out")
    check_one_line(result, "train: --lr must be > 0 for --find-lr, got 0.0.")
    assert names(tmp_path) == []


@pytest.mark.parametrize("count", [0, -HUGE, 1025, HUGE])
def test_threads_of_bench_have_ends(count):
    check_one_line(invoke("bench", "--threads", count), "--threads", "1<=x<=1024")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", HUGE], f"--steps must be <= 10000000, got {HUGE}."),
        (["--steps", -HUGE], f"--steps must be >= 2, got {-HUGE}."),
        (["--steps", 1], "--steps must be >= 2, got 1."),
        (["--power", 1e308], "power must leave two steps a weight above 0, got 1e+308."),
        (["--power", "nan"], "power must be finite and >= 0, got nan."),
        (["--smoothing", "inf"], "smoothing must lie in [0, 1], got inf."),
        (["--floor", -1], "floor must lie in (0, 1], got -1.0."),
        (["--kind", ""], "kind must be one of"),
        (["--column", ""], "have the column ''"),
    ],
)
def test_numbers_of_refine_have_ends(tmp_path, norms_file, args, words):
    check_one_line(invoke("refine", norms_file, "-o", tmp_path / "s.json", *args), words)
    assert names(tmp_path) == ["norms.csv"]


@pytest.mark.parametrize(
    "recorded", [[1e308, 5e-324, 1.7e308, 1e-308], [0.0, 0.0], [math.nan, math.inf, 1.0]]
)
@pytest.mark.parametrize("args", [(), ("--floor", 5e-324), ("--power", 0), ("--smoothing", 1, "--steps", 2)])
def test_norms_of_refine_up_to_their_ends(tmp_path, recorded, args):
    path, out = tmp_path / "norms.csv", tmp_path / "s.json"
    path.write_text("norm\n" + "".join(f"{norm}\n" for norm in recorded))
    result = invoke("refine", path, "-o", out, "--plot", tmp_path / "s.png", *args)
    assert result.exit_code == 0, result.output
    values = schedules.from_json(out.read_text()).values(2)
    assert np.isfinite(values).all()
    check_readable(result.stdout)


def test_the_config_has_the_range_of_seeds():
    assert config.MAX_SEED == 2**64 - 1
    torch.Generator().manual_seed(config.MAX_SEED)
    with pytest.raises(ValueError, match="Overflow"):
        torch.Generator().manual_seed(config.MAX_SEED + 1)

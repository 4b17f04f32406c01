"""Commands run in this process, records as a training saves them, and checks of what commands print."""

import io
import json
import sys

from click.testing import CliRunner

from fused_warmup.cli import console, group
from fused_warmup.cli.bench import cases as bench_cases
from fused_warmup.cli.train import records

STEPS = ("--steps", 6, "--batch-size", 2, "--warmup", 2)
FEW = ("--model", "digits", *STEPS)
NORMS = [0.5, 1.25, 2.0, 0.125]


def invoke(*args, charset="utf-8"):
    runner = CliRunner(charset=charset)
    result = runner.invoke(group.cli, [str(arg) for arg in args], prog_name="fused-warmup")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def train(out, *args, steps=STEPS):
    """Return the result of a training that succeeds."""
    result = invoke("train", "--out", out, *steps, *args)
    assert result.exit_code == 0, result.output
    return result


def check_one_line(result, *words):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def fail(*args, **kwargs):
    raise RuntimeError("broken")


def run(**changes):
    """The saved results of one loop; all numbers are different."""
    values = {
        "name": "fused_warmup AdamW",
        "train_loss": 1.2345,
        "validation": {"loss": 2.3456, "accuracy": 0.345},
        "averaged": {"loss": 3.4567, "accuracy": 0.456},
        "stage_seconds": 2.0,
        "stage_median": 0.004,
        "step_seconds": 16.0,
        "losses": [4.0, 3.0, 2.0],
    }
    return {**values, **changes}


def saved(**changes):
    """A record with torch's side taking three times as long in all, and five times in the median."""
    theirs = run(
        name="torch AdamW(fused=True)",
        train_loss=1.5432,
        validation={"loss": 2.6543, "accuracy": 0.543},
        averaged={"loss": 3.7654, "accuracy": 0.654},
        stage_seconds=6.0,
        stage_median=0.02,
        step_seconds=24.0,
        losses=[4.0, 3.5, 2.25],
    )
    values = {
        "format": records.FORMAT,
        "version": records.VERSION,
        "settings": {
            "model": "digits",
            "optimizer": "adamw",
            "schedule": "cosine",
            "lr": 0.0125,
            "steps": 3,
            "warmup": 1,
            "batch_size": 7,
            "max_grad_norm": 1.0,
        },
        "note": "",
        "parameters": 1234,
        "backend": "cpu",
        "ours": run(),
        "theirs": theirs,
        "max_loss_difference": 0.5,
        "edge": None,
        "search": None,
        "versions": {"torch": "9.8.7"},
        "machine": {"cpu": "A Chip", "threads": 3},
    }
    return {**values, **changes}


def changed(**changes):
    return json.dumps(saved(**changes))


EDGE = [{"step": 1, "sharpness": 2.0, "preconditioned": 3.0, "threshold": 4.0, "edge_ratio": 0.75}]
SEARCH = {
    "rates": [0.1, 1.0, 10.0],
    "losses": [3.9, 3.8, 9.0],
    "start": 4.0,
    "critical": 2.5,
    "critical_forwards": 11,
    "initial": 0.0625,
    "initial_forwards": 13,
    "target": 0.0125,
}
TELEMETRY = "lr,grad_norm,clip_coef\n0.01,2.0,0.5\n0.02,4.0,0.25\n0.03,1.0,1.0\n"


def save(folder, text=None, table=TELEMETRY, name="run"):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(saved()) if text is None else text)
    path.with_suffix(".csv").write_text(table)
    return path


def check_readable(text, charset="utf-8"):
    """At most 80 columns, nothing cut, and nothing that the encoding lacks; names of files are not broken."""
    assert "\u2026" not in text, text
    assert "..." not in text, text
    text.encode(charset)
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("written:")), text


def row(**changes):
    values = {"name": "host 1000 tensors, 300 groups, new gradients", "ours_ms": 2.0, "peer_ms": 3.0}
    values |= {
        "peer": "clip_grad_norm_, Adam(fused=True), AveragedModel",
        "ratio": 1.5,
        "spread": (1.375, 1.625),
    }
    return bench_cases.Row(**{**values, **changes})


WIDE = row(
    ours_ms=12345.6,
    peer_ms=98765.4,
    ratio=123.456,
    spread=(111.222, 133.444),
    goal=16.25,
    gb_per_s=123.45,
    ceiling=100.0,
    host_us=123456.7,
    others=0.987,
)
WHERE = {"cpu": "A Chip", "threads": 3, "versions": {"torch": "9.8.7"}}


def printed(charset, function, *args):
    """Return the text that a function prints to a pipe."""
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=charset, errors="strict")
    before, sys.stdout = sys.stdout, pipe
    try:
        function(console.PlainConsole(), *args)
    finally:
        sys.stdout = before
    pipe.flush()
    return pipe.buffer.getvalue().decode(charset)

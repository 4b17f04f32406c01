"""Interrupts and errors during the work: the finished steps and rows are kept and written."""

import csv
import json
import signal
import threading

import pytest
from cli.commands import FEW, invoke, names, row, save

from fused_warmup.cli import files, group
from fused_warmup.cli import refine as refining
from fused_warmup.cli.bench import command
from fused_warmup.cli.train import command as training
from fused_warmup.cli.train import loops, report

pytestmark = pytest.mark.usefixtures("width")


def interrupted_after(monkeypatch, calls, error=KeyboardInterrupt):
    """Let the given call of ``train_on`` raise after its step, before it counts."""
    real, made = loops.TrainingLoop.train_on, []

    def train_on(self, *args):
        loss = real(self, *args)
        made.append(loss)
        if len(made) == calls:
            self.losses.pop()
            raise error
        return loss

    monkeypatch.setattr(loops.TrainingLoop, "train_on", train_on)


def check_kept(tmp_path, result, steps):
    """Chart, table, record and telemetry of some steps, and a report that can read them."""
    record = json.loads((tmp_path / "digits.json").read_text())
    with (tmp_path / "digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["ours"]["losses"]) == steps
    assert [float(row["loss"]) for row in rows] == pytest.approx(record["ours"]["losses"])
    assert (tmp_path / "digits.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{record['ours']['train_loss']:.4f}" in result.output
    assert f"train: stopped after {steps} of 6 steps, which are kept." in result.stderr
    assert f"stopped after {steps} of 6 steps" in record["note"]
    shown = result.stdout[result.stdout.index("┏") : result.stdout.index("written:")]
    assert shown in invoke("report", tmp_path).stdout
    return record


@pytest.mark.parametrize(("calls", "steps"), [(8, 3), (7, 3), (2, 0), (12, 5)])
def test_an_interrupt_keeps_the_finished_steps(tmp_path, monkeypatch, calls, steps):
    """The two sides take turns: an odd call is ours, an even one torch's."""
    interrupted_after(monkeypatch, calls)
    result = invoke("train", *FEW, "--out", tmp_path / "out", "--sharpness", "--sharpness-every", 3)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "fused-warmup: interrupted."
    if not steps:
        assert names(tmp_path) == []
        return
    record = check_kept(tmp_path / "out", result, steps)
    assert len(record["theirs"]["losses"]) == steps
    assert [entry["step"] for entry in record["edge"]] == [step for step in (1, 4) if step <= steps]


@pytest.fixture
def interruptible():
    """A shell starts commands in the background with interrupts ignored, and Python leaves that as it is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_the_evaluation_keeps_the_training(tmp_path, monkeypatch):
    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loops, "evaluate", interrupt)
    result = invoke("train", *FEW, "--out", tmp_path, "--no-compare")
    assert result.exit_code == 130
    record = check_kept(tmp_path, result, 6)
    assert (record["theirs"], record["ours"]["validation"]) == (None, None)


def test_an_error_keeps_the_finished_steps(tmp_path, monkeypatch):
    interrupted_after(monkeypatch, 6, RuntimeError("no memory\nfor this"))
    result = invoke("train", *FEW, "--out", tmp_path)
    assert result.exit_code == 2
    check_kept(tmp_path, result, 2)
    assert result.stderr.splitlines()[-1] == "train: RuntimeError: no memory for this"


def test_a_second_interrupt_does_not_stop_the_writing(tmp_path, monkeypatch):
    interrupted_after(monkeypatch, 6)
    real = training.Telemetry.to_csv

    def to_csv(self, path):
        signal.raise_signal(signal.SIGINT)
        real(self, path)

    monkeypatch.setattr(training.Telemetry, "to_csv", to_csv)
    before = signal.getsignal(signal.SIGINT)
    result = invoke("train", *FEW, "--out", tmp_path)
    assert result.exit_code == 130
    check_kept(tmp_path, result, 2)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_of_a_benchmark_keeps_its_rows(tmp_path, monkeypatch):
    path, made = tmp_path / "rows.json", []

    def case(case, seconds):
        made.append(case.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return row(name=case.name)

    monkeypatch.setattr(command, "run_case", case)
    result = invoke("bench", "--json", path)
    assert result.exit_code == 130
    assert [entry["name"] for entry in json.loads(path.read_text())["rows"]] == made[:2]
    assert result.output.count("1.50") == 2


@pytest.mark.parametrize("command", ["refine", "report", "doctor"])
def test_an_interrupt_of_any_command_has_its_code(tmp_path, monkeypatch, norms_file, command):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    doctor = group.cli.get_command(None, "doctor")
    monkeypatch.setattr(doctor, "callback", interrupt)
    monkeypatch.setattr(refining, "refinement", interrupt)
    monkeypatch.setattr(report, "read", interrupt)
    save(tmp_path)
    args = {"refine": [norms_file, "-o", tmp_path / "s.json"], "report": [tmp_path], "doctor": []}[command]
    result = invoke(command, *args)
    assert (result.exit_code, result.stderr) == (130, "fused-warmup: interrupted.\n")
    assert not (tmp_path / "s.json").exists()


def test_other_threads_may_write():
    """Outside the main thread there are no interrupts to hold back."""
    done = []

    def write():
        with files.ignored_interrupts():
            done.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert done == [True]

"""Robustness of the command line: results are kept, inputs are not overwritten, errors are one line."""

import csv
import errno
import io
import json
import math
import os
import re
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.cli import console, files, group, machine
from fused_warmup.cli import refine as refining
from fused_warmup.cli.bench import cases as bench_cases
from fused_warmup.cli.bench import command
from fused_warmup.cli.train import charts, config, loops, records, report
from fused_warmup.cli.train import command as training
from fused_warmup.cli.words import printable
from fused_warmup.tuning.refinement import norms as reading

FEW = ("--model", "digits", "--steps", 6, "--batch-size", 2, "--warmup", 2)
NORMS = [0.5, 1.25, 2.0, 0.125]


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def invoke(*args, charset="utf-8"):
    runner = CliRunner(charset=charset)
    result = runner.invoke(group.cli, [str(arg) for arg in args], prog_name="fused-warmup")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def check_one_line(result, *words):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert str(word) in lines[0]


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def never(*args, **kwargs):
    raise AssertionError("the work began")


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


@pytest.fixture
def norms_file(tmp_path):
    path = tmp_path / "norms.csv"
    path.write_text("norm\n" + "".join(f"{norm}\n" for norm in NORMS))
    return path


# outputs are checked before the work


def bad_places(tmp_path):
    """Names that no file can have, each with a word of the reason."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    return {
        tmp_path / "missing" / "x.json": "No such file",
        tmp_path / "file" / "x.json": "Not a directory",
        tmp_path / "folder": "Is a directory",
        tmp_path / ("x" * 300): "too long",
    }


def test_bench_tries_its_output_first(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_case", never)
    before = None
    for place, reason in bad_places(tmp_path).items():
        before = before or names(tmp_path)
        check_one_line(invoke("bench", "--quick", "--json", place), "bench: --json must be", place, reason)
    assert names(tmp_path) == before


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_refine_tries_its_outputs_first(tmp_path, monkeypatch, norms_file, option):
    monkeypatch.setattr(refining, "read_norms", never)
    other = {"--out": ["--plot", tmp_path / "p.png"], "--plot": ["--out", tmp_path / "s.json"]}[option]
    places = bad_places(tmp_path)
    places = {
        place.with_suffix(".png") if place.name == "x.json" else place: why for place, why in places.items()
    }
    before = names(tmp_path)
    for place, reason in places.items():
        result = invoke("refine", norms_file, option, place, *other)
        check_one_line(result, f"refine: {option} must be", place, reason)
    assert names(tmp_path) == before


def test_train_tries_its_outputs_first(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load", never)
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "new" / ("x" * 300)):
        result = invoke("train", *FEW, "--out", place)
        check_one_line(result, "train: --out must be a folder or a name that is free", place)
    for taken in ("digits.json", "digits.csv", "digits.png", "digits-edge.png", "digits-search.png"):
        folder = tmp_path / taken.replace(".", "")
        (folder / taken).mkdir(parents=True)
        result = invoke("train", *FEW, "--sharpness", "--find-lr", "--out", folder)
        check_one_line(result, f"train: {taken} in --out must be a file", folder / taken)
        assert names(folder) == [taken]
    assert not (tmp_path / "new").exists()


def test_report_tries_its_charts_first(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_all", never)
    save(tmp_path)
    (tmp_path / "run.png").mkdir()
    check_one_line(invoke("report", tmp_path), "report: the chart must be a file", tmp_path / "run.png")


def test_charts_need_their_package_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load", never)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    check_one_line(invoke("train", *FEW, "--out", tmp_path / "out"), "matplotlib", "pip install")
    assert names(tmp_path) == []


def test_the_kind_of_a_chart_is_known_before_the_work(tmp_path, monkeypatch, norms_file):
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(refining, "read_norms", never)
        result = invoke("refine", norms_file, "-o", tmp_path / "s.json", "--plot", tmp_path / "p.xyz")
        check_one_line(result, "refine: the end of --plot must be one of", "'png'", "got 'xyz'")
    assert names(tmp_path) == before
    # a name without an end stays as it is
    assert invoke("refine", norms_file, "-o", tmp_path / "s.json", "--plot", tmp_path / "p").exit_code == 0
    assert (tmp_path / "p").read_bytes()[:4] == b"\x89PNG"
    assert names(tmp_path) == ["norms.csv", "p", "s.json"]


def fail(*args, **kwargs):
    raise RuntimeError("broken")


def test_failed_work_leaves_the_files_unchanged(tmp_path, monkeypatch, norms_file):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("kept")
    monkeypatch.setattr(command, "run_case", fail)
    monkeypatch.setattr(refining, "refinement", fail)
    monkeypatch.setattr(training, "load", fail)
    for path in (old, new):
        check_one_line(invoke("bench", "--json", path), "broken")
        check_one_line(invoke("refine", norms_file, "-o", path, "--plot", tmp_path / "p.png"), "broken")
    check_one_line(invoke("train", *FEW, "--out", tmp_path / "a" / "b"), "broken")
    assert old.read_text() == "kept"
    assert names(tmp_path) == ["norms.csv", "old.json"]


def test_a_link_to_nothing_is_tried_and_stays(tmp_path, monkeypatch, norms_file):
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    with monkeypatch.context() as patch:
        patch.setattr(refining, "read_norms", fail)
        check_one_line(invoke("refine", norms_file, "-o", link), "broken")
    assert link.is_symlink()
    assert not target.exists()
    assert invoke("refine", norms_file, "-o", link).exit_code == 0
    assert schedules.from_json(target.read_text())
    link.unlink()
    link.symlink_to(tmp_path / "missing" / "target.json")
    check_one_line(invoke("refine", norms_file, "-o", link), "--out must be a file", "No such file")


def test_a_pipe_gets_the_schedule_and_is_not_opened_before(tmp_path, monkeypatch, norms_file):
    """Opening a pipe would wait for a reader, and closing it would end the reader's data."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", never)
        with files.checked_output("refine", "--out", pipe):
            pass
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert invoke("refine", norms_file, "-o", pipe).exit_code == 0
        assert len(schedules.from_json(os.read(reader, 1 << 16).decode())) == 4
    finally:
        os.close(reader)


def test_a_disk_that_is_full_takes_nothing_else_with_it(tmp_path, monkeypatch):
    """The other files and the table are there, and the error is one line."""
    real = training.Telemetry.to_csv

    def full(self, path):
        real(self, path)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(training.Telemetry, "to_csv", full)
    result = invoke("train", *FEW, "--out", tmp_path, "--no-compare")
    check_one_line(result, tmp_path / "digits.csv", "No space left")
    assert names(tmp_path) == ["digits.csv", "digits.json", "digits.png"]
    assert "optimizer stage, sum" in result.output


def test_bench_prints_rows_that_it_cannot_write(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "x.json"
    path.parent.mkdir()

    def case(case, seconds):
        path.unlink(missing_ok=True)
        path.parent.rmdir()
        return row()

    monkeypatch.setattr(command, "run_case", case)
    result = invoke("bench", "--filter", "RAdam 10x2M", "--json", path)
    check_one_line(result, path)
    assert "1.50" in result.output


# interrupts


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


def test_a_training_keeps_every_row(tmp_path, monkeypatch):
    """Beyond the number of rows that an optimizer keeps by default."""
    monkeypatch.setattr("fused_warmup.optim.telemetry._KEPT", 4)
    result = invoke("train", *FEW, "--out", tmp_path, "--no-compare")
    assert result.exit_code == 0, result.output
    with (tmp_path / "digits.csv").open(newline="") as file:
        assert [float(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3, 4, 5, 6]


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


# input is never overwritten


@pytest.mark.parametrize("option", ["-o", "--plot"])
@pytest.mark.parametrize("link", ["same", "dot", "symbolic", "hard", "upwards", "to the output"])
def test_the_input_is_no_output(tmp_path, monkeypatch, norms_file, option, link):
    monkeypatch.chdir(tmp_path)
    text, source, out = norms_file.read_text(), norms_file, tmp_path / "other.csv"
    if link == "symbolic":
        out.symlink_to(norms_file)
    elif link == "hard":
        os.link(norms_file, out)
    elif link == "to the output":
        out.symlink_to(norms_file)
        source, out = out, norms_file
    else:
        (tmp_path / "sub").mkdir()
        out = {"same": norms_file, "dot": "./norms.csv", "upwards": "sub/../norms.csv"}[link]
    before = names(tmp_path)
    other = ["-o", "s.json"] if option == "--plot" else []
    if option == "--plot":
        monkeypatch.setattr(refining, "picture_format", lambda *args: "png")
    result = invoke("refine", source, option, out, *other)
    check_one_line(result, f"refine: {'--plot' if other else '--out'} must be another file than", Path(out))
    assert norms_file.read_text() == text
    assert names(tmp_path) == before


def test_two_outputs_are_two_files(tmp_path, norms_file):
    path = tmp_path / "s.png"
    for first, second in ((path, path), (path, tmp_path / "." / "s.png")):
        result = invoke("refine", norms_file, "-o", first, "--plot", second)
        check_one_line(result, "refine: --plot must be another file than", path)
    assert names(tmp_path) == ["norms.csv"]
    # a device may be both
    devices = [part for option in ("-o", "--plot") for part in (option, os.devnull)]
    assert invoke("refine", norms_file, *devices).exit_code == 0


def test_a_missing_input_is_no_output(tmp_path):
    path = tmp_path / "none.csv"
    check_one_line(invoke("refine", path, "-o", path), "--out must be another file than")
    assert names(tmp_path) == []


def test_a_chart_does_not_replace_the_record_that_it_shows(tmp_path):
    path = save(tmp_path)
    for source in (path, path.with_suffix(".csv")):
        os.link(source, tmp_path / "run.png")
        text = source.read_text()
        check_one_line(invoke("report", path), "the chart must be another file than", source)
        assert source.read_text() == text
        (tmp_path / "run.png").unlink()


# CSV files

PLAIN = "step,grad_norm\r\n" + "".join(f"{i},{norm}\r\n" for i, norm in enumerate(NORMS))
GERMAN = PLAIN.replace(",", ";").replace(".", ",")
LONG = PLAIN.replace("step,", "step,note,").replace("\r\n0,", "\r\n0," + "x" * 300_000 + ",")
LONG = "".join(line if line.count(",") == 2 else line.replace(",", ",y,") for line in LONG.splitlines(True))
READABLE = {
    "plain": PLAIN.encode(),
    "line feeds": PLAIN.replace("\r\n", "\n").encode(),
    "carriage returns": PLAIN.replace("\r\n", "\r").encode(),
    "doubled line ends": PLAIN.replace("\r\n", "\r\r\n").encode(),
    "mark of UTF-8": PLAIN.encode("utf-8-sig"),
    "mark of UTF-16": PLAIN.encode("utf-16"),
    "mark of UTF-16, big end first": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "UTF-16 without a mark": PLAIN.encode("utf-16-le"),
    "UTF-16 without a mark, big end first": PLAIN.encode("utf-16-be"),
    "mark of UTF-32": PLAIN.encode("utf-32"),
    "Latin-1": PLAIN.replace("step", "größe,step").replace("\r\n", "\r\nä,").encode("latin-1")[:-2],
    "semicolons": PLAIN.replace(",", ";").encode(),
    "semicolons and decimal commas": GERMAN.encode(),
    "the same in UTF-16": GERMAN.encode("utf-16"),
    "tabulators": PLAIN.replace(",", "\t").encode(),
    "tabulators and decimal commas": GERMAN.replace(";", "\t").encode(),
    "bars": PLAIN.replace(",", "|").encode(),
    "a stated delimiter": ("sep=;\r\n" + GERMAN).encode(),
    "a blank last line": (PLAIN + "\r\n").encode(),
    "blank last lines": (PLAIN + "\r\n  \r\n,\r\n").encode(),
    "blank first lines": ("\r\n\r\n" + PLAIN).encode(),
    "quotes": re.sub(r"[^,\r\n]+", r'"\g<0>"', PLAIN).encode(),
    "blanks": PLAIN.replace(",", " , ").encode(),
    "a long field": LONG.encode(),
    "a delimiter in quotes": PLAIN.replace("step", '"a;b|c",step').replace("\r\n", '\r\n"1;2",')[:-6].encode(),
    "a line break in quotes": PLAIN.replace("step", '"a\r\nb",step').replace("\r\n", "\r\n1,")
    .replace("a\r\n1,", "a\r\n")[:-2].encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_unambiguous_files_are_read(tmp_path, name):
    path, limit = tmp_path / "norms.csv", csv.field_size_limit()
    path.write_bytes(READABLE[name])
    assert reading.read_norms("refine", path, "sgd").tolist() == NORMS
    assert csv.field_size_limit() == limit


# by content: the line, the delimiter that is named, and other words
UNCLEAR = {
    "step;grad_norm\n0;0,5\n1;0.5\n": (2, ";", "'0,5'", "commas and numbers with points"),
    "step;loss;grad_norm\n0;0,5;1.250\n1;0,6;1.5\n": (2, ";", "'1.250'", "commas and numbers with points"),
    "step\tgrad_norm\n0\t1,234\n1\t2,345\n": (2, "\\t", "'1,234'", "separate thousands"),
    "step;grad_norm\n0;1\n1;1,234,567\n": (3, ";", "'1,234,567'", "have a number"),
    "step;grad_norm\n0;1\n1;1.234,5\n": (3, ";", "'1.234,5'", "have a number"),
    'step,grad_norm\n0,1\n1,"1,5"\n': (3, ",", "'1,5'", "have a number"),
    "grad_norm\n0,5\n0,6\n": (2, ",", "have 1 fields, got 2"),
    "grad_norm\n1\n\n2\n": (3, ",", "got ''"),
    "step;grad_norm\n0;1\n1;2;3\n": (3, ";", "have 2 fields, got 3"),
    "step;grad_norm\n0;1\n1;\n": (3, ";", "got ''"),
    "step;grad_norm\n0;1\n1;2": (3, ";", "end with a line break", "cut short"),
    'step,grad_norm\n0,1\n1,"2\n': (3, ",", "be CSV"),
    "step,a;loss,b;c,d\n1,2;3,4;5,6\n": (1, None, "have one delimiter", "[',', ';']"),
    "1\n2\n3\n": (1, ",", "have the names of the columns", "['1']"),
    "step,grad_norm,grad_norm\n0,1,2\n1,2,3\n": (1, ",", "have the column 'grad_norm' once"),
    "\nloss,other\n1,2\n2,3\n": (2, ",", "have the column 'grad_norm'", "Name the one to take."),
    "step,grad_norm\n0,1\n1,\x07\n": (3, None, "be text", "'\\x07'"),
    "step,grad_norm\n0,1\n1," + "x" * 200_000 + "\n": (3, ",", "have a number", "xxx..."),
}


@pytest.mark.parametrize("text", UNCLEAR, ids=range(len(UNCLEAR)))
def test_ambiguous_files_are_named(tmp_path, text):
    path = tmp_path / "norms.csv"
    path.write_text(text)
    line, delimiter, *words = UNCLEAR[text]
    named = [f"The delimiter found is '{delimiter}'."] if delimiter else []
    result = invoke("refine", path, "-o", tmp_path / "s.json", "--kind", "sgd")
    check_one_line(result, f"refine: line {line} of {path} must", *named, *words)
    assert len(result.stderr) < 600
    assert names(tmp_path) == ["norms.csv"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \n", b"\xef\xbb\xbf", b",,\n,,\n", b"\xff\xfe"])
def test_an_empty_file_has_no_header(tmp_path, content):
    path = tmp_path / "norms.csv"
    path.write_bytes(content)
    result = invoke("refine", path, "-o", tmp_path / "s.json")
    check_one_line(result, f"refine: {path} must have a header line, got 'an empty file'.")


def test_decimal_commas_reach_the_column_of_skipped_steps(tmp_path):
    path = tmp_path / "norms.csv"
    path.write_text("grad_norm;skipped\n0,5;0,0\n7,5;1,0\n1,25;0,0\n")
    assert reading.read_norms("refine", path, "sgd").tolist() == [0.5, 1.25]


def test_a_stream_is_read_once(tmp_path, norms_file):
    """An input that cannot be read twice, such as a pipe, gives schedule and chart."""
    pipe, out = tmp_path / "pipe", tmp_path / "s.json"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(norms_file.read_bytes()), daemon=True)
    writer.start()
    assert invoke("refine", pipe, "-o", out, "--plot", tmp_path / "p.png").exit_code == 0
    writer.join()
    assert schedules.from_json(out.read_text()) == fw.tuning.refinement(norms_file).schedule


# records


def changed(**changes):
    return json.dumps(saved(**changes))


BAD_RECORDS = {
    "zero times": (changed(ours=run(stage_seconds=0.0)), "ours.stage_seconds", "> 0", "got 0.0"),
    "no time per step": (changed(ours=run(stage_median=0)), "ours.stage_median", "> 0", "got 0"),
    "no time of the training": (changed(ours=run(step_seconds=0)), "ours.step_seconds", "> 0"),
    "a time before the start": (changed(theirs=run(stage_seconds=-1.0)), "theirs.stage_seconds", "> 0"),
    "strings for losses": (changed(ours=run(losses=["a", "b", "c"])), "ours.losses[0]", "a number or null"),
    "a string for a loss": (changed(ours=run(train_loss="1")), "ours.train_loss", "a number or null"),
    "a string for all losses": (changed(ours=run(losses="abc")), "ours.losses", "a list with entries"),
    "no losses": (changed(ours=run(losses=[])), "ours.losses", "a list with entries"),
    "fewer losses of torch": (changed(theirs=run(losses=[1.0])), "theirs.losses", "must have 3 entries"),
    "truth for a number": (changed(ours=run(losses=[True, 1, 1])), "ours.losses[0]", "got True"),
    "a number that no float holds": (changed(max_loss_difference=10**400), "max_loss_difference"),
    "infinity": (changed(ours=run(stage_seconds=math.inf)), "ours.stage_seconds", "got inf"),
    "no run": (changed(ours=None), "ours", "an object", "got None"),
    "lists for objects": (changed(settings=[]), "settings", "an object", "got []"),
    "a string for the steps": (changed(settings={**saved()["settings"], "steps": "3"}), "settings.steps"),
    "no steps": (changed(settings={**saved()["settings"], "steps": 0}), "settings.steps", ">= 1"),
    "no settings": (changed(settings={}), "be complete, got no settings.model"),
    "no machine": (changed(machine={}), "be complete, got no machine.cpu"),
    "no threads": (changed(machine={"cpu": "x", "threads": None}), "machine.threads"),
    "no accuracy": (changed(ours=run(validation={"loss": 1.0})), "got no ours.validation.accuracy"),
    "numbers for names": (changed(ours=run(name=1)), "ours.name", "a printable text"),
    "commands of a terminal": (changed(note="\x1b[2J"), "note", "a printable text"),
    "an empty edge": (changed(edge=[]), "edge", "a list with entries"),
    "an edge of nothing": (changed(edge=[{}]), "got no edge[0].step"),
    "strings at the edge": (changed(edge=[{**EDGE[0], "sharpness": "x"}]), "edge[0].sharpness"),
    "strings as a bound": (changed(edge=[{**EDGE[0], "sharpness_hi": "x"}]), "edge[0].sharpness_hi"),
    "flags of numbers": (changed(edge=[{**EDGE[0], "preconditioned_flags": [1]}]), "a list of printable"),
    "one flag": (changed(edge=[{**EDGE[0], "sharpness_flags": "rough"}]), "edge[0].sharpness_flags"),
    "an empty search": (changed(search={}), "got no search.rates"),
    "a search without a loss": (changed(search={**SEARCH, "losses": [1.0]}), "search.losses", "3 entries"),
    "mathematics that is none": (changed(ours=run(name="$\\frac$")), "numbers that can be drawn"),
    "no entries": ("{}", "must be of", "(None, None)"),
    "another version": (changed(version=2), "must be of", "2"),
    "an unhashable version": (changed(version=[]), "must be of"),
    "a list": ("[]", "must be of", "got []"),
    "a number": ("1", "must be of", "got 1"),
    "null": ("null", "must be of", "got None"),
    "nested brackets": ("[" * 100_000, "must be complete JSON"),
    "nested and closed brackets": ("[" * 100_000 + "]" * 100_000, "must be complete JSON"),
    "a few nested brackets": ("[" * 900 + "]" * 900, "must be of"),
    "nested objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "must be complete JSON"),
    "nested brackets of a record": (changed(ours="HERE").replace('"HERE"', "[" * 900 + "]" * 900), "ours"),
    "a cut": (changed()[:100], "must be complete JSON"),
    "an empty file": ("", "must be complete JSON"),
    "a digit too many": ("1" * 5000, "must be complete JSON"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named(tmp_path, name):
    text, *words = BAD_RECORDS[name]
    path = save(tmp_path, text)
    result = invoke("report", path)
    check_one_line(result, path.with_suffix(""), *words)
    assert len(result.stderr) < 1000
    assert not path.with_suffix(".png").exists()
    # and it is named among others, which are shown
    save(tmp_path, name="good")
    both = invoke("report", tmp_path)
    assert str(path.with_suffix("")) in both.stderr
    assert "Traceback" not in both.output
    assert (tmp_path / "good.png").exists()
    foreign = any("must be of" in word or "JSON" in word for word in words)
    assert both.exit_code == (0 if foreign else 2)
    assert both.stderr.strip().endswith("It is passed over.") == foreign


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_records_are_read_in_any_encoding(tmp_path, encoding):
    path = save(tmp_path)
    path.write_text(json.dumps(saved(note="größe"), ensure_ascii=False), encoding=encoding)
    path.with_suffix(".csv").write_text(TELEMETRY, encoding=encoding)
    result = invoke("report", path)
    assert result.exit_code == 0, result.output
    assert "größe." in result.output


def test_optional_entries_may_be_missing(tmp_path):
    record = saved()
    for name in ("theirs", "edge", "search"):
        del record[name]
    result = invoke("report", save(tmp_path, json.dumps(record)))
    assert result.exit_code == 0, result.output
    assert "torch\n" not in result.output


def test_telemetry_that_does_not_belong_is_named(tmp_path):
    for table, words in (
        (TELEMETRY[: TELEMETRY.rindex("\n", 0, -1) + 1], ["must have 3 rows", "got 2"]),
        (TELEMETRY.replace("4.0", "x"), ["line 3 of", "'grad_norm'", "'x'"]),
        (TELEMETRY.replace("lr", "rate"), ["line 1 of", "'lr'"]),
        (TELEMETRY + "\x00", ["be text"]),
        ("", ["a header line"]),
    ):
        check_one_line(invoke("report", save(tmp_path, table=table)), tmp_path / "run.csv", *words)


def test_folders_hold_other_files(tmp_path):
    """A folder, a link to nothing and files of others are no records; those that are one are shown."""
    save(tmp_path)
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "tsconfig.json").write_text("// a comment\n{}")
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nothing")
    result = invoke("report", tmp_path)
    assert result.exit_code == 0, result.output
    noted = result.stderr.splitlines()
    assert all(line.endswith("It is passed over.") for line in noted)
    assert [re.search(r"\w+\.json", line).group() for line in noted] == [
        "binary.json", "package.json", "tsconfig.json"
    ]  # fmt: skip
    assert (tmp_path / "run.png").exists()
    # named by itself, or alone, it is an error
    check_one_line(invoke("report", tmp_path / "package.json"), "package.json", "must be of")
    (tmp_path / "run.json").unlink()
    assert invoke("report", tmp_path).exit_code == 2


# numbers

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


# tables


def check_readable(text, charset="utf-8"):
    """At most 80 columns, nothing cut, and nothing that the encoding lacks; names of files are not broken."""
    assert "\u2026" not in text
    assert "..." not in text
    text.encode(charset)
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("written:"))


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


@pytest.mark.parametrize("charset", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("columns", ["80", "20", ""])
def test_the_table_of_bench_is_readable(monkeypatch, charset, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = printed(charset, command.print_table, [WIDE, row()], WHERE)
    check_readable(text, charset)
    words = text.replace("|", " ").split()
    for cell in command.cells(WIDE)[2:]:
        for word in printable(cell, charset).split():
            assert word in words, word
    # names may be on several lines, but no word of them
    for word in f"{WIDE.name} {WIDE.peer}".split():
        assert word in words, word
    for heading in command.HEADINGS:
        assert printable(heading, charset) in text or heading == "compared with"


def test_ascii_replaces_the_characters_of_tables():
    assert printable("1.5× 1–2 ≥ µs …", "ascii") == "1.5x 1-2 >= us ..."
    assert printable("1.5× µs", "latin-1") == "1.5× µs"
    assert printable("größe \udcff", "ascii") == "gr\\xf6\\xdfe \\udcff"
    assert printable("größe \udcff", "utf-8") == "größe \\udcff"
    texts = [heading for heading in command.HEADINGS] + list(command.cells(WIDE))
    assert all("\\" not in printable(text, "ascii") for text in texts)


@pytest.mark.parametrize("charset", ["utf-8", "ascii"])
def test_every_command_prints_in_any_encoding(tmp_path, monkeypatch, charset):
    monkeypatch.setattr(command, "run_case", lambda case, seconds: row(name="größe"))
    folder = tmp_path / "größe"
    folder.mkdir()
    path = save(
        folder, changed(edge=EDGE, search=SEARCH, note="größe", machine={"cpu": "Größe", "threads": 1})
    )
    norms = folder / "norms.csv"
    norms.write_text("norm\n" + "".join(f"{norm}\n" for norm in NORMS))
    shown = "größe" if charset == "utf-8" else "gr\\xf6\\xdfe"
    for args, words in (
        (("report", path), [shown, shown.replace("g", "G"), "6.0", "3.00"]),
        (("refine", norms, "-o", folder / "s.json"), [shown, "closest polynomial"]),
        (("train", *FEW, "--out", folder), [shown, "optimizer stage, sum"]),
        (("doctor",), [*machine.versions().values(), "available"]),
        (("doctor", "--traffic"), ["clip + EMA", "44"]),
        (("bench", "--quick", "--filter", "host 300 tensors, 1 group, kept"), [shown]),
        (("refine", folder / "nöne", "-o", folder / "s.json"), []),
        (("report", folder / "nöne"), []),
        (("--help",), ["doctor"]),
        (("train", "--help"), ["--ema"]),
    ):
        result = invoke(*args, charset=charset)
        if "--help" not in args:
            check_readable(result.stdout, charset)
        result.output.encode(charset)
        assert all(word in result.output for word in words), result.output


def test_a_name_that_is_no_text_is_printed(tmp_path):
    norms = tmp_path / os.fsdecode(b"\xff.csv")
    norms.write_text("norm\n1\n2\n")
    result = invoke("refine", norms, "-o", tmp_path / os.fsdecode(b"\xfe.json"))
    assert result.exit_code == 0, result.output
    assert "\\udcfe.json" in result.output


def test_long_names_do_not_cut_numbers(tmp_path):
    names = {"ours": run(name="o" * 50, train_loss=1e30), "theirs": run(name="t" * 50, stage_seconds=1e300)}
    result = invoke("report", save(tmp_path, changed(**names, backend="b" * 100)))
    assert result.exit_code == 0, result.output
    for number in ("1.0000e+30", "1.000e+300", "5.00e+299"):
        assert number in result.output
    check_readable("\n".join(line for line in result.stdout.splitlines() if "bbb" not in line))


def test_markup_is_text(tmp_path):
    result = invoke("report", save(tmp_path, changed(note="[/red] [bold]x[/bold] :smile:", backend="[/]")))
    assert result.exit_code == 0, result.output
    assert "[/red] [bold]x[/bold] :smile:." in result.output
    assert "backend [/]" in result.output


# printed numbers are the measured ones


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


def test_the_charts_show_the_record():
    record = saved(edge=EDGE, search=SEARCH)
    columns = {"lr": [0.01, 0.02, 0.03], "grad_norm": [2.0, 4.0, 1.0], "clip_coef": [0.5, 0.25, 1.0]}
    loss, lr, norm, clip = report.draw(record, columns).axes
    assert [line.get_ydata().tolist() for line in loss.lines[:2]] == [[4.0, 3.0, 2.0], [4.0, 3.5, 2.25]]
    assert [line.get_label() for line in loss.lines[:2]] == [record["ours"]["name"], record["theirs"]["name"]]
    for panel, name in ((lr, "lr"), (norm, "grad_norm"), (clip, "clip_coef")):
        assert panel.lines[0].get_xdata().tolist() == [1, 2, 3]
        assert panel.lines[0].get_ydata().tolist() == columns[name]
    loss, edge_panel, raw = charts.draw_edge(record).axes
    assert loss.lines[0].get_ydata().tolist() == [4.0, 3.0, 2.0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in edge_panel.lines}
    assert (drawn[r"$\lambda_{\max}(P^{-1}H)$"], drawn["threshold"]) == ([3.0], [4.0])
    assert raw.lines[0].get_ydata().tolist() == [2.0]
    [panel] = charts.draw_search(record).axes
    assert panel.lines[0].get_xdata().tolist() == SEARCH["rates"]
    assert panel.lines[0].get_ydata().tolist() == SEARCH["losses"]
    assert [line.get_xdata()[0] for line in panel.lines[2:]] == [SEARCH["critical"], SEARCH["initial"]]


def test_the_chart_of_readings_shows_bounds_and_flags():
    """Bars from one bound to the other, where there are any, a circle around audits, and crosses."""
    readings = [
        (1, 3.0, 2.5, 4.0, ["cold"]),
        (3, 5.0, None, 7.0, ["audit"]),
        (5, 6.0, 5.0, None, ["audit", "locked"]),
        (7, 2.0, 1.0, 3.0, ["rough"]),
        (9, None, None, None, ["nonfinite"]),
        (11, 4.0, 4.0, 4.0, None),
    ]
    parts = ("", "_lo", "_hi", "_flags")
    rows = [
        {**EDGE[0], "step": step} | {f"preconditioned{p}": x for p, x in zip(parts, found, strict=True)}
        for step, *found in readings
    ]
    _, panel, raw = charts.draw_edge(saved(edge=rows)).axes
    (bars,) = panel.containers[0].lines[2]
    ends = [[float(y) for y in segment[:, 1]] for segment in bars.get_segments() if len(segment)]
    assert [pair for pair in ends if pair == pair] == [
        [2.5, 4.0],
        [5.0, 7.0],
        [5.0, 6.0],
        [1.0, 3.0],
        [4.0, 4.0],
    ]
    marks = {line.get_label(): list(line.get_xdata()) for line in panel.lines}
    assert (marks["audit"], marks["flagged"]) == ([3, 5], [5, 7, 9])
    assert [text.get_text() for text in panel.get_legend().get_texts()][1:] == [
        "audit",
        "flagged",
        "threshold",
    ]
    assert {line.get_label() for line in raw.lines}.isdisjoint(("audit", "flagged"))


def test_a_record_without_bounds_is_drawn(tmp_path):
    """Versions before the bounds wrote the values alone."""
    assert invoke("report", save(tmp_path, changed(edge=EDGE))).exit_code == 0
    _, panel, _ = charts.draw_edge(saved(edge=EDGE)).axes
    (bars,) = panel.containers[0].lines[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[3.0, 3.0]]


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


# errors are one line without a traceback


@pytest.fixture
def odd(tmp_path):
    """Paths of all kinds that are no input, by name."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        **{name: tmp_path / name for name in ("folder", "empty", "binary", "picture", "loop", "missing")},
        "below a file": tmp_path / "empty" / "x",
        "too long": tmp_path / ("x" * 5000),
        "nul": "a\0b",
        "nothing": "",
        "device": "/dev/null",
        "root": "/",
        "parent": "..",
    }


@pytest.mark.parametrize("suffix", ["", ".csv", ".json", ".png"])
def test_odd_files_are_one_line(tmp_path, monkeypatch, odd, norms_file, suffix):
    monkeypatch.chdir(tmp_path / "folder")
    monkeypatch.setattr(command, "run_case", fail)
    monkeypatch.setattr(training, "load", fail)
    for name in ("folder", "empty", "binary", "picture", "loop"):
        if suffix:
            (tmp_path / name).rename(tmp_path / f"{name}{suffix}")
    monkeypatch.chdir(tmp_path / f"folder{suffix}")
    for name, path in odd.items():
        path = f"{path}{suffix}" if str(path).startswith(str(tmp_path)) else path
        for args in (
            ("refine", path, "-o", tmp_path / "s.json"),
            ("report", path),
            ("train", *FEW, "--out", path),
            ("bench", "--json", path),
        ):
            result = invoke(*args)
            assert result.exit_code == 2, (args, result.output)
            # of the folder above, each record that is none
            assert len(result.stderr.splitlines()) == 1 or (name, args[0]) == ("parent", "report")
            # a folder can be made below one, or is one
            if name not in ("nul", "nothing") and "RuntimeError: broken" not in result.stderr:
                assert str(path) in result.stderr
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("args", [("refine", "PATH", "-o", "s.json"), ("report", "PATH")])
def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch, norms_file, args):
    """As any user but the superuser meets it."""
    path = save(tmp_path)
    path.with_suffix(".csv").write_text("norm\n1\n2\n")
    monkeypatch.chdir(tmp_path)

    def refuse(self, *rest, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    real = type(path).open
    monkeypatch.setattr(type(path), "read_bytes", refuse)
    monkeypatch.setattr(
        type(path),
        "open",
        lambda self, mode="r", **k: refuse(self) if mode == "rb" else real(self, mode, **k),
    )
    source = path if args[0] == "report" else norms_file
    result = invoke(*(source if arg == "PATH" else arg for arg in args))
    check_one_line(result, f"{args[0]}: {source} must be accessible, got: Permission denied.")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"), IndexError("x"), TypeError("x"), AttributeError("x"), ZeroDivisionError("x"), RecursionError("x"),
        MemoryError("x"), AssertionError("x"), UnicodeEncodeError("ascii", "x", 0, 1, "x"), csv.Error("x"),
        OSError("x"), OSError(errno.ENOSPC, "x"), StopIteration("x"), ModuleNotFoundError("x", name="x"),
        ImportError("x"), UserWarning("x"), RuntimeError("a\nb\nx"), ValueError(), SystemError("x"),
    ],
    ids=repr,
)  # fmt: skip
def test_any_error_of_any_command_is_one_line(tmp_path, monkeypatch, norms_file, error):
    def broken(*args, **kwargs):
        raise error

    doctor = group.cli.get_command(None, "doctor")
    monkeypatch.setattr(doctor, "callback", broken)
    monkeypatch.setattr(command, "run_case", broken)
    monkeypatch.setattr(refining, "refinement", broken)
    monkeypatch.setattr(training, "load", broken)
    monkeypatch.setattr(report, "read", broken)
    path = save(tmp_path)
    for args in (
        ("doctor",),
        ("bench",),
        ("refine", norms_file, "-o", tmp_path / "s.json"),
        ("train", *FEW, "--out", tmp_path / "out"),
        ("report", path),
    ):
        check_one_line(invoke(*args), args[0], "x" if error.args else "ValueError")


def test_a_closed_pipe_is_no_error(tmp_path, monkeypatch):
    """As in ``fused-warmup doctor | head -1``."""

    def closed(*args, **kwargs):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(group.cli.get_command(None, "doctor"), "callback", closed)
    result = CliRunner().invoke(group.cli, ["doctor"])
    assert (result.exit_code, result.stderr) == (1, "")


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


def test_the_config_has_the_range_of_seeds():
    assert config.MAX_SEED == 2**64 - 1
    torch.Generator().manual_seed(config.MAX_SEED)
    with pytest.raises(ValueError, match="Overflow"):
        torch.Generator().manual_seed(config.MAX_SEED + 1)

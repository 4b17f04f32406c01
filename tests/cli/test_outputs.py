"""Outputs of commands: tried before the work, untouched when it fails, and complete after it."""

import csv
import errno
import os
import sys
from pathlib import Path

import pytest
from cli.commands import FEW, check_one_line, fail, invoke, names, row, save

from fused_warmup import schedules
from fused_warmup.cli import files
from fused_warmup.cli import refine as refining
from fused_warmup.cli.bench import command
from fused_warmup.cli.train import command as training
from fused_warmup.cli.train import report

pytestmark = pytest.mark.usefixtures("width")


def never(*args, **kwargs):
    raise AssertionError("the work began")


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


def test_a_training_keeps_every_row(tmp_path, monkeypatch):
    """Beyond the number of rows that an optimizer keeps by default."""
    monkeypatch.setattr("fused_warmup.optim.telemetry._KEPT", 4)
    result = invoke("train", *FEW, "--out", tmp_path, "--no-compare")
    assert result.exit_code == 0, result.output
    with (tmp_path / "digits.csv").open(newline="") as file:
        assert [float(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3, 4, 5, 6]

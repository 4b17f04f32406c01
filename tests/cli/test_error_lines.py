"""Errors of commands are one line without a traceback."""

import csv
import errno

import pytest
from cli.commands import FEW, check_one_line, fail, invoke, save
from click.testing import CliRunner

from fused_warmup.cli import group
from fused_warmup.cli import refine as refining
from fused_warmup.cli.bench import command
from fused_warmup.cli.train import command as training
from fused_warmup.cli.train import report

pytestmark = pytest.mark.usefixtures("width")


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

"""Inputs of commands are never overwritten, and two outputs are two files."""

import os
from pathlib import Path

import pytest
from cli.commands import check_one_line, invoke, names, save

from fused_warmup.cli import refine as refining

pytestmark = pytest.mark.usefixtures("width")


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

"""Fixtures of the tests of commands."""

import pytest
from cli.commands import NORMS


@pytest.fixture
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def norms_file(tmp_path):
    path = tmp_path / "norms.csv"
    path.write_text("norm\n" + "".join(f"{norm}\n" for norm in NORMS))
    return path

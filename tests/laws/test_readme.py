"""Documentation is true: Python blocks run, links and named files exist; blocks of one page share their names."""

import doctest
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from fused_warmup.schedules import segments

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    text = page.read_text()
    if "torch.cuda" in text and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match.group(1), str(page), "exec"), names)


def test_links_lead_somewhere():
    for page in TEXTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_named_modules_exist():
    for page in TEXTS:
        for name in re.findall(r"python -m ([\w.]+)", page.read_text()):
            assert importlib.util.find_spec(name), f"{page.name}: {name}"


def test_named_files_exist():
    """Files and folders in the table of CONTRIBUTING.md, and files of the repository elsewhere."""
    folders = (ROOT, ROOT / "fused_warmup", ROOT / "csrc")
    for page in TEXTS:
        named = re.findall(r"`([\w/]+(?:\.(?:py|h|cu|cpp)|/))`", page.read_text())
        for name in named:
            assert any((folder / name).exists() for folder in folders), f"{page.name}: {name}"


def test_doctest_of_the_schedules():
    result = doctest.testmod(segments)
    assert (result.failed, result.attempted) == (0, 3)

"""Every Python block of the README and the docs runs; blocks of one page share their names."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    if "torch.cuda" in page.read_text() and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for match in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        line = page.read_text()[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match.group(1), str(page), "exec"), names)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_doctest_of_the_schedules():
    import doctest

    from fused_warmup.schedules import segments

    assert doctest.testmod(segments).failed == 0
    assert doctest.testmod(segments).attempted == 3

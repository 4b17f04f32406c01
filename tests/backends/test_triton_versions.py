"""Other versions of Triton than the pinned one: the oldest and the newest supported, each in a process of its own.

``make test`` installs them first; ``make compat`` runs all tests of the kernels with all versions.
"""

import re
from pathlib import Path

import compat
import pytest

from fused_warmup import backends

ROOT = Path(__file__).resolve().parents[2]
# every kernel and rule for one architecture, and steps that launch what was compiled
ONE_DEVICE = (
    "(whole_blocks and 90) or (reduce_layers and 90) or (decide and 90) or (vector and float32) "
    "or preconditioner or repeated or later_steps or writes_nothing"
)
ONE_STEP = "one_step_from_the_same_state and float32"


def passes(version, *options, interpreted=False):
    if not compat.is_installed(version) and not compat.folder(version).exists():
        pytest.skip(f"triton {version} is not in {compat.folder(version)}: run tests/compat.py install")
    run = compat.run_pytest(*options, version=version, interpreted=interpreted)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("version", compat.ENDS)
def test_all_kernels_compile(version):
    passes(version, compat.COMPILE, "-k", ONE_DEVICE)


@pytest.mark.slow
def test_one_step_in_the_interpreter_of_the_newest():
    passes(compat.ENDS[-1], compat.INTERPRET, "-k", ONE_STEP, interpreted=True)


def test_the_oldest_version_is_the_same_everywhere():
    oldest = compat.VERSIONS[0]
    assert ".".join(map(str, backends.OLDEST_TRITON)) == oldest
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    assert re.findall(r'^triton = \["triton>=(.*)"\]$', extras, re.M) == [oldest]
    assert re.findall(r"Triton >= ([\d.]+\d)", (ROOT / "README.md").read_text()) == [oldest]


def test_the_pinned_version_is_one_of_them():
    (pinned,) = re.findall(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned in compat.VERSIONS
    assert pinned in compat.INTERPRETED
    assert pinned not in compat.ENDS
    assert compat.ENDS[-1] in compat.INTERPRETED


def test_a_version_that_pip_cannot_install_stops_with_a_message(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=r"pip must install triton 3\.5\.1 into .*3\.5\.1, and failed"):
        compat.install("3.5.1")
    assert "No matching distribution" in capfd.readouterr().err
    assert not compat.folder("3.5.1").exists()

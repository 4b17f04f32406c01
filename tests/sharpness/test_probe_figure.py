"""The figure of readings before and after in the docs is that of the readings that are kept."""

import json
from pathlib import Path

import pytest

from benchmarks import probe_figure

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "benchmarks" / "results" / f"probe-{when}.json" for when in ("before", "after")]


@pytest.fixture(scope="module")
def readings():
    return [json.loads(path.read_text()) for path in FILES]


@pytest.mark.parametrize("network", probe_figure.NETWORKS)
def test_the_docs_state_the_errors_of_the_readings(readings, network):
    cells = " | ".join(probe_figure.describe(found[network]) for found in readings)
    assert f"| {network} | {cells} |" in (ROOT / "docs" / "sharpness.md").read_text()


def test_both_versions_measured_the_same_training(readings):
    before, after = (
        [(row["step"], pytest.approx(row["truth"], rel=1e-3)) for name in found for row in found[name]]
        for found in readings
    )
    assert [step for step, _ in before] == [step for step, _ in after]
    assert [expected for _, expected in before] == [expected.expected for _, expected in after]


def test_the_figure_shows_readings_and_truth(readings):
    figure = probe_figure.draw(*readings)
    assert len(figure.axes) == 4
    for i, panel in enumerate(figure.axes):
        rows = readings[i % 2][probe_figure.NETWORKS[i // 2]]
        drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
        assert drawn["reading"] == [row["value"] for row in rows]
        assert drawn["double backward"] == [row["truth"] for row in rows]

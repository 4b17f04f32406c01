"""Charts show the numbers of the record: losses, telemetry, edge of stability, search for a rate."""

import pytest
from cli.commands import EDGE, SEARCH, changed, invoke, save, saved

from fused_warmup.cli.train import charts, report

pytestmark = pytest.mark.usefixtures("width")


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

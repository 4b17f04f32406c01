"""Refined schedules: golden values, properties of the closed form, bounds, files, and digits with wrong labels."""

import csv
import functools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import make_params, set_grads
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.cli import group
from fused_warmup.tuning import (
    best_rates,
    best_scale,
    fit_polynomial,
    last_iterate_bound,
    refined_bound,
    refinement,
)
from fused_warmup.tuning.refinement import refine as module

DATA = Path(__file__).parents[1] / "data"
SUMMARY = json.loads((DATA / "refinement_summary.json").read_text())


def golden(name):
    with (DATA / f"refinement_{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def table(norms, *args, **options):
    return refinement(norms, *args, **options).schedule.values(options.get("steps") or len(norms))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize(("name", "tau"), [("T12", 0.1), ("T12_tau05", 0.5), ("T200", 0.1), ("T2000", 0.1)])
def test_golden_schedules(name, tau, kind):
    expected = golden(name)
    found = refinement(expected["G"], kind, tau)
    assert found.smoothed.tolist() == expected["G_smooth"].tolist()
    assert np.abs(found.schedule.values(len(expected["G"])) - expected[f"eta_{kind}"]).max() <= 1e-12
    assert found.width == SUMMARY[name]["width"]
    assert found.peak == SUMMARY[name][f"argmax_{kind}"] / len(expected["G"])
    if f"eta_{kind}_nosmooth" in expected:
        assert np.abs(table(expected["G"], kind, 0.0) - expected[f"eta_{kind}_nosmooth"]).max() <= 1e-12


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("steps", [200, 2000])
def test_golden_pipeline_of_the_authors(steps, kind):
    """Without two samples at each end, the width from the length of the schedule, resampled before or after."""
    expected = golden(f"pipeline_T{steps}_nvals1000_{kind}")
    found = refinement(golden(f"T{steps}")["G"][2:-2], kind, steps=1000, parity=True)
    assert found.smoothed.tolist() == expected["G_smooth"].tolist()
    assert np.abs(found.schedule.values(1000) - expected["eta"]).max() <= 1e-12


@pytest.mark.parametrize("interpolation", ["linear", "log"])
@pytest.mark.parametrize("steps", [5, 24])
def test_golden_resampling(steps, interpolation):
    expected = golden(f"resample_T12_to_{steps}")
    name = "norm_interp" if interpolation == "linear" else "norm_loginterp"
    found = refinement(golden("T12")["G"], "sgd", steps=steps, interpolation=interpolation)
    assert np.abs(found.smoothed - expected[name]).max() <= 1e-12
    assert np.abs(found.schedule.values(steps) - expected[f"eta_from_{name}"]).max() <= 1e-12


def test_golden_by_coordinate():
    """Each coordinate by its own norms; the golden rates are not normalised."""
    expected = golden("coordwise_T6_d3")
    norms = np.stack([expected[f"g{i}"] for i in range(3)], 1)
    for given_norms in (norms, torch.tensor(norms)):
        found = fw.tuning.refine_groups(given_norms, kind="sgd", smoothing=0.0, on_trouble="ignore")
        for i, s in enumerate(found):
            raw = expected[f"eta_raw{i}"]
            assert np.abs(s.values(6) - raw / raw.max()).max() <= 1e-12
    # two of them are a run of three steps with a trend
    with pytest.warns(UserWarning, match="peaks after 67%"):
        fw.tuning.refine_groups(norms, kind="sgd", smoothing=0.0)


def test_shapes_of_the_published_grid():
    """Norms that spike at the start give a warmup; later norms bend the decay."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    x = np.arange(2000) / 2000
    for end, peak, middle in (
        (None, 0, 0.499750),
        (1, 270, 0.583130),
        (2, 242, 0.211576),
        (0.7, 301, 0.859922),
    ):
        values = (1,) * 6 if end is None else (15, 6, 4, 2, 1, end)
        norms = np.interp(x, (0, 0.003, 0.02, 0.03, 0.1, 1), values)
        norms = ndimage.gaussian_filter1d(norms, 40, mode="nearest")
        found = table(norms, "sgd", 0.0)
        assert abs(int(found.argmax()) - peak) <= 1, end
        assert found[1000] == pytest.approx(middle, abs=2e-3), end


# properties

LENGTHS = st.integers(2, 500)
TAUS = st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])
KINDS = st.sampled_from(["sgd", "adam"])


def random_norms(seed, n):
    return np.exp(0.5 * np.random.default_rng(seed).standard_normal(n))


@given(n=LENGTHS, tau=TAUS, kind=KINDS, size=st.floats(1e-6, 1e6))
def test_constant_norms_give_linear_decay(n, tau, kind, size):
    """Constant norms of any size give exactly ``(T - 1 - t) / (T - 1)``."""
    assert table(np.full(n, size), kind, tau) == pytest.approx((n - 1 - np.arange(n)) / (n - 1), abs=1e-12)


@given(seed=st.integers(0, 99), n=LENGTHS, tau=TAUS, kind=KINDS, size=st.floats(1e-100, 1e100))
def test_scale_cancels_and_the_ends_are_exact(seed, n, tau, kind, size):
    """A factor of the norms changes nothing; the last rate is 0, the largest 1, and none is negative."""
    norms = random_norms(seed, n)
    base = table(norms, kind, tau)
    assert table(size * norms, kind, tau) == pytest.approx(base, rel=1e-9, abs=1e-12)
    assert (base[-1], base.max()) == (0.0, 1.0)
    assert (base >= 0.0).all()
    last = table(norms, kind, tau, zero_last=False)
    assert 0.0 < last[-1] <= last.max() == 1.0


def test_a_spike_at_the_start_is_a_warmup():
    """Ten times the norm gives a hundredth of the rate with power 2, a tenth with power 1."""
    norms = np.ones(1000)
    norms[:10] = 10.0
    linear = (999 - np.arange(1000)) / 999
    for kind, factor in (("sgd", 100), ("adam", 10)):
        found = table(norms, kind, 0.0)
        assert found[:10] * factor == pytest.approx(linear[:10] / linear[10], rel=2e-2)


@given(seed=st.integers(0, 99), n=LENGTHS)
def test_sum_of_the_rates(seed, n):
    """Before normalisation the rates add up to (S^2 - sum w^2) / 2, with S the sum of the weights."""
    norms = random_norms(seed, n)
    w = norms**-2.0
    found = table(norms, "sgd", 0.0)
    raw = w * (w.sum() - np.cumsum(w))
    assert found.sum() * raw.max() == pytest.approx((w.sum() ** 2 - (w**2).sum()) / 2, rel=1e-9)


@given(seed=st.integers(0, 99), n=LENGTHS)
def test_where_the_rate_rises(seed, n):
    """The rate rises where w[t+1] / w[t] > W[t+1] / W[t+2], with the sums W[t] of the weights from t on."""
    norms = random_norms(seed, n)
    w = norms**-2.0
    tails = np.cumsum(w[::-1])[::-1]
    found = table(norms, "sgd", 0.0)
    for t in range(n - 2):
        ratio = w[t + 1] / w[t] / (tails[t + 1] / tails[t + 2])
        if abs(ratio - 1.0) > 1e-9:
            assert (found[t + 1] > found[t]) == (ratio > 1.0), t


def test_widths():
    """Widths are odd, and those of the authors' code."""
    widths = {12: 1, 100: 11, 200: 21, 1000: 101, 2000: 201, 10000: 1001}
    assert {n: module.filter_width(0.1, n) for n in widths} == widths
    assert (module.filter_width(0.5, 12), module.filter_width(0.0, 500)) == (7, 1)


def plain_medians(values, width):
    """The definition, one window after the other."""
    half, n = width // 2, len(values)
    found = []
    for t in range(n):
        window = []
        for i in range(t - half, t + half + 1):
            j = max(i, 0)
            while j > n - 1 > 0:
                # mirrored at the last sample, and at the first one if the run is shorter than the window
                j = abs(2 * (n - 1) - j)
            window.append(values[min(j, n - 1)])
        found.append(sorted(window)[half])
    return found


@given(seed=st.integers(0, 99), n=st.integers(1, 60), half=st.integers(0, 70))
def test_median_filter(seed, n, half):
    """The definition, with scipy and without; the filter commutes with the logarithm, as medians do."""
    values = random_norms(seed, n)
    found = module.median_filter(values, 2 * half + 1)
    assert found.tolist() == plain_medians(values.tolist(), 2 * half + 1)
    assert module.median_filter(np.log(values), 2 * half + 1).tolist() == np.log(found).tolist()
    real = sys.modules.get("scipy.ndimage")
    sys.modules["scipy.ndimage"] = None
    try:
        assert module.median_filter(values, 2 * half + 1).tolist() == found.tolist()
    finally:
        if real is None:
            del sys.modules["scipy.ndimage"]
        else:
            sys.modules["scipy.ndimage"] = real


# bounds


def test_golden_bounds():
    t, n = np.arange(100), 100
    shapes = {
        "constant": np.ones(n),
        "linear (T-t)/T, t=0..T-1": (n - t) / n,
        "linear (T-t)/(T+1)": (n - t) / (n + 1),
        "cosine .5(1+cos(pi t/T))": 0.5 * (1 + np.cos(math.pi * t / n)),
        "1/sqrt(t+1)": 1 / np.sqrt(t + 1),
    }
    for name, expected in SUMMARY["bound_T100_G1_D1"].items():
        scale = best_scale(shapes[name], 1.0)
        # theirs is from a numerical search, which finds a minimum to half of the digits
        assert scale * 10 == pytest.approx(expected["best_scale_times_sqrtT"], rel=1e-7)
        bound = last_iterate_bound(scale * shapes[name], 1.0)
        assert bound * 10 == pytest.approx(expected["bound_times_sqrtT"], rel=1e-9)
        for other in (0.9 * scale, 1.1 * scale):
            assert last_iterate_bound(other * shapes[name], np.ones(n)) > bound
    assert last_iterate_bound(0.1 * np.ones(n), 1.0, 2.0) > last_iterate_bound(0.1 * np.ones(n), 1.0)


def test_refined_bound_is_the_best_of_its_kind():
    """(D^2 + sum w^2 g^2) / (2 sum w) is smallest at w proportional to g^-2."""
    norms = golden("T12")["G"]
    expected = SUMMARY["refined_bound_T12"]
    assert refined_bound(norms) == pytest.approx(expected["value"], rel=1e-12)
    assert refined_bound(norms, 3.0) == pytest.approx(3 * expected["value"], rel=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(5):
        log_w = torch.tensor(rng.standard_normal(12), dtype=torch.float64, requires_grad=True)
        g = torch.tensor(norms)
        opt = torch.optim.LBFGS(
            [log_w], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def bound(log_w=log_w, g=g):
            w = log_w.exp()
            return (1.0 + (w * g).square().sum()) / (2 * w.sum())

        def closure(opt=opt, bound=bound):
            opt.zero_grad()
            value = bound()
            value.backward()
            return value

        opt.step(closure)
        assert bound().item() == pytest.approx(expected["value"], rel=1e-9)
        w = log_w.detach().exp() * g.square()
        assert (w / w[0]).tolist() == pytest.approx([1.0] * 12, rel=1e-4)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_bounds_hold_on_maxima_of_planes(seed):
    """On f(x) = max_i a_i x + b_i, for random weights of theorem 3 and for any rates."""
    rng = np.random.default_rng(seed)
    n, d, m = int(rng.integers(2, 12)), int(rng.integers(1, 4)), int(rng.integers(2, 6))
    a, b = rng.standard_normal((m, d)), rng.standard_normal(m)
    f = lambda x: (a @ x + b).max()  # noqa: E731
    start, u = rng.standard_normal(d), rng.standard_normal(d)
    distance = float(np.linalg.norm(start - u)) + 1e-12
    w = np.exp(rng.standard_normal(n))
    tails = np.append(np.cumsum(w[::-1])[::-1], 0.0)
    for rates in (w * tails[1:] / tails[0], np.exp(rng.standard_normal(n) - 1)):
        x, norms = start.copy(), []
        for t in range(n):
            g = a[int((a @ x + b).argmax())]
            norms.append(float(np.linalg.norm(g)))
            last = f(x)
            x = x - rates[t] * g
        if rates[-1] == 0.0:
            bound = (distance**2 + ((w * norms) ** 2).sum()) / (2 * w.sum())
        else:
            bound = last_iterate_bound(rates, norms, distance)
        assert last - f(u) <= bound * (1 + 1e-12)


def slopes(rates, norms):
    """Return the slopes of the log of the bound over the logs of the rates, by central differences."""
    found = []
    for t in range(len(rates)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = rates.copy()
            moved[t] *= math.exp(step)
            ends.append(math.log(last_iterate_bound(moved, norms)))
        found.append((ends[0] - ends[1]) / 2e-5)
    return np.array(found)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), size=st.floats(1e-100, 1e100))
def test_best_rates(seed, n, size):
    """The convex bound has slope 0 in every rate, and is below that of linear, refined and random rates."""
    norms = random_norms(seed, n)
    rates = best_rates(norms)
    assert np.abs(slopes(rates, norms)).max() < 1e-9
    # the differences detect other rates
    assert np.abs(slopes(1.1 * rates, norms)).max() > 1e-5
    bound = last_iterate_bound(rates, norms)
    others = [(n - np.arange(n)) / n, rates * random_norms(seed + 1, n)]
    if n > 1:
        others.append(table(norms, "sgd", 0.0, zero_last=False))
    for other in others:
        assert bound <= last_iterate_bound(best_scale(other, norms) * other, norms) * (1 + 1e-12)
    assert best_rates(size * norms, 3.0) == pytest.approx(3.0 / size * rates, rel=1e-12)
    assert (rates > 0.0).all()


def test_best_rates_of_few_steps():
    assert best_rates([4.0], 2.0).tolist() == [0.5]
    # by hand: 1 / (a + b) + a^2 / b + b is smallest at a = (sqrt(2) - 1) b
    a, b = best_rates([1.0, 1.0])
    assert a / b == pytest.approx(math.sqrt(2) - 1)
    assert last_iterate_bound([a, b], 1.0) == pytest.approx(math.sqrt(2 * (math.sqrt(2) - 1)))
    bounds = {n: last_iterate_bound(best_rates(np.ones(n)), 1.0) * math.sqrt(n) for n in (100, 1000)}
    assert bounds == pytest.approx({100: 2.0011, 1000: 2.0024}, abs=1e-4)


@pytest.mark.parametrize("name", ["T12", "T200"])
def test_no_search_finds_better_rates(name):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    norms = golden(name)["G"]
    bound = last_iterate_bound(best_rates(norms), norms)
    start = np.full(len(norms), -math.log(len(norms)) / 2)
    options = {"maxfun": 10**6, "maxiter": 10**5, "ftol": 1e-15, "gtol": 1e-9}
    found = optimize.minimize(
        lambda z: math.log(last_iterate_bound(np.exp(z), norms)), start,
        method="L-BFGS-B", bounds=[(-30, 30)] * len(norms), options=options,
    )  # fmt: skip
    print(name, bound, math.exp(found.fun) / bound - 1)
    assert bound * (1 - 1e-12) <= math.exp(found.fun) <= bound * (1 + 1e-6)


def test_bad_bounds():
    for call, message in (
        (
            lambda: last_iterate_bound([1.0, 0.0], 1.0),
            "last_iterate_bound: rates[1] must be finite and > 0, got 0.0",
        ),
        (lambda: last_iterate_bound([1.0], [1.0, 2.0]), "norms must be as many as the rates, 1, got 2"),
        (lambda: last_iterate_bound([[1.0]], 1.0), "rates must have the shape [steps], got (1, 1)"),
        (lambda: refined_bound([1.0, math.nan]), "refined_bound: norms[1] must be finite and > 0, got nan"),
        (lambda: best_rates([1.0, 0.0]), "best_rates: norms[1] must be finite and > 0, got 0.0"),
        (lambda: best_rates([]), "best_rates: norms must have the shape [steps], got (0,)"),
        (lambda: best_rates([1.0], -1), "best_rates: distance must be finite and > 0, got -1"),
        (lambda: refined_bound([1.0], 0.0), "refined_bound: distance must be finite and > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.raises(TypeError, match="refined_bound: norms must be numbers"):
        refined_bound("ab")


# input


def record(kind="adam", steps=12):
    """Return an optimizer whose telemetry has a skipped step 3, and the norms of the other steps by hand."""
    params = make_params(torch.float32, [(5,), (2, 3)])
    opt = fw.Adam(params, nonfinite="skip") if kind == "adam" else fw.SGD(params, nonfinite="skip")
    norms = []
    for i in range(steps):
        set_grads(params, i, scale=1.0 + 3.0 / (i + 1))
        if i == 3:
            params[0].grad[0] = math.inf
        else:
            flat = torch.cat([p.grad.flatten() for p in params]).double()
            norms.append(float(flat.abs().sum() if kind == "adam" else flat.norm()))
        opt.step()
    return opt, norms


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_sources(tmp_path, kind):
    """A telemetry, its history, its file, and numbers give the same schedule; the skipped step is left out."""
    opt, norms = record(kind)
    expected = table(norms, kind, 0.3)
    assert len(expected) == 11
    opt.telemetry.to_csv(tmp_path / "run.csv")
    lines = ["Step,gnorm,MIN,MAX", *(f"{i},{norm!r},0,0" for i, norm in enumerate(norms))]
    (tmp_path / "tracker.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "one.csv").write_text("\n".join(["norm", *map(repr, norms)]) + "\n")
    for source in (
        opt.telemetry, opt.telemetry.history(), tmp_path / "run.csv", str(tmp_path / "tracker.csv"),
        tmp_path / "one.csv", torch.tensor(norms, dtype=torch.float64), np.array(norms),
    ):  # fmt: skip
        found = fw.tuning.refine_schedule(source, kind, 0.3, on_trouble="ignore").values(11)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-12), source
    other = {"sgd": "grad_norm_l1", "adam": "grad_norm"}[kind]
    named = table(opt.telemetry.history()[other][[i for i in range(12) if i != 3]], kind)
    assert refinement(opt.telemetry, kind, column=other).schedule.values(11).tolist() == named.tolist()


def rows_of(steps, skipped=()):
    """Return columns of a telemetry; the norm of a row is its place, from 1."""
    skips = [float(i in skipped) for i in range(len(steps))]
    norms = [float(i + 1) for i in range(len(steps))]
    return {"step": [float(step) for step in steps], "grad_norm": norms, "skipped": skips}


def write_rows(path, columns):
    lines = [",".join(columns), *(",".join(map(repr, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")


INCOMPLETE = {
    "beginning": (rows_of(range(3, 9)), "all 8 updates of the run, got 6"),
    "middle": (rows_of([1, 2, 6, 7]), "all 7 updates of the run, got 4"),
    "beginning, skipped": (rows_of([2, 3, 4, 5], skipped=(0,)), "all 5 updates of the run, got 3"),
    "after going back": (rows_of([4, 5, 6, 4, 5]), "all 5 updates of the run, got 2"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_record_is_refused(tmp_path, case):
    columns, message = INCOMPLETE[case]
    write_rows(tmp_path / "run.csv", columns)
    for source in (columns, tmp_path / "run.csv"):
        with pytest.raises(
            ValueError, match=f"^refine_schedule: norms must have rows of {message}. Make the"
        ):
            fw.tuning.refine_schedule(source, "sgd")
    # a part of a run that was meant
    assert len(fw.tuning.refine_schedule(columns["grad_norm"], "sgd")) == len(columns["step"])


@pytest.mark.parametrize("telemetry", [True, "all"])
def test_a_telemetry_that_dropped_rows_is_refused(tmp_path, telemetry):
    """One that keeps all rows, and the file that rows are streamed to, are as good as a short run."""
    param = torch.nn.Parameter(torch.zeros(1))
    opt = fw.SGD([param], lr=0.0, telemetry=telemetry)
    opt.telemetry.stream_to(tmp_path / "run.csv")
    param.grad = torch.ones(1)
    for _ in range(16_384 + 50):
        opt.step()
    dropped = opt.telemetry.dropped
    assert dropped == (50 if telemetry is True else 0)
    if dropped:
        message = r'must have rows of all 16434 updates of the run, got 16384\. .* telemetry="all".*stream_to\(path\)'
        with pytest.raises(ValueError, match=message):
            fw.tuning.refine_schedule(opt.telemetry, "sgd")
    else:
        assert len(fw.tuning.refine_schedule(opt.telemetry, "sgd")) == 16_434
    assert len(fw.tuning.refine_schedule(tmp_path / "run.csv", "sgd")) == 16_434


def test_of_a_step_made_again_the_last_row_counts(tmp_path):
    """In the file of a run that was resumed from an earlier step, or begun again."""
    for steps, skipped, norms in (
        ([1, 2, 3, 4, 3, 4, 5], (), [1, 2, 5, 6, 7]),
        ([1, 2, 2, 3, 3, 4], (2,), [1, 2, 5, 6]),
        ([1, 2, 3, 4, 5, 1, 2, 3], (), [6, 7, 8]),
        ([0, 1, 2], (0,), [2, 3]),
    ):
        columns = rows_of(steps, skipped)
        write_rows(tmp_path / "run.csv", columns)
        for source in (columns, tmp_path / "run.csv"):
            assert refinement(source, "sgd", smoothing=0.0).smoothed.tolist() == norms


def test_a_record_of_skipped_steps_has_no_norms():
    with pytest.raises(ValueError, match="one number per step, of two steps at least"):
        refinement(rows_of([0, 0], skipped=(0, 1)), "sgd")


def test_norms_that_are_not_finite_keep_the_places_of_the_others():
    norms = np.linspace(3.0, 1.0, 50)
    holes = norms.copy()
    holes[[7, 20, 21]] = math.nan, math.inf, math.nan
    found = refinement(holes, smoothing=0.0)
    assert found.smoothed == pytest.approx(norms)
    assert (found.dropped, found.raised) == (3, 0)
    assert len(found.schedule) == 50


def test_zero_norms_are_raised():
    norms = np.ones(100)
    norms[[3, 50]] = 0.0
    found = refinement(norms, "sgd", 0.0)
    assert found.raised == 2
    assert found.smoothed[3] == 1e-3
    assert np.isfinite(found.schedule.values(100)).all()
    assert np.abs(table(norms, "sgd", 0.1) - table(np.ones(100), "sgd")).max() <= 1e-12
    assert table(np.zeros(10), "sgd").tolist() == pytest.approx([(9 - t) / 9 for t in range(10)])


def test_guard_against_collapse(recwarn):
    collapsing = np.exp(-np.linspace(0, 8, 400))
    for kind in ("sgd", "adam"):
        with pytest.warns(
            UserWarning, match=r"range over a factor of 1\.09e\+03 and the rate peaks after 9\d%"
        ) as caught:
            late = fw.tuning.refine_schedule(collapsing, kind, floor=1e-9)
        assert caught[0].filename == __file__
        assert late.values(400).argmax() > 350
        with pytest.raises(
            ValueError, match="refine_schedule: norms must not collapse during the run, got 'the norms"
        ):
            fw.tuning.refine_schedule(collapsing, kind, on_trouble="raise")
        instead = fw.tuning.refine_schedule(collapsing, kind, on_trouble="fallback")
        ramp = schedules.warmup(20).then(schedules.linear(1.0, 0.0, 380))
        assert instead.values(400).tolist() == ramp.values(400).tolist()
    # a floor also helps if only the end collapses
    ending = np.minimum(1.0, np.exp(6.0 - np.linspace(0, 8, 400)))
    assert refinement(ending, floor=1e-9).trouble
    assert refinement(ending, floor=1.0).trouble == ()
    assert refinement(golden("T2000")["G"]).trouble == ()
    # a spike at the start gives a warmup, not a collapse
    assert refinement(np.append(np.full(30, 100.0), np.ones(970))).trouble == ()
    assert not recwarn.list


def test_trains_as_its_table(tmp_path):
    """A saved and loaded schedule drives an optimizer; a longer run holds its last value."""
    s = fw.tuning.refine_schedule(golden("T12")["G"], "sgd")
    (tmp_path / "s.json").write_text(s.to_json())
    loaded = schedules.from_json((tmp_path / "s.json").read_text())
    assert loaded == s
    params = make_params(torch.float32, [(5,)])
    opt = fw.SGD(params, lr=0.5, schedule=loaded)
    for i in range(15):
        set_grads(params, i)
        opt.step()
    rates = opt.telemetry.history()["lr"]
    assert rates.tolist() == [*(0.5 * s.values(12)), 0.0, 0.0, 0.0]
    text = s.to_json()
    with pytest.raises(ValueError, match=r"at line \d+, column"):
        schedules.from_json(text[: len(text) // 2])


def test_fit_of_a_polynomial():
    for ramp, power in ((0, 1.0), (30, 1.5), (100, 0.8), (0, 4.0)):
        decay = schedules.polynomial(1.0, 0.0, 1000 - ramp, power)
        s = schedules.warmup(ramp).then(decay) if ramp else decay
        fit = fit_polynomial(s)
        assert (fit.warmup, fit.power) == (ramp / 1000, pytest.approx(power))
        assert fit.rmse < 1e-12
        assert fit.schedule.values(1000) == pytest.approx(s.values(1000))
    fit = refinement(golden("T2000")["G"], "sgd").fit()
    assert 0.05 < fit.warmup < 0.15
    assert fit.rmse < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lamb"}, "refine_schedule: kind must be one of 'sgd', 'adam', got 'lamb'."),
        ({"smoothing": -0.1}, "refine_schedule: smoothing must lie in [0, 1], got -0.1."),
        ({"smoothing": math.nan}, "refine_schedule: smoothing must lie in [0, 1], got nan."),
        ({"steps": 1}, "refine_schedule: steps must be >= 2, got 1."),
        ({"power": -1}, "refine_schedule: power must be finite and >= 0, got -1."),
        ({"width": 4}, "refine_schedule: width must be odd, got 4."),
        ({"floor": 0.0}, "refine_schedule: floor must lie in (0, 1], got 0.0."),
        ({"interpolation": "cubic"}, "refine_schedule: interpolation must be one of"),
        ({"on_trouble": "panic"}, "refine_schedule: on_trouble must be one of"),
        ({"norms": []}, "norms must hold one number per step, of two steps at least, got (0,)."),
        ({"norms": [1.0]}, "norms must hold one number per step, of two steps at least, got (1,)."),
        (
            {"norms": [[1.0, 2.0]] * 2},
            "norms must hold one number per step, of two steps at least, got (2, 2).",
        ),
        ({"norms": [1.0, -2.0]}, "refine_schedule: norms[1] must be >= 0, got -2.0."),
        ({"norms": [math.nan] * 3}, "refine_schedule: norms must have an entry that is finite, got 'none'."),
        (
            {"norms": {"loss": [1.0]}},
            "refine_schedule: norms must have the column 'grad_norm_l1', got ['loss'].",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fw.tuning.refine_schedule(**{"norms": [1.0, 2.0, 3.0], **options})


def test_bad_kinds_of_arguments():
    with pytest.raises(TypeError, match="norms must be numbers, a telemetry or a path"):
        fw.tuning.refine_schedule(object())
    with pytest.raises(
        ValueError, match=r"refine_groups: norms must have the shape \[steps, groups\], got \(3,\)"
    ):
        fw.tuning.refine_groups([1.0, 2.0, 3.0])


BROKEN = {
    "": "must have a header line, got 'an empty file'",
    "step,grad_norm\n0,1.0\n1,2": "line 3 of {path} must end with a line break, got ['1', '2']. The file was cut short.",
    "step,grad_norm\n0,1.0\n1\n": "line 3 of {path} must have 2 fields, got 1. The file was cut short.",
    "step,grad_norm\n0,1.0\n1,x\n": "line 3 of {path} must have a number in the column 'grad_norm', got 'x'.",
    "loss,other\n1,2\n2,3\n": "{path} must have the column 'grad_norm', got ['loss', 'other']. Name the one to take.",
    "step,grad_norm\n0,1.0\n": "norms must hold one number per step, of two steps at least, got (1,).",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_files(tmp_path, text):
    path = tmp_path / "norms.csv"
    path.write_text(text)
    message = BROKEN[text].format(path=path)
    with pytest.raises(ValueError, match=re.escape(message)):
        fw.tuning.refine_schedule(path, "sgd")
    result = CliRunner().invoke(
        group.cli, ["refine", str(path), "-o", str(tmp_path / "s.json"), "--kind", "sgd"]
    )
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert not (tmp_path / "s.json").exists()


# the command


def invoke(*args):
    return CliRunner().invoke(group.cli, ["refine", *map(str, args)], prog_name="fused-warmup")


def test_command(tmp_path):
    opt, _ = record("sgd")
    csv_file, out, plot = tmp_path / "norms.csv", tmp_path / "s.json", tmp_path / "s.png"
    opt.telemetry.to_csv(csv_file)
    result = invoke(csv_file, "-o", out, "--plot", plot, "--kind", "sgd", "--steps", 40, "--smoothing", 0.3)
    assert result.exit_code == 0, result.output
    expected = fw.tuning.refine_schedule(csv_file, "sgd", 0.3, 40)
    assert schedules.from_json(out.read_text()) == expected
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"written: {out}, {plot}" in result.output
    assert "closest polynomial" in result.output
    missing = invoke(tmp_path / "none.csv", "-o", out)
    assert missing.exit_code == 2
    assert "none.csv" in missing.stderr
    bad = invoke(csv_file, "-o", out, "--smoothing", "2")
    assert bad.stderr == "refine_schedule: smoothing must lie in [0, 1], got 2.0.\n"


def test_command_offers_the_fallback(tmp_path):
    path, out = tmp_path / "norms.csv", tmp_path / "s.json"
    norms = np.exp(-np.linspace(0, 8, 200))
    path.write_text("\n".join(["norm", *map(repr, norms.tolist())]) + "\n")
    warned = invoke(path, "-o", out)
    assert warned.exit_code == 0
    assert "refine: the norms after the first tenth" in warned.stderr
    assert "--fallback" in warned.stderr
    assert schedules.from_json(out.read_text()).values(200).argmax() > 100
    kept = invoke(path, "-o", out, "--fallback", "--plot", tmp_path / "s.png")
    assert "the fallback was written" in kept.stderr
    assert schedules.from_json(out.read_text()) == refinement(path).fallback


# science: softmax regression on digits, 800 steps of 32, three seeds, peak rates in half decades

STEPS = 800
RATES = {"adam": (0.01, 0.0316, 0.1), "sgd": (0.01, 0.0316, 0.1)}
CLEAN = {"adam": (0.0316, 0.1, 0.316), "sgd": (0.1, 0.316, 1.0)}


@functools.cache
def digits(noise):
    """Return standardised images with a column of ones, and labels of which a fraction is random."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    raw = datasets.load_digits()
    x = (raw.data - raw.data.mean(0)) / (raw.data.std(0) + 1e-8)
    rng = np.random.default_rng(5)
    y, wrong = raw.target.copy(), rng.random(len(raw.target)) < noise
    y[wrong] = rng.integers(0, 10, wrong.sum())
    ones = np.concatenate([x, np.ones((len(x), 1))], 1)
    return torch.tensor(ones, dtype=torch.float32), torch.tensor(y)


def final_loss(noise, kind, lr, schedule, seed):
    """Return the loss on all data at the last iterate, and the optimizer."""
    x, y = digits(noise)
    weight = torch.zeros(65, 10, requires_grad=True)
    options = {"betas": (0.9, 0.95)} if kind == "adam" else {"momentum": 0.9}
    opt = {"adam": fw.Adam, "sgd": fw.SGD}[kind]([weight], lr=lr, schedule=schedule, **options)
    target = torch.nn.functional.one_hot(y, 10).float()
    with torch.no_grad():
        for rows in torch.randint(len(y), (STEPS, 32), generator=torch.Generator().manual_seed(seed)):
            error = torch.softmax(x[rows] @ weight, 1) - target[rows]
            weight.grad = x[rows].T @ error / 32
            opt.step()
        return torch.nn.functional.cross_entropy(x @ weight, y).item(), opt


def best(noise, kind, rates, schedule):
    """Return the lowest mean loss over the seeds among the rates, and its rate."""
    means = [np.mean([final_loss(noise, kind, lr, schedule, seed)[0] for seed in range(3)]) for lr in rates]
    return float(min(means)), rates[int(np.argmin(means))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_digits_with_wrong_labels(kind):
    """30 % random labels: refined, cosine and linear within 0.3 %, at least 0.5 % better than constant."""
    torch.set_num_threads(1)
    linear = schedules.linear(1.0, 0.0, STEPS)
    found = {
        "constant": best(0.3, kind, RATES[kind], schedules.constant()),
        "cosine": best(0.3, kind, RATES[kind], schedules.cosine(1.0, 0.0, STEPS)),
        "linear": best(0.3, kind, RATES[kind], linear),
    }
    _, opt = final_loss(0.3, kind, found["linear"][1], linear, 0)
    refined = refinement(opt.telemetry, kind)
    found["refined"] = best(0.3, kind, RATES[kind], refined.schedule)
    print(kind, found, f"first {refined.schedule(0):.2f}, peak {refined.peak:.1%}")
    decaying = [found[name][0] for name in ("cosine", "linear", "refined")]
    assert max(decaying) / min(decaying) < 1.003
    assert found["constant"][0] / max(decaying) > 1.005
    assert refined.trouble == ()
    # it has a warmup
    assert refined.schedule(0) < 0.8
    assert 0.03 < refined.peak < 0.16
    assert found["refined"][1] <= found["linear"][1]


def test_refined_rates_of_digits_are_nearly_the_best():
    """The bound of the refined schedule is within 0.5 % of the lowest, and that of linear decay is not."""
    torch.set_num_threads(1)
    linear = schedules.linear(1.0, 0.0, STEPS)
    _, opt = final_loss(0.3, "sgd", 0.0316, linear, 0)
    found = refinement(opt.telemetry, "sgd", zero_last=False)
    norms, rates = found.smoothed, best_rates(found.smoothed)
    bounds = [
        last_iterate_bound(best_scale(s, norms) * s, norms)
        for s in (linear.values(STEPS), found.schedule.values(STEPS))
    ]
    lowest = last_iterate_bound(rates, norms)
    print(f"linear {bounds[0]:.5f}, refined {bounds[1]:.5f}, lowest {lowest:.5f}")
    assert lowest < bounds[1] < 1.005 * lowest < bounds[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_digits_with_clean_labels(kind):
    """The loss goes to zero: refined is more than twice as bad as linear and is flagged; the fallback is good."""
    torch.set_num_threads(1)
    linear = schedules.linear(1.0, 0.0, STEPS)
    baseline, lr = best(0.0, kind, CLEAN[kind], linear)
    _, opt = final_loss(0.0, kind, lr, linear, 0)
    refined = refinement(opt.telemetry, kind)
    late, _ = best(0.0, kind, CLEAN[kind], refined.schedule)
    fallback, _ = best(0.0, kind, CLEAN[kind], refined.fallback)
    print(kind, f"linear {baseline:.5f}, refined {late:.5f}, fallback {fallback:.5f}", refined.trouble)
    assert len(refined.trouble) == 2
    assert late > 2 * baseline
    assert fallback < 1.5 * baseline

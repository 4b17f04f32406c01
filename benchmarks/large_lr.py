"""Train the tick task at large rates, then average and fine-tune: ``python -m benchmarks.large_lr [regimes] [forty] [fresh]``."""

import sys
from pathlib import Path

import torch

from benchmarks.common import RESULTS, table
from benchmarks.tick import Batch, normalised
from fused_warmup.cli.machine import describe
from fused_warmup.tuning import Trial, find_regimes

DESCRIPTION = (
    "Each seed has its own data and initial weights; 40,000 steps at a constant rate; averages are of the last checkpoints, "
    "100 steps apart. Rates are those of weights at norm 1. `regimes`: ten seeds, averages of five, fine-tuning for "
    "10,000 steps at 3.16e-5 and 7.5e-3; a rate converges if all ten seeds do. `forty`, seeds 100-139, and `fresh`, seeds "
    "200-239: fine-tuning for 20,000 steps at 3.16e-5, averages of 5, 10 and 20. A seed converges at a rate if the mean "
    "loss of an epoch falls below 0.01; its threshold is the highest rate at which it converges. For each seed, 2000 "
    "held-out samples select among the rates at which it converges: the best end of training, or the best of end, "
    "fine-tuned and averaged weights. They also select the best fine-tuned or averaged weights from rates above its "
    "threshold by at most a factor of two. The tables show accuracies on 2000 other samples, means and standard errors. "
    "Averages of 10 and 20 were added after the results of `forty` without them were known, but before those of `fresh`, "
    "whose seeds had not been used until then."
)
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "regimes.png"

STEPS, FINE_STEPS, LONG_FINE_STEPS = 40_000, 10_000, 20_000
# fine-tuning rates
LOW, HIGH = 3.16e-5, 7.5e-3

SEEDS = range(10)
RATES = (3.16e-4, 1e-3, 3.16e-3, 5.62e-3, 7.5e-3, 1e-2, 1.15e-2, 1.33e-2, 1.78e-2, 3.16e-2, 1e-1, 1.0)

SEED_GROUPS = {"forty": range(100, 140), "fresh": range(200, 240)}
# rates around the threshold, one far below it, and the numbers of averaged checkpoints
AROUND = (3.16e-3, 4.22e-3, 5.62e-3, 6.49e-3, 7.5e-3, 8.66e-3, 1e-2, 1.15e-2, 1.33e-2, 1.54e-2)
REGIME_1, AVERAGED = 3.16e-3, (5, 10, 20)


def last_steps(count):
    """Return the steps of the last checkpoints."""
    return [STEPS - 100 * i for i in range(count)]


def average(checkpoints):
    """Return the mean of checkpoints at norm 1."""
    return normalised(torch.stack(checkpoints).mean(0).detach())


def mean_and_error(values):
    """Format mean and standard error."""
    return f"{float(values.mean()):.4f} ± {float(values.std()) / len(values) ** 0.5:.4f}"


def median_barrier(batch, first, second):
    """Return the barrier of the training error between two sets of weights, the median over the seeds, of ``[rates]``."""
    alphas = torch.linspace(0, 1, 11)
    errors = torch.stack([
        1 - batch.accuracy(normalised((1 - a) * first + a * second), batch.x, batch.y) for a in alphas
    ])
    alphas = alphas[:, None, None]
    excess = errors - (1 - alphas) * errors[0] - alphas * errors[-1]
    return excess.max(0).values.median(0).values


def train(rates):
    """Train the ten seeds at all rates as one batch; return by rate the trial and the measurements of the table."""
    batch = Batch(SEEDS, rates)
    weights, losses, checkpoints = batch.train(batch.weights, batch.rates, STEPS, seed=0, kept=last_steps(5))
    low, high = (
        batch.train(weights, torch.full_like(batch.rates, rate), FINE_STEPS, seed=1)[0]
        for rate in (LOW, HIGH)
    )
    ends = {"pretrained": weights, "averaged": average(checkpoints), "low": low, "high": high}
    scores = {name: batch.accuracy(w).double() for name, w in ends.items()}
    barriers = median_barrier(batch, low, high)
    worst = losses.view(len(losses), *batch.shape).max(1).values
    converged = (losses < 1e-2).any(0).view(batch.shape)
    results = {}
    for j, lr in enumerate(rates):
        shown = {name: score[:, j] for name, score in scores.items()}
        shown["converged"] = int(converged[:, j].sum())
        shown["barrier"] = float(barriers[j])
        tuned = max(float(shown[name].mean()) for name in ("averaged", "low"))
        accuracy = float(shown["pretrained"].mean())
        results[lr] = Trial(tuple(worst[:, j].tolist()), (accuracy,), tuned, shown["barrier"]), shown
        print(f"{lr:.3g}: {shown['converged']} converge, tuned {tuned:.4f}", flush=True)
    return results


def regimes():
    """Return the page text of the regimes of ten seeds, and draw them."""
    known = train(RATES)

    def train_once(lr):
        if lr not in known:
            known.update(train([lr]))
        return known[lr][0]

    found = find_regimes(train_once, RATES, chance=0.5)
    headings = ["rate", "regime", "seeds that converge", "loss, worst seed", "accuracy, pre-trained", "averaged",
                "fine-tuned at 3.16e-5", "at 7.5e-3", "at 3.16e-5, seeds 0-4", "seeds 5-9", "barrier"]  # fmt: skip
    rows = []
    for point in found.points:
        shown = known[point.lr][1]
        means = [f"{float(shown[name].mean()):.4f}" for name in ("pretrained", "averaged", "low", "high")]
        halves = [f"{float(half.mean()):.4f}" for half in shown["low"].split(5)]
        rows.append([f"{point.lr:.3g}", point.regime, f"{shown['converged']} of 10", f"{point.loss:.2g}", *means,
                     *halves, f"{shown['barrier']:.3f}"])  # fmt: skip
    low, high = found.threshold
    axes = found.plot()
    axes.set_title("tick task, ten seeds, 40,000 steps", fontsize=10)
    axes.figure.savefig(PICTURE, dpi=100, pil_kwargs={"optimize": True})
    return "\n".join([
        *table(headings, rows),
        "",
        f"Threshold between {low:.4g} and {high:.4g}, divergence from {found.divergence}, window {found.window}, "
        f"best {found.best}.",
    ])


def chosen(valid, test, allowed):
    """Return the test accuracy, of ``[seeds]``, of the candidate with the best held-out accuracy.

    Accuracies are ``[ends, seeds, rates]``, ``allowed`` ``[seeds, rates]``.
    """
    flat = valid.where(allowed, -1.0).transpose(0, 1).flatten(1)
    return test.transpose(0, 1).flatten(1).gather(1, flat.argmax(1, keepdim=True))[:, 0]


def sides(rates, converged):
    """Return masks of the rates at which each seed converged, and of those above by at most a factor of two."""
    rates = torch.tensor(rates, dtype=torch.float64)
    threshold = rates.where(converged, 0.0).max(1, keepdim=True).values
    return converged, (rates > threshold) & (rates <= 2 * threshold)


def by_rate(seeds, converged, test):
    """Return the table of test accuracies by rate."""
    headings = ["rate", "seeds that converge", "end of training", "fine-tuned at 3.16e-5",
                *(f"average of {n}" for n in AVERAGED)]  # fmt: skip
    rows = []
    for j, lr in enumerate(AROUND):
        scores = [mean_and_error(score[:, j]) for score in test]
        rows.append([f"{lr:.3g}", f"{int(converged[:, j].sum())} of {len(seeds)}", *scores])
    return table(headings, rows)


def by_group(seeds, columns):
    """Return the table of means over groups of five seeds."""
    headings = ["seeds", "converged, end of training", "converged, best", "above the threshold", "gain"]
    rows = []
    for index in torch.arange(len(seeds)).split(5):
        means = [f"{float(column[index].mean()):.4f}" for column in columns]
        rows.append([f"{seeds[index[0]]}-{seeds[index[-1]]}", *means])
    rows.append(["all", *map(mean_and_error, columns)])
    return table(headings, rows)


def gain_line(label, gain):
    """Return the sentence about a gain of ``[seeds]``."""
    means = gain.view(-1, 5).mean(1)
    return (
        f"{label}: gain {mean_and_error(gain)}, better in {int((means > 0).sum())} of {len(means)} groups, "
        f"{int((gain > 0).sum())} of {len(gain)} seeds."
    )


def groups(seeds):
    """Return the page text of forty seeds: accuracies by rate and by groups of five seeds, gains, and sparse features."""
    batch = Batch(seeds, AROUND)
    kept = last_steps(max(AVERAGED))
    weights, losses, checkpoints = batch.train(batch.weights, batch.rates, STEPS, seed=0, kept=kept)
    low = batch.train(weights, torch.full_like(batch.rates, LOW), LONG_FINE_STEPS, seed=1)[0]
    ends = (weights, low, *(average(checkpoints[-n:]) for n in AVERAGED))
    converged = (losses < 1e-2).any(0).view(batch.shape)
    test = torch.stack([batch.accuracy(w).double() for w in ends])
    valid = torch.stack([batch.accuracy(w, batch.x_held_out, batch.y_held_out).double() for w in ends])

    below, above = sides(AROUND, converged)
    plain = chosen(valid[:1], test[:1], below)
    best = chosen(valid, test, below)
    large = chosen(valid[1:], test[1:], above)
    five = chosen(valid[1:3], test[1:3], above) - chosen(valid[:3], test[:3], below)

    # the paper's candidates: fine-tuned weights and the average of five
    base = AROUND.index(REGIME_1)
    most = test[1:3].where(above, 0.0).amax((0, 2))
    single = torch.stack([batch.single_accuracies(w).max(0).values for w in ends[:3]])
    sparse = single.where(above, 0.0).amax((0, 2)) >= 0.7
    return "\n".join([
        *by_rate(seeds, converged, test),
        "",
        *by_group(seeds, (plain, best, large, large - best)),
        "",
        gain_line("Above the threshold", large - best),
        "",
        gain_line("With averages of five only", five),
        "",
        f"Fine-tuned or the average of five, best of the window by test accuracy, less the end at {REGIME_1:.3g}: "
        f"{mean_and_error(most - test[0, :, base])}. A single feature at 0.70 or more somewhere in the window: "
        f"{int(sparse.sum())} of {len(seeds)} seeds; the highest at {REGIME_1:.3g}: "
        f"{float(single[0, :, base].max()):.3f}.",
    ])


def main(part):
    """Run one part and write ``results/large-lr-<part>.md``."""
    torch.set_num_threads(1)
    text = regimes() if part == "regimes" else groups(SEED_GROUPS[part])
    print(text)
    page = f"# Large learning rates on the tick task\n\n{DESCRIPTION}\n\n{describe()['cpu']}, 1 thread.\n\n{text}\n"
    (RESULTS / f"large-lr-{part}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("regimes", "forty", "fresh"):
        main(name)

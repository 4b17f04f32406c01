"""Regimes of the tick task, averaging and fine-tuning: ``python -m benchmarks.large_lr [regimes] [forty] [fresh]``.

Each seed has its own data and start; 40,000 steps at a constant rate, averages of the last checkpoints, 100 steps apart.
Rates are those of weights at norm 1. ``regimes``: ten seeds, averages of five, fine-tuning of 10,000 steps at 3.16e-5 and
7.5e-3; a rate converges if all ten seeds do. ``forty``, seeds 100-139, and ``fresh``, seeds 200-239: fine-tuning of
20,000 steps at 3.16e-5, averages of 5, 10 and 20. A seed converges at a rate if the mean loss of an epoch falls below
0.01; its threshold is the highest rate at which it does. For each seed 2000 held-out samples choose, among the rates at
which it converges, the best end of training, or the best of that, fine-tuned and averaged weights; and the best fine-tuned
or averaged weights from rates above its threshold by at most a factor of two. Shown are accuracies on 2000 other samples,
means and standard errors. Averages of 10 and 20 were added when the results of ``forty`` without them were known, before
those of ``fresh``, whose seeds had not been seen.
"""

import sys
from pathlib import Path

import torch

from benchmarks.tick import Batch, normalised
from fused_warmup.cli.machine import describe
from fused_warmup.tuning import Trial, find_regimes

HERE = Path(__file__).resolve().parent
REGIME_1, LONG_FINE_STEPS, AVERAGED = 3.16e-3, 20_000, (5, 10, 20)
AROUND = (3.16e-3, 4.22e-3, 5.62e-3, 6.49e-3, 7.5e-3, 8.66e-3, 1e-2, 1.15e-2, 1.33e-2, 1.54e-2)
SEEDS, STEPS, FINE_STEPS, LOW, HIGH = range(10), 40_000, 10_000, 3.16e-5, 7.5e-3
RATES = (3.16e-4, 1e-3, 3.16e-3, 5.62e-3, 7.5e-3, 1e-2, 1.15e-2, 1.33e-2, 1.78e-2, 3.16e-2, 1e-1, 1.0)


def train(rates):
    """Train all seeds at all of the rates as one batch; return by rate the trial and what the table shows."""
    batch = Batch(SEEDS, rates)
    last = [STEPS - 100 * i for i in range(5)]
    weights, losses, checkpoints = batch.train(batch.weights, batch.rates, STEPS, seed=0, kept=last)
    low, high = (
        batch.train(weights, torch.full_like(batch.rates, rate), FINE_STEPS, seed=1)[0]
        for rate in (LOW, HIGH)
    )
    mean = normalised(torch.stack(checkpoints).mean(0).detach())
    ends = {"pretrained": weights, "averaged": mean, "low": low, "high": high}
    scores = {name: batch.accuracy(w).double() for name, w in ends.items()}
    alphas = torch.linspace(0, 1, 11)[:, None, None]
    errors = torch.stack([
        1 - batch.accuracy(normalised((1 - a) * low + a * high), batch.x, batch.y) for a in alphas[..., None]
    ])
    excess = errors - (1 - alphas) * errors[0] - alphas * errors[-1]
    barriers = excess.max(0).values.median(0).values
    worst = losses.view(len(losses), *batch.shape).max(1).values
    converged = (losses < 1e-2).any(0).view(batch.shape)
    found = {}
    for j, lr in enumerate(rates):
        shown = {name: score[:, j] for name, score in scores.items()}
        shown |= {"converged": int(converged[:, j].sum()), "barrier": float(barriers[j])}
        tuned = max(float(shown[name].mean()) for name in ("averaged", "low"))
        accuracy = float(shown["pretrained"].mean())
        found[lr] = Trial(tuple(worst[:, j].tolist()), (accuracy,), tuned, shown["barrier"]), shown
        print(f"{lr:.3g}: {shown['converged']} converge, tuned {tuned:.4f}", flush=True)
    return found


def chosen(valid, test, allowed):
    """Test accuracy of the candidate that is best on the held-out data, of ``[seeds]``.

    Accuracies are ``[ends, seeds, rates]``, ``allowed`` ``[seeds, rates]``.
    """
    flat = valid.where(allowed, -1.0).transpose(0, 1).flatten(1)
    return test.transpose(0, 1).flatten(1).gather(1, flat.argmax(1, keepdim=True))[:, 0]


def sides(rates, converged):
    """For each seed, the rates at which it converged, and those above the highest of them by at most a factor of two."""
    rates = torch.tensor(rates, dtype=torch.float64)
    threshold = rates.where(converged, 0.0).max(1, keepdim=True).values
    return converged, (rates > threshold) & (rates <= 2 * threshold)


def written(values):
    return f"{float(values.mean()):.4f} ± {float(values.std()) / len(values) ** 0.5:.4f}"


def groups(seeds):
    """Return tables of some seeds: by rate, by groups of five with rates chosen on held-out data, and what else the
    paper claims."""
    batch = Batch(seeds, AROUND)
    last = [STEPS - 100 * i for i in range(max(AVERAGED))]
    weights, losses, checkpoints = batch.train(batch.weights, batch.rates, STEPS, seed=0, kept=last)
    low = batch.train(weights, torch.full_like(batch.rates, LOW), LONG_FINE_STEPS, seed=1)[0]
    means = [normalised(torch.stack(checkpoints[-n:]).mean(0).detach()) for n in AVERAGED]
    ends = (weights, low, *means)
    converged = (losses < 1e-2).any(0).view(batch.shape)
    test = torch.stack([batch.accuracy(w).double() for w in ends])
    valid = torch.stack([batch.accuracy(w, batch.x_held_out, batch.y_held_out).double() for w in ends])
    head = ("rate", "seeds that converge", "end of training", "fine-tuned at 3.16e-5",
            *(f"average of {n}" for n in AVERAGED))  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for j, lr in enumerate(AROUND):
        cells = [f"{lr:.3g}", f"{int(converged[:, j].sum())} of {len(seeds)}"]
        lines.append("| " + " | ".join([*cells, *(written(score[:, j]) for score in test)]) + " |")

    below, above = sides(AROUND, converged)
    plain = chosen(valid[:1], test[:1], below)
    best = chosen(valid, test, below)
    large = chosen(valid[1:], test[1:], above)
    columns = (plain, best, large, large - best)
    head = ("seeds", "converged, end of training", "converged, best", "above the threshold", "gain")
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for rows in torch.arange(len(seeds)).split(5):
        cells = [f"{seeds[rows[0]]}-{seeds[rows[-1]]}", *(f"{float(x[rows].mean()):.4f}" for x in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("| " + " | ".join(["all", *map(written, columns)]) + " |")
    five = chosen(valid[1:3], test[1:3], above) - chosen(valid[:3], test[:3], below)
    for what, gain in (("Above the threshold", large - best), ("With averages of five only", five)):
        means = gain.view(-1, 5).mean(1)
        lines += ["", f"{what}: gain {written(gain)}, better in {int((means > 0).sum())} of {len(means)} groups, "
                  f"{int((gain > 0).sum())} of {len(seeds)} seeds."]  # fmt: skip

    # as the paper has them: fine-tuned, and the average of five
    base = AROUND.index(REGIME_1)
    most = test[1:3].where(above, 0.0).amax((0, 2))
    single = torch.stack([batch.single_accuracies(w).max(0).values for w in ends[:3]])
    sparse = single.where(above, 0.0).amax((0, 2)) >= 0.7
    lines += ["", f"Fine-tuned or the average of five, best of the window by test accuracy, less the end at {REGIME_1:.3g}: "
              f"{written(most - test[0, :, base])}. A single feature at 0.70 or more somewhere in the window: "
              f"{int(sparse.sum())} of {len(seeds)} seeds; the highest at {REGIME_1:.3g}: "
              f"{float(single[0, :, base].max()):.3f}."]  # fmt: skip
    return "\n".join(lines)


def regimes():
    """Return a table of the regimes, and draw them."""
    known = train(RATES)

    def train_once(lr):
        if lr not in known:
            known.update(train([lr]))
        return known[lr][0]

    found = find_regimes(train_once, RATES, chance=0.5)
    head = ("rate", "regime", "seeds that converge", "loss, worst seed", "accuracy, pre-trained", "averaged",
            "fine-tuned at 3.16e-5", "at 7.5e-3", "at 3.16e-5, seeds 0-4", "seeds 5-9", "barrier")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for point in found.points:
        k = known[point.lr][1]
        means = [f"{float(k[name].mean()):.4f}" for name in ("pretrained", "averaged", "low", "high")]
        halves = [f"{float(half.mean()):.4f}" for half in k["low"].split(5)]
        cells = (f"{point.lr:.3g}", point.regime, f"{k['converged']} of 10", f"{point.loss:.2g}", *means,
                 *halves, f"{k['barrier']:.3f}")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    low, high = found.threshold
    lines += ["", f"Threshold between {low:.4g} and {high:.4g}, divergence from {found.divergence}, window {found.window}, "
              f"best {found.best}."]  # fmt: skip
    axes = found.plot()
    axes.set_title("tick task, ten seeds, 40,000 steps", fontsize=10)
    axes.figure.savefig(
        HERE.parent / "docs" / "images" / "regimes.png", dpi=100, pil_kwargs={"optimize": True}
    )
    return "\n".join(lines)


def main(part):
    """Write ``results/large-lr-<part>.md``."""
    torch.set_num_threads(1)
    text = (
        regimes() if part == "regimes" else groups({"forty": range(100, 140), "fresh": range(200, 240)}[part])
    )
    print(text)
    about = " ".join(__doc__.split("\n")[2:]).strip()
    page = f"# Large learning rates on the tick task\n\n{about}\n\n{describe()['cpu']}, 1 thread.\n\n{text}\n"
    (HERE / "results" / f"large-lr-{part}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("regimes", "forty", "fresh"):
        main(name)

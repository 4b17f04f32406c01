"""Regimes of the tick task, and averaging and fine-tuning from each rate: ``python -m benchmarks.large_lr``.

Ten seeds, each with its own data and start; 40,000 steps at a constant rate, fine-tuning of 10,000 steps at 3.16e-5
and 7.5e-3, averages of the last five checkpoints, 100 steps apart. A rate converges if all ten seeds do. Rates are
those of weights at norm 1. Takes some ten minutes.
"""

import sys
from pathlib import Path

import torch

from benchmarks.tick import Batch, normalised
from fused_warmup.cli.machine import describe
from fused_warmup.tuning import Trial, find_regimes

HERE = Path(__file__).resolve().parent
SEEDS, STEPS, FINE_STEPS, LOW, HIGH = range(10), 40_000, 10_000, 3.16e-5, 7.5e-3
RATES = (3.16e-4, 1e-3, 3.16e-3, 5.62e-3, 7.5e-3, 1e-2, 1.15e-2, 1.33e-2, 1.78e-2, 3.16e-2, 1e-1, 1.0)


def train(lr, kept):
    """Train all seeds at a rate; what the table shows goes to ``kept``."""
    batch = Batch(SEEDS, [lr])
    last = [STEPS - 100 * i for i in range(5)]
    weights, losses, checkpoints = batch.train(batch.weights, batch.rates, STEPS, seed=0, kept=last)
    low, high = (
        batch.train(weights, torch.full_like(batch.rates, rate), FINE_STEPS, seed=1)[0]
        for rate in (LOW, HIGH)
    )
    mean = normalised(torch.stack(checkpoints).mean(0).detach())
    scores = {
        "pretrained": batch.accuracy(weights),
        "averaged": batch.accuracy(mean),
        "low": batch.accuracy(low),
        "high": batch.accuracy(high),
    }
    kept[lr] = {name: score[:, 0].double() for name, score in scores.items()}
    kept[lr]["converged"] = (losses < 1e-2).any(0)
    alphas = torch.linspace(0, 1, 11)
    errors = torch.stack([
        1 - batch.accuracy(normalised((1 - a) * low + a * high), batch.x, batch.y)[:, 0] for a in alphas
    ])
    excess = errors - (1 - alphas)[:, None] * errors[0] - alphas[:, None] * errors[-1]
    kept[lr]["barrier"] = excess.max(0).values.median()
    tuned = max(float(kept[lr][name].mean()) for name in ("averaged", "low"))
    trial = Trial(
        tuple(losses.max(1).values.tolist()),
        (float(scores["pretrained"].mean()),),
        tuned,
        float(kept[lr]["barrier"]),
    )
    print(f"{lr:.3g}: {int(kept[lr]['converged'].sum())} converge, tuned {tuned:.4f}", flush=True)
    return trial


def main():
    torch.set_num_threads(1)
    kept = {}
    found = find_regimes(lambda lr: train(lr, kept), RATES, chance=0.5)
    head = ("rate", "regime", "seeds that converge", "loss, worst seed", "accuracy, pre-trained", "averaged",
            "fine-tuned at 3.16e-5", "at 7.5e-3", "at 3.16e-5, seeds 0-4", "seeds 5-9", "barrier")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for point in found.points:
        k = kept[point.lr]
        means = [f"{float(k[name].mean()):.4f}" for name in ("pretrained", "averaged", "low", "high")]
        halves = [f"{float(half.mean()):.4f}" for half in k["low"].split(5)]
        cells = (f"{point.lr:.3g}", point.regime, f"{int(k['converged'].sum())} of 10", f"{point.loss:.2g}", *means,
                 *halves, f"{float(k['barrier']):.3f}")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    low, high = found.threshold
    lines += ["", f"Threshold between {low:.4g} and {high:.4g}, divergence from {found.divergence}, window {found.window}, "
              f"best {found.best}."]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    page = f"# Regimes of the tick task\n\n{' '.join(__doc__.split(chr(10))[2:])}\n{describe()['cpu']}, 1 thread.\n\n{text}\n"
    (HERE / "results" / "large-lr.md").write_text(page, encoding="utf-8")
    axes = found.plot()
    axes.set_title("tick task, ten seeds, 40,000 steps", fontsize=10)
    axes.figure.savefig(
        HERE.parent / "docs" / "images" / "regimes.png", dpi=100, pil_kwargs={"optimize": True}
    )


if __name__ == "__main__":
    sys.exit(main())

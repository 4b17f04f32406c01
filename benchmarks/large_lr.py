"""Regimes of the tick task, averaging and fine-tuning: ``python -m benchmarks.large_lr [regimes] [forty]``.

Ten seeds, each with its own data and start; 40,000 steps at a constant rate, fine-tuning of 10,000 steps at 3.16e-5
and 7.5e-3, averages of the last five checkpoints, 100 steps apart. A rate converges if all ten seeds do. Rates are
those of weights at norm 1. ``forty`` trains forty other seeds around the threshold. Each part
takes some ten minutes.
"""

import sys
from pathlib import Path

import torch

from benchmarks.tick import Batch, normalised
from fused_warmup.cli.machine import describe
from fused_warmup.tuning import Trial, find_regimes

HERE = Path(__file__).resolve().parent
MANY, AROUND = range(100, 140), (5.62e-3, 7.5e-3, 8.66e-3, 1e-2, 1.15e-2)
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


def forty():
    """Return a table of forty seeds around the threshold: means, standard errors, and means of groups of five."""
    batch = Batch(MANY, AROUND)
    last = [STEPS - 100 * i for i in range(5)]
    weights, losses, checkpoints = batch.train(batch.weights, batch.rates, STEPS, seed=0, kept=last)
    low = batch.train(weights, torch.full_like(batch.rates, LOW), FINE_STEPS, seed=1)[0]
    mean = normalised(torch.stack(checkpoints).mean(0).detach())
    converged = (losses < 1e-2).any(0).view(batch.shape).sum(0)
    scores = {
        name: batch.accuracy(w).double() for name, w in (("", weights), ("averaged", mean), ("low", low))
    }
    head = (
        "rate",
        "seeds that converge",
        "pre-trained",
        "averaged",
        "fine-tuned at 3.16e-5",
        "groups of five",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for j, lr in enumerate(AROUND):
        cells = [f"{lr:.3g}", f"{int(converged[j])} of {len(MANY)}"]
        for score in scores.values():
            column = score[:, j]
            cells.append(f"{float(column.mean()):.4f} ± {float(column.std()) / len(MANY) ** 0.5:.4f}")
        groups = scores["low"][:, j].view(-1, 5).mean(1)
        lines.append("| " + " | ".join([*cells, ", ".join(f"{float(x):.3f}" for x in groups)]) + " |")
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
    text = {"regimes": regimes, "forty": forty}[part]()
    print(text)
    about = " ".join(__doc__.split("\n")[2:]).strip()
    page = f"# Large learning rates on the tick task\n\n{about}\n\n{describe()['cpu']}, 1 thread.\n\n{text}\n"
    (HERE / "results" / f"large-lr-{part}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("regimes", "forty"):
        main(name)

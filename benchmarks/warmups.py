"""Compare AutoWU with fixed warmups of hand-chosen peak on scikit-learn's digits: ``python -m benchmarks.warmups``."""

import statistics
import sys

import torch
from torch import nn

import fused_warmup as fw
from benchmarks.common import RESULTS, table
from fused_warmup import schedules
from fused_warmup.cli.machine import describe

DESCRIPTION = (
    "Digits of scikit-learn, 75 % for training, MLP 64-64-10 with batch norms, AdamP with weight decay 1e-2, three "
    "seeds. A fixed warmup takes 5 % of the steps and is followed by a cosine to 0."
)
SEEDS = (0, 1, 2)
HEADINGS = ["batch, epochs", "rate", "accuracy of three seeds", "mean", "switch at step", "rate there → back"]


def digits():
    """Load inputs, float32 of ``[n, 64]``, and labels."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)


def train(batch, epochs, seed, make_rate):
    """Train once and return the held-out accuracy.

    ``make_rate(steps, steps_per_epoch)`` returns the first learning rate, and a function that takes the loss of a
    step and returns the next rate.
    """
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    count = 3 * len(y) // 4
    rows, held_out = order[:count], order[count:]
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    steps_per_epoch = count // batch
    first, next_rate = make_rate(steps_per_epoch * epochs, steps_per_epoch)
    opt = fw.AdamP(model.parameters(), lr=first, weight_decay=1e-2)
    for _ in range(epochs):
        shuffled = rows[torch.randperm(count, generator=generator)][: steps_per_epoch * batch]
        for index in shuffled.split(batch):
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            opt.zero_grad()
            loss.backward()
            opt.step()
            opt.param_groups[0]["lr"] = next_rate(loss)
    model.eval()
    return (model(x[held_out]).argmax(1) == y[held_out]).double().mean().item()


def fixed(peak):
    """Return the rates of a fixed warmup to ``peak`` and a cosine to 0, as ``make_rate`` of ``train``."""

    def make(steps, steps_per_epoch):
        warmup = steps // 20
        s = schedules.warmup(warmup).then(schedules.cosine(1.0, 0.0, steps - warmup))
        rates = iter([*(peak * s.values(steps)), 0.0])
        return next(rates), lambda loss: next(rates)

    return make


def automatic(made, **options):
    """Return the rates of an AutoWU, as ``make_rate`` of ``train``, and append the AutoWU to ``made``."""

    def make(steps, steps_per_epoch):
        wu = fw.AutoWU(steps, steps_per_epoch, **options)
        made.append(wu)
        return wu.lr, wu.step

    return make


def cells(batch, epochs, label, accuracies, switch="", back=""):
    """Return one table row."""
    listed = ", ".join(f"{x:.4f}" for x in accuracies)
    return [f"{batch}, {epochs}", label, listed, f"{statistics.fmean(accuracies):.4f}", switch, back]


def main():
    """Run all trainings and write the results page."""
    torch.set_num_threads(1)
    rows = []
    for batch, epochs in ((64, 40), (256, 60)):
        for label, options in (
            ("AutoWU", {}),
            ("AutoWU, constant-cosine", {"decay": "constant-cosine"}),
            ("AutoWU, parity", {"parity": True}),
        ):
            made = []
            accuracies = [train(batch, epochs, seed, automatic(made, **options)) for seed in SEEDS]
            total = made[0].schedule.segments[0].steps
            switch = ", ".join(str(wu.back_at) for wu in made) + f" of {total}"
            back = ", ".join(f"{wu.tests[-1].lr:.2g} → {wu.tests[-1].back:.2g}" for wu in made)
            rows.append(cells(batch, epochs, label, accuracies, switch, back))
        for peak in (1e-3, 1e-2, 1e-1, 1.0):
            accuracies = [train(batch, epochs, seed, fixed(peak)) for seed in SEEDS]
            rows.append(cells(batch, epochs, f"fixed, peak {peak:g}", accuracies))
    text = "\n".join(table(HEADINGS, rows))
    print(text)
    RESULTS.mkdir(exist_ok=True)
    page = f"# AutoWU on digits\n\n{DESCRIPTION}\n\n{describe()['cpu']}, 1 thread.\n\n{text}\n"
    (RESULTS / "warmups.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

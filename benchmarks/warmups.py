"""AutoWU against warmups with a peak that was chosen by hand: ``python -m benchmarks.warmups``.

Digits of scikit-learn, 75 % for training, MLP 64-64-10 with batch norms, AdamP with weight decay 1e-2, three seeds.
A fixed warmup takes 5 % of the steps and is followed by a cosine to 0.
"""

import statistics
import sys
from pathlib import Path

import torch
from torch import nn

import fused_warmup as fw
from fused_warmup import schedules
from fused_warmup.cli.machine import describe

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (0, 1, 2)


def digits():
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)


def train(batch, epochs, seed, make_rate):
    """Train once; ``make_rate(steps, per_epoch)`` gives what takes a loss and returns the next rate."""
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
    per_epoch = count // batch
    first, next_rate = make_rate(per_epoch * epochs, per_epoch)
    opt = fw.AdamP(model.parameters(), lr=first, weight_decay=1e-2)
    for _ in range(epochs):
        shuffled = rows[torch.randperm(count, generator=generator)][: per_epoch * batch]
        for some in shuffled.split(batch):
            loss = nn.functional.cross_entropy(model(x[some]), y[some])
            opt.zero_grad()
            loss.backward()
            opt.step()
            opt.param_groups[0]["lr"] = next_rate(loss)
    model.eval()
    return (model(x[held_out]).argmax(1) == y[held_out]).double().mean().item()


def fixed(peak):
    def make(steps, per_epoch):
        s = schedules.warmup(steps // 20).then(schedules.cosine(1.0, 0.0, steps - steps // 20))
        rates = iter([*(peak * s.values(steps)), 0.0])
        return next(rates), lambda loss: next(rates)

    return make


def automatic(kept, **options):
    def make(steps, per_epoch):
        wu = fw.AutoWU(steps, per_epoch, **options)
        kept.append(wu)
        return wu.lr, wu.step

    return make


def main():
    torch.set_num_threads(1)
    lines = [
        "| batch, epochs | rate | accuracy of three seeds | mean | switch at step | rate there → back |",
        "|---|---|---|---|---|---|",
    ]
    for batch, epochs in ((64, 40), (256, 60)):
        for label, options in (
            ("AutoWU", {}),
            ("AutoWU, constant-cosine", {"decay": "constant-cosine"}),
            ("AutoWU, parity", {"parity": True}),
        ):
            kept = []
            found = [train(batch, epochs, seed, automatic(kept, **options)) for seed in SEEDS]
            total = kept[0].schedule.segments[0].steps
            switch = ", ".join(str(wu.back_at) for wu in kept) + f" of {total}"
            back = ", ".join(f"{wu.tests[-1].lr:.2g} → {wu.tests[-1].back:.2g}" for wu in kept)
            lines.append(row(batch, epochs, label, found, switch, back))
        for peak in (1e-3, 1e-2, 1e-1, 1.0):
            found = [train(batch, epochs, seed, fixed(peak)) for seed in SEEDS]
            lines.append(row(batch, epochs, f"fixed, peak {peak:g}", found, "", ""))
    text = "\n".join(lines)
    print(text)
    head = f"# AutoWU on digits\n\n{__doc__.splitlines()[2]} {__doc__.splitlines()[3]}\n\n{describe()['cpu']}, 1 thread.\n\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "warmups.md").write_text(head + text + "\n", encoding="utf-8")


def row(batch, epochs, label, found, switch, back):
    cells = ", ".join(f"{x:.4f}" for x in found)
    return f"| {batch}, {epochs} | {label} | {cells} | {statistics.fmean(found):.4f} | {switch} | {back} |"


if __name__ == "__main__":
    sys.exit(main())

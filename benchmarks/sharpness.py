"""What measuring sharpness costs: writes ``benchmarks/results/<cpu>-<threads>t-sharpness.md``.

``python -m benchmarks.sharpness`` times the vector operations of one product against the same algebra in
``torch._foreach_*``, and readings of ``SharpnessProbe`` at its defaults against the training step of the character
GPT, in rounds that interleave. ``--quick`` makes few rounds and writes nothing.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

import fused_warmup as fw
from fused_warmup.backends import resolve
from fused_warmup.cli.bench.timing import Comparison, interleaved, timed
from fused_warmup.cli.machine import describe
from fused_warmup.cli.train.data import load
from fused_warmup.cli.train.models import build
from fused_warmup.sharpness.vectors import FusedVectors

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {"10x2M": [2_000_000] * 10, "300x6667": [6_667] * 300}
# products with this many basis vectors: those of the second of three products
KNOWN = 2
# what our kernels read and write for each parameter: two perturbations, finish, two combinations
BYTES = 16 + 16 + 32 + 16 + 20
BATCHES = (16, 128)
EVERY = 60
CYCLE = 20


class Ours:
    """One product's vector work by the kernels."""

    def __init__(self, sizes: list[int]) -> None:
        params = [nn.Parameter(torch.randn(n)) for n in sizes]
        snapshot = [p.detach().clone() for p in params]
        self.vectors = FusedVectors(params, snapshot, torch.float32, resolve("cpu", torch.device("cpu")))
        self.basis = self.vectors.basis(KNOWN + 1)
        self.basis.copy_(torch.randn(self.basis.shape))
        self.scale = torch.rand(self.vectors.numel)
        self.plus, self.minus = ([torch.randn(n) for n in sizes] for _ in range(2))
        self.size, self.one = self.vectors.number(1e-3), self.vectors.number(1.0)

    def __call__(self) -> None:
        v, known, w = self.vectors, self.basis[:KNOWN], self.basis[KNOWN]
        v.perturb(known[-1], self.scale, self.size)
        v.perturb(known[-1], self.scale, -self.size)
        products, _ = v.finish(known, w, self.plus, self.minus, self.scale, self.size)
        # small coefficients keep the numbers normal for ever
        products, _ = v.combine(w, self.one, known, -1e-9 * products, None)
        v.combine(w, self.one, known, -1e-9 * products, self.scale)


class Foreach:
    """The same algebra over lists of tensors, in the fewest passes that they have."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.params, self.snapshot, self.scale = self.draw(), self.draw(), self.draw()
        self.plus, self.minus = self.draw(), self.draw()
        self.basis = [self.draw() for _ in range(KNOWN)]

    def draw(self) -> list[torch.Tensor]:
        return [torch.randn(n) for n in self.sizes]

    def dots(self, w: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.stack([torch.dot(a, b) for a, b in zip(v, w, strict=True)]).sum() for v in self.basis]

    def perturb(self, size: float) -> None:
        torch._foreach_copy_(self.params, self.snapshot)
        torch._foreach_addcmul_(self.params, self.scale, self.basis[-1], value=size)

    def difference(self) -> list[torch.Tensor]:
        return list(torch._foreach_sub(self.plus, self.minus))

    def scaled(self, w: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(torch._foreach_mul(self.scale, w))

    def __call__(self) -> None:
        self.perturb(1e-3)
        self.perturb(-1e-3)
        w = self.difference()
        torch._foreach_mul_(w, self.scale)
        torch._foreach_copy_(self.params, self.snapshot)
        self.dots(w)
        for _ in range(2):
            for v in self.basis:
                torch._foreach_add_(w, v, alpha=-1e-9)
            self.dots(w)
        torch.stack(torch._foreach_norm(w)).norm()
        torch.stack(torch._foreach_norm(self.scaled(w))).norm()


class ForeachInPlace(Foreach):
    """The same without new memory, whose pages the system would fill with zeros first: one more pass instead."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sizes)
        self.w, self.way = self.draw(), self.draw()

    def difference(self) -> list[torch.Tensor]:
        torch._foreach_copy_(self.w, self.plus)
        torch._foreach_sub_(self.w, self.minus)
        return self.w

    def scaled(self, w: list[torch.Tensor]) -> list[torch.Tensor]:
        torch._foreach_copy_(self.way, w)
        torch._foreach_mul_(self.way, self.scale)
        return self.way


def race_vectors(sizes: list[int], seconds: float) -> Comparison:
    peers = {"new tensors": Foreach(sizes), "in place": ForeachInPlace(sizes)}
    return interleaved(Ours(sizes), peers, seconds=seconds)


def overhead(batch: int, cycles: int) -> dict[str, float]:
    """Time readings on an eighth of a batch, between training steps."""
    torch.manual_seed(0)
    data = load("gpt")
    model = build("gpt", data.classes)
    opt = fw.Adam(model.parameters(), lr=1e-3, schedule=fw.schedules.warmup(100), max_grad_norm=1.0)
    probe = fw.SharpnessProbe(opt, every=1)
    order = torch.Generator().manual_seed(0)
    steps, readings = [], []
    for _ in range(5 + CYCLE * cycles):
        index = torch.randint(len(data.train.targets), (batch,), generator=order)
        x, y = data.train.inputs[index], data.train.targets[index]

        def loss(k: int, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            return nn.functional.cross_entropy(model(x[:k]).flatten(0, 1), y[:k].flatten())

        opt.zero_grad()
        steps.append(timed(lambda loss=loss: loss(batch).backward()))
        readings.append(timed(lambda loss=loss: probe.measure(lambda: loss(batch // 8))))
        steps[-1] += timed(opt.step)
    step = statistics.median(steps)
    first, early, later = readings[0], readings[1:5], readings[5:]
    # one reading in a cycle is audited
    audits = [t for i, t in enumerate(later) if (i + 5) % CYCLE == 0]
    warm = [t for i, t in enumerate(later) if (i + 5) % CYCLE]
    kinds = {
        "cold": first,
        **{k: statistics.median(v) for k, v in (("early", early), ("warm", warm), ("audit", audits))},
    }
    cycle = ((CYCLE - 1) * kinds["warm"] + kinds["audit"]) / CYCLE
    begun = (kinds["cold"] + 4 * kinds["early"] + (CYCLE - 5) * kinds["warm"]) / CYCLE
    return {
        "step": step,
        **kinds,
        "begun": begun / (EVERY * step),
        "later": cycle / (EVERY * step),
    }


def page(where: dict, races: dict[str, Comparison], costs: dict[int, dict[str, float]]) -> str:
    """Return the page as Markdown."""
    lines = [
        f"# Cost of measuring sharpness: {where['cpu']}, {where['threads']} threads",
        "",
        ", ".join(f"{k} {v}" for k, v in where["versions"].items()) + ".",
        "",
        "Vector work of one central product with a pre-conditioner, two basis vectors known: perturb twice, finish",
        "with dots, orthogonalise twice. Medians of interleaved rounds; above 1 ours is faster. Goal: 2. The peer",
        "makes new tensors for what it has not room for, or works in place with one more pass: the faster counts.",
        "",
        "| tensors | ours, ms | GB/s | `torch._foreach_*`, ms | which | ratio | quartiles | others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, race in races.items():
        low, high = race.spread
        others = "" if race.others is None else f"{race.others:.0%}"
        rate = BYTES * sum(SHAPES[name]) / race.ours / 1e9
        lines.append(f"| {name} | {1e3 * race.ours:.2f} | {rate:.0f} | {1e3 * race.theirs:.2f} | {race.peer} | "
                     f"{race.ratio:.2f}× | {low:.2f}–{high:.2f} | {others} |")  # fmt: skip
    lines += [
        "",
        "Character GPT (1.06M parameters, contexts of 32), Adam with clipping: readings on an eighth of the batch,",
        "one after each training step here, to compare their medians. Overhead at the default of one reading in",
        f"{EVERY} steps, of the training step without it: over the first 1,200 steps, with the cold reading and the",
        "early ones of five products, and over each 1,200 after that, with one audit. Goal: at most 2 %.",
        "",
        "| batch | step, ms | cold | early | warm | audited | first 1,200 steps | later |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch, c in costs.items():
        times = " | ".join(f"{1e3 * c[k]:.0f}" for k in ("step", "cold", "early", "warm", "audit"))
        lines.append(f"| {batch} | {times} | {c['begun']:.2%} | {c['later']:.2%} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    races = {name: race_vectors(sizes, 0.5 if quick else 15.0) for name, sizes in SHAPES.items()}
    costs = {batch: overhead(batch, 1 if quick else 4) for batch in BATCHES}
    text = page(describe(), races, costs)
    print(text)
    if not quick:
        where = describe()
        slug = re.sub(r"[^a-z0-9]+", "-", where["cpu"].lower()).strip("-")
        path = RESULTS / f"{slug}-{where['threads']}t-sharpness.md"
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure the cost of sharpness readings and write ``benchmarks/results/<cpu>-<threads>t-sharpness.md``.

``python -m benchmarks.sharpness`` times the vector operations of one Hessian product against the same algebra in
``torch._foreach_*``, and readings of ``SharpnessProbe`` at its defaults against the training step of the character
GPT, in interleaved rounds. ``--quick`` runs few rounds and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass

import torch
from torch import nn

import fused_warmup as fw
from benchmarks.common import RESULTS, slug, table
from fused_warmup.backends import resolve
from fused_warmup.cli.bench.timing import Comparison, interleaved, timed
from fused_warmup.cli.machine import describe
from fused_warmup.cli.train.data import load
from fused_warmup.cli.train.models import build
from fused_warmup.sharpness.vectors import FusedVectors

SHAPES = {"10x2M": [2_000_000] * 10, "300x6667": [6_667] * 300}
# basis vectors known at the second of three products
KNOWN = 2
# bytes per parameter that our kernels read and write: two perturbations, finish, two combinations
BYTES = 16 + 16 + 32 + 16 + 20
BATCHES = (16, 128)
# the probe's defaults: steps between readings, and readings between audits
EVERY = 2400
CYCLE = 20


class FusedProduct:
    """Vector operations of one Hessian product by our kernels."""

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


class ForeachProduct:
    """The same operations by ``torch._foreach_*`` in as few passes as possible."""

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


class InPlaceProduct(ForeachProduct):
    """The same operations without allocations: one more pass, but no page faults of fresh memory."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sizes)
        self.w, self.product = self.draw(), self.draw()

    def difference(self) -> list[torch.Tensor]:
        torch._foreach_copy_(self.w, self.plus)
        torch._foreach_sub_(self.w, self.minus)
        return self.w

    def scaled(self, w: list[torch.Tensor]) -> list[torch.Tensor]:
        torch._foreach_copy_(self.product, w)
        torch._foreach_mul_(self.product, self.scale)
        return self.product


def compare_products(sizes: list[int], seconds: float) -> Comparison:
    """Time the vector operations of one product on tensors of the given sizes."""
    peers = {"new tensors": ForeachProduct(sizes), "in place": InPlaceProduct(sizes)}
    return interleaved(FusedProduct(sizes), peers, seconds=seconds)


@dataclass(frozen=True)
class Cost:
    """Cost of sharpness readings for one batch size.

    Attributes:
        step: Median seconds of a training step.
        cold: Seconds of the first reading.
        warm: Median seconds of a warm-started reading.
        audit: Median seconds of an audited reading.
        products: Median products of a warm-started reading.
        method: How products are computed.
    """

    step: float
    cold: float
    warm: float
    audit: float
    products: float
    method: str

    @property
    def first_cycle(self) -> float:
        """Overhead of a reading in ``EVERY`` steps over the first ``CYCLE`` readings."""
        total = self.cold + (CYCLE - 1) * self.warm
        return total / CYCLE / (EVERY * self.step)

    @property
    def later(self) -> float:
        """Overhead over later cycles, with one audit each."""
        return ((CYCLE - 1) * self.warm + self.audit) / CYCLE / (EVERY * self.step)


def measure_cost(batch: int, cycles: int) -> Cost:
    """Time readings on an eighth of a batch between training steps."""
    torch.manual_seed(0)
    data = load("gpt")
    model = build("gpt", data.classes)
    opt = fw.Adam(model.parameters(), lr=1e-3, schedule=fw.schedules.warmup(100), max_grad_norm=1.0)
    probe = fw.SharpnessProbe(opt, every=1)
    order = torch.Generator().manual_seed(0)
    steps, readings, products = [], [], []
    for _ in range(1 + CYCLE * cycles):
        index = torch.randint(len(data.train.targets), (batch,), generator=order)
        x, y = data.train.inputs[index], data.train.targets[index]

        def loss(k: int, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            return nn.functional.cross_entropy(model(x[:k]).flatten(0, 1), y[:k].flatten())

        opt.zero_grad()
        backward = timed(lambda loss=loss: loss(batch).backward())
        readings.append(timed(lambda loss=loss: probe.measure(lambda: loss(batch // 8))))
        reading = probe.poll()
        products.append(reading.hvps)
        steps.append(backward + timed(opt.step))
    warm, audits = [], []
    for i in range(1, len(readings)):
        # the probe audits one reading per cycle
        (warm if i % CYCLE else audits).append(readings[i])
    return Cost(
        step=statistics.median(steps),
        cold=readings[0],
        warm=statistics.median(warm),
        audit=statistics.median(audits),
        products=statistics.median(products[1:]),
        method=reading.method,
    )


def comparison_cells(shape: str, result: Comparison) -> list[str]:
    """Return the table row of a comparison of vector operations."""
    low, high = result.spread
    gb_per_s = BYTES * sum(SHAPES[shape]) / result.ours / 1e9
    return [
        shape,
        f"{1e3 * result.ours:.2f}",
        f"{gb_per_s:.0f}",
        f"{1e3 * result.theirs:.2f}",
        result.peer,
        f"{result.ratio:.2f}×",
        f"{low:.2f}–{high:.2f}",
        "" if result.others is None else f"{result.others:.0%}",
    ]


def cost_cells(batch: int, cost: Cost) -> list[str]:
    """Return the table row of the readings for one batch size."""
    seconds = (cost.step, cost.cold, cost.warm, cost.audit)
    times = [f"{1e3 * x:.0f}" for x in seconds]
    return [
        str(batch),
        cost.method,
        f"{cost.products:.0f}",
        *times,
        f"{cost.first_cycle:.2%}",
        f"{cost.later:.2%}",
    ]


def to_markdown(where: dict, comparisons: dict[str, Comparison], costs: dict[int, Cost]) -> str:
    """Return the results page."""
    product_headings = [
        "tensors",
        "ours, ms",
        "GB/s",
        "`torch._foreach_*`, ms",
        "which",
        "ratio",
        "quartiles",
        "others",
    ]
    cost_headings = [
        "batch",
        "method",
        "products",
        "step, ms",
        "cold",
        "warm",
        "audited",
        "first 19,200 steps",
        "later",
    ]
    return "\n".join([
        f"# Cost of measuring sharpness: {where['cpu']}, {where['threads']} threads",
        "",
        ", ".join(f"{name} {version}" for name, version in where["versions"].items()) + ".",
        "",
        "Vector operations of one central Hessian product with a preconditioner and two known basis vectors: perturb",
        "twice, finish with dot products, orthogonalise twice. Medians of interleaved rounds; a ratio above 1 means that",
        "ours is faster. Goal: 2. The peer either allocates new tensors for its intermediate results or works in place",
        "with one more pass; the faster variant counts.",
        "",
        *table(product_headings, [comparison_cells(shape, result) for shape, result in comparisons.items()]),
        "",
        "Character GPT (1.06M parameters, contexts of 32), Adam with clipping. Readings use an eighth of the batch; here",
        "one follows each training step, to compare medians. Overhead relative to training without readings, at the",
        f"default of one reading in {EVERY} steps: over the first 19,200 steps, with the cold reading, and over each 19,200",
        "steps after that, with one audit. Goal: at most 2 %.",
        "",
        *table(cost_headings, [cost_cells(batch, cost) for batch, cost in costs.items()]),
        "",
    ])


def main() -> int:
    """Run the benchmark and write the results page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharpness", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    seconds, cycles = (0.5, 1) if quick else (15.0, 4)
    comparisons = {shape: compare_products(sizes, seconds) for shape, sizes in SHAPES.items()}
    costs = {batch: measure_cost(batch, cycles) for batch in BATCHES}
    where = describe()
    text = to_markdown(where, comparisons, costs)
    print(text)
    if not quick:
        path = RESULTS / f"{slug(where['cpu'])}-{where['threads']}t-sharpness.md"
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

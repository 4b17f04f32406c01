"""Compare readings of ``SharpnessProbe`` with double backward and write ``benchmarks/results/readings.md``.

``python -m benchmarks.readings`` trains four small networks on digits, with two batch sizes, one batch or another one
at each step, and five optimizers. Every 10 steps it takes a reading, and the largest eigenvalue of the same operator by
Lanczos in float64 over products by double backward until its residual is below 1e-4. ``--quick`` writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import fused_warmup as fw
from benchmarks.common import RESULTS, table
from fused_warmup.cli.machine import describe
from fused_warmup.cli.train.data import load
from fused_warmup.cli.train.loops import loss_of
from fused_warmup.cli.train.models import build
from fused_warmup.sharpness.pending_step import PendingStep

EVERY = 10
TOLERANCE = 0.05
LONGEST = 80
# flags that tell how a reading began, rather than that it is in doubt
KINDS = {"cold", "audit"}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": fw.AdamW,
    "Adam": fw.Adam,
    "RAdam": fw.RAdam,
    "GIAdam": fw.GIAdam,
    "SGD": functools.partial(fw.SGD, momentum=0.9),
}
# gradient descent at a large rate, at which steps cross many kinks, and AdamW; 20 readings in 600 steps
ALONG: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "SGD, 0.3": (fw.SGD, 0.3),
    "AdamW, 3e-3": (fw.AdamW, 3e-3),
}
ALONG_EVERY, ALONG_READINGS, ALONG_BATCHES = 30, 20, {"one of 256": (256, True), "others of 64": (64, False)}
RATES = {"SGD": 0.05}
GRID_READINGS, READINGS = 8, 26
# networks of ``fused-warmup train``, whose steps are long enough to be compared with readings
TRAINED = ("digits", "gpt")
SPACING = inspect.signature(fw.SharpnessProbe).parameters["every"].default


@functools.cache
def digits() -> Any:
    """Load the images and labels once."""
    return load("digits")


def perceptron(activation: type[nn.Module]) -> nn.Module:
    """Build a network of 64, 24, 24 and 10 units."""
    hidden = [nn.Linear(64, 24), activation(), nn.Linear(24, 24), activation()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(24, 10))


class Transformer(nn.Module):
    """One block of attention over the rows of an image, with attention that has a second derivative."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.input, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of images of ``[n, 1, 8, 8]``."""
        x = self.input(x.squeeze(1)) + self.position
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: perceptron(nn.GELU),
    "tanh": lambda: perceptron(nn.Tanh),
    "relu": lambda: perceptron(nn.ReLU),
    "attention": Transformer,
}


def largest(product: Callable[[torch.Tensor], torch.Tensor], n: int) -> float:
    """Return the largest eigenvalue of an operator by Lanczos in float64, from a random start."""
    start = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, diagonal, below = [start / start.norm()], [], []
    value = math.nan
    for j in range(min(LONGEST, n)):
        w = product(basis[-1])
        diagonal.append(w @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):
            w = w - known.T @ (known @ w)
        below.append(w.norm())
        matrix = torch.diag(torch.stack(diagonal))
        if j:
            side = torch.stack(below[:-1])
            matrix = matrix + torch.diag(side, 1) + torch.diag(side, -1)
        values, vectors = torch.linalg.eigh(matrix)
        value = float(values[-1])
        if below[-1] < 1e-12 or (j > 18 and below[-1] * vectors[-1, -1].abs() < 1e-4 * abs(value)):
            break
        basis.append(w / below[-1])
    return value


def truth(loss_fn: Callable[[], torch.Tensor], opt: torch.optim.Optimizer) -> float:
    """Return the largest eigenvalue of ``P^-1/2 H P^-1/2`` by double backward."""
    pending = PendingStep("truth", opt)
    params = pending.params
    inverse = pending.inverse_preconditioners(pending.grads or [])
    scale = (
        torch.cat([x.expand_as(p).flatten() for x, p in zip(inverse, params, strict=True)]).double().sqrt()
    )
    grads = torch.autograd.grad(loss_fn(), params, create_graph=True)
    sizes = [p.numel() for p in params]

    def product(v: torch.Tensor) -> torch.Tensor:
        parts = [x.view(p.shape).to(p.dtype) for x, p in zip((scale * v).split(sizes), params, strict=True)]
        found = torch.autograd.grad(grads, params, parts, retain_graph=True)
        return scale * torch.cat([x.flatten() for x in found]).double()

    return largest(product, sum(sizes))


def run(
    model: str,
    make: Callable[..., torch.optim.Optimizer],
    *,
    lr: float = 1e-3,
    autocast: bool = False,
    batch: int = 32,
    fixed: bool = False,
    readings: int,
    seed: int = 0,
    prepare: Callable[[fw.SharpnessProbe], object] = lambda probe: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train and return a dictionary for each reading, with ``truth`` and ``seconds``."""
    torch.manual_seed(seed)
    network = MODELS[model]()
    opt = make(network.parameters(), lr=lr)
    probe = fw.SharpnessProbe(opt, every=EVERY, **options)
    prepare(probe)
    order = torch.Generator().manual_seed(seed + 1)
    x, y = digits().train.inputs, digits().train.targets
    index = torch.randint(len(y), (batch,), generator=order)
    rows = []
    for step in range(EVERY * (readings - 1) + 1):
        if step and not fixed:
            index = torch.randint(len(y), (batch,), generator=order)

        def loss(x: torch.Tensor = x[index], y: torch.Tensor = y[index]) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                return functional.cross_entropy(network(x).float(), y)

        opt.zero_grad()
        loss().backward()
        begin = time.perf_counter()
        if probe.measure(loss):
            seconds = time.perf_counter() - begin
            reading = probe.poll()
            assert reading is not None
            rows.append({**reading.asdict(), "truth": truth(loss, opt), "seconds": seconds})
        opt.step()
    return rows


def cost(model: str, examples: int, batch: int, *, readings: int) -> list[str]:
    """Return products of warm readings, how many steps one takes, and their share of the time at the default spacing."""
    data = load(model)
    torch.manual_seed(0)
    network = build(model, data.classes, torch.float32)
    opt = fw.AdamW(network.parameters(), lr=1e-3)
    probe = fw.SharpnessProbe(opt, every=EVERY)
    order = torch.Generator().manual_seed(1)
    steps, measured, products = [], [], []
    for _ in range(EVERY * (readings - 1) + 1):
        index = torch.randint(len(data.train.targets), (batch,), generator=order)
        x, y = data.train.inputs[index], data.train.targets[index]
        begin = time.perf_counter()
        opt.zero_grad()
        loss_of(network(x), y).backward()
        middle = time.perf_counter()
        if probe.measure(lambda x=x[:examples], y=y[:examples]: loss_of(network(x), y)):
            measured.append(time.perf_counter() - middle)
            reading = probe.poll()
            assert reading is not None
            products.append(reading.hvps)
            method = reading.method
        begin += time.perf_counter() - middle
        opt.step()
        steps.append(time.perf_counter() - begin)
    # the first reading is cold
    ratio = statistics.median(measured[1:]) / statistics.median(steps)
    return [
        model,
        f"{examples} of {batch}",
        method,
        f"{statistics.mean(products[1:]):.1f}",
        f"{ratio:.1f}",
        f"{ratio / SPACING:.1%}",
    ]


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return tensors as one vector in float64."""
    return torch.cat([t.detach().flatten() for t in tensors]).double()


def along(model: str, name: str, batches: str, *, readings: int) -> list[tuple[float, ...]]:
    """Compare directional sharpness, and the curvature at the start of a step, with what the loss does in it.

    Returns:
        For each reading both curvatures over the sharpness, and the relative errors of the changes of the loss that they
        predict.
    """
    make, lr = ALONG[name]
    batch, fixed = ALONG_BATCHES[batches]
    torch.manual_seed(0)
    network = MODELS[model]()
    params = list(network.parameters())
    opt = make(params, lr=lr)
    order = torch.Generator().manual_seed(1)
    x, y = digits().train.inputs, digits().train.targets
    index = torch.randint(len(y), (batch,), generator=order)
    rows = []
    for step in range(ALONG_EVERY * readings):
        if not fixed:
            index = torch.randint(len(y), (batch,), generator=order)

        def loss(x: torch.Tensor = x[index], y: torch.Tensor = y[index]) -> torch.Tensor:
            return functional.cross_entropy(network(x), y)

        opt.zero_grad()
        loss().backward()
        if step % ALONG_EVERY != 5:
            opt.step()
            continue
        found = fw.sharpness.directional(loss, opt).asdict()["value"]
        sharpness = truth(loss, opt)
        pending = PendingStep("along", opt)
        own = pending.grads or []
        updates, inverses = pending.updates_and_inverses(own)
        inverse = flat(i.expand_as(u) for i, u in zip(inverses, updates, strict=True))
        moved, start = -flat(updates), loss()
        grads = torch.autograd.grad(start, params, create_graph=True)
        at_start = -flat(torch.autograd.grad(grads, params, updates)) @ moved
        length, slope = moved / inverse @ moved, flat(grads) @ moved
        opt.step()
        change = loss().item() - start.item()
        both = [found, float(at_start / length)]
        errors = [abs(float(slope + 0.5 * q * length) - change) / abs(change) for q in both]
        rows.append((*(q / sharpness for q in both), *errors))
    return rows


def along_cells(model: str, name: str, batches: str, rows: list[tuple[float, ...]]) -> list[str]:
    """Return the row of a table of what ``along`` has found."""
    columns = [sorted(column) for column in zip(*rows, strict=True)]
    medians = [statistics.median(column) for column in columns]
    worst = [column[int(0.95 * (len(column) - 1))] for column in columns[2:]]
    return [
        model,
        batches,
        name,
        *(f"{m:.3f}" for m in medians[:2]),
        *(f"{m:.3f} ({w:.2f})" for m, w in zip(medians[2:], worst, strict=True)),
    ]


def within(row: dict[str, Any]) -> bool:
    """Return whether a reading is within its bounds or 5 % of the truth."""
    allowed = max(TOLERANCE * abs(row["truth"]), row["err_krylov"] + row["err_fd"])
    return abs(row["value"] - row["truth"]) <= allowed


def cells(rows: list[dict[str, Any]]) -> list[str]:
    """Return the figures of warm readings, without the first one, which is cold."""
    rows = rows[1:]
    errors = sorted(abs(r["value"] / r["truth"] - 1.0) for r in rows)
    krylov, fd, batch = (
        statistics.median(r[name] / abs(r["truth"]) for r in rows)
        for name in ("err_krylov", "err_fd", "err_batch")
    )
    return [
        f"{statistics.median(errors):.1e}",
        f"{errors[int(0.95 * (len(errors) - 1))]:.1e}",
        f"{krylov:.3f}",
        f"{fd:.1e}",
        f"{batch:.2f}",
        f"{sum(map(within, rows))}/{len(rows)}",
        str(sum(bool(set(r["flags"]) - KINDS) for r in rows)),
        f"{statistics.mean(r['hvps'] for r in rows):.1f}",
        f"{1e3 * statistics.median(r['seconds'] for r in rows):.0f}",
    ]


HEADINGS = [
    "error, median",
    "95 %",
    "`err_krylov`",
    "`err_fd`",
    "`err_batch`",
    "within",
    "flagged",
    "products",
    "ms",
]


def to_markdown(
    where: dict[str, Any],
    main_rows: list[list[str]],
    grid: list[list[str]],
    by_difference: list[list[str]],
    costs: list[list[str]],
    steps: list[list[str]],
) -> str:
    """Return the results page."""
    return "\n".join([
        f"# Sharpness readings against double backward: {where['cpu']}, {where['threads']} threads",
        "",
        ", ".join(f"{name} {version}" for name, version in where["versions"].items()) + ".",
        "",
        "Networks of 1,900 to 2,500 parameters on scikit-learn's digits; a reading of `SharpnessProbe` at its defaults, but",
        "every 10 steps, against the largest eigenvalue of the same operator by Lanczos in float64 over products by double",
        "backward of the same closure. Warm readings only. Errors are relative to the truth, of `err_*` the median;",
        "*within* counts readings no further from the truth than 5 % or `err_krylov + err_fd`; *flagged* those with a",
        "flag other than `audit`; *products* are Hessian products of a reading, audits included, *ms* its median time on a",
        "machine that was shared with other work.",
        "",
        "AdamW at 1e-3, another batch of 32 at each step, seed 0. bfloat16 is autocast over float32 parameters.",
        "",
        *table(["model", "forward", *HEADINGS], main_rows),
        "",
        'The same by differences of gradients, `method="difference"`, as for operations without a second derivative:',
        "",
        *table(["model", "forward", *HEADINGS], by_difference),
        "",
        "Two batch sizes, one batch for all steps or another one at each, five optimizers (SGD with momentum at 0.05, others",
        f"at 1e-3), float32, {GRID_READINGS - 1} warm readings in each row:",
        "",
        *table(["model", "batch", "batches", "optimizer", *HEADINGS], grid),
        "",
        "Along the step that follows (`fw.sharpness.directional`), relative to the largest eigenvalue, medians of",
        f"{ALONG_READINGS} readings in {ALONG_EVERY * ALONG_READINGS} steps; *at the start* is the quotient of double backward along",
        "the same displacement. Errors are those of the change of the loss in that step, predicted from the gradient and",
        "either curvature, relative to the change: the median, and in brackets the second largest.",
        "",
        *table(
            ["model", "batches", "optimizer", "directional", "at the start", "error", "error from the start"],
            steps,
        ),
        "",
        "What a warm reading costs beside a training step (forward, backward, AdamW), both medians of one process, for the",
        "networks of `fused-warmup train`; *examples* are those of the closure and of the training's batch, and the share is",
        f"that of the training time at the default `every={SPACING}`:",
        "",
        *table(["model", "examples", "method", "products", "steps", "share"], costs),
        "",
    ])


def main() -> int:
    """Run the comparison and write the results page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readings", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    count, few = (3, 3) if quick else (READINGS, GRID_READINGS)
    by_method = [
        [
            [
                model,
                "bfloat16" if autocast else "float32",
                *cells(run(model, fw.AdamW, autocast=autocast, readings=count, method=method)),
            ]
            for model in MODELS
            for autocast in (False, True)
        ]
        for method in ("auto", "difference")
    ]
    grid = [
        [
            model,
            str(batch),
            "one" if fixed else "changing",
            name,
            *cells(run(model, make, lr=RATES.get(name, 1e-3), batch=batch, fixed=fixed, readings=few)),
        ]
        for model in MODELS
        for batch in (32, 128)
        for fixed in (True, False)
        for name, make in OPTIMIZERS.items()
    ]
    costs = [cost(model, examples, 64, readings=few) for model in TRAINED for examples in (8, 64)]
    steps = [
        along_cells(
            model, name, batches, along(model, name, batches, readings=2 if quick else ALONG_READINGS)
        )
        for model in ("gelu", "relu")
        for name in ALONG
        for batches in ALONG_BATCHES
    ]
    text = to_markdown(describe(), by_method[0], grid, by_method[1], costs, steps)
    print(text)
    if not quick:
        (RESULTS / "readings.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

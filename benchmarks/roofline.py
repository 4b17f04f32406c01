"""Write the tables of ``docs/roofline.md``, all of them predictions but for the times measured on two GPUs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import RESULTS, table
from benchmarks.gpu import WORKLOADS, traffic_of
from fused_warmup.cli.traffic import MODELS, kernels_of_all, sized, step_ms, traffic_of_all
from fused_warmup.plan.roofline import DEVICES, INSTRUCTIONS, NORMS, SUM, KernelTime

PAGE = Path(__file__).resolve().parents[1] / "docs" / "roofline.md"
MEASURED = {"H100": "nvidia-h100-80gb-hbm3.json", "H200": "nvidia-h200.json"}


def devices() -> list[str]:
    """Return the table of the devices."""
    rows = [
        [d.name, *(f"{x:g}" for x in (d.sms, d.ghz, d.copy, d.fp64, d.conversions, d.memory)), d.source]
        for d in DEVICES.values()
    ]
    rates = ("copy, GB/s", "FP64 / clock / SM", "conversions / clock / SM")
    return table(["GPU", "SMs", "GHz", *rates, "memory, GB", "source of the speed of a copy"], rows)


def work() -> list[str]:
    """Return the table of the instructions per element."""
    rows = [
        [kernel, f"{n_states}", *(f"{count}" for count in counts)]
        for kernel, by_states in INSTRUCTIONS.items()
        for n_states, counts in enumerate(by_states)
    ]
    more = {"norms of the gradient, on top": NORMS, "each sum over a layer, on top": SUM}
    for name, part in more.items():
        text = f"{part.instructions:g}, {part.fp64:g} FP64, {part.conversions:g} conversions"
        rows.append([name, "", text, text])
    return table(["kernel", "states", "float32", "16 bits"], rows)


def kernels(dtype: torch.dtype) -> list[str]:
    """Return the table of the terms of each kernel on each device."""
    columns = [list(kernels_of_all(device, "124M", dtype)) for device in DEVICES.values()]
    rows = [
        [row[0][0], row[0][1], row[0][2].name, *(terms(kernel) for *_, kernel in row)]
        for row in zip(*columns, strict=True)
    ]
    return table(["optimizer", "options", "kernel", *DEVICES], rows)


def terms(kernel: KernelTime) -> str:
    """Return the terms of a kernel, the longest in bold."""
    longest = max(kernel.terms)
    texts = [f"{term:.0f}" for term in kernel.terms]
    return " / ".join(
        f"**{text}**" if term == longest else text for text, term in zip(texts, kernel.terms, strict=True)
    )


def steps(model: str) -> list[str]:
    """Return the table of the milliseconds of a step of a model."""
    rows = [
        [name, label, *(step_ms(sized(traffic, MODELS[model]), device) for device in DEVICES.values())]
        for name, label, traffic in traffic_of_all()
    ]
    return table(["optimizer", "options", *DEVICES], rows)


def measured(gpu: str) -> list[str]:
    """Return the table of times measured on a GPU beside their predictions."""
    workloads = {workload.name: workload for workload in WORKLOADS}
    rows = []
    for row in json.loads((RESULTS / MEASURED[gpu]).read_text(encoding="utf-8"))["rows"]:
        if row["gb_per_s"] is None:
            continue
        traffic = traffic_of(workloads[row["workload"]], row["optimizer"], row["mode"])
        predicted, device = traffic.predict(gpu).us, row["device_us"]
        ratio = f"{device / predicted:.2f}"
        name = f"{row['workload']}: {row['optimizer']}, {row['mode']}"
        missed = not 0.9 <= device / predicted <= 1.1
        rows.append([
            name,
            row["side"],
            f"{device:.0f}",
            f"{predicted:.0f}",
            f"**{ratio}**" if missed else ratio,
        ])
    return table(["work", "backend", "measured, µs", "predicted, µs", "measured / predicted"], rows)


TABLES: dict[str, Callable[[], list[str]]] = {
    "devices": devices,
    "work": work,
    "kernels": lambda: kernels(torch.float32),
    "kernels of bfloat16": lambda: kernels(torch.bfloat16),
    **{f"steps of {model}": lambda model=model: steps(model) for model in MODELS},
    **{f"measured on {gpu}": lambda gpu=gpu: measured(gpu) for gpu in MEASURED},
}


def filled(text: str) -> str:
    """Return a page with each table between its marks as the code gives it now."""
    for name, make in TABLES.items():
        mark = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        lines = "\n".join(make())
        text, count = re.subn(
            mark, lambda m, lines=lines: f"{m[1]}\n{lines}\n\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"benchmarks.roofline: {PAGE.name} must have one table: {name}, got {count}.")
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)

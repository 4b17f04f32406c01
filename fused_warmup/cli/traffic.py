"""Tables of ``fused-warmup doctor --traffic``: launches, bytes and predicted times of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

import fused_warmup as fw

from ..plan.roofline import Device, KernelTime
from ..plan.traffic import Traffic
from ..reference.rounding import MODES, STATE_DTYPES

OPTIMIZERS: dict[str, Callable[..., fw.FusedOptimizer]] = {
    "Adam, AdamW, GIAdam": fw.Adam,
    "Adam, amsgrad": partial(fw.Adam, amsgrad=True),
    "RAdam": fw.RAdam,
    "LAMB": fw.LAMB,
    "AdamP": fw.AdamP,
    "SGD": fw.SGD,
    "SGD, momentum": partial(fw.SGD, momentum=0.9),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "clip": {"max_grad_norm": 1.0},
    "EMA": {"average": fw.EMA(0.999)},
    "clip + EMA": {"max_grad_norm": 1.0, "average": fw.EMA(0.999)},
}
Shapes = list[tuple[int, ...]]


def gpt_shapes(layers: int = 12, d: int = 768) -> Shapes:
    """Return the shapes of the tensors of GPT-2; by default the 148 of the model of 124M parameters."""
    attention = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
    block = [*attention, (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *(block * layers), (d,), (d,)]


def llama_shapes(vocabulary: int, layers: int, d: int, hidden: int, keys: int, *, tied: bool) -> Shapes:
    """Return the shapes of the tensors of a Llama.

    Args:
        vocabulary: Rows of the embedding.
        layers: Number of blocks.
        d: Width.
        hidden: Width of the feed-forward layers.
        keys: Width of keys and of values.
        tied: Whether the output layer is the embedding.
    """
    block = [(d, d), (keys, d), (keys, d), (d, d), (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [*([(vocabulary, d)] * (1 if tied else 2)), *(block * layers), (d,)]


MODELS: dict[str, Shapes] = {
    "124M": gpt_shapes(),
    # Llama 3.2 1B and Llama 2 7B
    "1B": llama_shapes(128256, 16, 2048, 8192, 512, tied=True),
    "7B": llama_shapes(32000, 32, 4096, 11008, 4096, tied=False),
}


def traffic_of_all(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, str, Traffic]]:
    """Yield optimizer, options and the traffic of one step, computed from the step's own plan."""
    for name, optimizer in OPTIMIZERS.items():
        for label, options in OPTIONS.items():
            param = torch.ones(8, dtype=dtype)
            param.grad = torch.ones(8, dtype=dtype)
            yield name, label, optimizer([param], backend="reference", **options).traffic()


def sized(traffic: Traffic, shapes: Shapes) -> Traffic:
    """Return the traffic of the same step for tensors of some shapes."""
    return traffic.resized([math.prod(shape) for shape in shapes])


TRAFFIC_HEADINGS = ("optimizer", "options", "launches", "read", "written", "total")


def traffic_rows() -> Iterator[list[str]]:
    """Yield launches and bytes per parameter of every optimizer and option."""
    for name, label, t in traffic_of_all():
        numbers = (t.launches, t.read / t.numel, t.written / t.numel, t.per_parameter)
        yield [name, label, *(f"{x:g}" for x in numbers)]


ROUNDING_HEADINGS = ("parameters", "states", "param_rounding", "launches", "held", "moved", "held, 7B")


def rounding_rows() -> Iterator[list[str]]:
    """Yield what Adam holds and moves per parameter by dtypes and ``param_rounding``, and for a 7B model.

    Held are parameters and states without gradients; the gradients have the dtype of the parameters.
    """
    numel = sum(map(math.prod, MODELS["7B"]))
    for dtype, state_dtype in product((torch.float32, torch.bfloat16), STATE_DTYPES):
        for mode in MODES if dtype == torch.bfloat16 else ("nearest",):
            param = torch.ones(8, dtype=dtype)
            param.grad = torch.ones(8, dtype=dtype)
            opt = fw.Adam([param], backend="reference", param_rounding=mode, state_dtype=state_dtype)
            t = opt.traffic()
            held = t.held / t.numel - dtype.itemsize
            names = [str(kind).removeprefix("torch.") for kind in (dtype, state_dtype)]
            numbers = (str(t.launches), f"{held:g}", f"{t.per_parameter:g}")
            yield [*names, mode, *numbers, f"{held * numel / 1e9:.1f} GB"]


STEP_HEADINGS = ("optimizer", "options", *MODELS)


def step_rows(device: Device) -> Iterator[list[str]]:
    """Yield the predicted milliseconds of a step of each model; none for a model that does not fit."""
    for name, label, traffic in traffic_of_all():
        yield [name, label, *(step_ms(sized(traffic, shapes), device) for shapes in MODELS.values())]


def step_ms(traffic: Traffic, device: Device) -> str:
    """Return the predicted milliseconds of a step, or the bytes that do not fit into the memory."""
    prediction = traffic.predict(device)
    return f"{prediction.us / 1e3:.2f}" if prediction.fits else f"needs {prediction.held / 1e9:.0f} GB"


KERNEL_HEADINGS = ("optimizer", "options", "kernel", "bytes", "issue", "FP64", "latency", "predicted")


def kernel_rows(device: Device, model: str = "124M") -> Iterator[list[str]]:
    """Yield the terms of each kernel that differs from those before, and its predicted time."""
    for name, label, kernel in kernels_of_all(device, model):
        yield [name, label, kernel.name, *(f"{x:.1f}" for x in (*kernel.terms, kernel.us))]


def kernels_of_all(
    device: Device, model: str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, str, KernelTime]]:
    """Yield optimizer, options and the kernels of all of them but averages; of equal kernels the first."""
    seen = set()
    for name, label, traffic in traffic_of_all(dtype):
        if "EMA" in label:
            continue
        for kernel in sized(traffic, MODELS[model]).predict(device).kernels:
            if kernel not in seen:
                yield name, label, kernel
            seen.add(kernel)

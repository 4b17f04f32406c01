"""CUDA graphs without a GPU: operations on tensors and launches of kernels, recorded and replayed.

As in a CUDA graph, nothing that changes memory runs while it is recorded, a replay runs no Python code of the
optimizer, and a launch keeps the bytes of its arguments: what they point to is read at each replay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_warmup.optim import base, session
from fused_warmup.plan import device_buffers, gradients, groups, plan
from fused_warmup.plan.structs import STRUCTS

# modules that ask whether a graph is captured
ASKING = (gradients, groups, base, session, device_buffers, plan)


class Capture:
    """Says whether a graph is captured."""

    def __init__(self) -> None:
        self.active = False

    def __call__(self, device: torch.device) -> bool:
        return self.active

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *error: object) -> None:
        self.active = False


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def assign(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Write values into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


class Graph(TorchDispatchMode):
    """Operations and launches in the order in which they were recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Callable[[], Any]] = []
        # what is allocated while a graph is captured belongs to it
        self.pool: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a captured operation must not wait for the device")
        if func._schema.is_mutable:
            self.nodes.append(call)
            return args[0] if func._schema.returns else None
        made = call()
        memory = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        fresh = tensors_in(made)
        if not any(t.untyped_storage().data_ptr() in memory for t in fresh):
            self.pool += fresh
            for t in fresh:
                # only a replay computes values
                t.fill_(float("nan") if t.is_floating_point() else 0)
            if not func._schema.name.startswith("aten::empty"):
                self.nodes.append(lambda: assign(fresh, tensors_in(call())))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        for node in self.nodes:
            node()


class Recorder:
    """Records what happens inside ``with recorder.graph()``."""

    def __init__(self, capture: Capture) -> None:
        self.capture, self.current = capture, Graph()

    @contextmanager
    def graph(self) -> Iterator[Graph]:
        self.current = Graph()
        with self.capture, self.current:
            yield self.current

    def launch(self, call: Callable[[], Any]) -> None:
        """Run a launch, or record it."""
        if self.capture.active:
            self.current.nodes.append(call)
        else:
            call()

    def compiled(self, module: Any, **constants: int) -> Any:
        """The module of a compiled backend, whose steps are recorded with the bytes of their arguments."""

        def kept(address: int, size: int) -> Any:
            return ctypes.create_string_buffer(ctypes.string_at(address, size), max(size, 1))

        def cpu_step(isa: int, rule: int, address: int, *rest: int) -> None:
            call = kept(address, STRUCTS["Step"].itemsize)
            self.launch(lambda: module.step(isa, rule, ctypes.addressof(call), *rest))

        def cuda_step(rule: int, address: int, grads: int, n_grads: int, *rest: Any) -> None:
            call, pointers = kept(address, STRUCTS["Step"].itemsize), kept(grads, 8 * n_grads)
            self.launch(
                lambda: module.step(rule, ctypes.addressof(call), ctypes.addressof(pointers), n_grads, *rest)
            )

        names = [name for name in dir(module) if not name.startswith("_")]
        step = cuda_step if "MAX_CAPTURED_POINTERS" in names else cpu_step
        return SimpleNamespace(**{name: getattr(module, name) for name in names} | {"step": step} | constants)

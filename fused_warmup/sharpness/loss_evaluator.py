"""Evaluate a loss closure at perturbed parameters and restore all state afterwards."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from .. import _checks as check
from ..backends import resolve
from ..backends.base import VectorBackend
from ..distributed.agreement import agreed_group
from ..distributed.groups import average, computes_in_16_bits, is_distributed, is_fsdp2, is_partial, reshard
from ..optim.losses import checked_loss
from ..plan.residues import Residue
from ..plan.structs import DTYPES
from ..plan.tensors import compute_dtype, is_dense, local_tensor
from .closures import Search
from .randomness import random_state, restorer, set_random_state
from .shards import Shards
from .vectors import FusedVectors, ShardedVectors, Vectors

Loss = Callable[[], Tensor]

# hint where processes do not measure the same
ALONE = "Pass reduce=False to measure the loss of one rank."


class LossEvaluator:
    """Evaluates a loss closure repeatedly, each time from the same state, and restores that state.

    Inside the ``with`` block the parameters may be moved through ``.data``, which bypasses the version
    counters that protect the user's graphs. At its end, and after an exception, all state is restored to the
    bit: parameters, buffers of the modules that the closure runs, ``.grad``, the random numbers of Python,
    numpy and torch, and generators that the closure or one of its modules owns, see ``Search``. Each
    evaluation sees the same random numbers.

    Args:
        owner: Name of the caller, for error messages.
        loss_fn: Returns the loss, a tensor with one element, without calling ``backward()``.
        params: Parameters, dense tensors or DTensors of float32, float64, bfloat16 or float16 on one device.
        backend: Name of the backend whose kernels work on the vectors.
        reduce: Average losses and gradients over the default process group, if there is one. With DTensors
            losses always are, and gradients are those that a backward pass leaves in ``.grad``.
        residues: Residue of each parameter, with which steps along a vector begin, or None; none at all by
            default.

    Raises:
        TypeError: If ``loss_fn`` is not callable or a parameter is of another kind.
        ValueError: If there are no parameters, one is given twice, or they are on several devices.

    Attributes:
        params: The parameters.
        shards: Their parts in this process.
        dtype: Dtype of the vectors: float64 if one of the parameters is, else float32.
        snapshot: The stored values of those parts before the block.
        vectors: Operations on flat vectors.
        evaluations: Number of evaluations of the closure so far.
        autocast: Whether a module of the closure ran under autocast to 16 bits.
        batch_size: As for ``SharpnessReading``, after the first evaluation.
    """

    vectors: Vectors

    def __init__(
        self,
        owner: str,
        loss_fn: Loss,
        params: Sequence[Tensor],
        backend: str = "auto",
        reduce: bool = False,
        residues: Sequence[Residue | None] = (),
    ) -> None:
        if not callable(loss_fn):
            check.fail(owner, "loss_fn", "be a function that returns the loss", loss_fn, error=TypeError)
        self.owner, self.params = owner, check_params(owner, params)
        self.device = self.params[0].device
        self.dtype = functools.reduce(torch.promote_types, (compute_dtype(p.dtype) for p in self.params))
        self._backend = resolve(backend, self.device)
        self._residues = residues
        self.evaluations, self.autocast = 0, False
        self.batch_size: int | None = None
        self._outermost: torch.nn.Module | None = None
        self._loss_fn = loss_fn
        self.shards = Shards(owner, self.params)
        # steps along a line must be the same in all processes that have parts of it
        self._reduce = check.flag(owner, "reduce", reduce) or self.shards.is_placed
        # modules of FSDP2, and parameters of the closure that are not measured
        self._gathering: list[torch.nn.Module] = []
        self._others: dict[int, Tensor] = {}
        self._group: Any = None
        self._search = Search()
        self._generators: list[Callable[[], object]] = []
        self._buffers: list[tuple[torch.nn.Module, dict[str, Tensor | None], dict[str, Tensor]]] = []

    def __enter__(self) -> LossEvaluator:
        """Save all state that an evaluation could change.

        Raises:
            ValueError: If the means of all ranks are wanted, and a rank measures something else.
            RuntimeError: If a rank measures nothing for 10 minutes.
        """
        if self._reduce:
            facts = {"elements of params": self.shards.numel}
            self._group = agreed_group(self.owner, facts, ALONE)
        self.snapshot = [p.detach().clone() for p in self.shards.locals]
        self.vectors = self._make_vectors()
        self._grads = [p.grad for p in self.params]
        self._random = random_state(self.device)
        # hooks of parameters run in the backward pass
        for root in (self._loss_fn, *(p._backward_hooks for p in self.params)):
            self._save(root)
        for param in self.params:
            param.grad = None
        return self

    def __exit__(self, *_: object) -> None:
        """Restore all state."""
        self.vectors.restore()
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad
        self._reshard()
        torch.clear_autocast_cache()
        self._rewind()

    def evaluate(self) -> Tensor:
        """Return the loss at the current parameters, 0-dim, in the caller's grad mode.

        Raises:
            TypeError: If the closure returns no tensor.
            ValueError: If the loss has several elements, or the closure has called ``backward()``.
        """
        loss = self._run()
        if not isinstance(loss, Tensor):
            check.fail(self.owner, "loss_fn", "return a tensor", loss, error=TypeError)
        if loss.numel() != 1:
            check.fail(self.owner, "loss_fn", "return a loss with one element", tuple(loss.shape))
        return loss.reshape(())

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the loss as a new 0-dim float64 tensor without a graph; the closure may return a number.

        Raises:
            TypeError: If the closure returns no number.
            ValueError: As for ``evaluate``.
        """
        loss = checked_loss(self.owner, "loss_fn", self._run(), returned=True)
        return torch.as_tensor(loss).to(torch.float64, copy=True)

    def _run(self) -> Any:
        """Run the closure from the state at the beginning of the block, and return its result."""
        if self.evaluations:
            self._rewind()
        self.evaluations += 1
        self._reshard()
        # it may hold casts of parameters that have moved since
        torch.clear_autocast_cache()
        # the first evaluation finds the modules: the others run the same ones
        with contextlib.nullcontext() if self.evaluations > 1 else _watched(self._before_forward):
            loss = self._loss_fn()
        if any(p.grad is not None for p in self.params):
            check.fail(self.owner, "loss_fn", "return the loss without calling backward()", "new gradients")
        return loss

    def gradients(self, loss: Tensor, create_graph: bool) -> Sequence[Tensor | None]:
        """Return the parts of the gradients of a loss in this process, None where it does not depend on one.

        Args:
            loss: A result of ``evaluate``.
            create_graph: Whether to keep the graph; not with DTensors.
        """
        if not self.shards.is_placed:
            return torch.autograd.grad(loss, self.params, create_graph=create_graph, allow_unused=True)
        # FSDP2 reduces what a backward pass leaves in .grad, and its parameters are in no graph
        for p in (*self.params, *self._others.values()):
            if getattr(p, "_post_accumulate_grad_hooks", None):
                condition = "have no hook after its gradient where a DTensor is measured"
                check.fail(self.owner, "a parameter", condition, tuple(p.shape))
        kept = [(p, p.grad) for p in self._others.values()]
        for p, _ in kept:
            p.grad = None
        try:
            loss.backward()  # type: ignore[no-untyped-call]
            found = [p.grad for p in self.params]
        finally:
            for p in self.params:
                p.grad = None
            for p, grad in kept:
                p.grad = grad
        return [None if g is None else self.shards.part_of(i, g.detach()) for i, g in enumerate(found)]

    def share(self, *tensors: Tensor | None) -> None:
        """Average quantities linear in the gradients over all processes in place, if ``reduce`` is set.

        Those of DTensors are averages already.
        """
        for tensor in tensors if self._reduce and not self.shards.is_placed else ():
            if tensor is not None:
                average(tensor)

    def mean(self, loss: Tensor) -> float:
        """Return a loss on the host, its mean over all processes if ``reduce`` is set."""
        value = loss.to("cpu", torch.float64, copy=True)
        if self._reduce:
            average(value, self._group)
        return float(value)

    def _make_vectors(self) -> Vectors:
        """Return the vector operations of the backend, or plain ones if a parameter is a strided view."""
        if self.shards.is_placed:
            return ShardedVectors(self.shards, self.snapshot, self.dtype, self._residues)
        if isinstance(self._backend, VectorBackend) and all(map(is_dense, self.params)):
            return FusedVectors(self.params, self.snapshot, self.dtype, self._backend, self._residues)
        return Vectors(self.params, self.snapshot, self.dtype, self._residues)

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Save the state of a module before it runs for the first time; detect autocast and the batch."""
        if self._outermost is None:
            self._outermost = module
            self.batch_size = next((len(t) for t in args if isinstance(t, Tensor) and t.dim() > 1), None)
        elif module is self._outermost:
            # parts of a batch, or one batch twice
            self.batch_size = None
        kind = self.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind).itemsize == 2:
            self.autocast = True
        if module not in self._search:
            self._save(module)

    def _save(self, root: Any) -> None:
        """Save buffers of modules and states of generators reachable from an object, unless saved already."""
        items = list(self._search(root))
        self._note_sharded([item for item in items if isinstance(item, torch.nn.Module)])
        for item in items:
            if isinstance(item, torch.nn.Module):
                # the public iterators leave out buffers that are None
                objects = dict(item._buffers)
                values = {k: local_tensor(b).detach().clone() for k, b in objects.items() if b is not None}
                self._buffers.append((item, objects, values))
            elif (restore := restorer(item)) is not None:
                self._generators.append(restore)

    def _note_sharded(self, modules: Sequence[torch.nn.Module]) -> None:
        """Note the modules of FSDP2, and the parameters whose gradients a backward pass would change."""
        if not self.shards.is_placed:
            return
        gathering = [module for module in modules if is_fsdp2(module)]
        for module in gathering:
            # before it has gathered anything, so that its parameters are those of the optimizer
            reshard(module)
            self.autocast = self.autocast or computes_in_16_bits(module)
        self._gathering += gathering
        measured = {id(p) for p in self.params}
        for module in modules:
            for p in module.parameters(recurse=False):
                if id(p) not in measured:
                    self._others[id(p)] = p

    def _reshard(self) -> None:
        """Let modules of FSDP2 gather the parameters again, which have moved."""
        for module in self._gathering:
            reshard(module)

    def _rewind(self) -> None:
        """Restore buffers and random numbers, so that the next evaluation computes the same function."""
        for module, objects, values in self._buffers:
            for name, value in values.items():
                buffer = objects[name]
                assert buffer is not None
                local_tensor(buffer).data.copy_(value)
            if any(module._buffers.get(k) is not b for k, b in objects.items()):
                module._buffers.update(objects)
        # generators may share a state, also with the global ones: the state saved first is the unused one
        for restore in reversed(self._generators):
            restore()
        set_random_state(self._random)


_Watcher = Callable[[torch.nn.Module, tuple[Any, ...]], None]
_watchers: list[_Watcher] = []
_handles: list[Any] = []


def _call_watcher(module: torch.nn.Module, args: Any) -> None:
    # traces to nothing under a compiler
    if not torch.compiler.is_compiling() and _watchers:
        _watchers[-1](module, args)


@contextlib.contextmanager
def _watched(watcher: _Watcher) -> Iterator[None]:
    """Call ``watcher`` with each module and its arguments before it runs.

    Compiled code has guards on the keys of the global hooks. The same hook under the same key each time
    makes a compiled model recompile once, not at every measurement.
    """
    if not _handles:
        _handles.append(register_module_forward_pre_hook(_call_watcher))
    handle = _handles[0]
    handle.hooks_dict_ref()[handle.id] = _call_watcher
    _watchers.append(watcher)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are")
            yield
    finally:
        _watchers.pop()
        if not _watchers:
            handle.remove()


def check_params(owner: str, params: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters as a list.

    Raises:
        TypeError: If one is no dense floating-point tensor, or is a partial sum.
        ValueError: If there is none, one is given twice, or they are on several devices.
    """
    params = list(params)
    first: dict[int, int] = {}
    if not params or not any(isinstance(p, Tensor) and p.numel() for p in params):
        check.fail(owner, "params", "hold at least one element", params)
    for i, p in enumerate(params):
        if not isinstance(p, Tensor) or p.layout != torch.strided or p.dtype not in DTYPES:
            condition = "be a dense tensor of float32, float64, bfloat16 or float16"
            check.fail(owner, f"params[{i}]", condition, getattr(p, "dtype", p), error=TypeError)
        if (local_tensor(p) is not p and not is_distributed(p)) or is_partial(p):
            check.fail(owner, f"params[{i}]", "be a tensor or a DTensor of whole elements", type(p).__name__,
                       error=TypeError)  # fmt: skip
        if not (p.requires_grad and p.is_leaf):
            check.fail(owner, f"params[{i}]", "be a leaf that requires a gradient", tuple(p.shape))
        if p.device != params[0].device:
            check.fail(owner, f"params[{i}]", f"be on {params[0].device} with the others", str(p.device))
        if first.setdefault(id(p), i) != i:
            hint = "Give each parameter once."
            check.fail(owner, f"params[{i}]", f"differ from params[{first[id(p)]}]", tuple(p.shape), hint)
    return params

"""Launches and bytes of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from torch import Tensor

from ..reference.rules import LAYER_RULES
from .chunks import CHUNK, TILE_BYTES
from .plan import Plan
from .roofline import NORMS, SUM, Device, Kernel, Prediction, Units, Work, find_device, predict, work_of
from .rows import Row
from .structs import LAYER_STAGE, MEASURE_STAGE, UPDATE_STAGE


@dataclass(frozen=True)
class Traffic:
    """Launches and bytes of one step of a plan.

    Attributes:
        kernels: Kernel launches on the device backends, in order; as many for any number of tensors.
        units: Tensors, chunks and tiles that the blocks of a launch share.
        numel: Number of parameters.
        held: Bytes of parameters, gradients, states and averages.
        messages: Bytes of each all-reduce of sums, where parameters are spread over processes.
    """

    kernels: tuple[Kernel, ...]
    units: Units
    numel: int
    held: int
    messages: tuple[int, ...] = ()

    @property
    def launches(self) -> int:
        """Number of kernel launches."""
        return len(self.kernels)

    @property
    def read(self) -> int:
        """Bytes read, of all tensors together."""
        return sum(kernel.read for kernel in self.kernels)

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(kernel.written for kernel in self.kernels)

    @property
    def per_parameter(self) -> float:
        """Bytes read and written per parameter."""
        return (self.read + self.written) / max(self.numel, 1)

    def predict(self, gpu: str | Device) -> Prediction:
        """Return the time that a roofline model predicts for the step on a GPU; nothing is run.

        Args:
            gpu: Name of the GPU, such as ``"H100"`` or ``"RTX 4090"``, or its speeds.

        Raises:
            ValueError: If the name is not that of a known GPU.
        """
        device = gpu if isinstance(gpu, Device) else find_device(gpu, "Traffic.predict")
        return predict(self.kernels, self.units, self.held, device)

    def resized(self, sizes: Sequence[int]) -> Traffic:
        """Return the traffic of the same step for tensors with other numbers of elements."""
        numel, before = sum(sizes), max(self.numel, 1)
        return replace(
            self,
            kernels=tuple(kernel.scaled(numel, before) for kernel in self.kernels),
            units=Units.of(sizes, self.units.tile),
            numel=numel,
            held=self.held * numel // before,
        )


def traffic(plan: Plan) -> Traffic:
    """Return launches and bytes of a step in which all parameters have gradients and the average is due.

    The table itself is left out: 16 bytes a chunk of 32,768 elements and 200 a tensor. A sphere takes one
    more pass over its groups, whose squares the update sums.

    Args:
        plan: A plan whose groups and settings are those of the step.
    """
    rows = [(row, size) for row, size in zip(plan.rows, plan.gradients.item_sizes(), strict=True)]
    active = [(row, size) for row, size in rows if not row.is_reserved]
    parts = [kernel for row, size in active for kernel in _kernels_of_row(plan, row, size)]
    parts += [_rescale(row) for row, _ in rows if plan.groups.hypers[row.group].sphere]
    # chunks of rules that sum over layers, and of groups on a sphere, are not cut
    tiled = plan.rule not in LAYER_RULES and not plan.groups.has_spheres
    widest = max((row.work.element_size() for row, _ in active), default=4)
    return Traffic(
        tuple(_total(name, parts) for name in _launches(plan)),
        Units.of([row.work.numel() for row, _ in active], TILE_BYTES // widest if tiled else CHUNK),
        plan.numel,
        sum(_bytes(_kept(row)) + row.work.numel() * size for row, size in active),
        _messages(plan),
    )


def _messages(plan: Plan) -> tuple[int, ...]:
    """Return the bytes of each all-reduce."""
    if plan.reduction is None:
        return ()
    messages = plan.reduction.messages
    return tuple(size for _, parts in plan.exchanges() for size in messages(**parts))


def _launches(plan: Plan) -> list[str]:
    """Return the names of the kernels in the order of their launches."""
    elementwise = plan.rule not in LAYER_RULES
    # the norm is measured before the update, or telemetry sums it in the update; rules that sum over layers
    # finish that sum in the launch between
    records = elementwise and not plan.settings.measure and plan.record["ring_buffer"] is not None
    folds = {stage for stage, _ in plan.exchanges()}
    finishes = records or (plan.reduction is not None and plan.groups.has_spheres)
    return [
        *(["measure"] if plan.settings.measure else []),
        *(["fold"] if MEASURE_STAGE in folds else []),
        "decide",
        *([] if elementwise else ["stage1"]),
        *(["fold"] if not elementwise and UPDATE_STAGE in folds else []),
        *([] if elementwise else ["reduce"]),
        "update",
        *(["fold"] if (UPDATE_STAGE if elementwise else LAYER_STAGE) in folds else []),
        *(["finish"] if finishes else []),
        *(["rescale"] if plan.groups.has_spheres else []),
    ]


def _total(name: str, parts: Sequence[Kernel]) -> Kernel:
    """Return the launch that goes through all rows."""
    return reduce(add, (part for part in parts if part.name == name), Kernel(name))


def _kernels_of_row(plan: Plan, row: Row, grad_size: int) -> list[Kernel]:
    """Return what the launches do to one row, other than to bring it back to a sphere."""
    numel, n_states, itemsize = row.work.numel(), len(row.states), row.work.element_size()
    states, kept, grad = _bytes(row.states), _bytes(_kept(row)), numel * grad_size
    hyper, layered = plan.groups.hypers[row.group], LAYER_RULES.get(plan.rule)

    def work(kernel: str, *more: Work) -> Work:
        return reduce(add, more, work_of(kernel, n_states, itemsize)) * numel

    kernels = []
    norms = [] if plan.record["ring_buffer"] is None else [NORMS]
    if plan.settings.measure:
        kernels, norms = [Kernel("measure", grad, 0, work("measure", NORMS))], []
    squares = [SUM] if hyper.sphere else []
    if layered is None:
        return [*kernels, Kernel("update", kept + grad, kept, work("update", *norms, *squares))]
    sums = [SUM] * layered.n_sums
    again = grad if layered.needs_grad(hyper, n_states) else 0
    param = _bytes(_param(row))
    return [
        *kernels,
        Kernel("stage1", param + states + grad, states, work("stage1", *norms, *sums)),
        Kernel("update", kept + again, kept - states, work("update of layers", *squares)),
    ]


def _rescale(row: Row) -> Kernel:
    """Return what the last launch does to a row on a sphere: it is read and written once more."""
    work = work_of("rescale", 0, row.work.element_size()) * row.work.numel()
    param = _bytes(_param(row))
    return Kernel("rescale", param, param, work)


def _param(row: Row) -> list[Tensor]:
    """Return the tensors that hold the value of a parameter: itself, and what its rounding keeps."""
    return [row.work, *([] if row.residue is None else [row.residue])]


def _kept(row: Row) -> list[Tensor]:
    """Return the tensors of a row that an update writes."""
    return [*_param(row), *row.states, *([] if row.average is None else [row.average])]


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.nbytes for tensor in tensors)

"""Hyper-parameters of the parameter groups in the packed table, rewritten when a group changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..schedules import Schedule
from ..schedules.adaptive import AdaptiveSchedule
from .address_cache import addresses_of
from .device_buffers import DeviceBuffers, is_capturing
from .hyper import Hyper, pack_hypers
from .step_struct import StepStruct
from .structs import RATES, STRUCTS


class GroupTable:
    """Hyper-parameters, schedules and spheres of all groups in the packed table.

    Args:
        owner: Name of the optimizer class, for messages.
        norms: Norm of each group that is kept on a sphere, 0-dim float64 on the device; None for others.
        chunk_groups: Group of each chunk, in ascending order.
        buffers: Buffers of the table.
        step: The ``Step`` struct, whose fields on the groups are written here.

    Attributes:
        hypers: Validated hyper-parameters of each group.
        rates: Learning rate and weight decay that the last step applied, float64 of ``[groups, 2]``.
        norms: As given.
        has_spheres: Whether any group is kept on a sphere.
        random_start: Whether a second moment starts at random, which takes the norm of all gradients at a
            first update; the host does not know which update is the first.
    """

    def __init__(
        self,
        owner: str,
        norms: list[Tensor | None],
        chunk_groups: np.ndarray,
        buffers: DeviceBuffers,
        step: StepStruct,
    ) -> None:
        self.hypers: list[Hyper] = []
        self.rates = torch.empty(0, device=buffers.device)
        self.norms = norms
        self.has_spheres = self.random_start = False
        self._owner, self._chunk_groups, self._buffers, self._step = owner, chunk_groups, buffers, step
        # values of the groups at the last reading; None for values that can change in place
        self._rates_read: list[Any] = []
        self._others_read: list[Any] = []

    def refresh(
        self,
        groups: Sequence[Mapping[str, Any]],
        keys: Sequence[str],
        make: Callable[[Mapping[str, Any]], Hyper],
    ) -> bool:
        """Update hyper-parameters that changed since the last step.

        Args:
            groups: Parameter groups of the optimizer.
            keys: Names of the hyper-parameters besides ``lr``.
            make: Validates a group; raises for bad values.

        Returns:
            True if anything but learning rates changed.

        Raises:
            RuntimeError: If they changed while a graph is captured.
        """
        read = itemgetter(*keys)
        rates, others = [group["lr"] for group in groups], [read(group) for group in groups]
        try:
            if rates == self._rates_read and others == self._others_read:
                return False
            known = len(groups) == len(self._others_read)
            same_rate = [known and a == b for a, b in zip(rates, self._rates_read, strict=False)]
            same_others = [known and a == b for a, b in zip(others, self._others_read, strict=False)]
        except (RuntimeError, ValueError):
            # a tensor or array of many elements cannot be compared: make() will name it
            known = False
        if not known:
            same_rate = same_others = [False] * len(groups)
        if is_capturing(self._buffers.device) and self._others_read:
            raise RuntimeError(
                f"{self._owner}: hyper-parameters must stay as they were at the step before while a graph is "
                "captured, got other ones. A schedule moves on the device."
            )
        hypers = list(self.hypers) if len(self.hypers) == len(groups) else [Hyper(0.0)] * len(groups)
        changed: dict[int, float] = {}
        for i, group in enumerate(groups):
            if not same_others[i]:
                hypers[i] = make(group)
            elif not same_rate[i]:
                changed[i] = check.number(self._owner, "lr", group["lr"])
        # written only after all values are valid
        for i, lr in changed.items():
            hypers[i].lr = lr
        only_rates = all(same_others)
        self.hypers = hypers
        self._rates_read = [_snapshot(rate) for rate in rates]
        self._others_read = [
            tuple(map(_snapshot, values)) if all(map(_is_comparable, values)) else None for values in others
        ]
        if only_rates:
            self._packed["lr"] = [h.lr for h in hypers]
            self._buffers.reupload("hypers")
        else:
            self._pack()
        return not only_rates

    def forget(self) -> None:
        """Read all hyper-parameters again at the next step, because a schedule changed by itself."""
        self._others_read = [None] * len(self._others_read)

    def _pack(self) -> None:
        """Fill the columns of the groups and the segments of their schedules."""
        self.random_start = any(h.init == "random" for h in self.hypers)
        self._packed, segments, values = pack_hypers(self.hypers)
        if len(self.rates) != len(self.hypers):
            shape, device = (len(self.hypers), len(RATES)), self._buffers.device
            self.rates = torch.zeros(shape, dtype=torch.float64, device=device)
        self._step.point_to(
            hypers=self._buffers.upload("hypers", self._packed),
            segments=self._buffers.upload("segments", segments),
            values=self._buffers.upload("values", values),
            rates=self.rates,
        )
        self._step.set(n_groups=len(self.hypers))
        self._pack_spheres()

    def _pack_spheres(self) -> None:
        """Fill the column of the spheres if there are any."""
        self.has_spheres = any(h.sphere for h in self.hypers)
        if not self.has_spheres:
            self._step.point_to(spheres=None, squares=None)
            return
        table = np.zeros(len(self.hypers), STRUCTS["Sphere"])
        norms = zip(self.norms, self.hypers, strict=True)
        table["norm"] = addresses_of([norm if h.sphere else None for norm, h in norms])
        table["radius"] = [h.radius for h in self.hypers]
        groups = np.arange(len(self.hypers))
        table["first_chunk"] = np.searchsorted(self._chunk_groups, groups)
        table["n_chunks"] = np.searchsorted(self._chunk_groups, groups, "right") - table["first_chunk"]
        if "squares" not in self._buffers.tensors:
            self._buffers.allocate("squares", np.dtype(np.float64), len(self._chunk_groups))
        spheres, squares = self._buffers.upload("spheres", table), self._buffers.tensors["squares"]
        self._step.point_to(spheres=spheres, squares=squares)

    def norms_moved(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether a group has another norm than the table; a fresh norm is not in the group yet."""
        known = zip(groups, self.norms, strict=True)
        return any(group.get("norm", norm) is not norm for group, norm in known)


def _is_comparable(value: Any) -> bool:
    """Return whether a change of a hyper-parameter shows in a comparison with its snapshot."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_comparable, value))
    # an adaptive schedule reports when it has changed
    return value is None or isinstance(value, (bool, int, float, str, Schedule, AdaptiveSchedule))


def _snapshot(value: Any) -> Any:
    """Return a copy of a hyper-parameter to compare with later; None where none can be taken."""
    if not _is_comparable(value):
        return None
    return list(value) if isinstance(value, list) else value

"""Hyper-parameters of the parameter groups in the packed table, rewritten when a group changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..schedules import Schedule
from ..schedules.adaptive import AdaptiveSchedule
from .address_cache import address_of, addresses_of, select_reader
from .device_buffers import DeviceBuffers, is_capturing
from .hyper import Hyper, pack_rows, pack_schedules
from .step_struct import StepStruct
from .structs import STRUCTS


class GroupReadings:
    """Hyper-parameters of groups, and the values that they were made from.

    Attributes:
        hypers: Validated hyper-parameters of each group.
    """

    def __init__(self) -> None:
        self.hypers: list[Hyper] = []
        # what each group held at the last reading; None for what must be read again
        self._values: list[tuple[Any, ...] | None] = []

    def copy(self) -> GroupReadings:
        """Return a copy."""
        copied = GroupReadings()
        copied.hypers, copied._values = list(self.hypers), list(self._values)
        return copied

    def for_another_table(self) -> GroupReadings:
        """Return a copy that asks an adaptive schedule again."""
        copied = self.copy()
        copied._values = [None if v is None or _is_adaptive(v) else v for v in copied._values]
        return copied

    def refresh(
        self,
        owner: str,
        groups: Sequence[Mapping[str, Any]],
        keys: Sequence[str],
        make: Callable[[Mapping[str, Any]], Hyper],
    ) -> tuple[dict[int, float], dict[int, Hyper]]:
        """Read groups again, and make the hyper-parameters of those that changed.

        Args:
            owner: Name of the optimizer class, for messages.
            groups: Parameter groups of the optimizer.
            keys: Names of the hyper-parameters besides ``lr``.
            make: Validates a group; raises for bad values.

        Returns:
            New learning rates of groups in which nothing else changed, and hyper-parameters of the other
            groups that changed. Both are in place already.
        """
        rates: dict[int, float] = {}
        made: dict[int, Hyper] = {}
        readings = self._values
        if len(readings) != len(groups):
            readings = [*readings[: len(groups)], *[None] * (len(groups) - len(readings))]
        changed = select_reader().changed_groups(groups, ("lr", *keys), readings)
        if not changed and readings is self._values:
            return rates, made
        readings = list(readings)
        values_of = itemgetter("lr", *keys)
        for i in changed:
            old = readings[i]
            readings[i] = now = _read_all(values_of(groups[i]))
            if old is None or now[1:] != old[1:]:
                made[i] = make(groups[i])
            elif now != old:
                rates[i] = check.number(owner, "lr", groups[i]["lr"])
        # written only after all values are valid
        self._values = readings
        known = self.hypers
        self.hypers = [made[i] if i in made else known[i] for i in range(len(groups))]
        for i, lr in rates.items():
            self.hypers[i].lr = lr
        return rates, made

    def forget(self) -> None:
        """Read all groups again at the next step, because a schedule changed by itself."""
        self._values = [None] * len(self._values)


class GroupTable:
    """Hyper-parameters, schedules and spheres of all groups in the packed table.

    Args:
        owner: Name of the optimizer class, for messages.
        readings: Hyper-parameters of the groups.
        norms: Norm of each group that is kept on a sphere, 0-dim float64 on the device; None for others.
        rates: Memory for the rates that a step applies, float64 of ``[>= groups, 2]`` on the device.
        chunk_groups: Group of each chunk, in ascending order.
        buffers: Buffers of the table.
        step: The ``Step`` struct, whose fields on the groups are written here.

    Attributes:
        readings: As given.
        rates: Learning rate and weight decay that the last step applied, float64 of ``[groups, 2]``.
        norms: As given.
        has_spheres: Whether any group is kept on a sphere.
        random_start: Whether a second moment starts at random, which takes the norm of all gradients at a
            first update; the host does not know which update is the first.
    """

    def __init__(
        self,
        owner: str,
        readings: GroupReadings,
        norms: list[Tensor | None],
        rates: Tensor,
        chunk_groups: np.ndarray,
        buffers: DeviceBuffers,
        step: StepStruct,
    ) -> None:
        self.readings, self.norms = readings, norms
        self.rates = rates[: len(readings.hypers)]
        self.has_spheres = self.random_start = False
        self._owner, self._chunk_groups, self._buffers, self._step = owner, chunk_groups, buffers, step
        self._all_rates = rates
        self._pack()

    @property
    def hypers(self) -> list[Hyper]:
        """Validated hyper-parameters of each group."""
        return self.readings.hypers

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
        old = self.hypers
        if is_capturing(self._buffers.device):
            rates, made = self.readings.copy().refresh(self._owner, groups, keys, make)
            if rates or made:
                raise RuntimeError(
                    f"{self._owner}: hyper-parameters must stay as they were at the step before while a "
                    "graph is captured, got other ones. A schedule moves on the device."
                )
            return False
        rates, made = self.readings.refresh(self._owner, groups, keys, make)
        if rates or made:
            self._write(rates, made, old)
        return bool(made)

    def _write(self, rates: Mapping[int, float], made: Mapping[int, Hyper], old: Sequence[Hyper]) -> None:
        """Write the hyper-parameters of changed groups into the table."""
        if any(_schedules(h) != _schedules(old[i]) for i, h in made.items()):
            self._pack()
            return
        if rates:
            self._packed["lr"][list(rates)] = list(rates.values())
        if made:
            indices = list(made)
            self._packed[indices] = pack_rows(
                list(made.values()), [self._places[i] for i in indices], self._segments
            )
            self.random_start = any(h.init == "random" for h in self.hypers)
        self._buffers.reupload("hypers")
        if any((h.sphere, h.radius) != (old[i].sphere, old[i].radius) for i, h in made.items()):
            self._pack_spheres()

    def forget(self) -> None:
        """Read all hyper-parameters again at the next step, because a schedule changed by itself."""
        self.readings.forget()

    def _pack(self) -> None:
        """Fill the columns of the groups and the segments of their schedules."""
        self.random_start = any(h.init == "random" for h in self.hypers)
        self._places, segments, values = pack_schedules(self.hypers)
        # no address where there is nothing: the columns of an earlier schedule may stay behind
        segments["table"] += np.uint64(self._send_schedules("values", values))
        self._segments = self._send_schedules("segments", segments)
        self._packed = pack_rows(self.hypers, self._places, self._segments)
        self._step.point_to(
            hypers=self._buffers.upload("hypers", self._packed),
            rates=self._all_rates,
        )
        self._step.set(n_groups=len(self.hypers))
        self._pack_spheres()

    def _send_schedules(self, name: str, array: np.ndarray) -> int:
        """Return the address of a column of the schedules, 0 if there is nothing in it."""
        return address_of(self._buffers.upload(name, array)) if len(array) else 0

    def _pack_spheres(self) -> None:
        """Fill the column of the spheres if there are any."""
        had_spheres, self.has_spheres = self.has_spheres, any(h.sphere for h in self.hypers)
        if not self.has_spheres:
            if had_spheres:
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


# kinds of values that never change in place; an adaptive schedule reports when it has changed
_ATOMS = {type(None), bool, int, float, str, torch.dtype}
_PLAIN = (*_ATOMS, Number, np.generic, Schedule, AdaptiveSchedule)


def _read(value: Any) -> Any:
    """Return what a hyper-parameter holds now, to compare with it later.

    What cannot be read on the host, such as a tensor on a device, differs from all other values.
    """
    if type(value) in _ATOMS:
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return check.on_host(value, object())
    if isinstance(value, tuple):
        read = tuple(map(_read, value))
        # itself if nothing in it can change, which takes the shortest comparison
        return value if all(map(is_, value, read)) else read
    if isinstance(value, _PLAIN):
        return value
    return list(map(_read, value)) if isinstance(value, Sequence) else object()


def _read_all(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return readings of the hyper-parameters of a group."""
    return tuple([value if type(value) in _ATOMS else _read(value) for value in values])


def _is_adaptive(values: tuple[Any, ...]) -> bool:
    """Return whether one of the readings is an adaptive schedule."""
    return any(type(value) not in _ATOMS and isinstance(value, AdaptiveSchedule) for value in values)


def _schedules(hyper: Hyper) -> tuple[Schedule | None, Schedule | None]:
    """Return the two schedules of a group."""
    return hyper.schedule, hyper.weight_decay_schedule

"""Vector operations of a measurement: in plain PyTorch, and by the kernels of a backend.

Vectors are flat, ``[n]`` over all parameters, in float32 or float64; bases are ``[m, n]``. Scalars and sums
are float64 on the device, and nothing here waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import VectorBackend
from ..plan.residues import Residue, value_of
from ..plan.vector_tables import VectorTable
from .shards import Shards


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product, summed in double precision."""
    return torch.sum(a * b, dtype=torch.float64)


@dataclass(frozen=True)
class Direction:
    """The last vector ``w`` of an orthogonal basis, which is not normalised, and the lengths that go with it.

    Attributes:
        basis: ``[m, n]``.
        inverse: ``1 / |w|``, 0-dim; 0 if the vector is zero up to rounding.
        length: ``|C w| / |w|`` for the diagonal ``C`` of an operator, 0-dim.
    """

    basis: Tensor
    inverse: Tensor
    length: Tensor


class Product(NamedTuple):
    """Scalars of the product of an operator ``A`` with the unit vector ``v`` of a direction, float64.

    Attributes:
        factor: Number by which the written vector must be multiplied to give ``A v``, 0-dim.
        dots: Inner products of the written vector, without the factor, with the basis, ``[m]``.
        quotient: Rayleigh quotient ``v' A v``, 0-dim.
    """

    factor: Tensor
    dots: Tensor
    quotient: Tensor


class Vectors:
    """Vector operations in plain PyTorch, which every backend's kernels must match.

    Args:
        params: Parameters, on one device.
        snapshot: Their stored values.
        dtype: Dtype of the vectors.
        residues: Residue of each snapshot, or None; none at all by default.

    Attributes:
        numel: Elements ``n`` of a vector in this process.
        length: Elements in all processes together.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        snapshot: Sequence[Tensor],
        dtype: torch.dtype,
        residues: Sequence[Residue | None] = (),
    ) -> None:
        self.params, self.snapshot, self.dtype = list(params), list(snapshot), dtype
        self.residues = list(residues) or [None] * len(self.params)
        self.device = self.params[0].device
        self.sizes = [p.numel() for p in self.params]
        self.numel = self.length = sum(self.sizes)
        self.is_narrow = any(p.dtype.itemsize == 2 for p in self.params)

    def basis(self, count: int) -> Tensor:
        """Return ``count`` vectors that are not initialised, ``[count, n]``."""
        return torch.empty(count, self.numel, dtype=self.dtype, device=self.device)

    def number(self, value: float) -> Tensor:
        """Return a number as a 0-dim float64 tensor on the device, without waiting for it."""
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of a vector of ``[n]`` in the shapes of the parameters."""
        return [v.view(p.shape) for v, p in zip(torch.split(vector, self.sizes), self.params, strict=True)]

    def flat(self, tensors: Sequence[Tensor | float | None]) -> Tensor:
        """Return tensors as one vector of ``[n]``; None gives zeros, a number or 0-dim tensor a constant."""
        vector = self.basis(1)[0]
        for view, t in zip(self.split(vector), tensors, strict=True):
            if t is None:
                view.zero_()
            else:
                view.copy_(t.detach() if isinstance(t, Tensor) else self.number(t))
        return vector

    def dots(self, vectors: Sequence[Tensor] | Tensor, other: Tensor) -> Tensor:
        """Return the inner products of at least one vector of ``[n]`` with another, float64 of ``[m]``."""
        return torch.stack([dot(v, other) for v in vectors])

    def norm(self, vector: Tensor) -> Tensor:
        """Return the length of a vector of ``[n]``, 0-dim."""
        length: Tensor = vector.norm()
        return length

    def from_params_order(self, vector: Tensor) -> Tensor:
        """Reorder a vector whose segments are in the order of the parameters: all backends draw the same."""
        return vector

    def perturb(self, vector: Tensor, scale: Tensor | None, size: Tensor) -> None:
        """Write ``value + size * scale * vector`` into the parameters, past their version counters.

        The values are those of the snapshot with its residues; the sums are rounded to nearest.

        Args:
            vector: ``[n]``.
            scale: ``[n]``, or None for ones.
            size: 0-dim.
        """
        for param, value in zip(self.params, self._displaced(vector, scale, size), strict=True):
            param.data.copy_(value)

    def restore(self) -> None:
        """Restore the parameters as they were stored."""
        for param, value in zip(self.params, self.snapshot, strict=True):
            param.data.copy_(value)

    def finish(
        self,
        basis: Tensor,
        out: Tensor,
        plus: Sequence[Tensor | None],
        minus: Sequence[Tensor | None],
        scale: Tensor | None,
        size: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write ``scale * (plus - minus)`` into ``out``, and restore the parameters as they were stored.

        Args:
            basis: ``[m, n]``; the gradients are those at plus and minus ``size * scale * basis[-1]``.
            out: ``[n]``.
            plus: Gradients at the positive end of the step, None for zeros.
            minus: Gradients at the negative end.
            scale: ``[n]``, or None for ones.
            size: 0-dim.

        Returns:
            Inner products of ``out`` with the basis, ``[m]``; and ``[2]``, for parameters rounded to 16 bits:
            the squared distance between both ends, and the inner product of that displacement with the
            difference of gradients.
        """
        difference = self.flat(plus) - self.flat(minus)
        moved = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.is_narrow:
            ends = []
            for sign in (1.0, -1.0):
                values = self._displaced(basis[-1], scale, sign * size)
                ends.append(self.flat([v.to(p.dtype) for v, p in zip(values, self.params, strict=True)]))
            displacement = ends[0] - ends[1]
            moved = self.dots((displacement, difference), displacement)
        out.copy_(difference if scale is None else scale * difference)
        self.restore()
        return self.dots(basis, out), moved

    def combine(
        self, out: Tensor, keep: Tensor | None, basis: Tensor, coefficients: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Write ``keep * out + coefficients @ basis`` into ``out``.

        Args:
            out: ``[n]``.
            keep: 0-dim, or None for zero, in which case ``out`` is not read.
            basis: ``[m, n]``.
            coefficients: Float64 of ``[m]``.
            scale: ``[n]``, or None.

        Returns:
            Inner products of ``out`` with the basis, ``[m]``; and ``[2]``: the squared norms of ``out`` and,
            with a scale, of ``scale * out``.
        """
        total = torch.zeros_like(out) if keep is None else out * keep.to(out.dtype)
        for v, c in zip(basis, coefficients.to(out.dtype), strict=True):
            total = total + c * v
        out.copy_(total)
        products = self.dots((*basis, out), out)
        last = torch.zeros_like(products[:1])
        if scale is not None:
            scaled = out * scale
            last = self.dots((scaled,), scaled)
        return products[:-1], torch.cat([products[-1:], last])

    def _displaced(self, vector: Tensor, scale: Tensor | None, size: Tensor) -> list[Tensor]:
        """Return the parameters after a step along a vector, not rounded to their dtypes."""
        scaled = vector if scale is None else scale * vector
        parts = self.split(scaled * size.to(scaled.dtype))
        values = map(value_of, self.snapshot, self.residues)
        return [value + part for value, part in zip(values, parts, strict=True)]


class ShardedVectors(Vectors):
    """Vector operations on the parts of parameters in this process, with sums over all processes.

    Args:
        shards: The parameters.
        snapshot: Stored values of their parts in this process.
        dtype: Dtype of the vectors.
        residues: As for ``Vectors``.
    """

    def __init__(
        self,
        shards: Shards,
        snapshot: Sequence[Tensor],
        dtype: torch.dtype,
        residues: Sequence[Residue | None] = (),
    ) -> None:
        super().__init__(shards.locals, snapshot, dtype, residues)
        self._shards, self.length = shards, shards.numel
        runs = shards.runs()
        self._firsts = [first for first, _ in runs]
        self._sizes = [sum(self.sizes[first:end]) for first, end in runs]

    def dots(self, vectors: Sequence[Tensor] | Tensor, other: Tensor) -> Tensor:
        """See ``Vectors.dots``; all processes call this."""
        parts = [torch.split(v, self._sizes) for v in vectors]
        runs = zip(*parts, torch.split(other, self._sizes), strict=True)
        sums = [torch.stack([dot(v, last) for v in first]) for *first, last in runs]
        return self._shards.add_up(torch.stack(sums), self._firsts)

    def norm(self, vector: Tensor) -> Tensor:
        """See ``Vectors.norm``; all processes call this."""
        return self.dots((vector,), vector)[0].sqrt().to(vector.dtype)

    def from_params_order(self, vector: Tensor) -> Tensor:
        """Return the parts in this process of a vector over whole parameters."""
        return self._shards.parts_of_flat(vector)


class FusedVectors(Vectors):
    """Vector operations by a backend's kernels: one pass over memory each.

    Args:
        params: Parameters, dense in memory, on one device.
        snapshot: Their stored values, laid out like them.
        dtype: Dtype of the vectors.
        backend: Backend with vector kernels.
        residues: As for ``Vectors``, laid out like the parameters.

    Attributes:
        offsets: Start of each parameter's segment in a flat vector.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        snapshot: Sequence[Tensor],
        dtype: torch.dtype,
        backend: VectorBackend,
        residues: Sequence[Residue | None] = (),
    ) -> None:
        super().__init__(params, snapshot, dtype, residues)
        # sizes that keep the alignment first: all segments after one of odd size are unaligned
        order = sorted(range(len(params)), key=lambda i: params[i].numel() % 8 != 0)
        self.offsets = [0] * len(params)
        total = 0
        for i in order:
            self.offsets[i] = total
            total += params[i].numel()
        self._in_order = order == sorted(order) and all(p.is_contiguous() for p in params)
        self._backend = backend
        self._table = VectorTable(params, snapshot, self.offsets, dtype, residues)

    def basis(self, count: int) -> Tensor:
        """Return ``count`` vectors that are not initialised, each aligned to 32 bytes."""
        padded = torch.empty(count, -(-self.numel // 8) * 8, dtype=self.dtype, device=self.device)
        return padded[:, : self.numel]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of a vector of ``[n]`` in the shapes and layouts of the parameters."""
        first = vector.storage_offset()
        parts = zip(self.params, self.offsets, strict=True)
        return [vector.as_strided(p.shape, p.stride(), first + offset) for p, offset in parts]

    def from_params_order(self, vector: Tensor) -> Tensor:
        """See ``Vectors.from_params_order``."""
        if self._in_order:
            return vector
        parts = zip(torch.split(vector, self.sizes), self.params, strict=True)
        return self.flat([part.view(p.shape) for part, p in parts])

    def perturb(self, vector: Tensor, scale: Tensor | None, size: Tensor) -> None:
        """See ``Vectors.perturb``."""
        self._table.prepare(vector[None], None, scale, size)
        self._backend.vectors("perturb", self._table)

    def finish(
        self,
        basis: Tensor,
        out: Tensor,
        plus: Sequence[Tensor | None],
        minus: Sequence[Tensor | None],
        scale: Tensor | None,
        size: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See ``Vectors.finish``."""
        self._table.put_gradients(plus, minus)
        sums = self._table.prepare(basis, out, scale, size, narrow=self.is_narrow)
        self._backend.vectors("finish", self._table)
        return sums[:-2], sums[-2:]

    def combine(
        self, out: Tensor, keep: Tensor | None, basis: Tensor, coefficients: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``Vectors.combine``."""
        head = self.number(0.0) if keep is None else keep
        factors = torch.cat([head[None], coefficients])
        sums = self._table.prepare(basis, out, scale, factors, fresh=keep is None)
        self._backend.vectors("combine", self._table)
        return sums[:-2], sums[-2:]

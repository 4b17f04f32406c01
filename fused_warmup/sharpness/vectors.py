"""The vector operations of a measurement: in plain PyTorch, and by the kernels of a backend.

Vectors are flat, ``[n]`` over all parameters, in float32 or float64; bases are ``[m, n]``. Scalars and sums
are float64 on the device, and nothing here waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.base import VectorBackend
from ..plan.vector_tables import VectorTable


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product, summed in double precision."""
    return torch.sum(a * b, dtype=torch.float64)


class Vectors:
    """The operations in plain PyTorch, which every backend's kernels must match.

    Args:
        params: Parameters, on one device.
        snapshot: Their values.
        dtype: Dtype of the vectors.
    """

    def __init__(self, params: Sequence[Tensor], snapshot: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.params, self.snapshot, self.dtype = list(params), list(snapshot), dtype
        self.device = self.params[0].device
        self.sizes = [p.numel() for p in self.params]
        self.numel = sum(self.sizes)
        self.is_narrow = any(p.dtype.itemsize == 2 for p in self.params)

    def basis(self, count: int) -> Tensor:
        """Return room for ``count`` vectors, ``[count, n]``, not initialised."""
        return torch.empty(count, self.numel, dtype=self.dtype, device=self.device)

    def number(self, value: float) -> Tensor:
        """Return a 0-dim float64 on the device, without a copy that waits."""
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of a vector of ``[n]`` in the shapes of the parameters."""
        return [v.view(p.shape) for v, p in zip(torch.split(vector, self.sizes), self.params, strict=True)]

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return one vector of ``[n]``; None is zero, and a 0-dim tensor fills its piece."""
        vector = self.basis(1)[0]
        for view, t in zip(self.split(vector), tensors, strict=True):
            view.copy_(t.detach()) if t is not None else view.zero_()
        return vector

    def from_params_order(self, vector: Tensor) -> Tensor:
        """Return a vector of ``[n]`` that was drawn parameter by parameter: backends share its values."""
        return vector

    def perturb(self, vector: Tensor, scale: Tensor | None, size: Tensor) -> None:
        """Write ``snapshot + size * scale * vector`` into the parameters, past their version counters.

        Args:
            vector: ``[n]``.
            scale: ``[n]``, or None for ones.
            size: 0-dim.
        """
        for param, value in zip(self.params, self._displaced(vector, scale, size), strict=True):
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
        """Write ``scale * (plus - minus)`` into ``out``, and put the parameters back.

        Args:
            basis: ``[m, n]``; the parameters were moved by plus and minus ``size * scale * basis[-1]``.
            out: ``[n]``.
            plus: Gradients at one end, None for zeros.
            minus: Gradients at the other.
            scale: ``[n]``, or None for ones.
            size: 0-dim.

        Returns:
            Products of ``out`` with the basis, ``[m]``; and ``[2]``: where parameters are rounded to 16 bits,
            the square of how far they moved from end to end, and that times the difference of gradients.
        """
        difference = self.flat(plus) - self.flat(minus)
        moved = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.is_narrow:
            ends = []
            for sign in (1.0, -1.0):
                values = self._displaced(basis[-1], scale, sign * size)
                ends.append(self.flat([v.to(p.dtype) for v, p in zip(values, self.params, strict=True)]))
            way = ends[0] - ends[1]
            moved = torch.stack([dot(way, way), dot(way, difference)])
        out.copy_(difference if scale is None else scale * difference)
        for param, value in zip(self.params, self.snapshot, strict=True):
            param.data.copy_(value)
        return torch.stack([dot(v, out) for v in basis]), moved

    def combine(
        self, out: Tensor, keep: Tensor | None, basis: Tensor, coefficients: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Write ``keep * out + coefficients @ basis`` into ``out``.

        Args:
            out: ``[n]``.
            keep: 0-dim, or None for zero: ``out`` is then not read.
            basis: ``[m, n]``.
            coefficients: Float64 of ``[m]``.
            scale: ``[n]``, or None.

        Returns:
            Products of ``out`` with the basis, ``[m]``; and ``[2]``: the squares of ``out`` and, where there
            is a scale, of ``scale * out``.
        """
        total = torch.zeros_like(out) if keep is None else out * keep.to(out.dtype)
        for v, c in zip(basis, coefficients.to(out.dtype), strict=True):
            total = total + c * v
        out.copy_(total)
        scaled = out * scale if scale is not None else torch.zeros_like(out[:0])
        products = [dot(v, out) for v in basis]
        return (
            torch.stack(products) if products else coefficients,
            torch.stack([dot(out, out), dot(scaled, scaled)]),
        )

    def _displaced(self, vector: Tensor, scale: Tensor | None, size: Tensor) -> list[Tensor]:
        """Return where a step along a vector leads, not rounded to the dtypes of the parameters."""
        way = vector if scale is None else scale * vector
        parts = self.split(way * size.to(way.dtype))
        return [value + part for value, part in zip(self.snapshot, parts, strict=True)]


class FusedVectors(Vectors):
    """The same by kernels: one pass over memory for each operation.

    Args:
        params: Parameters, dense in memory, on one device.
        snapshot: Their values, laid out like them.
        dtype: Dtype of the vectors.
        backend: Has the kernels.

    Attributes:
        offsets: Where the piece of each parameter begins in a flat vector.
    """

    def __init__(
        self, params: Sequence[Tensor], snapshot: Sequence[Tensor], dtype: torch.dtype, backend: VectorBackend
    ) -> None:
        super().__init__(params, snapshot, dtype)
        # whole vectors of the device first: what follows a tensor of odd size has no alignment
        order = sorted(range(len(params)), key=lambda i: params[i].numel() % 8 != 0)
        self.offsets = [0] * len(params)
        total = 0
        for i in order:
            self.offsets[i] = total
            total += params[i].numel()
        self._in_order = order == sorted(order) and all(p.is_contiguous() for p in params)
        self._backend = backend
        self._spans = VectorTable(params, snapshot, self.offsets, dtype)

    def basis(self, count: int) -> Tensor:
        """Return room for ``count`` vectors, each of which begins at a multiple of 32 bytes."""
        room = torch.empty(count, -(-self.numel // 8) * 8, dtype=self.dtype, device=self.device)
        return room[:, : self.numel]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of a vector of ``[n]`` that are laid out like the parameters."""
        first = vector.storage_offset()
        parts = zip(self.params, self.offsets, strict=True)
        return [vector.as_strided(p.shape, p.stride(), first + offset) for p, offset in parts]

    def from_params_order(self, vector: Tensor) -> Tensor:
        """As ``Vectors.from_params_order``."""
        if self._in_order:
            return vector
        parts = zip(torch.split(vector, self.sizes), self.params, strict=True)
        return self.flat([part.view(p.shape) for part, p in parts])

    def perturb(self, vector: Tensor, scale: Tensor | None, size: Tensor) -> None:
        """As ``Vectors.perturb``."""
        self._spans.prepare(vector[None], None, scale, size)
        self._backend.vectors("perturb", self._spans)

    def finish(
        self,
        basis: Tensor,
        out: Tensor,
        plus: Sequence[Tensor | None],
        minus: Sequence[Tensor | None],
        scale: Tensor | None,
        size: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As ``Vectors.finish``."""
        self._spans.put_gradients(plus, minus)
        sums = self._spans.prepare(basis, out, scale, size, narrow=self.is_narrow)
        self._backend.vectors("finish", self._spans)
        return sums[:-2], sums[-2:]

    def combine(
        self, out: Tensor, keep: Tensor | None, basis: Tensor, coefficients: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As ``Vectors.combine``."""
        head = self.number(0.0) if keep is None else keep
        factors = torch.cat([head[None], coefficients])
        sums = self._spans.prepare(basis, out, scale, factors, fresh=keep is None)
        self._backend.vectors("combine", self._spans)
        return sums[:-2], sums[-2:]

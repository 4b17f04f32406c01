"""Packed tables of a sharpness measurement, which its kernels read beside the table of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .address_cache import address_of, select_reader
from .chunks import chunks
from .device_buffers import DeviceBuffers
from .plan import Plan
from .residues import Residue
from .structs import DTYPES, ROUNDINGS, STRUCTS

# operations of ``csrc/vectors.h``, in the order of its enum
OPERATIONS = ("perturb", "finish", "combine")
# sums besides the products with basis vectors
EXTRA_SUMS = 2


class VectorTable:
    """Tensor slices, chunks and the arguments of one vector operation, for the kernels of a backend.

    Args:
        params: Parameters, dense in memory, on one device.
        snapshot: Their stored values, laid out like them.
        offsets: Where the piece of each begins in a flat vector.
        dtype: Dtype of the vectors, float32 or float64.
        residues: Residue of each snapshot, laid out like it, or None; none at all by default.

    Attributes:
        address: Address of the struct ``VectorOp`` on the host.
        device: Where everything is.
        offsets: Where the piece of each parameter begins in a flat vector.
        numel: Number of elements.
        n_chunks: Number of chunks.
        n_basis: Basis vectors of the present call.
        dtypes: Codes of the dtypes that parameters have.
        doubles: Whether the vectors are float64.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        snapshot: Sequence[Tensor],
        offsets: Sequence[int],
        dtype: torch.dtype,
        residues: Sequence[Residue | None] = (),
    ) -> None:
        self.device, self.offsets = params[0].device, list(offsets)
        self._params = list(params)
        self._forms = select_reader()[0](self._params)
        self._buffers = DeviceBuffers(self.device)
        self._slices = np.zeros(len(params), STRUCTS["TensorSlice"])
        self._slices["param"] = [address_of(p) for p in params]
        self._slices["snapshot"] = [address_of(p) for p in snapshot]
        self._slices["offset"] = offsets
        self._slices["dtype"] = [DTYPES[p.dtype] for p in params]
        for i, residue in enumerate(residues):
            if residue is not None:
                self._slices["rounding"][i] = ROUNDINGS[residue.mode]
                self._slices["residue"][i] = address_of(residue.tensor)
        sizes = [p.numel() for p in params]
        pieces = chunks(sizes, sizes)
        self.numel, self.n_chunks = sum(sizes), len(pieces)
        self.dtypes = tuple(sorted({DTYPES[p.dtype] for p in params}))
        self.doubles, self.n_basis = dtype == torch.float64, 0
        self._call = np.zeros(1, STRUCTS["VectorOp"])
        self.address: int = self._call.ctypes.data
        self._addresses = np.zeros(len(params), np.uint64)
        self._partials = torch.empty(0, dtype=torch.float64, device=self.device)
        self._finished = torch.zeros(1, dtype=torch.int32, device=self.device)
        # held for the addresses in the table
        self._kept: list[Any] = [*params, *snapshot, *residues]
        self._set(
            slices=self._buffers.upload("slices", self._slices),
            chunks=self._buffers.upload("chunks", pieces),
            finished=self._finished,
            n_chunks=len(pieces),
            doubles=self.doubles,
        )

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            self._call[name] = address_of(value) if value is None or isinstance(value, Tensor) else value

    def put_gradients(self, plus: Sequence[Tensor | None], minus: Sequence[Tensor | None]) -> None:
        """Set the gradients at both ends of the difference; None counts as zeros."""
        self._grads = [self._put("plus", plus), self._put("minus", minus)]
        self._buffers.reupload("slices")

    def _put(self, name: str, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        held: list[Any] = list(grads)
        out = self._addresses.ctypes.data
        for i in self._forms.read(held, out):
            # gradients of another layout, as of an expanded sum
            held[i] = torch.empty_like(self._params[i]).copy_(held[i].detach())
        if any(a is not b for a, b in zip(held, grads, strict=True)):
            self._forms.read(held, out)
        self._slices[name] = self._addresses
        return held

    def prepare(
        self,
        basis: Tensor,
        out: Tensor | None,
        scale: Tensor | None,
        factors: Tensor,
        *,
        fresh: bool = False,
        narrow: bool = False,
    ) -> Tensor:
        """Set the arguments of one operation.

        Args:
            basis: ``[m, n]``, rows next to each other.
            out: ``[n]``, or None.
            scale: ``[n]``, or None for ones.
            factors: Float64, see ``csrc/vectors.h``.
            fresh: ``out`` need not be read.
            narrow: Some parameters are rounded to 16 bits.

        Returns:
            Float64 of ``[m + 2]`` on the device, for the sums.
        """
        m = self.n_basis = len(basis)
        width = m + EXTRA_SUMS
        if len(self._partials) < width * self.n_chunks:
            self._partials = torch.empty(width * self.n_chunks, dtype=torch.float64, device=self.device)
        sums = torch.empty(width, dtype=torch.float64, device=self.device)
        self._set(
            partials=self._partials, sums=sums, basis=basis if m else None, out=out, scale=scale,
            factors=factors, n_basis=m, stride=basis.stride(0), fresh=fresh, narrow=narrow,
        )  # fmt: skip
        return sums

    def call_column(self) -> Tensor:
        """Return the struct ``VectorOp`` on the device, for kernels that take its address."""
        return self._buffers.upload("call", self._call)


class PreconditionerTable:
    """Arguments of the kernels that compute the preconditioner of the next step.

    Args:
        plan: The table of the optimizer, refreshed for the step about to be made.
        params: Parameters that are measured.
        offsets: Where the piece of each begins in a flat vector.
        thresholds: Threshold of the learning rate times an eigenvalue, for each of them.
        l2_sq: 0-dim float64 on the device, the squared norm of all gradients; read where the step would clip.
        scale: ``P**-1/2``, ``[n]``, is written there unless it is None.
        scaled: The same with the square root of ``lr / edge``, ``[n]``, unless it is None.

    Attributes:
        address: Address of the struct ``PreconditionerOp`` on the host.
        doubles: Whether the vectors are float64.
        rates: Float64 of ``[groups, 2]`` on the device: learning rate and weight decay that will be in force.
    """

    def __init__(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        offsets: Sequence[int],
        thresholds: Sequence[float],
        l2_sq: Tensor,
        scale: Tensor | None,
        scaled: Tensor | None,
    ) -> None:
        places = {id(p): (offset, edge) for p, offset, edge in zip(params, offsets, thresholds, strict=True)}
        found = [places.get(id(row.param), (-1, 1.0)) for row in plan.rows]
        self._buffers = DeviceBuffers(plan.device)
        self.rates = torch.zeros_like(plan.groups.rates)
        self.doubles = any(t is not None and t.dtype == torch.float64 for t in (scale, scaled))
        self._call = np.zeros(1, STRUCTS["PreconditionerOp"])
        self.address: int = self._call.ctypes.data
        # held for the addresses in the table
        self._kept = l2_sq, scale, scaled
        self._call["offsets"] = address_of(
            self._buffers.upload("offsets", np.array([offset for offset, _ in found], np.int64))
        )
        self._call["thresholds"] = address_of(
            self._buffers.upload("thresholds", np.array([edge for _, edge in found], np.float64))
        )
        for name, tensor in (("l2_sq", l2_sq), ("scale", scale), ("scaled", scaled), ("rates", self.rates)):
            self._call[name] = address_of(tensor)
        self._call["doubles"] = self.doubles

    def call_column(self) -> Tensor:
        """Return the struct ``PreconditionerOp`` on the device, for kernels that take its address."""
        return self._buffers.upload("call", self._call)

"""Gradients of a step: their addresses, and copies of gradients that kernels cannot read in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from .address_cache import TensorSignatures, address_of
from .device_buffers import DeviceBuffers, is_capturing
from .rows import Row
from .structs import DTYPES
from .tensors import check_grad, compute_dtype, describe, local_tensor, same_layout


class GradientTable:
    """Addresses of the gradients of all rows, read anew at each step.

    Args:
        owner: Name of the optimizer class, for messages.
        rows: Parameters of the table.
        columns: The rows as a numpy struct array; ``grad_dtype`` is written here.
        buffers: Buffers of the table, which has ``columns`` as ``"rows"``.
        make_signatures: Makes ``TensorSignatures``.
        takes_sparse: Whether sparse gradients are made dense, or refused.

    Attributes:
        addresses: Addresses of the gradients of this step, uint64 of ``[rows]``; 0 for none.
        address: Address of these.
        is_stale: Whether the device has other addresses than those of this step.
        is_complete: Whether every row has a gradient.
        odd: Positions of rows whose gradient is not laid out as they are; its address is 0 until ``adopt``.
    """

    def __init__(
        self,
        owner: str,
        rows: list[Row],
        columns: np.ndarray,
        buffers: DeviceBuffers,
        make_signatures: Callable[..., TensorSignatures],
        *,
        takes_sparse: bool,
    ) -> None:
        self.is_stale = self.is_complete = False
        self._owner, self._rows, self._columns, self._buffers = owner, rows, columns, buffers
        self._takes_sparse = takes_sparse
        self._params = [row.param for row in rows]
        self._signatures = make_signatures([row.work for row in rows])
        self.addresses = np.zeros(len(rows), np.uint64)
        self.address: int = self.addresses.ctypes.data
        # addresses that the device has, if it keeps a copy
        self._uploaded = self.addresses.copy()
        self.column = buffers.upload("grads", self.addresses)
        self.odd: list[int] = []
        self._cast: dict[int, torch.dtype] = {}
        # whether the device has the dtypes of other gradients
        self._recast = False
        self._adopted: dict[int, Tensor] = {}

    def read(self) -> None:
        """Read the addresses of the gradients in ``.grad``."""
        self.odd = self._signatures.read(self._params, self.address, True)

    def adopt(self) -> bool:
        """Convert gradients that kernels cannot read in place.

        Returns:
            Whether a gradient has another dtype than at the step before.

        Raises:
            TypeError: If a gradient has a kind or dtype that no backend takes.
            ValueError: If a gradient does not fit its parameter.
        """
        self._adopted = {i: self._adopt(i, self._params[i].grad) for i in self.odd} if self.odd else {}
        for i, grad in self._adopted.items():
            self.addresses[i] = address_of(grad) if grad.numel() else 1
            if self.addresses[i] == 0:
                name = describe(self._rows[i].index, self._rows[i].local)
                check.fail(self._owner, f"the gradient of {name}", "hold data", "a null address")
        self.is_complete = np.count_nonzero(self.addresses) == len(self.addresses)
        if not self._adopted and not self._cast:
            return False
        cast = {i: g.dtype for i, g in self._adopted.items() if g.dtype != self._rows[i].work.dtype}
        recast = cast != self._cast
        if recast:
            self._columns["grad_dtype"] = self._columns["dtype"]
            for i, dtype in cast.items():
                self._columns["grad_dtype"][i] = DTYPES[dtype]
            self._cast = cast
        return recast

    def _adopt(self, i: int, grad: Tensor | None) -> Tensor:
        """Return a gradient in the layout and dtype of its row, copied if necessary."""
        row = self._rows[i]
        assert grad is not None
        grad = check_grad(self._owner, row.index, row.param, row.local, grad, self._takes_sparse).detach()
        dtype = grad.dtype if grad.dtype in (row.work.dtype, torch.float32) else compute_dtype(row.work.dtype)
        if same_layout(grad, row.work) and grad.dtype == dtype:
            return grad
        return torch.empty_like(row.work, dtype=dtype).copy_(grad)

    def compare(self, recast: bool) -> bool:
        """Compare the addresses with those that the device has.

        Args:
            recast: Whether a gradient has another dtype than at the step before.

        Returns:
            False if a captured graph reads gradients of other dtypes from the table.

        Raises:
            RuntimeError: If a gradient has another dtype than at the step before while a graph is captured.
        """
        self.is_stale = bool((self.addresses != self._uploaded).any())
        self._recast |= recast
        if not self._recast:
            return True
        if is_capturing(self._buffers.device):
            self.release()
            raise RuntimeError(
                f"{self._owner}: gradients must have the dtypes of the step before while a graph is "
                "captured, got another one. Call init_state() before the capture, with such gradients in "
                ".grad."
            )
        if self._buffers.captured:
            return False
        self._buffers.reupload("rows")
        self._recast = False
        return True

    def upload(self) -> None:
        """Send the addresses to the device."""
        self._buffers.reupload("grads")
        self.note_upload()

    def note_upload(self) -> None:
        """Note that the device has the addresses of this step."""
        if self.is_stale:
            self._uploaded[:] = self.addresses
            self.is_stale = False

    @property
    def tensors(self) -> list[Tensor | None]:
        """The gradients of this step in the layouts of the rows, or None."""
        grads = [param.grad for param in self._params]
        return [self._adopted.get(i, grad) for i, grad in enumerate(grads)]

    @property
    def present(self) -> np.ndarray:
        """Whether each row has a gradient, bool of ``[rows]``."""
        present: np.ndarray = self.addresses != 0
        return present

    def item_sizes(self) -> list[int]:
        """Return the bytes of a gradient element of each row, as the kernels read it."""
        return [self._cast.get(i, row.work.dtype).itemsize for i, row in enumerate(self._rows)]

    def are_zero(self) -> bool:
        """Return whether there are gradients and all of them are 0; waits for the device."""
        found = [grad for grad in self.tensors if grad is not None]
        return bool(found) and not any(bool(local_tensor(grad).any()) for grad in found)

    @torch.no_grad()
    def unscale(self, grad_scale: Tensor | None) -> None:
        """Divide ``.grad`` by the scale of a ``GradScaler``, as torch's optimizers leave it."""
        grads = [local_tensor(p.grad) for p in self._params if p.grad is not None]
        if grad_scale is not None and grads:
            torch._foreach_mul_(grads, grad_scale.double().reciprocal().float().reshape(()))

    def release(self) -> None:
        """Let go of the gradients."""
        self._adopted = {}
        self._signatures.release()

"""Tensor validation: supported dtypes, devices and memory layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .structs import DTYPES


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic and states beside parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(index: int, tensor: Tensor) -> str:
    """Return how an error names a parameter."""
    return f"parameter {index} (shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies in this process: the shard of a DTensor, else the tensor."""
    return getattr(tensor, "_local_tensor", tensor) if type(tensor) is not Tensor else tensor


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that lie in this process."""
    return [t if type(t) is Tensor else local_tensor(t) for t in tensors]


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one stretch of memory, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((t, n) for t, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def work_layout(local: Tensor, by_channel: bool = False) -> Tensor:
    """Return a meta tensor with the layout that the row of a parameter has: its own if that is dense.

    Args:
        local: The parameter.
        by_channel: Whether each index of the first dimension must have one stretch of memory.
    """
    kind = work_format(local, by_channel)
    return torch.empty_like(local, device="meta", requires_grad=False, memory_format=kind)


def work_format(local: Tensor, by_channel: bool) -> torch.memory_format:
    """Return the memory format that makes a tensor like ``local`` one with the layout of its row."""
    if not by_channel or local.dim() < 2 or len(local) == 1 or local.is_contiguous():
        return torch.preserve_format
    kept = torch.empty_like(local, device="meta", requires_grad=False)
    if kept.stride(0) * len(kept) == kept.numel():
        return torch.preserve_format
    return torch.contiguous_format


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Return whether equal positions in memory hold equal elements, apart from dimensions of size 1."""
    pairs = zip(a.shape, b.shape, a.stride(), b.stride(), strict=False)
    return a.dim() == b.dim() and all(m == n and (s == t or n == 1) for m, n, s, t in pairs)


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two elements may share memory."""
    reach = 1
    for stride, size in sorted((t, n) for t, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride < reach:
            return tensor.numel() > 1
        reach = stride * (size - 1) + reach
    return False


def _check_kind(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless a tensor is real memory of a layout and dtype that kernels read."""
    if is_fake(tensor):
        raise TypeError(
            f"{name} must hold data, got a FakeTensor; keep step() out of torch.compile and export."
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {tensor.layout}.")
    if tensor.dtype not in DTYPES:
        hint = "; give torch.view_as_real of it." if tensor.is_complex() else "."
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}{hint}")


def check_param(owner: str, index: int, param: Tensor, device: torch.device | None) -> Tensor:
    """Return the local memory of a parameter that a backend can update.

    Raises:
        TypeError: If the parameter is fake, sparse, complex, quantised or of an integer dtype.
        ValueError: If it has no memory, overlaps itself or lies on another device than ``device``.
    """
    if is_lazy(param):
        hint = "run the model once, which gives it its shape."
        raise ValueError(f"{owner}: parameter {index} must hold data, got an uninitialized one; {hint}")
    name = f"{owner}: {describe(index, param)}"
    local = local_tensor(param)
    _check_kind(name, local)
    if local.is_meta:
        raise ValueError(f"{name} must hold data, got a meta tensor; materialise the model first.")
    if device is not None and local.device != device:
        raise ValueError(
            f"{name} must be on one device with the others, got {local.device}, expected {device}."
        )
    if overlaps_itself(local):
        raise ValueError(f"{name} must not overlap itself, got strides {local.stride()}; clone it.")
    return local


def placed_like(owner: str, index: int, param: Tensor, grad: Tensor) -> Tensor:
    """Return the part of a distributed gradient that belongs to the part of its parameter in this process.

    A gradient with other placements, such as a partial sum of sequence parallelism, is redistributed; all
    processes call this.

    Raises:
        ValueError: If only one of the two is distributed, or their meshes differ.
    """
    wanted, got = (getattr(t, "placements", None) for t in (param, grad))
    if wanted == got:
        return local_tensor(grad)
    meshes = [getattr(t, "device_mesh", None) for t in (param, grad)]
    if meshes[0] != meshes[1]:
        if all(mesh is None or mesh.size() == 1 for mesh in meshes):
            return local_tensor(grad)
        raise ValueError(
            f"{owner}: the gradient of parameter {index} must be on {meshes[0]} as its parameter, got "
            f"{meshes[1]}."
        )
    placed: Any = grad
    return local_tensor(placed.redistribute(placements=wanted))


def check_grad(
    owner: str, index: int, param: Tensor, local: Tensor, grad: Tensor, takes_sparse: bool = False
) -> Tensor:
    """Return the local memory of a gradient that fits its parameter, a dense copy of a sparse one.

    Args:
        owner: Name of the optimizer class.
        index: Position of the parameter.
        param: The parameter.
        local: Its part in this process.
        grad: Its gradient.
        takes_sparse: Whether sparse gradients are made dense, or refused.

    Raises:
        TypeError: If the gradient is fake or of an unsupported dtype.
        RuntimeError: If it is sparse, unless the rule takes that.
        ValueError: If it has another shape, device or mesh than its parameter.
    """
    name = f"{owner}: the gradient of {describe(index, local)}"
    grad = placed_like(owner, index, param, grad)
    if grad.layout == torch.sparse_coo:
        if not takes_sparse:
            # the type that torch's optimizers raise
            raise RuntimeError(
                f"{name} must be dense, got layout {grad.layout}; SGD takes sparse ones, as does "
                "torch.optim.SparseAdam."
            )
        grad = grad.to_dense()
    _check_kind(name, grad)
    if grad.device != local.device:
        raise ValueError(f"{name} must be on {local.device}, got {grad.device}.")
    if grad.shape != local.shape:
        raise ValueError(f"{name} must have its shape, got {tuple(grad.shape)}.")
    return grad


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor is a FakeTensor, as while a compiler traces."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or isinstance(getattr(tensor, "data", None), FakeTensor)


def fits(state: Tensor, local: Tensor, by_channel: bool = False, dtype: torch.dtype | None = None) -> bool:
    """Return whether a state has the device, dtype and layout that the row of a parameter needs."""
    held = local_tensor(state)
    if held.device != local.device or held.dtype != (dtype or compute_dtype(local.dtype)):
        return False
    if local.is_contiguous() and held.is_contiguous():
        return held.shape == local.shape
    return same_layout(held, work_layout(local, by_channel))


def state_like(param: Tensor, by_channel: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros in the layout that the row of ``param`` has, by default in the dtype of its arithmetic."""
    kind = work_format(local_tensor(param), by_channel)
    return torch.zeros_like(param, dtype=dtype or compute_dtype(param.dtype), memory_format=kind)

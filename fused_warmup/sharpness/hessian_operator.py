"""The Hessian of a loss as a matrix of PyTorch or SciPy, also pre-conditioned by an optimizer."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..distributed.groups import from_part, whole
from ..plan.tensors import local_tensor
from .hvp import METHODS, Hessian
from .loss_evaluator import Loss, LossEvaluator
from .operators import Operator, evaluator_of, step_operators
from .pending_step import PendingStep
from .randomness import random_state, set_random_state


class CurvatureOperator(abc.ABC):
    """A symmetric matrix over all parameters, known by its products.

    Every product is taken at the present parameters and restores all state afterwards, so that nothing is
    held between two of them. The global random numbers that the closure sees, such as dropout masks, are
    those of the time when the operator was made: all products are of one matrix, whatever is drawn between
    them.

    Args:
        evaluator: Evaluator of the loss, not entered.
        method: ``"difference"`` or ``"autograd"``.

    Attributes:
        params: The parameters.
        shape: ``(n, n)``.
        dtype: Dtype of products: float64 if a parameter is, else float32.
        device: Device of the parameters.
        method: The method.
    """

    def __init__(self, evaluator: LossEvaluator, method: str) -> None:
        self._shards, self.params = evaluator.shards, evaluator.params
        self.shape = (self._shards.numel, self._shards.numel)
        self.dtype, self.device = evaluator.dtype, evaluator.device
        self.method = self._shards.check_method(check.one_of(evaluator.owner, "method", method, METHODS))
        self._random = random_state(self.device)

    @abc.abstractmethod
    def _measure(self) -> contextlib.AbstractContextManager[Operator]:
        """Return the operator at the present state, which is restored at the end of the block."""

    @contextlib.contextmanager
    def measure(self) -> Iterator[Operator]:
        """Yield the operator for several products, and restore all state at the end of the block."""
        callers = random_state(self.device)
        set_random_state(self._random)
        try:
            with self._measure() as operator:
                yield operator
        finally:
            set_random_state(callers)

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, v: Sequence[Tensor]) -> list[Tensor]: ...

    @torch.no_grad()
    def __matmul__(self, v: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Return the product with a vector or matrix, and restore all state.

        Args:
            v: Vector of ``[n]`` or matrix of ``[n, k]``, in the order of the parameters, each flattened by
                rows; or a list of tensors shaped like the parameters, with the placements of DTensors. Of
                any floating-point dtype, on the device of the parameters.

        Returns:
            The product in the form of ``v``, of ``dtype``.

        Raises:
            TypeError: If ``v`` is of another kind.
            ValueError: If it has another shape, device or placement.
        """
        if isinstance(v, Tensor):
            return self._times_matrix(v)
        parts = self._checked_parts(v)
        with self.measure() as operator:
            product = operator.multiply(operator.vectors.flat(parts))
            found = operator.vectors.split(product)
        return [from_part(part.clone(), p) for part, p in zip(found, self.params, strict=True)]

    def to_scipy(self, dtype: Any = None) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator``, for ``eigsh`` and others.

        Args:
            dtype: NumPy dtype of its products; that of this operator if None.

        Raises:
            ImportError: If SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError(f"{type(self).__name__}: to_scipy needs SciPy; pip install scipy.") from error
        kind = np.dtype(str(self.dtype).removeprefix("torch.") if dtype is None else dtype)

        def product(x: np.ndarray) -> np.ndarray:
            # a copy, because torch takes neither negative strides nor read-only memory
            found: np.ndarray = (self @ torch.from_numpy(np.array(x)).to(self.device)).cpu().numpy()
            return found.astype(kind, copy=False)

        return LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=kind
        )

    def _times_matrix(self, v: Tensor) -> Tensor:
        """Return the product with a vector of ``[n]`` or matrix of ``[n, k]``, one column at a time."""
        n = self.shape[0]
        if v.dim() not in (1, 2) or len(v) != n or hasattr(v, "placements"):
            check.fail(self._owner, "v", f"be a plain tensor of shape ({n},) or ({n}, k)", tuple(v.shape))
        self._check_numbers("v", v)
        columns = v if v.dim() == 2 else v[:, None]
        out = torch.empty(columns.shape, dtype=self.dtype, device=self.device)
        with self.measure() as operator:
            vectors = operator.vectors
            for column, result in zip(columns.T, out.T, strict=True):
                vector = vectors.from_params_order(column.to(self.dtype).contiguous())
                parts = zip(vectors.split(operator.multiply(vector)), self.params, strict=True)
                torch.cat([whole(from_part(part, p)).reshape(-1) for part, p in parts], out=result)
        return out if v.dim() == 2 else out[:, 0]

    def _checked_parts(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts in this process of tensors shaped like the parameters."""
        condition = f"be a tensor or a list of {len(self.params)} tensors shaped like the parameters"
        if not isinstance(v, (list, tuple)):
            hint = "to_scipy() takes arrays." if isinstance(v, np.ndarray) else ""
            check.fail(self._owner, "v", condition, type(v).__name__, hint, TypeError)
        if len(v) != len(self.params):
            check.fail(self._owner, "v", condition, f"{len(v)} items")
        for i, (part, p) in enumerate(zip(v, self.params, strict=True)):
            if not isinstance(part, Tensor):
                check.fail(self._owner, f"v[{i}]", "be a tensor", part, error=TypeError)
            if part.shape != p.shape:
                check.fail(self._owner, f"v[{i}]", f"have the shape {tuple(p.shape)}", tuple(part.shape))
            placements = [getattr(t, "placements", None) for t in (part, p)]
            if placements[0] != placements[1]:
                check.fail(self._owner, f"v[{i}]", f"have the placements {placements[1]}", placements[0])
            self._check_numbers(f"v[{i}]", part)
        return [local_tensor(part) for part in v]

    def _check_numbers(self, name: str, tensor: Tensor) -> None:
        """Raise unless a tensor has floating-point numbers on the device of the parameters."""
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            condition = "be a dense tensor of a floating-point dtype"
            check.fail(self._owner, name, condition, tensor.dtype, error=TypeError)
        if tensor.device != self.device:
            check.fail(self._owner, name, f"be on {self.device} with the parameters", str(tensor.device))

    @property
    def _owner(self) -> str:
        return type(self).__name__


class HessianOperator(CurvatureOperator):
    """The Hessian of a loss as a matrix: ``H @ v``, ``H @ V``, ``H.to_scipy()``.

    Each product is taken at the present parameters and restores parameters, buffers, ``.grad`` and random
    numbers, as ``top_eigenvalue`` does. All products see the global random numbers of the time when the
    operator was made.

    Args:
        loss_fn: As for ``top_eigenvalue``.
        params: As for ``top_eigenvalue``.
        method: ``"difference"`` of two gradients for each product; ``"autograd"`` for double backward, which
            is exact, and whose graph the columns of a matrix share; ``"auto"`` for the latter until an
            operation without a second derivative raises.
        reduce: As for ``top_eigenvalue``: every rank makes the same products.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.

    Attributes:
        shape: ``(n, n)``, for ``n`` elements of all parameters.
        dtype: Dtype of products: float64 if a parameter is, else float32.
        device: Device of the parameters.

    Example:
        >>> H = fw.sharpness.HessianOperator(lambda: loss_fn(model(x), y), model.parameters())
        >>> curvature = v @ (H @ v)
        >>> eigenvalues, vectors = scipy.sparse.linalg.eigsh(H.to_scipy(), k=5, which="LA", tol=1e-4)
    """

    def __init__(
        self, loss_fn: Loss, params: Iterable[Tensor], *, method: str = "difference", reduce: bool = False
    ) -> None:
        self._loss_fn, self._reduce, self._params = loss_fn, reduce, list(params)
        super().__init__(self._evaluator(), method)

    def _evaluator(self) -> LossEvaluator:
        return LossEvaluator(self._owner, self._loss_fn, self._params, reduce=self._reduce)

    @contextlib.contextmanager
    def _measure(self) -> Iterator[Operator]:
        """Yield the Hessian at the present parameters."""
        with self._evaluator() as evaluator:
            yield Operator(Hessian(evaluator, self.method), None, None)


class PreconditionedOperator(CurvatureOperator):
    """The matrix ``P^-1/2 H P^-1/2`` for the step that an optimizer is about to make.

    It is symmetric and has the eigenvalues of ``P^-1 H``, the largest of which ``preconditioned`` measures;
    that function defines ``P`` and ``H``. Both are those of the time of a product: an update, or
    another gradient in ``.grad``, changes the matrix. Otherwise it is like ``HessianOperator``.

    Args:
        loss_fn: As for ``preconditioned``.
        optimizer: As for ``preconditioned``.
        method: ``"difference"`` or ``"autograd"``.
        use_grad: As for ``preconditioned``. Without gradients in ``.grad`` each call computes them once more.
        reduce: As for ``preconditioned``.

    Raises:
        TypeError: If the rule of the optimizer is not known, or an argument has a wrong type.
        ValueError: If an argument is out of range.

    Attributes:
        shape: ``(n, n)``, for ``n`` elements of the parameters that take part in the step.
        dtype: Dtype of products: float64 if a parameter is, else float32.
        device: Device of the parameters.
    """

    def __init__(
        self,
        loss_fn: Loss,
        optimizer: torch.optim.Optimizer,
        *,
        method: str = "difference",
        use_grad: bool = True,
        reduce: bool = False,
    ) -> None:
        self._loss_fn, self._optimizer, self._reduce = loss_fn, optimizer, reduce
        self._use_grad = check.flag(self._owner, "use_grad", use_grad)
        super().__init__(evaluator_of(self._pending(), loss_fn, reduce), method)

    def _pending(self) -> PendingStep:
        return PendingStep(self._owner, self._optimizer, self._use_grad)

    @contextlib.contextmanager
    def _measure(self) -> Iterator[Operator]:
        """Yield the matrix of the step that the optimizer would make now."""
        pending = self._pending()
        if [id(p) for p in pending.params] != [id(p) for p in self.params]:
            condition = "have gradients for the same parameters as when the operator was made"
            check.fail(self._owner, "optimizer", condition, f"{len(pending.params)} parameters")
        with evaluator_of(pending, self._loss_fn, self._reduce) as evaluator:
            yield step_operators(pending, Hessian(evaluator, self.method, pending.sign)).plain

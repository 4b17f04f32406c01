"""Sides of a lockstep: the same optimizer on several backends or in torch, and the comparison of two sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import assert_close, assert_same_bits
from torch import Tensor, nn

import fused_warmup as fw

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# nothing, one element, a channel, around a block of the kernel, and an image
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (0, 3), (2, 3, 2, 2), (513,)]

# the tolerances of test_properties.py, which says why; no row of theirs is as long as the sums there
ULPS = {torch.float32: 4.0, torch.float64: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
NORM_RTOL = 1e-12
L1_RTOL = 16 * 2.0**-24
COUNTS = ("step", "n_averaged")
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def _turned(values: Tensor) -> Tensor:
    """Return a view with the dimensions in the opposite order."""
    return values.permute(tuple(reversed(range(values.dim()))))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda v: v.clone(memory_format=torch.contiguous_format),
    "columns": lambda v: _turned(_turned(v).contiguous()),
    "channels last": lambda v: v.movedim(1, -1).contiguous().movedim(-1, 1) if v.dim() > 2 else v.clone(),
    "every second": lambda v: torch.stack([v, v], -1)[..., 0],
    "padded": lambda v: torch.cat([v, v[..., :1]], -1)[..., : v.shape[-1]] if v.dim() else v.clone(),
    "offset": lambda v: torch.cat([v.new_zeros(3), v.reshape(-1)])[3:].view(v.shape),
}
# of a gradient that has another dtype than its parameter
OTHER_DTYPE = {
    torch.float32: torch.bfloat16,
    torch.float64: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class Spec:
    """One parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str

    def make(self, seed: int) -> nn.Parameter:
        return nn.Parameter(LAYOUTS[self.layout](normal(self.shape, seed).to(self.dtype)))


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """Return normal numbers, float64, that depend on the seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def give_gradient(param: Tensor, kind: str, values: Tensor) -> None:
    """Set ``.grad`` to values in one of the ways in which training loops do."""
    values = values.to(param.dtype)
    if kind == "left":
        return
    if kind == "kept" and param.grad is not None and param.grad.dtype == param.dtype:
        # not where elements share memory
        if param.grad.is_contiguous():
            param.grad.copy_(values)
            return
        kind = "new"
    param.grad = None
    if kind == "none":
        return
    if kind == "other dtype":
        param.grad_dtype = None
        values = values.to(OTHER_DTYPE[param.dtype])
    elif kind == "zero":
        values = torch.zeros_like(values)
    elif kind == "expanded":
        values = values.flatten()[:1].sum().expand(values.shape)
    elif kind == "sparse":
        values = values.to_sparse()
    elif kind in LAYOUTS:
        values = LAYOUTS[kind](values)
    param.grad = values


@dataclass
class Side:
    """One optimizer with its parameters.

    Attributes:
        backend: Name of the backend, or ``"torch"`` for torch's optimizer.
        name: Name of the class.
        params: All parameters in the order in which they were made; groups may have them in another one.
        settings: Options of the whole optimizer; torch's has none of them, so ``step`` does what they say.
        held: A state that somebody holds.
        saved: A state dict of the past.
        evaluated: Copies of the parameters while averages were in their place.
        left_out: A list of a group's parameters, before one was left out.
    """

    backend: str
    name: str
    params: list[nn.Parameter]
    settings: dict[str, Any]
    opt: Any = None
    held: Tensor | None = None
    saved: Any = None
    evaluated: list[Tensor] = field(default_factory=list)
    left_out: list[Tensor] = field(default_factory=list)

    @property
    def is_ours(self) -> bool:
        return self.backend != "torch"

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.opt.param_groups

    def make(self, groups: list[dict[str, Any]]) -> Any:
        """Return a new optimizer over groups."""
        if self.is_ours:
            return getattr(fw, self.name)(groups, lr=0.01, backend=self.backend, **self.settings)
        return getattr(torch.optim, self.name)(groups, lr=0.01, foreach=False)

    def renew(self) -> None:
        """Replace the optimizer by a new one that has made no step; its hyper-parameters are the defaults."""
        self.opt = self.make([{"params": list(group["params"])} for group in self.groups])

    def set(self, name: str, value: Any) -> None:
        """Change an option of the whole optimizer."""
        self.settings[name] = value
        if self.is_ours:
            setattr(self.opt, name, value)

    def copy_by(self, copied: Callable[[Any], Any]) -> None:
        """Replace the optimizer and its parameters by copies."""
        self.opt, self.params = copied((self.opt, self.params))
        self.held = None

    def states(self, i: int) -> dict[str, Any]:
        """Return the states of a parameter; none are made."""
        return self.opt.state.get(self.params[i], {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Make one step; that of torch is clipped and averaged as our options say."""
        if self.is_ours:
            self.opt.step(closure)
            return
        if closure is not None:
            closure()
        found = [p for group in self.groups for p in group["params"] if p.grad is not None]
        kept, largest = [p.grad for p in found], self.settings.get("max_grad_norm")
        if largest is not None and kept:
            coef = (largest / (torch.nn.utils.get_total_norm(kept) + 1e-6)).clamp(max=1.0)
            for p in found:
                p.grad = p.grad * coef
        self.opt.step()
        for p, grad in zip(found, kept, strict=True):
            p.grad = grad
        if self.settings.get("average") is not None:
            self._average()

    @torch.no_grad()
    def _average(self) -> None:
        """Average the parameters of torch's optimizer, in entries of its states."""
        average = self.settings["average"]
        for p in (p for group in self.groups for p in group["params"]):
            if p.grad is None and "average" not in self.opt.state.get(p, {}):
                continue
            state = self.opt.state[p]
            n = int(state.get("n_averaged", 0)) + 1
            weight = 1.0 / n if isinstance(average, fw.SWA) or n == 1 else 1.0 - average.decay
            held = state.get("average", torch.zeros_like(p))
            state["average"] = held + weight * (p - held)
            state["n_averaged"] = torch.tensor(float(n))


def largest(tensor: Tensor | None) -> float:
    """Return the largest finite magnitude, 0 if there is none."""
    if tensor is None or not tensor.numel():
        return 0.0
    return float(tensor.detach().to_dense().double().abs().nan_to_num(0.0, 0.0, 0.0).max())


def _assert_near(name: str, actual: Tensor, expected: Tensor, ulps: float, scale: float = 1e-30) -> None:
    """Compare up to a number of roundings at the largest element or ``scale``, NaN and infinities exactly."""
    assert actual.dtype == expected.dtype, name
    eps = torch.finfo(expected.dtype).eps
    assert_close(name, actual, expected, ulps * eps * max(largest(expected), scale))


class Comparison:
    """Compares our optimizer on two backends, after each operation of a sequence.

    Args:
        actual: The backend that is tested.
        expected: The reference.

    Attributes:
        seen: Largest gradient, decay included, that each parameter had: the roundings of a gradient that decay
            cancels are those of the terms.
        inherited: What roundings changed the clip coefficient by; the gradients inherit it.
    """

    def __init__(self, actual: Side, expected: Side) -> None:
        self.actual, self.expected = actual, expected
        self.seen: dict[int, float] = {}
        self.inherited = 0.0

    def note_gradients(self, scale: float) -> None:
        """Note the sizes of the gradients that the next step sees."""
        for group in self.actual.groups:
            for p in group["params"]:
                i = next(i for i, own in enumerate(self.actual.params) if own is p)
                size = largest(p.grad) / scale + group["weight_decay"] * largest(p)
                self.seen[i] = max(self.seen.get(i, 0.0), size)

    def ulps(self, dtype: torch.dtype) -> float:
        inherited = 4.0 * self.inherited / torch.finfo(dtype).eps
        return ULPS[dtype] + (inherited if dtype.itemsize > 2 else 0.0)

    def params(self) -> None:
        """Compare parameters and gradients."""
        for i, (a, b) in enumerate(zip(self.actual.params, self.expected.params, strict=True)):
            _assert_near(f"parameter {i}", a, b, self.ulps(a.dtype))
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                grads = (LAYOUTS["rows"](p.grad.to_dense()) for p in (a, b))
                assert_same_bits(f"gradient {i}", *grads)

    def evaluated(self) -> None:
        """Compare what the parameters were inside of ``averaged_parameters``."""
        for i, (a, b) in enumerate(zip(self.actual.evaluated, self.expected.evaluated, strict=True)):
            _assert_near(f"average {i}", a, b, self.ulps(a.dtype))

    def states(self) -> None:
        """Compare states, counts, averages and whatever users keep beside them."""
        for i in range(len(self.actual.params)):
            mine, theirs = self.actual.states(i), self.expected.states(i)
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                name, own = f"{key} of parameter {i}", mine[key]
                if key in COUNTS:
                    assert int(own) == int(value), name
                elif key == "average":
                    # it is of the stored parameter
                    dtype = self.actual.params[i].dtype
                    ulps = self.ulps(dtype) * torch.finfo(dtype).eps / torch.finfo(value.dtype).eps
                    _assert_near(name, own, value, ulps)
                elif key in MOMENTS:
                    size = self.seen.get(i, 0.0)
                    size = size if key in ("exp_avg", "momentum_buffer") else size**2
                    _assert_near(name, own, value, self.ulps(value.dtype), size)
                elif isinstance(value, Tensor):
                    assert_same_bits(name, own, value)
                else:
                    assert repr(own) == repr(value), name

    def telemetry(self) -> None:
        """Compare all rows."""
        mine, theirs = (side.opt.telemetry.history() for side in (self.actual, self.expected))
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            rtol = L1_RTOL if key == "grad_norm_l1" else NORM_RTOL
            torch.testing.assert_close(mine[key], value, rtol=rtol, atol=0.0, equal_nan=True, msg=key)

    def note_clipping(self) -> None:
        """Note how far apart the clip coefficients of the last step are."""
        mine, theirs = (side.opt.telemetry.latest()["clip_coef"] for side in (self.actual, self.expected))
        apart = abs(mine - theirs) / theirs if theirs > 0.0 else 0.0
        self.inherited = max(self.inherited, apart)

    def groups(self) -> None:
        """Compare what the steps write into the groups."""
        for mine, theirs in zip(self.actual.groups, self.expected.groups, strict=True):
            assert mine.keys() == theirs.keys()
            if "norm" in theirs:
                torch.testing.assert_close(mine["norm"], theirs["norm"], rtol=NORM_RTOL, atol=0.0)


def compare_with_torch(mine: Side, theirs: Side, *, states: bool) -> None:
    """Compare parameters and every state that torch's optimizer keeps, with the tolerances of test_reference.py."""
    for i, (a, b) in enumerate(zip(mine.params, theirs.params, strict=True)):
        assert_close(f"parameter {i} in torch", a, b, 1e-12, 1e-12)
        for key, value in theirs.states(i).items() if states else ():
            if key == "average":
                assert_close(f"average {i} in torch", mine.states(i)[key], value, 4 * 2.0**-52, 4 * 2.0**-52)
            elif key == "step" and mine.name == "SGD":
                # torch's keeps no count; this one came from a state dict of ours
                continue
            elif key in (*COUNTS, *MOMENTS) and value is not None:
                assert_close(f"{key} {i} in torch", torch.as_tensor(mine.states(i)[key]), value, 1e-13, 1e-12)


@torch.no_grad()
def synchronize(source: Side, target: Side, *, states: bool) -> None:
    """Copy values, so that every step starts from the same ones on both sides and roundings do not add up."""
    for i, (a, b) in enumerate(zip(source.params, target.params, strict=True)):
        b.data.copy_(a.data)
        for key, value in target.states(i).items() if states else ():
            if key in (*MOMENTS, "average") and value is not None:
                value.copy_(source.states(i)[key])


def check_last_row(side: Side, norm: float) -> None:
    """Check the telemetry of the last step against the options of the optimizer and the norm of its gradients."""
    row, group = side.opt.telemetry.latest(), side.groups[0]
    schedule, t = group["schedule"], int(row["step"] - 1 + row["skipped"])
    assert row["lr"] == approx(float(group["lr"]) * (1.0 if schedule is None else schedule(t)))
    if not row["skipped"]:
        assert row["grad_norm"] == approx(norm)
    limit = side.settings.get("max_grad_norm")
    ratio = math.inf if limit is None else limit / (row["grad_norm"] + 1e-6)
    assert row["clip_coef"] == approx(1.0 if ratio >= 1.0 else ratio)


def approx(value: float) -> Any:
    """Return a number that equals others up to the roundings of a sum in another order."""
    return pytest.approx(value, rel=NORM_RTOL, abs=0.0, nan_ok=True)

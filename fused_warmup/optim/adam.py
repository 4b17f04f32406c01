"""Adam, AdamW and gradient-initialised Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import _checks as check
from ..plan.hyper import Hyper
from ..plan.spec import RuleSpec
from ..plan.structs import INIT_KINDS
from ..plan.tensors import compute_dtype
from ..reference import rules
from .base import FusedOptimizer, Options, Params
from .hyper import moments

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
    """Return the validated hyper-parameters of a group of Adam."""
    check.flag(owner, "amsgrad", group["amsgrad"])
    init = check.one_of(owner, "exp_avg_sq_init", group["exp_avg_sq_init"], INIT_KINDS)
    scale = check.number(owner, "exp_avg_sq_init_scale", group["exp_avg_sq_init_scale"])
    return Hyper(**moments(owner, group), init=init, init_scale=scale)


class Adam(FusedOptimizer):
    """Adam, with decoupled decay, AMSGrad and an initialised second moment on request.

    ``m += (1 - beta1) (g - m)``, ``v += (1 - beta2) (g^2 - v)``,
    ``param -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)``.

    Args:
        params: Parameters or groups.
        lr: Learning rate, >= 0, multiplied by the schedule.
        betas: Coefficients of the two averages, each in [0, 1).
        eps: Added outside the square root, >= 0.
        weight_decay: L2 penalty or decoupled decay, >= 0.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend.
        decoupled_weight_decay: Decay as AdamW does: ``param -= lr * weight_decay * param``.
        exp_avg_sq_init: ``"zeros"``; ``"grad"`` starts at the square of the first gradient (GI-Adam);
            ``"random"`` at squares of normal numbers with the norm of the first gradient.
        exp_avg_sq_init_scale: Multiplies the start value, >= 0.
        options: Options of every optimizer, see ``FusedOptimizer``.

    Source: Kingma & Ba 2015, arXiv:1412.6980; initialisation: Kalra & Barkeshli 2024, arXiv:2406.09405.
    """

    spec: ClassVar[RuleSpec] = RuleSpec(
        rules.Adam,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        _hyper,
        n_states=lambda group: 3 if group["amsgrad"] else 2,
        second_moment="exp_avg_sq",
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        exp_avg_sq_init: str = "zeros",
        exp_avg_sq_init_scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "exp_avg_sq_init": exp_avg_sq_init,
            "exp_avg_sq_init_scale": exp_avg_sq_init_scale,
        }
        super().__init__(params, defaults, **options)

    @torch.no_grad()
    def init_from_gradients(self) -> None:
        """Start the second moment from the gradients now in ``.grad``, without making a step.

        The paper takes them from a batch of their own; every parameter with a gradient is initialised to
        ``exp_avg_sq_init_scale * g**2``, with ``g`` clipped and decayed as in a step. Waits for the device.

        Raises:
            RuntimeError: If a parameter has already made a step.
            ValueError: If there is no gradient, or one is not finite.
        """
        name = type(self).__name__
        plan, _ = self.session.prepare(None, None)
        found = zip(plan.rows, plan.gradients.tensors, strict=True)
        active = [(row, grad) for row, grad in found if grad is not None]
        if not active:
            check.fail(name, ".grad", "hold a gradient for some parameter", None)
        norm = torch.stack([grad.to(torch.float64).norm() for _, grad in active]).norm().item()
        if not math.isfinite(norm):
            check.fail(name, ".grad", "be finite", norm)
        if any(row.step is not None and int(row.step) for row, _ in active):
            raise RuntimeError(f"{name}: init_from_gradients() must come before the first step.")
        clip_coef = 1.0
        if self.max_grad_norm is not None:
            clip_coef = rules.clip_coefficient(norm, self.max_grad_norm)
        for row, grad in active:
            exp_avg_sq = row.states[self.spec.second_moment_index]
            dtype = compute_dtype(row.work.dtype)
            param, grad = row.value.to(dtype), grad.to(dtype)
            hyper = plan.groups.hypers[row.group]
            _, weight_decay = hyper.rates_at(0)
            exp_avg_sq.copy_(rules.init_exp_avg_sq(param, grad, hyper, weight_decay, clip_coef))
            self.state[row.param]["initialized"] = True
        plan.finish()
        self.session.reset()


class AdamW(Adam):
    """Adam with decoupled weight decay, 0.01 by default.

    Args:
        params: Parameters or groups.
        lr: Learning rate, >= 0.
        betas: Coefficients of the two averages, each in [0, 1).
        eps: Added outside the square root, >= 0.
        weight_decay: Decoupled decay, >= 0.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend.
        exp_avg_sq_init: As for ``Adam``.
        exp_avg_sq_init_scale: As for ``Adam``.
        options: Options of every optimizer, see ``FusedOptimizer``.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    fixed: ClassVar[Mapping[str, Any]] = {"decoupled_weight_decay": True}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        exp_avg_sq_init: str = "zeros",
        exp_avg_sq_init_scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        start = {"exp_avg_sq_init": exp_avg_sq_init, "exp_avg_sq_init_scale": exp_avg_sq_init_scale}
        given = {"maximize": maximize, **start, **self.fixed, **options}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **given)


class GIAdam(Adam):
    """Gradient-initialised Adam: Adam whose second moment starts at the square of the first gradient.

    The bias correction stays, so the effective learning rate warms up as ``sqrt(1 - beta2**t)``.

    Args:
        params: Parameters or groups.
        lr: Learning rate, >= 0.
        betas: Coefficients of the two averages, each in [0, 1).
        eps: Added outside the square root, >= 0.
        weight_decay: L2 penalty or decoupled decay, >= 0.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend.
        decoupled_weight_decay: Decay as AdamW does.
        exp_avg_sq_init_scale: Multiplies the start value, >= 0.
        options: Options of every optimizer, see ``FusedOptimizer``.

    Source: Kalra & Barkeshli 2024, arXiv:2406.09405, section 6.
    """

    fixed: ClassVar[Mapping[str, Any]] = {"exp_avg_sq_init": "grad"}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        exp_avg_sq_init_scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        start = {"exp_avg_sq_init_scale": exp_avg_sq_init_scale, **self.fixed}
        given = {"maximize": maximize, "decoupled_weight_decay": decoupled_weight_decay, **start, **options}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **given)

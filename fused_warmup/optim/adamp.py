"""AdamP and SGDP: updates without the component along the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import required

from .. import _checks as check
from ..plan.hyper import Hyper
from ..plan.spec import RuleSpec
from ..reference import rules
from .base import FusedOptimizer, Options, Params
from .hyper import averages, projection, shared

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _adamp_hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
    """Return the validated hyper-parameters of a group of AdamP."""
    return Hyper(**averages(owner, group), **projection(owner, group))


class AdamP(FusedOptimizer):
    """AdamW without the radial component of the update for scale-invariant weights.

    Where the cosine of gradient and parameter is below ``delta / sqrt(n)`` in every output channel of ``n``
    elements (the first dimension counts them), each channel of the update is made orthogonal to that of the
    parameter; else the whole tensor is, if its cosine is that small. Decay is multiplied by ``wd_ratio``
    then. The choice is made anew at every step, on the device. Parameters of one dimension are not projected.

    Args:
        params: Parameters or groups.
        lr: Learning rate, >= 0.
        betas: Coefficients of the two averages, each in [0, 1).
        eps: Added outside the square root, and a lower bound of the norms in the cosines, >= 0.
        weight_decay: Decoupled decay, >= 0.
        delta: Threshold of the cosines, >= 0; 0 never projects.
        wd_ratio: Decay of projected parameters over that of others, >= 0.
        nesterov: Look one gradient ahead.
        maximize: Ascend.
        options: Options of every optimizer, see ``FusedOptimizer``.

    Source: Heo et al. 2021, arXiv:2006.08217.
    """

    spec: ClassVar[RuleSpec] = RuleSpec(rules.AdamP, ("exp_avg", "exp_avg_sq"), _adamp_hyper)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)


def _sgdp_hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
    """Return the validated hyper-parameters of a group of SGDP."""
    return Hyper(
        **shared(owner, group),
        **projection(owner, group),
        eps=check.number(owner, "eps", group["eps"]),
        momentum=check.number(owner, "momentum", group["momentum"], 0.0, 1.0),
        dampening=check.number(owner, "dampening", group["dampening"], float("-inf")),
    )


class SGDP(FusedOptimizer):
    """Momentum with the projection of ``AdamP``.

    Decay is decoupled, ``param -= lr * weight_decay / (1 - momentum) * param``, about as strong as an L2
    penalty that goes through the momentum. The buffer itself is not projected, as in the paper; the authors'
    package does so by accident where ``nesterov`` is False.

    Args:
        params: Parameters or groups.
        lr: Learning rate, >= 0; may be left out where each group has its own.
        momentum: Coefficient of the buffer, in [0, 1); 0 keeps no buffer.
        dampening: The gradient enters the buffer times ``1 - dampening``, at the first step too.
        weight_decay: Decoupled decay, >= 0.
        nesterov: Look ahead.
        eps: Lower bound of the norms in the cosines, >= 0.
        delta: Threshold of the cosines, >= 0; 0 never projects.
        wd_ratio: Decay of projected parameters over that of others, >= 0.
        maximize: Ascend.
        options: Options of every optimizer, see ``FusedOptimizer``.

    Source: Heo et al. 2021, arXiv:2006.08217.
    """

    spec: ClassVar[RuleSpec] = RuleSpec(
        rules.SGDP,
        ("momentum_buffer",),
        _sgdp_hyper,
        n_states=lambda group: 1 if group["momentum"] != 0.0 else 0,
        first_gradient="momentum_buffer",
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = required,  # type: ignore[assignment]
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

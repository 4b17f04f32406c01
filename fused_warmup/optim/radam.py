"""Rectified Adam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import _checks as check
from ..plan.hyper import Hyper
from ..plan.spec import RuleSpec
from ..reference import rules
from .base import FusedOptimizer, Options, Params
from .hyper import moments

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
    """Return the validated hyper-parameters of a group of RAdam."""
    threshold = check.number(owner, "rho_threshold", group["rho_threshold"], 4.0)
    skip = check.one_of(owner, "unrectified", group["unrectified"], ("momentum", "skip")) == "skip"
    return Hyper(**moments(owner, group), rho_threshold=threshold, skip_unrectified=skip)


class RAdam(FusedOptimizer):
    """Rectified Adam: the adaptive rate is scaled by a ratio of variances, and omitted while that diverges.

    Args:
        params: Parameters or groups.
        lr: Learning rate, >= 0.
        betas: Coefficients of the two averages, each in [0, 1).
        eps: Added to the root of the uncorrected second moment, as torch does, >= 0.
        weight_decay: L2 penalty or decoupled decay, >= 0.
        decoupled_weight_decay: Decay as AdamW does.
        maximize: Ascend.
        rho_threshold: The adaptive rate is used when ``rho_t`` exceeds it, >= 4: 5 is that of torch
            and of the authors' code, 4 that of the paper.
        unrectified: Update before that: ``"momentum"`` updates without the adaptive rate, as the paper and
            torch do; ``"skip"`` updates the moments only, as the authors' package does.
        options: Options of every optimizer, see ``FusedOptimizer``.

    Source: Liu et al. 2020, arXiv:1908.03265, algorithm 2.
    """

    spec: ClassVar[RuleSpec] = RuleSpec(
        rules.RAdam, ("exp_avg", "exp_avg_sq"), _hyper, second_moment="exp_avg_sq"
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        rho_threshold: float = 5.0,
        unrectified: str = "momentum",
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "rho_threshold": rho_threshold,
            "unrectified": unrectified,
        }
        super().__init__(params, defaults, **options)

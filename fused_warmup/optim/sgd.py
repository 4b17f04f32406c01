"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import _checks as check
from ..plan.hyper import Hyper
from ..plan.spec import RuleSpec
from ..reference import rules
from .base import FusedOptimizer, Options, Params
from .hyper import shared

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
    """Return the validated hyper-parameters of a group of SGD."""
    momentum = check.number(owner, "momentum", group["momentum"])
    dampening = check.number(owner, "dampening", group["dampening"], float("-inf"))
    nesterov = check.flag(owner, "nesterov", group["nesterov"])
    if nesterov and (momentum == 0.0 or dampening != 0.0):
        check.fail(owner, "nesterov", "be False unless momentum > 0 and dampening = 0", nesterov)
    return Hyper(**shared(owner, group), momentum=momentum, dampening=dampening, nesterov=nesterov)


class SGD(FusedOptimizer):
    """Gradient descent with heavy-ball or Nesterov momentum, as ``torch.optim.SGD``.

    Args:
        params: Parameters or groups.
        lr: Learning rate, >= 0.
        momentum: Coefficient of the buffer, >= 0; 0 keeps no buffer.
        dampening: The gradient enters the buffer times ``1 - dampening``, except at the first step.
        weight_decay: L2 penalty, >= 0.
        nesterov: Look ahead; needs momentum and no dampening.
        maximize: Ascend.
        options: Options of every optimizer, see ``FusedOptimizer``.

    Sparse gradients are made dense, so such a step moves the whole parameter; the other rules refuse them.

    Source: Sutskever et al. 2013, in torch's form ``param -= lr * buffer``.
    """

    spec: ClassVar[RuleSpec] = RuleSpec(
        rules.SGD,
        ("momentum_buffer",),
        _hyper,
        n_states=lambda group: 1 if group["momentum"] != 0.0 else 0,
        first_gradient="momentum_buffer",
        takes_sparse=True,
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

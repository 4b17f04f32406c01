"""LAMB: Adam with a trust ratio for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import _checks as check
from ..plan.hyper import Hyper
from ..plan.spec import RuleSpec
from ..reference import rules
from .base import FusedOptimizer, Options, Params
from .hyper import averages

if TYPE_CHECKING:
    from typing_extensions import Unpack


# defaults of the options by preset
_LAMB_PRESETS: dict[str | None, dict[str, Any]] = {
    None: {"always_adapt": False, "trust_clip": math.inf, "max_grad_norm": None},
    "paper": {"always_adapt": True, "trust_clip": math.inf, "max_grad_norm": None},
    "apex": {"always_adapt": False, "trust_clip": math.inf, "max_grad_norm": 1.0},
    "nvlamb": {"always_adapt": True, "trust_clip": math.inf, "max_grad_norm": 1.0},
    "lambc": {"always_adapt": True, "trust_clip": 1.0, "max_grad_norm": None},
}
_DECAY_MODES = ("update", "gradient", "decoupled")


def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
    """Return the validated hyper-parameters of a group of LAMB."""
    always, clip = check.flag(owner, "always_adapt", group["always_adapt"]), group["trust_clip"]
    if clip != math.inf:
        clip = check.number(owner, "trust_clip", clip, ends="()")
    low, high = _bounds(owner, "norm_clip", group["norm_clip"])
    mode = check.one_of(owner, "decay_mode", group["decay_mode"], _DECAY_MODES)
    common = averages(owner, group)
    return Hyper(
        **common,
        bias_correction=check.flag(owner, "bias_correction", group["bias_correction"]),
        grad_averaging=check.flag(owner, "grad_averaging", group["grad_averaging"]),
        trust_clip=clip,
        min_norm=low,
        max_norm=high,
        adapts=always or common["weight_decay"] != 0.0,
        decays_update=mode == "update",
        decoupled=mode == "decoupled",
    )


class LAMB(FusedOptimizer):
    """Adam whose update is scaled to the norm of its layer: ``param -= lr * ||param|| / ||u|| * u``.

    ``u = m_hat / (sqrt(v_hat) + eps) + weight_decay * param``, and a layer is a parameter tensor, whole. The
    ratio of the norms is 1 where one of them is 0, and where ``weight_decay`` is 0 unless ``always_adapt``.

    Args:
        params: Parameters or groups.
        lr: Learning rate, >= 0: without clipping, the relative step ``||step|| / ||param||`` of each layer.
        betas: Coefficients of the two averages, each in [0, 1).
        eps: Added outside the square root, >= 0.
        weight_decay: Decay, >= 0.
        bias_correction: Divide the averages by ``1 - beta**t``.
        grad_averaging: The gradient enters the first average times ``1 - beta1``, else whole.
        trust_clip: Upper bound of the ratio, > 0; infinity has none, None is as the preset says.
        always_adapt: Scale the update without weight decay too; None is as the preset says.
        norm_clip: Lower and upper bound of ``||param||`` in the ratio, or None.
        decay_mode: ``"update"`` decays inside the update, before its norm; ``"gradient"`` is an L2 penalty;
            ``"decoupled"`` is as for AdamW, and in no norm: the ratio has the norm that the parameter has
            before its decay. timm's ``decoupled_decay`` takes it afterwards, which is a factor
            ``1 - lr * weight_decay`` in the ratio.
        maximize: Ascend.
        preset: ``"paper"`` always adapts; ``"apex"`` clips gradients to norm 1 and adapts where there is
            weight decay; ``"nvlamb"`` clips and always adapts; ``"lambc"`` always adapts, with ratios of at
            most 1. Explicit arguments override it. Without one: that of apex without clipping.
        options: Options of every optimizer, see ``FusedOptimizer``.

    Source: You et al. 2020, arXiv:1904.00962, algorithm 2, and the FusedLAMB of NVIDIA's Apex.
    """

    spec: ClassVar[RuleSpec] = RuleSpec(rules.LAMB, ("exp_avg", "exp_avg_sq"), _hyper)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        trust_clip: float | None = None,
        always_adapt: bool | None = None,
        norm_clip: tuple[float, float] | None = None,
        decay_mode: str = "update",
        maximize: bool = False,
        preset: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        if preset is not None:
            check.one_of(type(self).__name__, "preset", preset, [p for p in _LAMB_PRESETS if p is not None])
        usual = _LAMB_PRESETS[preset]
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "trust_clip": usual["trust_clip"] if trust_clip is None else trust_clip,
            "always_adapt": usual["always_adapt"] if always_adapt is None else always_adapt,
            "norm_clip": norm_clip,
            "decay_mode": decay_mode,
            "maximize": maximize,
        }
        options.setdefault("max_grad_norm", usual["max_grad_norm"])
        super().__init__(params, defaults, **options)


def _bounds(owner: str, name: str, value: Any) -> tuple[float, float]:
    """Return ``(low, high)`` of an optional interval of numbers >= 0; ``(0, inf)`` for None."""
    if value is None:
        return 0.0, math.inf
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
        check.fail(owner, name, "be a pair of numbers or None", value, error=TypeError)
    low = check.number(owner, f"{name}[0]", value[0])
    high = value[1] if value[1] == math.inf else check.number(owner, f"{name}[1]", value[1], low, ends="[)")
    return low, high

"""The optimizers: ``torch.optim`` signatures over one fused step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import required

from . import _checks as check
from .optimizer import FusedOptimizer, Options, Params
from .reference.rules import init_exp_avg_sq
from .table import INIT_KINDS, Hyper

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAMB", "SGD", "SGDP", "Adam", "AdamP", "AdamW", "GIAdam", "RAdam"]


def _shared(owner: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters that every rule has."""
    return {
        "lr": check.number(owner, "lr", group["lr"]),
        "weight_decay": check.number(owner, "weight_decay", group["weight_decay"]),
        "maximize": check.flag(owner, "maximize", group["maximize"]),
    }


def _averages(owner: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of rules with two moments."""
    beta1, beta2 = check.betas(owner, group["betas"])
    eps = check.number(owner, "eps", group["eps"])
    return {**_shared(owner, group), "beta1": beta1, "beta2": beta2, "eps": eps}


def _moments(owner: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of rules that decay in one of two ways."""
    decoupled = check.flag(owner, "decoupled_weight_decay", group["decoupled_weight_decay"])
    return {**_averages(owner, group), "decoupled": decoupled}


def _projection(owner: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a projected update, which decays apart from the gradient."""
    delta = check.number(owner, "delta", group["delta"])
    wd_ratio = check.number(owner, "wd_ratio", group["wd_ratio"])
    nesterov = check.flag(owner, "nesterov", group["nesterov"])
    return {"delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov, "decoupled": True}


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
        options: What every optimizer takes, see ``FusedOptimizer``.

    Source: Kingma & Ba 2015, arXiv:1412.6980; initialisation: Kalra & Barkeshli 2024, arXiv:2406.09405.
    """

    rule = "Adam"

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

    @staticmethod
    def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]

    @staticmethod
    def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
        check.flag(owner, "amsgrad", group["amsgrad"])
        init = check.one_of(owner, "exp_avg_sq_init", group["exp_avg_sq_init"], INIT_KINDS)
        scale = check.number(owner, "exp_avg_sq_init_scale", group["exp_avg_sq_init_scale"])
        return Hyper(**_moments(owner, group), init=init, init_scale=scale)

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
        plan, _ = self._prepared_plan()
        active = [(row, grad) for row, grad in zip(plan.rows, plan.grads, strict=True) if grad is not None]
        if not active:
            check.fail(name, ".grad", "hold a gradient for some parameter", None)
        norm = torch.stack([grad.to(torch.float64).norm() for _, grad in active]).norm().item()
        if norm - norm != 0.0:
            check.fail(name, ".grad", "be finite", norm)
        if any(int(row.counters.step) for row, _ in active):
            raise RuntimeError(f"{name}: init_from_gradients() must come before the first step.")
        clip_coef = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))
        for row, grad in active:
            exp_avg_sq = row.states[1]
            param, grad = row.work.to(exp_avg_sq.dtype), grad.to(exp_avg_sq.dtype)
            h = plan.hypers[row.group]
            weight_decay = h.weight_decay * (h.weight_decay_schedule(0) if h.weight_decay_schedule else 1.0)
            exp_avg_sq.copy_(init_exp_avg_sq(param, grad, h, weight_decay, clip_coef))
            self._session.state[row.param]["initialized"] = True
        plan.finish()
        self._session.reset()


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
        options: What every optimizer takes, see ``FusedOptimizer``.

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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=True,
            exp_avg_sq_init=exp_avg_sq_init,
            exp_avg_sq_init_scale=exp_avg_sq_init_scale,
            **options,
        )


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
        options: What every optimizer takes, see ``FusedOptimizer``.

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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
            exp_avg_sq_init="grad",
            exp_avg_sq_init_scale=exp_avg_sq_init_scale,
            **options,
        )


class RAdam(FusedOptimizer):
    """Rectified Adam: the adaptive rate is scaled by a ratio of variances, and left out while that diverges.

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
        unrectified: What happens before: ``"momentum"`` updates without the adaptive rate, as the paper and
            torch do; ``"skip"`` updates the moments only, as the authors' package does.
        options: What every optimizer takes, see ``FusedOptimizer``.

    Source: Liu et al. 2020, arXiv:1908.03265, algorithm 2.
    """

    rule = "RAdam"

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

    @staticmethod
    def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @staticmethod
    def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
        threshold = check.number(owner, "rho_threshold", group["rho_threshold"], 4.0)
        skip = check.one_of(owner, "unrectified", group["unrectified"], ("momentum", "skip")) == "skip"
        return Hyper(**_moments(owner, group), rho_threshold=threshold, skip_unrectified=skip)


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
        options: What every optimizer takes, see ``FusedOptimizer``.

    Sparse gradients are made dense, so such a step moves the whole parameter; the other rules refuse them.

    Source: Sutskever et al. 2013, in torch's form ``param -= lr * buffer``.
    """

    rule = "SGD"
    takes_sparse: ClassVar[bool] = True

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

    @staticmethod
    def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0.0 else ()

    @staticmethod
    def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
        momentum = check.number(owner, "momentum", group["momentum"])
        dampening = check.number(owner, "dampening", group["dampening"], float("-inf"))
        nesterov = check.flag(owner, "nesterov", group["nesterov"])
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            check.fail(owner, "nesterov", "be False unless momentum > 0 and dampening = 0", nesterov)
        return Hyper(**_shared(owner, group), momentum=momentum, dampening=dampening, nesterov=nesterov)


# what the options of LAMB are where nobody gives them
_LAMB_PRESETS: dict[str | None, dict[str, Any]] = {
    None: {"always_adapt": False, "trust_clip": math.inf, "max_grad_norm": None},
    "paper": {"always_adapt": True, "trust_clip": math.inf, "max_grad_norm": None},
    "apex": {"always_adapt": False, "trust_clip": math.inf, "max_grad_norm": 1.0},
    "nvlamb": {"always_adapt": True, "trust_clip": math.inf, "max_grad_norm": 1.0},
    "lambc": {"always_adapt": True, "trust_clip": 1.0, "max_grad_norm": None},
}
_DECAY_MODES = ("update", "gradient", "decoupled")


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
            most 1. What is given beside it wins. Without one: that of apex without clipping.
        options: What every optimizer takes, see ``FusedOptimizer``.

    Source: You et al. 2020, arXiv:1904.00962, algorithm 2, and the FusedLAMB of NVIDIA's Apex.
    """

    rule = "LAMB"

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

    @staticmethod
    def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @staticmethod
    def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
        always, clip = check.flag(owner, "always_adapt", group["always_adapt"]), group["trust_clip"]
        if clip != math.inf:
            clip = check.number(owner, "trust_clip", clip, ends="()")
        low, high = _bounds(owner, "norm_clip", group["norm_clip"])
        mode = check.one_of(owner, "decay_mode", group["decay_mode"], _DECAY_MODES)
        averages = _averages(owner, group)
        return Hyper(
            **averages,
            bias_correction=check.flag(owner, "bias_correction", group["bias_correction"]),
            grad_averaging=check.flag(owner, "grad_averaging", group["grad_averaging"]),
            trust_clip=clip,
            min_norm=low,
            max_norm=high,
            adapts=always or averages["weight_decay"] != 0.0,
            decays_update=mode == "update",
            decoupled=mode == "decoupled",
        )


def _bounds(owner: str, name: str, value: Any) -> tuple[float, float]:
    """Return the ends of an interval of numbers >= 0; of all of them for None."""
    if value is None:
        return 0.0, math.inf
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
        check.fail(owner, name, "be a pair of numbers or None", value, error=TypeError)
    low = check.number(owner, f"{name}[0]", value[0])
    high = value[1] if value[1] == math.inf else check.number(owner, f"{name}[1]", value[1], low, ends="[)")
    return low, high


class AdamP(FusedOptimizer):
    """AdamW that takes the part along the parameter out of the update where the loss ignores its scale.

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
        options: What every optimizer takes, see ``FusedOptimizer``.

    Source: Heo et al. 2021, arXiv:2006.08217.
    """

    rule = "AdamP"

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

    @staticmethod
    def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @staticmethod
    def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
        return Hyper(**_averages(owner, group), **_projection(owner, group))


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
        options: What every optimizer takes, see ``FusedOptimizer``.

    Source: Heo et al. 2021, arXiv:2006.08217.
    """

    rule = "SGDP"

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

    @staticmethod
    def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0.0 else ()

    @staticmethod
    def _hyper(owner: str, group: Mapping[str, Any]) -> Hyper:
        return Hyper(
            **_shared(owner, group),
            **_projection(owner, group),
            eps=check.number(owner, "eps", group["eps"]),
            momentum=check.number(owner, "momentum", group["momentum"], 0.0, 1.0),
            dampening=check.number(owner, "dampening", group["dampening"], float("-inf")),
        )

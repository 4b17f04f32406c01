"""Update rules as the papers state them; the statements of ``csrc/rules.h`` in the same order.

An element-wise rule has ``scalars``, Python floats shared by all elements, and ``update``, which takes
tensors of one shape and dtype and returns the new parameter and states without changing its arguments. A rule
that needs sums over a layer updates in stages instead: ``update_moments`` returns the new states and
``direction`` the update; ``reductions`` returns the products whose sums ``layer_scalars`` and
``projection_coef`` use; ``apply`` returns the new parameter. ``lr_norm_power`` is the power of the norm of
scale-invariant weights that the learning rate must grow with to keep the angle of a step.

Adam: Kingma & Ba 2015. Gradient initialisation: Kalra & Barkeshli 2024, arXiv:2406.09405.
RAdam: Liu et al. 2020, arXiv:1908.03265. SGD: heavy ball; as in torch, the first step is not dampened.
LAMB: You et al. 2020, arXiv:1904.00962. AdamP and SGDP: Heo et al. 2021, arXiv:2006.08217.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


@dataclass
class Hyper:
    """Validated hyper-parameters of one parameter group, before schedules.

    The fields are those of the struct ``Hyper`` of ``csrc/table.h``: floats are doubles there, others int32.
    """

    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    rho_threshold: float = 0.0
    init_scale: float = 1.0
    delta: float = 0.0
    wd_ratio: float = 0.0
    min_norm: float = 0.0
    max_norm: float = math.inf
    trust_clip: float = math.inf
    init: str = "zeros"
    decoupled: bool = False
    maximize: bool = False
    nesterov: bool = False
    skip_unrectified: bool = False
    bias_correction: bool = True
    grad_averaging: bool = True
    adapts: bool = True
    decays_update: bool = False


@dataclass
class Scalars:
    """Scalars of the update of one tensor, in double precision."""

    grad_scale: float = 1.0
    weight_decay: float = 0.0
    decoupled_decay: float = 0.0
    exp_avg_weight: float = 0.0
    exp_avg_sq_weight: float = 0.0
    step_size: float = 0.0
    denom_scale: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    one_minus_dampening: float = 0.0
    rect: float = 1.0
    exp_avg_sq_from_grad: float = 0.0
    exp_avg_sq_scale: float = 1.0
    nesterov: float = 0.0
    inv_bias_correction1: float = 0.0
    grad_weight: float = 0.0
    update_decay: float = 0.0


def bias_correction(beta: float, step: int) -> float:
    """Return ``1 - beta**step`` without the cancellation of the direct form at the first steps."""
    return -math.expm1(step * math.log(beta)) if beta > 0.0 else 1.0


def sma_length(beta2: float, step: int) -> float:
    """Return the length rho_t of the simple moving average with the exponential one's centre of mass."""
    bias_correction2 = bias_correction(beta2, step)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    return rho_inf - 2.0 * step * (1.0 - bias_correction2) / bias_correction2


def rectification(beta2: float, rho: float) -> float:
    """Return the ratio r_t of the standard deviations of the adaptive rate, in the limit and at this step."""
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    return math.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))


def lerp_weight(beta: float) -> float:
    """Return the weight ``1 - beta`` of a new value for ``lerp``, minus 1 if it is above one half.

    The latter is ``-beta`` exactly, where ``1 - beta`` may round to 1.
    """
    return -beta if beta < 0.5 else 1.0 - beta


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Interpolate from ``start`` to ``end``; a weight above one half is given minus 1, so it is negative.

    The form with a difference leaves no drift when the weight is rounded, and adding it to the end with the
    larger weight avoids cancellation.
    """
    return (start if weight > 0.0 else end) + weight * (end - start)


def common_scalars(h: Hyper, effective_lr: float, weight_decay: float, clip_coef: float) -> Scalars:
    """Return the scalars that all rules share: clipping, then sign, then coupled or decoupled decay."""
    s = Scalars()
    s.grad_scale = -clip_coef if h.maximize else clip_coef
    s.weight_decay = 0.0 if h.decoupled else weight_decay
    s.decoupled_decay = effective_lr * weight_decay if h.decoupled else 0.0
    s.exp_avg_weight = lerp_weight(h.beta1)
    s.exp_avg_sq_weight = lerp_weight(h.beta2)
    s.eps = h.eps
    s.rect = 1.0
    s.exp_avg_sq_scale = 1.0
    return s


def clip_coefficient(grad_norm: float, max_grad_norm: float) -> float:
    """Return the factor that limits the norm of all gradients to ``max_grad_norm``.

    A NaN norm gives NaN, as in ``torch.nn.utils.clip_grad_norm_``.
    """
    ratio = max_grad_norm / (grad_norm + 1e-6)
    return 1.0 if ratio >= 1.0 else ratio


def start_exp_avg_sq(
    h: Hyper, step: int, initialized: bool, grad_norm: float, init_norm_sq: float, s: Scalars
) -> None:
    """Set the second moment before the first update of a parameter.

    Either ``init_scale * g**2``, or a random state scaled so that its sum is ``init_scale`` times the squared
    norm of all clipped gradients.

    Args:
        h: Hyper-parameters.
        step: Number of the update, from 1.
        initialized: Whether the state has been set before.
        grad_norm: L2 norm of all gradients after clipping.
        init_norm_sq: Sum of the random state over all parameters.
        s: Scalars to change.

    Source: Kalra & Barkeshli 2024, arXiv:2406.09405.
    """
    first = step == 1 and not initialized
    if first and h.init == "grad":
        s.exp_avg_sq_from_grad = h.init_scale
    if first and h.init == "random":
        s.exp_avg_sq_scale = h.init_scale * grad_norm * grad_norm / init_norm_sq


class Rule(Protocol):
    """An element-wise rule: scalars once per step, update per element."""

    min_states: ClassVar[int]
    max_states: ClassVar[int]
    # whether the step divides the first moment by a diagonal; with the thresholds, for sharpness alone
    preconditioned: ClassVar[bool]

    @staticmethod
    def lr_norm_power(h: Any, step: int) -> int:
        """Return the exponent of the norm at update number ``step``: 0, 1 or 2."""

    @staticmethod
    def scalars(h: Any, effective_lr: float, step: int, s: Scalars) -> None:
        """Fill ``s`` for update number ``step`` (from 1) at learning rate ``effective_lr``."""

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the new parameter and the new states."""


class LayerRule(Protocol):
    """A rule that needs sums over the elements of a layer, or of each of its output channels."""

    min_states: ClassVar[int]
    max_states: ClassVar[int]
    n_sums: ClassVar[int]
    projects: ClassVar[bool]

    @staticmethod
    def lr_norm_power(h: Any, step: int) -> int:
        """Return the exponent of the norm at update number ``step``: 0, 1 or 2."""

    @staticmethod
    def scalars(h: Any, effective_lr: float, step: int, s: Scalars) -> None:
        """Fill ``s`` for update number ``step`` (from 1) at learning rate ``effective_lr``."""

    @staticmethod
    def needs_grad(h: Any, n_states: int) -> bool:
        """Return whether ``direction`` needs the gradient in addition to the states."""

    @staticmethod
    def update_moments(param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars) -> list[Tensor]:
        """Return the new states."""

    @staticmethod
    def direction(param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars) -> Tensor:
        """Return the update from the new states, with the sign that is subtracted."""

    @staticmethod
    def reductions(param: Tensor, grad: Tensor, update: Tensor, s: Scalars) -> list[Tensor]:
        """Return the products that are summed over a layer or a channel."""

    @staticmethod
    def scale_invariant(h: Any, sums: Sequence[float], size: int) -> bool:
        """Return whether the sums over ``size`` elements show a gradient orthogonal to the parameter."""

    @staticmethod
    def projection_coef(h: Any, sums: Sequence[float]) -> float:
        """Return the multiple of the parameter that the projection subtracts from the update."""

    @staticmethod
    def layer_scalars(h: Any, sums: Sequence[float], projected: bool, s: Scalars) -> None:
        """Change ``s`` according to the sums over the layer."""

    @staticmethod
    def apply(param: Tensor, update: Tensor, projection_coef: Tensor, s: Scalars) -> Tensor:
        """Return the new parameter."""


class Adam:
    """Adam, AdamW, AMSGrad and Adam with an initialised second moment."""

    min_states: ClassVar[int] = 2
    max_states: ClassVar[int] = 3
    preconditioned: ClassVar[bool] = True

    @staticmethod
    def stability_threshold(h: Hyper) -> float:
        """Return the largest stable ``lr * eigenvalue`` of ``P^-1 H`` with momentum (Cohen et al. 2022)."""
        return 2.0 * (1.0 + h.beta1) / (1.0 - h.beta1)

    @staticmethod
    def early_stability_threshold(h: Hyper) -> float:
        """Return the largest stable ``lr * eigenvalue`` at the first step, before momentum has built up."""
        return 2.0 / (1.0 - h.beta1)

    @staticmethod
    def lr_norm_power(h: Hyper, step: int) -> int:
        """Return 1: Adam's update is invariant to the scale of the gradient."""
        return 1

    @staticmethod
    def scalars(h: Hyper, effective_lr: float, step: int, s: Scalars) -> None:
        """Set the bias corrections of both moments."""
        s.step_size = effective_lr / bias_correction(h.beta1, step)
        s.denom_scale = 1.0 / math.sqrt(bias_correction(h.beta2, step))

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars
    ) -> tuple[Tensor, list[Tensor]]:
        """Return one step of Adam, or of AMSGrad with a third state."""
        exp_avg, exp_avg_sq = state[0], state[1]
        grad = grad * s.grad_scale + s.weight_decay * param
        # at the first step, v_0 = g_0^2 or the scaled initial state (eq. 6 of Kalra & Barkeshli)
        exp_avg_sq = (
            s.exp_avg_sq_from_grad * (grad * grad)
            if s.exp_avg_sq_from_grad > 0.0
            else s.exp_avg_sq_scale * exp_avg_sq
        )
        exp_avg = lerp(exp_avg, grad, s.exp_avg_weight)
        exp_avg_sq = lerp(exp_avg_sq, grad * grad, s.exp_avg_sq_weight)
        new_state = [exp_avg, exp_avg_sq]
        if len(state) == 3:
            exp_avg_sq = torch.maximum(exp_avg_sq, state[2])
            new_state.append(exp_avg_sq)
        denom = exp_avg_sq.sqrt() * s.denom_scale + s.eps
        param = param - (s.decoupled_decay * param + s.step_size * exp_avg / denom)
        return param, new_state


class RAdam:
    """Adam with a rectified adaptive rate."""

    min_states: ClassVar[int] = 2
    max_states: ClassVar[int] = 2
    preconditioned: ClassVar[bool] = True
    stability_threshold = staticmethod(Adam.stability_threshold)
    early_stability_threshold = staticmethod(Adam.early_stability_threshold)

    @staticmethod
    def lr_norm_power(h: Hyper, step: int) -> int:
        """Return 2 for an unrectified step, which shrinks with the gradient as that of SGD, and else 1."""
        return 1 if sma_length(h.beta2, step) > h.rho_threshold else 2

    @staticmethod
    def scalars(h: Hyper, effective_lr: float, step: int, s: Scalars) -> None:
        """Set the rectified step size, or that of the fallback while the variance is intractable."""
        bias_correction1 = bias_correction(h.beta1, step)
        rho = sma_length(h.beta2, step)
        rectified = rho > h.rho_threshold
        rect = rectification(h.beta2, rho) if rectified else 0.0
        fallback = 0.0 if h.skip_unrectified else 1.0
        s.rect = rect
        s.step_size = (
            effective_lr
            / bias_correction1
            * (rect * math.sqrt(bias_correction(h.beta2, step)) if rectified else fallback)
        )
        s.decoupled_decay = s.decoupled_decay if rectified else s.decoupled_decay * fallback

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars
    ) -> tuple[Tensor, list[Tensor]]:
        """Return one step of RAdam, by momentum without a denominator while unrectified."""
        exp_avg, exp_avg_sq = state[0], state[1]
        grad = grad * s.grad_scale + s.weight_decay * param
        exp_avg = lerp(exp_avg, grad, s.exp_avg_weight)
        exp_avg_sq = lerp(exp_avg_sq, grad * grad, s.exp_avg_sq_weight)
        denom = exp_avg_sq.sqrt() + s.eps if s.rect > 0.0 else torch.ones_like(exp_avg_sq)
        param = param - (s.decoupled_decay * param + s.step_size * exp_avg / denom)
        return param, [exp_avg, exp_avg_sq]


class SGD:
    """Gradient descent with heavy-ball or Nesterov momentum."""

    min_states: ClassVar[int] = 0
    max_states: ClassVar[int] = 1
    preconditioned: ClassVar[bool] = False

    @staticmethod
    def stability_threshold(h: Hyper) -> float:
        """Return the largest stable ``lr * eigenvalue`` of the Hessian, with either kind of momentum."""
        if h.nesterov:
            return 2.0 * (1.0 + h.momentum) / (1.0 + 2.0 * h.momentum)
        return 2.0 * (1.0 + h.momentum) / (1.0 - h.dampening if h.momentum else 1.0)

    @staticmethod
    def early_stability_threshold(h: Hyper) -> float:
        """Return the largest stable ``lr * eigenvalue`` at the first step, before momentum has built up."""
        return 2.0 / (1.0 + h.momentum) if h.nesterov else 2.0

    @staticmethod
    def lr_norm_power(h: Hyper, step: int) -> int:
        """Return 2: the gradient shrinks with the norm, and larger weights need larger steps for an angle."""
        return 2

    @staticmethod
    def scalars(h: Hyper, effective_lr: float, step: int, s: Scalars) -> None:
        """Set the dampening, from which the first gradient is exempt."""
        s.step_size = effective_lr
        s.momentum = h.momentum
        s.one_minus_dampening = 1.0 if step == 1 else 1.0 - h.dampening
        s.nesterov = 1.0 if h.nesterov else 0.0

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars
    ) -> tuple[Tensor, list[Tensor]]:
        """Return one step of SGD, with momentum if there is a buffer."""
        grad = grad * s.grad_scale + s.weight_decay * param
        new_state = []
        if len(state) == 1:
            momentum_buffer = s.momentum * state[0] + s.one_minus_dampening * grad
            new_state.append(momentum_buffer)
            grad = grad + s.momentum * momentum_buffer if s.nesterov else momentum_buffer
        param = param - s.step_size * grad
        return param, new_state


def bounded(x: float, low: float, high: float) -> float:
    """Clamp ``x`` to an interval; NaN stays."""
    x = low if x < low else x
    return high if x > high else x


class LAMB:
    """Adam with each layer's update scaled to the norm of its parameter."""

    min_states: ClassVar[int] = 2
    max_states: ClassVar[int] = 2
    n_sums: ClassVar[int] = 2
    projects: ClassVar[bool] = False

    @staticmethod
    def lr_norm_power(h: Hyper, step: int) -> int:
        """Return 0 with a trust ratio, which already scales the step with the parameter norm."""
        return 0 if h.adapts else 1

    @staticmethod
    def scalars(h: Hyper, effective_lr: float, step: int, s: Scalars) -> None:
        """Set optional bias corrections, and weight decay inside or outside the update."""
        s.step_size = effective_lr
        s.inv_bias_correction1 = 1.0 / bias_correction(h.beta1, step) if h.bias_correction else 1.0
        s.denom_scale = 1.0 / math.sqrt(bias_correction(h.beta2, step)) if h.bias_correction else 1.0
        # 1 if the first moment is an average, 1 / (1 - beta1) if it is a sum
        s.grad_weight = 1.0 if h.grad_averaging else 1.0 / (1.0 - h.beta1)
        s.update_decay = s.weight_decay if h.decays_update else 0.0
        s.weight_decay = 0.0 if h.decays_update else s.weight_decay

    @staticmethod
    def needs_grad(h: Hyper, n_states: int) -> bool:
        """Return False: the update can be recomputed from the states alone."""
        return False

    @staticmethod
    def update_moments(param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars) -> list[Tensor]:
        """Return the updated first and second moments."""
        grad = grad * s.grad_scale + s.weight_decay * param
        exp_avg = lerp(state[0], s.grad_weight * grad, s.exp_avg_weight)
        exp_avg_sq = lerp(state[1], grad * grad, s.exp_avg_sq_weight)
        return [exp_avg, exp_avg_sq]

    @staticmethod
    def direction(param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars) -> Tensor:
        """Return Adam's update, with weight decay if ``decays_update``."""
        denom = state[1].sqrt() * s.denom_scale + s.eps
        return s.update_decay * param + s.inv_bias_correction1 * state[0] / denom

    @staticmethod
    def reductions(param: Tensor, grad: Tensor, update: Tensor, s: Scalars) -> list[Tensor]:
        """Return the squares ``p * p`` and ``u * u`` that the trust ratio needs."""
        return [param * param, update * update]

    @staticmethod
    def scale_invariant(h: Hyper, sums: Sequence[float], size: int) -> bool:
        """Return False: LAMB does not project."""
        return False

    @staticmethod
    def projection_coef(h: Hyper, sums: Sequence[float]) -> float:
        """Return 0: LAMB does not project."""
        return 0.0

    @staticmethod
    def layer_scalars(h: Hyper, sums: Sequence[float], projected: bool, s: Scalars) -> None:
        """Multiply the step size by the trust ratio, 1 where a norm is 0: such a layer trains as by Adam."""
        param_norm = math.sqrt(sums[0])
        update_norm = math.sqrt(sums[1])
        defined = h.adapts and param_norm != 0.0 and update_norm != 0.0
        trust = bounded(param_norm, h.min_norm, h.max_norm) / update_norm if defined else 1.0
        s.step_size = s.step_size * (h.trust_clip if trust > h.trust_clip else trust)

    @staticmethod
    def apply(param: Tensor, update: Tensor, projection_coef: Tensor, s: Scalars) -> Tensor:
        """Subtract decoupled weight decay and the scaled update."""
        return param - (s.decoupled_decay * param + s.step_size * update)


class Projection:
    """Removes the radial component of the update of scale-invariant weights."""

    n_sums: ClassVar[int] = 4
    projects: ClassVar[bool] = True

    @staticmethod
    def reductions(param: Tensor, grad: Tensor, update: Tensor, s: Scalars) -> list[Tensor]:
        """Return the products that the cosine test and the projection need."""
        grad = grad * s.grad_scale
        return [grad * grad, param * param, grad * param, update * param]

    @staticmethod
    def scale_invariant(h: Hyper, sums: Sequence[float], size: int) -> bool:
        """Return whether the cosine of gradient and parameter is below ``delta / sqrt(size)``."""
        grad_norm = math.sqrt(sums[0])
        param_norm = math.sqrt(sums[1])
        norms = grad_norm if grad_norm > h.eps else h.eps
        norms = norms * (param_norm if param_norm > h.eps else h.eps)
        return abs(sums[2]) * math.sqrt(size) < h.delta * norms

    @staticmethod
    def projection_coef(h: Hyper, sums: Sequence[float]) -> float:
        """Return ``<n, u> / norm`` with ``n = param / norm``."""
        norm = math.sqrt(sums[1]) + h.eps
        return sums[3] / (norm * norm)

    @staticmethod
    def layer_scalars(h: Hyper, sums: Sequence[float], projected: bool, s: Scalars) -> None:
        """Multiply the decay of scale-invariant weights by ``wd_ratio``."""
        s.decoupled_decay = s.decoupled_decay * (h.wd_ratio if projected else 1.0)

    @staticmethod
    def apply(param: Tensor, update: Tensor, projection_coef: Tensor, s: Scalars) -> Tensor:
        """Project the update, then subtract weight decay and the scaled update."""
        update = update - projection_coef * param
        return param - (s.decoupled_decay * param + s.step_size * update)


class AdamP(Projection):
    """AdamW with projection; ``nesterov`` uses the look-ahead first moment."""

    min_states: ClassVar[int] = 2
    max_states: ClassVar[int] = 2

    @staticmethod
    def lr_norm_power(h: Hyper, step: int) -> int:
        """Return 1, as for Adam."""
        return 1

    @staticmethod
    def scalars(h: Hyper, effective_lr: float, step: int, s: Scalars) -> None:
        """Set the bias corrections of both moments."""
        s.step_size = effective_lr / bias_correction(h.beta1, step)
        s.denom_scale = 1.0 / math.sqrt(bias_correction(h.beta2, step))
        s.nesterov = 1.0 if h.nesterov else 0.0

    @staticmethod
    def needs_grad(h: Hyper, n_states: int) -> bool:
        """Return whether the look-ahead first moment needs the gradient again."""
        return h.nesterov

    @staticmethod
    def update_moments(param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars) -> list[Tensor]:
        """Return the updated first and second moments."""
        grad = grad * s.grad_scale
        exp_avg = lerp(state[0], grad, s.exp_avg_weight)
        exp_avg_sq = lerp(state[1], grad * grad, s.exp_avg_sq_weight)
        return [exp_avg, exp_avg_sq]

    @staticmethod
    def direction(param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars) -> Tensor:
        """Return Adam's update; the bias correction of the first moment is in the step size."""
        exp_avg = state[0]
        grad = grad * s.grad_scale
        exp_avg = lerp(exp_avg, grad if s.nesterov > 0.0 else exp_avg, s.exp_avg_weight)
        denom = state[1].sqrt() * s.denom_scale + s.eps
        return exp_avg / denom


class SGDP(Projection):
    """Momentum with projection; unlike SGD, the first gradient is dampened too."""

    min_states: ClassVar[int] = 0
    max_states: ClassVar[int] = 1

    @staticmethod
    def lr_norm_power(h: Hyper, step: int) -> int:
        """Return 2, as for SGD."""
        return 2

    @staticmethod
    def scalars(h: Hyper, effective_lr: float, step: int, s: Scalars) -> None:
        """Divide the decay by ``1 - momentum``, so that it is as strong as an L2 penalty in the momentum."""
        s.step_size = effective_lr
        s.momentum = h.momentum
        s.one_minus_dampening = 1.0 - h.dampening
        s.nesterov = 1.0 if h.nesterov else 0.0
        s.decoupled_decay = s.decoupled_decay / (1.0 - h.momentum)

    @staticmethod
    def needs_grad(h: Hyper, n_states: int) -> bool:
        """Return True for Nesterov's look-ahead and without a momentum buffer."""
        return h.nesterov or n_states == 0

    @staticmethod
    def update_moments(param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars) -> list[Tensor]:
        """Return the updated momentum buffer, if there is one."""
        grad = grad * s.grad_scale
        return [s.momentum * momentum_buffer + s.one_minus_dampening * grad for momentum_buffer in state]

    @staticmethod
    def direction(param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars) -> Tensor:
        """Return the momentum buffer, or the Nesterov look-ahead ``grad + momentum * buffer``."""
        grad = grad * s.grad_scale
        momentum_buffer = s.one_minus_dampening * grad
        if len(state) == 1:
            momentum_buffer = state[0]
        return grad + s.momentum * momentum_buffer if s.nesterov > 0.0 else momentum_buffer


NO_VIEW, CHANNEL_VIEW, LAYER_VIEW = range(3)


def projection_view(projects: bool, channels_invariant: bool, layer_invariant: bool) -> int:
    """Return the view that an update is projected in.

    Every channel on its own if all are scale-invariant, else the whole layer if that is, else nothing.
    ``channels_invariant`` may be False for a layer of one channel.
    """
    view = LAYER_VIEW if layer_invariant else NO_VIEW
    view = CHANNEL_VIEW if channels_invariant else view
    return view if projects else NO_VIEW


def coef_in_view(
    rule: type[LayerRule], view: int, h: Hyper, channel: Sequence[float], layer: Sequence[float]
) -> float:
    """Return the projection coefficient of one channel, from the sums over it or over its layer."""
    coef = rule.projection_coef(h, layer) if view == LAYER_VIEW else 0.0
    return rule.projection_coef(h, channel) if view == CHANNEL_VIEW else coef


def sphere_rate(lr: float, norm: float, exponent: int) -> float:
    """Return the learning rate that rotates weights of a norm as far as ``lr`` rotates weights of norm 1."""
    rate = lr * norm if exponent > 0 else lr
    return rate * norm if exponent > 1 else rate


def sphere_factor(radius: float, sum_sq: float) -> float:
    """Return the factor that rescales a group to its sphere; 1 if its norm is 0 or not finite."""
    defined = 0.0 < sum_sq < math.inf
    return radius / math.sqrt(sum_sq) if defined else 1.0


def rescale(param: Tensor, factor: float) -> Tensor:
    """Rescale a parameter to its sphere."""
    return param * factor


def average_update(average: Tensor, param: Tensor, weight: float) -> Tensor:
    """Move the average towards the parameter; weight 1 copies the parameter."""
    return lerp(average, param, weight if weight < 0.5 else weight - 1.0)


def inverse_preconditioner(
    rule: type[Rule], param: Tensor, grad: Tensor, state: Sequence[Tensor], s: Scalars
) -> Tensor:
    """Return the diagonal of the inverse preconditioner, ``1 / P``.

    It is the update that a first moment of all ones would produce at learning rate 1, and it is 1 for a rule
    without second moment.
    """
    if not rule.preconditioned:
        return torch.ones_like(param)
    _, new_state = rule.update(param, grad, state, s)
    frozen = replace(s)
    frozen.weight_decay = 0.0
    frozen.decoupled_decay = 0.0
    # far below the last digit, so that the moments do not change
    frozen.exp_avg_weight = 1e-30
    frozen.exp_avg_sq_weight = 1e-30
    frozen.exp_avg_sq_from_grad = 0.0
    frozen.exp_avg_sq_scale = 1.0
    zero = torch.zeros_like(param)
    new_state = [torch.ones_like(param), *new_state[1:]]
    moved, _ = rule.update(zero, zero, new_state, frozen)
    return -moved


def init_exp_avg_sq(param: Tensor, grad: Tensor, h: Hyper, weight_decay: float, clip_coef: float) -> Tensor:
    """Return the initial second moment ``init_scale * g**2``, with clipping and coupled decay in ``g``."""
    s = common_scalars(h, h.lr, weight_decay, clip_coef)
    grad = grad * s.grad_scale + s.weight_decay * param
    return h.init_scale * (grad * grad)


RULES: dict[str, type[Rule]] = {"Adam": Adam, "RAdam": RAdam, "SGD": SGD}
LAYER_RULES: dict[str, type[LayerRule]] = {"LAMB": LAMB, "AdamP": AdamP, "SGDP": SGDP}

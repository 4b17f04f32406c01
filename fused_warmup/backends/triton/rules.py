"""Update rules inside Triton kernels; the statements of ``csrc/rules.h`` in the same order.

``scalars`` is evaluated for a block of rows in double; ``update`` and the stages of layer-wise rules take a
block of elements. ``reference/rules.py`` describes them.

Adam: Kingma & Ba 2015. Gradient initialisation: Kalra & Barkeshli 2024, arXiv:2406.09405.
RAdam: Liu et al. 2020, arXiv:1908.03265. SGD: heavy ball; as in torch, the first step is not dampened.
LAMB: You et al. 2020, arXiv:1904.00962. AdamP and SGDP: Heo et al. 2021, arXiv:2006.08217.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...plan.structs import INIT_KINDS
from ...reference import rules as reference
from .memory import Scalars

INIT_GRAD = tl.constexpr(INIT_KINDS["grad"])
INIT_RANDOM = tl.constexpr(INIT_KINDS["random"])
NO_VIEW = tl.constexpr(reference.NO_VIEW)
CHANNEL_VIEW = tl.constexpr(reference.CHANNEL_VIEW)
LAYER_VIEW = tl.constexpr(reference.LAYER_VIEW)
# before 3.6 the compiler makes sqrt_rn and div_rn replace subnormal numbers by 0
FLUSHES = tl.constexpr(triton.__version__.startswith("3.5.") and not triton.knobs.runtime.interpret)


@triton.jit
def root(x):
    """Return the square root, rounded to nearest."""
    if x.dtype == tl.float32:
        if FLUSHES:
            return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        else:
            return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def divide(a, b):
    """Return the quotient, rounded to nearest."""
    if a.dtype == tl.float32:
        if FLUSHES:
            return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
        else:
            return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def expm1(x):
    """Return ``exp(x) - 1`` for x <= 0 in Kahan's form, in which the error of log cancels that of exp."""
    u = tl.exp(x)
    # far from 0 the difference is exact enough, and log must not get 0
    near = (x > -1.0) & (u != 1.0)
    kahan = (u - 1.0) * x / tl.log(tl.where(near, u, 2.0))
    return tl.where(near, kahan, tl.where(u == 1.0, x, u - 1.0))


@triton.jit
def bias_correction(beta, step):
    """Return ``1 - beta**step`` without the cancellation of the direct form at the first steps."""
    positive = beta > 0.0
    return tl.where(positive, -expm1(step.to(tl.float64) * tl.log(tl.where(positive, beta, 1.0))), 1.0)


@triton.jit
def sma_length(beta2, step):
    """Return the length rho_t of the simple moving average with the exponential one's centre of mass."""
    bias_correction2 = bias_correction(beta2, step)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    return rho_inf - 2.0 * step.to(tl.float64) * (1.0 - bias_correction2) / bias_correction2


@triton.jit
def rectification(beta2, rho):
    """Return the ratio r_t of the standard deviations of the adaptive rate, in the limit and at this step."""
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    return tl.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))


@triton.jit
def lerp_weight(beta):
    """Return the weight ``1 - beta`` of a new value for ``lerp``, minus 1 if it is above one half."""
    return tl.where(beta < 0.5, -beta, 1.0 - beta)


@triton.jit
def lerp(start, end, weight):
    """Interpolate from ``start`` to ``end``; a weight above one half is given minus 1, so it is negative."""
    return tl.fma(weight, end - start, tl.where(weight > 0.0, start, end))


@triton.jit
def common_scalars(h, rates, clip_coef):
    """Return the scalars that all rules share: clipping, then sign, then coupled or decoupled decay."""
    decoupled = h.decoupled != 0
    return Scalars(
        grad_scale=tl.where(h.maximize != 0, -clip_coef, clip_coef),
        weight_decay=tl.where(decoupled, 0.0, rates.weight_decay),
        decoupled_decay=tl.where(decoupled, rates.lr * rates.weight_decay, 0.0),
        exp_avg_weight=lerp_weight(h.beta1),
        exp_avg_sq_weight=lerp_weight(h.beta2),
        eps=h.eps,
        rect=1.0,
        exp_avg_sq_scale=1.0,
    )


@triton.jit
def clip_coefficient(grad_norm, max_grad_norm):
    """The factor that gradients are multiplied by so that their norm is at most ``max_grad_norm``.

    A NaN norm gives NaN, as in ``torch.nn.utils.clip_grad_norm_``.
    """
    ratio = max_grad_norm / (grad_norm + 1e-6)
    return tl.where(ratio >= 1.0, 1.0, ratio)


@triton.jit
def start_exp_avg_sq(h, step, initialized, grad_norm, init_norm_sq, s):
    """Set the second moment before the first update of a row, see ``reference/rules.py``."""
    first = (step == 1) & (initialized == 0)
    return Scalars(
        s,
        exp_avg_sq_from_grad=tl.where(first & (h.init == INIT_GRAD), h.init_scale, 0.0),
        exp_avg_sq_scale=tl.where(
            first & (h.init == INIT_RANDOM), h.init_scale * grad_norm * grad_norm / init_norm_sq, 1.0
        ),
    )


class Adam:
    """Adam, AdamW, AMSGrad and Adam with an initialised second moment."""

    @staticmethod
    @triton.jit
    def lr_norm_power(h, step):
        """Return 1: Adam's update is invariant to the scale of the gradient."""
        return 1

    @staticmethod
    @triton.jit
    def scalars(h, effective_lr, step, s):
        """Set the bias corrections of both moments."""
        return Scalars(
            s,
            step_size=effective_lr / bias_correction(h.beta1, step),
            denom_scale=1.0 / tl.sqrt(bias_correction(h.beta2, step)),
        )

    @staticmethod
    @triton.jit
    def update(param, grad, state, s):
        """Return one step of Adam, or of AMSGrad with a third state."""
        exp_avg = state[0]
        exp_avg_sq = state[1]
        grad = tl.fma(s.weight_decay, param, grad * s.grad_scale)
        # at the first step, v_0 = g_0^2 or the scaled initial state (eq. 6 of Kalra & Barkeshli)
        exp_avg_sq = tl.where(
            s.exp_avg_sq_from_grad > 0.0,
            s.exp_avg_sq_from_grad * (grad * grad),
            s.exp_avg_sq_scale * exp_avg_sq,
        )
        exp_avg = lerp(exp_avg, grad, s.exp_avg_weight)
        exp_avg_sq = lerp(exp_avg_sq, grad * grad, s.exp_avg_sq_weight)
        new_state = (exp_avg, exp_avg_sq)
        if len(state) == 3:
            # the comparison is false for a NaN of exp_avg_sq, which stays, as in torch.maximum
            exp_avg_sq = tl.where(exp_avg_sq <= state[2], state[2], exp_avg_sq)
            new_state = new_state + (exp_avg_sq,)
        denom = tl.fma(root(exp_avg_sq), s.denom_scale, s.eps)
        # decay and step in one difference: the parameter is rounded once
        param = param - tl.fma(s.decoupled_decay, param, divide(s.step_size * exp_avg, denom))
        return param, new_state


class RAdam:
    """Adam with a rectified adaptive rate."""

    @staticmethod
    @triton.jit
    def lr_norm_power(h, step):
        """Return 2 for an unrectified step, which shrinks with the gradient as that of SGD, and else 1."""
        return tl.where(sma_length(h.beta2, step) > h.rho_threshold, 1, 2)

    @staticmethod
    @triton.jit
    def scalars(h, effective_lr, step, s):
        """Set the rectified step size, or that of the fallback while the variance is intractable."""
        bias_correction1 = bias_correction(h.beta1, step)
        rho = sma_length(h.beta2, step)
        rectified = rho > h.rho_threshold
        # both sides of a choice are computed: replace arguments without a root where the result is unused
        beta2 = tl.where(rectified, h.beta2, 0.9)
        rect = tl.where(rectified, rectification(beta2, tl.where(rectified, rho, 5.0)), 0.0)
        fallback = tl.where(h.skip_unrectified != 0, 0.0, 1.0)
        adaptive = rect * tl.sqrt(bias_correction(h.beta2, step))
        return Scalars(
            s,
            rect=rect,
            step_size=effective_lr / bias_correction1 * tl.where(rectified, adaptive, fallback),
            decoupled_decay=tl.where(rectified, s.decoupled_decay, s.decoupled_decay * fallback),
        )

    @staticmethod
    @triton.jit
    def update(param, grad, state, s):
        """Return one step of RAdam, by momentum without a denominator while unrectified."""
        exp_avg = state[0]
        exp_avg_sq = state[1]
        grad = tl.fma(s.weight_decay, param, grad * s.grad_scale)
        exp_avg = lerp(exp_avg, grad, s.exp_avg_weight)
        exp_avg_sq = lerp(exp_avg_sq, grad * grad, s.exp_avg_sq_weight)
        denom = tl.where(s.rect > 0.0, root(exp_avg_sq) + s.eps, 1.0)
        param = param - tl.fma(s.decoupled_decay, param, divide(s.step_size * exp_avg, denom))
        return param, (exp_avg, exp_avg_sq)


class SGD:
    """Gradient descent with heavy-ball or Nesterov momentum."""

    @staticmethod
    @triton.jit
    def lr_norm_power(h, step):
        """Return 2: the gradient shrinks with the norm, and larger weights need larger steps for an angle."""
        return 2

    @staticmethod
    @triton.jit
    def scalars(h, effective_lr, step, s):
        """Set the dampening, from which the first gradient is exempt."""
        return Scalars(
            s,
            step_size=effective_lr,
            momentum=h.momentum,
            one_minus_dampening=tl.where(step == 1, 1.0, 1.0 - h.dampening),
            nesterov=tl.where(h.nesterov != 0, 1.0, 0.0),
        )

    @staticmethod
    @triton.jit
    def update(param, grad, state, s):
        """Return one step of SGD, with momentum if there is a buffer."""
        grad = tl.fma(s.weight_decay, param, grad * s.grad_scale)
        new_state = ()
        if len(state) == 1:
            momentum_buffer = tl.fma(s.momentum, state[0], s.one_minus_dampening * grad)
            new_state = (momentum_buffer,)
            nesterov = tl.fma(s.momentum, momentum_buffer, grad)
            grad = tl.where(s.nesterov > 0.0, nesterov, momentum_buffer)
        param = tl.fma(-s.step_size, grad, param)
        return param, new_state


@triton.jit
def bounded(x, low, high):
    """Clamp ``x`` to an interval; NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


class LAMB:
    """Adam with each layer's update scaled to the norm of its parameter."""

    @staticmethod
    @triton.jit
    def lr_norm_power(h, step):
        """Return 0 with a trust ratio, which already scales the step with the parameter norm."""
        return tl.where(h.adapts != 0, 0, 1)

    @staticmethod
    @triton.jit
    def scalars(h, effective_lr, step, s):
        """Set optional bias corrections, and weight decay inside or outside the update."""
        corrected = h.bias_correction != 0
        inside = h.decays_update != 0
        return Scalars(
            s,
            step_size=effective_lr,
            inv_bias_correction1=tl.where(corrected, 1.0 / bias_correction(h.beta1, step), 1.0),
            denom_scale=tl.where(corrected, 1.0 / tl.sqrt(bias_correction(h.beta2, step)), 1.0),
            # 1 if the first moment is an average, 1 / (1 - beta1) if it is a sum
            grad_weight=tl.where(h.grad_averaging != 0, 1.0, 1.0 / (1.0 - h.beta1)),
            update_decay=tl.where(inside, s.weight_decay, 0.0),
            weight_decay=tl.where(inside, 0.0, s.weight_decay),
        )

    @staticmethod
    @triton.jit
    def needs_grad(h, n_states):
        """Return False: the update can be recomputed from the states alone."""
        return False

    @staticmethod
    @triton.jit
    def update_moments(param, grad, state, s):
        """Return the updated first and second moments."""
        grad = tl.fma(s.weight_decay, param, grad * s.grad_scale)
        exp_avg = lerp(state[0], s.grad_weight * grad, s.exp_avg_weight)
        exp_avg_sq = lerp(state[1], grad * grad, s.exp_avg_sq_weight)
        return exp_avg, exp_avg_sq

    @staticmethod
    @triton.jit
    def direction(param, grad, state, s):
        """Return Adam's update, with weight decay if ``decays_update``."""
        denom = tl.fma(root(state[1]), s.denom_scale, s.eps)
        return tl.fma(s.update_decay, param, divide(s.inv_bias_correction1 * state[0], denom))

    @staticmethod
    @triton.jit
    def reductions(param, grad, update, s):
        """Return the squares ``p * p`` and ``u * u`` that the trust ratio needs."""
        return param * param, update * update

    @staticmethod
    @triton.jit
    def scale_invariant(h, sums, size):
        """LAMB does not project."""
        return sums[0] < 0.0

    @staticmethod
    @triton.jit
    def projection_coef(h, sums):
        """Return 0: LAMB does not project."""
        return 0.0 * sums[0]

    @staticmethod
    @triton.jit
    def layer_scalars(h, sums, projected, s):
        """Multiply the step size by the trust ratio, 1 where a norm is 0: such a layer trains as by Adam."""
        param_norm = tl.sqrt(sums[0])
        update_norm = tl.sqrt(sums[1])
        defined = (h.adapts != 0) & (param_norm != 0.0) & (update_norm != 0.0)
        ratio = bounded(param_norm, h.min_norm, h.max_norm) / tl.where(defined, update_norm, 1.0)
        trust = tl.where(defined, ratio, 1.0)
        return Scalars(s, step_size=s.step_size * tl.where(trust > h.trust_clip, h.trust_clip, trust))

    @staticmethod
    @triton.jit
    def apply(param, update, projection_coef, s):
        """Subtract decoupled weight decay and the scaled update."""
        return param - tl.fma(s.decoupled_decay, param, s.step_size * update)


class Projection:
    """Removes the radial component of the update of scale-invariant weights."""

    @staticmethod
    @triton.jit
    def reductions(param, grad, update, s):
        """Return the products that the cosine test and the projection need."""
        grad = grad * s.grad_scale
        return grad * grad, param * param, grad * param, update * param

    @staticmethod
    @triton.jit
    def scale_invariant(h, sums, size):
        """Return whether the cosine of gradient and parameter is below ``delta / sqrt(size)``."""
        grad_norm = tl.sqrt(sums[0])
        param_norm = tl.sqrt(sums[1])
        norms = tl.where(grad_norm > h.eps, grad_norm, h.eps)
        norms = norms * tl.where(param_norm > h.eps, param_norm, h.eps)
        return tl.abs(sums[2]) * tl.sqrt(size.to(tl.float64)) < h.delta * norms

    @staticmethod
    @triton.jit
    def projection_coef(h, sums):
        """Return ``<n, u> / norm`` with ``n = param / norm``."""
        norm = tl.sqrt(sums[1]) + h.eps
        return sums[3] / (norm * norm)

    @staticmethod
    @triton.jit
    def layer_scalars(h, sums, projected, s):
        """Multiply the decay of scale-invariant weights by ``wd_ratio``."""
        return Scalars(s, decoupled_decay=s.decoupled_decay * tl.where(projected, h.wd_ratio, 1.0))

    @staticmethod
    @triton.jit
    def apply(param, update, projection_coef, s):
        """Project the update, then subtract weight decay and the scaled update."""
        update = tl.fma(-projection_coef, param, update)
        return param - tl.fma(s.decoupled_decay, param, s.step_size * update)


class AdamP(Projection):
    """AdamW with projection; ``nesterov`` uses the look-ahead first moment."""

    @staticmethod
    @triton.jit
    def lr_norm_power(h, step):
        """Return 1, as for Adam."""
        return 1

    @staticmethod
    @triton.jit
    def scalars(h, effective_lr, step, s):
        """Set the bias corrections of both moments."""
        return Scalars(
            s,
            step_size=effective_lr / bias_correction(h.beta1, step),
            denom_scale=1.0 / tl.sqrt(bias_correction(h.beta2, step)),
            nesterov=tl.where(h.nesterov != 0, 1.0, 0.0),
        )

    @staticmethod
    @triton.jit
    def needs_grad(h, n_states):
        """Return whether the look-ahead first moment needs the gradient again."""
        return h.nesterov != 0

    @staticmethod
    @triton.jit
    def update_moments(param, grad, state, s):
        """Return the updated first and second moments."""
        grad = grad * s.grad_scale
        exp_avg = lerp(state[0], grad, s.exp_avg_weight)
        exp_avg_sq = lerp(state[1], grad * grad, s.exp_avg_sq_weight)
        return exp_avg, exp_avg_sq

    @staticmethod
    @triton.jit
    def direction(param, grad, state, s):
        """Return Adam's update; the bias correction of the first moment is in the step size."""
        exp_avg = state[0]
        grad = grad * s.grad_scale
        exp_avg = lerp(exp_avg, tl.where(s.nesterov > 0.0, grad, exp_avg), s.exp_avg_weight)
        denom = tl.fma(root(state[1]), s.denom_scale, s.eps)
        return divide(exp_avg, denom)


class SGDP(Projection):
    """Momentum with projection; unlike SGD, the first gradient is dampened too."""

    @staticmethod
    @triton.jit
    def lr_norm_power(h, step):
        """Return 2, as for SGD."""
        return 2

    @staticmethod
    @triton.jit
    def scalars(h, effective_lr, step, s):
        """Divide the decay by ``1 - momentum``, so that it is as strong as an L2 penalty in the momentum."""
        return Scalars(
            s,
            step_size=effective_lr,
            momentum=h.momentum,
            one_minus_dampening=1.0 - h.dampening,
            nesterov=tl.where(h.nesterov != 0, 1.0, 0.0),
            decoupled_decay=s.decoupled_decay / (1.0 - h.momentum),
        )

    @staticmethod
    @triton.jit
    def needs_grad(h, n_states):
        """Return True for Nesterov's look-ahead and without a momentum buffer."""
        return (h.nesterov != 0) | (n_states == 0)

    @staticmethod
    @triton.jit
    def update_moments(param, grad, state, s):
        """Return the updated momentum buffer, if there is one."""
        grad = grad * s.grad_scale
        new_state = ()
        if len(state) == 1:
            new_state = (tl.fma(s.momentum, state[0], s.one_minus_dampening * grad),)
        return new_state

    @staticmethod
    @triton.jit
    def direction(param, grad, state, s):
        """Return the momentum buffer, or the Nesterov look-ahead ``grad + momentum * buffer``."""
        grad = grad * s.grad_scale
        momentum_buffer = s.one_minus_dampening * grad
        if len(state) == 1:
            momentum_buffer = state[0]
        return tl.where(s.nesterov > 0.0, tl.fma(s.momentum, momentum_buffer, grad), momentum_buffer)


@triton.jit
def projection_view(projects, channels_invariant, layer_invariant):
    """Return the view that an update is projected in, see ``reference/rules.py``."""
    view = tl.where(layer_invariant, LAYER_VIEW, NO_VIEW)
    view = tl.where(channels_invariant, CHANNEL_VIEW, view)
    return tl.where(projects, view, NO_VIEW)


@triton.jit
def coef_in_view(view, h, channel, layer, PROJECTION_COEF: tl.constexpr):
    """Return the projection coefficients of channels, from the sums over them or over their layer."""
    coef = tl.where(view == LAYER_VIEW, PROJECTION_COEF(h, layer), 0.0)
    return tl.where(view == CHANNEL_VIEW, PROJECTION_COEF(h, channel), coef)


@triton.jit
def sphere_rate(lr, norm, exponent):
    """Return the learning rate that rotates weights of a norm as far as ``lr`` rotates weights of norm 1."""
    rate = tl.where(exponent > 0, lr * norm, lr)
    return tl.where(exponent > 1, rate * norm, rate)


@triton.jit
def sphere_factor(radius, sum_sq):
    """Return the factor that rescales a group to its sphere; 1 if its norm is 0 or not finite."""
    defined = (sum_sq > 0.0) & (sum_sq < float("inf"))
    return tl.where(defined, radius / tl.sqrt(tl.where(defined, sum_sq, 1.0)), 1.0)


@triton.jit
def rescale(param, factor):
    """Rescale a parameter to its sphere."""
    return param * factor


@triton.jit
def average_update(average, param, weight):
    """Move the average towards the parameter; weight 1 copies the parameter."""
    return lerp(average, param, tl.where(weight < 0.5, weight, weight - 1.0))


@triton.jit
def inverse_preconditioner(param, grad, state, s, UPDATE: tl.constexpr):
    """Return the diagonal of ``1 / P``: the update by a first moment of ones at learning rate 1."""
    if len(state) < 2:
        return tl.full(param.shape, 1.0, param.dtype)
    else:
        _, new_state = UPDATE(param, grad, state, s)
        frozen = Scalars(
            s,
            weight_decay=s.weight_decay * 0.0,
            decoupled_decay=s.decoupled_decay * 0.0,
            # far below the last digit, so that the moments do not change
            exp_avg_weight=s.exp_avg_weight * 0.0 + 1e-30,
            exp_avg_sq_weight=s.exp_avg_sq_weight * 0.0 + 1e-30,
            exp_avg_sq_from_grad=s.exp_avg_sq_from_grad * 0.0,
            exp_avg_sq_scale=s.exp_avg_sq_scale * 0.0 + 1.0,
        )
        zero = tl.zeros(param.shape, param.dtype)
        new_state = (zero + 1.0,) + new_state[1:]
        moved, _ = UPDATE(zero, zero, new_state, frozen)
        return -moved


RULES: dict[str, Any] = {"Adam": Adam, "RAdam": RAdam, "SGD": SGD}
LAYER_RULES: dict[str, Any] = {"LAMB": LAMB, "AdamP": AdamP, "SGDP": SGDP}

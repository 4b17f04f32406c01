// Every update rule, once for the CPU and CUDA; reference/rules.py has the same statements in the same order.
// An element-wise rule has scalars(), evaluated once per row and step in double, and update(), evaluated per
// element. A rule that needs kSums sums over a layer updates in stages instead: update_moments() and
// direction() per element, with accumulate() for the sums; layer_scalars() and projection_coef() from the
// sums; apply() per element. lr_norm_power() is the power of the norm of scale-invariant weights that the
// learning rate must grow with to keep the angle of a step.
// Adam: Kingma & Ba 2015. Gradient initialisation: Kalra & Barkeshli 2024, arXiv:2406.09405.
// RAdam: Liu et al. 2020, arXiv:1908.03265. SGD: heavy ball; as in torch, the first step is not dampened.
// LAMB: You et al. 2020, arXiv:1904.00962. AdamP and SGDP: Heo et al. 2021, arXiv:2006.08217.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "table.h"

// the names that the bindings and the launchers iterate over
#define FW_RULES(X) X(Adam) X(RAdam) X(SGD) X(LAMB) X(AdamP) X(SGDP)
// the rules whose step is a diagonal times the first moment: the diagonal preconditions the sharpness
#define FW_PRECONDITIONED(X) X(Adam) X(RAdam) X(SGD)

namespace fw {

// the scalars of one row, rounded once to the type of the arithmetic; flags are numbers too, because gcc does
// not vectorise a choice by a bool that is the same for all elements
template <class C>
struct ScalarsOf {
#define FW_MEMBER(type, name) C name;
  FW_SCALARS(FW_MEMBER)
#undef FW_MEMBER

  FW_HOST_DEVICE explicit ScalarsOf(const Scalars& s) {
#define FW_ROUND(type, name) name = static_cast<C>(s.name);
    FW_SCALARS(FW_ROUND)
#undef FW_ROUND
  }
};

// 1 - beta^step without the cancellation of the direct form at the first steps
FW_HOST_DEVICE double bias_correction(double beta, int64_t step) {
  return beta > 0.0 ? -expm1(static_cast<double>(step) * log(beta)) : 1.0;
}

// length of the simple moving average that has the centre of mass of the exponential one (eq. 4 of RAdam)
FW_HOST_DEVICE double sma_length(double beta2, int64_t step) {
  double bias_correction2 = bias_correction(beta2, step);
  double rho_inf = 2.0 / (1.0 - beta2) - 1.0;
  return rho_inf - 2.0 * static_cast<double>(step) * (1.0 - bias_correction2) / bias_correction2;
}

// ratio r_t of the standard deviations of the adaptive rate, in the limit and at this step (eq. 5 of RAdam)
FW_HOST_DEVICE double rectification(double beta2, double rho) {
  double rho_inf = 2.0 / (1.0 - beta2) - 1.0;
  return sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho));
}

// The weight of a new value in a moment for lerp(): 1 - beta, or that minus 1 if it is above one half. The
// latter is -beta exactly, where 1 - beta may round to 1.
FW_HOST_DEVICE double lerp_weight(double beta) { return beta < 0.5 ? -beta : 1.0 - beta; }

// Linear interpolation: start + weight * (end - start) for a positive weight, end + weight * (end - start)
// for a weight given minus 1. The form with a difference leaves no drift when the weight is rounded, and
// adding it to the end with the larger weight avoids cancellation.
template <class C>
FW_HOST_DEVICE C lerp(C start, C end, C weight) {
  return multiply_add(weight, end - start, weight > C(0) ? start : end);
}

// the scalars that all rules share: clipping, then sign, then coupled or decoupled decay
FW_HOST_DEVICE Scalars common_scalars(const Hyper& h, const Rates& rates, double clip_coef) {
  Scalars s = {};
  s.grad_scale = h.maximize ? -clip_coef : clip_coef;
  s.weight_decay = h.decoupled ? 0.0 : rates.weight_decay;
  s.decoupled_decay = h.decoupled ? rates.lr * rates.weight_decay : 0.0;
  s.exp_avg_weight = lerp_weight(h.beta1);
  s.exp_avg_sq_weight = lerp_weight(h.beta2);
  s.eps = h.eps;
  s.rect = 1.0;
  s.exp_avg_sq_scale = 1.0;
  return s;
}

// The factor that gradients are multiplied by so that their norm is at most max_grad_norm. A NaN norm gives
// NaN, as in torch.nn.utils.clip_grad_norm_.
FW_HOST_DEVICE double clip_coefficient(double grad_norm, double max_grad_norm) {
  double ratio = max_grad_norm / (grad_norm + 1e-6);
  return ratio >= 1.0 ? 1.0 : ratio;
}

// The second moment before the first update of a row: init_scale * g^2, or a random state scaled so that its
// sum is init_scale times the squared norm of all clipped gradients (Kalra & Barkeshli).
FW_HOST_DEVICE void start_exp_avg_sq(const Hyper& h, int64_t step, bool initialized, double grad_norm,
                                     double init_norm_sq, Scalars& s) {
  bool first = step == 1 && !initialized;
  if (first && h.init == kInitGrad) s.exp_avg_sq_from_grad = h.init_scale;
  if (first && h.init == kInitRandom)
    s.exp_avg_sq_scale = h.init_scale * grad_norm * grad_norm / init_norm_sq;
}

struct Adam {
  static constexpr int kSums = 0;
  static constexpr int kMinStates = 2;
  static constexpr int kMaxStates = 3;

  FW_HOST_DEVICE static int lr_norm_power(const Hyper&, int64_t) { return 1; }

  FW_HOST_DEVICE static void scalars(const Hyper& h, double effective_lr, int64_t step, Scalars& s) {
    s.step_size = effective_lr / bias_correction(h.beta1, step);
    s.denom_scale = 1.0 / sqrt(bias_correction(h.beta2, step));
  }

  template <int kStates, class C>
  FW_HOST_DEVICE static void update(C& param, C grad, C* state, const ScalarsOf<C>& s) {
    C exp_avg = state[0], exp_avg_sq = state[1];
    grad = multiply_add(s.weight_decay, param, grad * s.grad_scale);
    // at the first step, v_0 = g_0^2 or the scaled initial state (eq. 6 of Kalra & Barkeshli)
    exp_avg_sq = s.exp_avg_sq_from_grad > C(0) ? s.exp_avg_sq_from_grad * (grad * grad)
                                               : s.exp_avg_sq_scale * exp_avg_sq;
    exp_avg = lerp(exp_avg, grad, s.exp_avg_weight);
    exp_avg_sq = lerp(exp_avg_sq, grad * grad, s.exp_avg_sq_weight);
    state[0] = exp_avg;
    state[1] = exp_avg_sq;
    if constexpr (kStates == 3) {
      // the negated comparison keeps a NaN of exp_avg_sq, as torch.maximum does
      C max_exp_avg_sq = state[2];
      exp_avg_sq = !(exp_avg_sq <= max_exp_avg_sq) ? exp_avg_sq : max_exp_avg_sq;
      state[2] = exp_avg_sq;
    }
    C denom = multiply_add(root(exp_avg_sq), s.denom_scale, s.eps);
    // decay and step in one difference: the parameter is rounded once
    param = param - multiply_add(s.decoupled_decay, param, s.step_size * exp_avg / denom);
  }
};

struct RAdam {
  static constexpr int kSums = 0;
  static constexpr int kMinStates = 2;
  static constexpr int kMaxStates = 2;

  // an unrectified step shrinks with the gradient, as that of SGD does
  FW_HOST_DEVICE static int lr_norm_power(const Hyper& h, int64_t step) {
    return sma_length(h.beta2, step) > h.rho_threshold ? 1 : 2;
  }

  FW_HOST_DEVICE static void scalars(const Hyper& h, double effective_lr, int64_t step, Scalars& s) {
    double bias_correction1 = bias_correction(h.beta1, step);
    double rho = sma_length(h.beta2, step);
    bool rectified = rho > h.rho_threshold;
    double rect = rectified ? rectification(h.beta2, rho) : 0.0;
    double fallback = h.skip_unrectified ? 0.0 : 1.0;
    s.rect = rect;
    s.step_size = effective_lr / bias_correction1 *
                  (rectified ? rect * sqrt(bias_correction(h.beta2, step)) : fallback);
    s.decoupled_decay = rectified ? s.decoupled_decay : s.decoupled_decay * fallback;
  }

  template <int kStates, class C>
  FW_HOST_DEVICE static void update(C& param, C grad, C* state, const ScalarsOf<C>& s) {
    C exp_avg = state[0], exp_avg_sq = state[1];
    grad = multiply_add(s.weight_decay, param, grad * s.grad_scale);
    exp_avg = lerp(exp_avg, grad, s.exp_avg_weight);
    exp_avg_sq = lerp(exp_avg_sq, grad * grad, s.exp_avg_sq_weight);
    state[0] = exp_avg;
    state[1] = exp_avg_sq;
    C denom = s.rect > C(0) ? root(exp_avg_sq) + s.eps : C(1);
    param = param - multiply_add(s.decoupled_decay, param, s.step_size * exp_avg / denom);
  }
};

struct SGD {
  static constexpr int kSums = 0;
  static constexpr int kMinStates = 0;
  static constexpr int kMaxStates = 1;

  FW_HOST_DEVICE static int lr_norm_power(const Hyper&, int64_t) { return 2; }

  FW_HOST_DEVICE static void scalars(const Hyper& h, double effective_lr, int64_t step, Scalars& s) {
    s.step_size = effective_lr;
    s.momentum = h.momentum;
    s.one_minus_dampening = step == 1 ? 1.0 : 1.0 - h.dampening;
    s.nesterov = h.nesterov ? 1.0 : 0.0;
  }

  template <int kStates, class C>
  FW_HOST_DEVICE static void update(C& param, C grad, C* state, const ScalarsOf<C>& s) {
    grad = multiply_add(s.weight_decay, param, grad * s.grad_scale);
    if constexpr (kStates == 1) {
      C momentum_buffer = multiply_add(s.momentum, state[0], s.one_minus_dampening * grad);
      state[0] = momentum_buffer;
      grad = s.nesterov > C(0) ? multiply_add(s.momentum, momentum_buffer, grad) : momentum_buffer;
    }
    param = multiply_add(-s.step_size, grad, param);
  }
};

// x clamped to an interval; NaN stays
FW_HOST_DEVICE double bounded(double x, double low, double high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

struct LAMB {
  static constexpr int kMinStates = 2;
  static constexpr int kMaxStates = 2;
  static constexpr int kSums = 2;
  static constexpr bool kProjects = false;

  // the trust ratio already scales the step with the parameter norm
  FW_HOST_DEVICE static int lr_norm_power(const Hyper& h, int64_t) { return h.adapts ? 0 : 1; }

  FW_HOST_DEVICE static void scalars(const Hyper& h, double effective_lr, int64_t step, Scalars& s) {
    s.step_size = effective_lr;
    s.inv_bias_correction1 = h.bias_correction ? 1.0 / bias_correction(h.beta1, step) : 1.0;
    s.denom_scale = h.bias_correction ? 1.0 / sqrt(bias_correction(h.beta2, step)) : 1.0;
    // 1 if the first moment is an average, 1 / (1 - beta1) if it is a sum
    s.grad_weight = h.grad_averaging ? 1.0 : 1.0 / (1.0 - h.beta1);
    s.update_decay = h.decays_update ? s.weight_decay : 0.0;
    s.weight_decay = h.decays_update ? 0.0 : s.weight_decay;
  }

  // whether direction() needs the gradient in addition to the states
  FW_HOST_DEVICE static bool needs_grad(const Hyper&, int32_t) { return false; }

  template <int kStates, class C>
  FW_HOST_DEVICE static void update_moments(C param, C grad, C* state, const ScalarsOf<C>& s) {
    grad = multiply_add(s.weight_decay, param, grad * s.grad_scale);
    state[0] = lerp(state[0], s.grad_weight * grad, s.exp_avg_weight);
    state[1] = lerp(state[1], grad * grad, s.exp_avg_sq_weight);
  }

  template <int kStates, class C>
  FW_HOST_DEVICE static C direction(C param, C, const C* state, const ScalarsOf<C>& s) {
    C denom = multiply_add(root(state[1]), s.denom_scale, s.eps);
    return multiply_add(s.update_decay, param, s.inv_bias_correction1 * state[0] / denom);
  }

  // adds one element, or as many as an S holds
  template <class S, class V, class C>
  FW_HOST_DEVICE static void accumulate(S (&sums)[kSums], V param, V, V update, const ScalarsOf<C>&) {
    S p = widened(param), u = widened(update);
    sums[0] = multiply_add(p, p, sums[0]);
    sums[1] = multiply_add(u, u, sums[1]);
  }

  FW_HOST_DEVICE static bool scale_invariant(const Hyper&, const double*, int64_t) { return false; }
  FW_HOST_DEVICE static double projection_coef(const Hyper&, const double*) { return 0.0; }

  // the trust ratio is 1 where a norm is 0: such a layer is trained as by Adam
  FW_HOST_DEVICE static void layer_scalars(const Hyper& h, const double* sums, bool, Scalars& s) {
    double param_norm = sqrt(sums[0]);
    double update_norm = sqrt(sums[1]);
    bool defined = h.adapts && param_norm != 0.0 && update_norm != 0.0;
    double trust = defined ? bounded(param_norm, h.min_norm, h.max_norm) / update_norm : 1.0;
    s.step_size = s.step_size * (trust > h.trust_clip ? h.trust_clip : trust);
  }

  template <class C>
  FW_HOST_DEVICE static void apply(C& param, C update, C, const ScalarsOf<C>& s) {
    param = param - multiply_add(s.decoupled_decay, param, s.step_size * update);
  }
};

// removes the radial component of the update of scale-invariant weights
struct Projection {
  static constexpr int kSums = 4;
  static constexpr bool kProjects = true;

  template <class S, class V, class C>
  FW_HOST_DEVICE static void accumulate(S (&sums)[kSums], V param, V grad, V update, const ScalarsOf<C>& s) {
    S p = widened(param), u = widened(update);
    S g = widened(grad * s.grad_scale);
    sums[0] = multiply_add(g, g, sums[0]);
    sums[1] = multiply_add(p, p, sums[1]);
    sums[2] = multiply_add(g, p, sums[2]);
    sums[3] = multiply_add(u, p, sums[3]);
  }

  // whether the cosine of gradient and parameter is below delta / sqrt(size); false for NaN
  FW_HOST_DEVICE static bool scale_invariant(const Hyper& h, const double* sums, int64_t size) {
    double grad_norm = sqrt(sums[0]);
    double param_norm = sqrt(sums[1]);
    double norms = grad_norm > h.eps ? grad_norm : h.eps;
    norms = norms * (param_norm > h.eps ? param_norm : h.eps);
    return magnitude(sums[2]) * sqrt(static_cast<double>(size)) < h.delta * norms;
  }

  // <n, u> / norm with n = param / norm
  FW_HOST_DEVICE static double projection_coef(const Hyper& h, const double* sums) {
    double norm = sqrt(sums[1]) + h.eps;
    return sums[3] / (norm * norm);
  }

  // scale-invariant weights decay by a fraction only
  FW_HOST_DEVICE static void layer_scalars(const Hyper& h, const double*, bool projected, Scalars& s) {
    s.decoupled_decay = s.decoupled_decay * (projected ? h.wd_ratio : 1.0);
  }

  template <class C>
  FW_HOST_DEVICE static void apply(C& param, C update, C projection_coef, const ScalarsOf<C>& s) {
    update = multiply_add(-projection_coef, param, update);
    param = param - multiply_add(s.decoupled_decay, param, s.step_size * update);
  }
};

struct AdamP : Projection {
  static constexpr int kMinStates = 2;
  static constexpr int kMaxStates = 2;

  FW_HOST_DEVICE static int lr_norm_power(const Hyper&, int64_t) { return 1; }

  FW_HOST_DEVICE static void scalars(const Hyper& h, double effective_lr, int64_t step, Scalars& s) {
    s.step_size = effective_lr / bias_correction(h.beta1, step);
    s.denom_scale = 1.0 / sqrt(bias_correction(h.beta2, step));
    s.nesterov = h.nesterov ? 1.0 : 0.0;
  }

  FW_HOST_DEVICE static bool needs_grad(const Hyper& h, int32_t) { return h.nesterov; }

  template <int kStates, class C>
  FW_HOST_DEVICE static void update_moments(C, C grad, C* state, const ScalarsOf<C>& s) {
    grad = grad * s.grad_scale;
    state[0] = lerp(state[0], grad, s.exp_avg_weight);
    state[1] = lerp(state[1], grad * grad, s.exp_avg_sq_weight);
  }

  template <int kStates, class C>
  FW_HOST_DEVICE static C direction(C, C grad, const C* state, const ScalarsOf<C>& s) {
    C exp_avg = state[0];
    grad = grad * s.grad_scale;
    exp_avg = lerp(exp_avg, s.nesterov > C(0) ? grad : exp_avg, s.exp_avg_weight);
    C denom = multiply_add(root(state[1]), s.denom_scale, s.eps);
    return exp_avg / denom;
  }
};

struct SGDP : Projection {
  static constexpr int kMinStates = 0;
  static constexpr int kMaxStates = 1;

  FW_HOST_DEVICE static int lr_norm_power(const Hyper&, int64_t) { return 2; }

  FW_HOST_DEVICE static void scalars(const Hyper& h, double effective_lr, int64_t, Scalars& s) {
    s.step_size = effective_lr;
    s.momentum = h.momentum;
    s.one_minus_dampening = 1.0 - h.dampening;
    s.nesterov = h.nesterov ? 1.0 : 0.0;
    s.decoupled_decay = s.decoupled_decay / (1.0 - h.momentum);
  }

  FW_HOST_DEVICE static bool needs_grad(const Hyper& h, int32_t n_states) {
    return h.nesterov || n_states == 0;
  }

  template <int kStates, class C>
  FW_HOST_DEVICE static void update_moments(C, C grad, C* state, const ScalarsOf<C>& s) {
    grad = grad * s.grad_scale;
    if constexpr (kStates == 1) state[0] = multiply_add(s.momentum, state[0], s.one_minus_dampening * grad);
  }

  template <int kStates, class C>
  FW_HOST_DEVICE static C direction(C, C grad, const C* state, const ScalarsOf<C>& s) {
    grad = grad * s.grad_scale;
    C momentum_buffer = s.one_minus_dampening * grad;
    if constexpr (kStates == 1) momentum_buffer = state[0];
    return s.nesterov > C(0) ? multiply_add(s.momentum, momentum_buffer, grad) : momentum_buffer;
  }
};

// What an update is projected in: every channel on its own if all of them are scale-invariant, else the whole
// layer if that is, else nothing. channels_invariant may be false for a layer of one channel.
enum View : int32_t { kNoView = 0, kChannelView = 1, kLayerView = 2 };
FW_HOST_DEVICE View projection_view(bool projects, bool channels_invariant, bool layer_invariant) {
  View view = layer_invariant ? kLayerView : kNoView;
  view = channels_invariant ? kChannelView : view;
  return projects ? view : kNoView;
}

// the projection coefficient of one channel, from the sums over it or over its layer
template <class Rule>
FW_HOST_DEVICE double coef_in_view(View view, const Hyper& h, const double* channel, const double* layer) {
  double coef = view == kLayerView ? Rule::projection_coef(h, layer) : 0.0;
  return view == kChannelView ? Rule::projection_coef(h, channel) : coef;
}

// the learning rate that rotates weights of a given norm as far as lr rotates weights of norm 1
FW_HOST_DEVICE double sphere_rate(double lr, double norm, int exponent) {
  double rate = exponent > 0 ? lr * norm : lr;
  return exponent > 1 ? rate * norm : rate;
}

// the factor that rescales a group to its sphere; 1 if its norm is 0 or not finite
FW_HOST_DEVICE double sphere_factor(double radius, double sum_sq) {
  bool defined = sum_sq > 0.0 && sum_sq < INFINITY;
  return defined ? radius / sqrt(sum_sq) : 1.0;
}

template <class C>
FW_HOST_DEVICE C rescale(C param, C factor) {
  return param * factor;
}

// moves the average towards the parameter; weight 1 copies the parameter
template <class C>
FW_HOST_DEVICE void average_update(C& average, C param, C weight) {
  average = lerp(average, param, weight < C(0.5) ? weight : weight - C(1));
}

// Diagonal of the inverse preconditioner 1 / P of this step, with its gradient in the second moment: the
// update that a first moment of all ones would produce at learning rate 1. It is 1 for a rule without second
// moment.
template <class Rule, int kStates, class C>
FW_HOST_DEVICE C inverse_preconditioner(C param, C grad, C* state, const ScalarsOf<C>& s) {
  if constexpr (Rule::kMinStates < 2) return C(1);
  Rule::template update<kStates>(param, grad, state, s);
  ScalarsOf<C> frozen = s;
  frozen.weight_decay = C(0);
  frozen.decoupled_decay = C(0);
  // far below the last digit, so that the moments do not change
  frozen.exp_avg_weight = C(1e-30);
  frozen.exp_avg_sq_weight = C(1e-30);
  frozen.exp_avg_sq_from_grad = C(0);
  frozen.exp_avg_sq_scale = C(1);
  state[0] = C(1);
  C moved = C(0);
  Rule::template update<kStates>(moved, C(0), state, frozen);
  return -moved;
}

}  // namespace fw

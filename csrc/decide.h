// The decide stage, between measure and update, once for the CPU and CUDA: clipping, the non-finite policy,
// counters, learning rates, the scalars of every row, and the telemetry row. All of it in double.
// backends/reference.py has the same statements in the same order.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "rules.h"
#include "schedules.h"
#include "totals.h"

namespace fw {

// counts are below 2^62
constexpr float kCountLimit = 4611686018427387904.0f;

// the norms of the unscaled gradients, from sums over the gradients as they came
FW_HOST_DEVICE void set_norms(StepDecision& decision, const Partial& total) {
  decision.grad_norm = sqrt(total.l2_sq) * decision.unscale;
  decision.grad_norm_l1 = total.l1 * decision.unscale;
}

// whether a GradScaler has found a gradient that is not finite, in any process
FW_HOST_DEVICE bool found_inf(const Step& step) {
  if (!step.found_inf) return false;
  return step.totals ? flags_of(step)[1] != 0.0 : *at<float>(step.found_inf) != 0.0f;
}

// t counts the updates made before this one, and is the step that schedules are evaluated at
FW_HOST_DEVICE StepDecision decide(const Step& step, const Partial& total) {
  StepDecision decision = {};
  decision.t = at<Counters>(step.counters)->step;
  decision.unscale = step.grad_scale ? 1.0 / static_cast<double>(*at<float>(step.grad_scale)) : 1.0;
  decision.rect = NAN;
  decision.grad_norm = NAN;
  decision.grad_norm_l1 = NAN;
  if (step.measure) set_norms(decision, total);
  decision.skipped = found_inf(step) || (step.skip_nonfinite && total.nonfinite > 0);
  decision.clip_coef = step.clip ? clip_coefficient(decision.grad_norm, step.max_grad_norm) : 1.0;
  return decision;
}

FW_HOST_DEVICE Rates rates_of(const Step& step, const StepDecision& decision, int64_t group) {
  const Hyper& h = at<Hyper>(step.hypers)[group];
  Rates rates;
  rates.lr = h.lr * multiplier(at<Segment>(h.lr_segments), h.n_lr_segments, decision.t);
  rates.weight_decay =
      h.weight_decay * multiplier(at<Segment>(h.decay_segments), h.n_decay_segments, decision.t);
  return rates;
}

FW_HOST_DEVICE void set_rates(const Step& step, const StepDecision& decision, int64_t group) {
  at<Rates>(step.rates)[group] = rates_of(step, decision, group);
}

// number of updates of a row: the exact count, unless other code has written the float of the state
FW_HOST_DEVICE int64_t updates_of(const Row& row) {
  const int64_t exact = at<RowCounters>(row.counters)->step;
  const float shown = *at<float>(row.step);
  const bool written = shown != static_cast<float>(exact) && shown >= 0.0f && shown < kCountLimit;
  return written ? static_cast<int64_t>(shown) : exact;
}

FW_HOST_DEVICE void count_update(const Row& row) {
  const int64_t updates = updates_of(row) + 1;
  at<RowCounters>(row.counters)->step = updates;
  *at<float>(row.step) = static_cast<float>(updates);
}

// for every row that has an average, with or without a gradient
FW_HOST_DEVICE void count_average(const Step& step, const StepDecision& decision, const Row& row) {
  if (!row.average) return;
  int64_t& n_averaged = *at<int64_t>(row.n_averaged);
  bool due = is_averaged(step.average_kind, step.average_start, step.average_every, decision.t + 1);
  if (due) n_averaged += 1;
  at<RowCounters>(row.counters)->average_weight =
      due ? average_weight(step.average_kind, step.average_decay, n_averaged) : 0.0;
}

FW_HOST_DEVICE double average_weight_of(const Row& row) {
  return at<RowCounters>(row.counters)->average_weight;
}

// whether two rows have the same scalars, so that they need not be computed twice
FW_HOST_DEVICE bool same_scalars(const Step& step, int64_t row, int64_t other) {
  const Row &a = at<Row>(step.rows)[row], &b = at<Row>(step.rows)[other];
  return a.group == b.group && a.initialized == b.initialized && updates_of(a) == updates_of(b);
}

// the sphere of a group, or null if it has none
FW_HOST_DEVICE Sphere* sphere_of(const Step& step, int64_t group) {
  if (!step.spheres) return nullptr;
  Sphere* sphere = at<Sphere>(step.spheres) + group;
  return sphere->norm ? sphere : nullptr;
}

// the scalars of update number `updates` of a row
template <class Rule>
FW_HOST_DEVICE Scalars scalars_of(const Step& step, const StepDecision& decision, const Rates& rates,
                                  int64_t row, int64_t updates) {
  const Row& r = at<Row>(step.rows)[row];
  const Hyper& h = at<Hyper>(step.hypers)[r.group];
  const Sphere* sphere = sphere_of(step, r.group);
  double effective_lr = rates.lr;
  if (sphere)
    effective_lr = sphere_rate(effective_lr, *at<double>(sphere->norm), Rule::lr_norm_power(h, updates));
  Scalars s = common_scalars(h, rates, decision.clip_coef * decision.unscale);
  Rule::scalars(h, effective_lr, updates, s);
  start_exp_avg_sq(h, updates, r.initialized, decision.grad_norm * decision.clip_coef, step.init_norm_sq, s);
  return s;
}

template <class Rule>
FW_HOST_DEVICE void set_scalars(const Step& step, const StepDecision& decision, const Rates& rates,
                                int64_t row) {
  const int64_t updates = updates_of(at<Row>(step.rows)[row]);
  at<Scalars>(step.scalars)[row] = scalars_of<Rule>(step, decision, rates, row, updates);
}

// writes the projection coefficient of one channel for all of its pieces
FW_HOST_DEVICE void set_projection_coef(const Step& step, const Row& row, int64_t channel,
                                        double projection_coef) {
  const int64_t each = pieces_of_channel(row);
  double* projection_coefs = at<double>(step.projection_coefs) + row.first_piece + channel * each;
  for (int64_t i = 0; i < each; ++i) projection_coefs[i] = projection_coef;
}

// sets the rescale factor of a sphere group from the sum of squares of its parameters, and the stored norm
FW_HOST_DEVICE void set_factor(Sphere& sphere, double sum_sq) {
  double& norm = *at<double>(sphere.norm);
  const double radius = sphere.radius > 0.0 ? sphere.radius : norm;
  sphere.factor = sphere_factor(radius, sum_sq);
  norm = radius;
}

// writes the telemetry row of this step, and advances the counters
FW_HOST_DEVICE void record(const Step& step, const StepDecision& decision) {
  Counters& counters = *at<Counters>(step.counters);
  PendingScalars& pending_scalars = *at<PendingScalars>(step.pending_scalars);
  if (!decision.skipped) counters.step = decision.t + 1;
  if (step.telemetry_capacity > 0) {
    Telemetry& line = at<Telemetry>(step.telemetry)[counters.calls % step.telemetry_capacity];
    line.step = static_cast<double>(counters.step);
    line.lr = at<Rates>(step.rates)[0].lr;
    line.grad_norm = decision.grad_norm;
    line.grad_norm_l1 = decision.grad_norm_l1;
    line.clip_coef = decision.clip_coef;
    line.rect = decision.rect;
    line.skipped = decision.skipped ? 1.0 : 0.0;
    line.loss = pending_scalars.loss;
    line.sharpness = pending_scalars.sharpness;
  }
  pending_scalars.loss = NAN;
  pending_scalars.sharpness = NAN;
  counters.calls += 1;
}

// whether the update sums the norms: there was no measure stage, and telemetry is on
FW_HOST_DEVICE bool accumulates(const Step& step) { return !step.measure && step.telemetry_capacity > 0; }

// writes the norms that the update has summed into the row that record() wrote
FW_HOST_DEVICE void record_norms(const Step& step, StepDecision& decision, const Partial& total) {
  set_norms(decision, total);
  int64_t last = at<Counters>(step.counters)->calls - 1;
  Telemetry& line = at<Telemetry>(step.telemetry)[last % step.telemetry_capacity];
  line.grad_norm = decision.grad_norm;
  line.grad_norm_l1 = decision.grad_norm_l1;
}

}  // namespace fw

// The decide stage, between measure and update, once for the CPU and CUDA: clipping, the non-finite policy,
// counters, learning rates, the scalars of every row, and the telemetry row. All of it in double.
// reference/backend.py states the same in the same order.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "reduce.h"
#include "rules.h"
#include "schedules.h"

namespace fw {

// the norms of gradients that came multiplied by 1 / unscale
FW_HD void note_norms(Verdict& verdict, const Partial& total) {
  verdict.grad_norm = sqrt(total.l2_sq) * verdict.unscale;
  verdict.grad_norm_l1 = total.l1 * verdict.unscale;
}

// t is the number of updates made before this one: the index that schedules are evaluated at
FW_HD Verdict judge(const Step& step, const Partial& total) {
  Verdict verdict = {};
  verdict.t = at<Counters>(step.counters)->step;
  verdict.unscale = step.grad_scale ? 1.0 / static_cast<double>(*at<float>(step.grad_scale)) : 1.0;
  verdict.rect = verdict.grad_norm = verdict.grad_norm_l1 = NAN;
  if (step.measure) note_norms(verdict, total);
  bool found_inf = step.found_inf && *at<float>(step.found_inf) != 0.0f;
  verdict.skipped = found_inf || (step.skip_nonfinite && total.nonfinite > 0);
  double ratio = step.clip ? step.max_grad_norm / (verdict.grad_norm + 1e-6) : 1.0;
  // a NaN ratio stays, as in torch.nn.utils.clip_grad_norm_
  verdict.clip_coef = ratio >= 1.0 ? 1.0 : ratio;
  return verdict;
}

FW_HD Rates rates_of(const Step& step, const Verdict& verdict, int64_t group) {
  const Hyper& h = at<Hyper>(step.hypers)[group];
  const Segment* segments = at<Segment>(step.segments);
  const double* values = at<double>(step.values);
  Rates rates;
  rates.lr = h.lr * multiplier(segments + h.lr_segment, h.lr_segments, values, verdict.t);
  rates.weight_decay =
      h.weight_decay * multiplier(segments + h.decay_segment, h.decay_segments, values, verdict.t);
  return rates;
}

FW_HD void set_rates(const Step& step, const Verdict& verdict, int64_t group) {
  at<Rates>(step.rates)[group] = rates_of(step, verdict, group);
}

// updates that a row has had
FW_HD int64_t updates_of(const Row& row) { return at<RowCounters>(row.counters)->step; }

FW_HD void count_update(const Row& row) {
  RowCounters& counters = *at<RowCounters>(row.counters);
  counters.step += 1;
  *at<float>(row.step_float) = static_cast<float>(counters.step);
}

// of every row that keeps an average, whether or not it has a gradient
FW_HD void count_average(const Step& step, const Verdict& verdict, const Row& row) {
  if (!row.average) return;
  RowCounters& counters = *at<RowCounters>(row.counters);
  bool due = is_averaged(step.average_kind, step.average_start, step.average_every, verdict.t + 1);
  counters.n_averaged += due;
  counters.average_weight =
      due ? average_weight(step.average_kind, step.average_decay, counters.n_averaged) : 0.0;
}

FW_HD double average_weight_of(const Row& row) { return at<RowCounters>(row.counters)->average_weight; }

// rows of one group at one step share their scalars, so a serial caller need not compute them again
FW_HD bool same_scalars(const Step& step, int64_t row, int64_t other) {
  const Row &a = at<Row>(step.rows)[row], &b = at<Row>(step.rows)[other];
  return a.group == b.group && a.initialized == b.initialized && updates_of(a) == updates_of(b);
}

// the sphere of a group, or null
FW_HD Sphere* sphere_of(const Step& step, int64_t group) {
  if (!step.spheres) return nullptr;
  Sphere* sphere = at<Sphere>(step.spheres) + group;
  return sphere->norm ? sphere : nullptr;
}

// what update number `updates` of a row needs
template <class Rule>
FW_HD Scalars scalars_of(const Step& step, const Verdict& verdict, const Rates& rates, int64_t row,
                         int64_t updates) {
  const Row& r = at<Row>(step.rows)[row];
  const Hyper& h = at<Hyper>(step.hypers)[r.group];
  const Sphere* sphere = sphere_of(step, r.group);
  double eta = rates.lr;
  if (sphere) eta = sphere_rate(eta, *at<double>(sphere->norm), Rule::sphere_exponent(h, updates));
  Scalars s = common_scalars(h, rates, verdict.clip_coef * verdict.unscale);
  Rule::scalars(h, eta, updates, s);
  if (updates == 1 && !r.initialized && h.init == kInitGrad) s.init_grad = h.init_scale;
  if (updates == 1 && !r.initialized && h.init == kInitRandom) {
    double norm = verdict.grad_norm * verdict.clip_coef;
    s.init_state = h.init_scale * norm * norm / step.init_norm_sq;
  }
  return s;
}

template <class Rule>
FW_HD void set_scalars(const Step& step, const Verdict& verdict, int64_t row) {
  const Row& r = at<Row>(step.rows)[row];
  const Rates& rates = at<Rates>(step.rates)[r.group];
  at<Scalars>(step.scalars)[row] = scalars_of<Rule>(step, verdict, rates, row, updates_of(r));
}

// how much of the parameter leaves the update in one channel, for all pieces of it
FW_HD void set_radial(const Step& step, const Row& row, int64_t channel, double radial) {
  const int64_t each = pieces_of_channel(row);
  double* radials = at<double>(step.radials) + row.first_piece + channel * each;
  for (int64_t i = 0; i < each; ++i) radials[i] = radial;
}

// from the squares of all parameters of a group to what brings them to its sphere, where they are from then
// on
FW_HD void set_factor(Sphere& sphere, double squares) {
  double& norm = *at<double>(sphere.norm);
  const double radius = sphere.radius > 0.0 ? sphere.radius : norm;
  sphere.factor = sphere_factor(radius, squares);
  norm = radius;
}

// the telemetry row of this step, and the counts of the next
FW_HD void record(const Step& step, const Verdict& verdict) {
  Counters& counters = *at<Counters>(step.counters);
  Slots& slots = *at<Slots>(step.slots);
  if (!verdict.skipped) counters.step = verdict.t + 1;
  if (step.telemetry_capacity > 0) {
    Telemetry& line = at<Telemetry>(step.telemetry)[counters.calls % step.telemetry_capacity];
    line.step = static_cast<double>(counters.step);
    line.lr = at<Rates>(step.rates)[0].lr;
    line.grad_norm = verdict.grad_norm;
    line.grad_norm_l1 = verdict.grad_norm_l1;
    line.clip_coef = verdict.clip_coef;
    line.rect = verdict.rect;
    line.skipped = verdict.skipped ? 1.0 : 0.0;
    line.loss = slots.loss;
    line.sharpness = slots.sharpness;
  }
  slots.loss = slots.sharpness = NAN;
  counters.calls += 1;
}

// whether the update adds up the norms, because nothing measured them before and somebody wants to know
FW_HD bool accumulates(const Step& step) { return !step.measure && step.telemetry_capacity > 0; }

// the norms that the update added up, into the row that record() wrote
FW_HD void record_norms(const Step& step, Verdict& verdict, const Partial& total) {
  note_norms(verdict, total);
  int64_t last = at<Counters>(step.counters)->calls - 1;
  Telemetry& line = at<Telemetry>(step.telemetry)[last % step.telemetry_capacity];
  line.grad_norm = verdict.grad_norm;
  line.grad_norm_l1 = verdict.grad_norm_l1;
}

}  // namespace fw

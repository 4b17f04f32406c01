// What follows the update of a block on the CPU: the weight average, or for a group on a sphere the sum of
// squares of its parameters, from which rescale_chunks() brings the group back and averages it.
// No mathematics here: rules.h and decide.h have it. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../decide.h"
#include "blocks.h"
#include "runs.h"

namespace fw {
namespace {

// the sum of squares of one chunk's parameters; the lanes fix the order of the sum
struct SumSqLanes {
  double sum_sq[kLanes] = {};

  template <class C>
  FW_LEAF void add(const C* __restrict param, int count) {
    double a[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) a[lane] = sum_sq[lane];
    const int whole = count - count % kLanes;
    for (int i = 0; i < whole; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) accumulate_l2(a[lane], param[i + lane]);
    for (int i = whole; i < count; ++i) accumulate_l2(a[i - whole], param[i]);
    for (int lane = 0; lane < kLanes; ++lane) sum_sq[lane] = a[lane];
  }

  double sum() const {
    double total = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) total += sum_sq[lane];
    return total;
  }
};

template <class C>
FW_LEAF void average_block(C* __restrict average, const C* __restrict param, int count, C weight) {
  for (int i = 0; i < count; ++i) average_update(average[i], param[i], weight);
}

// averages the value of the parameter as it is stored, so a rounded one is read back
template <class C>
void average(const Row& row, int64_t offset, int count, C weight, C* scratch) {
  if (!row.average || !(weight > C(0))) return;
  const C* param = load_param<C>(row, offset, count, scratch);
  average_block(at<C>(row.average) + offset, param, count, weight);
}

// after a block is updated: accumulates squares for a group on a sphere, otherwise updates the average
template <class C>
void finish_block(const Row& row, int64_t offset, int count, C weight, SumSqLanes* sum_sq, C* scratch) {
  if (sum_sq)
    sum_sq->add(load_param<C>(row, offset, count, scratch), count);
  else
    average<C>(row, offset, count, weight, scratch);
}

void store_sum_sq(const Step& step, const Chunk& chunk, const SumSqLanes& sum_sq) {
  at<double>(step.squares)[&chunk - at<Chunk>(step.chunks)] = sum_sq.sum();
}

template <class C>
FW_LEAF void rescale_block(C* __restrict param, int count, C factor) {
  for (int i = 0; i < count; ++i) param[i] = rescale(param[i], factor);
}

template <class C>
void rescale_chunk(const Row& row, const RandomKey& key, const Chunk& chunk, C factor, C weight) {
  alignas(64) C scratch[kBlock];
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    const int64_t offset = chunk.offset + done;
    const int count = block_size(chunk, done);
    C* param = load_param<C>(row, offset, count, scratch);
    rescale_block(param, count, factor);
    store_param(param, row, key, offset, count);
    average<C>(row, offset, count, weight, scratch);
  }
}

// the sum of squares of all parameters of a group on a sphere
double sum_sq_of(const Step& step, int64_t group, const Sphere& sphere) {
  return step.totals ? combine_slots(step, group) : combine_sum_sq(step, sphere);
}

// the second pass over the groups on a sphere, once the squares of all their parameters are summed
void rescale_chunks(const Step& step) {
#pragma omp single
  for (int64_t group = 0; group < step.n_groups; ++group)
    if (Sphere* sphere = sphere_of(step, group)) set_factor(*sphere, sum_sq_of(step, group, *sphere));
  visit_chunks<Runs::kForwards>(step.n_chunks, [&](int64_t i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    const Sphere* sphere = sphere_of(step, row.group);
    if (!sphere) return;
    const double factor = sphere->factor, weight = average_weight_of(row);
    const RandomKey key(row, at<StepDecision>(step.decision)->t, kSpherePass);
    if (row.dtype == kFloat64)
      rescale_chunk<double>(row, key, chunk, factor, weight);
    else
      rescale_chunk<float>(row, key, chunk, static_cast<float>(factor), static_cast<float>(weight));
  });
}

}  // namespace
}  // namespace fw

// Computes the diagonal preconditioner P of the next step, C = P^-1/2, from the optimizer's packed table;
// optionally scaled per row by sqrt(lr / threshold). Read-only: update counts and learning rates are those
// that the decide stage will find, but the step is not taken. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "decide.h"

namespace fw {

FW_HOST_DEVICE StepDecision next_decision(const Step& step, const PreconditionerOp& call) {
  return decide(step, Partial{0.0, *at<double>(call.l2_sq), 0});
}

// the scalars of one row at learning rate 1, because P does not contain the rate
template <class Rule>
FW_HOST_DEVICE Scalars next_scalars(const Step& step, const StepDecision& decision, int64_t row) {
  const Row& r = at<Row>(step.rows)[row];
  Rates rates = rates_of(step, decision, r.group);
  rates.lr = 1.0;
  return scalars_of<Rule>(step, decision, rates, row, updates_of(r) + 1);
}

// the factor from the preconditioned sharpness to the edge ratio
FW_HOST_DEVICE double lr_over_threshold(const Step& step, const PreconditionerOp& call,
                                        const StepDecision& decision, int64_t row) {
  return rates_of(step, decision, at<Row>(step.rows)[row].group).lr / at<double>(call.thresholds)[row];
}

// an element of C, scaled by the root of a factor
template <class C>
FW_HOST_DEVICE C scale_of(C inverse, C factor) {
  return root(inverse * factor);
}

}  // namespace fw

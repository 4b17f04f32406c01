// The pre-conditioner P of the step about to be made, from the optimizer's own table: C = P^-1/2, and C with
// the learning rate and the threshold of each group folded in. Nothing of the step is written: the update
// counts and rates are those that the decide stage will find. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "decide.h"

namespace fw {

FW_HOST_DEVICE StepDecision decision_ahead(const Step& step, const PreconditionerOp& call) {
  return decide(step, Partial{0.0, *at<double>(call.l2_sq), 0});
}

// of one row: at rate 1, because P does not hold the rate
template <class Rule>
FW_HOST_DEVICE Scalars scalars_ahead(const Step& step, const StepDecision& decision, int64_t row) {
  const Row& r = at<Row>(step.rows)[row];
  Rates rates = rates_of(step, decision, r.group);
  rates.lr = 1.0;
  return scalars_of<Rule>(step, decision, rates, row, updates_of(r) + 1);
}

// the factor that makes the edge ratio of the pre-conditioned sharpness
FW_HOST_DEVICE double fold_of(const Step& step, const PreconditionerOp& call, const StepDecision& decision,
                              int64_t row) {
  return rates_of(step, decision, at<Row>(step.rows)[row].group).lr / at<double>(call.thresholds)[row];
}

template <class C>
FW_HOST_DEVICE C scale_of(C preconditioner, C fold) {
  return root(preconditioner * fold);
}

}  // namespace fw

// The pre-conditioner P of the step about to be made, from the optimizer's own table: C = P^-1/2, and C with
// the learning rate and the threshold of each group folded in. Nothing of the step is written: the update
// counts and rates are those that the decide stage will find. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "decide.h"

namespace fw {

FW_HD Verdict verdict_ahead(const Step& step, const Response& call) {
  return judge(step, Partial{0.0, *at<double>(call.l2_sq), 0});
}

// of one row: at rate 1, because P does not hold the rate
template <class Rule>
FW_HD Scalars scalars_ahead(const Step& step, const Verdict& verdict, int64_t row) {
  const Row& r = at<Row>(step.rows)[row];
  Rates rates = rates_of(step, verdict, r.group);
  rates.lr = 1.0;
  return scalars_of<Rule>(step, verdict, rates, row, updates_of(r) + 1);
}

// the factor that makes the edge ratio of the pre-conditioned sharpness
FW_HD double fold_of(const Step& step, const Response& call, const Verdict& verdict, int64_t row) {
  return rates_of(step, verdict, at<Row>(step.rows)[row].group).lr / at<double>(call.edges)[row];
}

template <class C>
FW_HD C scale_of(C response, C fold) {
  return root(response * fold);
}

}  // namespace fw

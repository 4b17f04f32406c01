// Runs of consecutive chunks, which a thread takes one at a time. It goes through a run upwards: a processor
// that reads ahead does so along rising addresses, and where the next chunk lay below or had gone to another
// thread, every chunk began with reads that had to be waited for. Sums are kept per chunk, so the bits depend
// neither on the runs nor on the threads. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <omp.h>

#include "../table.h"

namespace fw {
namespace {

// most chunks of a run
constexpr int64_t kMostChunks = 16;
// runs that each thread takes at least where there are as many chunks, so that no thread waits long for the
// last one
constexpr int64_t kRunsPerThread = 32;

inline int64_t chunks_of_run(int64_t n_chunks, int64_t threads) {
  const int64_t chunks = n_chunks / (kRunsPerThread * threads);
  return chunks < 1 ? 1 : chunks > kMostChunks ? kMostChunks : chunks;
}

enum class Runs { kForwards, kBackwards };

// Calls visit(i) for every chunk i, each in one thread of the parallel region, which do not wait for one
// another at the end. Backwards, the last run comes first.
template <Runs kOrder, class Visit>
void visit_chunks(int64_t n_chunks, const Visit& visit) {
  const int64_t each = chunks_of_run(n_chunks, omp_get_num_threads()), runs = (n_chunks + each - 1) / each;
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t first = (kOrder == Runs::kForwards ? run : runs - 1 - run) * each;
    for (int64_t i = first; i < first + each && i < n_chunks; ++i) visit(i);
  }
}

}  // namespace
}  // namespace fw

// A pass that reads or rewrites every byte of some columns and computes nothing, in the chunks, runs and
// threads of a step: the speed that memory allows a step over the same columns. Only benchmarks call it.
// Compiled once per instruction set, as step.cpp is. SPDX-License-Identifier: Apache-2.0
#include "blocks.h"
#include "runs.h"
#include "step.h"

namespace fw {
namespace {

using Word = uint16_t;

// read at run time, so that the compiler cannot leave out an addition that changes nothing
const volatile Word kNothing = 0;

FW_LEAF void rewrite_words(Word* __restrict words, int64_t count, Word added) {
  for (int64_t i = 0; i < count; ++i) words[i] = static_cast<Word>(words[i] + added);
}

FW_LEAF Word sum_words(const Word* __restrict words, int64_t count) {
  Word sum = 0;
  for (int64_t i = 0; i < count; ++i) sum = static_cast<Word>(sum + words[i]);
  return sum;
}

Word stream_chunk(const Stream& call, const Chunk& chunk, Word nothing) {
  const uint64_t* columns = call.columns + chunk.row * int64_t(call.n_columns);
  Word sum = 0;
  for (int32_t done = 0; done < chunk.count; done += kBlock)
    for (int32_t k = 0; k < call.n_columns; ++k) {
      Word* words = at<Word>(columns[k] + (chunk.offset + done) * call.item_sizes[k]);
      const int64_t count = int64_t(block_size(chunk, done)) * call.item_sizes[k] / sizeof(Word);
      if (k < call.n_rewritten)
        rewrite_words(words, count, nothing);
      else
        sum = static_cast<Word>(sum + sum_words(words, count));
    }
  return sum;
}

int64_t stream(const Stream& call, int threads) {
  const Word nothing = kNothing;
  int64_t total = 0;
#pragma omp parallel num_threads(threads)
  {
    int64_t sum = 0;
    const auto visit = [&](int64_t i) { sum += stream_chunk(call, call.chunks[i], nothing); };
    if (call.backwards)
      visit_chunks<Runs::kBackwards>(call.n_chunks, visit);
    else
      visit_chunks<Runs::kForwards>(call.n_chunks, visit);
#pragma omp atomic
    total += sum;
  }
  return total;
}

}  // namespace

extern const StreamFunction FW_JOIN(stream_, FW_ISA);
const StreamFunction FW_JOIN(stream_, FW_ISA) = stream;

}  // namespace fw

// Norms of the gradients and sums over channels: the statement per element, and the combination of partial
// sums in a fixed order, without float atomics. Totals are in double, which no finite float32 gradient
// overflows. Processors whose double arithmetic is as fast as their memory sum in double; others may sum
// float32 numbers in a FloatPair, once into double per thread. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "table.h"

namespace fw {

// squares are summed in double because clipping depends on them; magnitudes are only reported, so a short run
// of them may be summed in the type of the arithmetic
template <class S, class V>
FW_HOST_DEVICE void accumulate_l2(S& l2_sq, V grad) {
  S x = widened(grad);
  l2_sq = multiply_add(x, x, l2_sq);
}

template <class C>
FW_HOST_DEVICE void accumulate_l1(C& l1, C grad) {
  l1 += magnitude(grad);
}

template <class C>
FW_HOST_DEVICE bool is_nonfinite(C x) {
  return !(magnitude(x) < C(INFINITY));
}

// A sum of magnitudes or squares as a float and the sum of its rounding errors, without double arithmetic.
// After n terms it is within n^2 2^-49 + n 2^-46 of the exact sum, relatively, provided that multiply_add
// rounds once and no term overflows or is lost; see fits_pair().
struct FloatPair {
  float sum = 0.0f, error = 0.0f;

  FW_HOST_DEVICE void add_square(float x) { set(multiply_add(x, x, sum), x, x); }
  FW_HOST_DEVICE void add(float x) { set(sum + x, x, 1.0f); }

  FW_HOST_DEVICE double value() const { return static_cast<double>(sum) + static_cast<double>(error); }

 private:
  // Replaces the sum by one that a term a * b has been added to. What rounding took away is that of the term
  // and that of the old sum; for a term that is no larger than the old sum, the second is zero.
  FW_HOST_DEVICE void set(float rounded, float a, float b) {
    const float added = rounded - sum, old = rounded - added;
    error += multiply_add(a, b, -added) + (sum - old);
    sum = rounded;
  }
};

// Whether magnitudes with this sum, four at most, may be added to a pair, and their squares to another: sums
// over 2^24 of them do not overflow, and the squares that underflow or are flushed to zero take less than
// 2^-36 of the sum away.
FW_HOST_DEVICE bool fits_pair(float sum) { return sum < 0x1p50f && (sum >= 0x1p-40f || sum == 0.0f); }

FW_HOST_DEVICE void combine(Partial& total, const Partial& part) {
  total.l1 += part.l1;
  total.l2_sq += part.l2_sq;
  total.nonfinite += part.nonfinite;
}

FW_HOST_DEVICE Partial combine_all(const Partial* partials, int64_t count) {
  Partial total = {};
  for (int64_t i = 0; i < count; ++i) combine(total, partials[i]);
  return total;
}

// the sum of squares of all parameters of a group on a sphere, from the sums over its chunks
FW_HOST_DEVICE double combine_sum_sq(const Step& step, const Sphere& sphere) {
  const double* sum_sq = at<double>(step.squares) + sphere.first_chunk;
  double total = 0.0;
  for (int64_t i = 0; i < sphere.n_chunks; ++i) total += sum_sq[i];
  return total;
}

// Sums over channels: a channel is cut into pieces of kPiece elements, whose sums are added in order.

FW_HOST_DEVICE int64_t pieces_of_channel(const Row& row) { return (row.channel_size + kPiece - 1) / kPiece; }

// a piece of a channel, counted from the start of its chunk
struct Piece {
  int32_t begin, count;
};

// the pieces of a chunk, which consists of whole channels or a part of one
struct Pieces {
  int64_t first;
  int32_t count, of_channel, channel_size, elements;

  FW_HOST_DEVICE Pieces(const Row& row, const Chunk& chunk) {
    const int64_t each = pieces_of_channel(row), channel = chunk.offset / row.channel_size;
    first = row.first_piece + channel * each + (chunk.offset - channel * row.channel_size) / kPiece;
    elements = chunk.count;
    channel_size = static_cast<int32_t>(row.channel_size < elements ? row.channel_size : elements);
    of_channel = (channel_size + kPiece - 1) / kPiece;
    count = elements / channel_size * of_channel;
  }

  FW_HOST_DEVICE Piece operator[](int32_t i) const {
    const int32_t channel = i / of_channel, skipped = (i - channel * of_channel) * kPiece;
    const int32_t left = channel_size - skipped;
    return {channel * channel_size + skipped, left < kPiece ? left : kPiece};
  }
};

template <int N>
FW_HOST_DEVICE void combine(double (&total)[N], const double* part) {
  for (int k = 0; k < N; ++k) total[k] += part[k];
}

// the sums over one channel of a row
template <int N>
FW_HOST_DEVICE void combine_channel(double (&total)[N], const Step& step, const Row& row, int64_t channel) {
  const int64_t each = pieces_of_channel(row);
  const double* sums = at<double>(step.sums) + (row.first_piece + channel * each) * N;
  for (int64_t i = 0; i < each; ++i) combine(total, sums + i * N);
}

// the sums over consecutive chunks, and the numbers of their channels that are not scale-invariant
template <int N>
FW_HOST_DEVICE void combine_chunks(double (&total)[N], const Step& step, int64_t first, int64_t count) {
  const double* sums = at<double>(step.chunk_sums) + first * N;
  for (int64_t i = 0; i < count; ++i) combine(total, sums + i * N);
}

}  // namespace fw

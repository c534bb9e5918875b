// The two rewritings of din_fast/fold.py and their gradients, on plain pointers: the first Linear of a unit collapses to
// three matrices, and a BatchNorm and Dice's gate become affine maps of z. For the ops that take raw parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "unit.h"

namespace din_fast {

// A BatchNorm: none, by its running statistics, or by the statistics of the batch.
enum NormMode { kNoNorm, kFrozen, kBatch };

template <class T>
struct Norm {
  NormMode mode = kNoNorm;
  const T *weight = nullptr, *bias = nullptr, *mean = nullptr, *variance = nullptr;  // null: 1 and 0; running ones
  T eps = 0;
  T w(int64_t h) const { return weight ? weight[h] : T(1); }
  T b(int64_t h) const { return bias ? bias[h] : T(0); }
  T inverse(int64_t h) const { return T(1) / std::sqrt(variance[h] + eps); }
};

// A hidden layer as a module holds it.
template <class T>
struct RawLayer {
  int64_t units = 0, inputs = 0, slopes = 0;  // slopes: 0, 1 or units
  const T *weight = nullptr, *bias = nullptr, *slope = nullptr;
  Norm<T> norm, gate;
  bool silu = false;  // the Dice that SiLU is: its gate sees what the norm gives, and its slope is 0
  bool batch() const { return norm.mode == kBatch || gate.mode == kBatch; }
};

// Rows of a hidden layer's numbers, of `units` each: what Layer<T> points to, and the batch's variance.
enum Number { kBias, kCenter, kNormScale, kNormShift, kGateScale, kGateShift, kSlope, kVariance, kNumbers };

// weight [units][groups * dim], blocks [groups][3] -> a [3][units][dim]
template <class T>
void fold_first(const T* weight, const std::vector<int64_t>& blocks, int64_t units, int64_t dim, T* a) {
  const int64_t groups = (int64_t)blocks.size() / 3;
  std::fill(a, a + 3 * units * dim, T(0));
  for (int64_t g = 0; g < groups; g++)
    for (int m = 0; m < 3; m++) {
      const T factor = (T)blocks[3 * g + m];
      if (factor == T(0)) continue;
      for (int64_t h = 0; h < units; h++) {
        const T* from = weight + (h * groups + g) * dim;
        T* to = a + (m * units + h) * dim;
        for (int64_t d = 0; d < dim; d++) to[d] += factor * from[d];
      }
    }
}

// The gradient of fold_first.
template <class T>
void unfold_first(const T* d_a, const std::vector<int64_t>& blocks, int64_t units, int64_t dim, T* d_weight) {
  const int64_t groups = (int64_t)blocks.size() / 3;
  for (int64_t h = 0; h < units; h++)
    for (int64_t g = 0; g < groups; g++) {
      T* to = d_weight + (h * groups + g) * dim;
      std::fill(to, to + dim, T(0));
      for (int m = 0; m < 3; m++) {
        const T factor = (T)blocks[3 * g + m];
        if (factor == T(0)) continue;
        const T* from = d_a + (m * units + h) * dim;
        for (int64_t d = 0; d < dim; d++) to[d] += factor * from[d];
      }
    }
}

// Scales and shifts of a layer, from its norms and, where it has batch statistics, the batch's mean and variance, which are
// in `numbers` already; and how the statistics answer, `response` [2][4][units]: din_fast/fold.py, Affine.
template <class T>
void affine(const RawLayer<T>& raw, double count, T* numbers, double* response) {
  const int64_t H = raw.units;
  const Norm<T>&norm = raw.norm, &gate = raw.gate;
  const bool batch = raw.batch();
  auto row = [&](Number n) { return numbers + n * H; };
  if (response) std::fill(response, response + 8 * H, 0.0);
  for (int64_t h = 0; h < H; h++) {
    if (!batch) row(kCenter)[h] = row(kVariance)[h] = T(0);
    const T mean = row(kCenter)[h], variance = row(kVariance)[h];
    row(kBias)[h] = raw.bias ? raw.bias[h] : T(0);
    row(kSlope)[h] = raw.silu || !raw.slope ? T(0) : raw.slope[raw.slopes == 1 ? 0 : h];
    // by_variance: -2 d / d variance; in double, of the scales as they are used
    T scale = 1, shift = 0;
    double scale_by_variance = 0;
    if (norm.mode == kBatch) {
      scale = norm.w(h) * (T(1) / std::sqrt(variance + norm.eps));
      shift = norm.b(h);
      scale_by_variance = scale / ((double)variance + norm.eps);
    } else if (norm.mode == kFrozen) {
      scale = norm.w(h) * norm.inverse(h);
      shift = norm.b(h) + scale * (mean - norm.mean[h]);
    }
    T gate_scale = scale, gate_shift = shift;  // SiLU's
    double gate_by_variance = scale_by_variance;
    if (gate.mode == kBatch) {
      const double squared = (double)scale * scale, inverse = 1 / std::sqrt(squared * variance + gate.eps);
      gate_scale = gate.w(h) * (scale * (T(1) / std::sqrt(scale * scale * variance + gate.eps)));
      gate_shift = gate.b(h);
      gate_by_variance = gate_scale * squared * inverse * inverse + gate.w(h) * gate.eps * inverse * inverse * inverse * scale_by_variance;
    } else if (gate.mode == kFrozen) {
      const T rest = gate.w(h) * gate.inverse(h), at_center = norm.mode ? shift : mean;
      gate_scale = rest * scale;
      gate_shift = gate.b(h) + rest * (at_center - gate.mean[h]);
      gate_by_variance = rest * scale_by_variance;
    }
    row(kNormScale)[h] = scale;
    row(kNormShift)[h] = shift;
    row(kGateScale)[h] = gate_scale;
    row(kGateShift)[h] = gate_shift;
    if (!batch) continue;
    // Through the center; of a frozen norm the shift moves with it.
    const bool gated = gate.mode || raw.silu;
    if (norm.mode == kBatch) response[H + h] = scale / count;
    if (gated) response[3 * H + h] = gate_scale / count;
    response[4 * H + h] = scale_by_variance / count;
    if (gated) response[6 * H + h] = gate_by_variance / count;
  }
}

// The gradients of a layer's parameters that affine() reads, from the backward's sums [kSums][units]; null: not wanted.
template <class T>
struct AffineGradient { T *norm_weight = nullptr, *norm_bias = nullptr, *gate_weight = nullptr, *gate_bias = nullptr, *slope = nullptr; };

template <class T>
void affine_backward(const RawLayer<T>& raw, const T* numbers, const double* sums, const AffineGradient<T>& out) {
  const int64_t H = raw.units;
  const Norm<T>&norm = raw.norm, &gate = raw.gate;
  double d_slope = 0;
  for (int64_t h = 0; h < H; h++) {
    const double mean = numbers[kCenter * H + h], variance = numbers[kVariance * H + h];
    const double scale = numbers[kNormScale * H + h], shift = numbers[kNormShift * H + h];
    double d_scale = sums[h], d_shift = sums[H + h];
    const double d_gate_scale = sums[2 * H + h], d_gate_shift = sums[3 * H + h];
    double d_gate_weight = 0;
    if (gate.mode == kBatch) {
      const double inverse = 1 / std::sqrt(scale * scale * variance + gate.eps);
      d_gate_weight = d_gate_scale * scale * inverse;
      d_scale += d_gate_scale * gate.w(h) * gate.eps * inverse * inverse * inverse;
    } else if (gate.mode == kFrozen) {
      const double inverse = gate.inverse(h), rest = gate.w(h) * inverse, at_center = norm.mode ? shift : mean;
      d_gate_weight = inverse * (d_gate_scale * scale + d_gate_shift * (at_center - gate.mean[h]));
      d_scale += d_gate_scale * rest;
      d_shift += d_gate_shift * rest;
    } else if (raw.silu) {
      d_scale += d_gate_scale;
      d_shift += d_gate_shift;
    }
    if (out.gate_weight) out.gate_weight[h] = (T)d_gate_weight;
    if (out.gate_bias) out.gate_bias[h] = (T)d_gate_shift;
    if (out.norm_weight)
      out.norm_weight[h] = (T)(norm.mode == kBatch ? d_scale / std::sqrt(variance + norm.eps)
                                                   : (d_scale + d_shift * (mean - norm.mean[h])) * norm.inverse(h));
    if (out.norm_bias) out.norm_bias[h] = (T)d_shift;
    if (out.slope && raw.slopes == H) out.slope[h] = (T)sums[4 * H + h];
    d_slope += sums[4 * H + h];
  }
  if (out.slope && raw.slopes != H) out.slope[0] = (T)d_slope;
}

}  // namespace din_fast

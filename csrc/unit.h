// One call of a DIN activation unit as the kernels see it: plain numbers and pointers, no torch.
//
//   z1_l = A_q q + b1 + (A_k + A_p diag(q)) k_l        the folded first layer
//   a_i  = dropout(activation(z_i))      z_{i+1} = W_{i+1} a_i + b_{i+1}
//   s_l  = w . a_n + b          p = mask / softmax of s    v = sum_l p_l k_l
//
// Per hidden unit, all activations see z through two affine maps: n = norm_scale (z - center) + norm_shift (a BatchNorm
// before the activation) and x = gate_scale (z - center) + gate_shift (the gate of Dice with batch statistics).
#pragma once

#include <cstdint>

namespace din_fast {

// The numbering of din_fast/spec.py.
enum Activation { kIdentity, kRelu, kSigmoid, kTanh, kPrelu, kDiceRow, kDiceBatch, kActivations };
enum ScoreActivation { kScoreNone, kScoreSigmoid, kScorePrelu, kScoreActivations };
enum Pooling { kSum, kMean, kMeanValid, kNoPooling, kPoolings };
enum Empty { kZeros, kUniform, kNan };
// How histories and queries, and with them pooled vectors and the inputs' gradients, are stored; kWide is the T of Unit<T>.
enum Storage { kWide, kBfloat16, kFloat16 };

constexpr int kMaxLayers = 3;
// Reductions over users go into at most this many partial sums, cut by the shape alone: the same bits for any threads.
constexpr int kMaxChunks = 16;
// Panels of kept values hold each candidate's rows rounded up to this, a multiple of every instruction set's lanes.
constexpr int64_t kPanelRows = 16;
// Sums of the backward per hidden unit: dn (z - center), dn, dx (z - center), dx, d slope.
constexpr int kSums = 5;

template <class T>
struct Layer {
  int64_t units = 0;
  const T* weight = nullptr;  // [units][inputs]; null for the first layer, which is folded
  const T* bias = nullptr;
  const T *center = nullptr, *norm_scale = nullptr, *norm_shift = nullptr;  // null: 0, no norm, 0
  const T *gate_scale = nullptr, *gate_shift = nullptr, *slope = nullptr;
  // In double: dz is what is left of two numbers that may be far larger, so their factors must agree to the last digit.
  const double* response = nullptr;  // [2][4][units], where the layer has batch statistics: see fold.py
  const double* sums = nullptr;      // [kSums][units], in the backward, once they are known
  const T* kept = nullptr;      // z of every position in panels, or null: then it is computed again
};

template <class T>
struct Unit {
  // Histories: user u's rows begin at element (starts ? starts[u] : u * user_stride).
  Storage storage = kWide;
  const void* history = nullptr;
  const int64_t *starts = nullptr, *lengths = nullptr;
  const bool* mask = nullptr;           // [users][length]
  const int64_t* panel_start = nullptr; // ragged only: first panel row of each user
  int64_t users = 0, length = 0, dim = 0, user_stride = 0, row_stride = 0;
  bool pads_are_input = false;
  // Candidates in the order of their users; user u's are offsets[u] to offsets[u + 1], or just number u where it is null.
  int64_t candidates = 0;
  const int64_t* candidate_offsets = nullptr;
  const void* query = nullptr;          // [candidates][dim]
  int64_t query_stride = 0;

  const T *a_q = nullptr, *a_k = nullptr, *a_p = nullptr;  // [units of layer 0][dim]
  int layers = 0;
  Layer<T> layer[kMaxLayers];
  const T* score_weight = nullptr;
  T score_bias = 0, score_slope = 0;

  int activation = kIdentity, score_activation = kScoreNone, pooling = kSum, empty = kZeros;
  T dice_eps = 0;
  bool softmax = false;
  double dropout = 0;
  uint64_t seed = 0;
};

template <class T>
struct MomentsOut {
  double* count;
  T *mean, *m2;
  T* kept;  // may be null
};

template <class T>
struct ForwardOut {
  void* pooled;  // [candidates][dim], null without pooling
  T* scores;     // [candidates][length], or ragged [rows]
};

// One pass of the backward, from the scores (first) or the highest layer whose sums are known, down to the layer `to`,
// whose sums it takes; `to` is -1 for the inputs. A null pointer is a gradient that nobody asked for.
template <class T>
struct BackwardPass {
  bool first = true;
  int from = 0;  // highest layer to go through
  int to = -1;
  const void* grad_pooled = nullptr;  // either may be null
  const T* grad_scores = nullptr;
  int64_t grad_pooled_stride[2] = {0, 0}, grad_scores_stride[2] = {0, 0};
  const T* scores = nullptr;
  T* d_logit = nullptr;               // panel rows of every candidate: written by the first pass, read by the others
  const T* local_in = nullptr;        // d z of layer `from` but for its statistics, kept by the pass before
  T* local_out = nullptr;             // the same of layer `to`
  void *d_history = nullptr, *d_query = nullptr;
  T *d_a_q = nullptr, *d_a_k = nullptr, *d_a_p = nullptr;
  T *d_weight[kMaxLayers] = {}, *d_bias[kMaxLayers] = {};
  double* sums[kMaxLayers] = {};
  T *d_score_weight = nullptr, *d_score_bias = nullptr;  // the slope's gradient is behind the bias's
};

// Runs body(context, i) for i in 0..n, on any threads.
using Body = void (*)(void* context, int64_t i);
using ParallelFor = void (*)(int64_t n, Body body, void* context);

template <class T>
struct Kernels {
  void (*moments)(const Unit<T>&, int layer, const MomentsOut<T>&, ParallelFor);
  void (*forward)(const Unit<T>&, const ForwardOut<T>&, ParallelFor);
  void (*backward)(const Unit<T>&, const BackwardPass<T>&, ParallelFor);
};

struct InstructionSet {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

// Each is compiled from the one source cpu/kernel.h; null where this build has none.
const InstructionSet* avx512();
const InstructionSet* avx2();
const InstructionSet* portable();

// Thrown when scratch memory cannot be had.
struct OutOfMemory {};

inline int64_t panel_rows(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows * kPanelRows; }

}  // namespace din_fast

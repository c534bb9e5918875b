// The ops of the native backend: schemas, arguments -> Unit, memory for results. The only file that includes torch's
// headers, and only its stable ABI: the library runs with any torch from 2.11 on. Fake kernels and autograd are
// registered in Python, din_fast/ops.py, which also says what each argument is.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sys/mman.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "fold.h"
#include "unit.h"

namespace din_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

// ---------------------------------------------------------------- instruction sets
bool runs_here(const InstructionSet* set) {
  if (!set) return false;
#if defined(__x86_64__)
  const std::string name = set->name;
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

// fastest first
std::vector<const InstructionSet*> available_sets() {
  std::vector<const InstructionSet*> sets;
  for (const InstructionSet* set : {avx512(), avx2(), portable()})
    if (runs_here(set)) sets.push_back(set);
  return sets;
}

std::string instruction_sets() {
  std::string names;
  for (const InstructionSet* set : available_sets()) names += (names.empty() ? "" : ",") + std::string(set->name);
  return names;
}

const InstructionSet& chosen_set() {
  static const std::vector<const InstructionSet*> sets = available_sets();
  const char* wanted = std::getenv("DIN_FAST_CPU");
  if (!wanted || !*wanted) return *sets.front();
  for (const InstructionSet* set : sets)
    if (std::strcmp(set->name, wanted) == 0) return *set;
  STD_TORCH_CHECK(false, "DIN_FAST_CPU: expected one of ", instruction_sets(), " on this processor; got '", wanted, "'");
}

std::string instruction_set() { return chosen_set().name; }

template <class T> const Kernels<T>& kernels();
template <> const Kernels<float>& kernels<float>() { return chosen_set().f32; }
template <> const Kernels<double>& kernels<double>() { return chosen_set().f64; }

void parallel(int64_t n, Body body, void* context) {
  if (n == 1) return body(context, 0);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(context, i);
  });
}

// ---------------------------------------------------------------- tensors
template <class T> T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }
template <class T> const T* data(const MaybeTensor& t) {
  return t.has_value() && t->numel() > 0 ? static_cast<const T*>(t->data_ptr()) : nullptr;
}
Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float16();
  }
}
int64_t size_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

template <class T> constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// As torch::stable::empty, which looks its op up by name at every call.
Tensor new_tensor(ScalarType type, const std::vector<int64_t>& sizes) {
  int64_t strides[8], step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes[i]) strides[i] = step;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides, dtype_code(type),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
template <class T> Tensor new_tensor(const std::vector<int64_t>& sizes) { return new_tensor(kType<T>, sizes); }

// Memory of kept panels and of the history's gradient. It is large and comes back every step; from malloc it would come as
// fresh pages each time, which costs more than the work on them. Blocks are kept for the next step up to a limit.
class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // never destroyed: tensors may outlive it at exit
    return *pool;
  }
  void* take(size_t& bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto it = free_.lower_bound(bytes);
      if (it != free_.end() && it->first <= 2 * bytes) {
        void* p = it->second;
        bytes = it->first;
        held_ -= bytes;
        free_.erase(it);
        return p;
      }
    }
    void* p = std::aligned_alloc(kPage, bytes);
    STD_TORCH_CHECK(p, "din_fast: out of memory for ", bytes, " bytes");
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
  }
  void give_back(void* p, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (held_ + bytes > kLimit) return std::free(p);
    held_ += bytes;
    free_.emplace(bytes, p);
  }

 private:
  static constexpr size_t kPage = 2 << 20, kLimit = 256 << 20;
  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  size_t held_ = 0;
};

// A tensor that comes and goes with every step.
Tensor kept_tensor(ScalarType type, std::vector<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
  size_t bytes = strides[0] * sizes[0] * size_of(type);
  if (bytes < (1 << 20)) return new_tensor(type, sizes);
  void* p = Pool::get().take(bytes);
  return torch::stable::from_blob(p, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                  [p, bytes](void*) { Pool::get().give_back(p, bytes); });
}
template <class T> Tensor kept_tensor(std::vector<int64_t> sizes) { return kept_tensor(kType<T>, std::move(sizes)); }
template <class T> Tensor nothing() { return new_tensor<T>({0}); }

// ---------------------------------------------------------------- arguments -> Unit
// The segments of a call. Tensors that had to be copied are held here as long as the Unit points into them.
template <class T> struct Arguments {
  Unit<T> unit;
  Tensors held;
  std::vector<int64_t> panel_start;
  int64_t panel_total = 0;  // panel rows of all candidates
  ScalarType stored = kType<T>;  // dtype of history and query
  bool ragged = false;

  const T* hold(const Tensor& t) {
    if (t.numel() == 0) return nullptr;
    held.push_back(dense(t));
    return data<T>(held.back());
  }
  const double* hold_double(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
    if (t.numel() == 0) return nullptr;
    Arguments<double>::expect(name, t, sizes);
    held.push_back(dense(t));
    return data<double>(held.back());
  }
  const T* hold(const MaybeTensor& t) { return t.has_value() ? hold(*t) : nullptr; }

  void segments(const Tensor& history, const MaybeTensor& starts, const MaybeTensor& lengths, const MaybeTensor& candidate_offsets,
                const MaybeTensor& mask, const Tensor& query, bool pads_are_input) {
    ragged = starts.has_value();
    STD_TORCH_CHECK(!ragged || !candidate_offsets.has_value(), "candidate_offsets: expected None for ragged histories");
    STD_TORCH_CHECK(history.dim() == (ragged ? 2 : 3), "history: expected ", ragged ? 2 : 3, " dimensions, got ", history.dim());
    STD_TORCH_CHECK(query.dim() == 2, "query: expected 2 dimensions, got ", query.dim());
    const int last = (int)history.dim() - 1;
    unit.dim = history.size(last);
    STD_TORCH_CHECK(unit.dim >= 1 && unit.dim <= (1 << 20), "history: expected dim of 1 to 2^20, got ", unit.dim);
    STD_TORCH_CHECK(query.size(1) == unit.dim, "query: expected dim ", unit.dim, ", got ", query.size(1));
    STD_TORCH_CHECK(history.stride(last) == 1 || unit.dim == 1, "history: expected a last stride of 1, got ", history.stride(last));
    STD_TORCH_CHECK(query.stride(1) == 1 || unit.dim == 1, "query: expected a last stride of 1, got ", query.stride(1));
    STD_TORCH_CHECK(query.scalar_type() == history.scalar_type(), "query: expected the dtype of history");
    stored = history.scalar_type();
    unit.storage = stored == ScalarType::BFloat16 ? kBfloat16 : stored == ScalarType::Half ? kFloat16 : kWide;
    unit.history = history.data_ptr();
    unit.query = query.data_ptr();
    unit.query_stride = query.stride(0);
    unit.row_stride = history.stride(last - 1);
    unit.pads_are_input = pads_are_input;
    unit.users = ragged ? starts->size(0) : history.size(0);
    unit.candidates = query.size(0);
    if (candidate_offsets.has_value()) check_offsets(*candidate_offsets);
    else STD_TORCH_CHECK(query.size(0) == unit.users, "query: expected ", unit.users, " rows, got ", query.size(0));
    for (const MaybeTensor* t : {&starts, &lengths})
      if (t->has_value())
        STD_TORCH_CHECK((*t)->scalar_type() == ScalarType::Long && (*t)->dim() == 1 && (*t)->size(0) == unit.users && (*t)->is_contiguous(),
                        "starts, lengths: expected contiguous int64 of shape (users,)");
    unit.lengths = lengths.has_value() ? data<int64_t>(*lengths) : nullptr;
    if (ragged) {
      check_ragged(history, *starts);
      STD_TORCH_CHECK(!mask.has_value(), "mask: expected None for ragged histories");
      return;
    }
    unit.user_stride = history.stride(0);
    unit.length = history.size(1);
    panel_total = unit.candidates * panel_rows(unit.length);
    if (mask.has_value()) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == unit.users && mask->size(1) == unit.length &&
                          mask->is_contiguous(),
                      "mask: expected contiguous bool of shape (users, length)");
      unit.mask = data<bool>(*mask);
    }
    if (unit.lengths)
      for (int64_t i = 0; i < unit.users; i++)
        STD_TORCH_CHECK(unit.lengths[i] >= 0 && unit.lengths[i] <= unit.length, "lengths: expected values from 0 to ", unit.length, ", got ",
                        unit.lengths[i], " at ", i);
  }

  void check_offsets(const Tensor& offsets) {
    STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 && offsets.size(0) == unit.users + 1 && offsets.is_contiguous(),
                    "candidate_offsets: expected contiguous int64 of shape (users + 1,)");
    const int64_t* o = data<int64_t>(offsets);
    bool in_order = o[0] == 0 && o[unit.users] == unit.candidates;
    for (int64_t i = 0; i < unit.users; i++) in_order = in_order && o[i] <= o[i + 1];
    STD_TORCH_CHECK(in_order, "candidate_offsets: expected 0 to ", unit.candidates, " in order");
    unit.candidate_offsets = o;
  }

  void check_ragged(const Tensor& history, const Tensor& starts) {
    STD_TORCH_CHECK(unit.lengths, "lengths: expected with starts, got None");
    STD_TORCH_CHECK(history.is_contiguous(), "history: expected contiguous rows for ragged histories");
    unit.starts = data<int64_t>(starts);
    for (int64_t i = 0; i < unit.users; i++) {
      const int64_t n = unit.lengths[i], start = unit.starts[i];
      STD_TORCH_CHECK(n >= 0 && start >= 0 && start % unit.dim == 0 && start / unit.dim + n <= history.size(0),
                      "starts, lengths: expected segments within ", history.size(0), " rows, got start ", start, " and length ", n, " at ", i);
      panel_start.push_back(panel_total);
      panel_total += panel_rows(n);
      if (n > unit.length) unit.length = n;
    }
    unit.panel_start = panel_start.data();
  }

  // weights: A_q, A_k, A_p, b1, (W, b) of each further layer, the score's weight and bias; affine: six a layer, of which
  // the first `used` layers' are needed
  void parameters(const Tensors& weights, const Tensors& affine, int64_t activation, double dice_eps, int64_t used = kMaxLayers) {
    STD_TORCH_CHECK(weights.size() >= 6 && weights.size() % 2 == 0, "weights: expected 2 n + 4 tensors, got ", weights.size());
    unit.layers = (int)(weights.size() - 4) / 2;
    STD_TORCH_CHECK(unit.layers <= kMaxLayers, "weights: expected at most ", kMaxLayers, " layers, got ", unit.layers);
    STD_TORCH_CHECK(affine.size() == (size_t)unit.layers * 6, "affine: expected 6 tensors a layer, got ", affine.size());
    STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation: expected 0 to ", kActivations - 1, ", got ", activation);
    unit.activation = (int)activation;
    unit.dice_eps = (T)dice_eps;
    const int64_t first = weights[0].size(0);
    for (int i = 0; i < 3; i++) expect("weights", weights[i], {first, unit.dim});
    unit.a_q = hold(weights[0]);
    unit.a_k = hold(weights[1]);
    unit.a_p = hold(weights[2]);
    int64_t inputs = 0;
    for (int i = 0; i < unit.layers; i++) {
      Layer<T>& layer = unit.layer[i];
      if (i) {
        const Tensor& w = weights[2 * i + 2];
        expect("weights", w, {w.size(0), inputs});
        layer.weight = hold(w);
        layer.units = w.size(0);
      } else {
        layer.units = first;
      }
      STD_TORCH_CHECK(layer.units >= 1 && layer.units <= (1 << 20), "weights: expected 1 to 2^20 hidden units, got ", layer.units);
      expect("weights", weights[2 * i + 3], {layer.units});
      layer.bias = hold(weights[2 * i + 3]);
      const T** fields[6] = {&layer.center, &layer.norm_scale, &layer.norm_shift, &layer.gate_scale, &layer.gate_shift, &layer.slope};
      for (int f = 0; f < 6; f++) {
        const Tensor& t = affine[6 * i + f];
        if (t.numel()) expect("affine", t, {layer.units});
        *fields[f] = hold(t);
      }
      STD_TORCH_CHECK(i >= used || activation != kDiceBatch || layer.gate_scale, "affine: expected a gate_scale for dice_batch");
      STD_TORCH_CHECK(i >= used || activation < kPrelu || layer.slope, "affine: expected a slope for this activation");
      inputs = layer.units;
    }
    expect("weights", weights[weights.size() - 2], {inputs});
    const Tensor& tail = weights.back();
    expect("weights", tail, {tail.numel() == 2 ? 2 : 1});
    unit.score_weight = hold(weights[weights.size() - 2]);
    const T* numbers = hold(tail);
    unit.score_bias = numbers[0];
    if (tail.numel() == 2) unit.score_slope = numbers[1];
    has_slope = tail.numel() == 2;
  }

  void statistics(const Tensors& response, const Tensors& kept, const Tensors* sums) {
    STD_TORCH_CHECK(response.empty() || response.size() == (size_t)unit.layers, "response: expected one a layer, got ", response.size());
    STD_TORCH_CHECK(kept.size() <= (size_t)unit.layers, "kept: expected at most one a layer, got ", kept.size());
    for (size_t i = 0; i < response.size(); i++) {
      unit.layer[i].response = hold_double("response", response[i], {2, 4, unit.layer[i].units});
    }
    for (size_t i = 0; i < kept.size(); i++) {
      if (kept[i].numel() == 0) continue;
      expect("kept", kept[i], {panel_total * unit.layer[i].units});
      unit.layer[i].kept = data<T>(kept[i]);
    }
    if (!sums) return;
    STD_TORCH_CHECK(sums->size() == (size_t)unit.layers, "sums: expected one a layer, got ", sums->size());
    for (size_t i = 0; i < sums->size(); i++) {
      unit.layer[i].sums = hold_double("sums", (*sums)[i], {kSums, unit.layer[i].units});
    }
  }

  void score(int64_t score_activation, bool softmax, int64_t empty, int64_t pooling) {
    STD_TORCH_CHECK(score_activation >= 0 && score_activation < kScoreActivations, "score_activation: expected 0 to 2, got ", score_activation);
    STD_TORCH_CHECK(!softmax || score_activation == kScoreNone, "score_activation: expected none with softmax, got ", score_activation);
    STD_TORCH_CHECK((score_activation == kScorePrelu) == has_slope, "score_activation: expected a slope of the score with a PReLU and without it none");
    STD_TORCH_CHECK(empty >= 0 && empty <= kNan, "empty: expected 0 to 2, got ", empty);
    STD_TORCH_CHECK(pooling >= 0 && pooling < kPoolings, "pooling: expected 0 to 3, got ", pooling);
    unit.score_activation = (int)score_activation;
    unit.softmax = softmax;
    unit.empty = (int)empty;
    unit.pooling = (int)pooling;
  }

  static void expect(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
    bool same = t.dim() == (int64_t)sizes.size() && t.scalar_type() == kType<T>;
    for (size_t i = 0; same && i < sizes.size(); i++) same = t.size(i) == sizes.begin()[i];
    if (same) return;
    std::string want, got;
    for (int64_t s : sizes) want += std::to_string(s) + " ";
    for (int64_t i = 0; i < t.dim(); i++) got += std::to_string(t.size(i)) + " ";
    STD_TORCH_CHECK(false, name, ": expected ", sizeof(T) == 4 ? "float32" : "float64", " and sizes ", want, "- got sizes ", got);
  }

  // The gradients of the results, into a pass.
  void gradients(BackwardPass<T>& pass, const MaybeTensor& grad_pooled, const MaybeTensor& grad_scores) const {
    if (grad_pooled.has_value()) {
      STD_TORCH_CHECK(unit.pooling != kNoPooling, "grad_pooled: expected None without pooling");
      STD_TORCH_CHECK(grad_pooled->size(0) == unit.candidates && grad_pooled->size(1) == unit.dim && grad_pooled->scalar_type() == stored,
                      "grad_pooled: expected (candidates, dim) of the history's dtype");
      pass.grad_pooled = grad_pooled->data_ptr();
      pass.grad_pooled_stride[0] = grad_pooled->stride(0);
      pass.grad_pooled_stride[1] = grad_pooled->stride(1);
    }
    if (grad_scores.has_value()) {
      STD_TORCH_CHECK(!ragged, "grad_scores: not built for ragged histories; expected None");
      STD_TORCH_CHECK(grad_scores->size(0) == unit.candidates && grad_scores->size(1) == unit.length && grad_scores->scalar_type() == kType<T>,
                      "grad_scores: expected (candidates, length) of the scores' dtype");
      pass.grad_scores = data<T>(*grad_scores);
      pass.grad_scores_stride[0] = grad_scores->stride(0);
      pass.grad_scores_stride[1] = grad_scores->stride(1);
    }
  }

  std::vector<int64_t> score_sizes() const { return ragged ? std::vector<int64_t>{rows} : std::vector<int64_t>{unit.candidates, unit.length}; }
  int64_t rows = 0;  // ragged: rows of history
  bool has_slope = false;

  void random(double dropout, const MaybeTensor& seed) {
    STD_TORCH_CHECK(dropout >= 0 && dropout < 1, "dropout: expected a probability from 0 to below 1, got ", dropout);
    if (dropout == 0) return;
    STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cpu(),
                    "seed: expected one int64 on the CPU for dropout");
    unit.dropout = dropout;
    unit.seed = (uint64_t)*static_cast<const int64_t*>(seed->data_ptr());
  }
};

void not_built(const MaybeTensor& values, const MaybeTensor& candidate_matrix, const MaybeTensor& window_offsets) {
  STD_TORCH_CHECK(!values.has_value(), "values: separate values are not built yet; expected None");
  STD_TORCH_CHECK(!candidate_matrix.has_value(), "candidate_matrix: a matrix per candidate is not built yet; expected None");
  STD_TORCH_CHECK(!window_offsets.has_value(), "window_offsets: windows are not built yet; expected None");
}

template <class F> auto by_dtype(const Tensor& history, const F& f) {
  STD_TORCH_CHECK(history.is_cpu(), "history: expected a CPU tensor for the native backend");
  const ScalarType dtype = history.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "history: expected float32, float64, bfloat16 or float16");
  try {
    return dtype == ScalarType::Double ? f(double{}) : f(float{});
  } catch (const OutOfMemory&) {
    STD_TORCH_CHECK(false, "din_fast: out of memory for scratch");
  }
}

// ---------------------------------------------------------------- the ops
Tensors native_moments(const Tensor& history, const MaybeTensor& starts, const MaybeTensor& lengths, const MaybeTensor& candidate_offsets,
                       const MaybeTensor& mask, const Tensor& query, const Tensors& weights, const Tensors& affine, const Tensors& kept,
                       const MaybeTensor& candidate_matrix, int64_t layer, bool keep, int64_t activation, double dice_eps, bool pads_are_input,
                       double dropout, const MaybeTensor& seed) {
  not_built({}, candidate_matrix, {});
  return by_dtype(history, [&](auto zero) -> Tensors {
    using T = decltype(zero);
    Arguments<T> a;
    a.segments(history, starts, lengths, candidate_offsets, mask, query, pads_are_input);
    a.parameters(weights, affine, activation, dice_eps, layer);
    a.random(dropout, seed);
    STD_TORCH_CHECK(layer >= 0 && layer < a.unit.layers, "layer: expected 0 to ", a.unit.layers - 1, ", got ", layer);
    a.statistics({}, kept, nullptr);
    const int64_t units = a.unit.layer[layer].units;
    Tensor count = new_tensor<double>({}), mean = new_tensor<T>({units}), m2 = new_tensor<T>({units});
    Tensor panels = keep ? kept_tensor<T>({a.panel_total * units}) : nothing<T>();
    kernels<T>().moments(a.unit, (int)layer, {data<double>(count), data<T>(mean), data<T>(m2), keep ? data<T>(panels) : nullptr}, parallel);
    return {count, mean, m2, panels};
  });
}

template <class T> Tensors run_forward(Arguments<T>& a, const Tensor& history) {
  if (a.ragged) a.rows = history.size(0);
  const bool pools = a.unit.pooling != kNoPooling;
  Tensor pooled = new_tensor(a.stored, {a.unit.candidates, pools ? a.unit.dim : 0}), scores = new_tensor<T>(a.score_sizes());
  if (a.ragged) torch::stable::zero_(scores);
  kernels<T>().forward(a.unit, {pools ? pooled.data_ptr() : nullptr, data<T>(scores)}, parallel);
  return {pooled, scores};
}

Tensors native_forward(const Tensor& history, const MaybeTensor& starts, const MaybeTensor& lengths, const MaybeTensor& candidate_offsets,
                       const MaybeTensor& mask, const Tensor& query, const Tensors& weights, const Tensors& affine,
                       const Tensors& response, const Tensors& kept, const MaybeTensor& values, const MaybeTensor& candidate_matrix,
                       const MaybeTensor& window_offsets, int64_t activation, double dice_eps, bool pads_are_input, int64_t score_activation,
                       bool softmax, int64_t empty, int64_t pooling, double dropout, const MaybeTensor& seed) {
  not_built(values, candidate_matrix, window_offsets);
  return by_dtype(history, [&](auto zero) -> Tensors {
    using T = decltype(zero);
    Arguments<T> a;
    a.segments(history, starts, lengths, candidate_offsets, mask, query, pads_are_input);
    a.parameters(weights, affine, activation, dice_eps);
    a.statistics(response, kept, nullptr);
    a.random(dropout, seed);
    a.score(score_activation, softmax, empty, pooling);
    Tensors out = run_forward(a, history);
    out.push_back(nothing<T>());
    return out;
  });
}

// What every op of the backward takes, and the names to hand it on.
#define DIN_FAST_PASS_PARAMETERS                                                                                              \
  const MaybeTensor &grad_pooled, const MaybeTensor &grad_scores, const Tensor &history, const MaybeTensor &starts,           \
      const MaybeTensor &lengths, const MaybeTensor &candidate_offsets, const MaybeTensor &mask, const Tensor &query,         \
      const Tensors &weights, const Tensors &affine, const Tensors &response, const Tensors &kept, const Tensor &scores,      \
      const Tensors &sums, const Tensors &local, const MaybeTensor &values, const MaybeTensor &candidate_matrix,              \
      const MaybeTensor &window_offsets, int64_t from
#define DIN_FAST_PASS_NAMES                                                                                                   \
  grad_pooled, grad_scores, history, starts, lengths, candidate_offsets, mask, query, weights, affine, response, kept, scores, \
      sums, local, values, candidate_matrix, window_offsets, from
#define DIN_FAST_PASS_NUMBERS                                                                                                 \
  int64_t activation, double dice_eps, bool pads_are_input, int64_t score_activation, bool softmax, int64_t empty,            \
      int64_t pooling, double dropout, const MaybeTensor &seed
#define DIN_FAST_PASS_NUMBER_NAMES activation, dice_eps, pads_are_input, score_activation, softmax, empty, pooling, dropout, seed

// One pass of the backward. Returns d_history, d_query, the gradients of `weights` in their order, the sums of each layer,
// d_logit and local; what the pass does not give is empty.
Tensors backward_pass(DIN_FAST_PASS_PARAMETERS, int64_t to, bool need_history, bool need_query, bool need_weights, DIN_FAST_PASS_NUMBERS) {
  not_built(values, candidate_matrix, window_offsets);
  return by_dtype(history, [&](auto zero) -> Tensors {
    using T = decltype(zero);
    Arguments<T> a;
    a.segments(history, starts, lengths, candidate_offsets, mask, query, pads_are_input);
    a.parameters(weights, affine, activation, dice_eps);
    a.statistics(response, kept, &sums);
    a.random(dropout, seed);
    a.score(score_activation, softmax, empty, pooling);
    const Unit<T>& u = a.unit;
    STD_TORCH_CHECK(to >= -1 && from < u.layers && to <= from, "from, to: expected -1 <= to <= from < ", u.layers, ", got ", from, " and ", to);
    STD_TORCH_CHECK(local.empty() || local.size() == 2, "local: expected none or 2 tensors, got ", local.size());
    BackwardPass<T> pass;
    pass.first = local.empty();
    pass.from = (int)from;
    pass.to = (int)to;
    STD_TORCH_CHECK(!pass.first || from == u.layers - 1, "from: expected the last layer in the first pass, got ", from);
    a.gradients(pass, grad_pooled, grad_scores);
    pass.scores = data<T>(scores);

    Tensors out;
    for (size_t i = 0; i < 2 + weights.size() + u.layers + 2; i++) out.push_back(nothing<T>());
    const size_t first_sum = 2 + weights.size(), logit = first_sum + u.layers;
    auto give = [&](size_t i, std::vector<int64_t> sizes) {
      out[i] = new_tensor<T>(sizes);
      return data<T>(out[i]);
    };
    auto give_input = [&](size_t i, std::vector<int64_t> sizes) {
      out[i] = kept_tensor(a.stored, std::move(sizes));
      return out[i].data_ptr();
    };
    auto keep = [&](size_t i, std::vector<int64_t> sizes) {
      out[i] = kept_tensor<T>(std::move(sizes));
      return data<T>(out[i]);
    };
    if (pass.first) {
      pass.d_logit = keep(logit, {a.panel_total});
      if (need_weights) {
        pass.d_score_weight = give(weights.size(), {u.layer[u.layers - 1].units});
        pass.d_score_bias = give(weights.size() + 1, {a.has_slope ? 2 : 1});
      }
    } else {
      Arguments<T>::expect("local", local[0], {a.panel_total});
      pass.d_logit = data<T>(local[0]);
      if (from < u.layers - 1) {
        Arguments<T>::expect("local", local[1], {a.panel_total * u.layer[from].units});
        pass.local_in = data<T>(local[1]);
      }
    }
    if (to >= 0 && to < u.layers - 1) pass.local_out = keep(logit + 1, {a.panel_total * u.layer[to].units});
    for (int i = (int)from; i >= 0 && i >= to; i--) {
      const int64_t units = u.layer[i].units;
      if (!u.layer[i].sums) {
        out[first_sum + i] = new_tensor<double>({kSums, units});
        pass.sums[i] = data<double>(out[first_sum + i]);
      }
      if (i == to || !need_weights) continue;
      if (i) pass.d_weight[i] = give(2 + 2 * i + 2, {units, u.layer[i - 1].units});
      pass.d_bias[i] = give(2 + 2 * i + 3, {units});
    }
    if (to < 0) {
      const int64_t units = u.layer[0].units;
      if (need_weights) {
        pass.d_a_q = give(2, {units, u.dim});
        pass.d_a_k = give(3, {units, u.dim});
        pass.d_a_p = give(4, {units, u.dim});
      }
      if (need_query) pass.d_query = give_input(1, {u.candidates, u.dim});
      if (need_history) {
        pass.d_history = a.ragged ? give_input(0, {history.size(0), u.dim}) : give_input(0, {u.users, u.length, u.dim});
        if (a.ragged) torch::stable::zero_(out[0]);
      }
    }
    kernels<T>().backward(u, pass, parallel);
    return out;
  });
}

// Down to layer `layer`, for the sums that its batch statistics need.
Tensors native_backward_moments(DIN_FAST_PASS_PARAMETERS, int64_t layer, bool need_weights, DIN_FAST_PASS_NUMBERS) {
  STD_TORCH_CHECK(layer >= 0, "layer: expected 0 or more, got ", layer);
  return backward_pass(DIN_FAST_PASS_NAMES, layer, false, false, need_weights, DIN_FAST_PASS_NUMBER_NAMES);
}

// Down to the inputs.
Tensors native_backward(DIN_FAST_PASS_PARAMETERS, bool need_history, bool need_query, bool need_weights, DIN_FAST_PASS_NUMBERS) {
  return backward_pass(DIN_FAST_PASS_NAMES, -1, need_history, need_query, need_weights, DIN_FAST_PASS_NUMBER_NAMES);
}

// ---------------------------------------------------------------- ops that take raw parameters
// What they are: 11 tensors a hidden layer (weight, bias, then weight, bias, running mean and variance of the norm and of
// the gate's norm, slope), then the score's weight (1, H), bias and slope. A Dice without a norm of its gate is SiLU.
constexpr int kFields = 11, kTail = 3;

// The parameters of a unit, checked, and put into a Unit. `modes`: NormMode of each norm and gate.
template <class T> struct Raw {
  Arguments<T>& a;
  Unit<T>& u;
  const MaybeTensors& parameters;
  const std::vector<int64_t>& blocks;
  RawLayer<T> layer[kMaxLayers];
  int hidden;

  Raw(Arguments<T>& arguments, const MaybeTensors& parameters_, const std::vector<int64_t>& blocks_, const std::vector<double>& eps,
      const std::vector<int64_t>& modes, int64_t activation, double dice_eps)
      : a(arguments), u(arguments.unit), parameters(parameters_), blocks(blocks_), hidden((int)parameters_.size() / kFields) {
    STD_TORCH_CHECK(parameters.size() % kFields == kTail, "parameters: expected 11 a hidden layer and 3, got ", parameters.size());
    STD_TORCH_CHECK(blocks.size() % 3 == 0 && !blocks.empty(), "blocks: expected 3 numbers a block, got ", blocks.size());
    STD_TORCH_CHECK(hidden <= kMaxLayers && eps.size() == 2 * (size_t)hidden && modes.size() == eps.size(),
                    "eps, modes: expected 2 a hidden layer, got ", eps.size(), " and ", modes.size());
    STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation: expected 0 to ", kActivations - 1, ", got ", activation);
    u.layers = hidden ? hidden : 1;
    u.activation = hidden ? (int)activation : kIdentity;
    u.dice_eps = (T)dice_eps;
    if (parameters.back().has_value()) {
      Arguments<T>::expect("parameters", *parameters.back(), {1});
      u.score_slope = *a.hold(parameters.back());
      a.has_slope = true;
    }
    int64_t inputs = (int64_t)blocks.size() / 3 * u.dim;
    for (int i = 0; i < u.layers; i++) {
      RawLayer<T>& raw = layer[i];
      const MaybeTensor& weight = parameters[i * kFields];
      STD_TORCH_CHECK(weight.has_value(), "parameters: expected a weight of layer ", i);
      u.layer[i].units = raw.units = weight->size(0);
      raw.inputs = inputs;
      raw.weight = field(i, 0, {raw.units, inputs});
      raw.bias = field(i, 1, {raw.units});
      if (hidden) {
        raw.norm = norm(i, 2, modes[2 * i], eps[2 * i]);
        raw.gate = norm(i, 6, modes[2 * i + 1], eps[2 * i + 1]);
        raw.silu = activation == kDiceBatch && raw.gate.mode == kNoNorm;
        const MaybeTensor& slope = parameters[i * kFields + 10];
        STD_TORCH_CHECK(activation < kPrelu || raw.silu || slope.has_value(), "parameters: expected a slope for this activation");
        if (slope.has_value()) {
          raw.slope = a.hold(slope);
          raw.slopes = slope->numel();
          STD_TORCH_CHECK(raw.slopes == 1 || raw.slopes == raw.units, "parameters: expected a slope of 1 or ", raw.units, " elements");
        }
      }
      inputs = raw.units;
    }
  }
  const T* field(int i, int f, std::initializer_list<int64_t> sizes) {
    const MaybeTensor& t = parameters[i * kFields + f];
    if (!t.has_value()) return nullptr;
    Arguments<T>::expect("parameters", *t, sizes);
    return a.hold(t);
  }
  Norm<T> norm(int i, int f, int64_t mode, double eps) {
    STD_TORCH_CHECK(mode >= kNoNorm && mode <= kBatch, "modes: expected 0 to 2, got ", mode);
    const int64_t units = layer[i].units;
    Norm<T> n{(NormMode)mode, field(i, f, {units}), field(i, f + 1, {units}), field(i, f + 2, {units}), field(i, f + 3, {units}), (T)eps};
    STD_TORCH_CHECK(mode != kFrozen || (n.mean && n.variance), "parameters: expected running statistics of a frozen norm");
    return n;
  }
  // Numbers that the weights fold into: the first layer's, its own norms apart, and the score's.
  int64_t folded_numbers() const { return 3 * layer[0].units * u.dim + u.layer[u.layers - 1].units; }
  void fold(T* to, double score_factor) {
    fold_first(layer[0].weight, blocks, layer[0].units, u.dim, to);
    T* score = to + 3 * layer[0].units * u.dim;
    const int64_t inputs = u.layer[u.layers - 1].units;
    if (hidden) {
      const MaybeTensor& w = parameters[parameters.size() - kTail];
      STD_TORCH_CHECK(w.has_value(), "parameters: expected the score's weight");
      Arguments<T>::expect("parameters", *w, {1, inputs});
      const T* values = a.hold(w);
      for (int64_t h = 0; h < inputs; h++) score[h] = values[h] * (T)score_factor;
    } else {
      std::fill(score, score + inputs, (T)score_factor);
    }
    point_folded(to, score_factor);
  }
  // The same where it has been done already.
  void point_folded(const T* folded, double score_factor) {
    const int64_t n = layer[0].units * u.dim;
    u.a_q = folded, u.a_k = folded + n, u.a_p = folded + 2 * n;
    u.score_weight = folded + 3 * n;
    for (int i = 1; i < u.layers; i++) u.layer[i].weight = layer[i].weight;
    if (!hidden) return;
    const MaybeTensor& b = parameters[parameters.size() - 2];
    if (b.has_value()) {
      Arguments<T>::expect("parameters", *b, {1});
      u.score_bias = *a.hold(b) * (T)score_factor;
    }
  }
  // What the kernels read of a layer's numbers.
  void point(int i, const T* numbers, const double* response) {
    const int64_t H = layer[i].units;
    Layer<T>& to = u.layer[i];
    to.bias = numbers + kBias * H;
    if (layer[i].batch()) to.center = numbers + kCenter * H, to.response = response;
    if (layer[i].norm.mode) to.norm_scale = numbers + kNormScale * H, to.norm_shift = numbers + kNormShift * H;
    if (u.activation == kDiceBatch) to.gate_scale = numbers + kGateScale * H, to.gate_shift = numbers + kGateShift * H;
    if (u.activation >= kPrelu) to.slope = numbers + kSlope * H;
  }
};

// Evaluation without gradient. A norm goes into its layer's weights.
Tensors native_infer(const Tensor& history, const MaybeTensor& starts, const MaybeTensor& lengths, const MaybeTensor& candidate_offsets,
                     const MaybeTensor& mask, const Tensor& query, const MaybeTensors& parameters, const std::vector<int64_t>& blocks,
                     const std::vector<double>& eps, int64_t activation, double dice_eps, int64_t score_activation, bool softmax, int64_t empty,
                     int64_t pooling, double score_factor) {
  return by_dtype(history, [&](auto zero) -> Tensors {
    using T = decltype(zero);
    Arguments<T> a;
    Unit<T>& u = a.unit;
    a.segments(history, starts, lengths, candidate_offsets, mask, query, false);
    std::vector<int64_t> modes(eps.size(), kNoNorm);
    for (size_t i = 0; i < modes.size(); i++) {
      const size_t mean = kFields * (i / 2) + (i % 2 ? 8 : 4);
      if (mean < parameters.size() && parameters[mean].has_value()) modes[i] = kFrozen;
    }
    Raw<T> raw(a, parameters, blocks, eps, modes, activation, dice_eps);
    a.score(score_activation, softmax, empty, pooling);
    int64_t total = raw.folded_numbers();
    for (int i = 0; i < u.layers; i++) total += u.layer[i].units * (kNumbers + (i ? raw.layer[i].inputs : 0));
    std::vector<T> space(total);
    raw.fold(space.data(), score_factor);
    T* next = space.data() + raw.folded_numbers();
    for (int i = 0; i < u.layers; i++) {
      RawLayer<T>& layer = raw.layer[i];
      const int64_t H = layer.units;
      T* numbers = next;
      next += kNumbers * H;
      T* weight = nullptr;
      if (i) {
        u.layer[i].weight = weight = next;
        std::copy(layer.weight, layer.weight + H * layer.inputs, weight);
        next += H * layer.inputs;
      }
      const Norm<T> norm = layer.norm;
      layer.norm = {};
      affine(layer, 1.0, numbers, nullptr);
      raw.point(i, numbers, nullptr);
      if (!norm.mode) continue;
      for (int64_t h = 0; h < H; h++) {
        const T scale = norm.w(h) * norm.inverse(h);
        numbers[kBias * H + h] = scale * (numbers[kBias * H + h] - norm.mean[h]) + norm.b(h);
        if (i)
          for (int64_t j = 0; j < layer.inputs; j++) weight[h * layer.inputs + j] *= scale;
        else
          for (int m = 0; m < 3; m++)
            for (int64_t d = 0; d < u.dim; d++) space[(m * H + h) * u.dim + d] *= scale;
      }
    }
    return run_forward(a, history);
  });
}

// ---------------------------------------------------------------- a training step in two ops, from raw parameters
// What the forward leaves to the backward: `numbers`, the folded weights and behind them kNumbers rows a layer, and
// `statistics`, count and response [2][4][units] of each layer. din_fast/functional.py keeps the running statistics.
template <class T> struct Step {
  Arguments<T> a;
  Raw<T> raw;
  int64_t at[kMaxLayers + 1], statistics_at[kMaxLayers + 1];  // where a layer's are

  Step(const Tensor& history, const MaybeTensor& starts, const MaybeTensor& lengths, const MaybeTensor& candidate_offsets, const MaybeTensor& mask,
       const Tensor& query, const MaybeTensors& parameters, const std::vector<int64_t>& blocks, const std::vector<double>& eps,
       const std::vector<int64_t>& modes, int64_t activation, double dice_eps, bool pads_are_input, int64_t score_activation, bool softmax,
       int64_t empty, int64_t pooling, double dropout, const MaybeTensor& seed)
      : raw((a.segments(history, starts, lengths, candidate_offsets, mask, query, pads_are_input), a), parameters, blocks, eps, modes, activation,
            dice_eps) {
    a.random(dropout, seed);
    a.score(score_activation, softmax, empty, pooling);
    at[0] = raw.folded_numbers();
    statistics_at[0] = 0;
    for (int i = 0; i < a.unit.layers; i++) {
      at[i + 1] = at[i] + kNumbers * raw.layer[i].units;
      statistics_at[i + 1] = statistics_at[i] + 1 + 8 * raw.layer[i].units;
    }
  }
  Step(const Step&) = delete;
  int layers() const { return a.unit.layers; }
};

#define DIN_FAST_STEP_PARAMETERS                                                                                             \
  const Tensor &history, const MaybeTensor &starts, const MaybeTensor &lengths, const MaybeTensor &candidate_offsets,        \
      const MaybeTensor &mask, const Tensor &query, const MaybeTensors &parameters, const std::vector<int64_t>&blocks,       \
      const std::vector<double>&eps, const std::vector<int64_t>&modes, int64_t activation, double dice_eps,                  \
      bool pads_are_input, int64_t score_activation, bool softmax, int64_t empty, int64_t pooling, double dropout,           \
      const MaybeTensor &seed, double score_factor
#define DIN_FAST_STEP_NAMES                                                                                                  \
  history, starts, lengths, candidate_offsets, mask, query, parameters, blocks, eps, modes, activation, dice_eps,            \
      pads_are_input, score_activation, softmax, empty, pooling, dropout, seed

// Returns pooled, scores, numbers, statistics, and z of each layer where it is kept: as long as all of it has at most
// keep_bytes.
Tensors native_train(DIN_FAST_STEP_PARAMETERS, int64_t keep_bytes) {
  return by_dtype(history, [&](auto zero) -> Tensors {
    using T = decltype(zero);
    Step<T> step(DIN_FAST_STEP_NAMES);
    Unit<T>& u = step.a.unit;
    const int n = step.layers();
    Tensor numbers = new_tensor<T>({step.at[n]}), statistics = new_tensor<double>({step.statistics_at[n]});
    step.raw.fold(data<T>(numbers), score_factor);
    Tensors kept;
    for (int i = 0; i < n; i++) {
      const RawLayer<T>& layer = step.raw.layer[i];
      T* own = data<T>(numbers) + step.at[i];
      double* count = data<double>(statistics) + step.statistics_at[i];
      kept.push_back(nothing<T>());
      *count = 1;
      u.layer[i].bias = layer.bias ? layer.bias : own + kBias * layer.units;
      if (!layer.bias) std::fill(own + kBias * layer.units, own + (kBias + 1) * layer.units, T(0));
      if (layer.batch()) {
        const int64_t bytes = step.a.panel_total * layer.units * (int64_t)sizeof(T);
        if (bytes <= keep_bytes) {
          keep_bytes -= bytes;
          kept.back() = kept_tensor<T>({step.a.panel_total * layer.units});
        }
        T* panel = kept.back().numel() ? data<T>(kept.back()) : nullptr;
        T* variance = own + kVariance * layer.units;
        kernels<T>().moments(u, i, {count, own + kCenter * layer.units, variance, panel}, parallel);
        u.layer[i].kept = panel;
        for (int64_t h = 0; h < layer.units; h++) variance[h] /= T(*count > 1 ? *count : 1);
      }
      affine(layer, *count, own, count + 1);
      step.raw.point(i, own, count + 1);
    }
    Tensors out = run_forward(step.a, history);
    out.push_back(numbers);
    out.push_back(statistics);
    for (Tensor& t : kept) out.push_back(t);
    return out;
  });
}

// Returns the gradients of history, query and the parameters in their order; what was not asked for is empty.
Tensors native_train_backward(const MaybeTensor& grad_pooled, const MaybeTensor& grad_scores, DIN_FAST_STEP_PARAMETERS, const Tensor& scores,
                              const Tensor& numbers, const Tensor& statistics, const Tensors& kept, bool need_history, bool need_query,
                              bool need_weights) {
  return by_dtype(history, [&](auto zero) -> Tensors {
    using T = decltype(zero);
    Step<T> step(DIN_FAST_STEP_NAMES);
    Raw<T>& raw = step.raw;
    Unit<T>& u = step.a.unit;
    const int n = step.layers(), last = n - 1;
    Arguments<T>::expect("numbers", numbers, {step.at[n]});
    Arguments<double>::expect("statistics", statistics, {step.statistics_at[n]});
    STD_TORCH_CHECK(kept.size() == (size_t)n, "kept: expected ", n, " tensors, got ", kept.size());
    raw.point_folded(data<T>(numbers), score_factor);
    for (int i = 0; i < n; i++) {
      raw.point(i, data<T>(numbers) + step.at[i], data<double>(statistics) + step.statistics_at[i] + 1);
      if (kept[i].numel() == 0) continue;
      Arguments<T>::expect("kept", kept[i], {step.a.panel_total * raw.layer[i].units});
      u.layer[i].kept = data<T>(kept[i]);
    }
    Tensors out;
    for (size_t i = 0; i < 2 + parameters.size(); i++) out.push_back(nothing<T>());
    auto give = [&](size_t i) -> T* {  // the gradient of a parameter, where there is one
      if (!need_weights || !parameters[i].has_value()) return nullptr;
      std::vector<int64_t> sizes;
      for (int64_t d = 0; d < parameters[i]->dim(); d++) sizes.push_back(parameters[i]->size(d));
      out[2 + i] = new_tensor<T>(sizes);
      return data<T>(out[2 + i]);
    };
    BackwardPass<T> pass;
    step.a.gradients(pass, grad_pooled, grad_scores);
    pass.scores = data<T>(scores);
    Tensor logit = kept_tensor<T>({step.a.panel_total}), local[2] = {nothing<T>(), nothing<T>()};
    pass.d_logit = data<T>(logit);
    const int64_t first = raw.layer[0].units * u.dim, units = u.layer[last].units;
    std::vector<T> space(need_weights ? 3 * first + units : 0);
    T *d_weight[kMaxLayers] = {}, *d_bias[kMaxLayers] = {}, d_score_bias[2] = {};
    if (need_weights)
      for (int i = 0; i < n; i++) {
        d_weight[i] = give(kFields * i);
        d_bias[i] = give(kFields * i + 1);
      }
    std::vector<double> sums[kMaxLayers];
    for (int from = last, to = last; from >= 0;) {
      while (to >= 0 && !raw.layer[to].batch()) to--;  // the next layer with batch statistics, or -1: the inputs
      pass.from = from;
      pass.to = to;
      for (int i = 0; i < n; i++) {
        pass.sums[i] = nullptr;
        pass.d_weight[i] = pass.d_bias[i] = nullptr;
        if (i > from || i < to) continue;
        if (sums[i].empty()) {
          sums[i].resize(kSums * raw.layer[i].units);
          pass.sums[i] = sums[i].data();
        }
        if (i == to) continue;
        pass.d_weight[i] = i ? d_weight[i] : nullptr;
        pass.d_bias[i] = d_bias[i];
      }
      pass.d_score_weight = pass.first && need_weights ? space.data() + 3 * first : nullptr;
      pass.d_score_bias = pass.first && need_weights ? d_score_bias : nullptr;
      pass.local_in = from < last ? data<T>(local[0]) : nullptr;
      pass.local_out = nullptr;
      if (to >= 0 && to < last) {
        local[1] = kept_tensor<T>({step.a.panel_total * raw.layer[to].units});
        pass.local_out = data<T>(local[1]);
      }
      if (to < 0) {
        if (need_weights) pass.d_a_q = space.data(), pass.d_a_k = space.data() + first, pass.d_a_p = space.data() + 2 * first;
        if (need_query) {
          out[1] = kept_tensor(step.a.stored, {u.candidates, u.dim});
          pass.d_query = out[1].data_ptr();
        }
        if (need_history) {
          out[0] = step.a.ragged ? kept_tensor(step.a.stored, {history.size(0), u.dim}) : kept_tensor(step.a.stored, {u.users, u.length, u.dim});
          if (step.a.ragged) torch::stable::zero_(out[0]);
          pass.d_history = out[0].data_ptr();
        }
      }
      kernels<T>().backward(u, pass, parallel);
      if (to < 0) break;
      for (int i = to; i <= from; i++) u.layer[i].sums = sums[i].data();
      if (to < last) std::swap(local[0], local[1]);
      pass.first = false;
      from = to--;
    }
    if (!need_weights) return out;
    unfold_first(space.data(), blocks, raw.layer[0].units, u.dim, d_weight[0]);
    const size_t tail = parameters.size() - kTail;
    if (raw.hidden) {
      T *d_score = give(tail), *d_score_b = give(tail + 1);
      for (int64_t h = 0; h < units; h++) d_score[h] = space[3 * first + h] * (T)score_factor;
      if (d_score_b) *d_score_b = d_score_bias[0] * (T)score_factor;
      for (int i = 0; i < n; i++) {
        const size_t f = kFields * i;
        const RawLayer<T>& layer = raw.layer[i];
        affine_backward(layer, data<T>(numbers) + step.at[i], sums[i].data(),
                        {layer.norm.mode ? give(f + 2) : nullptr, layer.norm.mode ? give(f + 3) : nullptr, layer.gate.mode ? give(f + 6) : nullptr,
                         layer.gate.mode ? give(f + 7) : nullptr, give(f + 10)});
      }
    }
    if (T* d_slope = give(tail + 2)) *d_slope = d_score_bias[1];
    return out;
  });
}

STABLE_TORCH_LIBRARY(din_fast, m) {
  m.def("instruction_set() -> str");
  m.def("instruction_sets() -> str");
#define DIN_FAST_SEGMENTS "Tensor history, Tensor? starts, Tensor? lengths, Tensor? candidate_offsets, Tensor? mask, Tensor query"
#define DIN_FAST_SCORE "int score_activation, bool softmax, int empty, int pooling"
  m.def("native_moments(" DIN_FAST_SEGMENTS
        ", Tensor[] weights, Tensor[] affine, Tensor[] kept, Tensor? candidate_matrix, int layer, bool keep, int activation, float dice_eps, "
        "bool pads_are_input, float dropout, Tensor? seed) -> Tensor[]");
  m.def("native_forward(" DIN_FAST_SEGMENTS
        ", Tensor[] weights, Tensor[] affine, Tensor[] response, Tensor[] kept, Tensor? values, Tensor? candidate_matrix, "
        "Tensor? window_offsets, int activation, float dice_eps, bool pads_are_input, " DIN_FAST_SCORE ", float dropout, Tensor? seed) -> Tensor[]");
#define DIN_FAST_BACKWARD \
  "Tensor? grad_pooled, Tensor? grad_scores, " DIN_FAST_SEGMENTS \
  ", Tensor[] weights, Tensor[] affine, Tensor[] response, Tensor[] kept, Tensor scores, Tensor[] sums, Tensor[] local, Tensor? values, " \
  "Tensor? candidate_matrix, Tensor? window_offsets, int from_layer, "
#define DIN_FAST_BACKWARD_TAIL \
  "bool need_weights, int activation, float dice_eps, bool pads_are_input, " DIN_FAST_SCORE ", float dropout, Tensor? seed) -> Tensor[]"
  m.def("native_backward_moments(" DIN_FAST_BACKWARD "int layer, " DIN_FAST_BACKWARD_TAIL);
  m.def("native_backward(" DIN_FAST_BACKWARD "bool need_history, bool need_query, " DIN_FAST_BACKWARD_TAIL);
  m.def("native_infer(" DIN_FAST_SEGMENTS
        ", Tensor?[] parameters, int[] blocks, float[] eps, int activation, float dice_eps, " DIN_FAST_SCORE ", float score_factor) -> Tensor[]");
#define DIN_FAST_STEP \
  DIN_FAST_SEGMENTS ", Tensor?[] parameters, int[] blocks, float[] eps, int[] modes, int activation, float dice_eps, bool pads_are_input, " \
  DIN_FAST_SCORE ", float dropout, Tensor? seed, float score_factor, "
  m.def("native_train(" DIN_FAST_STEP "int keep_bytes) -> Tensor[]");
  m.def("native_train_backward(Tensor? grad_pooled, Tensor? grad_scores, " DIN_FAST_STEP
        "Tensor scores, Tensor numbers, Tensor statistics, Tensor[] kept, bool need_history, bool need_query, bool need_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(din_fast, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
}

STABLE_TORCH_LIBRARY_IMPL(din_fast, CPU, m) {
  m.impl("native_moments", TORCH_BOX(&native_moments));
  m.impl("native_forward", TORCH_BOX(&native_forward));
  m.impl("native_backward_moments", TORCH_BOX(&native_backward_moments));
  m.impl("native_backward", TORCH_BOX(&native_backward));
  m.impl("native_infer", TORCH_BOX(&native_infer));
  m.impl("native_train", TORCH_BOX(&native_train));
  m.impl("native_train_backward", TORCH_BOX(&native_train_backward));
}

}  // namespace
}  // namespace din_fast

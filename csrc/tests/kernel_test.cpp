// The CPU kernel against a naive unit in double, for every instruction set that runs here, without torch or Python.
//
//   kernel_test [avx512|avx2|portable [ROOM]]     one instruction set, or all that this processor has
//
// ROOM: bytes between the end of every array and the page that cannot be read, default 0; for an emulator that reads more
// than an instruction's operand.
//
// Every case also checks: the same bits in reverse order of the chunks, on threads, after a call full of NaN, and when
// only some gradients are asked for; no access beyond an array; every result written; no number of a pad read.
// Exit status: 0 all passed, 1 some failed, 2 bad argument, 3 this processor lacks the instruction set.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>

#include "naive.h"

// An error may be kAllowed u S: u the unit roundoff, S the largest entry of a result or, of a gradient, the largest sum of
// the magnitudes that add up to an entry.
template <class T> constexpr double kAllowed = sizeof(T) == 4 ? 300 : 1000;  // the truth is a double too

// ---------------------------------------------------------------- the kernel
// Arrays of NaN that end `room` bytes before an unreadable page; the bytes in front of and behind them have to stay as they
// are.
class Memory {
  struct Piece { char* map; size_t pages; char *array, *end; };
  std::vector<Piece> pieces;
  static std::map<size_t, std::vector<char*>> unused;  // by pages
  static constexpr size_t kFront = 128;
  static constexpr char kGuard = 0x5a;

 public:
  inline static size_t room = 0;
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() {
    for (const Piece& p : pieces) unused[p.pages].push_back(p.map);
  }
  template <class T> T* take(size_t n) {
    static const size_t page = sysconf(_SC_PAGESIZE);
    const size_t bytes = n * sizeof(T), pages = (kFront + bytes + room + page - 1) / page;
    std::vector<char*>& fit = unused[pages];
    if (fit.empty()) {
      void* map = mmap(nullptr, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (map == MAP_FAILED || mprotect((char*)map + pages * page, page, PROT_NONE)) perror("mmap"), exit(1);
      fit.push_back((char*)map);
    }
    char *map = fit.back(), *end = map + pages * page - room, *array = end - bytes;
    fit.pop_back();
    pieces.push_back({map, pages, array, end});
    memset(array - kFront, kGuard, kFront), memset(array, 0xff, bytes), memset(end, kGuard, room);
    return (T*)array;
  }
  template <class T, class From> T* copy(const From& from) {
    T* to = take<T>(from.size());
    std::copy(from.begin(), from.end(), to);
    return to;
  }
  // rows of `columns`, `gap` NaN between them
  template <class T> T* spread(const Numbers& from, int64_t columns, int64_t gap) {
    const int64_t rows = from.size() / columns;
    T* to = take<T>(rows * (columns + gap));
    for (int64_t i = 0; i < rows; i++) std::copy_n(from.data() + i * columns, columns, to + i * (columns + gap));
    return to;
  }
  bool intact() const {
    for (const Piece& p : pieces)
      if (std::count(p.array - kFront, p.array, kGuard) + std::count(p.end, p.end + room, kGuard) !=
          (std::ptrdiff_t)(kFront + room))
        return false;
    return true;
  }
};
std::map<size_t, std::vector<char*>> Memory::unused;

enum Want { kHistory = 1, kQuery = 2, kWeights = 4, kAll = 7 };
template <class T> using Results = std::map<std::string, std::vector<T>>;

// One problem through the kernel, as din_fast/ops.py and fold.py go: moments of each layer that needs them, forward, the
// passes of the backward.
template <class T> class Run {
  const Problem& p;
  const Case& c;
  const Kernels<T>& kernels;
  const ParallelFor parallel;
  Memory memory;
  Unit<T> u;
  int64_t panels = 0;
  // layers with batch statistics: d norm_scale / d its weight, d gate_scale / d its weight, d gate_scale / d norm_scale
  Numbers by_norm[kMaxLayers], by_gate[kMaxLayers], gate_by_norm[kMaxLayers];

  T* copy(const std::string& key) { return p.in.count(key) ? memory.copy<T>(p.in.at(key)) : nullptr; }
  template <class N> void put(const std::string& key, const N* v, int64_t n) { results[key].assign(v, v + n); }

  void segments() {
    const int gap = c.strided ? 3 : 0;
    u.history = memory.spread<T>(c.group > 1 ? p.of_users(p.in.at("history"), (int64_t)c.length * c.dim) : p.in.at("history"), c.dim, gap);
    u.query = memory.spread<T>(p.in.at("query"), c.dim, gap);
    u.candidates = c.users, u.users = c.users / std::max(1, c.group), u.length = c.length, u.dim = c.dim;
    if (c.group > 1) {
      std::vector<int64_t> offsets;
      for (int64_t i = 0; i <= u.users; i++) offsets.push_back(i * c.group);
      u.candidate_offsets = memory.copy<int64_t>(offsets);
    }
    u.row_stride = u.query_stride = c.dim + gap;
    u.user_stride = c.length * u.row_stride;
    u.pads_are_input = c.batch != 0 && !c.valid_rows;
    if (!p.mask.empty()) u.mask = memory.copy<bool>(p.of_users(p.mask, c.length));
    if (!p.lengths.empty()) u.lengths = memory.copy<int64_t>(p.of_users(p.lengths, 1));
    panels = c.users * panel_rows(c.length);
    if (c.pads != kRagged) return;
    std::vector<int64_t> starts, panel_start;
    panels = u.length = 0;
    for (int i = 0; i < c.users; i++) {
      starts.push_back(p.starts[i] * c.dim), panel_start.push_back(panels);
      panels += panel_rows(p.lengths[i]);
      u.length = std::max(u.length, p.lengths[i]);
    }
    u.starts = memory.copy<int64_t>(starts), u.panel_start = memory.copy<int64_t>(panel_start);
  }

  void parameters() {
    u.a_q = copy("a_q"), u.a_k = copy("a_k"), u.a_p = copy("a_p");
    u.layers = c.layers;
    for (int i = 0; i < c.layers; i++) {
      Layer<T>& layer = u.layer[i];
      layer.units = c.units[i];
      layer.weight = copy(name("weight", i)), layer.bias = copy(name("bias", i)), layer.slope = copy(name("slope", i));
      layer.norm_scale = copy(name("norm_scale", i)), layer.norm_shift = copy(name("norm_shift", i));
      layer.gate_scale = copy(name("gate_scale", i)), layer.gate_shift = copy(name("gate_shift", i));
      if (c.mode != kPlain) layer.center = memory.copy<T>(p.center.at(name("center", i)));
    }
    u.score_weight = copy("score_weight"), u.score_bias = (T)p.in.at("score_bias")[0];
    u.activation = c.activation, u.score_activation = c.score, u.pooling = c.pooling, u.empty = c.empty;
    u.dice_eps = (T)kEps, u.softmax = c.softmax;
  }

  void batch_statistics(int i) {
    Layer<T>& layer = u.layer[i];
    const int units = c.units[i];
    T *mean = memory.take<T>(units), *m2 = memory.take<T>(units), *kept = c.keep >> i & 1 ? memory.take<T>(panels * units) : nullptr;
    double count = 0;
    kernels.moments(u, i, {&count, mean, m2, kept}, parallel);
    put(name("mean", i), mean, units), put(name("m2_", i), m2, units);
    const bool norm = layer.norm_scale, gated = layer.gate_scale;
    T *norm_scale = copy(name("norm_scale", i)), *gate_scale = copy(name("gate_scale", i));
    double* response = memory.take<double>(8 * units);
    for (int h = 0; h < units; h++) {
      const double variance = m2[h] / count, inverse = 1 / std::sqrt(variance + kNormEps), scale = norm ? norm_scale[h] * inverse : 1;
      const double gate_inverse = 1 / std::sqrt(scale * scale * variance + kNormEps), weight = gated ? gate_scale[h] : 0;
      const double gate = weight * scale * gate_inverse, ratio = scale * gate_inverse;
      by_norm[i].push_back(inverse), by_gate[i].push_back(ratio);
      gate_by_norm[i].push_back(weight * kNormEps * gate_inverse * gate_inverse * gate_inverse);
      const double by_variance = norm ? -0.5 * scale * inverse * inverse : 0;
      const double gate_by_variance = -0.5 * gate * ratio * ratio + gate_by_norm[i][h] * by_variance;
      const double rows[8] = {0, norm ? scale : 0, 0, gate, -2 * by_variance, 0, -2 * gate_by_variance, 0};
      for (int r = 0; r < 8; r++) response[r * units + h] = rows[r] / count;
      if (norm) norm_scale[h] = (T)scale;
      if (gated) gate_scale[h] = (T)gate;
    }
    layer.kept = kept, layer.center = mean, layer.response = response;
    layer.norm_scale = norm_scale, layer.gate_scale = gate_scale;
  }

  void forward() {
    ForwardOut<T> out{memory.take<T>((int64_t)c.users * c.dim), memory.take<T>(p.rows)};
    kernels.forward(u, out, parallel);
    put("pooled", static_cast<T*>(out.pooled), (int64_t)c.users * c.dim), put("scores", out.scores, p.rows);
    scores = out.scores;
  }
  const T* scores = nullptr;

  // One pass; returns what the next one needs.
  BackwardPass<T> pass(int want, int from, int to, const BackwardPass<T>* before, const T* grad_pooled,
                       const T* grad_scores) {
    BackwardPass<T> b;
    b.first = !before, b.from = from, b.to = to;
    b.scores = scores, b.grad_pooled = grad_pooled, b.grad_scores = grad_scores;
    for (int64_t(*stride)[2] : {&b.grad_pooled_stride, &b.grad_scores_stride}) {
      const int64_t columns = stride == &b.grad_pooled_stride ? c.dim : c.length;
      (*stride)[0] = c.strided ? 1 : columns, (*stride)[1] = c.strided ? c.users : 1;  // strided: transposed
    }
    b.d_logit = before ? before->d_logit : memory.take<T>(panels);
    if (before) b.local_in = before->local_out;
    if (to >= 0 && to < c.layers - 1) b.local_out = memory.take<T>(panels * c.units[to]);
    std::vector<std::function<void()>> later;
    auto give = [&](const std::string& key, int64_t n) {
      T* out = memory.take<T>(n);
      later.push_back([=] { put(key, out, n); });
      return out;
    };
    if (b.first && want & kWeights) {
      b.d_score_weight = give("d score_weight", c.units[c.layers - 1]);
      b.d_score_bias = give("d score_bias", 1);
    }
    for (int i = from; i >= std::max(to, 0); i--) {
      if (!u.layer[i].sums) {
        double* sums = b.sums[i] = memory.take<double>(kSums * c.units[i]);
        later.push_back([=] { put(name("sums", i), sums, kSums * c.units[i]); });
      }
      if (i == to || !(want & kWeights)) continue;
      if (i) b.d_weight[i] = give(name("d weight", i), (int64_t)c.units[i] * c.units[i - 1]);
      b.d_bias[i] = give(name("d bias", i), c.units[i]);
    }
    if (to < 0) {
      const int64_t n = (int64_t)c.units[0] * c.dim;
      if (want & kWeights) b.d_a_q = give("d a_q", n), b.d_a_k = give("d a_k", n), b.d_a_p = give("d a_p", n);
      if (want & kQuery) b.d_query = give("d query", (int64_t)c.users * c.dim);
      if (want & kHistory) b.d_history = give("d history", p.rows / std::max(1, c.group) * c.dim);
    }
    kernels.backward(u, b, parallel);
    for (const auto& put_it : later) put_it();
    for (int i = from; i >= 0; i--)
      if (b.sums[i]) u.layer[i].sums = b.sums[i], add_affine(i, b.sums[i]);
    return b;
  }

  // The sums as gradients of what the problem calls norm_scale, norm_shift, gate_scale, gate_shift and slope
  void add_affine(int i, const double* sums) {
    const int units = c.units[i];
    const char* keys[kSums] = {"norm_scale", "norm_shift", "gate_scale", "gate_shift", "slope"};
    for (int k = 0; k < kSums; k++) {
      if (!p.in.count(name(keys[k], i))) continue;
      std::vector<T>& d = results["d " + name(keys[k], i)];
      d.assign(sums + k * units, sums + (k + 1) * units);
      for (int h = 0; h < units && c.has_batch(i); h++) {
        if (k == 0) d[h] = (T)((d[h] + sums[2 * units + h] * gate_by_norm[i][h]) * by_norm[i][h]);
        if (k == 2) d[h] = (T)(d[h] * by_gate[i][h]);
      }
    }
  }

  static Numbers transposed(const Numbers& from, int64_t columns) {
    Numbers to;
    for (int64_t j = 0; j < columns; j++)
      for (size_t i = j; i < from.size(); i += columns) to.push_back(from[i]);
    return to;
  }
  void backward(int want) {
    const T *grad_pooled = nullptr, *grad_scores = nullptr;
    if (c.pooled_grad) grad_pooled = memory.copy<T>(c.strided ? transposed(p.grad_pooled, c.dim) : p.grad_pooled);
    if (c.score_grad) grad_scores = memory.copy<T>(c.strided ? transposed(p.grad_scores, c.length) : p.grad_scores);
    BackwardPass<T> last;
    const BackwardPass<T>* before = nullptr;
    int from = c.layers - 1;
    for (int to = c.layers - 1; to >= -1; to--) {
      if (to >= 0 && !c.has_batch(to)) continue;
      last = pass(want, from, to, before, grad_pooled, grad_scores);
      before = &last, from = to;
    }
  }

 public:
  Results<T> results;
  Run(const Problem& problem, const Kernels<T>& k, ParallelFor run, int want)
      : p(problem), c(p.c), kernels(k), parallel(run) {
    segments();
    parameters();
    for (int i = 0; i < c.layers; i++)
      if (c.has_batch(i)) batch_statistics(i);
    forward();
    backward(want);
  }
  bool intact() const { return memory.intact(); }
};

static void in_order(int64_t n, Body body, void* context) {
  for (int64_t i = 0; i < n; i++) body(context, i);
}
static void in_reverse(int64_t n, Body body, void* context) {
  for (int64_t i = n; i-- > 0;) body(context, i);
}
static void on_threads(int64_t n, Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 3; t++)
    threads.emplace_back([=] { for (int64_t i = t; i < n; i += 3) body(context, i); });
  for (std::thread& t : threads) t.join();
}

// ---------------------------------------------------------------- comparing
static std::string running;  // what a signal interrupts
static double largest[2];    // error / (u S) of float and double

static std::string entry(const std::string& key, size_t i, const char* format, double a, double b, double c) {
  char text[200];
  snprintf(text, sizeof text, format, a, b, c);
  return key + "[" + std::to_string(i) + "]: " + text;
}

// What is wrong with the results, a line each
template <class T> void compare(const Results<T>& got, const Truth& truth, std::vector<std::string>& wrong) {
  const double u = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
  for (const auto& [key, want] : truth.value) {
    const auto found = got.find(key);
    if (found == got.end() || found->second.size() != want.size()) {
      wrong.push_back(key + ": not given");
      continue;
    }
    const double unit = u * truth.scale.at(key);
    for (size_t i = 0; i < want.size(); i++) {
      const double x = (double)found->second[i], error = std::fabs(x - want[i]);
      if (std::isnan(want[i]) ? std::isnan(x) : error <= kAllowed<T> * unit) {
        if (error > 0) largest[sizeof(T) == 8] = std::fmax(largest[sizeof(T) == 8], error / unit);
        continue;
      }
      wrong.push_back(entry(key, i, "got %.9g, expected %.9g, allowed error %.2g", x, want[i], kAllowed<T> * unit));
      break;
    }
  }
}

// The bits of all results that both have; any NaN is like any other.
template <class T>
void compare_bits(const std::string& what, const Results<T>& got, const Results<T>& first, std::vector<std::string>& wrong) {
  for (const auto& [key, v] : got) {
    const std::vector<T>& w = first.at(key);
    if (memcmp(v.data(), w.data(), v.size() * sizeof(T)) == 0) continue;
    for (size_t i = 0; i < v.size(); i++)
      if (memcmp(&v[i], &w[i], sizeof(T)) && !(std::isnan(v[i]) && std::isnan(w[i]))) {
        wrong.push_back(what + " changes " + entry(key, i, "%.9g, was %.9g, differs by %.2g", v[i], w[i], v[i] - w[i]));
        break;
      }
  }
}

template <class T> bool passes(const Problem& p, const Truth& truth, const char* set, const Kernels<T>& kernels) {
  running = std::string(set) + (sizeof(T) == 4 ? " float  " : " double ") + p.c.text();
  std::vector<std::string> wrong;
  const Run<T> first(p, kernels, in_order, kAll);
  bool intact = first.intact();
  compare(first.results, truth, wrong);
  auto again = [&](const char* what, ParallelFor parallel, int want) {
    const Run<T> run(p, kernels, parallel, want);
    intact = intact && run.intact();
    compare_bits(what, run.results, first.results, wrong);
  };
  again("work on threads", on_threads, kAll);
  again("reverse order with gradients of weights only", in_reverse, kWeights);
  again("reverse order with gradients of history only", in_reverse, kHistory);
  Problem nan = p;
  for (const char* key : {"history", "query"}) std::fill(nan.in[key].begin(), nan.in[key].end(), kNaN);
  Run<T>(nan, kernels, in_order, kAll);
  again("a call full of NaN before, with gradients of query only,", in_order, kQuery);
  if (!intact) wrong.push_back("wrote in front of or behind an array");
  for (const std::string& line : wrong) printf("FAIL %s: %s\n", running.c_str(), line.c_str());
  return wrong.empty();
}

static bool runs_here(const char* set) {
#if defined(__x86_64__)
  if (!strcmp(set, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (!strcmp(set, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

static void on_signal(int number) {
  fflush(stdout);
  const char* what = number == SIGSEGV ? ": reached beyond an array\n" : ": a fault or an unknown instruction\n";
  const std::string line = "FAIL " + running + what;
  _exit(write(1, line.data(), line.size()) < 0 ? 2 : 1);
}

int main(int argc, char** argv) {
  const std::map<std::string, const InstructionSet*> known = {{"avx512", avx512()}, {"avx2", avx2()}, {"portable", portable()}};
  char* end = nullptr;
  if (argc > 2) Memory::room = strtoul(argv[2], &end, 10);
  if (argc > 3 || (argc > 1 && !known.count(argv[1])) || (end && *end)) {
    fprintf(stderr, "usage: kernel_test [avx512|avx2|portable [ROOM]]\n");
    return 2;
  }
  std::vector<const InstructionSet*> sets;
  for (const auto& [name, set] : known)
    if ((argc == 1 || name == argv[1]) && set && runs_here(set->name)) sets.push_back(set);
  if (sets.empty()) {
    fprintf(stderr, "this processor has no %s\n", argv[1]);
    return 3;
  }
  for (int number : {SIGSEGV, SIGBUS, SIGILL}) signal(number, on_signal);

  int passed = 0, failed = 0;
  uint64_t seed = 0;
  for (const Case& c : all_cases()) {
    Problem p;
    Truth truth;
    do {
      p = draw(c, ++seed);
      truth = naive(p);
    } while (truth.nearest_kink < 2e-6);  // rounding must not decide on which side
    for (const InstructionSet* set : sets)
      for (bool good : {passes(p, truth, set->name, set->f32), passes(p, truth, set->name, set->f64)})
        ++(good ? passed : failed);
  }
  for (const InstructionSet* set : sets) printf("%s ", set->name);
  printf("| largest error %.0f u S in float, %.0f u S in double; allowed %.0f and %.0f\n", largest[0], largest[1],
         kAllowed<float>, kAllowed<double>);
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

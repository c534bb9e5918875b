// The CPU kernel against a naive unit in double, for every instruction set that runs here, without torch or Python.
//
//   kernel_test [avx512|avx2|portable]     one instruction set, or all that this processor has
//
// Exit status: 0 all passed, 1 some failed, 2 bad argument, 3 this processor lacks the instruction set.
//
// The naive unit (section "truth") is its definition written as loops, on a tape that differentiates it: no formula of a
// gradient is shared with the kernel. Every case also checks: the same bits again, in reverse order of the chunks, on
// threads, after a call full of NaN, and when only some gradients are asked for; no access beyond an array; every result
// written; no number of a pad read.
#include <malloc.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "../unit.h"

using namespace din_fast;
using Numbers = std::vector<double>;
using Tensors = std::map<std::string, Numbers>;

constexpr double kEps = 1e-3, kNormEps = 1e-5, kNaN = __builtin_nan("");
// An error may be kAllowed u S: u the unit roundoff, S the largest entry of a result or, of a gradient, the largest sum of
// the magnitudes that add up to an entry.
template <class T> constexpr double kAllowed = sizeof(T) == 4 ? 300 : 5000;  // the truth is a double too

static std::string name(const char* base, int layer) { return base + std::to_string(layer); }

// ---------------------------------------------------------------- cases
struct Random {
  uint64_t state;
  uint64_t bits() {  // splitmix64
    uint64_t x = state += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  int below(int n) { return (int)(bits() % n); }
  int pick(std::initializer_list<int> of) { return of.begin()[below((int)of.size())]; }
  double number(double scale) { return (float)(scale * ((double)(bits() >> 11) * 0x1p-52 - 1)); }  // the same in float
  Numbers numbers(int64_t n, double scale, double offset = 0) {
    Numbers v(n);
    for (double& x : v) x = (float)(offset + number(scale));
    return v;
  }
};

enum Mode { kPlain, kCentered, kFull };
enum Pads { kNoPads, kLengths, kMask, kBoth, kRagged };
struct Case {
  int activation, mode, layers, units[kMaxLayers], dim, length, users, pads;
  int batch, keep;  // bit i: layer i has batch statistics, its z is kept
  int score, empty, pooling, softmax;
  bool strided, pooled_grad, score_grad;

  bool has_batch(int layer) const { return batch >> layer & 1; }
  int64_t products() const {  // multiply-adds of a forward pass
      int64_t n = (int64_t)dim * units[0];
      for (int i = 1; i < layers; i++) n += (int64_t)units[i - 1] * units[i];
      return n * users * length;
  }
  std::string text() const {
    static const char* activations[] = {"identity", "relu", "sigmoid", "prelu", "dice_row", "dice_batch"};
    static const char *modes[] = {"plain", "centred", "full"}, *pad_kinds[] = {"", " lengths", " mask", " mask+lengths", " ragged"};
    static const char *empties[] = {"zeros", "uniform", "nan"}, *poolings[] = {"sum", "mean", "mean_valid"};
    std::string s = std::string(activations[activation]) + " " + modes[mode] + " units";
    for (int i = 0; i < layers; i++) s += " " + std::to_string(units[i]);
    s += " dim " + std::to_string(dim) + " length " + std::to_string(length) + " users " + std::to_string(users) + pad_kinds[pads];
    s += " batch " + std::to_string(batch) + " keep " + std::to_string(keep) + " " + poolings[pooling];
    s += softmax ? std::string(" softmax ") + empties[empty] : score ? " sigmoid" : "";
    return s + (strided ? " strided" : "") + (pooled_grad ? "" : " no grad_pooled") + (score_grad ? " grad_scores" : "");
  }
};

// Every activation in every mode; the rest is drawn, always the same.
static std::vector<Case> all_cases() {
  std::vector<Case> cases;
  Random r{1};
  for (int i = 0; i < 18 * 6; i++) {
    Case c = {};
    c.activation = i % kActivations;
    c.mode = i / kActivations % 3;
    do {  // not too much for an emulator
      c.layers = 1 + r.below(3);
      for (int& u : c.units) u = r.pick({1, 3, 17, 36, 80});
      c.dim = r.pick({1, 3, 8, 10, 16, 33, 64});
      c.length = r.pick({1, 7, 33, 100, 130});
      c.users = r.pick({1, 2, 5, 19, 70});
    } while (c.products() > 40000);
    c.pads = r.below(5);
    if (c.mode != kPlain && r.below(3) && c.users * c.length > 20 && c.pads != kRagged) c.batch = 1 + r.below((1 << c.layers) - 1);
    c.keep = c.batch & r.below(8);
    c.softmax = r.below(2);
    c.empty = c.softmax ? r.below(3) : 0;
    c.score = c.softmax ? 0 : r.below(2);
    c.pooling = r.below(3);
    c.strided = c.pads != kRagged && r.below(3) == 0;
    c.score_grad = c.pads != kRagged && r.below(2);
    c.pooled_grad = !c.score_grad || r.below(4);
    cases.push_back(c);
  }
  // histories whose sums are flushed on the way
  for (int batch : {0, 3})
    cases.push_back({batch ? kDiceBatch : kPrelu, kFull, 2, {3, 2}, 3, 4500, 1, kMask, batch, batch & 1, 0, kZeros, kMean, 1, false, true, true});
  return cases;
}

// ---------------------------------------------------------------- one problem: a case with its numbers
struct Problem {
  Case c;
  Tensors in;         // all that has a gradient; norm_scale and gate_scale are the norms' weights in layers with batch statistics
  Tensors center;     // of the layers without
  Numbers grad_pooled, grad_scores;
  std::vector<char> mask;
  std::vector<int64_t> starts, lengths;  // starts in rows
  int64_t rows = 0;                      // of the history

  int64_t total(int user) const { return c.pads == kRagged ? lengths[user] : c.length; }
  int64_t row(int user, int64_t l) const { return c.pads == kRagged ? starts[user] + l : (int64_t)user * c.length + l; }
  bool valid(int user, int64_t l) const { return (lengths.empty() || l < lengths[user]) && (mask.empty() || mask[row(user, l)]); }
  int64_t count(int user) const {
    int64_t n = 0;
    for (int64_t l = 0; l < total(user); l++) n += valid(user, l);
    return n;
  }
  // a softmax over nothing that is not zeros: its pads are pooled
  bool over_nothing(int user) const { return c.softmax && c.empty != kZeros && count(user) == 0; }
  bool is_input(int user, int64_t l) const { return c.batch || valid(user, l) || over_nothing(user); }
};

static Problem draw(const Case& c, uint64_t seed) {
  Random r{seed};
  Problem p;
  p.c = c;
  p.rows = (int64_t)c.users * c.length;
  if (c.pads == kLengths || c.pads == kBoth || c.pads == kRagged)
    for (int u = 0; u < c.users; u++) p.lengths.push_back(u % 4 == 0 ? c.length : u % 4 == 1 ? 0 : r.below(c.length + 1));
  if (c.pads == kMask || c.pads == kBoth)
    for (int64_t i = 0; i < p.rows; i++) p.mask.push_back(i / c.length % 5 != 2 && r.below(4) > 0);
  if (c.pads == kRagged) {  // user after user, from the last one, with two rows of nobody in between
    p.starts.resize(c.users);
    p.rows = 2;
    for (int u = c.users - 1; u >= 0; u--) p.starts[u] = p.rows, p.rows += p.lengths[u] + 2;
  }
  Tensors& t = p.in;
  t["history"] = Numbers(p.rows * c.dim, kNaN);
  for (int u = 0; u < c.users; u++)
    for (int64_t l = 0; l < p.total(u); l++)
      for (int d = 0; d < c.dim; d++)
        if (const double x = r.number(1.5); p.is_input(u, l)) t["history"][p.row(u, l) * c.dim + d] = x;
  t["query"] = r.numbers((int64_t)c.users * c.dim, 1.5);
  for (const char* a : {"a_q", "a_k", "a_p"}) t[a] = r.numbers((int64_t)c.units[0] * c.dim, 1.2 / std::sqrt(c.dim));
  for (int i = 0; i < c.layers; i++) {
    const int units = c.units[i];
    if (i) t[name("weight", i)] = r.numbers((int64_t)units * c.units[i - 1], 2 / std::sqrt(c.units[i - 1]));
    t[name("bias", i)] = r.numbers(units, 0.5);
    if (c.mode != kPlain) p.center[name("center", i)] = r.numbers(units, 0.5);
    if (c.mode == kFull) t[name("norm_scale", i)] = r.numbers(units, 0.5, 1), t[name("norm_shift", i)] = r.numbers(units, 0.5);
    if (c.activation == kDiceBatch) t[name("gate_scale", i)] = r.numbers(units, 0.5, 1), t[name("gate_shift", i)] = r.numbers(units, 0.5);
    if (c.activation >= kPrelu) t[name("slope", i)] = r.numbers(units, 0.5, 0.2);
  }
  t["score_weight"] = r.numbers(c.units[c.layers - 1], 2 / std::sqrt(c.units[c.layers - 1]));
  t["score_bias"] = r.numbers(1, 0.5);
  p.grad_pooled = r.numbers((int64_t)c.users * c.dim, 1);
  p.grad_scores = r.numbers((int64_t)c.users * c.length, 1);
  return p;
}

// ---------------------------------------------------------------- truth: a tape of doubles
using Var = int;  // the number of a node
struct Tape {
  struct Edge { Var parent; double derivative; };
  Numbers value, grad, mass;  // mass: sum of the magnitudes that grad adds up
  std::vector<Edge> edges;
  std::vector<size_t> end;    // where a node's edges end, which lie behind those of the node before

  void clear() { value.clear(), edges.clear(), end.clear(); }
  Var node(double v) {
    value.push_back(v);
    end.push_back(edges.size());
    return (Var)value.size() - 1;
  }
  void differentiate() {  // the last node, by all
    grad.assign(value.size(), 0), mass.assign(value.size(), 0);
    grad.back() = 1;
    for (size_t i = value.size(); i-- > 0;)
      for (size_t e = i ? end[i - 1] : 0; e < end[i]; e++) {
        const double d = grad[i] * edges[e].derivative;
        grad[edges[e].parent] += d;
        mass[edges[e].parent] += std::fabs(d);
      }
  }
};
static Tape tape;
static double at(Var a) { return tape.value[a]; }
// f(a), f(a, b): the value and its derivatives
static Var apply(double v, Var a, double da) { return tape.edges.push_back({a, da}), tape.node(v); }
static Var apply(double v, Var a, double da, Var b, double db) { return tape.edges.push_back({a, da}), apply(v, b, db); }
static Var sub(Var a, Var b) { return apply(at(a) - at(b), a, 1, b, -1); }
static Var mul(Var a, Var b) { return apply(at(a) * at(b), a, at(b), b, at(a)); }
static Var quotient(Var a, Var b) { return apply(at(a) / at(b), a, 1 / at(b), b, -at(a) / at(b) / at(b)); }
static Var root(Var a, double eps) { return apply(std::sqrt(at(a) + eps), a, 0.5 / std::sqrt(at(a) + eps)); }
static Var exp_less(Var a, double most) { return apply(std::exp(at(a) - most), a, std::exp(at(a) - most)); }
static Var sigmoid(Var a) {
  const double s = 1 / (1 + std::exp(-at(a)));
  return apply(s, a, s * (1 - s));
}
// A sum of products; no other node may be made until it is done.
struct Sum {
  double total = 0;
  Sum& add(Var a, double by = 1) { return total += at(a) * by, tape.edges.push_back({a, by}), *this; }
  Sum& add(Var a, Var b, double by = 1) {
    tape.edges.push_back({a, at(b) * by});
    return add(b, at(a) * by);
  }
  Var done() { return tape.node(total); }
};

struct Truth {
  Tensors value;
  std::map<std::string, double> scale;
  double nearest_kink = 1;  // smallest magnitude that reached the kink of an activation
  void put(const std::string& key, Numbers v) {
    double& most = scale[key] = 0;
    for (double x : v) most = std::fmax(most, std::fabs(x));
    value[key] = std::move(v);
  }
};

using Leaves = std::map<std::string, Var>;  // the first node of each tensor; the others follow

// One hidden layer: its z of all rows -> its activations, in place.
static void naive_activation(const Problem& p, int i, const Leaves& in, std::vector<std::vector<Var>>& rows, Truth& truth) {
  const Case& c = p.c;
  const bool norm = c.mode == kFull, gated = c.activation == kDiceBatch;
  const int units = c.units[i];
  std::vector<std::vector<Var>> x = rows;  // the gate's argument
  Numbers means, m2;
  for (int h = 0; h < units; h++) {
    Var center = c.mode == kPlain ? tape.node(0) : c.has_batch(i) ? -1 : tape.node(p.center.at(name("center", i))[h]);
    Var scale = norm ? in.at(name("norm_scale", i)) + h : tape.node(1);
    Var gate_scale = gated ? in.at(name("gate_scale", i)) + h : -1;
    const Var shift = norm ? in.at(name("norm_shift", i)) + h : -1, gate_shift = gated ? in.at(name("gate_shift", i)) + h : -1;
    if (c.has_batch(i)) {
      Sum mean, variance;
      for (const auto& z : rows) mean.add(z[h], 1.0 / rows.size());
      center = mean.done();
      std::vector<Var> d;
      for (const auto& z : rows) d.push_back(sub(z[h], center));
      for (Var v : d) variance.add(v, v, 1.0 / rows.size());
      const Var var = variance.done();
      means.push_back(at(center)), m2.push_back(at(var) * rows.size());
      if (norm) scale = quotient(scale, root(var, kNormEps));
      if (gated) gate_scale = mul(quotient(gate_scale, root(mul(mul(scale, scale), var), kNormEps)), scale);
    }
    for (size_t r = 0; r < rows.size(); r++) {
      const Var d = sub(rows[r][h], center);
      if (gated) x[r][h] = Sum().add(d, gate_scale).add(gate_shift).done();
      if (norm) rows[r][h] = Sum().add(d, scale).add(shift).done();
    }
  }
  if (c.has_batch(i)) truth.put(name("mean", i), means), truth.put(name("m2_", i), m2);
  const Var slope = c.activation >= kPrelu ? in.at(name("slope", i)) : -1;
  for (size_t r = 0; r < rows.size(); r++) {
    std::vector<Var>& n = rows[r];
    if (c.activation == kDiceRow) {
      Sum mean, squares;
      for (Var v : n) mean.add(v, 1.0 / units);
      const Var m = mean.done();
      for (int h = 0; h < units; h++) x[r][h] = sub(n[h], m);
      for (Var d : x[r]) squares.add(d, d);
      const Var length = root(squares.done(), units * kEps);
      for (Var& d : x[r]) d = quotient(d, length);
    }
    for (int h = 0; h < units; h++) {
      const double v = at(n[h]);
      if (c.activation == kRelu || c.activation == kPrelu) truth.nearest_kink = std::fmin(truth.nearest_kink, std::fabs(v));
      if (c.activation == kRelu && v <= 0) n[h] = tape.node(0);
      if (c.activation == kSigmoid) n[h] = sigmoid(n[h]);
      if (c.activation == kPrelu && v <= 0) n[h] = mul(n[h], slope + h);
      if (c.activation == kDiceRow || c.activation == kDiceBatch) {  // p n + (1 - p) alpha n
        const Var gate = sigmoid(x[r][h]), shut = mul(n[h], slope + h);
        n[h] = Sum().add(gate, n[h]).add(shut).add(gate, shut, -1).done();
      }
    }
  }
}

// Scores of a user's valid positions -> their weights
static void naive_weights(const Problem& p, int user, std::vector<Var>& s) {
  if (p.over_nothing(user))
    for (Var& v : s) v = p.c.empty == kNan ? apply(kNaN, v, kNaN) : tape.node(1.0 / p.total(user));
  else if (p.c.softmax) {
    double most = -INFINITY;
    for (Var v : s) most = std::fmax(most, at(v));
    Sum sum;
    for (Var& v : s) v = exp_less(v, most);
    for (Var v : s) sum.add(v);
    const Var total = sum.done();
    for (Var& v : s) v = quotient(v, total);
  } else if (p.c.score == kScoreSigmoid) {
    for (Var& v : s) v = sigmoid(v);
  }
}

static Truth naive(const Problem& p) {
  const Case& c = p.c;
  Truth truth;
  tape.clear();
  Leaves in;
  for (const auto& [key, v] : p.in) {
    in[key] = (Var)tape.value.size();
    for (double x : v) tape.node(x);
  }
  const Var query = in.at("query"), history = in.at("history"), a_q = in.at("a_q"), a_k = in.at("a_k"), a_p = in.at("a_p");
  std::vector<std::vector<Var>> rows;  // all that are input, user after user
  for (int u = 0; u < c.users; u++)
    for (int64_t l = 0; l < p.total(u); l++) {
      if (!p.is_input(u, l)) continue;
      std::vector<Var> z;
      for (int h = 0; h < c.units[0]; h++) {
        Sum sum;
        sum.add(in.at("bias0") + h);
        for (int d = 0; d < c.dim; d++) {
          const Var q = query + u * c.dim + d, k = history + (Var)p.row(u, l) * c.dim + d;
          const int w = h * c.dim + d;
          sum.add(a_q + w, q).add(a_k + w, k).add(a_p + w, q, at(k));
          tape.edges.push_back({k, at(a_p + w) * at(q)});
        }
        z.push_back(sum.done());
      }
      rows.push_back(z);
    }
  for (int i = 0; i < c.layers; i++) {
    for (auto& row : rows) {
      if (!i) break;
      std::vector<Var> z;
      Var weight = in.at(name("weight", i));
      const Var bias = in.at(name("bias", i));
      for (int h = 0; h < c.units[i]; h++) {
        Sum sum;
        sum.add(bias + h);
        for (Var a : row) sum.add(a, weight++);
        z.push_back(sum.done());
      }
      row = z;
    }
    naive_activation(p, i, in, rows, truth);
  }

  Numbers scores(p.rows, c.pads == kRagged ? kNaN : 0.0), pooled;
  std::vector<std::pair<Var, double>> loss;
  size_t next = 0;
  for (int u = 0; u < c.users; u++) {
    std::vector<Var> s;
    std::vector<int64_t> l_of;
    for (int64_t l = 0; l < p.total(u); l++) {
      if (c.pads == kRagged) scores[p.row(u, l)] = 0;
      if (!p.is_input(u, l)) continue;
      const auto& a = rows[next++];
      if (!p.valid(u, l) && !p.over_nothing(u)) continue;
      Sum sum;
      sum.add(in.at("score_bias"));
      for (size_t h = 0; h < a.size(); h++) sum.add(a[h], in.at("score_weight") + (Var)h);
      s.push_back(sum.done());
      l_of.push_back(l);
    }
    naive_weights(p, u, s);
    const int64_t n = c.pooling == kSum ? 1 : c.pooling == kMean ? p.total(u) : p.count(u);
    for (int64_t d = 0; d < c.dim; d++) {
      Sum sum;
      for (size_t j = 0; j < s.size(); j++) sum.add(s[j], history + (Var)(p.row(u, l_of[j]) * c.dim + d), 1.0 / std::max<int64_t>(n, 1));
      const Var v = sum.done();
      pooled.push_back(at(v));
      if (c.pooled_grad) loss.push_back({v, p.grad_pooled[u * c.dim + d]});
    }
    for (size_t j = 0; j < s.size(); j++) {
      scores[p.row(u, l_of[j])] = at(s[j]);
      if (c.score_grad) loss.push_back({s[j], p.grad_scores[(int64_t)u * c.length + l_of[j]]});
    }
  }
  truth.put("pooled", pooled), truth.put("scores", scores);
  Sum sum;
  for (auto [v, g] : loss) sum.add(v, g);
  sum.done();
  tape.differentiate();
  for (const auto& [key, v] : p.in) {
    const auto from = in.at(key);
    truth.put("d " + key, Numbers(tape.grad.begin() + from, tape.grad.begin() + from + v.size()));
    double& most = truth.scale["d " + key];
    for (size_t i = 0; i < v.size(); i++) most = std::fmax(most, tape.mass[from + i]);
  }
  Numbers& d_history = truth.value["d history"];
  if (c.pads == kRagged)  // rows of nobody are not written
    for (size_t i = 0; i < d_history.size(); i++)
      if (std::isnan(scores[i / c.dim])) d_history[i] = kNaN;
  return truth;
}

// ---------------------------------------------------------------- the kernel
// Arrays of NaN that end where an unreadable page begins; the bytes in front of them have to stay as they are.
class Memory {
  struct Piece { char* map; size_t pages; char* array; };
  std::vector<Piece> pieces;
  static std::map<size_t, std::vector<char*>> unused;  // by pages
  static constexpr size_t kPage = 4096, kFront = 128;
  static constexpr char kGuard = 0x5a;

 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() {
    for (const Piece& p : pieces) unused[p.pages].push_back(p.map);
  }
  template <class T> T* take(size_t n) {
    const size_t bytes = n * sizeof(T), pages = (bytes + kFront + kPage - 1) / kPage;
    std::vector<char*>& fit = unused[pages];
    if (fit.empty()) {
      void* map = mmap(nullptr, (pages + 1) * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (map == MAP_FAILED || mprotect((char*)map + pages * kPage, kPage, PROT_NONE)) perror("mmap"), exit(1);
      fit.push_back((char*)map);
    }
    char *map = fit.back(), *array = map + pages * kPage - bytes;
    fit.pop_back();
    pieces.push_back({map, pages, array});
    memset(array - kFront, kGuard, kFront), memset(array, 0xff, bytes);
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
      if (std::count(p.array - kFront, p.array, kGuard) != (std::ptrdiff_t)kFront) return false;
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
  Numbers inverse[kMaxLayers], gate_inverse[kMaxLayers], by_scale[kMaxLayers];  // 1 / sqrt(variance + eps); d gate_scale / d norm_scale

  T* copy(const std::string& key) { return p.in.count(key) ? memory.copy<T>(p.in.at(key)) : nullptr; }
  void put(const std::string& key, const T* v, int64_t n) { results[key].assign(v, v + n); }

  void segments() {
    const int gap = c.strided ? 3 : 0;
    u.history = memory.spread<T>(p.in.at("history"), c.dim, gap);
    u.query = memory.spread<T>(p.in.at("query"), c.dim, gap);
    u.users = c.users, u.length = c.length, u.dim = c.dim;
    u.row_stride = u.query_stride = c.dim + gap;
    u.user_stride = c.length * u.row_stride;
    u.pads_are_input = c.batch != 0;
    if (!p.mask.empty()) u.mask = memory.copy<bool>(p.mask);
    if (!p.lengths.empty()) u.lengths = memory.copy<int64_t>(p.lengths);
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
    T *mean = memory.take<T>(units), *m2 = memory.take<T>(units), *kept = nullptr;
    if (c.keep >> i & 1) layer.kept = kept = memory.take<T>(panels * units);
    double count = 0;
    const Layer<T> with_kept = layer;
    layer.kept = nullptr;  // it is being made
    kernels.moments(u, i, {&count, mean, m2, kept}, parallel);
    layer = with_kept;
    put(name("mean", i), mean, units), put(name("m2_", i), m2, units);
    const bool norm = layer.norm_scale, gated = layer.gate_scale;
    T *scale = norm ? copy(name("norm_scale", i)) : nullptr, *gate = gated ? copy(name("gate_scale", i)) : nullptr;
    T* response = memory.copy<T>(Numbers(8 * units));
    for (int h = 0; h < units; h++) {
      const double variance = m2[h] / count, by = 1 / std::sqrt(variance + kNormEps);
      inverse[i].push_back(by);
      const double n_scale = norm ? scale[h] * by : 1, scale_by_variance = norm ? -0.5 * n_scale * by * by : 0;
      const double gate_by = 1 / std::sqrt(n_scale * n_scale * variance + kNormEps), weight = gated ? gate[h] : 0;
      gate_inverse[i].push_back(n_scale * gate_by);
      by_scale[i].push_back(weight * kNormEps * gate_by * gate_by * gate_by);
      const double g_scale = weight * n_scale * gate_by;
      const double gate_by_variance = -0.5 * g_scale * n_scale * n_scale * gate_by * gate_by + by_scale[i][h] * scale_by_variance;
      const double rows[8] = {0, norm ? n_scale : 0, 0, g_scale, -2 * scale_by_variance, 0, -2 * gate_by_variance, 0};
      for (int r = 0; r < 8; r++) response[r * units + h] = (T)(rows[r] / count);
      if (norm) scale[h] = (T)n_scale;
      if (gated) gate[h] = (T)g_scale;
    }
    layer.center = mean, layer.norm_scale = scale, layer.gate_scale = gate, layer.response = response;
  }

  void forward() {
    ForwardOut<T> out{memory.take<T>((int64_t)c.users * c.dim), memory.take<T>(p.rows)};
    kernels.forward(u, out, parallel);
    put("pooled", out.pooled, (int64_t)c.users * c.dim), put("scores", out.scores, p.rows);
    scores = out.scores;
  }
  const T* scores = nullptr;

  // One pass; returns what the next one needs
  BackwardPass<T> pass(int want, int from, int to, const BackwardPass<T>* before, const T* grad_pooled, const T* grad_scores) {
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
    if (b.first && want & kWeights) b.d_score_weight = give("d score_weight", c.units[c.layers - 1]), b.d_score_bias = give("d score_bias", 1);
    for (int i = from; i >= std::max(to, 0); i--) {
      if (!u.layer[i].sums) b.sums[i] = give(name("sums", i), kSums * c.units[i]);
      if (i == to || !(want & kWeights)) continue;
      if (i) b.d_weight[i] = give(name("d weight", i), (int64_t)c.units[i] * c.units[i - 1]);
      b.d_bias[i] = give(name("d bias", i), c.units[i]);
    }
    if (to < 0) {
      const int64_t n = (int64_t)c.units[0] * c.dim;
      if (want & kWeights) b.d_a_q = give("d a_q", n), b.d_a_k = give("d a_k", n), b.d_a_p = give("d a_p", n);
      if (want & kQuery) b.d_query = give("d query", (int64_t)c.users * c.dim);
      if (want & kHistory) b.d_history = give("d history", p.rows * c.dim);
    }
    kernels.backward(u, b, parallel);
    for (const auto& put_it : later) put_it();
    for (int i = from; i >= 0; i--)
      if (b.sums[i]) u.layer[i].sums = b.sums[i], add_affine(i, b.sums[i]);
    return b;
  }

  // The sums as gradients of what the problem calls norm_scale, norm_shift, gate_scale, gate_shift and slope
  void add_affine(int i, const T* sums) {
    const int units = c.units[i];
    const char* keys[kSums] = {"norm_scale", "norm_shift", "gate_scale", "gate_shift", "slope"};
    for (int k = 0; k < kSums; k++) {
      if (!p.in.count(name(keys[k], i))) continue;
      std::vector<T>& d = results["d " + name(keys[k], i)];
      d.assign(sums + k * units, sums + (k + 1) * units);
      for (int h = 0; h < units && c.has_batch(i); h++) {
        if (k == 0) d[h] = (T)((d[h] + sums[2 * units + h] * by_scale[i][h]) * inverse[i][h]);
        if (k == 2) d[h] = (T)(d[h] * gate_inverse[i][h]);
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
  Run(const Problem& problem, const Kernels<T>& k, ParallelFor run, int want = kAll) : p(problem), c(p.c), kernels(k), parallel(run) {
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

static std::string numbers(const char* format, double a, double b, double c) {
  char text[200];
  snprintf(text, sizeof text, format, a, b, c);
  return text;
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
      wrong.push_back(key + "[" + std::to_string(i) + "]" + numbers(": got %.9g, expected %.9g, allowed error %.2g", x, want[i], kAllowed<T> * unit));
      break;
    }
  }
}

// The bits of all results that both have; any NaN is like any other
template <class T> void compare_bits(const char* what, const Results<T>& got, const Results<T>& first, std::vector<std::string>& wrong) {
  for (const auto& [key, v] : got) {
    const std::vector<T>& w = first.at(key);
    if (memcmp(v.data(), w.data(), v.size() * sizeof(T)) == 0) continue;
    for (size_t i = 0; i < v.size(); i++)
      if (memcmp(&v[i], &w[i], sizeof(T)) && !(std::isnan(v[i]) && std::isnan(w[i]))) {
        wrong.push_back(what + (" changes the bits of " + key) + "[" + std::to_string(i) + "]" + numbers(": %.9g, was %.9g, differs by %.2g", v[i], w[i], v[i] - w[i]));
        break;
      }
  }
}

template <class T> bool passes(const Problem& p, const Truth& truth, const char* set, const Kernels<T>& kernels) {
  running = std::string(set) + (sizeof(T) == 4 ? " float  " : " double ") + p.c.text();
  std::vector<std::string> wrong;
  const Run<T> first(p, kernels, in_order);
  bool intact = first.intact();
  compare(first.results, truth, wrong);
  auto again = [&](const char* what, ParallelFor parallel, int want) {
    const Run<T> run(p, kernels, parallel, want);
    intact = intact && run.intact();
    compare_bits(what, run.results, first.results, wrong);
  };
  again("working on threads", on_threads, kAll);
  again("reverse order, asking for weights alone", in_reverse, kWeights);
  again("reverse order, asking for history alone", in_reverse, kHistory);
  Problem nan = p;
  for (const char* key : {"history", "query"}) std::fill(nan.in[key].begin(), nan.in[key].end(), kNaN);
  Run<T>(nan, kernels, in_order);
  again("a call full of NaN before, asking for query alone,", in_order, kQuery);
  if (!intact) wrong.push_back("wrote in front of an array");
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
  const std::string line = "FAIL " + running + (number == SIGSEGV ? ": reached beyond an array\n" : ": a fault or an unknown instruction\n");
  _exit(write(1, line.data(), line.size()) < 0 ? 2 : 1);
}

int main(int argc, char** argv) {
  std::vector<const InstructionSet*> sets;
  bool known = argc == 1;
  for (const InstructionSet* set : {avx512(), avx2(), portable()}) {
    if (!set || (argc > 1 && strcmp(argv[1], set->name))) continue;
    known = true;
    if (runs_here(set->name)) sets.push_back(set);
  }
  if (!known || argc > 2) return fprintf(stderr, "usage: kernel_test [avx512|avx2|portable]\n"), 2;
  if (sets.empty()) return fprintf(stderr, "this processor has no %s\n", argv[1]), 3;
  for (int number : {SIGSEGV, SIGBUS, SIGILL}) signal(number, on_signal);
  mallopt(M_PERTURB, 0x80);  // fresh scratch memory holds huge numbers
  int passed = 0, failed = 0;
  uint64_t seed = 0;
  for (const Case& c : all_cases()) {
    Problem p;
    Truth truth;
    do {
      p = draw(c, ++seed);
      truth = naive(p);
    } while (truth.nearest_kink < 2e-6);  // rounding must not decide on which side
    for (const InstructionSet* set : sets) {
      for (bool good : {passes(p, truth, set->name, set->f32), passes(p, truth, set->name, set->f64)}) ++(good ? passed : failed);
    }
  }
  for (const InstructionSet* set : sets) printf("%s ", set->name);
  printf("| largest error %.0f u S (float), %.0f u S (double); allowed %.0f and %.0f\n", largest[0], largest[1], kAllowed<float>, kAllowed<double>);
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

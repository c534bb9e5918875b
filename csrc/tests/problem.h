// The cases of the kernel's test, and the numbers of each: drawn, but always the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "../unit.h"

using namespace din_fast;
using Numbers = std::vector<double>;
using Tensors = std::map<std::string, Numbers>;

constexpr double kEps = 1e-3, kNormEps = 1e-5, kNaN = __builtin_nan("");

static std::string name(const char* base, int layer) { return base + std::to_string(layer); }

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
  bool valid_rows;  // batch statistics over the valid positions only
  int group;        // so many users after each other have one history: they are the candidates of one user; 0 or 1: none

  bool has_batch(int layer) const { return batch >> layer & 1; }
  int64_t products() const {  // multiply-adds of a forward pass
    int64_t n = (int64_t)dim * units[0];
    for (int i = 1; i < layers; i++) n += (int64_t)units[i - 1] * units[i];
    return n * users * length;
  }
  std::string text() const {
    static const char* activations[] = {"identity", "relu", "sigmoid", "tanh", "prelu", "dice_row", "dice_batch"};
    static const char *modes[] = {"plain", "centred", "full"};
    static const char* pad_kinds[] = {"", " lengths", " mask", " mask+lengths", " ragged"};
    static const char *empties[] = {"zeros", "uniform", "nan"}, *poolings[] = {"sum", "mean", "mean_valid"};
    std::string s = std::string(activations[activation]) + " " + modes[mode] + " units";
    for (int i = 0; i < layers; i++) s += " " + std::to_string(units[i]);
    s += " dim " + std::to_string(dim) + " length " + std::to_string(length) + " users " + std::to_string(users);
    s += pad_kinds[pads];
    if (group > 1) s += " in groups of " + std::to_string(group);
    if (batch && valid_rows) s += " valid rows";
    s += " batch " + std::to_string(batch) + " keep " + std::to_string(keep) + " " + poolings[pooling];
    s += softmax ? std::string(" softmax ") + empties[empty] : score ? " sigmoid" : "";
    return s + (strided ? " strided" : "") + (pooled_grad ? "" : " no grad_pooled") + (score_grad ? " grad_scores" : "");
  }
};

// Every activation in every mode; the rest is drawn, always the same.
static std::vector<Case> all_cases() {
  std::vector<Case> cases;
  Random r{1};
  for (int i = 0; i < 3 * kActivations * 6; i++) {
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
    const bool enough = c.length * ((c.users + 3) / 4) > 6;  // rows for statistics, where other users may have none
    if (c.mode != kPlain && enough && r.below(3)) c.batch = 1 + r.below((1 << c.layers) - 1);
    if (c.activation == kIdentity) c.batch &= -c.batch;  // a second norm would take the scale of the first out again
    c.keep = c.batch & r.below(8);
    c.softmax = r.below(2);
    c.empty = c.softmax ? r.below(3) : 0;
    c.score = c.softmax ? 0 : r.below(2);
    c.pooling = r.below(3);
    c.strided = c.pads != kRagged && r.below(3) == 0;
    c.score_grad = c.pads != kRagged && r.below(2);
    c.pooled_grad = !c.score_grad || r.below(4);
    c.valid_rows = c.batch && !(c.softmax && c.empty != kZeros) && c.length * ((c.users + 3) / 4) > 30 && r.below(2);
    c.group = c.pads == kRagged || r.below(3) ? 1 : c.users < 19 ? c.users : c.users == 19 ? 19 : 7;
    cases.push_back(c);
  }
  // histories whose sums are flushed on the way
  for (int batch : {0, 3})
    cases.push_back({batch ? kDiceBatch : kPrelu, kFull, 2, {3, 2}, 3, 4500, 1, kMask,  //
                     batch, batch & 1, kScoreNone, kZeros, kMean, 1, false, true, true});
  return cases;
}

// ---------------------------------------------------------------- one problem: a case with its numbers
struct Problem {
  Case c;
  // All that has a gradient. In layers with batch statistics norm_scale and gate_scale are the norms' weights.
  Tensors in;
  Tensors center;  // of the layers without batch statistics
  Numbers grad_pooled, grad_scores;
  std::vector<char> mask;
  std::vector<int64_t> starts, lengths;  // starts in rows
  int64_t rows = 0;                      // of the history

  int64_t total(int user) const { return c.pads == kRagged ? lengths[user] : c.length; }
  int64_t row(int user, int64_t l) const { return c.pads == kRagged ? starts[user] + l : (int64_t)user * c.length + l; }
  bool valid(int user, int64_t l) const {
    return (lengths.empty() || l < lengths[user]) && (mask.empty() || mask[row(user, l)]);
  }
  int64_t count(int user) const {
    int64_t n = 0;
    for (int64_t l = 0; l < total(user); l++) n += valid(user, l);
    return n;
  }
  // a softmax over nothing that is not zeros: its pads are pooled
  bool over_nothing(int user) const { return c.softmax && c.empty != kZeros && count(user) == 0; }
  bool is_input(int user, int64_t l) const { return (c.batch && !c.valid_rows) || valid(user, l) || over_nothing(user); }
  // of several candidates' copies of something of a user, n numbers each, the first
  template <class V> V of_users(const V& v, int64_t n) const {
    V first;
    for (int u = 0; u < c.users; u += std::max(1, c.group)) first.insert(first.end(), v.begin() + u * n, v.begin() + (u + 1) * n);
    return first;
  }
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
  for (int u = 0; u < c.users && c.group > 1; u++) {  // all of a group have the pads of its first
    const int first = u / c.group * c.group;
    if (!p.lengths.empty()) p.lengths[u] = p.lengths[first];
    if (!p.mask.empty()) std::copy_n(p.mask.begin() + first * c.length, c.length, p.mask.begin() + u * c.length);
  }
  Tensors& t = p.in;
  t["history"] = Numbers(p.rows * c.dim, kNaN);
  for (int u = 0; u < c.users; u++)
    for (int64_t l = 0; l < p.total(u); l++)
      for (int d = 0; d < c.dim; d++)
        if (const double x = r.number(1.5); p.is_input(u, l)) t["history"][p.row(u, l) * c.dim + d] = x;
  for (int u = 0; u < c.users && c.group > 1; u++) {
    Numbers& h = t["history"];
    std::copy_n(h.begin() + (int64_t)(u / c.group * c.group) * c.length * c.dim, c.length * c.dim, h.begin() + (int64_t)u * c.length * c.dim);
  }
  t["query"] = r.numbers((int64_t)c.users * c.dim, 1.5);
  for (const char* a : {"a_q", "a_k", "a_p"}) t[a] = r.numbers((int64_t)c.units[0] * c.dim, 1.2 / std::sqrt(c.dim));
  for (int i = 0; i < c.layers; i++) {
    const int units = c.units[i];
    if (i) t[name("weight", i)] = r.numbers((int64_t)units * c.units[i - 1], 2 / std::sqrt(c.units[i - 1]));
    t[name("bias", i)] = r.numbers(units, 0.5);
    if (c.mode != kPlain) p.center[name("center", i)] = r.numbers(units, 0.5);
    if (c.mode == kFull) {
      t[name("norm_scale", i)] = r.numbers(units, 0.5, 1);
      t[name("norm_shift", i)] = r.numbers(units, 0.5);
    }
    if (c.activation == kDiceBatch) {
      t[name("gate_scale", i)] = r.numbers(units, 0.5, 1);
      t[name("gate_shift", i)] = r.numbers(units, 0.5);
    }
    if (c.activation >= kPrelu) t[name("slope", i)] = r.numbers(units, 0.5, 0.2);
  }
  t["score_weight"] = r.numbers(c.units[c.layers - 1], 2 / std::sqrt(c.units[c.layers - 1]));
  t["score_bias"] = r.numbers(1, 0.5);
  p.grad_pooled = r.numbers((int64_t)c.users * c.dim, 1);
  p.grad_scores = r.numbers((int64_t)c.users * c.length, 1);
  return p;
}

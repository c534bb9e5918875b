// The activation unit as csrc/unit.h says, in loops over doubles that are recorded on a tape, which then differentiates
// them: no formula of a gradient, of the batch statistics' answer included, is shared with the kernel.
#pragma once

#include "problem.h"

// ---------------------------------------------------------------- the tape
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
static Var tanh(Var a) {
  const double t = std::tanh(at(a));
  return apply(t, a, 1 - t * t);
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

// ---------------------------------------------------------------- the unit
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
using Rows = std::vector<std::vector<Var>>;  // of all positions that are input, user after user

static Rows first_layer(const Problem& p, const Leaves& in) {
  const Case& c = p.c;
  const Var query = in.at("query"), history = in.at("history"), bias = in.at("bias0");
  Rows rows;
  for (int u = 0; u < c.users; u++)
    for (int64_t l = 0; l < p.total(u); l++) {
      if (!p.is_input(u, l)) continue;
      std::vector<Var> z;
      Var a_q = in.at("a_q"), a_k = in.at("a_k"), a_p = in.at("a_p");
      for (int h = 0; h < c.units[0]; h++) {
        Sum sum;
        sum.add(bias + h);
        for (int d = 0; d < c.dim; d++, a_q++, a_k++, a_p++) {
          const Var q = query + u * c.dim + d, k = history + (Var)p.row(u, l) * c.dim + d;
          sum.add(a_q, q).add(a_k, k).add(a_p, q, at(k));
          tape.edges.push_back({k, at(a_p) * at(q)});
        }
        z.push_back(sum.done());
      }
      rows.push_back(z);
    }
  return rows;
}

static void further_layer(const Case& c, int i, const Leaves& in, Rows& rows) {
  const Var bias = in.at(name("bias", i));
  for (std::vector<Var>& row : rows) {
    std::vector<Var> z;
    Var weight = in.at(name("weight", i));
    for (int h = 0; h < c.units[i]; h++) {
      Sum sum;
      sum.add(bias + h);
      for (Var a : row) sum.add(a, weight++);
      z.push_back(sum.done());
    }
    row = z;
  }
}

// One hidden layer: its z of all rows -> its activations, in place.
static void naive_activation(const Problem& p, int i, const Leaves& in, Rows& rows, Truth& truth) {
  const Case& c = p.c;
  const bool norm = c.mode == kFull, gated = c.activation == kDiceBatch;
  const int units = c.units[i];
  Rows x = rows;  // the gate's argument
  Numbers means, m2;
  for (int h = 0; h < units; h++) {
    Var center = c.mode == kPlain ? tape.node(0) : c.has_batch(i) ? -1 : tape.node(p.center.at(name("center", i))[h]);
    Var scale = norm ? in.at(name("norm_scale", i)) + h : tape.node(1);
    Var gate_scale = gated ? in.at(name("gate_scale", i)) + h : -1;
    const Var shift = norm ? in.at(name("norm_shift", i)) + h : -1;
    const Var gate_shift = gated ? in.at(name("gate_shift", i)) + h : -1;
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
      if (c.activation == kRelu || c.activation == kPrelu)
        truth.nearest_kink = std::fmin(truth.nearest_kink, std::fabs(v));
      if (c.activation == kRelu && v <= 0) n[h] = tape.node(0);
      if (c.activation == kSigmoid) n[h] = sigmoid(n[h]);
      if (c.activation == kTanh) n[h] = tanh(n[h]);
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
    for (Var& v : s) v = tape.node(p.c.empty == kNan ? kNaN : 1.0 / p.total(user));
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
  Rows rows = first_layer(p, in);
  for (int i = 0; i < c.layers; i++) {
    if (i) further_layer(c, i, in, rows);
    naive_activation(p, i, in, rows, truth);
  }

  Numbers scores(p.rows, c.pads == kRagged ? kNaN : 0.0), pooled;
  std::vector<std::pair<Var, double>> loss;
  const Var history = in.at("history"), score_weight = in.at("score_weight"), score_bias = in.at("score_bias");
  auto next = rows.begin();
  for (int u = 0; u < c.users; u++) {
    std::vector<Var> s;
    std::vector<int64_t> l_of;
    for (int64_t l = 0; l < p.total(u); l++) {
      if (c.pads == kRagged) scores[p.row(u, l)] = 0;
      if (!p.is_input(u, l)) continue;
      const std::vector<Var>& a = *next++;
      if (!p.valid(u, l) && !p.over_nothing(u)) continue;
      Sum sum;
      sum.add(score_bias);
      for (size_t h = 0; h < a.size(); h++) sum.add(a[h], score_weight + (Var)h);
      s.push_back(sum.done());
      l_of.push_back(l);
    }
    naive_weights(p, u, s);
    const int64_t n = std::max<int64_t>(1, c.pooling == kSum ? 1 : c.pooling == kMean ? p.total(u) : p.count(u));
    for (int64_t d = 0; d < c.dim; d++) {
      Sum sum;
      for (size_t j = 0; j < s.size(); j++) sum.add(s[j], history + (Var)(p.row(u, l_of[j]) * c.dim + d), 1.0 / n);
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
  if (c.group > 1) {  // the candidates' sum
    const int64_t n = (int64_t)c.length * c.dim;
    Numbers sum = p.of_users(Numbers(d_history.size(), 0), n);
    for (size_t i = 0; i < d_history.size(); i++) sum[i / n / c.group * n + i % n] += d_history[i];
    d_history = sum;
    truth.scale["d history"] *= c.group;
  }
  if (c.pads == kRagged)  // rows of nobody are not written
    for (size_t i = 0; i < d_history.size(); i++)
      if (std::isnan(scores[i / c.dim])) d_history[i] = kNaN;
  return truth;
}

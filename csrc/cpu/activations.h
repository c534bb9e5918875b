// The activations, forward and backward, on panels of z. Included by kernel.h inside its namespace.

// How z reaches the activation: as it is (a gate may have its own scale and shift), centred (batch statistics, no norm),
// or centred and through the norm's scale and shift.
enum Mode { kPlain, kCentered, kFull, kModes };

// One layer's parameters, ready for the loops: the gate's scale and shift are multiplied by -log2(e).
template <class T> struct Params {
  int units;
  Mode mode;
  const T *center, *norm_scale, *norm_shift, *gate_scale, *gate_shift, *gate_raw, *slope;
  T row_eps;  // units * eps of row Dice
};

// The parameters of one hidden unit, broadcast to all lanes, and the activation's arithmetic.
template <class T, int A, int M> struct HiddenUnit {
  T center, norm_scale, norm_shift, gate_scale, gate_shift, slope;

  DIN_FAST_INLINE HiddenUnit(const Params<T>& p, int h) {
    if constexpr (M != kPlain) center = p.center[h];
    if constexpr (M == kFull) norm_scale = p.norm_scale[h], norm_shift = p.norm_shift[h];
    if constexpr (A == kDiceBatch) gate_scale = p.gate_scale[h], gate_shift = p.gate_shift[h];
    if constexpr (A == kPrelu || A == kDiceRow || A == kDiceBatch) slope = p.slope[h];
  }
  template <class V> DIN_FAST_INLINE V centered(V z) const {
    if constexpr (M == kPlain) return z;
    return z - center;
  }
  template <class V> DIN_FAST_INLINE V normed(V z) const {
    if constexpr (M == kFull) return centered(z) * norm_scale + norm_shift;
    return z;
  }
  // Dice's p; mean and inverse (times -log2 e) of the row are used by row Dice only
  template <class V> DIN_FAST_INLINE V gate(V z, V mean, V inverse) const {
    if constexpr (A == kDiceBatch) return sigmoid_<T>(centered(z) * gate_scale + gate_shift);
    return sigmoid_<T>((normed(z) - mean) * inverse);
  }
  // w times the activation
  template <class V> DIN_FAST_INLINE V weighted(T w, V z, V mean, V inverse) const {
    if constexpr (A == kDiceRow || A == kDiceBatch) return normed(z) * (gate(z, mean, inverse) * (w * (T(1) - slope)) + w * slope);
    return w * value(z, mean, inverse);
  }
  template <class V> DIN_FAST_INLINE V value(V z, V mean, V inverse) const {
    const V n = normed(z);
    if constexpr (A == kRelu) return n < V{} ? V{} : n;  // NaN stays NaN
    if constexpr (A == kSigmoid) return sigmoid_<T>(n * T(-kLog2e));
    if constexpr (A == kTanh) return tanh_<T>(n);
    if constexpr (A == kPrelu) return n > V{} ? n : n * slope;
    if constexpr (A == kDiceRow || A == kDiceBatch) return n * (gate(z, mean, inverse) * (T(1) - slope) + slope);
    return n;
  }
};

// Row Dice: mean and -log2(e) / sqrt(sum of squares + H eps) of every position, into rows [2][vectors][lanes]
template <class T, int A, int M>
static void row_statistics(const Params<T>& p, int vectors, const T* z, T* rows) {
  constexpr int W = kLanes<T>;
  const int H = p.units;
  for (int v = 0; v < vectors; v++) {
    const T* zv = z + (int64_t)v * H * W;
    Vec<T> sum = {}, squares = {};
    for (int h = 0; h < H; h++) sum += HiddenUnit<T, A, M>(p, h).normed(load(zv + h * W));
    const Vec<T> mean = sum / T(H);
    for (int h = 0; h < H; h++) {
      const Vec<T> d = HiddenUnit<T, A, M>(p, h).normed(load(zv + h * W)) - mean;
      squares += d * d;
    }
    store(rows + v * W, mean);
    store(rows + (vectors + v) * W, T(-kLog2e) / sqrt_<T>(squares + p.row_eps));
  }
}

// a[v][h] = activation(z[v][h])
template <class T, int A, int M>
static void activate(Ahead& ahead, const Params<T>& p, Vectors vectors, const T* z, T* rows, T* a) {
  constexpr int W = kLanes<T>;
  const int64_t stride = (int64_t)p.units * W;
  if constexpr (A == kDiceRow) row_statistics<T, A, M>(p, vectors.count, z, rows);
  for (int h = 0; h < p.units; h++) {
    const HiddenUnit<T, A, M> unit(p, h);
    ahead.go(kAheadUnit);
    each_vector<T>(vectors, [&](int v, auto zero) __attribute__((always_inline)) {
      using V = decltype(zero);
      V mean = zero, inverse = zero;
      if constexpr (A == kDiceRow) mean = load_as<V>(rows + v * W), inverse = load_as<V>(rows + (vectors.count + v) * W);
      store(a + v * stride + h * W, widen<T>(unit.value(load_as<V>(z + v * stride + h * W), mean, inverse)));
    });
  }
}

// score[v] = bias + sum_h w_h activation(z[v][h]), for N vectors at once, and where Half the lower half of one more
template <class T, int A, int M, int N, bool Half>
static void score_vectors(Ahead& ahead, const Params<T>& p, int vectors, const T* z, const T* rows, const T* w, T bias, T* score) {
  constexpr int W = kLanes<T>;
  const int64_t stride = (int64_t)p.units * W;
  using V = LowVec<T>;
  Vec<T> sum[N + 1], mean[N + 1] = {}, inverse[N + 1] = {};
  V low = splat_as<V>(bias), low_mean = {}, low_inverse = {};
#pragma GCC unroll 4
  for (int v = 0; v < N; v++) {
    sum[v] = splat(bias);
    if constexpr (A == kDiceRow) mean[v] = load(rows + v * W), inverse[v] = load(rows + (vectors + v) * W);
  }
  if constexpr (Half && A == kDiceRow) low_mean = load_as<V>(rows + N * W), low_inverse = load_as<V>(rows + (vectors + N) * W);
  for (int h = 0; h < p.units; h++) {
    const HiddenUnit<T, A, M> unit(p, h);
    ahead.go(kAheadUnit);
#pragma GCC unroll 4
    for (int v = 0; v < N; v++) sum[v] += unit.weighted(w[h], load(z + v * stride + h * W), mean[v], inverse[v]);
    if constexpr (Half) low += unit.weighted(w[h], load_as<V>(z + N * stride + h * W), low_mean, low_inverse);
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; v++) store(score + v * W, sum[v]);
  if constexpr (Half) store(score + N * W, widen<T>(low));
}
template <class T, int A, int M>
static void score(Ahead& ahead, const Params<T>& p, Vectors vectors, const T* z, T* rows, const T* w, T bias, T* out) {
  constexpr int W = kLanes<T>;
  constexpr bool kHalf = DIN_FAST_VECTOR_BYTES == 64;
  static constexpr decltype(&score_vectors<T, A, M, 1, false>) kRest[2][4] = {
      {nullptr, score_vectors<T, A, M, 1, false>, score_vectors<T, A, M, 2, false>, score_vectors<T, A, M, 3, false>},
      {score_vectors<T, A, M, 0, kHalf>, score_vectors<T, A, M, 1, kHalf>, score_vectors<T, A, M, 2, kHalf>, score_vectors<T, A, M, 3, kHalf>}};
  const int64_t stride = (int64_t)p.units * W;
  const int all = vectors.count;
  if constexpr (A == kDiceRow) row_statistics<T, A, M>(p, all, z, rows);
  int v = 0;
  for (; v + 4 <= vectors.whole(); v += 4) score_vectors<T, A, M, 4, false>(ahead, p, all, z + v * stride, rows + v * W, w, bias, out + v * W);
  if (v < all) kRest[vectors.half][vectors.whole() - v](ahead, p, all, z + v * stride, rows + v * W, w, bias, out + v * W);
}

// Zero in the lanes that hold no position that counts.
template <class T> struct Counted {
  const T* each;
  T tail[kLanes<T>];
  int last;
  DIN_FAST_INLINE Counted(const T* counted, int n, int vectors) : each(counted), last(vectors - 1) {
    store(tail, first_lanes<T>(n - (vectors - 1) * kLanes<T>));
  }
  template <class V> DIN_FAST_INLINE V only(int v, V x) const {
    if (each) return where_one(load_as<V>(each + v * kLanes<T>), x);
    return v == last ? where_one(load_as<V>(tail), x) : x;
  }
};

// What the backward of an activation reads and writes; null pointers are work that is not wanted.
template <class T> struct ActivationBackward {
  Vectors vectors;
  int n;                 // positions in them
  const T* counted;      // [v][lane] 1 where a position counts, else 0, or null where all n do
  const T* z;
  const T* da;           // [v][h] gradient of the activation, or, for the last layer, [v] gradient of the score
  const T* score_weight; // last layer: da = score_weight[h] * d score
  T* dz;                 // [v][h]
  const T *e0, *e1;      // dz -= e0 + e1 (z - center): the answer of batch statistics, or null
  T* dz_sum;             // [h][lane], added to
  T* a;                  // [v][h], the activation once more, for the next layer's weight gradient
  T* sums;               // [kSums][h][lane], added to
  T* d_score_weight;     // [h][lane], added to
  T* scratch;            // row Dice: [4 + h][vectors][lanes]
};
enum What { kTakeSums = 1, kWriteDz = 2 };

template <class T> DIN_FAST_INLINE void add_to(T* p, Vec<T> v) { store(p, load(p) + v); }

// The gradient through n and through the gate of one position: da is without the factor `scale` of the last layer.
//   y = n f, f = slope + (1 - slope) p:    dn = da f,   dx = da n (1 - slope) p (1 - p),   d slope = da n (1 - p)
// Row Dice's x depends on all n of the row: its dn is finished in a second sweep.
template <class T, int A, int M, bool Last, int Does>
static void activation_backward(Ahead& ahead, const Params<T>& p, const ActivationBackward<T>& b) {
  constexpr int W = kLanes<T>;
  constexpr bool kDice = A == kDiceRow || A == kDiceBatch, kSum = Does & kTakeSums, kWrite = Does & kWriteDz;
  constexpr bool kSecondSweep = A == kDiceRow;
  const int H = p.units, vectors = b.vectors.count;
  const int64_t stride = (int64_t)H * W;
  const Counted<T> counted(b.counted, b.n, vectors);
  T *rows = b.scratch, *row_dx = rows + 2 * vectors * W;  // row Dice: row_dx [h][v], then sum dx and sum dx x [v]
  T *row_sum = row_dx + (int64_t)H * vectors * W, *row_dot = row_sum + vectors * W;
  if constexpr (A == kDiceRow) {
    row_statistics<T, A, M>(p, vectors, b.z, rows);
    for (int i = 0; i < 2 * vectors * W; i++) row_sum[i] = 0;
  }
  for (int h = 0; h < H; h++) {
    const HiddenUnit<T, A, M> unit(p, h);
    const T scale = Last ? b.score_weight[h] : T(1), slope = kDice || A == kPrelu ? unit.slope : T(0), open = T(1) - slope;
    const T to_dz = M == kFull ? scale * unit.norm_scale : scale, gate_to_dz = A == kDiceBatch ? scale * open * p.gate_raw[h] : T(0);
    const T open_dz = open * to_dz, slope_dz = slope * to_dz;
    const T e0 = b.e0 ? b.e0[h] : T(0), e1 = b.e0 ? b.e1[h] : T(0);
    Vec<T> s_norm_z = {}, s_norm = {}, s_gate_z = {}, s_gate = {}, s_slope = {}, s_value = {}, s_dz = {};
    ahead.go(kAheadUnit);
    each_vector<T>(kSecondSweep ? Vectors{vectors, false} : b.vectors, [&](int v, auto zero) __attribute__((always_inline)) {
      using V = decltype(zero);
      const int64_t at = v * stride + h * W;
      const V z = load_as<V>(b.z + at), n = unit.normed(z), zc = unit.centered(z), da = load_as<V>(b.da + (Last ? v * W : at));
      V value = n, dn = da, dz = {};
      if constexpr (A == kDiceBatch) {
        const V gate = unit.gate(z, z, z), shut = T(1) - gate, t = da * n, d_slope = t * shut, dx = d_slope * gate;
        if constexpr (kSum) {
          s_slope += widen<T>(d_slope);
          s_gate += widen<T>(dx);  // times 1 - slope, below
          s_gate_z += widen<T>(dx * zc);
          if constexpr (Last) s_value += widen<T>(t);  // sum da y = sum da n - (1 - slope) sum da n (1 - p)
        }
        if constexpr (M == kFull) {
          dn = da * (gate * open + slope);
          dz = dn * to_dz + dx * gate_to_dz;
        } else {
          dz = da * (gate * open_dz + slope_dz) + dx * gate_to_dz;
        }
        if constexpr (!Last) value = n * (gate * open + slope);
      } else {
        if constexpr (A == kRelu) {
          value = n < V{} ? V{} : n;
          dn = n > V{} ? da : V{};
        } else if constexpr (A == kSigmoid) {
          value = sigmoid_<T>(n * T(-kLog2e));
          dn = da * value * (T(1) - value);
        } else if constexpr (A == kTanh) {
          value = tanh_<T>(n);
          dn = da * (T(1) - value * value);
        } else if constexpr (A == kPrelu) {
          value = n > V{} ? n : n * slope;
          dn = n > V{} ? da : da * slope;
          s_slope += widen<T>(n > V{} ? V{} : da * n);
        } else if constexpr (A == kDiceRow) {
          const V mean = load_as<V>(rows + v * W), inverse = load_as<V>(rows + (vectors + v) * W);
          const V gate = unit.gate(z, mean, inverse), factor = gate * open + slope, d_slope = da * n * (T(1) - gate);
          const V dx = d_slope * gate * (open * scale);
          value = n * factor;
          dn = da * factor;
          s_slope += widen<T>(d_slope);
          store(row_dx + ((int64_t)h * vectors + v) * W, widen<T>(dx));
          add_to<T>(row_sum + v * W, widen<T>(dx));
          add_to<T>(row_dot + v * W, widen<T>(dx * ((n - mean) * inverse)));  // times -log2 e
        }
        if constexpr (Last && kSum) s_value += widen<T>(da * value);
        dz = dn * (kSecondSweep ? scale : to_dz);
      }
      if constexpr (M == kFull && kSum && !kSecondSweep) s_norm_z += widen<T>(dn * zc), s_norm += widen<T>(dn);
      if constexpr (!Last)
        if (b.a) store(b.a + at, widen<T>(value));
      if constexpr (kWrite || kSecondSweep) {
        if constexpr (Last && !kSecondSweep) {
          dz = counted.only(v, dz - (zc * e1 + e0));
        }
        s_dz += widen<T>(dz);
        store(b.dz + at, widen<T>(dz));
      }
    });
    if constexpr (kSum) {
      if (b.sums) {
        T* s = b.sums + h * W;
        if constexpr (M == kFull && !kSecondSweep) add_to<T>(s, s_norm_z * scale), add_to<T>(s + stride, s_norm * scale);
        if constexpr (A == kDiceBatch) add_to<T>(s + 2 * stride, s_gate_z * (open * scale)), add_to<T>(s + 3 * stride, s_gate * (open * scale));
        if constexpr (A == kPrelu || kDice) add_to<T>(s + 4 * stride, s_slope * scale);
      }
      if constexpr (Last)
        if (b.d_score_weight) add_to<T>(b.d_score_weight + h * W, A == kDiceBatch ? s_value - s_slope * open : s_value);
    }
    if constexpr (kWrite && !kSecondSweep)
      if (b.dz_sum) add_to<T>(b.dz_sum + h * W, s_dz);
  }
  if constexpr (kSecondSweep) {
    // x_h = (n_h - mean) / sqrt(sum (n - mean)^2 + H eps):  dn_h += inverse (dx_h - mean dx - x_h sum dx x)
    for (int h = 0; h < H; h++) {
      const HiddenUnit<T, A, M> unit(p, h);
      const T e0 = b.e0 ? b.e0[h] : T(0), e1 = b.e0 ? b.e1[h] : T(0);
      Vec<T> s_norm_z = {}, s_norm = {}, s_dz = {};
      for (int v = 0; v < vectors; v++) {
        const int64_t at = v * stride + h * W;
        const Vec<T> z = load(b.z + at), zc = unit.centered(z), inverse = load(rows + (vectors + v) * W) * T(-1 / kLog2e);
        const Vec<T> x = (unit.normed(z) - load(rows + v * W)) * inverse;
        const Vec<T> dx = load(row_dx + ((int64_t)h * vectors + v) * W);
        Vec<T> dn = load(b.dz + at);
        dn += inverse * (dx - load(row_sum + v * W) * T(1.0 / H) - x * load(row_dot + v * W) * T(-1 / kLog2e));
        if constexpr (M == kFull) {
          s_norm_z += dn * zc;
          s_norm += dn;
          dn *= unit.norm_scale;
        }
        if constexpr (Last) {
          dn = counted.only(v, dn - (zc * e1 + e0));
        }
        s_dz += dn;
        store(b.dz + at, dn);
      }
      if constexpr (M == kFull && kSum)
        if (b.sums) add_to<T>(b.sums + h * W, s_norm_z), add_to<T>(b.sums + h * W + stride, s_norm);
      if constexpr (kWrite)
        if (b.dz_sum) add_to<T>(b.dz_sum + h * W, s_dz);
    }
  }
}

// ---- choosing the instantiation at run time
template <class T> struct ActivationTable {
  void (*activate)(Ahead&, const Params<T>&, Vectors, const T*, T*, T*);
  void (*score)(Ahead&, const Params<T>&, Vectors, const T*, T*, const T*, T, T*);
  void (*backward)(Ahead&, const Params<T>&, const ActivationBackward<T>&);
  void (*backward_last[4])(Ahead&, const Params<T>&, const ActivationBackward<T>&);  // by What
};
template <class T, int A, int M> constexpr ActivationTable<T> activation_entry() {
  return {activate<T, A, M>,
          score<T, A, M>,
          activation_backward<T, A, M, false, kTakeSums | kWriteDz>,
          {nullptr, activation_backward<T, A, M, true, kTakeSums>, activation_backward<T, A, M, true, kWriteDz>,
           activation_backward<T, A, M, true, kTakeSums | kWriteDz>}};
}
template <class T, int A> struct ActivationModes {
  static constexpr ActivationTable<T> table[kModes] = {
      activation_entry<T, A, kPlain>(), activation_entry<T, A, kCentered>(), activation_entry<T, A, kFull>()};
};
template <class T> static const ActivationTable<T>& activation_table(int activation, Mode mode) {
  switch (activation) {
    case kRelu: return ActivationModes<T, kRelu>::table[mode];
    case kSigmoid: return ActivationModes<T, kSigmoid>::table[mode];
    case kTanh: return ActivationModes<T, kTanh>::table[mode];
    case kPrelu: return ActivationModes<T, kPrelu>::table[mode];
    case kDiceRow: return ActivationModes<T, kDiceRow>::table[mode];
    case kDiceBatch: return ActivationModes<T, kDiceBatch>::table[mode];
    default: return ActivationModes<T, kIdentity>::table[mode];
  }
}

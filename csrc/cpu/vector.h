// Vectors of one instruction set, in GCC's vector extensions: no intrinsics, so that one source serves all.
// Included by kernel.h inside its namespace; must not pull in any header with inline functions.

#define DIN_FAST_INLINE inline __attribute__((always_inline))

template <class T> struct Vector;
template <> struct Vector<float> {
  typedef float V __attribute__((vector_size(DIN_FAST_VECTOR_BYTES)));
  typedef float Low __attribute__((vector_size(DIN_FAST_VECTOR_BYTES / 2)));
  static constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  static constexpr int kMantissa = 23;
  static constexpr float kLargest = 126.f;
};
template <> struct Vector<double> {
  typedef double V __attribute__((vector_size(DIN_FAST_VECTOR_BYTES)));
  typedef double Low __attribute__((vector_size(DIN_FAST_VECTOR_BYTES / 2)));
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr double kLargest = 1022.0;
};
template <class T> using Vec = typename Vector<T>::V;
template <class T> using LowVec = typename Vector<T>::Low;  // its lower half
template <class T> constexpr int kLanes = DIN_FAST_VECTOR_BYTES / sizeof(T);

// The vectors of a block of positions. Where `half`, the last holds positions in its lower half only, and its upper half is
// zero: with 512-bit vectors in two halves (Zen 4) that half costs time of its own. Narrower vectors are not cut.
struct Vectors {
  int count;
  bool half;
  int whole() const { return count - half; }
};
template <class T> DIN_FAST_INLINE Vectors vectors_of(int64_t positions) {
  constexpr int W = kLanes<T>;
  const int count = (int)((positions + W - 1) / W);
  return {count, DIN_FAST_VECTOR_BYTES == 64 && count * W - positions >= W / 2};
}

constexpr double kLog2e = 1.4426950408889634;

template <class T> DIN_FAST_INLINE Vec<T> load(const T* p) { Vec<T> v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <class T> DIN_FAST_INLINE void store(T* p, Vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class V, class T> DIN_FAST_INLINE V load_as(const T* p) { V v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <class V, class T> DIN_FAST_INLINE V splat_as(T x) { return x - V{}; }
template <class T> DIN_FAST_INLINE Vec<T> splat(T x) { return splat_as<Vec<T>>(x); }
template <class T> DIN_FAST_INLINE Vec<T> widen(Vec<T> v) { return v; }
#if DIN_FAST_VECTOR_BYTES == 64
template <class T> DIN_FAST_INLINE Vec<T> widen(LowVec<T> v) {  // zeros above
  if constexpr (sizeof(T) == 4) return __builtin_shufflevector(v, LowVec<T>{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  else return __builtin_shufflevector(v, LowVec<T>{}, 0, 1, 2, 3, 4, 5, 6, 7);
}
#endif
// f(v, V{}) for each vector, V the type to work on it with
template <class T, class F> DIN_FAST_INLINE void each_vector(Vectors vectors, const F& f) {
  const int whole = vectors.whole();
#pragma GCC unroll 4
  for (int v = 0; v < whole; v++) f(v, Vec<T>{});
  if constexpr (DIN_FAST_VECTOR_BYTES == 64)
    if (vectors.half) f(whole, LowVec<T>{});
}
template <class T> DIN_FAST_INLINE T lane_sum(Vec<T> v) { T s = 0; for (int i = 0; i < kLanes<T>; i++) s += v[i]; return s; }

DIN_FAST_INLINE int imin(int a, int b) { return a < b ? a : b; }
DIN_FAST_INLINE int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
DIN_FAST_INLINE int round_up(int a, int b) { return (a + b - 1) / b * b; }

// 1 in the first n lanes, 0 in the others
template <class T> DIN_FAST_INLINE Vec<T> first_lanes(int64_t n) {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; i++) v[i] = i < n ? T(1) : T(0);
  return v;
}
template <class V> DIN_FAST_INLINE V where_one(V keep, V v) { return keep != V{} ? v : V{}; }

// The smaller and the larger of both; where y is NaN, y. (As a comparison and a choice, GCC makes two instructions of it.)
#if defined(__x86_64__) && DIN_FAST_VECTOR_BYTES == 64
DIN_FAST_INLINE Vec<float> min_(Vec<float> a, Vec<float> y) { return __builtin_ia32_minps512_mask(a, y, y, 0xffff, 4); }
DIN_FAST_INLINE Vec<float> max_(Vec<float> a, Vec<float> y) { return __builtin_ia32_maxps512_mask(a, y, y, 0xffff, 4); }
DIN_FAST_INLINE Vec<double> min_(Vec<double> a, Vec<double> y) { return __builtin_ia32_minpd512_mask(a, y, y, 0xff, 4); }
DIN_FAST_INLINE Vec<double> max_(Vec<double> a, Vec<double> y) { return __builtin_ia32_maxpd512_mask(a, y, y, 0xff, 4); }
DIN_FAST_INLINE LowVec<float> min_(LowVec<float> a, LowVec<float> y) { return __builtin_ia32_minps256(a, y); }
DIN_FAST_INLINE LowVec<float> max_(LowVec<float> a, LowVec<float> y) { return __builtin_ia32_maxps256(a, y); }
DIN_FAST_INLINE LowVec<double> min_(LowVec<double> a, LowVec<double> y) { return __builtin_ia32_minpd256(a, y); }
DIN_FAST_INLINE LowVec<double> max_(LowVec<double> a, LowVec<double> y) { return __builtin_ia32_maxpd256(a, y); }
#elif defined(__x86_64__) && DIN_FAST_VECTOR_BYTES == 32
DIN_FAST_INLINE Vec<float> min_(Vec<float> a, Vec<float> y) { return __builtin_ia32_minps256(a, y); }
DIN_FAST_INLINE Vec<float> max_(Vec<float> a, Vec<float> y) { return __builtin_ia32_maxps256(a, y); }
DIN_FAST_INLINE Vec<double> min_(Vec<double> a, Vec<double> y) { return __builtin_ia32_minpd256(a, y); }
DIN_FAST_INLINE Vec<double> max_(Vec<double> a, Vec<double> y) { return __builtin_ia32_maxpd256(a, y); }
#elif defined(__x86_64__)
DIN_FAST_INLINE Vec<float> min_(Vec<float> a, Vec<float> y) { return __builtin_ia32_minps(a, y); }
DIN_FAST_INLINE Vec<float> max_(Vec<float> a, Vec<float> y) { return __builtin_ia32_maxps(a, y); }
DIN_FAST_INLINE Vec<double> min_(Vec<double> a, Vec<double> y) { return __builtin_ia32_minpd(a, y); }
DIN_FAST_INLINE Vec<double> max_(Vec<double> a, Vec<double> y) { return __builtin_ia32_maxpd(a, y); }
#else
template <class V> DIN_FAST_INLINE V min_(V a, V y) { return a < y ? a : y; }
template <class V> DIN_FAST_INLINE V max_(V a, V y) { return a > y ? a : y; }
#endif

template <class T, class V> DIN_FAST_INLINE V exp2_fraction(V f) {  // 2^f, |f| <= 1/2
  if constexpr (sizeof(T) == 4) {  // to 2e-8
    V p = f * 1.327647129e-03f + 9.675541893e-03f;
    p = p * f + 5.550713092e-02f;
    p = p * f + 2.402212024e-01f;
    p = p * f + 6.931469440e-01f;
    return p * f + 1.f;
  } else {  // Taylor, to 2e-16
    V p = f * 2.5678435993488206e-11 + 4.4455382718708116e-10;
    p = p * f + 7.0549116208011234e-09;
    p = p * f + 1.0178086009239699e-07;
    p = p * f + 1.3215486790144309e-06;
    p = p * f + 1.5252733804059841e-05;
    p = p * f + 1.5403530393381610e-04;
    p = p * f + 1.3333558146428443e-03;
    p = p * f + 9.6181291076284772e-03;
    p = p * f + 5.5504108664821580e-02;
    p = p * f + 2.4022650695910072e-01;
    p = p * f + 6.9314718055994531e-01;
    return p * f + 1.0;
  }
}
// 2^y, saturating at the ends of what the type holds, or a little before; NaN stays NaN
template <class T, class V> DIN_FAST_INLINE V exp2_(V y) {
#if defined(__x86_64__) && DIN_FAST_VECTOR_BYTES == 64
  // AVX-512 has instructions for the parts: y less its nearest integer (0 of an infinity), and p times 2 to that integer, which saturates
  if constexpr (sizeof(T) == 4 && sizeof(V) == 64) {
    const V n = __builtin_ia32_rndscaleps_mask(y, 0, y, 0xffff, 4);
    return __builtin_ia32_scalefps512_mask(exp2_fraction<T>((V)__builtin_ia32_reduceps512_mask(y, 0, y, 0xffff)), n, n, 0xffff, 4);
  } else if constexpr (sizeof(T) == 4) {
    const V n = __builtin_ia32_rndscaleps_256_mask(y, 0, y, 0xff);
    return __builtin_ia32_scalefps256_mask(exp2_fraction<T>((V)__builtin_ia32_reduceps256_mask(y, 0, y, 0xff)), n, n, 0xff);
  }
#endif
  using I = decltype(y < y);  // integers of that size
  y = min_(splat_as<V>(Vector<T>::kLargest), max_(splat_as<V>(-Vector<T>::kLargest), y));
  const V shifted = y + Vector<T>::kRound;
  const V p = exp2_fraction<T>(y - (shifted - Vector<T>::kRound));
  return (V)((I)p + ((I)shifted << Vector<T>::kMantissa));
}
// sigmoid(x) where y = -x log2(e)
template <class T, class V> DIN_FAST_INLINE V sigmoid_(V y) { return T(1) / (exp2_<T>(y) + T(1)); }
// To a few roundings relative to tanh itself: 1 - 2 / (e^2|x| + 1) loses digits where x is small, a polynomial takes over there
// (S. Moshier's Cephes, tanhf.c and tanh.c).
template <class T, class V> DIN_FAST_INLINE V tanh_small(V x, V s) {
  if constexpr (sizeof(T) == 4) {
    V p = s * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    return p * s * x + x;
  } else {
    const V p = (s * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * s - 1.61468768441708447952e3;
    const V q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3;
    return p / q * s * x + x;
  }
}
template <class T, class V> DIN_FAST_INLINE V tanh_(V x) {
  const V size = x < V{} ? -x : x;
  const V rest = T(1) - T(2) / (exp2_<T>(size * T(2 * kLog2e)) + T(1)), large = x < V{} ? -rest : rest;
  const V small = tanh_small<T>(x, x * x);
  return size < splat_as<V>(T(0.625)) ? small : large;
}
template <class T> DIN_FAST_INLINE Vec<T> sqrt_(Vec<T> v) {
  for (int i = 0; i < kLanes<T>; i++) v[i] = sizeof(T) == 4 ? (T)__builtin_sqrtf((float)v[i]) : (T)__builtin_sqrt((double)v[i]);
  return v;
}

// ---- transpose of kLanes x kLanes in registers: swap one bit of the register number with the same bit of the lane
template <int... L> struct Lanes {};
template <int N, int... L> struct MakeLanes : MakeLanes<N - 1, N - 1, L...> {};
template <int... L> struct MakeLanes<0, L...> { using type = Lanes<L...>; };

template <class T, int B, int... L> DIN_FAST_INLINE void swap_bit(Vec<T>& a, Vec<T>& b, Lanes<L...>) {
  constexpr int W = kLanes<T>;
  const Vec<T> lo = __builtin_shufflevector(a, b, ((L & B) ? W + (L ^ B) : L)...);
  const Vec<T> hi = __builtin_shufflevector(a, b, ((L & B) ? W + L : (L | B))...);
  a = lo;
  b = hi;
}
template <class T, int B> DIN_FAST_INLINE void swap_bits(Vec<T>* r) {
  if constexpr (B < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i++)
      if (!(i & B)) swap_bit<T, B>(r[i], r[i | B], typename MakeLanes<kLanes<T>>::type{});
    swap_bits<T, 2 * B>(r);
  }
}
template <class T> DIN_FAST_INLINE void transpose(Vec<T>* r) { swap_bits<T, 1>(r); }

// ---- half types, in plain integer arithmetic: of all the work on an element of a history its conversion is the least
DIN_FAST_INLINE float from_bits(uint32_t b) { float f; __builtin_memcpy(&f, &b, sizeof f); return f; }
DIN_FAST_INLINE uint32_t to_bits(float f) { uint32_t b; __builtin_memcpy(&b, &f, sizeof b); return b; }

DIN_FAST_INLINE float from_bfloat16(uint16_t h) { return from_bits((uint32_t)h << 16); }
DIN_FAST_INLINE uint16_t to_bfloat16(float f) {  // to nearest, ties to even
  const uint32_t b = to_bits(f), rounded = (b + 0x7fffu + ((b >> 16) & 1)) >> 16;
  return (uint16_t)(f == f ? rounded : 0x7fc0u);
}
DIN_FAST_INLINE float from_float16(uint16_t h) {  // the product by 2^112 puts the exponent right, of subnormals as well
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t scaled = to_bits(from_bits(magnitude << 13) * 5.192296858534828e+33f);
  return from_bits((magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : scaled) | ((uint32_t)(h & 0x8000u) << 16));
}
DIN_FAST_INLINE uint16_t to_float16(float f) {
  const uint32_t b = to_bits(f), magnitude = b & 0x7fffffffu;
  // below 2^-14 the unit of the last place is 2^-24: adding 1/2 rounds to it
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // beyond the largest, with rounding
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return (uint16_t)(h | (b >> 16 & 0x8000u));
}
constexpr int64_t element_size(Storage storage, int64_t wide) { return storage == kWide ? wide : 2; }

// n elements at element `at` of a stored tensor
template <class T> void read_row(Storage storage, const void* from, int64_t at, int64_t n, T* to) {
  const uint16_t* half = static_cast<const uint16_t*>(from) + at;
  if (storage == kBfloat16)
    for (int64_t i = 0; i < n; i++) to[i] = (T)from_bfloat16(half[i]);
  else if (storage == kFloat16)
    for (int64_t i = 0; i < n; i++) to[i] = (T)from_float16(half[i]);
  else
    __builtin_memcpy(to, static_cast<const T*>(from) + at, sizeof(T) * n);
}
template <class T> void write_row(Storage storage, const T* from, int64_t n, void* to, int64_t at) {
  uint16_t* half = static_cast<uint16_t*>(to) + at;
  if (storage == kBfloat16)
    for (int64_t i = 0; i < n; i++) half[i] = to_bfloat16((float)from[i]);
  else if (storage == kFloat16)
    for (int64_t i = 0; i < n; i++) half[i] = to_float16((float)from[i]);
  else
    __builtin_memcpy(static_cast<T*>(to) + at, from, sizeof(T) * n);
}

// ---- dropout's random numbers: din_fast/reference.py, dropout_factors, says what they are
template <class V> DIN_FAST_INLINE V mix(V x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

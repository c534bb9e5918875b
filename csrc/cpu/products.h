// The two microkernels that every matrix product of the unit is made of. Lanes are positions: a panel is
// [vector][row][lane], kLanes positions of one candidate per vector. Included by kernel.h inside its namespace.

template <class T> constexpr int kAccumulators = DIN_FAST_ACCUMULATORS;

// What the next block will read and write, asked for a few lines at a time from inside the loops over the current one:
// histories and kept panels stream through the cache once a pass, and waiting for them would cost as much as the work.
struct Ahead {
  static constexpr int kMost = 6, kLine = 64;
  const char *next[kMost], *end[kMost];
  int ranges = 0, at = 0;
  void clear() { ranges = at = 0; }
  void add(const void* p, int64_t bytes) {
    if (bytes <= 0 || ranges == kMost) return;
    next[ranges] = static_cast<const char*>(p);
    end[ranges++] = static_cast<const char*>(p) + bytes;
  }
  DIN_FAST_INLINE void go(int lines) {
    for (; at < ranges; at++) {
      for (; lines > 0 && next[at] < end[at]; lines--, next[at] += kLine) __builtin_prefetch(next[at], 0, 3);
      if (next[at] < end[at]) return;
    }
  }
};
constexpr int kAheadTile = 16, kAheadUnit = 12;  // lines a microkernel tile, a hidden unit of an activation

// C[v][i] = init[i] (or C[v][i] itself where init is null) + sum_k A[k * lda + i] B[v][k], for R rows and N vectors, of which
// the last is worked on in its lower half where Half
template <class T, int R, int N, bool Half>
DIN_FAST_INLINE void product_tile(int K, const T* A, int64_t lda, const T* B, int64_t b_vector, T* C, int64_t c_vector, const T* init) {
  constexpr int W = kLanes<T>, kWhole = N - Half;
  using V = LowVec<T>;
  Vec<T> acc[R][kWhole ? kWhole : 1];
  V low[R];
  const T *b_low = B + kWhole * b_vector, *c_low = C + kWhole * c_vector;
#pragma GCC unroll 24
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kWhole; j++) acc[i][j] = init ? splat(init[i]) : load(C + j * c_vector + i * W);
    if constexpr (Half) low[i] = init ? splat_as<V>(init[i]) : load_as<V>(c_low + i * W);
  }
  for (int k = 0; k < K; k++) {
    Vec<T> b[kWhole ? kWhole : 1];
    V b_half;
#pragma GCC unroll 4
    for (int j = 0; j < kWhole; j++) b[j] = load(B + j * b_vector + k * W);
    if constexpr (Half) b_half = load_as<V>(b_low + k * W);
#pragma GCC unroll 24
    for (int i = 0; i < R; i++) {
      const T a = A[k * lda + i];
#pragma GCC unroll 4
      for (int j = 0; j < kWhole; j++) acc[i][j] += a * b[j];
      if constexpr (Half) low[i] += a * b_half;
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kWhole; j++) store(C + j * c_vector + i * W, acc[i][j]);
    if constexpr (Half) store(C + kWhole * c_vector + i * W, widen<T>(low[i]));
  }
}

constexpr int smaller_tile(int r) { return r > 16 ? 12 : r > 8 ? 8 : r > 4 ? 4 : r > 2 ? 2 : 1; }

template <class T, int R, int N, bool Half>
static void product_rows(Ahead& ahead, int M, int K, const T* A, int64_t lda, const T* B, int64_t b_vector, T* C, int64_t c_vector, const T* init) {
  int i = 0;
  for (; i + R <= M; i += R) {
    ahead.go(kAheadTile);
    product_tile<T, R, N, Half>(K, A + i, lda, B, b_vector, C + i * kLanes<T>, c_vector, init ? init + i : nullptr);
  }
  if constexpr (R > 1)
    if (i < M)
      product_rows<T, smaller_tile(R), N, Half>(ahead, M - i, K, A + i, lda, B, b_vector, C + i * kLanes<T>, c_vector, init ? init + i : nullptr);
}

template <class T>
static void product(Ahead& ahead, Vectors vectors, int M, int K, const T* A, int64_t lda, const T* B, int64_t b_vector, T* C, int64_t c_vector, const T* init) {
  constexpr int kAcc = kAccumulators<T>;
  for (int v = 0, n; v < vectors.count; v += n) {
    const int left = vectors.count - v;
    const T* b = B + v * b_vector;
    T* c = C + v * c_vector;
    n = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
    if constexpr (DIN_FAST_VECTOR_BYTES == 64)
      if (n == left && vectors.half) {
        if (n == 3) product_rows<T, kAcc / 3, 3, true>(ahead, M, K, A, lda, b, b_vector, c, c_vector, init);
        if (n == 2) product_rows<T, kAcc / 2, 2, true>(ahead, M, K, A, lda, b, b_vector, c, c_vector, init);
        if (n == 1) product_rows<T, kAcc, 1, true>(ahead, M, K, A, lda, b, b_vector, c, c_vector, init);
        return;
      }
    if (n == 3) product_rows<T, kAcc / 3, 3, false>(ahead, M, K, A, lda, b, b_vector, c, c_vector, init);
    if (n == 2) product_rows<T, kAcc / 2, 2, false>(ahead, M, K, A, lda, b, b_vector, c, c_vector, init);
    if (n == 1) product_rows<T, kAcc, 1, false>(ahead, M, K, A, lda, b, b_vector, c, c_vector, init);
  }
}

// C[i][j..] += sum over the first n positions l of A[l / W][i][l % W] X[l][j..]: lanes are the columns of row-major X.
// The sum of a call starts at zero and is added to C once, so that long histories are summed in blocks.
template <class T, int R, int N>
DIN_FAST_INLINE void outer_tile(int n, const T* A, int64_t a_vector, const T* X, int64_t ldx, T* C, int64_t ldc) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[R][N];
#pragma GCC unroll 24
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) acc[i][j] = Vec<T>{};
  for (; n > 0; n -= W, A += a_vector) {
    const int lanes = imin(n, W);
    for (int l = 0; l < lanes; l++, X += ldx) {
      Vec<T> x[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) x[j] = load(X + j * W);
#pragma GCC unroll 24
      for (int i = 0; i < R; i++) {
        const T a = A[i * W + l];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) acc[i][j] += a * x[j];
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(C + i * ldc + j * W, load(C + i * ldc + j * W) + acc[i][j]);
}

template <class T, int R, int N>
static void outer_rows(Ahead& ahead, int M, int n, const T* A, int64_t a_vector, const T* X, int64_t ldx, T* C, int64_t ldc) {
  int i = 0;
  for (; i + R <= M; i += R) {
    ahead.go(kAheadTile);
    outer_tile<T, R, N>(n, A + i * kLanes<T>, a_vector, X, ldx, C + i * ldc, ldc);
  }
  if constexpr (R > 1)
    if (i < M) outer_rows<T, smaller_tile(R), N>(ahead, M - i, n, A + i * kLanes<T>, a_vector, X, ldx, C + i * ldc, ldc);
}

// columns: a multiple of the lanes
template <class T>
static void outer(Ahead& ahead, int M, int columns, int n, const T* A, int64_t a_vector, const T* X, int64_t ldx, T* C, int64_t ldc) {
  constexpr int W = kLanes<T>, kAcc = kAccumulators<T>;
  for (int j = 0; j < columns;) {
    const int left = (columns - j) / W;
    if (left >= 3 && left != 4) {
      outer_rows<T, kAcc / 3, 3>(ahead, M, n, A, a_vector, X + j, ldx, C + j, ldc);
      j += 3 * W;
    } else if (left >= 2) {
      outer_rows<T, kAcc / 2, 2>(ahead, M, n, A, a_vector, X + j, ldx, C + j, ldc);
      j += 2 * W;
    } else {
      outer_rows<T, kAcc, 1>(ahead, M, n, A, a_vector, X + j, ldx, C + j, ldc);
      j += W;
    }
  }
}

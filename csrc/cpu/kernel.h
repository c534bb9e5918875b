// The fused unit on a CPU: moments, forward and backward. One source, compiled once per instruction set:
//   DIN_FAST_ISA            the name and namespace of this copy
//   DIN_FAST_VECTOR_BYTES   the size of a vector
//   DIN_FAST_ACCUMULATORS   vectors that a microkernel accumulates in registers
//
// Lanes are positions: a panel is [vector][row][lane], and every product is a broadcast scalar times a vector of
// positions. A block of kBlock vectors of one candidate goes through all layers while it is in the cache; nothing of size
// (positions x 4 D) exists. With batch statistics a pass ends at every normalised layer, whose z is kept in panels.
//
// Everything is in a namespace of its own and uses no inline function of any library: the linker must never take this
// copy of one for another file, or older processors would meet instructions they do not have.

extern "C" void* aligned_alloc(__SIZE_TYPE__, __SIZE_TYPE__) noexcept;
extern "C" void free(void*) noexcept;

namespace din_fast {
namespace DIN_FAST_ISA {
namespace {

#include "vector.h"
#include "products.h"
#include "activations.h"

constexpr int kBlock = 8;         // vectors of positions worked on at a time
constexpr int kFlush = 4096;      // positions whose lane sums may wait in the working precision
constexpr int kForwardChunks = 64;
constexpr int64_t kSharedPanel = 1 << 18;  // numbers of a history that are kept in panels for the user's other candidates

// ---------------------------------------------------------------- scratch memory
// A stack per thread that is kept between calls: fresh pages cost more than the work on them.
struct Arena {
  static constexpr int kMost = 48;
  char* block[kMost] = {};
  __SIZE_TYPE__ size[kMost] = {}, used[kMost] = {};
  int current = 0;
  ~Arena() {
    for (char* b : block) free(b);
  }
  void* take(__SIZE_TYPE__ bytes) {
    bytes = (bytes + 63) / 64 * 64 + 576;  // the extra keeps buffers from starting at one offset modulo 4096
    for (;; current++) {
      if (current == kMost) throw OutOfMemory{};
      if (!block[current]) {
        const __SIZE_TYPE__ least = (__SIZE_TYPE__)1 << (20 + imin(current, 8));  // so that kMost blocks hold anything
        size[current] = ((bytes > least ? bytes : least) + 63) & ~(__SIZE_TYPE__)63;
        block[current] = static_cast<char*>(aligned_alloc(64, size[current]));
        if (!block[current]) throw OutOfMemory{};
      }
      if (used[current] + bytes <= size[current]) break;
      if (used[current] == 0) {  // too small for this: replace it
        free(block[current]);
        block[current] = nullptr;
        size[current] = 0;
        current--;
      }
    }
    void* p = block[current] + used[current];
    used[current] += bytes;
    return p;
  }
};
static thread_local Arena arena;

struct Scratch {
  int current = arena.current;
  __SIZE_TYPE__ used = arena.used[arena.current];
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (int i = current + 1; i <= arena.current; i++) arena.used[i] = 0;
    arena.current = current;
    arena.used[current] = used;
  }
  template <class T> T* take(int64_t n) { return static_cast<T*>(arena.take(sizeof(T) * n)); }
  template <class T> T* zeros(int64_t n) {
    T* p = take<T>(n);
    __builtin_memset(p, 0, sizeof(T) * n);
    return p;
  }
};

// f(chunk) for all chunks. A thread gets a range of them; where lengths are uneven, they are handed out by sixteenths in the
// order of their reversed numbers, so that no thread gets all the long histories of a batch that is sorted by length. Each
// pass gives a thread the same candidates again.
template <class F> void parallel(ParallelFor run, int64_t chunks, bool uneven, const F& f) {
  static constexpr int kReversed[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
  const int64_t group = uneven && chunks % 16 == 0 ? chunks / 16 : 0;
  const auto one = [&](int64_t i) { f(group ? kReversed[i / group] * group + i % group : i); };
  run(chunks, [](void* context, int64_t i) { (*static_cast<decltype(one)*>(context))(i); }, const_cast<void*>(static_cast<const void*>(&one)));
}
template <class T> bool uneven(const Unit<T>& u) { return u.lengths || u.mask; }

// ---------------------------------------------------------------- one call, packed for the loops
template <class T> struct Call {
  const Unit<T>& u;
  int D, Dp;                   // Dp, Hp: rounded up to whole vectors
  int H[kMaxLayers], Hp[kMaxLayers];
  int last;                    // index of the last layer
  bool folds_z;                // z of layer 0 is computed, not read from its panel
  const T *a_q_t, *a_k_t, *a_p_t, *bias;  // [D][Hp], [Hp]
  const T *a_q, *a_k, *a_p;               // [H][Dp], for the backward
  const T* weight_t[kMaxLayers];          // [H of the layer before][H]
  Params<T> params[kMaxLayers];
  const ActivationTable<T>* act[kMaxLayers];
  const T *e0[kMaxLayers], *e1[kMaxLayers];  // the answer of batch statistics, once the sums are known
  uint32_t key[kMaxLayers][2];               // dropout's random numbers

  Call(const Unit<T>& unit, Scratch& s, bool to_inputs) : u(unit) {
    D = (int)u.dim;
    Dp = round_up(D, kLanes<T>);
    last = u.layers - 1;
    for (int i = 0; i < u.layers; i++) {
      H[i] = (int)u.layer[i].units;
      Hp[i] = round_up(H[i], kLanes<T>);
      pack_layer(i, s);
      key[i][0] = mix((uint32_t)u.seed ^ (uint32_t)i);
      key[i][1] = mix((uint32_t)(u.seed >> 32) ^ key[i][0]);
    }
    folds_z = !u.layer[0].kept;
    if (folds_z) {
      a_q_t = transposed(u.a_q, H[0], D, Hp[0], s);
      a_k_t = transposed(u.a_k, H[0], D, Hp[0], s);
      a_p_t = transposed(u.a_p, H[0], D, Hp[0], s);
      T* b = s.zeros<T>(Hp[0]);
      __builtin_memcpy(b, u.layer[0].bias, sizeof(T) * H[0]);
      bias = b;
    }
    if (to_inputs) {
      a_q = padded(u.a_q, H[0], s);
      a_k = padded(u.a_k, H[0], s);
      a_p = padded(u.a_p, H[0], s);
    }
  }

  // [rows][columns] -> [columns][ld], zeros beyond rows
  static const T* transposed(const T* a, int rows, int columns, int ld, Scratch& s) {
    constexpr int W = kLanes<T>;
    T* out = s.zeros<T>((int64_t)columns * ld);
    int j = 0;
    for (; j + W <= columns && ld % W == 0; j += W)
      for (int i = 0; i < rows; i += W) {
        Vec<T> r[W];
        for (int l = 0; l < W; l++) r[l] = i + l < rows ? load(a + (int64_t)(i + l) * columns + j) : Vec<T>{};
        transpose<T>(r);
        for (int l = 0; l < W; l++) store(out + (int64_t)(j + l) * ld + i, r[l]);
      }
    for (int i = 0; i < rows; i++)
      for (int k = j; k < columns; k++) out[(int64_t)k * ld + i] = a[(int64_t)i * columns + k];
    return out;
  }
  const T* padded(const T* a, int rows, Scratch& s) const {
    if (D == Dp) return a;
    T* out = s.zeros<T>((int64_t)rows * Dp);
    for (int i = 0; i < rows; i++) __builtin_memcpy(out + (int64_t)i * Dp, a + (int64_t)i * D, sizeof(T) * D);
    return out;
  }
  void pack_layer(int i, Scratch& s) {
    const Layer<T>& layer = u.layer[i];
    const int h = H[i];
    Params<T>& p = params[i];
    p = {};
    p.units = h;
    const bool norm = layer.norm_scale != nullptr, gate = u.activation == kDiceBatch && layer.gate_scale;
    p.mode = norm ? kFull : layer.center ? kCentered : kPlain;
    p.center = layer.center ? layer.center : s.zeros<T>(h);
    p.norm_scale = layer.norm_scale;
    p.norm_shift = layer.norm_shift || !norm ? layer.norm_shift : s.zeros<T>(h);
    p.slope = layer.slope;
    p.row_eps = u.dice_eps * T(h);
    if (gate) {
      T* scaled = s.take<T>(2 * h);
      for (int j = 0; j < h; j++) {
        scaled[j] = T(-kLog2e) * layer.gate_scale[j];
        scaled[h + j] = layer.gate_shift ? T(-kLog2e) * layer.gate_shift[j] : T(0);
      }
      p.gate_scale = scaled;
      p.gate_shift = scaled + h;
      p.gate_raw = layer.gate_scale;
    }
    act[i] = &activation_table<T>(u.activation, p.mode);
    weight_t[i] = i && !layer.kept ? transposed(layer.weight, h, H[i - 1], h, s) : nullptr;
    e0[i] = e1[i] = nullptr;
    if (layer.response && layer.sums) {
      T* e = s.take<T>(2 * h);
      for (int k = 0; k < 2; k++)
        for (int j = 0; j < h; j++) {
          double sum = 0;
          for (int r = 0; r < 4; r++) sum += layer.response[(k * 4 + r) * h + j] * layer.sums[r * h + j];
          e[k * h + j] = (T)sum;
        }
      e0[i] = e;
      e1[i] = e + h;
    }
  }
};

// One user's history as a candidate sees it. `rows` are gone through, of which `valid` count in the scores.
template <class T> struct Segment {
  int64_t start;  // element of the history
  int64_t rows, total, valid, history_row, first_row, first_panel_row;  // first_row: of the candidate's scores
  const bool* mask;
  int64_t length;
  bool no_softmax_over;  // softmax over nothing, with another answer than zeros: all rows are input
  bool holes;            // masked rows must not be read as numbers
  bool is_valid(int64_t l) const { return l < length && (!mask || mask[l]); }
};

template <class T> Segment<T> segment_of(const Unit<T>& u, int64_t user, int64_t candidate) {
  Segment<T> s;
  s.total = u.starts ? u.lengths[user] : u.length;
  s.start = u.starts ? u.starts[user] : user * u.user_stride;
  s.history_row = u.starts ? s.start / u.row_stride : user * u.length;
  s.first_row = u.starts ? s.history_row : candidate * u.length;
  s.first_panel_row = u.panel_start ? u.panel_start[user] : candidate * panel_rows(u.length);
  s.length = u.lengths ? u.lengths[user] : s.total;
  s.mask = u.mask ? u.mask + user * u.length : nullptr;
  s.valid = s.length;
  int64_t end = s.length;
  if (s.mask) {
    s.valid = 0;
    for (int64_t l = end = 0; l < s.length; l++)
      if (s.mask[l]) s.valid++, end = l + 1;
  }
  s.no_softmax_over = u.softmax && s.valid == 0 && u.empty != kZeros;
  s.rows = u.pads_are_input || s.no_softmax_over ? s.total : end;
  s.holes = !u.pads_are_input && !s.no_softmax_over && s.valid < s.rows;
  return s;
}

template <class T> T pooling_scale(const Unit<T>& u, const Segment<T>& s) {
  const int64_t n = u.pooling == kMean ? s.total : u.pooling == kMeanValid ? s.valid : 1;
  return T(1) / T(n > 0 ? n : 1);
}

struct Cut { int64_t begin, end; };
inline Cut cut(int64_t n, int64_t chunks, int64_t i) { return {n * i / chunks, n * (i + 1) / chunks}; }

// ---------------------------------------------------------------- the working state of one chunk of candidates
template <class T> struct Work {
  static constexpr int W = kLanes<T>;
  const Call<T>& call;
  const Unit<T>& u;
  T* m;                          // this candidate's matrix [D][Hp]
  T *q_rows, *q_panel;           // q of kLanes candidates at a time, [W][Dp]
  T *c_rows, *c_panel;           // c = A_q q + b1 of them: [W][Hp], made in panels
  T *rows_copy, *own_panel;      // k of the block: rows [kBlock W][Dp], panel [vector][Dp][W]
  T* user_panel = nullptr;       // k of the whole history in panels, where several candidates share it
  int64_t panel_user = -1, panel_vectors = 0;  // whose, and how much of it is there
  T *z[kMaxLayers], *a[kMaxLayers], *row_space, *counted_space;
  Segment<T> seg;
  int64_t block;                 // first vector of the block
  int vectors, n;                // vectors and positions in it
  Vectors size() const { return vectors_of<T>(n); }
  const T *rows, *c, *query, *panel;
  const T* counted;              // [vectors][W] 1 where a position of the block counts, or null where all n do
  int64_t row_stride, current, user = 0;
  Cut candidates;
  Ahead ahead;
  bool reads_rows, reads_kept[kMaxLayers] = {};  // what to ask for ahead
  const T *also[2] = {};                         // panels read or written besides, and the layers they are of
  int also_layer[2] = {};
  const char* also_rows = nullptr;               // d history
  bool has_rows, has_panel;
  const T* z_at[kMaxLayers];     // z of the block, where it is known already

  Work(const Call<T>& call_, Cut candidates_, Scratch& s) : call(call_), u(call_.u), candidates(candidates_) {
    m = s.take<T>((int64_t)call.D * call.Hp[0]);
    c_rows = s.take<T>((int64_t)W * call.Hp[0]);
    q_rows = s.zeros<T>((int64_t)W * call.Dp);
    q_panel = s.take<T>((int64_t)W * call.Dp);
    c_panel = s.take<T>((int64_t)W * call.Hp[0]);
    rows_copy = call.D == call.Dp ? s.take<T>((int64_t)kBlock * W * call.Dp) : s.zeros<T>((int64_t)kBlock * W * call.Dp);
    own_panel = s.take<T>((int64_t)kBlock * W * call.Dp);
    counted_space = s.take<T>(kBlock * W);
    const int64_t whole = (u.length + W - 1) / W * W * call.Dp;
    if (u.candidate_offsets && whole <= kSharedPanel) user_panel = s.take<T>(whole);
    int most = 0;
    for (int i = 0; i <= call.last; i++) {
      z[i] = s.take<T>((int64_t)kBlock * W * call.H[i]);
      a[i] = s.take<T>((int64_t)kBlock * W * call.H[i]);
      most = call.H[i] > most ? call.H[i] : most;
    }
    row_space = s.take<T>((int64_t)kBlock * W * (4 + most));
    if (u.candidate_offsets) {  // the user of the first candidate
      int64_t above = u.users;
      while (above - user > 1) {
        const int64_t middle = (user + above) / 2;
        (u.candidate_offsets[middle] <= candidates.begin ? user : above) = middle;
      }
    }
  }

  // q and c of the candidates [first, first + W): lanes are candidates, or, where those are few, hidden units
  void begin_group(int64_t first) {
    const int n = (int)imin((int64_t)W, candidates.end - first), Hp = call.Hp[0];
    for (int i = 0; i < n; i++) read_row<T>(u.storage, u.query, (first + i) * u.query_stride, call.D, q_rows + (int64_t)i * call.Dp);
    if (!call.folds_z) return;
    if (n <= W / 8) {
      for (int i = 0; i < n; i++)
        for (int h = 0; h < Hp; h += W) {
          Vec<T> sum = load(call.bias + h);
          for (int d = 0; d < call.D; d++) sum += q_rows[(int64_t)i * call.Dp + d] * load(call.a_q_t + (int64_t)d * Hp + h);
          store(c_rows + (int64_t)i * Hp + h, sum);
        }
      return;
    }
    for (int d = 0; d < call.D; d++)
      for (int i = 0; i < W; i++) q_panel[d * W + i] = i < n ? q_rows[(int64_t)i * call.Dp + d] : T(0);
    product<T>(ahead, vectors_of<T>(n), call.H[0], call.D, call.a_q_t, Hp, q_panel, 0, c_panel, 0, call.bias);
    panel_to_rows(c_panel, call.H[0], 1, Hp, c_rows);
  }
  // m = (A_k + A_p diag(q))', lanes over the hidden units
  void begin(int64_t candidate) {
    if (!u.candidate_offsets) user = candidate;
    else
      while (candidate >= u.candidate_offsets[user + 1]) user++;
    seg = segment_of(u, user, candidate);
    current = candidate;
    const int64_t in_group = (candidate - candidates.begin) % W;
    if (in_group == 0) begin_group(candidate);
    query = q_rows + in_group * call.Dp;
    if (!call.folds_z) return;
    c = c_rows + in_group * call.Hp[0];
    for (int d = 0; d < call.D; d++) {
      const T q = query[d];
      const int64_t row = (int64_t)d * call.Hp[0];
      for (int h = 0; h < call.Hp[0]; h += W) store(m + row + h, load(call.a_k_t + row + h) + q * load(call.a_p_t + row + h));
    }
  }
  int64_t all_vectors() const { return (seg.rows + W - 1) / W; }
  // blocks of even size
  int64_t block_size() const {
    const int64_t all = all_vectors(), blocks = (all + kBlock - 1) / kBlock;
    return blocks ? (all + blocks - 1) / blocks : 1;
  }
  void enter(int64_t first_vector, int64_t size) {
    block = first_vector;
    vectors = (int)imin(size, all_vectors() - first_vector);
    n = (int)imin((int64_t)vectors * W, seg.rows - block * W);
    has_rows = has_panel = false;
    for (const T*& z_ : z_at) z_ = nullptr;
    counted = nullptr;
    if (u.pads_are_input || seg.valid == seg.rows) return;
    for (int l = 0; l < vectors * W; l++) counted_space[l] = l < n && seg.is_valid(block * W + l) ? T(1) : T(0);
    counted = counted_space;
  }
  // Ask for the memory of the block after this one, of this candidate or the next (dense histories only).
  void look_ahead(int64_t size) {
    ahead.clear();
    const int64_t begin = block + vectors;
    int64_t first = begin * W, count = imin(size * W, seg.rows - first), next = current, next_user = user;
    if (count <= 0) {
      if (u.starts || current + 1 >= candidates.end) return;
      next++;
      next_user = !u.candidate_offsets ? next : next < u.candidate_offsets[user + 1] ? user : imin(user + 1, u.users - 1);
      first = 0;
      count = imin(size * W, u.length);
    }
    const int64_t start = u.starts ? u.starts[next_user] : next_user * u.user_stride;
    const int64_t panel_row = (u.panel_start ? u.panel_start[next_user] : next * panel_rows(u.length)) + first;
    const int64_t padded = (count + W - 1) / W * W, size_of = element_size(u.storage, sizeof(T));
    for (int i = 0; i <= call.last; i++)
      if (reads_kept[i]) ahead.add(u.layer[i].kept + panel_row * call.H[i], sizeof(T) * padded * call.H[i]);
    for (int i = 0; i < 2; i++)
      if (also[i]) ahead.add(also[i] + panel_row * call.H[also_layer[i]], sizeof(T) * padded * call.H[also_layer[i]]);
    if (reads_rows && u.row_stride <= 2 * call.D && (next_user != user || !user_panel))
      ahead.add(static_cast<const char*>(u.history) + (start + first * u.row_stride) * size_of, size_of * ((count - 1) * u.row_stride + call.D));
    if (also_rows) ahead.add(also_rows + ((u.starts ? start / u.row_stride : next_user * u.length) + first) * call.D * size_of, size_of * count * call.D);
  }
  // Rows of the block that may be read Dp wide; masked ones are zero where a pad is not input.
  void need_rows() {
    if (has_rows) return;
    has_rows = true;
    int64_t at = seg.start + block * W * u.row_stride;
    if (u.storage == kWide && call.D == call.Dp && !seg.holes) {
      rows = static_cast<const T*>(u.history) + at;
      row_stride = u.row_stride;
      return;
    }
    rows = rows_copy;
    row_stride = call.Dp;
    for (int l = 0; l < n; l++, at += u.row_stride) {
      if (seg.holes && !seg.is_valid(block * W + l))
        __builtin_memset(rows_copy + (int64_t)l * call.Dp, 0, sizeof(T) * call.D);
      else
        read_row<T>(u.storage, u.history, at, call.D, rows_copy + (int64_t)l * call.Dp);
    }
  }
  void need_panel() {
    if (has_panel) return;
    has_panel = true;
    T* to = own_panel;
    if (user_panel) {
      to = user_panel + block * call.Dp * W;
      if (panel_user != user) panel_user = user, panel_vectors = 0;
      panel = to;
      if (block < panel_vectors) return;  // an earlier candidate has made it
      if (block == panel_vectors) panel_vectors += vectors;
    }
    panel = to;
    need_rows();
    rows_to_panel(rows, row_stride, n, vectors, call.Dp, to);
  }
  static void rows_to_panel(const T* rows, int64_t stride, int n, int vectors, int columns, T* panel) {
    Vec<T> r[W];
    for (int v = 0; v < vectors; v++)
      for (int d = 0; d < columns; d += W) {
        const T* from = rows + (int64_t)v * W * stride + d;
        const int lanes = n - v * W;
        if (lanes >= W) {
#pragma GCC unroll 16
          for (int l = 0; l < W; l++) r[l] = load(from + l * stride);
        } else {
          for (int l = 0; l < W; l++) r[l] = l < lanes ? load(from + l * stride) : Vec<T>{};
        }
        transpose<T>(r);
        T* to = panel + ((int64_t)v * columns + d) * W;
#pragma GCC unroll 16
        for (int l = 0; l < W; l++) store(to + l * W, r[l]);
      }
  }
  // panel [vector][units][W] -> rows [vector W][ld], ld units rounded up; what lies beyond the units is not meaningful
  static void panel_to_rows(const T* panel, int units, int vectors, int ld, T* rows) {
    Vec<T> r[W];
    for (int v = 0; v < vectors; v++)
      for (int h = 0; h < units; h += W) {
        const T* from = panel + ((int64_t)v * units + h) * W;
        if (h + W <= units) {
#pragma GCC unroll 16
          for (int i = 0; i < W; i++) r[i] = load(from + i * W);
        } else {
          for (int i = 0; i < W; i++) r[i] = h + i < units ? load(from + i * W) : Vec<T>{};
        }
        transpose<T>(r);
        T* to = rows + (int64_t)v * W * ld + h;
#pragma GCC unroll 16
        for (int l = 0; l < W; l++) store(to + (int64_t)l * ld, r[l]);
      }
  }

  // Panels hold more rows than there are: give them a value, so that no result depends on what memory held.
  void clear_tail(int layer, T* panels) const {
    const int64_t used = all_vectors() * W, H = call.H[layer];
    __builtin_memset(panels + (seg.first_panel_row + used) * H, 0, sizeof(T) * (panel_rows(seg.total) - used) * H);
  }
  int64_t panel_at(int layer) const { return (seg.first_panel_row + block * W) * call.H[layer]; }
  // Dropout: what the block's activations of a layer, or their gradients, are multiplied by.
  void drop(int layer, T* panel) const {
    if (u.dropout == 0) return;
    uint32_t position[kBlock * W];
    for (int i = 0; i < vectors * W; i++) {
      const uint64_t row = (uint64_t)(seg.first_row + block * W + i);
      position[i] = mix((uint32_t)row ^ call.key[layer][0]) ^ mix((uint32_t)(row >> 32) ^ call.key[layer][1]);
    }
    const uint32_t below = (uint32_t)(u.dropout * 4294967296.0);
    const T factor = T(1 / (1 - u.dropout));
    const int H = call.H[layer];
    for (int v = 0; v < vectors; v++)
      for (int h = 0; h < H; h++) {
        T* p = panel + ((int64_t)v * H + h) * W;
        const uint32_t unit = (uint32_t)(h + 1) * 0x9e3779b9u;
        for (int l = 0; l < W; l++) p[l] = mix(position[v * W + l] + unit) < below ? T(0) : p[l] * factor;
      }
  }
  // the scores of the block
  void scores(T* out) {
    const int last = call.last;
    const T* top = z_panel(last);
    if (u.dropout == 0) return call.act[last]->score(ahead, call.params[last], size(), top, row_space, u.score_weight, u.score_bias, out);
    call.act[last]->activate(ahead, call.params[last], size(), top, row_space, a[last]);
    drop(last, a[last]);
    product<T>(ahead, size(), 1, call.H[last], u.score_weight, 1, a[last], (int64_t)call.H[last] * W, out, W, &u.score_bias);
  }
  // z of a layer for the block: kept, or computed (into `out` where that is given)
  const T* z_panel(int layer, T* out = nullptr) {
    if (z_at[layer]) return z_at[layer];
    if (u.layer[layer].kept) return z_at[layer] = u.layer[layer].kept + panel_at(layer);
    T* to = out ? out : z[layer];
    z_at[layer] = to;
    if (layer == 0) {
      need_panel();
      product<T>(ahead, size(), call.H[0], call.D, m, call.Hp[0], panel, (int64_t)call.Dp * W, to, (int64_t)call.H[0] * W, c);
      return to;
    }
    const int H0 = call.H[layer - 1], H1 = call.H[layer];
    const T* before = z_panel(layer - 1);
    call.act[layer - 1]->activate(ahead, call.params[layer - 1], size(), before, row_space, a[layer - 1]);
    drop(layer - 1, a[layer - 1]);
    product<T>(ahead, size(), H1, H0, call.weight_t[layer], H1, a[layer - 1], (int64_t)H0 * W, to, (int64_t)H1 * W, u.layer[layer].bias);
    return to;
  }
};

// ---------------------------------------------------------------- moments
// sums of z - shift and its square over the lanes that hold a position that counts
template <class T> void add_moments(const T* z, int H, int vectors, const Counted<T>& counted, const T* shift, T* sum, T* squares) {
  constexpr int W = kLanes<T>;
  for (int h = 0; h < H; h++) {
    Vec<T> s = {}, q = {};
    for (int v = 0; v < vectors; v++) {
      const Vec<T> d = counted.only(v, load(z + ((int64_t)v * H + h) * W) - shift[h]);
      s += d;
      q += d * d;
    }
    store(sum + h * W, load(sum + h * W) + s);
    store(squares + h * W, load(squares + h * W) + q);
  }
}

template <class T> void flush_lanes(T* panel, int64_t rows, double* total) {
  for (int64_t r = 0; r < rows; r++) {
    double s = 0;
    for (int i = 0; i < kLanes<T>; i++) s += (double)panel[r * kLanes<T> + i];
    total[r] += s;
  }
  __builtin_memset(panel, 0, sizeof(T) * rows * kLanes<T>);
}

template <class T> void moments(const Unit<T>& u, int layer, const MomentsOut<T>& out, ParallelFor run) {
  Scratch scratch;
  const Call<T> call(u, scratch, false);
  const int H = call.H[layer], W = kLanes<T>;
  const int64_t chunks = imin(u.candidates, (int64_t)kMaxChunks);
  double* part = scratch.zeros<double>(chunks * (2 * H + 1));  // count, mean, m2 of each chunk
  parallel(run, chunks, uneven(u), [&](int64_t chunk) {
    Scratch s;
    const Cut candidates = cut(u.candidates, chunks, chunk);
    Work<T> work(call, candidates, s);
    work.reads_rows = layer == 0 || !u.layer[0].kept;
    for (int i = 0; i < layer; i++) work.reads_kept[i] = u.layer[i].kept && (i == layer - 1 || !u.layer[i + 1].kept);
    work.also[0] = out.kept;
    work.also_layer[0] = layer;
    T *shift = s.take<T>(H), *sums = s.zeros<T>((int64_t)2 * H * W);
    double *total = s.zeros<double>(2 * H), count = 0;
    int waiting = 0;
    for (int64_t candidate = candidates.begin; candidate < candidates.end; candidate++) {
      work.begin(candidate);
      for (int64_t v = 0, size = work.block_size(); v < work.all_vectors(); v += size) {
        work.enter(v, size);
        work.look_ahead(size);
        const T* z = work.z_panel(layer, out.kept ? out.kept + work.panel_at(layer) : nullptr);
        int counted = work.n, at = 0;  // how many, and the first
        if (work.counted) {
          counted = 0;
          for (int l = work.n - 1; l >= 0; l--)
            if (work.counted[l] != T(0)) counted++, at = l;
          if (counted == 0) continue;
        }
        if (count == 0)
          for (int h = 0; h < H; h++) shift[h] = z[((int64_t)(at / W) * H + h) * W + at % W];
        add_moments(z, H, work.vectors, Counted<T>(work.counted, work.n, work.vectors), shift, sums, sums + H * W);
        count += counted;
        if ((waiting += work.n) >= kFlush) flush_lanes(sums, 2 * H, total), waiting = 0;
      }
      if (out.kept) work.clear_tail(layer, out.kept);
    }
    flush_lanes(sums, 2 * H, total);
    double* p = part + chunk * (2 * H + 1);
    p[0] = count;
    if (count > 0)
      for (int h = 0; h < H; h++) {
        p[1 + h] = (double)shift[h] + total[h] / count;
        const double m2 = total[H + h] - total[h] * total[h] / count;
        p[1 + H + h] = m2 < 0 ? 0 : m2;  // NaN stays
      }
  });
  // Chan's merge, in order
  double n = 0;
  double *mean = scratch.zeros<double>(H), *m2 = scratch.zeros<double>(H);
  for (int64_t i = 0; i < chunks; i++) {
    const double* p = part + i * (2 * H + 1);
    if (p[0] == 0) continue;
    const double both = n + p[0];
    for (int h = 0; h < H; h++) {
      const double d = p[1 + h] - mean[h];
      m2[h] += p[1 + H + h] + d * d * n * p[0] / both;
      mean[h] += d * p[0] / both;
    }
    n = both;
  }
  *out.count = n;
  for (int h = 0; h < H; h++) out.mean[h] = (T)mean[h], out.m2[h] = (T)m2[h];
}

// ---------------------------------------------------------------- forward
template <class T> T prelu(const Unit<T>& u, T score) { return score > T(0) ? score : score * u.score_slope; }

// scores [rows up to whole vectors] -> weights, in place; a PReLU on the score is left to the caller
template <class T> void weights_of(const Unit<T>& u, const Segment<T>& seg, T* s) {
  constexpr int W = kLanes<T>;
  const int64_t all = (seg.rows + W - 1) / W * W;
  if (seg.no_softmax_over) {
    const T w = u.empty == kNan ? T(__builtin_nan("")) : T(1) / T(seg.total);
    for (int64_t l = 0; l < all; l++) s[l] = l < seg.rows ? w : T(0);
    return;
  }
  if (u.score_activation == kScoreSigmoid)
    for (int64_t l = 0; l < all; l += W) store(s + l, sigmoid_<T>(load(s + l) * T(-kLog2e)));
  if (u.softmax) {
    T most = -T(__builtin_inf());
    for (int64_t l = 0; l < seg.rows; l++)
      if (seg.is_valid(l)) most = s[l] > most || s[l] != s[l] ? s[l] : most;
    T sums[W] = {};
    for (int64_t l = 0; l < all; l += W) {
      store(s + l, exp2_<T>((load(s + l) - most) * T(kLog2e)));
      for (int i = 0; i < W; i++)
        if (seg.is_valid(l + i)) sums[i] += s[l + i];
    }
    T sum = 0;
    for (int i = 0; i < W; i++) sum += sums[i];
    for (int64_t l = 0; l < all; l++) s[l] = s[l] / sum;
  }
  if (seg.valid < all)
    for (int64_t l = 0; l < all; l++)
      if (!seg.is_valid(l)) s[l] = 0;
}

// out[0..columns) += sum over n rows of w[l] X[l][..]
template <class T, int N>
DIN_FAST_INLINE void pool_tile(int n, const T* w, const T* X, int64_t ldx, T* out) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) acc[j] = Vec<T>{};
  for (int l = 0; l < n; l++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) acc[j] += w[l] * load(X + l * ldx + j * W);
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) store(out + j * W, load(out + j * W) + acc[j]);
}
template <class T> void pool(int n, int columns, const T* w, const T* X, int64_t ldx, T* out) {
  constexpr int W = kLanes<T>;
  int j = 0;
  for (; j + 8 * W <= columns; j += 8 * W) pool_tile<T, 8>(n, w, X + j, ldx, out + j);
  for (; j + 4 * W <= columns; j += 4 * W) pool_tile<T, 4>(n, w, X + j, ldx, out + j);
  for (; j < columns; j += W) pool_tile<T, 1>(n, w, X + j, ldx, out + j);
}

template <class T> void forward(const Unit<T>& u, const ForwardOut<T>& out, ParallelFor run) {
  Scratch scratch;
  const Call<T> call(u, scratch, false);
  const int64_t chunks = imin(u.candidates, (int64_t)kForwardChunks);
  const int W = kLanes<T>, last = call.last;
  parallel(run, chunks, uneven(u), [&](int64_t chunk) {
    Scratch s;
    const Cut candidates = cut(u.candidates, chunks, chunk);
    Work<T> work(call, candidates, s);
    work.reads_rows = true;
    work.reads_kept[last] = u.layer[last].kept != nullptr;
    T *score = s.take<T>(u.length + kBlock * W), *pooled = s.take<T>(call.Dp);
    for (int64_t candidate = candidates.begin; candidate < candidates.end; candidate++) {
      work.begin(candidate);
      const Segment<T>& seg = work.seg;
      const int64_t size = work.block_size();
      for (int64_t v = 0; v < work.all_vectors(); v += size) {
        work.enter(v, size);
        work.look_ahead(size);
        work.scores(score + v * W);
      }
      weights_of(u, seg, score);
      T* scores = out.scores + seg.first_row;
      __builtin_memcpy(scores, score, sizeof(T) * seg.rows);
      __builtin_memset(scores + seg.rows, 0, sizeof(T) * (seg.total - seg.rows));
      if (!out.pooled) continue;
      if (u.score_activation == kScorePrelu)
        for (int64_t l = 0; l < seg.rows; l++) score[l] = prelu(u, score[l]);
      __builtin_memset(pooled, 0, sizeof(T) * call.Dp);
      for (int64_t v = 0; v < work.all_vectors(); v += size) {
        work.enter(v, size);
        work.need_rows();
        pool<T>(work.n, call.Dp, score + v * W, work.rows, work.row_stride, pooled);
      }
      const T scale = pooling_scale(u, seg);
      for (int d = 0; d < call.D; d++) pooled[d] *= scale;
      write_row<T>(u.storage, pooled, call.D, out.pooled, candidate * call.D);
    }
  });
}

// ---------------------------------------------------------------- backward
// dot products of rows with g: lanes over the columns, then a transpose brings the positions into the lanes
template <class T> void dot_rows(const T* rows, int64_t stride, int n, int columns, const T* g, T* out) {
  constexpr int W = kLanes<T>;
  for (int l0 = 0; l0 < n; l0 += W) {
    Vec<T> r[W];
    for (int l = 0; l < W; l++) {
      Vec<T> acc = {};
      if (l0 + l < n)
        for (int d = 0; d < columns; d += W) acc += load(rows + (int64_t)(l0 + l) * stride + d) * load(g + d);
      r[l] = acc;
    }
    transpose<T>(r);
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; i++) r[i] += r[i + half];
    store(out + l0, r[0]);
  }
}

// out = dz - e0 - e1 (z - center), zero in lanes without a position that counts; dz_sum[h] += its sum over the vectors
template <class T>
void subtract_answer(const Params<T>& p, const T* e0, const T* e1, int vectors, const Counted<T>& counted, const T* z, const T* dz, T* out, T* dz_sum) {
  constexpr int W = kLanes<T>;
  const int H = p.units;
  for (int h = 0; h < H; h++) {
    Vec<T> sum = {};
    for (int v = 0; v < vectors; v++) {
      const int64_t at = ((int64_t)v * H + h) * W;
      const Vec<T> x = counted.only(v, load(dz + at) - (e1[h] * (load(z + at) - p.center[h]) + e0[h]));
      sum += x;
      store(out + at, x);
    }
    if (dz_sum) add_to<T>(dz_sum + h * W, sum);
  }
}

// What one chunk of candidates adds up; merged in order afterwards.
template <class T> struct Partial {
  T *d_a_q, *d_a_k, *d_a_p;                      // [H][Dp]
  T* d_weight[kMaxLayers];                       // [H][Hp of the layer before]
  double *d_bias[kMaxLayers], *sums[kMaxLayers]; // [H], [kSums][H]
  double *d_score_weight, *d_score_bias;         // the score's slope is behind its bias
  T *head, *tail;                                // d history of a user whose candidates began, or go on, in another chunk
};

template <class T> struct Backward {
  static constexpr int W = kLanes<T>;
  const Unit<T>& u;
  const BackwardPass<T>& pass;
  const Call<T>& call;
  const bool to_inputs, weights;
  const bool valid_only;  // batch statistics, over the valid positions alone

  // ---- lane sums of one chunk that wait for their flush
  struct Waiting {
    T *sums[kMaxLayers] = {}, *bias[kMaxLayers] = {}, *score_weight = nullptr;
    int positions = 0;
  };
  void flush(Waiting& w, Partial<T>& part) const {
    for (int i = 0; i <= call.last; i++) {
      if (w.sums[i]) flush_lanes(w.sums[i], (int64_t)kSums * call.H[i], part.sums[i]);
      if (w.bias[i]) flush_lanes(w.bias[i], call.H[i], part.d_bias[i]);
    }
    if (w.score_weight) flush_lanes(w.score_weight, call.H[call.last], part.d_score_weight);
    w.positions = 0;
  }

  // Whether a user has candidates on both sides of a cut before `candidate`, and whether those of a chunk are of one user.
  bool splits(int64_t candidate) const {
    if (candidate <= 0 || candidate >= u.candidates) return false;
    for (int64_t i = 0; i <= u.users; i++)
      if (u.candidate_offsets[i] >= candidate) return u.candidate_offsets[i] > candidate;
    return false;
  }
  bool one_user(Cut candidates) const {
    for (int64_t i = 0; i <= u.users; i++)
      if (u.candidate_offsets[i] > candidates.begin) return u.candidate_offsets[i] >= candidates.end;
    return true;
  }

  Partial<T> new_partial(Cut candidates, Scratch& s) const {
    Partial<T> p = {};
    if (to_inputs) {
      const int64_t n = (int64_t)call.H[0] * call.Dp;
      p.d_a_q = s.zeros<T>(n);
      p.d_a_k = s.zeros<T>(n);
      p.d_a_p = s.zeros<T>(n);
    }
    for (int i = 0; i <= call.last; i++) {
      if (pass.d_weight[i]) p.d_weight[i] = s.zeros<T>((int64_t)call.H[i] * call.Hp[i - 1]);
      if (pass.d_bias[i]) p.d_bias[i] = s.zeros<double>(call.H[i]);
      if (pass.sums[i]) p.sums[i] = s.zeros<double>((int64_t)kSums * call.H[i]);
    }
    if (pass.d_score_weight) {
      p.d_score_weight = s.zeros<double>(call.H[call.last]);
      p.d_score_bias = s.zeros<double>(2);
    }
    if (pass.d_history && u.candidate_offsets) {
      if (splits(candidates.begin)) p.head = s.take<T>(u.length * call.D);
      if (splits(candidates.end) && !(p.head && one_user(candidates))) p.tail = s.take<T>(u.length * call.D);
    }
    return p;
  }

  struct State {
    Work<T> work;
    T *g, *dz, *da, *zero, *a_rows, *m_rows, *d_m, *d_c, *d_k, *row;
    T *d_c_group, *d_q_group;  // of up to W candidates: [H][W], [W][Dp]
    T* d_user = nullptr;       // d history of the user at hand, over the candidates so far
    Waiting waiting;
    State(const Backward& b, Cut candidates, Scratch& s) : work(b.call, candidates, s) {
      const Call<T>& c = b.call;
      work.reads_rows = b.pass.first || b.to_inputs || c.folds_z;
      for (int i = 0; i <= b.pass.from; i++) work.reads_kept[i] = b.u.layer[i].kept && i >= b.pass.to;
      work.also[0] = b.pass.local_in;
      work.also_layer[0] = b.pass.from;
      work.also[1] = b.pass.local_out;
      work.also_layer[1] = b.pass.to < 0 ? 0 : b.pass.to;
      if (!b.u.candidate_offsets) work.also_rows = static_cast<const char*>(b.pass.d_history);
      else if (b.pass.d_history) d_user = s.take<T>(b.u.length * c.D);
      int most = 0;
      for (int i = 0; i <= c.last; i++) most = c.Hp[i] > most ? c.Hp[i] : most;
      g = s.zeros<T>(c.Dp);
      dz = s.take<T>((int64_t)kBlock * W * most);
      da = s.take<T>((int64_t)kBlock * W * most);
      a_rows = s.take<T>((int64_t)kBlock * W * most);
      zero = s.zeros<T>(most > c.Dp ? most : c.Dp);
      if (b.to_inputs) {
        m_rows = s.take<T>((int64_t)c.H[0] * c.Dp);
        d_m = s.take<T>((int64_t)c.H[0] * c.Dp);
        d_c = s.take<T>((int64_t)c.H[0] * W);
        d_k = s.take<T>((int64_t)kBlock * W * c.Dp);
        row = s.take<T>((int64_t)W * c.Dp);
        d_c_group = s.take<T>((int64_t)c.H[0] * W);
        d_q_group = s.take<T>((int64_t)W * c.Dp);
      }
      for (int i = 0; i <= c.last; i++) {
        if (b.pass.sums[i]) waiting.sums[i] = s.zeros<T>((int64_t)kSums * c.H[i] * W);
        if (i && b.pass.d_bias[i]) waiting.bias[i] = s.zeros<T>((int64_t)c.H[i] * W);
      }
      if (b.pass.d_score_weight) waiting.score_weight = s.zeros<T>((int64_t)c.H[c.last] * W);
    }
  };

  // gradient of the pooled vector, times the pooling's factor
  void load_gradient(State& st, int64_t candidate) const {
    const T scale = pooling_scale(u, st.work.seg);
    if (!pass.grad_pooled) return;  // g is zero
    const int64_t at = candidate * pass.grad_pooled_stride[0], step = pass.grad_pooled_stride[1];
    if (step == 1) read_row<T>(u.storage, pass.grad_pooled, at, call.D, st.g);
    else
      for (int d = 0; d < call.D; d++) read_row<T>(u.storage, pass.grad_pooled, at + d * step, 1, st.g + d);
    for (int d = 0; d < call.D; d++) st.g[d] *= scale;
  }

  // d score before its activation and softmax, of every position of the candidate
  void score_gradient(State& st, int64_t candidate, int64_t size, Partial<T>& part) const {
    Work<T>& work = st.work;
    const Segment<T>& seg = work.seg;
    T* ds = pass.d_logit + seg.first_panel_row;
    const T* p = pass.scores + seg.first_row;
    for (int64_t v = 0; v < work.all_vectors(); v += size) {
      work.enter(v, size);
      if (!pass.grad_pooled) {
        __builtin_memset(ds + v * W, 0, sizeof(T) * work.vectors * W);
        continue;
      }
      work.need_rows();
      dot_rows<T>(work.rows, work.row_stride, work.n, call.Dp, st.g, ds + v * W);
    }
    if (u.score_activation == kScorePrelu) {  // p is the score before it
      double d_slope = 0;
      for (int64_t l = 0; l < seg.rows; l++)
        if (!(p[l] > T(0))) {
          if (seg.is_valid(l)) d_slope += (double)ds[l] * p[l];
          ds[l] *= u.score_slope;
        }
      if (part.d_score_bias) part.d_score_bias[1] += d_slope;
    }
    if (pass.grad_scores)
      for (int64_t l = 0; l < seg.rows; l++)
        ds[l] += pass.grad_scores[candidate * pass.grad_scores_stride[0] + l * pass.grad_scores_stride[1]];
    if (u.softmax) {
      double mean = 0;
      for (int64_t l = 0; l < seg.rows; l++)
        if (seg.is_valid(l)) mean += (double)p[l] * ds[l];
      for (int64_t l = 0; l < seg.rows; l++) ds[l] = p[l] * (ds[l] - (T)mean);
    } else if (u.score_activation == kScoreSigmoid) {
      for (int64_t l = 0; l < seg.rows; l++) ds[l] *= p[l] * (T(1) - p[l]);
    }
    if (seg.valid < seg.rows)
      for (int64_t l = 0; l < seg.rows; l++)
        if (!seg.is_valid(l)) ds[l] = 0;
    for (int64_t l = seg.rows; l < panel_rows(seg.total); l++) ds[l] = 0;
    if (part.d_score_bias) {
      double sum = 0;
      for (int64_t l = 0; l < seg.rows; l++) sum += (double)ds[l];
      *part.d_score_bias += sum;
    }
  }

  // m = A_k + A_p diag(q), rows of D
  void begin_inputs(State& st) const {
    const int64_t n = (int64_t)call.H[0] * call.Dp;
    for (int d = 0; d < call.Dp; d += W) {
      const Vec<T> q = load(st.work.query + d);
      for (int h = 0; h < call.H[0]; h++) {
        const int64_t at = (int64_t)h * call.Dp + d;
        store(st.m_rows + at, load(call.a_k + at) + q * load(call.a_p + at));
      }
    }
    __builtin_memset(st.d_m, 0, sizeof(T) * n);
    __builtin_memset(st.d_c, 0, sizeof(T) * call.H[0] * W);
  }

  // d k = p g + m' dz, of the block
  void history_gradient(State& st) const {
    Work<T>& work = st.work;
    const Segment<T>& seg = work.seg;
    const T* p = pass.scores + seg.first_row + work.block * W;
    T weight[kBlock * W];
    // Where nobody pools, no weight counts: one of NaN (a softmax over nothing) must not either.
    const int counting = pass.grad_pooled ? work.n : 0;
    for (int l = 0; l < work.vectors * W; l++) weight[l] = l >= counting ? T(0) : u.score_activation == kScorePrelu ? prelu(u, p[l]) : p[l];
    for (int v = 0; v < work.vectors; v++) {
      const Vec<T> w = load(weight + v * W);
      for (int d = 0; d < call.Dp; d++) store(st.d_k + ((int64_t)v * call.Dp + d) * W, w * st.g[d]);
    }
    product<T>(work.ahead, work.size(), call.Dp, call.H[0], st.m_rows, call.Dp, st.dz, (int64_t)call.H[0] * W, st.d_k, (int64_t)call.Dp * W, nullptr);
    const int64_t first = (seg.history_row + work.block * W) * call.D;
    for (int v = 0; v < work.vectors; v++) {
      const int lanes = imin(W, work.n - v * W);
      const T* from = st.d_k + (int64_t)v * call.Dp * W;
      if (!st.d_user && u.storage == kWide && call.D == call.Dp && lanes == W) {
        Work<T>::panel_to_rows(from, call.Dp, 1, call.D, static_cast<T*>(pass.d_history) + first + (int64_t)v * W * call.D);
        continue;
      }
      Work<T>::panel_to_rows(from, call.Dp, 1, call.Dp, st.row);
      for (int l = 0; l < lanes; l++) {
        const int64_t position = v * W + l;
        const T* row = st.row + (int64_t)l * call.Dp;
        if (!st.d_user) {
          write_row<T>(u.storage, row, call.D, pass.d_history, first + position * call.D);
          continue;
        }
        T* sum = st.d_user + (work.block * W + position) * call.D;
        for (int d = 0; d < call.D; d++) sum[d] += row[d];
      }
    }
  }
  // The user's candidates in this chunk are done: d history is complete, or a part that waits for the other chunks'.
  void finish_user(State& st, Partial<T>& part) const {
    const Work<T>& work = st.work;
    const int64_t n = work.seg.total * call.D, *offsets = u.candidate_offsets + work.user;
    T* rest = offsets[0] < work.candidates.begin ? part.head : offsets[1] > work.candidates.end ? part.tail : nullptr;
    if (rest) __builtin_memcpy(rest, st.d_user, sizeof(T) * n);
    else write_row<T>(u.storage, st.d_user, n, pass.d_history, work.seg.history_row * call.D);
  }

  // a candidate's d m into the chunk's sums and its query's gradient, N vectors of columns at a time
  template <int N> DIN_FAST_INLINE void finish_columns(State& st, int d, T* dq, Partial<T>& part) const {
    Vec<T> q[N], sum[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) q[j] = load(st.work.query + d + j * W), sum[j] = Vec<T>{};
    for (int h = 0; h < call.H[0]; h++) {
      const int64_t row = (int64_t)h * call.Dp + d;
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) {
        const int64_t at = row + j * W;
        const Vec<T> dm = load(st.d_m + at);
        add_to<T>(part.d_a_k + at, dm);
        add_to<T>(part.d_a_p + at, dm * q[j]);
        sum[j] += dm * load(call.a_p + at);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(dq + d + j * W, sum[j]);
  }
  void finish_inputs(State& st, int64_t candidate, Partial<T>& part) const {
    const int64_t in_group = (candidate - st.work.candidates.begin) % W;
    for (int h = 0; h < call.H[0]; h++) {
      const T dc = lane_sum<T>(load(st.d_c + h * W));
      st.d_c_group[h * W + in_group] = dc;
      if (part.d_bias[0]) part.d_bias[0][h] += (double)dc;
    }
    T* dq = st.d_q_group + in_group * call.Dp;
    int d = 0;
    for (; d + 4 * W <= call.Dp; d += 4 * W) finish_columns<4>(st, d, dq, part);
    for (; d < call.Dp; d += W) finish_columns<1>(st, d, dq, part);
    if (in_group == W - 1 || candidate + 1 == st.work.candidates.end) finish_group(st, candidate - in_group, (int)in_group + 1, part);
  }
  // what comes from d c, for up to W candidates at once: d A_q += d c q', d q += A_q' d c
  void finish_group(State& st, int64_t first, int n, Partial<T>& part) const {
    Work<T>& work = st.work;
    const int H = call.H[0];
    outer<T>(work.ahead, H, call.Dp, n, st.d_c_group, 0, work.q_rows, call.Dp, part.d_a_q, call.Dp);
    if (!pass.d_query) return;
    for (int h = 0; h < H; h++)
      for (int i = n; i < W; i++) st.d_c_group[h * W + i] = 0;
    product<T>(work.ahead, vectors_of<T>(n), call.Dp, H, call.a_q, call.Dp, st.d_c_group, 0, st.d_k, 0, st.zero);
    Work<T>::panel_to_rows(st.d_k, call.Dp, 1, call.Dp, st.row);
    for (int i = 0; i < n; i++) {
      T* row = st.row + (int64_t)i * call.Dp;
      for (int d = 0; d < call.D; d++) row[d] += st.d_q_group[i * call.Dp + d];
      write_row<T>(u.storage, row, call.D, pass.d_query, (first + i) * call.D);
    }
  }

  // where the sum of a layer's dz goes: its bias's gradient, or the candidate's d c
  T* dz_sum(State& st, int layer) const { return layer ? st.waiting.bias[layer] : to_inputs ? st.d_c : nullptr; }

  // dz of layer `layer`, complete, is in st.dz: give its weight's gradient and go one layer down
  void step_down(State& st, int layer) const {
    Work<T>& work = st.work;
    const int H = call.H[layer], below = layer - 1, Hb = call.H[below];
    const T* z = work.z_panel(below);
    product<T>(work.ahead, work.size(), Hb, H, u.layer[layer].weight, Hb, st.dz, (int64_t)H * W, st.da, (int64_t)Hb * W, st.zero);
    const bool ends = pass.to == below;
    work.drop(below, st.da);
    call.act[below]->backward(work.ahead, call.params[below], {work.size(), work.n, work.counted, z, st.da, nullptr, ends ? pass.local_out + work.panel_at(below) : st.da,
                                                   nullptr, nullptr, ends ? nullptr : dz_sum(st, below),
                                                   pass.d_weight[layer] ? work.a[below] : nullptr, st.waiting.sums[below], nullptr, work.row_space});
    if (pass.d_weight[layer]) {
      work.drop(below, work.a[below]);
      Work<T>::panel_to_rows(work.a[below], Hb, work.vectors, call.Hp[below], st.a_rows);
      outer<T>(work.ahead, H, call.Hp[below], work.n, st.dz, (int64_t)H * W, st.a_rows, call.Hp[below], current->d_weight[layer], call.Hp[below]);
    }
    T* swap = st.dz;
    st.dz = st.da;
    st.da = swap;
  }
  Partial<T>* current;

  // dz of the last layer from the scores' gradient
  void from_scores(State& st, const T* z, const T* d_logit, bool ends) const {
    Work<T>& work = st.work;
    const int top = call.last;
    const int what = (st.waiting.sums[top] || st.waiting.score_weight ? kTakeSums : 0) | (ends ? 0 : kWriteDz);
    if (u.dropout == 0) {
      call.act[top]->backward_last[what](work.ahead, call.params[top], {work.size(), work.n, work.counted, z, d_logit, u.score_weight, st.dz, call.e0[top],
                                                            call.e1[top], dz_sum(st, top), nullptr, st.waiting.sums[top], st.waiting.score_weight, work.row_space});
      return;
    }
    // With dropout each activation has a gradient of its own, as below the other layers.
    const int H = call.H[top];
    for (int v = 0; v < work.vectors; v++) {
      const Vec<T> ds = load(d_logit + v * W);
      for (int h = 0; h < H; h++) store(st.da + ((int64_t)v * H + h) * W, ds * u.score_weight[h]);
    }
    work.drop(top, st.da);
    T* a = st.waiting.score_weight ? work.a[top] : nullptr;
    T* sum = ends ? nullptr : dz_sum(st, top);
    call.act[top]->backward(work.ahead, call.params[top], {work.size(), work.n, work.counted, z, st.da, nullptr, st.dz, nullptr, nullptr,
                                                  call.e0[top] ? nullptr : sum, a, st.waiting.sums[top], nullptr, work.row_space});
    if (a) {
      work.drop(top, a);
      for (int h = 0; h < H; h++) {
        Vec<T> s = {};
        for (int v = 0; v < work.vectors; v++) s += load(a + ((int64_t)v * H + h) * W) * load(d_logit + v * W);
        add_to<T>(st.waiting.score_weight + h * W, s);
      }
    }
    if (call.e0[top] && !ends)
      subtract_answer(call.params[top], call.e0[top], call.e1[top], work.vectors, Counted<T>(work.counted, work.n, work.vectors), z, st.dz, st.dz, sum);
  }

  void block(State& st) const {
    Work<T>& work = st.work;
    const int top = pass.from;
    if (work.seg.no_softmax_over && valid_only) {  // these rows do not go through the layers: all that is left is p g
      if (pass.local_out) __builtin_memset(pass.local_out + work.panel_at(pass.to), 0, sizeof(T) * work.vectors * call.H[pass.to] * W);
      if (!pass.d_history) return;
      __builtin_memset(st.dz, 0, sizeof(T) * work.vectors * call.H[0] * W);
      return history_gradient(st);
    }
    const T* z = work.z_panel(top);
    if (top == call.last) {
      const bool ends = pass.to == top;
      from_scores(st, z, pass.d_logit + work.seg.first_panel_row + work.block * W, ends);
      if (ends) return;
    } else {
      subtract_answer(call.params[top], call.e0[top], call.e1[top], work.vectors, Counted<T>(work.counted, work.n, work.vectors), z,
                      pass.local_in + work.panel_at(top), st.dz, dz_sum(st, top));
    }
    for (int i = top; i > 0 && i > pass.to; i--) step_down(st, i);
    if (!to_inputs) return;
    if (weights) {
      work.need_rows();
      outer<T>(work.ahead, call.H[0], call.Dp, work.n, st.dz, (int64_t)call.H[0] * W, work.rows, work.row_stride, st.d_m, call.Dp);
    }
    if (pass.d_history) history_gradient(st);
  }

  void chunk(Cut candidates, Partial<T>& part) {
    Scratch s;
    State st(*this, candidates, s);
    Work<T>& work = st.work;
    const Segment<T>& seg = work.seg;
    for (int64_t candidate = candidates.begin; candidate < candidates.end; candidate++) {
      const int64_t before = work.user;
      work.begin(candidate);
      if (st.d_user && (candidate == candidates.begin || work.user != before)) __builtin_memset(st.d_user, 0, sizeof(T) * seg.total * call.D);
      const int64_t size = work.block_size();
      load_gradient(st, candidate);
      if (pass.first) score_gradient(st, candidate, size, part);
      if (to_inputs) begin_inputs(st);
      for (int64_t v = 0; v < work.all_vectors(); v += size) {
        work.enter(v, size);
        work.look_ahead(size);
        block(st);
        if ((st.waiting.positions += work.n) >= kFlush) flush(st.waiting, part);
      }
      if (pass.local_out) work.clear_tail(pass.to, pass.local_out);
      if (!to_inputs) continue;
      if (pass.d_history) {
        const int64_t rest = element_size(u.storage, sizeof(T)) * call.D;
        if (!st.d_user)
          __builtin_memset(static_cast<char*>(pass.d_history) + (seg.history_row + seg.rows) * rest, 0, rest * (seg.total - seg.rows));
        else if (candidate + 1 == candidates.end || candidate + 1 >= u.candidate_offsets[work.user + 1])
          finish_user(st, part);
      }
      if (weights) finish_inputs(st, candidate, part);
    }
    flush(st.waiting, part);
  }
};

// d history of users whose candidates are in several chunks, in their order, and of those that have none.
template <class T> void finish_history(const Unit<T>& u, const Partial<T>* parts, int64_t chunks, const Cut* cuts, void* d_history) {
  const int64_t n = u.length * u.dim, size = element_size(u.storage, sizeof(T));
  for (int64_t user = 0; user < u.users; user++)
    if (u.candidate_offsets[user] == u.candidate_offsets[user + 1]) __builtin_memset(static_cast<char*>(d_history) + user * n * size, 0, n * size);
  int64_t user = 0;
  for (int64_t c = 0; c < chunks; c++) {
    T* sum = parts[c].tail;
    if (!sum) continue;
    while (u.candidate_offsets[user + 1] < cuts[c].end) user++;
    int64_t next = c;
    do {
      const T* more = parts[++next].head;
      for (int64_t i = 0; i < n; i++) sum[i] += more[i];
    } while (cuts[next].end < u.candidate_offsets[user + 1]);
    write_row<T>(u.storage, sum, n, d_history, user * n);
  }
}

// out[i][j] = sum over chunks, in order, in double
template <class Out, class P, class Get>
void merge(int64_t chunks, int rows, int columns, int64_t ld, Out* out, const P* parts, Get get) {
  if (!out) return;
  double sum[256];
  for (int i = 0; i < rows; i++)
    for (int j0 = 0; j0 < columns; j0 += 256) {
      const int n = imin(256, columns - j0);
      for (int j = 0; j < n; j++) sum[j] = 0;
      for (int64_t c = 0; c < chunks; c++) {
        const auto* p = get(parts[c]) + i * ld + j0;
        for (int j = 0; j < n; j++) sum[j] += (double)p[j];
      }
      for (int j = 0; j < n; j++) out[(int64_t)i * columns + j0 + j] = (Out)sum[j];
    }
}

// A cut between candidates moved up to where a user begins, so that no user's gradient has to be put together of parts.
template <class T> int64_t whole_users(const Unit<T>& u, int64_t candidate) {
  for (int64_t i = 0; i < u.users; i++)
    if (u.candidate_offsets[i] >= candidate) return u.candidate_offsets[i];
  return u.candidates;
}

template <class T> void backward(const Unit<T>& u, const BackwardPass<T>& pass, ParallelFor run) {
  Scratch scratch;
  const bool to_inputs = pass.to < 0;
  const Call<T> call(u, scratch, to_inputs);
  const int64_t chunks = imin(u.candidates, (int64_t)kMaxChunks);
  // the query's gradient needs d m as the weights' does
  const bool weights = pass.d_a_k || pass.d_query;
  Partial<T>* parts = scratch.take<Partial<T>>(chunks > 0 ? chunks : 1);
  Cut* cuts = scratch.take<Cut>(chunks > 0 ? chunks : 1);
  bool valid_only = false;
  for (int i = 0; i < u.layers; i++) valid_only = valid_only || (u.layer[i].response && !u.pads_are_input);
  const Backward<T> blank{u, pass, call, to_inputs, weights, valid_only, nullptr};
  for (int64_t c = 0; c < chunks; c++) {
    cuts[c] = cut(u.candidates, chunks, c);
    if (u.candidate_offsets && u.users >= chunks) cuts[c] = {whole_users(u, cuts[c].begin), whole_users(u, cuts[c].end)};
    parts[c] = blank.new_partial(cuts[c], scratch);
  }
  parallel(run, chunks, uneven(u), [&](int64_t c) {
    Backward<T> b{u, pass, call, to_inputs, weights, valid_only, &parts[c]};
    b.chunk(cuts[c], parts[c]);
  });
  if (pass.d_history && u.candidate_offsets) finish_history(u, parts, chunks, cuts, pass.d_history);
  using P = Partial<T>;
  const int H0 = call.H[0], D = call.D, Dp = call.Dp;
  if (to_inputs) {
    merge(chunks, H0, D, Dp, pass.d_a_q, parts, [](const P& p) { return p.d_a_q; });
    merge(chunks, H0, D, Dp, pass.d_a_k, parts, [](const P& p) { return p.d_a_k; });
    merge(chunks, H0, D, Dp, pass.d_a_p, parts, [](const P& p) { return p.d_a_p; });
  }
  for (int i = 0; i <= call.last; i++) {
    if (i) merge(chunks, call.H[i], call.H[i - 1], call.Hp[i - 1], pass.d_weight[i], parts, [i](const P& p) { return p.d_weight[i]; });
    merge(chunks, 1, call.H[i], call.H[i], pass.d_bias[i], parts, [i](const P& p) { return p.d_bias[i]; });
    merge(chunks, kSums, call.H[i], call.H[i], pass.sums[i], parts, [i](const P& p) { return p.sums[i]; });
  }
  merge(chunks, 1, call.H[call.last], call.H[call.last], pass.d_score_weight, parts, [](const P& p) { return p.d_score_weight; });
  merge(chunks, 1, u.score_activation == kScorePrelu ? 2 : 1, 2, pass.d_score_bias, parts, [](const P& p) { return p.d_score_bias; });
}

}  // namespace

#define DIN_FAST_STRING_(x) #x
#define DIN_FAST_STRING(x) DIN_FAST_STRING_(x)
static const InstructionSet kSet = {
    DIN_FAST_STRING(DIN_FAST_GETTER),
    {moments<float>, forward<float>, backward<float>},
    {moments<double>, forward<double>, backward<double>},
};
}  // namespace DIN_FAST_ISA

const InstructionSet* DIN_FAST_GETTER() { return &DIN_FAST_ISA::kSet; }
}  // namespace din_fast

// How fast this machine multiplies and adds floats with nothing else to do, and how fast it is at Dice: ./peak THREADS
// Prints one line: clock (GHz a thread), GFLOP/s of all threads with vectors of 8 floats, and of 16, and 10^9 Dice a second of
// all threads, with the kernel's own sigmoid on vectors of the largest size there is.
// Each repetition runs all threads at once. Of the operations the best repetition is told, of the clock the fastest thread.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../csrc/unit.h"

#if defined(__AVX512DQ__)
#define DIN_FAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DIN_FAST_VECTOR_BYTES 32
#else
#define DIN_FAST_VECTOR_BYTES 16
#endif
namespace din_fast {
namespace {
#include "../csrc/cpu/vector.h"
}  // namespace
}  // namespace din_fast

namespace {

constexpr int CHAINS = 12;  // a latency of 4 cycles times 2 units is 8; 12 and two operands fit into 16 registers
constexpr double SECONDS = 0.002;  // below what a scheduler gives at a time, so that some repetitions are undisturbed
constexpr int REPETITIONS = 150;

using Clock = std::chrono::steady_clock;
typedef float Vector8 __attribute__((vector_size(32)));
typedef float Vector16 __attribute__((vector_size(64)));

// CHAINS independent chains of fused multiply-adds in registers, `turns` long: the operations that were done.
template <class Vector>
double multiply_add(long turns) {
  Vector sums[CHAINS], factor, step;
  volatile float factor_now = 0.999f, step_now = 0.001f;  // not known to the compiler; the sums stay near 1
  factor = factor_now - Vector{};
  step = step_now - Vector{};
  for (int c = 0; c < CHAINS; ++c) sums[c] = step * float(c);
  for (long t = 0; t < turns; ++t) {
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; ++c) sums[c] = sums[c] * factor + step;
  }
  Vector all{};
  for (int c = 0; c < CHAINS; ++c) all += sums[c];
  volatile float kept = all[0];
  (void)kept;
  return 2.0 * (sizeof(Vector) / sizeof(float)) * CHAINS * double(turns);
}

// A chain of integer additions, each of which needs the one before and takes a cycle: the cycles.
double add(long turns) {
  volatile long step_now = 3;
  long sum = 0, step = step_now;
  for (long t = 0; t < turns; ++t) {
#pragma GCC unroll 64
    for (int i = 0; i < 64; ++i) {
      sum += step;
      asm volatile("" : "+r"(sum));  // else they would become one
    }
  }
  return 64.0 * double(turns);
}

// The score of a layer of UNITS hidden units with Dice, for four vectors of positions whose z are in the cache: the
// activations.
double dice(long turns) {
  using namespace din_fast;
  constexpr int UNITS = 64, W = kLanes<float>, VECTORS = 4;
  alignas(64) static thread_local float z[VECTORS * UNITS * W], score[VECTORS * W];
  volatile float now = 0.3f;
  float center[UNITS], scale[UNITS], shift[UNITS], open[UNITS], slope[UNITS];
  for (int h = 0; h < UNITS; ++h) center[h] = slope[h] = now, scale[h] = open[h] = shift[h] = now + 0.01f * float(h);
  for (int i = 0; i < VECTORS * UNITS * W; ++i) z[i] = float(i % 17) * now - 2.f;
  for (long t = 0; t < turns; ++t) {
    Vec<float> sum[VECTORS] = {};
    for (int h = 0; h < UNITS; ++h)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const Vec<float> x = load(z + (v * UNITS + h) * W);
        sum[v] += x * (sigmoid_<float>((x - center[h]) * scale[h] + shift[h]) * open[h] + slope[h]);
      }
    for (int v = 0; v < VECTORS; ++v) store(score + v * W, sum[v]);
    asm volatile("" ::"r"(score) : "memory");
  }
  return double(turns) * VECTORS * UNITS * W;
}

struct Rate {
  double all = 0, one = 0;
};

// b = factor a, each thread over arrays of its own that are larger than caches: the bytes read, written, and read because
// they are to be written.
constexpr long ARRAY = 1 << 24, PIECE = 1 << 14;  // floats: 64 MiB, and what is done a turn
std::vector<float> arrays;
std::atomic<long> streams{0};
double stream(long turns) {
  const long threads = long(arrays.size() / (2 * ARRAY)), mine = streams++ % threads;
  float *from = arrays.data() + 2 * mine * ARRAY, *to = from + ARRAY;
  volatile float now = 0.5f;
  const float factor = now;
  for (long t = 0; t < turns; ++t) {
    const long at = t * PIECE % ARRAY;
    for (long i = at; i < at + PIECE; ++i) to[i] = factor * from[i];
  }
  return 3.0 * sizeof(float) * PIECE * double(turns);
}

// Units of work a nanosecond: of all threads together, and of the fastest.
Rate rate(double (*work)(long), int threads) {
  long turns = 100;
  for (;;) {  // long enough for the clock
    auto begin = Clock::now();
    work(turns);
    double took = std::chrono::duration<double>(Clock::now() - begin).count();
    if (took >= SECONDS) break;
    turns = std::max(2 * turns, long(double(turns) * 1.1 * SECONDS / std::max(took, 1e-6)));
  }
  Rate best;
  for (int r = 0; r < REPETITIONS; ++r) {
    std::atomic<int> ready{0};
    std::vector<double> rates(threads);
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i)
      running.emplace_back([&, i] {
        ++ready;
        while (ready < threads) std::this_thread::yield();
        auto begin = Clock::now();
        double done = work(turns);
        rates[i] = done / std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
      });
    for (auto& t : running) t.join();
    double sum = 0;
    for (double x : rates) sum += x;
    best.all = std::max(best.all, sum);
    best.one = std::max(best.one, *std::max_element(rates.begin(), rates.end()));
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  double cycles = rate(add, threads).one;
  double of_8 = rate(multiply_add<Vector8>, threads).all, of_16 = rate(multiply_add<Vector16>, threads).all;
  arrays.assign(2 * ARRAY * threads, 1.f);
  std::printf("%.6g %.6g %.6g %.6g %.6g\n", cycles, of_8, of_16, rate(dice, threads).all, rate(stream, threads).all);
}

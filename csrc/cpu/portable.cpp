// The kernel for any processor: vectors of 16 bytes, as SSE2 and NEON have them.
#include "../unit.h"

#define DIN_FAST_ISA portable_set
#define DIN_FAST_GETTER portable
#define DIN_FAST_VECTOR_BYTES 16
#if defined(__aarch64__)
// 32 registers: 24 accumulators, at most 3 vectors of the other factor, one for its scalars. GCC schedules loads before it
// hands out registers, far enough ahead to need more than that, and then stores accumulators in the innermost loops. It does
// not do so on x86, and a processor that executes out of order needs no such help.
#pragma GCC optimize("no-schedule-insns")
#define DIN_FAST_ACCUMULATORS 24
#else
#define DIN_FAST_ACCUMULATORS 12
#endif
#include "kernel.h"

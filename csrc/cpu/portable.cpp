// The kernel for any processor: vectors of 16 bytes, as SSE2 and NEON have them.
#include "../unit.h"

#define DIN_FAST_ISA portable_set
#define DIN_FAST_GETTER portable
#define DIN_FAST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define DIN_FAST_ACCUMULATORS 24
#else
#define DIN_FAST_ACCUMULATORS 12
#endif
#include "kernel.h"

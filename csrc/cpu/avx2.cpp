// The kernel for AVX2. The target is set here and not by a compiler flag, so that all files have the same flags.
#include "../unit.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define DIN_FAST_ISA avx2_set
#define DIN_FAST_GETTER avx2
#define DIN_FAST_VECTOR_BYTES 32
#define DIN_FAST_ACCUMULATORS 12
#include "kernel.h"
#else
const din_fast::InstructionSet* din_fast::avx2() { return nullptr; }
#endif

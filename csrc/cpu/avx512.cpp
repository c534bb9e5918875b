// The kernel for AVX512. The target is set here and not by a compiler flag, so that all files have the same flags.
#include "../unit.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define DIN_FAST_ISA avx512_set
#define DIN_FAST_GETTER avx512
#define DIN_FAST_VECTOR_BYTES 64
#define DIN_FAST_ACCUMULATORS 24
#include "kernel.h"
#else
const din_fast::InstructionSet* din_fast::avx512() { return nullptr; }
#endif

/* What the files of the extension share: the vector instructions that they are compiled for, float types, parallel loops.
 *
 * Every function works on plain pointers whose shapes Python has checked. Loops are written so that the compiler turns
 * them into vectors of eight; where the order of a sum matters, it is written out. */
#ifndef OTTAVA_NATIVE_H
#define OTTAVA_NATIVE_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Compiled for AVX2 whatever the machine that compiles; Python asks `is_supported` before it calls anything. A file that
 * defines OTTAVA_AVX512 compiles another one once more, for processors with that: the same results, in vectors of 16. */
#if !defined(OTTAVA_AVX512)
#define VECTOR_TARGETS "avx2,fma"
#elif defined(__clang__)
#define VECTOR_TARGETS "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#else
#define VECTOR_TARGETS "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#endif
#define VECTOR __attribute__((target(VECTOR_TARGETS)))
#define INLINE static inline __attribute__((always_inline, target(VECTOR_TARGETS)))

enum dtype { FLOAT32, BFLOAT16, INT8 /* of caches alone */ };

typedef void (*body)(int64_t begin, int64_t end, void *task);

/* Call body over pieces of 0..size that hold at least `grain` each, on torch's threads. */
void parallel_for(int64_t size, int64_t grain, body body, void *task);

/* torch's own `torch_parallel_for`, or NULL for one thread. */
void use_threads(void *torch_parallel_for);

INLINE float of_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* To nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

INLINE void read_floats(float *restrict out, const void *restrict in, int64_t dtype, int64_t n) {
    if (dtype == FLOAT32) {
        memcpy(out, in, n * sizeof(float));
    } else {
        const uint16_t *bits = in;
        for (int64_t i = 0; i < n; i++) out[i] = of_bfloat16(bits[i]);
    }
}

INLINE void write_floats(void *restrict out, const float *restrict in, int64_t dtype, int64_t n) {
    if (dtype == FLOAT32) {
        memcpy(out, in, n * sizeof(float));
    } else {
        uint16_t *bits = out;
        for (int64_t i = 0; i < n; i++) bits[i] = to_bfloat16(in[i]);
    }
}

INLINE int64_t size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

#endif

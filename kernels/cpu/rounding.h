/* Rounding to int8 codes; see kernels/reference/common.py. */
#ifndef OTTAVA_ROUNDING_H
#define OTTAVA_ROUNDING_H

#include "exponential.h"
#include "native.h"

#define CODE_MAX 127.0f
#define TINY 0x1p-100f

/* The largest magnitude, and NaN if there is one: as bits without a sign NaN is above every number. */
INLINE float absmax_of(const float *restrict x, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    float value;
    memcpy(&value, &largest, 4);
    return value;
}

/* By a given scale; least is -127 or -128. */
INLINE void round_row(int8_t *restrict codes, const float *restrict x, float scale, float least, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float code = x[i] / scale;
        code = code < least ? least : code;
        code = code > CODE_MAX ? CODE_MAX : code;
        codes[i] = (int8_t)(int32_t)((code + ROUNDER) - ROUNDER);
    }
}

/* By its own scale, which is returned. */
INLINE float quantize_row(int8_t *restrict codes, const float *restrict x, int64_t n) {
    float absmax = absmax_of(x, n);
    if (absmax < TINY) {
        for (int64_t i = 0; i < n; i++) codes[i] = 0;
        return 1.0f;
    }
    float scale = absmax / CODE_MAX;
    round_row(codes, x, scale, -CODE_MAX, n);
    return scale;
}

#endif

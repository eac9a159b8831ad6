#ifndef OTTAVA_EXPONENTIAL_H
#define OTTAVA_EXPONENTIAL_H

#include "native.h"

/* Adding and subtracting 1.5 * 2^23 rounds what is below 2^22 to the nearest integer, ties to even. */
#define ROUNDER 12582912.0f

/* e^x within 2 ulp for x in -87..88, beyond as at the ends; NaN stays NaN. x = n ln 2 + r, e^r by the polynomial of
 * Cephes' expf. ln 2 in two parts, of which n times the first is exact. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + ROUNDER) - ROUNDER;
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return (p * r * r + r + 1.0f) * power;
}

/* gate becomes silu(gate) * up; `powers` has room for n. In two loops: in one, GCC divides every element also by what e^x
 * is beyond its ends, and such a quotient is subnormal, which takes six times as long as all the rest. */
INLINE void gate_row(float *restrict gate, const float *restrict up, float *restrict powers, int64_t n) {
    for (int64_t i = 0; i < n; i++) powers[i] = exponential(-gate[i]);
    for (int64_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + powers[i]) * up[i];
}

#endif

#ifndef OTTAVA_SUMS_H
#define OTTAVA_SUMS_H

#include "native.h"

/* What is found over a row, in eight parts and then over these, in an order that follows from the length alone. */
enum { PARTS = 8 };

INLINE float sum_of_parts(__m256 parts) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(parts), _mm256_extractf128_ps(parts, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    __m256 parts = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS) parts = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), parts);
    float sum = sum_of_parts(parts);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* x becomes x / sqrt(mean x^2 + eps) * weight. */
INLINE void norm(float *restrict x, const float *restrict weight, float eps, int64_t n) {
    float inverse = 1.0f / __builtin_sqrtf(dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) x[i] = x[i] * inverse * weight[i];
}

INLINE float sum_of(const float *x, int64_t n) {
    __m256 parts = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS) parts = _mm256_add_ps(parts, _mm256_loadu_ps(x + i));
    float sum = sum_of_parts(parts);
    for (; i < n; i++) sum += x[i];
    return sum;
}

/* NaN may get lost. */
INLINE float largest_of(const float *x, int64_t n) {
    float largest = x[0];
    int64_t i = 0;
    if (n >= PARTS) {
        __m256 parts = _mm256_loadu_ps(x);
        for (; i + PARTS <= n; i += PARTS) parts = _mm256_max_ps(parts, _mm256_loadu_ps(x + i));
        float each[PARTS];
        _mm256_storeu_ps(each, parts);
        for (int part = 0; part < PARTS; part++) largest = each[part] > largest ? each[part] : largest;
    }
    for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

#endif

/* What a Linear makes of its int32 sums. */
#ifndef OTTAVA_EPILOGUE_H
#define OTTAVA_EPILOGUE_H

#include "rows.h"

/* That of the rows from `row` on. */
INLINE struct epilogue epilogue_from(struct epilogue all, int64_t row) {
    all.x_scale += row * all.x_stride;
    if (all.residual != NULL)
        all.residual = (const char *)all.residual + row * all.num_columns * size_of(all.residual_dtype);
    return all;
}

/* y = sums * weight_scale * x_scale, for columns begin .. begin + n of row r. */
INLINE void scaled(float *restrict y, const int32_t *restrict sums, const struct epilogue *from, int64_t r,
                   int64_t begin, int64_t n) {
    float x_scale = from->x_scale[r * from->x_stride];
    if (from->weight_stride) {
        const float *restrict weight_scale = from->weight_scale + begin;
        for (int64_t i = 0; i < n; i++) y[i] = (float)sums[i] * weight_scale[i] * x_scale;
    } else {
        float weight_scale = from->weight_scale[0];
        for (int64_t i = 0; i < n; i++) y[i] = (float)sums[i] * weight_scale * x_scale;
    }
}

INLINE void add_floats(float *restrict y, const void *added, int64_t dtype, int64_t begin, int64_t n) {
    if (dtype == FLOAT32) {
        const float *restrict values = (const float *)added + begin;
        for (int64_t i = 0; i < n; i++) y[i] += values[i];
    } else {
        const uint16_t *restrict values = (const uint16_t *)added + begin;
        for (int64_t i = 0; i < n; i++) y[i] += of_bfloat16(values[i]);
    }
}

/* The results of these columns, to their place in out [num_rows, num_columns]; y has room for n. */
INLINE void finish_some(float *restrict y, const int32_t *restrict sums, const struct epilogue *from, int64_t r,
                        int64_t begin, int64_t n, void *out, int64_t dtype) {
    int64_t at = r * from->num_columns + begin;
    scaled(y, sums, from, r, begin, n);
    if (from->bias != NULL) add_floats(y, from->bias, from->bias_dtype, begin, n);
    if (from->residual != NULL) add_floats(y, from->residual, from->residual_dtype, at, n);
    write_floats((char *)out + at * size_of(dtype), y, dtype, n);
}

#endif

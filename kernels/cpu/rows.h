/* Ops on rows: norm, quantization, and the epilogues of the int8 products. See kernels/reference for their equations. */
#ifndef OTTAVA_ROWS_H
#define OTTAVA_ROWS_H

#include "native.h"

/* Where rows of results go: as floats of `dtype` to `out`, or as codes with `scale`, which is one float per row, found,
 * or with is_static one given for all. */
struct target {
    void *out;
    int64_t dtype;
    int8_t *codes;
    float *scale;
    int64_t is_static;
};

/* The epilogue of an int8 product. Strides are 0 for one scale and 1 for one per row or column; null for none. */
struct epilogue {
    const int32_t *acc;
    const float *x_scale, *weight_scale;
    int64_t x_stride, weight_stride;
    const void *bias, *residual;
    int64_t bias_dtype, residual_dtype, num_rows, num_columns;
};

/* Each returns -1 if there is no memory, else 0. */
struct row_ops {
    int (*quantize)(const void *x, int64_t dtype, int64_t stride, int64_t num_rows, int64_t width, struct target to);
    int (*rms_norm)(const void *x, const void *residual, void *summed, int64_t dtype, const void *weight,
                    int64_t weight_dtype, float eps, int64_t num_rows, int64_t width, struct target to);
    int (*finish)(struct epilogue from, struct target to);
    /* Columns are pairs of gate and up; results are rounded to to.dtype even if they become codes. */
    int (*finish_gated)(struct epilogue from, struct target to);
    int (*silu_mul)(const void *gate_up, int64_t dtype, int64_t num_rows, int64_t width, struct target to);
};

extern const struct row_ops rows_avx2, rows_avx512;

#endif

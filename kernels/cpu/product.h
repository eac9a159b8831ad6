#ifndef OTTAVA_PRODUCT_H
#define OTTAVA_PRODUCT_H

#include "rows.h"

/* Most rows that int8_product does not pack weights for: on two cores of an EPYC with AVX2 all products of the demo model
 * take 9.5, 17.7, 20.9 and 29.5 ms for 4, 8, 12 and 16 rows without, and 13.3, 19.5, 20.7 and 26.8 with. */
enum { FEW_ROWS = 8 };

/* acc [rows, columns] int32 = x [rows, depth] weight [columns, depth]^T, exact for every int8 and a depth of up to
 * 131,071. The strides are of rows; the depth is contiguous in both. -1 if there is no memory, else 0. */
int int8_product(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                 int64_t depth, int64_t x_stride, int64_t weight_stride);

/* The same in the way for more than a few rows, and a Linear over it: as int8_linear_amx. */
int int8_product_packed(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                        int64_t depth, int64_t x_stride, int64_t weight_stride);
int int8_linear_packed(const int8_t *x, const int8_t *weight, int64_t depth, int64_t x_stride, int64_t weight_stride,
                       struct epilogue from, void *out, int64_t out_dtype);

/* Whether the processor has AVX-512 VNNI, and the compiler knew it. */
int has_vnni(void);

/* The same with these instructions. */
int int8_product_vnni(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                      int64_t depth, int64_t x_stride, int64_t weight_stride);

/* Whether the processor has AMX for int8, the kernel lets this process use it, and the compiler knew it. */
int has_amx(void);

/* The same with its instructions. */
int int8_product_amx(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                     int64_t depth, int64_t x_stride, int64_t weight_stride);

/* A Linear with these instructions, with the bits of a product and `finish`; its sums are in no memory. from.acc is not
 * read. Only where has_amx() is true. */
int int8_linear_amx(const int8_t *x, const int8_t *weight, int64_t depth, int64_t x_stride, int64_t weight_stride,
                    struct epilogue from, void *out, int64_t out_dtype);

#endif

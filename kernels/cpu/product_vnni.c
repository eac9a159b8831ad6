/* int8 by int8, exact sums in int32, of few rows on processors with AVX-512 VNNI.
 *
 * An instruction multiplies 64 unsigned by signed bytes and adds neighbouring fours to 16 sums. So 128 is added to each
 * code of x, and 128 times the sum of the column's weights taken off at the end; sums may wrap around in between.
 * torch's product packs the weights anew at each call, which is most of its time where there are few rows. */
#include "product.h"

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 8)

int has_vnni(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

#define DOTS __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE_DOTS static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512vnni")))

enum { LANES = 64, ROWS = 4, COLUMNS = 4, COLUMNS_AT_ONCE = 16 };

struct product {
    const uint8_t *x;
    const int8_t *weight;
    int32_t *acc;
    int64_t num_rows, num_columns, depth, x_stride, weight_stride;
};

/* The sums over the lanes of each of four vectors. */
INLINE_DOTS __m128i sums_of(const __m512i *parts) {
    __m256i halves[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++)
        halves[c] = _mm256_add_epi32(_mm512_castsi512_si256(parts[c]), _mm512_extracti64x4_epi64(parts[c], 1));
    __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(halves[0], halves[1]), _mm256_hadd_epi32(halves[2], halves[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

/* acc[r, c] = sum_k (x[r, k] - 128) * weight[c, k] for `rows` x `columns` sums; past the depth weights are read as 0.
 * excess: 128 sum_k weight[c, k], found with the first rows. The weights of columns further on are asked for meanwhile:
 * all products of a small model take 3.7 ms for one row instead of 7.8, as the memory would idle otherwise. */
INLINE_DOTS void tile(const struct product *p, int64_t r, const int rows, int64_t first, int columns, __m128i *excess,
                      const int is_first) {
    const uint8_t *x = p->x + r * p->x_stride;
    const int8_t *weight = p->weight + first * p->weight_stride;
    /* Each rows' tile asks for some of them. */
    int parts = p->num_rows < 2 * ROWS ? 1 : p->num_rows < COLUMNS * ROWS ? 2 : COLUMNS, part = (int)(r / ROWS);
    int64_t left_ahead = p->num_columns - first - COLUMNS_AT_ONCE;
    int stop = left_ahead <= 0 || part >= parts ? 0 : left_ahead < COLUMNS ? (int)left_ahead : COLUMNS;
    const int8_t *ahead = stop > 0 ? weight + COLUMNS_AT_ONCE * p->weight_stride : NULL;
    const __m512i all_128 = _mm512_set1_epi8((char)128);
    __m512i sums[ROWS][COLUMNS], of_128[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) {
        of_128[c] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) sums[row][c] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < p->depth; k += LANES) {
        int64_t left = p->depth - k;
        __mmask64 here = left < LANES ? ((__mmask64)1 << left) - 1 : ~(__mmask64)0;
        __m512i x_k[ROWS];
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) x_k[row] = _mm512_loadu_si512(x + row * p->x_stride + k);
        for (int c = part; c < stop; c += parts) _mm_prefetch((const char *)ahead + c * p->weight_stride + k, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) {
            /* Beyond the last column the first one is read again. */
            const int8_t *from = weight + (c < columns ? c : 0) * p->weight_stride + k;
            __m512i weight_k = _mm512_maskz_loadu_epi8(here, from);
            if (is_first) of_128[c] = _mm512_dpbusd_epi32(of_128[c], all_128, weight_k);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) sums[row][c] = _mm512_dpbusd_epi32(sums[row][c], x_k[row], weight_k);
        }
    }
    if (is_first) *excess = sums_of(of_128);
    __mmask8 there = (__mmask8)((1 << columns) - 1);
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
        _mm_mask_storeu_epi32(p->acc + (r + row) * p->num_columns + first, there,
                              _mm_sub_epi32(sums_of(sums[row]), *excess));
}

/* All rows for up to COLUMNS columns, whose weights stay in the first cache. */
INLINE_DOTS void rows_of(const struct product *p, int64_t first, int columns) {
    __m128i excess;
    switch (p->num_rows) {
    case 1:
        tile(p, 0, 1, first, columns, &excess, 1);
        return;
    case 2:
        tile(p, 0, 2, first, columns, &excess, 1);
        return;
    case 3:
        tile(p, 0, 3, first, columns, &excess, 1);
        return;
    }
    tile(p, 0, ROWS, first, columns, &excess, 1);
    int64_t r = ROWS;
    for (; r + ROWS <= p->num_rows; r += ROWS) tile(p, r, ROWS, first, columns, &excess, 0);
    for (; r < p->num_rows; r++) tile(p, r, 1, first, columns, &excess, 0);
}

/* Columns in groups of COLUMNS_AT_ONCE. */
DOTS static void multiply(int64_t begin, int64_t end, void *task) {
    const struct product *p = task;
    int64_t last = end * COLUMNS_AT_ONCE < p->num_columns ? end * COLUMNS_AT_ONCE : p->num_columns;
    for (int64_t group = begin * COLUMNS_AT_ONCE; group < last; group += COLUMNS_AT_ONCE) {
        int64_t stop = group + COLUMNS_AT_ONCE < last ? group + COLUMNS_AT_ONCE : last;
        for (int64_t first = group; first < stop; first += COLUMNS) {
            int columns = stop - first < COLUMNS ? (int)(stop - first) : COLUMNS;
            rows_of(p, first, columns);
        }
    }
}

int int8_product_vnni(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                      int64_t depth, int64_t x_stride, int64_t weight_stride) {
    if (num_rows == 0) return 0;
    /* Whole vectors are read of each row. */
    int64_t stride = (depth + LANES - 1) / LANES * LANES;
    uint8_t *shifted = calloc((size_t)(num_rows * stride + 1), 1);
    if (shifted == NULL) return -1;
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t k = 0; k < depth; k++) shifted[r * stride + k] = (uint8_t)x[r * x_stride + k] ^ 128;
    struct product task = {shifted, weight, acc, num_rows, num_columns, depth, stride, weight_stride};
    int64_t groups = (num_columns + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
    parallel_for(groups, 1 + (1 << 19) / (COLUMNS_AT_ONCE * num_rows * (depth + 1)), multiply, &task);
    free(shifted);
    return 0;
}

#else /* the compiler does not know the instructions */

int has_vnni(void) { return 0; }

int int8_product_vnni(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                      int64_t depth, int64_t x_stride, int64_t weight_stride) {
    return int8_product(x, weight, acc, num_rows, num_columns, depth, x_stride, weight_stride);
}

#endif

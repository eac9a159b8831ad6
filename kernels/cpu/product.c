/* int8 by int8, exact sums in int32, for processors without instructions of their own for it; product_packed.c has more
 * than a few rows.
 *
 * Sixteen codes are widened to int16, multiplied and added in pairs (vpmaddwd). The other way, unsigned by signed bytes
 * (vpmaddubsw), needs no widening but saturates its sums of pairs. */
#include "product.h"

enum { LANES = 16, ROWS = 4, COLUMNS_AT_ONCE = 16, DEPTH_AT_ONCE = 1024 };

/* acc[r, c] (+)= sum_k x[r, k] * weight[c, k] for `rows` x `columns` sums in registers; depth a multiple of LANES.
 * ahead: weights of later columns to ask for meanwhile, or null: the memory would otherwise idle. */
INLINE void tile(const int16_t *x, int64_t x_stride, const int8_t *weight, int64_t weight_stride, int64_t depth,
                 int32_t *acc, int64_t acc_stride, const int rows, const int columns, int is_first, const int8_t *ahead) {
    __m256i sums[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) sums[r][c] = _mm256_setzero_si256();
    for (int64_t k = 0; k < depth; k += LANES) {
        if (ahead != NULL && k % 64 == 0)
            for (int c = 0; c < columns; c++) _mm_prefetch((const char *)ahead + c * weight_stride + k, _MM_HINT_T0);
        __m256i x_k[4];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) x_k[r] = _mm256_loadu_si256((const __m256i *)(x + r * x_stride + k));
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            __m256i weight_k =
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(weight + c * weight_stride + k)));
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(x_k[r], weight_k));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums[r][c]), _mm256_extracti128_si256(sums[r][c], 1));
            half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
            half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
            int32_t *at = acc + r * acc_stride + c;
            *at = (is_first ? 0 : *at) + _mm_cvtsi128_si32(half);
        }
}

struct product {
    const int8_t *x, *weight;
    int32_t *acc;
    int16_t *wide;
    int64_t num_rows, num_columns, depth, x_stride, weight_stride;
};

VECTOR static void widen(int64_t begin, int64_t end, void *task) {
    const struct product *p = task;
    for (int64_t r = begin; r < end; r++) {
        const int8_t *restrict from = p->x + r * p->x_stride;
        int16_t *restrict to = p->wide + r * p->depth;
        for (int64_t k = 0; k < p->depth; k++) to[k] = from[k];
    }
}

/* The sums of `rows` rows from r on for columns first .. stop, over one slice of the depth. Meanwhile they ask for their
 * share of the next COLUMNS_AT_ONCE columns. */
INLINE void multiply_rows(const struct product *p, int64_t r, const int rows, int64_t first, int64_t stop, int64_t k,
                          int64_t depth) {
    const int columns = rows == 1 ? 4 : 2;
    const int16_t *x = p->wide + r * p->depth + k;
    const int8_t *weight = p->weight + k;
    int32_t *acc = p->acc + r * p->num_columns;
    int64_t stride = p->weight_stride, whole = depth / LANES * LANES, n = first;
    int64_t parts = (p->num_rows + ROWS - 1) / ROWS, part = r / ROWS;
    for (; n + columns <= stop; n += columns) {
        int64_t later = n + COLUMNS_AT_ONCE;
        int asks = later + columns <= p->num_columns && (n - first) / columns % parts == part;
        /* Twice, so that the loop of those that do not ask has no branch. */
        if (asks)
            tile(x, p->depth, weight + n * stride, stride, whole, acc + n, p->num_columns, rows, columns, k == 0,
                 weight + later * stride);
        else
            tile(x, p->depth, weight + n * stride, stride, whole, acc + n, p->num_columns, rows, columns, k == 0, NULL);
    }
    for (; n < stop; n++)
        tile(x, p->depth, weight + n * stride, stride, whole, acc + n, p->num_columns, rows, 1, k == 0, NULL);
    if (whole == depth) return;
    for (int row = 0; row < rows; row++)
        for (n = first; n < stop; n++)
            for (int64_t j = whole; j < depth; j++)
                acc[row * p->num_columns + n] += (int32_t)x[row * p->depth + j] * weight[n * stride + j];
}

/* Sums of all rows for columns in groups of COLUMNS_AT_ONCE, whose weights of one slice of the depth stay in the first
 * cache. Rows of one tile read their weights once and have no use for slices. */
VECTOR static void multiply(int64_t begin, int64_t end, void *task) {
    const struct product *p = task;
    int64_t depth_at_once = p->num_rows <= ROWS ? p->depth : DEPTH_AT_ONCE;
    int64_t last = end * COLUMNS_AT_ONCE < p->num_columns ? end * COLUMNS_AT_ONCE : p->num_columns;
    for (int64_t first = begin * COLUMNS_AT_ONCE; first < last; first += COLUMNS_AT_ONCE) {
        int64_t stop = first + COLUMNS_AT_ONCE < last ? first + COLUMNS_AT_ONCE : last;
        for (int64_t k = 0; k < p->depth; k += depth_at_once) {
            int64_t depth = p->depth - k < depth_at_once ? p->depth - k : depth_at_once;
            for (int64_t r = 0; r < p->num_rows; r += ROWS) {
                switch (p->num_rows - r) {
                case 1:
                    multiply_rows(p, r, 1, first, stop, k, depth);
                    break;
                case 2:
                    multiply_rows(p, r, 2, first, stop, k, depth);
                    break;
                case 3:
                    multiply_rows(p, r, 3, first, stop, k, depth);
                    break;
                default:
                    multiply_rows(p, r, ROWS, first, stop, k, depth);
                }
            }
        }
    }
}

int int8_product(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                 int64_t depth, int64_t x_stride, int64_t weight_stride) {
    if (depth == 0) memset(acc, 0, num_rows * num_columns * sizeof *acc);
    if (num_rows > FEW_ROWS)
        return int8_product_packed(x, weight, acc, num_rows, num_columns, depth, x_stride, weight_stride);
    int16_t *wide = malloc((size_t)(num_rows * depth + 1) * sizeof *wide);
    if (wide == NULL) return -1;
    struct product task = {x, weight, acc, wide, num_rows, num_columns, depth, x_stride, weight_stride};
    parallel_for(num_rows, 1 + (1 << 18) / (depth + 1), widen, &task);
    int64_t groups = (num_columns + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
    parallel_for(groups, 1 + (1 << 18) / (COLUMNS_AT_ONCE * (num_rows + 1) * (depth + 1)), multiply, &task);
    free(wide);
    return 0;
}

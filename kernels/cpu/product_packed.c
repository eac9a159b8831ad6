/* int8 by int8, exact sums in int32, and Linears over them, of more than a few rows with AVX2.
 *
 * Weights are widened to int16 once for a block of rows, to a panel of 16 columns that stays in the first cache, and x
 * once for all columns. Two codes of a row of x, in every lane, meet the same two of each of eight columns (vpmaddwd), so
 * that a lane is a sum, and none are added up across lanes. */
#include "epilogue.h"
#include "product.h"

enum { LANES = 16, ROWS = 4, COLUMNS = 16, LINE = 64, ROWS_AT_ONCE = 128, DEPTH_AT_ONCE = 768 };

/* linear: what becomes of the sums; null: they go to acc. */
struct product {
    const int8_t *x, *weight;
    int16_t *wide;
    int32_t *acc;
    int64_t num_rows, num_columns, depth, x_stride, weight_stride, wide_stride;
    const struct epilogue *linear;
    void *out;
    int64_t out_dtype;
};

/* Of codes those at even places, and those at odd ones, as int16. */
INLINE __m256i evens_of(__m256i codes) { return _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8); }
INLINE __m256i odds_of(__m256i codes) { return _mm256_srai_epi16(codes, 8); }

/* LANES codes, zeros from `left` on. */
INLINE __m128i read_codes(const int8_t *from, int64_t left) {
    if (left >= LANES) return _mm_loadu_si128((const __m128i *)from);
    int8_t codes[LANES] = {0};
    if (left > 0) memcpy(codes, from, (size_t)left);
    return _mm_loadu_si128((const __m128i *)codes);
}

/* Of each four codes the two at even places, then the others, as `pack` has them. */
VECTOR static void widen(int64_t begin, int64_t end, void *task) {
    const struct product *p = task;
    for (int64_t r = begin; r < end; r++) {
        const int8_t *from = p->x + r * p->x_stride;
        int16_t *to = p->wide + r * p->wide_stride;
        for (int64_t k = 0; k < p->depth; k += LANES) {
            __m256i codes = _mm256_castsi128_si256(read_codes(from + k, p->depth - k));
            __m128i evens = _mm256_castsi256_si128(evens_of(codes)), odds = _mm256_castsi256_si128(odds_of(codes));
            _mm_storeu_si128((__m128i *)(to + k), _mm_unpacklo_epi32(evens, odds));
            _mm_storeu_si128((__m128i *)(to + k + 8), _mm_unpackhi_epi32(evens, odds));
        }
    }
}

/* Eight columns of each four codes: those at even places of these columns to panel[4 i], the others to panel[4 i + 2];
 * zeros from `columns` on and past the depth. */
INLINE void pack(__m256i *panel, const int8_t *weight, int64_t stride, int64_t columns, int64_t depth) {
    for (int64_t k = 0; k < depth; k += LANES) {
        /* Columns c and c + 4 in the halves of a register, so that nothing need cross them. */
        __m256i a[4], b[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            __m128i low = c < columns ? read_codes(weight + c * stride + k, depth - k) : _mm_setzero_si128();
            __m128i high = c + 4 < columns ? read_codes(weight + (c + 4) * stride + k, depth - k) : _mm_setzero_si128();
            a[c] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        }
        b[0] = _mm256_unpacklo_epi32(a[0], a[1]), b[1] = _mm256_unpackhi_epi32(a[0], a[1]);
        b[2] = _mm256_unpacklo_epi32(a[2], a[3]), b[3] = _mm256_unpackhi_epi32(a[2], a[3]);
        a[0] = _mm256_unpacklo_epi64(b[0], b[2]), a[1] = _mm256_unpackhi_epi64(b[0], b[2]);
        a[2] = _mm256_unpacklo_epi64(b[1], b[3]), a[3] = _mm256_unpackhi_epi64(b[1], b[3]);
#pragma GCC unroll 4
        for (int four = 0; four < 4; four++) {
            _mm256_store_si256(panel + k + 4 * four, evens_of(a[four]));
            _mm256_store_si256(panel + k + 4 * four + 2, odds_of(a[four]));
        }
    }
}

/* Two codes. */
INLINE __m256i in_every_lane(const int16_t *codes) {
    int32_t both;
    memcpy(&both, codes, sizeof both);
    return _mm256_set1_epi32(both);
}

/* Weights that a tile asks for meanwhile, as the memory would idle otherwise: every `step`-th of some rows. */
struct ahead {
    const int8_t *from;
    int64_t stride, num_rows, step;
};

/* sums[r, c] (+)= sum_k x[r, k] * panel[k, c] of a slice, `rows` x COLUMNS of them in registers. */
INLINE void tile(__m256i *sums, int is_first, const int16_t *x, int64_t x_stride, const __m256i *panel, int64_t depth,
                 const int rows, struct ahead ahead) {
    __m256i part[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) part[r][half] = is_first ? _mm256_setzero_si256() : sums[2 * r + half];
    for (int64_t begin = 0; begin < depth; begin += LINE) {
        for (int64_t row = 0; row < ahead.num_rows; row += ahead.step)
            _mm_prefetch((const char *)ahead.from + row * ahead.stride + begin, _MM_HINT_T1);
        int64_t end = begin + LINE < depth ? begin + LINE : depth;
        for (int64_t k = begin; k < end; k += 4) {
            __m256i evens[2] = {_mm256_load_si256(panel + k), _mm256_load_si256(panel + k + 1)};
            __m256i odds[2] = {_mm256_load_si256(panel + k + 2), _mm256_load_si256(panel + k + 3)};
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const int16_t *at = x + r * x_stride + k;
                __m256i x_evens = in_every_lane(at), x_odds = in_every_lane(at + 2);
                for (int half = 0; half < 2; half++) {
                    part[r][half] = _mm256_add_epi32(part[r][half], _mm256_madd_epi16(x_evens, evens[half]));
                    part[r][half] = _mm256_add_epi32(part[r][half], _mm256_madd_epi16(x_odds, odds[half]));
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) sums[2 * r + half] = part[r][half];
}

/* `columns` sums of row r from column `first` on, to where they go. */
INLINE void put(const struct product *p, const int32_t *sums, int64_t r, int64_t first, const int64_t columns) {
    float y[COLUMNS];
    if (p->linear == NULL)
        memcpy(p->acc + r * p->num_columns + first, sums, (size_t)columns * sizeof *sums);
    else
        finish_some(y, sums, p->linear, r, first, columns, p->out, p->out_dtype);
}

/* All rows for columns in groups of COLUMNS, over slices of the depth whose panel stays in the first cache. */
VECTOR static void multiply(int64_t begin, int64_t end, void *task) {
    const struct product *p = task;
    __m256i panel[DEPTH_AT_ONCE], room[2 * ROWS_AT_ONCE];
    int64_t last = end * COLUMNS < p->num_columns ? end * COLUMNS : p->num_columns, stride = p->weight_stride;
    int64_t tiles = (p->num_rows + ROWS - 1) / ROWS, slices = (p->depth + DEPTH_AT_ONCE - 1) / DEPTH_AT_ONCE;
    if (slices == 0) slices = 1; /* of no depth, for zeros */
    int64_t depth_at_once = (p->depth + slices * LANES - 1) / (slices * LANES) * LANES;
    for (int64_t first = begin * COLUMNS; first < last; first += COLUMNS) {
        int64_t columns = last - first < COLUMNS ? last - first : COLUMNS;
        for (int64_t slice = 0; slice < slices; slice++) {
            int64_t k = slice * depth_at_once;
            const int8_t *weight = p->weight + first * stride + k;
            int64_t depth = p->depth - k < depth_at_once ? p->depth - k : depth_at_once;
            pack(panel, weight, stride, columns, depth);
            pack(panel + 1, weight + 8 * stride, stride, columns - 8, depth);
            int is_last = slice == slices - 1;
            int64_t later = is_last ? last - first - COLUMNS : columns;
            struct ahead ahead = {is_last ? weight - k + COLUMNS * stride : weight + depth, stride,
                                  later < COLUMNS ? later : COLUMNS, tiles};
            depth = (depth + LANES - 1) / LANES * LANES;
            for (int64_t i = 0; i < tiles; i++, ahead.from += stride, ahead.num_rows--) {
                int64_t r = p->num_rows * i / tiles, stop = p->num_rows * (i + 1) / tiles, w = p->wide_stride;
                const int16_t *x = p->wide + r * w + k;
                __m256i *sums = room + 2 * r;
                switch (stop - r) {
                case 1:
                    tile(sums, k == 0, x, w, panel, depth, 1, ahead);
                    break;
                case 2:
                    tile(sums, k == 0, x, w, panel, depth, 2, ahead);
                    break;
                case 3:
                    tile(sums, k == 0, x, w, panel, depth, 3, ahead);
                    break;
                default:
                    tile(sums, k == 0, x, w, panel, depth, ROWS, ahead);
                }
                for (; is_last && r < stop; r++) {
                    const int32_t *row = (const int32_t *)(room + 2 * r);
                    if (columns == COLUMNS) /* a number that the compiler knows */
                        put(p, row, r, first, COLUMNS);
                    else
                        put(p, row, r, first, columns);
                }
            }
        }
    }
}

/* All of a product, for ROWS_AT_ONCE rows at most at a time, whose wide codes stay in the second cache. */
VECTOR static int run(struct product all) {
    int64_t blocks = (all.num_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    int64_t groups = (all.num_columns + COLUMNS - 1) / COLUMNS;
    /* Never whole pages apart: rows would have the same few places in a cache. */
    all.wide_stride = (all.depth + LANES - 1) / LANES * LANES + LANES;
    all.wide = malloc(ROWS_AT_ONCE * (size_t)all.wide_stride * sizeof *all.wide);
    if (all.wide == NULL) return -1;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t row = all.num_rows * block / blocks, at = row * all.num_columns;
        struct product task = all;
        struct epilogue linear;
        task.num_rows = all.num_rows * (block + 1) / blocks - row;
        task.x += row * all.x_stride;
        if (all.linear == NULL) {
            task.acc += at;
        } else {
            linear = epilogue_from(*all.linear, row);
            task.linear = &linear, task.out = (char *)all.out + at * size_of(all.out_dtype);
        }
        parallel_for(task.num_rows, 1 + (1 << 16) / (all.depth + 1), widen, &task);
        parallel_for(groups, 1 + (1 << 18) / (COLUMNS * task.num_rows * (all.depth + 1)), multiply, &task);
    }
    free(all.wide);
    return 0;
}

int int8_product_packed(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                        int64_t depth, int64_t x_stride, int64_t weight_stride) {
    return run((struct product){.x = x, .weight = weight, .acc = acc, .num_rows = num_rows, .num_columns = num_columns,
                                .depth = depth, .x_stride = x_stride, .weight_stride = weight_stride});
}

int int8_linear_packed(const int8_t *x, const int8_t *weight, int64_t depth, int64_t x_stride, int64_t weight_stride,
                       struct epilogue from, void *out, int64_t out_dtype) {
    return run((struct product){.x = x, .weight = weight, .num_rows = from.num_rows, .num_columns = from.num_columns,
                                .depth = depth, .x_stride = x_stride, .weight_stride = weight_stride, .linear = &from,
                                .out = out, .out_dtype = out_dtype});
}

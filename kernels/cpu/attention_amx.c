/* Attention of a prompt's rows in bfloat16, on processors with AMX.
 *
 * Rows go in tiles of 32 positions that begin at multiples of 32, and sums over keys run from the first key that the tile
 * sees, in order, 32 at a time; what a row does not see adds 0, unless it is infinite or NaN. So the bits of a row follow
 * from its position, its query and the keys that it sees, and not from the rows that it is computed with. An instruction
 * multiplies a tile of 16 rows of 32 numbers by one of 32 rows of 16, whose numbers lie in pairs: keys and values are
 * packed so once for all rows. */
#include "amx.h"
#include "attention.h"
#include "product.h"

#ifdef OTTAVA_AMX

#include <cpuid.h>

#define TARGETS AMX_TARGETS ",amx-bf16,avx512bf16,fma"
#define TILES __attribute__((target(TARGETS)))
#define INLINE_TILES static inline __attribute__((always_inline, target(TARGETS)))

enum { ROWS = 2 * SIDE, WIDE = 32 /* numbers in a tile's row */, NUMBERS = SIDE * WIDE };

int has_amx_bfloat16(void) {
    unsigned a, b, c, d;
    if (!has_amx() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1)) return 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

/* keys: [G, 16 keys, slabs of 32 columns] of tiles; values: [G, 32 keys, 16 columns] of tiles. Zeros past the context. */
struct prompt_task {
    struct prompt step;
    struct cache cache;
    uint16_t *keys, *values;
    int64_t num_slabs, num_columns, num_keys; /* num_columns: blocks of 16; num_keys: a multiple of 32 */
    int failed;
};

INLINE_TILES __m256i to_bfloat16s(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

/* A token's head as bfloat16, D of them. */
INLINE_TILES void read_head(uint16_t *out, const void *base, const float *scales, const struct cache *cache, int64_t head) {
    int64_t D = cache->head_size;
    for (int64_t i = 0; i < D; i += SIDE) {
        __mmask16 there = first_of(D - i);
        int64_t at = head * D + i;
        if (cache->dtype == BFLOAT16) {
            _mm256_mask_storeu_epi16(out + i, there, _mm256_maskz_loadu_epi16(there, (const uint16_t *)base + at));
            continue;
        }
        __m512 x;
        if (cache->dtype == INT8) {
            __m128i codes = _mm_maskz_loadu_epi8(there, (const int8_t *)base + at);
            x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), _mm512_set1_ps(scales[head]));
        } else {
            x = _mm512_maskz_loadu_ps(there, (const float *)base + at);
        }
        _mm256_mask_storeu_epi16(out + i, there, to_bfloat16s(x));
    }
}

/* Where the cache has token's head g; zeros past the context. */
INLINE_TILES void read_token(uint16_t *out, const struct prompt_task *task, int64_t token, int64_t g, int is_key) {
    const struct cache *cache = &task->cache;
    if (token >= task->step.context) {
        memset(out, 0, (size_t)(task->num_slabs * WIDE) * sizeof *out);
        return;
    }
    int64_t block = task->step.block_table[token >> cache->block_shift];
    int64_t slot = (block << cache->block_shift) + (token & (cache->block_size - 1));
    read_head(out, is_key ? cache->keys : cache->values, is_key ? cache->key_scales : cache->value_scales, cache,
              slot * cache->num_kv_heads + g);
}

/* Pieces are 32 keys of one head. */
TILES static void pack(int64_t begin, int64_t end, void *context) {
    struct prompt_task *task = context;
    int64_t slabs = task->num_slabs, columns = task->num_columns, width = slabs * WIDE, blocks = task->num_keys / WIDE;
    uint16_t *heads = calloc((size_t)(2 * width), sizeof *heads);
    if (heads == NULL) {
        task->failed = 1;
        return;
    }
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t g = piece / blocks, first = piece % blocks * WIDE;
        uint32_t *keys = (uint32_t *)(task->keys + piece * 2 * slabs * NUMBERS);
        uint16_t *values = task->values + piece * columns * NUMBERS;
        for (int64_t i = 0; i < WIDE; i++) {
            uint32_t *to = keys + i / SIDE * slabs * (NUMBERS / 2) + i % SIDE;
            read_token(heads, task, first + i, g, 1);
            for (int64_t two = 0; two < width / 2; two++) memcpy(to + two * SIDE, heads + 2 * two, 4);
        }
        for (int64_t i = 0; i < WIDE; i += 2) {
            read_token(heads, task, first + i, g, 0);
            read_token(heads + width, task, first + i + 1, g, 0);
            for (int64_t c = 0; c < columns; c++) {
                __m256i even = _mm256_loadu_si256((const __m256i *)(heads + c * SIDE));
                __m256i odd = _mm256_loadu_si256((const __m256i *)(heads + width + c * SIDE));
                __m512i pairs = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
                _mm512_storeu_si512(values + c * NUMBERS + i * SIDE, _mm512_or_si512(_mm512_cvtepu16_epi32(even), pairs));
            }
        }
    }
    free(heads);
}

/* e^x for x <= 0, as `exponential`. */
INLINE_TILES __m512 power_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* NaN stays */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Which of the keys at .. at + 15 are among first .. stop - 1. */
INLINE_TILES __mmask16 seen(int64_t at, int64_t first, int64_t stop) {
    return first_of(stop - at) & (__mmask16)~first_of(first - at);
}

/* A row's scores of the keys base .. base + n - 1 become weights of those that it sees, first .. stop - 1, and 0 of others;
 * the largest weight is 1. Returns their sum. */
INLINE_TILES float weigh(uint16_t *weights, const float *scores, float scale, int64_t base, int64_t n, int64_t first,
                         int64_t stop) {
    __m512 most = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < n; i += SIDE) {
        __mmask16 mask = seen(base + i, first, stop);
        most = _mm512_mask_max_ps(most, mask, most, _mm512_loadu_ps(scores + i));
    }
    __m512 largest = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), by);
    for (int64_t i = 0; i < n; i += SIDE) {
        __mmask16 mask = seen(base + i, first, stop);
        __m512 weight = power_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), by, largest));
        weight = _mm512_maskz_mov_ps(mask, weight);
        sum = _mm512_add_ps(sum, weight);
        _mm256_storeu_si256((__m256i *)(weights + i), to_bfloat16s(weight));
    }
    return _mm512_reduce_add_ps(sum);
}

/* 32 rows of a, whose numbers lie `stride` apart, by `count` tiles for each of two blocks of 16 columns, to [32, 32] and
 * further with `pitch` columns. Tile t of a block is `far` numbers behind its tile t - 1. */
INLINE_TILES void multiply(float *to, int64_t pitch, const uint16_t *a, int64_t stride, const uint16_t *left,
                           const uint16_t *right, int64_t far, int64_t count) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < count; t++) {
        _tile_loadd(4, a + t * WIDE, stride * 2);
        _tile_loadd(6, left + t * far, TILE_ROW);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + SIDE * stride + t * WIDE, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (right != NULL) {
            _tile_loadd(7, right + t * far, TILE_ROW);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, to, pitch * 4);
    _tile_stored(2, to + SIDE * pitch, pitch * 4);
    if (right != NULL) {
        _tile_stored(1, to + SIDE, pitch * 4);
        _tile_stored(3, to + SIDE * pitch + SIDE, pitch * 4);
    }
}

/* What a thread needs for a tile of rows. */
struct room {
    uint16_t *q, *weights;
    float *scores, *out;
};

/* The rows at positions `first` .. first + 31 of head h, of those that are in the step. */
INLINE_TILES void attend(const struct prompt_task *task, struct room room, int64_t first, int64_t h) {
    const struct prompt *step = &task->step;
    int64_t D = task->cache.head_size, H = step->num_heads, g = h / (H / task->cache.num_kv_heads);
    int64_t slabs = task->num_slabs, columns = task->num_columns, width = slabs * WIDE, begun = step->context - step->num_rows;
    int64_t low = step->window > 0 && first >= step->window ? (first - step->window + 1) / WIDE * WIDE : 0;
    int64_t n = first + ROWS - low, blocks = task->num_keys / WIDE, at = g * blocks + low / WIDE;
    int64_t begin = first > begun ? first : begun, end = first + ROWS < step->context ? first + ROWS : step->context;
    const uint16_t *q = (const uint16_t *)step->q + h * D;
    memset(room.q, 0, (size_t)(ROWS * width) * sizeof *room.q);
    for (int64_t p = begin; p < end; p++)
        memcpy(room.q + (p - first) * width, q + (p - begun) * H * D, (size_t)D * sizeof *q);
    for (int64_t i = 0; i < n; i += WIDE) {
        const uint16_t *keys = task->keys + (at + i / WIDE) * 2 * slabs * NUMBERS;
        multiply(room.scores + i, n, room.q, width, keys, keys + slabs * NUMBERS, NUMBERS, slabs);
    }
    float sums[ROWS];
    for (int64_t p = begin; p < end; p++) {
        int64_t r = p - first, seen_from = step->window > 0 && p >= step->window ? p - step->window + 1 : 0;
        sums[r] = weigh(room.weights + r * n, room.scores + r * n, step->scale, low, n, seen_from, p + 1);
    }
    const uint16_t *values = task->values + at * columns * NUMBERS;
    for (int64_t c = 0; c < columns; c += 2)
        multiply(room.out + c * SIDE, columns * SIDE, room.weights, n, values + c * NUMBERS,
                 c + 1 < columns ? values + (c + 1) * NUMBERS : NULL, columns * NUMBERS, n / WIDE);
    for (int64_t p = begin; p < end; p++) {
        uint16_t *out = (uint16_t *)step->out + ((p - begun) * H + h) * D;
        const float *y = room.out + (p - first) * columns * SIDE;
        __m512 sum = _mm512_set1_ps(sums[p - first]);
        for (int64_t i = 0; i < D; i += SIDE) {
            __m256i result = to_bfloat16s(_mm512_div_ps(_mm512_loadu_ps(y + i), sum));
            _mm256_mask_storeu_epi16(out + i, first_of(D - i), result);
        }
    }
}

/* Pieces are a tile of rows of one head; the first and the last, which takes longest, are neighbours. */
TILES static void attend_pieces(int64_t begin, int64_t end, void *context) {
    struct prompt_task *task = context;
    const struct prompt *step = &task->step;
    int64_t H = step->num_heads, width = task->num_slabs * WIDE, longest = task->num_keys + ROWS;
    int64_t lowest = (step->context - step->num_rows) / ROWS, tiles = (step->context + ROWS - 1) / ROWS - lowest;
    struct room room = {.q = malloc((size_t)(ROWS * width) * 2), .weights = calloc((size_t)(ROWS * longest), 2),
                        .scores = malloc((size_t)(ROWS * longest) * 4),
                        .out = malloc((size_t)(ROWS * task->num_columns * SIDE) * 4)};
    if (room.q == NULL || room.weights == NULL || room.scores == NULL || room.out == NULL) {
        task->failed = 1;
    } else {
        use_tiles();
        for (int64_t piece = begin; piece < end; piece++) {
            int64_t i = piece / H, tile = i % 2 ? tiles - 1 - i / 2 : i / 2;
            attend(task, room, (lowest + tile) * ROWS, piece % H);
        }
        _tile_release();
    }
    free(room.q);
    free(room.weights);
    free(room.scores);
    free(room.out);
}

int prompt_attention_amx(struct prompt step, struct cache cache) {
    struct prompt_task task = {.step = step, .cache = cache, .num_slabs = (cache.head_size + WIDE - 1) / WIDE,
                               .num_columns = (cache.head_size + SIDE - 1) / SIDE,
                               .num_keys = (step.context + WIDE - 1) / WIDE * WIDE};
    int64_t blocks = cache.num_kv_heads * (task.num_keys / WIDE), begun = step.context - step.num_rows;
    int64_t tiles = (step.context + ROWS - 1) / ROWS - begun / ROWS;
    task.keys = malloc((size_t)(blocks * 2 * task.num_slabs * NUMBERS) * sizeof *task.keys);
    task.values = malloc((size_t)(blocks * task.num_columns * NUMBERS) * sizeof *task.values);
    if (task.keys == NULL || task.values == NULL) {
        task.failed = 1;
    } else {
        parallel_for(blocks, 4, pack, &task);
        parallel_for(tiles * step.num_heads, 1, attend_pieces, &task);
    }
    free(task.keys);
    free(task.values);
    return task.failed ? -1 : 0;
}

#else

int has_amx_bfloat16(void) { return 0; }

int prompt_attention_amx(struct prompt step, struct cache cache) {
    (void)step, (void)cache;
    return -1;
}

#endif

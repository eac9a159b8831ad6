/* int8 by int8, exact sums in int32, and Linears over them, on processors with AMX.
 *
 * An instruction multiplies a tile of 16 rows of 64 codes by one of 64 rows of 16, whose codes lie in fours. The weights
 * are the first, which takes them as they lie, so only x is packed. Sums come out as [columns, rows] and are transposed. */
#define _DEFAULT_SOURCE /* for syscall */
#include "amx.h"
#include "epilogue.h"
#include "product.h"

#ifdef OTTAVA_AMX

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

int has_amx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int has_vectors = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    int has_tiles = (d >> 24 & 1) && (d >> 25 & 1) && has_vectors;
    /* The kernel saves tiles only for processes that ask for them. */
    return has_tiles && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

#define TILES __attribute__((target(AMX_TARGETS)))
#define INLINE_TILES INLINE_AMX

enum { DEPTH = TILE_ROW /* codes in a tile's row */, GROUP = 2 * SIDE, ROWS_AT_ONCE = 512 };

/* linear: what becomes of the sums; null: they go to acc. */
struct product {
    const int8_t *x, *weight;
    int8_t *packed, *last;
    int32_t *acc;
    int64_t num_rows, num_columns, depth, num_slabs, x_stride, weight_stride;
    const struct epilogue *linear;
    void *out;
    int64_t out_dtype;
};

/* Rows 16 i .. 16 i + 15 of x as num_slabs tiles [16 fours, 16 rows, 4]; 0 past the rows and the depth. */
TILES static void pack(int64_t begin, int64_t end, void *task) {
    const struct product *p = task;
    for (int64_t i = begin; i < end; i++) {
        int64_t left = p->num_rows - i * SIDE, rows = left < SIDE ? left : SIDE;
        __mmask16 there = first_of(rows);
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (int64_t slab = 0; slab < p->num_slabs; slab++) {
            const int8_t *from = p->x + i * SIDE * p->x_stride + slab * DEPTH;
            int64_t stride = p->x_stride, depth = p->depth - slab * DEPTH;
            int8_t last[TILE];
            if (depth < DEPTH) {
                memset(last, 0, sizeof last);
                for (int64_t row = 0; row < rows; row++) memcpy(last + row * DEPTH, from + row * stride, (size_t)depth);
                from = last, stride = DEPTH;
            }
            const __m512i places = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)stride));
            int8_t *to = p->packed + (i * p->num_slabs + slab) * TILE;
            for (int four = 0; four < DEPTH / 4; four++)
                _mm512_storeu_si512(to + four * DEPTH, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places,
                                                                                   from + four * 4, 1));
        }
    }
}

INLINE_TILES void transpose(const int32_t *sums, __m512i *b) {
    __m512i a[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) a[i] = _mm512_loadu_si512(sums + i * SIDE);
#pragma GCC unroll 8
    for (int i = 0; i < SIDE; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i even = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        __m512i even_8 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        __m512i odd_8 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        b[i] = _mm512_shuffle_i32x4(even, even_8, 0x88);
        b[4 + i] = _mm512_shuffle_i32x4(odd, odd_8, 0x88);
        b[8 + i] = _mm512_shuffle_i32x4(even, even_8, 0xdd);
        b[12 + i] = _mm512_shuffle_i32x4(odd, odd_8, 0xdd);
    }
}

INLINE_TILES __m512 read_some(const void *from, int64_t dtype, int64_t at, __mmask16 there) {
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(there, (const float *)from + at);
    __m256i bits = _mm256_maskz_loadu_epi16(there, (const uint16_t *)from + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* As write_floats. */
INLINE_TILES void write_some(void *to, int64_t dtype, int64_t at, __mmask16 there, __m512 y) {
    if (dtype == FLOAT32) {
        _mm512_mask_storeu_ps((float *)to + at, there, y);
        return;
    }
    __m512i bits = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    bits = _mm512_mask_set1_epi32(bits, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), 0x7fc0);
    _mm256_mask_storeu_epi16((uint16_t *)to + at, there, _mm512_cvtepi32_epi16(bits));
}

/* sums [columns, rows] of one tile to acc, or to what the Linear makes of them, [rows, columns]. */
INLINE_TILES void put(const struct product *p, const int32_t *sums, int64_t row, int64_t column) {
    int64_t rows = p->num_rows - row, columns = p->num_columns - column;
    if (rows <= 0 || columns <= 0) return;
    if (rows > SIDE) rows = SIDE;
    __m512i b[SIDE];
    transpose(sums, b);
    __mmask16 there = first_of(columns);
    int64_t at = row * p->num_columns + column;
    if (p->linear == NULL) {
        for (int64_t i = 0; i < rows; i++, at += p->num_columns) _mm512_mask_storeu_epi32(p->acc + at, there, b[i]);
        return;
    }
    const struct epilogue *l = p->linear;
    __m512 weight_scale = l->weight_stride ? _mm512_maskz_loadu_ps(there, l->weight_scale + column)
                                           : _mm512_set1_ps(l->weight_scale[0]);
    __m512 bias = l->bias == NULL ? _mm512_setzero_ps() : read_some(l->bias, l->bias_dtype, column, there);
    for (int64_t i = 0; i < rows; i++, at += p->num_columns) {
        __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(b[i]), weight_scale);
        y = _mm512_mul_ps(y, _mm512_set1_ps(l->x_scale[(row + i) * l->x_stride]));
        if (l->bias != NULL) y = _mm512_add_ps(y, bias);
        if (l->residual != NULL) y = _mm512_add_ps(y, read_some(l->residual, l->residual_dtype, at, there));
        write_some(p->out, p->out_dtype, at, there, y);
    }
}

/* 32 columns of weights by 16 or, if is_wide, 32 rows of x from `row` on. */
INLINE_TILES void block(const struct product *p, const int8_t *weight, int64_t stride, int64_t row, int64_t column,
                        const int is_wide) {
    const int8_t *x = p->packed + row / SIDE * p->num_slabs * TILE, *next_x = x + p->num_slabs * TILE;
    int32_t sums[4][SIDE * SIDE];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t slab = 0; slab < p->num_slabs; slab++) {
        _tile_loadd(4, weight + slab * DEPTH, stride);
        _tile_loadd(6, x + slab * TILE, DEPTH);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(5, weight + SIDE * stride + slab * DEPTH, stride);
        _tile_dpbssd(1, 5, 6);
        if (is_wide) {
            _tile_loadd(7, next_x + slab * TILE, DEPTH);
            _tile_dpbssd(2, 4, 7);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], DEPTH);
    _tile_stored(1, sums[1], DEPTH);
    put(p, sums[0], row, column);
    put(p, sums[1], row, column + SIDE);
    if (is_wide) {
        _tile_stored(2, sums[2], DEPTH);
        _tile_stored(3, sums[3], DEPTH);
        put(p, sums[2], row + SIDE, column);
        put(p, sums[3], row + SIDE, column + SIDE);
    }
}

/* All rows for groups of 32 columns, whose weights stay in the first cache. */
TILES static void multiply(int64_t begin, int64_t end, void *task) {
    const struct product *p = task;
    use_tiles();
    for (int64_t group = begin; group < end; group++) {
        int64_t column = group * GROUP, stride = p->weight_stride, row = 0;
        const int8_t *weight = p->weight + column * stride;
        if (p->last != NULL && column + GROUP >= p->num_columns) weight = p->last, stride = p->num_slabs * DEPTH;
        for (; p->num_rows - row > SIDE; row += 2 * SIDE) block(p, weight, stride, row, column, 1);
        if (row < p->num_rows) block(p, weight, stride, row, column, 0);
    }
    _tile_release();
}

/* The weights of the last group with zeros behind each row and behind the last one, as tiles are read whole. */
static void copy_last(const struct product *p, int8_t *last) {
    int64_t first = (p->num_columns - 1) / GROUP * GROUP, stride = p->num_slabs * DEPTH;
    memset(last, 0, (size_t)(GROUP * stride));
    for (int64_t i = 0; first + i < p->num_columns; i++)
        memcpy(last + i * stride, p->weight + (first + i) * p->weight_stride, (size_t)p->depth);
}

/* All of a product. */
static int run(struct product *task) {
    if (task->num_rows == 0 || task->num_columns == 0) return 0;
    int64_t depth = task->depth, num_panels = (task->num_rows + SIDE - 1) / SIDE;
    int64_t groups = (task->num_columns + GROUP - 1) / GROUP;
    task->num_slabs = (depth + DEPTH - 1) / DEPTH;
    task->packed = malloc((size_t)(num_panels * task->num_slabs * TILE + 1));
    if (task->packed == NULL) return -1;
    if (task->num_columns % GROUP || depth % DEPTH) {
        task->last = malloc((size_t)(GROUP * task->num_slabs * DEPTH + 1));
        if (task->last == NULL) {
            free(task->packed);
            return -1;
        }
        copy_last(task, task->last);
    }
    parallel_for(num_panels, 1 + (1 << 16) / (SIDE * (depth + 1)), pack, task);
    parallel_for(groups, 1 + (1 << 20) / (GROUP * SIDE * num_panels * (depth + 1)), multiply, task);
    free(task->last);
    free(task->packed);
    return 0;
}

int int8_product_amx(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                     int64_t depth, int64_t x_stride, int64_t weight_stride) {
    struct product task = {.x = x, .weight = weight, .acc = acc, .num_rows = num_rows, .num_columns = num_columns,
                           .depth = depth, .x_stride = x_stride, .weight_stride = weight_stride};
    return run(&task);
}

VECTOR int int8_linear_amx(const int8_t *x, const int8_t *weight, int64_t depth, int64_t x_stride, int64_t weight_stride,
                    struct epilogue from, void *out, int64_t out_dtype) {
    for (int64_t row = 0; row < from.num_rows; row += ROWS_AT_ONCE) {
        int64_t left = from.num_rows - row, at = row * from.num_columns;
        struct epilogue part = epilogue_from(from, row);
        struct product task = {.x = x + row * x_stride, .weight = weight, .num_rows = left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE,
                               .num_columns = from.num_columns, .depth = depth, .x_stride = x_stride,
                               .weight_stride = weight_stride, .linear = &part,
                               .out = (char *)out + at * size_of(out_dtype), .out_dtype = out_dtype};
        if (run(&task) != 0) return -1;
    }
    return 0;
}

#else

int has_amx(void) { return 0; }

int int8_product_amx(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                     int64_t depth, int64_t x_stride, int64_t weight_stride) {
    return int8_product(x, weight, acc, num_rows, num_columns, depth, x_stride, weight_stride);
}

int int8_linear_amx(const int8_t *x, const int8_t *weight, int64_t depth, int64_t x_stride, int64_t weight_stride,
                    struct epilogue from, void *out, int64_t out_dtype) {
    (void)x, (void)weight, (void)depth, (void)x_stride, (void)weight_stride, (void)from, (void)out, (void)out_dtype;
    return -1;
}

#endif

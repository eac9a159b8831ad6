/* Attention of a prompt's rows in float32.
 *
 * Rows go in tiles of ROWS positions that begin at multiples of ROWS. A sum over keys runs in their order, from the first
 * of a BLOCK that the tile sees to the tile's last position; what a row does not see adds 0, unless it is infinite or
 * NaN. So the bits of a row follow from its position, its query and the keys that it sees, and neither from the rows that
 * it is computed with nor from the width of a vector: a lane is a key of q k^T, or a column of p v. */
#include "attention.h"

#include "cache.h"
#include "exponential.h"
#include "sums.h"

#ifdef OTTAVA_AVX512
#define PROMPT_ATTENTION prompt_attention_avx512
typedef __m512 vector;
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define IN_EVERY_LANE _mm512_set1_ps
#define FMADD _mm512_fmadd_ps
#else
#define PROMPT_ATTENTION prompt_attention_avx2
typedef __m256 vector;
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define IN_EVERY_LANE _mm256_set1_ps
#define FMADD _mm256_fmadd_ps
#endif

enum { LANES = sizeof(vector) / sizeof(float), WIDE = 2 * LANES, AT_ONCE = 6, ROWS = 4 * AT_ONCE, BLOCK = 32 };

/* keys: [G, num_keys / WIDE, D, WIDE]; values: [G, num_keys, width]. Zeros past the context and past the head. base: the
 * token whose key is the first, as no row sees an earlier one. */
struct prompt_task {
    struct prompt step;
    struct cache cache;
    float *keys, *values;
    int64_t base, num_keys, width; /* multiples of BLOCK, of BLOCK and of WIDE */
    int failed;
};

INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* The first token of a block of keys that rows at `first` and on see. */
INLINE int64_t lowest_key(const struct prompt *step, int64_t first) {
    return step->window > 0 && first >= step->window ? (first - step->window + 1) / BLOCK * BLOCK : 0;
}

/* A token's head of keys or values, floats as they are; codes for a prompt in bfloat16 are rounded to that. */
INLINE const float *token_at(const struct prompt_task *task, int64_t token, int64_t g, int is_key, float *row) {
    const struct cache *cache = &task->cache;
    const float *head = head_at(is_key ? cache->keys : cache->values, is_key ? cache->key_scales : cache->value_scales,
                                cache, task->step.block_table, token, g, row);
    if (cache->dtype == INT8 && task->step.dtype == BFLOAT16)
        for (int64_t i = 0; i < cache->head_size; i++) row[i] = of_bfloat16(to_bfloat16(head[i]));
    return head;
}

/* Pieces are WIDE keys of one head. */
VECTOR static void pack(int64_t begin, int64_t end, void *context) {
    struct prompt_task *task = context;
    int64_t D = task->cache.head_size, blocks = task->num_keys / WIDE;
    float *row = malloc((size_t)D * sizeof *row + 1);
    if (row == NULL) {
        task->failed = 1;
        return;
    }
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t g = piece / blocks, first = task->base + piece % blocks * WIDE;
        float *keys = task->keys + piece * D * WIDE, *values = task->values + piece * WIDE * task->width;
        memset(keys, 0, (size_t)(D * WIDE) * sizeof *keys);
        memset(values, 0, (size_t)(WIDE * task->width) * sizeof *values);
        for (int64_t i = 0; i < WIDE && first + i < task->step.context; i++) {
            const float *head = token_at(task, first + i, g, 1, row);
            for (int64_t d = 0; d < D; d++) keys[d * WIDE + i] = head[d];
            memcpy(values + i * task->width, token_at(task, first + i, g, 0, row), (size_t)D * sizeof *values);
        }
    }
    free(row);
}

/* to[r, c] = sum_k a[r, k] b[k, c] for AT_ONCE rows and WIDE columns, in the order of k. */
INLINE void multiply(float *to, int64_t pitch, const float *a, int64_t a_pitch, const float *b, int64_t b_pitch,
                     int64_t depth) {
    vector sums[AT_ONCE][2];
#pragma GCC unroll 6
    for (int r = 0; r < AT_ONCE; r++) sums[r][0] = sums[r][1] = IN_EVERY_LANE(0.0f);
    for (int64_t k = 0; k < depth; k++) {
        vector left = LOAD(b + k * b_pitch), right = LOAD(b + k * b_pitch + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < AT_ONCE; r++) {
            vector one = IN_EVERY_LANE(a[r * a_pitch + k]);
            sums[r][0] = FMADD(one, left, sums[r][0]);
            sums[r][1] = FMADD(one, right, sums[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < AT_ONCE; r++) {
        STORE(to + r * pitch, sums[r][0]);
        STORE(to + r * pitch + LANES, sums[r][1]);
    }
}

/* Scores of n keys become the weights of those from first to stop - 1, and 0 of others; the largest is 1. Returns their
 * sum. */
INLINE float weigh(float *scores, float scale, int64_t n, int64_t first, int64_t stop) {
    float largest = largest_of(scores + first, stop - first) * scale;
    for (int64_t i = first; i < stop; i++) scores[i] = exponential(scores[i] * scale - largest);
    memset(scores, 0, (size_t)first * sizeof *scores);
    memset(scores + stop, 0, (size_t)(n - stop) * sizeof *scores);
    return sum_of(scores, n);
}

/* What a thread needs for a tile of rows. */
struct room {
    float *q, *scores, *out;
};

/* The rows at positions `first` .. first + ROWS - 1 of head h, of those that are in the step. */
INLINE void attend(const struct prompt_task *task, struct room room, int64_t first, int64_t h) {
    const struct prompt *step = &task->step;
    int64_t D = task->cache.head_size, H = step->num_heads, g = h / (H / task->cache.num_kv_heads), size = size_of(step->dtype);
    int64_t low = lowest_key(step, first), at = g * task->num_keys + low - task->base;
    int64_t n = first + ROWS - low, pitch = rounded_up(n, WIDE), begun = step->context - step->num_rows;
    int64_t begin = first > begun ? first : begun, end = first + ROWS < step->context ? first + ROWS : step->context;
    int64_t lowest = (begin - first) / AT_ONCE * AT_ONCE, highest = end - first;
    const float *keys = task->keys + at * D, *values = task->values + at * task->width;
    float sums[ROWS];
    memset(room.q, 0, (size_t)(ROWS * D) * sizeof *room.q);
    for (int64_t p = begin; p < end; p++)
        read_floats(room.q + (p - first) * D, (const char *)step->q + ((p - begun) * H + h) * D * size, step->dtype, D);
    for (int64_t i = 0; i < n; i += WIDE)
        for (int64_t r = lowest; r < highest; r += AT_ONCE)
            multiply(room.scores + r * pitch + i, pitch, room.q + r * D, D, keys + i * D, WIDE, D);
    for (int64_t p = begin; p < end; p++) {
        int64_t seen_from = step->window > 0 && p >= step->window ? p - step->window + 1 - low : 0;
        sums[p - first] = weigh(room.scores + (p - first) * pitch, step->scale, n, seen_from, p + 1 - low);
    }
    for (int64_t c = 0; c < task->width; c += WIDE)
        for (int64_t r = lowest; r < highest; r += AT_ONCE)
            multiply(room.out + r * task->width + c, task->width, room.scores + r * pitch, pitch, values + c, task->width, n);
    for (int64_t p = begin; p < end; p++) {
        float *y = room.out + (p - first) * task->width, sum = sums[p - first];
        /* 0 added: what a row does not see may have made a 0 of -0. */
        for (int64_t d = 0; d < D; d++) y[d] = y[d] / sum + 0.0f;
        write_floats((char *)step->out + ((p - begun) * H + h) * D * size, y, step->dtype, D);
    }
}

/* Pieces are a tile of rows of one head; the first and the last, which takes longest, are neighbours. */
VECTOR static void attend_pieces(int64_t begin, int64_t end, void *context) {
    struct prompt_task *task = context;
    const struct prompt *step = &task->step;
    int64_t H = step->num_heads, D = task->cache.head_size, longest = task->num_keys;
    int64_t lowest = (step->context - step->num_rows) / ROWS, tiles = (step->context + ROWS - 1) / ROWS - lowest;
    float *memory = malloc((size_t)(ROWS * (D + longest + task->width)) * sizeof *memory);
    if (memory == NULL) {
        task->failed = 1;
        return;
    }
    struct room room = {memory, memory + ROWS * D, memory + ROWS * (D + longest)};
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t i = piece / H, tile = i % 2 ? tiles - 1 - i / 2 : i / 2;
        attend(task, room, (lowest + tile) * ROWS, piece % H);
    }
    free(memory);
}

VECTOR int PROMPT_ATTENTION(struct prompt step, struct cache cache) {
    int64_t begun = step.context - step.num_rows, base = lowest_key(&step, begun / ROWS * ROWS);
    struct prompt_task task = {.step = step, .cache = cache, .base = base,
                               .num_keys = rounded_up(step.context + ROWS - base, BLOCK),
                               .width = rounded_up(cache.head_size, WIDE)};
    int64_t num_keys = cache.num_kv_heads * task.num_keys;
    int64_t tiles = (step.context + ROWS - 1) / ROWS - begun / ROWS;
    task.keys = malloc((size_t)(num_keys * cache.head_size) * sizeof *task.keys + 1);
    task.values = malloc((size_t)(num_keys * task.width) * sizeof *task.values + 1);
    if (task.keys == NULL || task.values == NULL) {
        task.failed = 1;
    } else {
        parallel_for(num_keys / WIDE, 4, pack, &task);
        if (!task.failed) parallel_for(tiles * step.num_heads, 1, attend_pieces, &task);
    }
    free(task.keys);
    free(task.values);
    return task.failed ? -1 : 0;
}

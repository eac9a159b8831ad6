#include "attention.h"

#include "cache.h"
#include "exponential.h"
#include "rounding.h"
#include "sums.h"

#ifdef OTTAVA_AVX512
#define ATTENTION_OPS attention_avx512
#define PROMPT_ATTENTION prompt_attention_avx512
#else
#define ATTENTION_OPS attention_avx2
#define PROMPT_ATTENTION prompt_attention_avx2
#endif

enum { WORK_OF_A_PIECE = 16384, AHEAD = 16 /* tokens; 16 rows of a small model take 2.8 ms, and 4.0, 3.2, 3.4 with 4, 8, 32 */ };

struct rope_task {
    struct rope step;
    struct cache cache;
    int failed;
};

/* The first 2 * half elements; cos_sin holds half cosines, then half sines. */
INLINE void rotate_head(float *restrict x, const float *restrict cos_sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float low = x[i], high = x[half + i], cos = cos_sin[i], sin = cos_sin[half + i];
        x[i] = low * cos - high * sin;
        x[half + i] = high * cos + low * sin;
    }
}

/* Heads become what their codes stand for. */
INLINE void round_heads(float *restrict heads, int8_t *restrict codes, int64_t num_heads, int64_t head_size) {
    for (int64_t h = 0; h < num_heads; h++) {
        float *restrict head = heads + h * head_size, scale = quantize_row(codes, head, head_size);
        for (int64_t i = 0; i < head_size; i++) head[i] = codes[i] * scale;
    }
}

/* Heads of one token, as floats or as codes with a scale each. */
INLINE void write_slot(void *base, float *scales, const struct cache *cache, int64_t slot, const float *heads) {
    int64_t D = cache->head_size, G = cache->num_kv_heads, first = slot * G;
    if (cache->dtype != INT8) {
        write_floats((char *)base + first * D * size_of(cache->dtype), heads, cache->dtype, G * D);
        return;
    }
    int8_t *codes = (int8_t *)base + first * D;
    for (int64_t g = 0; g < G; g++) scales[first + g] = quantize_row(codes + g * D, heads + g * D, D);
}

VECTOR static void rope_rows(int64_t begin, int64_t end, void *context) {
    struct rope_task *task = context;
    const struct rope *step = &task->step;
    const struct cache *cache = &task->cache;
    int64_t D = cache->head_size, H = step->num_heads, G = cache->num_kv_heads, width = (H + 2 * G) * D;
    int64_t size = size_of(step->dtype);
    float *row = malloc((size_t)(width + 3 * D) * sizeof *row + 1), *q_weight = row + width, *k_weight = q_weight + D;
    if (row == NULL) {
        task->failed = 1;
        return;
    }
    if (step->q_weight != NULL) {
        read_floats(q_weight, step->q_weight, step->weight_dtype, D);
        read_floats(k_weight, step->k_weight, step->weight_dtype, D);
    }
    for (int64_t t = begin; t < end; t++) {
        read_floats(row, (const char *)step->qkv + t * width * size, step->dtype, width);
        const float *cos_sin = step->cos_sin + step->positions[t] * step->num_rotated;
        for (int64_t h = 0; h < H + G; h++) {
            float *head = row + h * D;
            if (step->q_weight != NULL) norm(head, h < H ? q_weight : k_weight, step->eps, D);
            rotate_head(head, cos_sin, step->num_rotated / 2);
        }
        char *q = (char *)step->q + t * H * D * size;
        write_floats(q, row, step->dtype, H * D);
        if (cache->dtype == INT8) {
            /* Rounded to their own type first, as attention finds them. */
            read_floats(row, q, step->dtype, H * D);
            round_heads(row, (int8_t *)(k_weight + D), H, D);
            write_floats(q, row, step->dtype, H * D);
        }
        if (step->slots[t] < 0) continue;
        write_slot(cache->keys, cache->key_scales, cache, step->slots[t], row + H * D);
        write_slot(cache->values, cache->value_scales, cache, step->slots[t], row + (H + G) * D);
    }
    free(row);
}

static int rope_and_cache(struct rope step, struct cache cache) {
    struct rope_task task = {step, cache, 0};
    int64_t width = (step.num_heads + 2 * cache.num_kv_heads) * cache.head_size;
    parallel_for(step.num_rows, 1 + WORK_OF_A_PIECE / (width + 1), rope_rows, &task);
    return task.failed ? -1 : 0;
}

struct decode_task {
    struct decode step;
    struct cache cache;
    int failed;
};

/* Ask for a head of a later token, as the hardware prefetcher does not follow so wide a stride: 2.8 ms instead of 7.0. */
INLINE void prefetch_head(const void *base, const struct cache *cache, const int32_t *table, int64_t token, int64_t g) {
    int64_t num_bytes = cache->head_size * (cache->dtype == INT8 ? 1 : size_of(cache->dtype));
    const char *head = (const char *)base + head_of(cache, table, token, g) * num_bytes;
    for (int64_t at = 0; at < num_bytes; at += 64) _mm_prefetch(head + at, _MM_HINT_T0);
}

/* Scores become weights that sum to 1. */
INLINE void softmax(float *restrict scores, int64_t n) {
    float largest = largest_of(scores, n);
    for (int64_t i = 0; i < n; i++) scores[i] = exponential(scores[i] - largest);
    float sum = sum_of(scores, n);
    for (int64_t i = 0; i < n; i++) scores[i] /= sum;
}

/* One piece is a row's query heads of one key head, which read its keys and values once. */
VECTOR static void decode_heads(int64_t begin, int64_t end, void *context) {
    struct decode_task *task = context;
    const struct decode *step = &task->step;
    const struct cache *cache = &task->cache;
    int64_t D = cache->head_size, G = cache->num_kv_heads, shared = step->num_heads / G, longest = 1;
    for (int64_t piece = begin; piece < end; piece++)
        longest = step->context_lens[piece / G] > longest ? step->context_lens[piece / G] : longest;
    float *q = malloc((size_t)(2 * shared * D + D + shared * longest) * sizeof *q + D);
    if (q == NULL) {
        task->failed = 1;
        return;
    }
    float *y = q + shared * D, *row = y + shared * D, *scores = row + D;
    int8_t *codes = (int8_t *)(scores + shared * longest);
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t b = piece / G, g = piece % G, stop = step->context_lens[b];
        int64_t first = step->window > 0 && stop > step->window ? stop - step->window : 0, n = stop - first;
        int64_t at = (b * step->num_heads + g * shared) * D * size_of(step->dtype);
        const int32_t *table = step->block_tables + b * step->table_stride;
        read_floats(q, (const char *)step->q + at, step->dtype, shared * D);
        if (cache->dtype == INT8) round_heads(q, codes, shared, D);
        memset(y, 0, shared * D * sizeof *y);
        for (int64_t token = 0; token < n; token++) {
            if (token + AHEAD < n) prefetch_head(cache->keys, cache, table, first + token + AHEAD, g);
            if (token < AHEAD) prefetch_head(cache->values, cache, table, first + token, g);
            const float *key = head_at(cache->keys, cache->key_scales, cache, table, first + token, g, row);
            for (int64_t j = 0; j < shared; j++) scores[j * n + token] = dot(q + j * D, key, D) * step->scale;
        }
        for (int64_t j = 0; n > 0 && j < shared; j++) softmax(scores + j * n, n);
        for (int64_t token = 0; token < n; token++) {
            if (token + AHEAD < n) prefetch_head(cache->values, cache, table, first + token + AHEAD, g);
            const float *value = head_at(cache->values, cache->value_scales, cache, table, first + token, g, row);
            for (int64_t j = 0; j < shared; j++) {
                float *restrict sum = y + j * D;
                float weight = scores[j * n + token];
                for (int64_t i = 0; i < D; i++) sum[i] += weight * value[i];
            }
        }
        write_floats((char *)step->out + at, y, step->dtype, shared * D);
    }
    free(q);
}

static int decode_attention(struct decode step, struct cache cache) {
    struct decode_task task = {step, cache, 0};
    int64_t work = 1;
    for (int64_t b = 0; b < step.num_rows; b++) work += step.context_lens[b] * step.num_heads * cache.head_size;
    int64_t pieces = step.num_rows * cache.num_kv_heads;
    parallel_for(pieces, 1 + WORK_OF_A_PIECE * pieces / work, decode_heads, &task);
    return task.failed ? -1 : 0;
}

const struct attention_ops ATTENTION_OPS = {rope_and_cache, decode_attention, PROMPT_ATTENTION};

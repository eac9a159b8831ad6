/* Where the paged cache has a token's head, and what it holds there. */
#ifndef OTTAVA_CACHE_H
#define OTTAVA_CACHE_H

#include "attention.h"

/* Which head of the cache is that of one token. */
INLINE int64_t head_of(const struct cache *cache, const int32_t *table, int64_t token, int64_t g) {
    int64_t slot = ((int64_t)table[token >> cache->block_shift] << cache->block_shift) + (token & (cache->block_size - 1));
    return slot * cache->num_kv_heads + g;
}

/* A head's elements of one token: where they are if they are float32, else what they stand for, in row. */
INLINE const float *head_at(const void *base, const float *scales, const struct cache *cache, const int32_t *table,
                            int64_t token, int64_t g, float *row) {
    int64_t head = head_of(cache, table, token, g), D = cache->head_size;
    if (cache->dtype == FLOAT32) return (const float *)base + head * D;
    if (cache->dtype == INT8) {
        const int8_t *codes = (const int8_t *)base + head * D;
        for (int64_t i = 0; i < D; i++) row[i] = codes[i] * scales[head];
    } else {
        read_floats(row, (const uint16_t *)base + head * D, cache->dtype, D);
    }
    return row;
}

#endif

/* Rotary embedding, the write to the paged cache, and attention of single rows and of prompts. See kernels/reference/attention.py. */
#ifndef OTTAVA_ATTENTION_H
#define OTTAVA_ATTENTION_H

#include "native.h"

/* Caches [num_blocks, block_size, num_kv_heads, head_size], contiguous; block_size is 1 << block_shift.
   Those of codes have a scale for each token's head. */
struct cache {
    void *keys, *values;
    float *key_scales, *value_scales; /* null: floats */
    int64_t dtype, block_size, block_shift, num_kv_heads, head_size;
};

struct rope {
    const void *qkv;
    void *q;
    const int32_t *positions, *slots;
    const float *cos_sin;
    const void *q_weight, *k_weight; /* null: heads are not normed */
    int64_t dtype, weight_dtype, num_rows, num_heads, num_rotated;
    float eps;
};

struct decode {
    const void *q;
    void *out;
    const int32_t *block_tables, *context_lens;
    int64_t dtype, table_stride, num_rows, num_heads, window; /* window: 0 for none */
    float scale;
};

/* Rows of one request, the last num_rows of its `context` tokens, [num_rows, num_heads, head_size]. */
struct prompt {
    const void *q;
    void *out;
    const int32_t *block_table;
    int64_t context, num_rows, num_heads, window; /* window: 0 for none */
    float scale;
    int64_t dtype;
};

/* Each returns -1 if there is no memory, else 0. */
struct attention_ops {
    int (*rope_and_cache)(struct rope step, struct cache cache);
    int (*decode_attention)(struct decode step, struct cache cache);
    int (*prompt_attention)(struct prompt step, struct cache cache);
};

extern const struct attention_ops attention_avx2, attention_avx512;
int prompt_attention_avx2(struct prompt step, struct cache cache);
int prompt_attention_avx512(struct prompt step, struct cache cache);

/* Whether the processor has AMX for bfloat16, the kernel lets this process use it, and the compiler knew it. */
int has_amx_bfloat16(void);

/* The same in bfloat16, which dtype then is. Only where has_amx_bfloat16() is true. */
int prompt_attention_amx(struct prompt step, struct cache cache);

#endif

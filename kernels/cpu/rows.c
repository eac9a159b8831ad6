#include "rows.h"

#include "epilogue.h"
#include "exponential.h"
#include "rounding.h"
#include "sums.h"

#ifdef OTTAVA_AVX512
#define ROW_OPS rows_avx512
#else
#define ROW_OPS rows_avx2
#endif

enum { WORK_OF_A_PIECE = 16384, COLUMNS_AT_ONCE = 512 };

/* Row r of a result of n columns, to where it goes. */
INLINE void put_row(struct target to, int64_t r, const float *restrict x, int64_t n) {
    if (to.codes == NULL) {
        write_floats((char *)to.out + r * n * size_of(to.dtype), x, to.dtype, n);
        return;
    }
    int8_t *codes = to.codes + r * n;
    if (to.is_static) {
        round_row(codes, x, to.scale[0], -128.0f, n);
        return;
    }
    to.scale[r] = quantize_row(codes, x, n);
}

struct rows {
    const void *x, *residual, *weight;
    void *summed;
    int64_t dtype, weight_dtype, stride, num_rows, width;
    float eps;
    struct target to;
    int failed;
};

static int run(struct rows *task, body body) {
    parallel_for(task->num_rows, 1 + WORK_OF_A_PIECE / (task->width + 1), body, task);
    return task->failed ? -1 : 0;
}

VECTOR static void quantize_rows_of(int64_t begin, int64_t end, void *context) {
    struct rows *task = context;
    float *row = malloc((size_t)task->width * sizeof *row + 1);
    if (row == NULL) {
        task->failed = 1;
        return;
    }
    for (int64_t r = begin; r < end; r++) {
        const char *x = (const char *)task->x + r * task->stride * size_of(task->dtype);
        read_floats(row, x, task->dtype, task->width);
        put_row(task->to, r, row, task->width);
    }
    free(row);
}

static int quantize(const void *x, int64_t dtype, int64_t stride, int64_t num_rows, int64_t width, struct target to) {
    struct rows task = {.x = x, .dtype = dtype, .stride = stride, .num_rows = num_rows, .width = width, .to = to};
    return run(&task, quantize_rows_of);
}

VECTOR static void norm_rows_of(int64_t begin, int64_t end, void *context) {
    struct rows *task = context;
    int64_t n = task->width, row_bytes = n * size_of(task->dtype);
    float *h = malloc((size_t)n * 3 * sizeof *h + 1), *added = h + n, *weight = added + n;
    if (h == NULL) {
        task->failed = 1;
        return;
    }
    read_floats(weight, task->weight, task->weight_dtype, n);
    for (int64_t r = begin; r < end; r++) {
        read_floats(h, (const char *)task->x + r * row_bytes, task->dtype, n);
        if (task->residual != NULL) {
            read_floats(added, (const char *)task->residual + r * row_bytes, task->dtype, n);
            for (int64_t i = 0; i < n; i++) h[i] += added[i];
            char *summed = (char *)task->summed + r * row_bytes;
            write_floats(summed, h, task->dtype, n);
            read_floats(h, summed, task->dtype, n);
        }
        norm(h, weight, task->eps, n);
        put_row(task->to, r, h, n);
    }
    free(h);
}

static int rms_norm(const void *x, const void *residual, void *summed, int64_t dtype, const void *weight, int64_t weight_dtype,
             float eps, int64_t num_rows, int64_t width, struct target to) {
    struct rows task = {.x = x, .residual = residual, .summed = summed, .dtype = dtype, .weight = weight,
                        .weight_dtype = weight_dtype, .eps = eps, .num_rows = num_rows, .width = width, .to = to};
    return run(&task, norm_rows_of);
}

VECTOR static void gate_rows_of(int64_t begin, int64_t end, void *context) {
    struct rows *task = context;
    int64_t n = task->width, row_bytes = 2 * n * size_of(task->dtype);
    float *gate = malloc((size_t)n * 3 * sizeof *gate + 1), *up = gate + n, *powers = up + n;
    if (gate == NULL) {
        task->failed = 1;
        return;
    }
    for (int64_t r = begin; r < end; r++) {
        read_floats(gate, (const char *)task->x + r * row_bytes, task->dtype, 2 * n);
        gate_row(gate, up, powers, n);
        put_row(task->to, r, gate, n);
    }
    free(gate);
}

static int silu_mul(const void *gate_up, int64_t dtype, int64_t num_rows, int64_t width, struct target to) {
    struct rows task = {.x = gate_up, .dtype = dtype, .num_rows = num_rows, .width = width, .to = to};
    return run(&task, gate_rows_of);
}

struct finished {
    struct epilogue from;
    struct target to;
    int failed;
};

VECTOR static void finish_pieces(int64_t begin, int64_t end, void *context) {
    const struct finished *task = context;
    const struct epilogue *from = &task->from;
    int64_t pieces = (from->num_columns + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
    float y[COLUMNS_AT_ONCE];
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t r = piece / pieces, first = piece % pieces * COLUMNS_AT_ONCE, left = from->num_columns - first;
        int64_t n = left < COLUMNS_AT_ONCE ? left : COLUMNS_AT_ONCE;
        const int32_t *sums = from->acc + r * from->num_columns + first;
        finish_some(y, sums, from, r, first, n, task->to.out, task->to.dtype);
    }
}

static int finish(struct epilogue from, struct target to) {
    struct finished task = {from, to, 0};
    int64_t pieces = (from.num_columns + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
    parallel_for(from.num_rows * pieces, WORK_OF_A_PIECE / COLUMNS_AT_ONCE, finish_pieces, &task);
    return 0;
}

VECTOR static void finish_gated_rows(int64_t begin, int64_t end, void *context) {
    struct finished *task = context;
    const struct epilogue *from = &task->from;
    int64_t n = from->num_columns / 2;
    float *pairs = malloc((size_t)n * 5 * sizeof *pairs + 1), *restrict y = pairs + 2 * n, *restrict up = y + n;
    if (pairs == NULL) {
        task->failed = 1;
        return;
    }
    for (int64_t r = begin; r < end; r++) {
        scaled(pairs, from->acc + r * from->num_columns, from, r, 0, 2 * n);
        if (from->bias != NULL) add_floats(pairs, from->bias, from->bias_dtype, 0, 2 * n);
        for (int64_t i = 0; i < n; i++) {
            y[i] = pairs[2 * i];
            up[i] = pairs[2 * i + 1];
        }
        gate_row(y, up, up + n, n);
        if (task->to.dtype == BFLOAT16)
            for (int64_t i = 0; i < n; i++) y[i] = of_bfloat16(to_bfloat16(y[i]));
        put_row(task->to, r, y, n);
    }
    free(pairs);
}

static int finish_gated(struct epilogue from, struct target to) {
    struct finished task = {from, to, 0};
    parallel_for(from.num_rows, 1 + WORK_OF_A_PIECE / 4 / (from.num_columns + 1), finish_gated_rows, &task);
    return task.failed ? -1 : 0;
}

const struct row_ops ROW_OPS = {quantize, rms_norm, finish, finish_gated, silu_mul};

#include "native.h"

static int32_t (*torch_parallel_for)(int64_t, int64_t, int64_t, body, void *);

void use_threads(void *address) { torch_parallel_for = (int32_t(*)(int64_t, int64_t, int64_t, body, void *))address; }

void parallel_for(int64_t size, int64_t grain, body body, void *task) {
    if (size <= grain || torch_parallel_for == NULL || torch_parallel_for(0, size, grain, body, task) != 0)
        body(0, size, task);
}

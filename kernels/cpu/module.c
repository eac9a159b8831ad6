/* The Python module `kernels.cpu.native`. Every argument is a number: an address, a size, a dtype, a scale. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "attention.h"
#include "product.h"
#include "rows.h"

enum { MOST_ARGUMENTS = 24 };

/* Those of the widest vectors that the processor has. */
static struct row_ops rows;
static struct attention_ops attention;

static int use_wide_vectors(int are_wanted) {
    int has_them = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    int are_used = are_wanted && has_them;
    rows = are_used ? rows_avx512 : rows_avx2;
    attention = are_used ? attention_avx512 : attention_avx2;
    return are_used;
}

typedef int (*product)(const int8_t *x, const int8_t *weight, int32_t *acc, int64_t num_rows, int64_t num_columns,
                       int64_t depth, int64_t x_stride, int64_t weight_stride);

/* A Linear of few rows: as int8_linear_amx, but its sums go through memory. */
static int linear_over(product multiply, const int8_t *x, const int8_t *weight, int64_t depth, int64_t x_stride,
                       int64_t weight_stride, struct epilogue from, void *out, int64_t out_dtype) {
    int32_t *acc = malloc((size_t)(from.num_rows * from.num_columns + 1) * sizeof *acc);
    if (acc == NULL) return -1;
    from.acc = acc;
    int failed = multiply(x, weight, acc, from.num_rows, from.num_columns, depth, x_stride, weight_stride);
    if (!failed) failed = rows.finish(from, (struct target){.out = out, .dtype = out_dtype});
    free(acc);
    return failed;
}

static int int8_linear(const int8_t *x, const int8_t *weight, int64_t depth, int64_t x_stride, int64_t weight_stride,
                       struct epilogue from, void *out, int64_t out_dtype) {
    if (from.num_rows > FEW_ROWS)
        return int8_linear_packed(x, weight, depth, x_stride, weight_stride, from, out, out_dtype);
    return linear_over(int8_product, x, weight, depth, x_stride, weight_stride, from, out, out_dtype);
}

typedef struct {
    int64_t whole;
    double real;
} number;

/* 0, or -1 with an exception set. */
static int read_numbers(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, number *numbers) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd numbers are wanted, %zd were given", wanted, given);
        return -1;
    }
    for (Py_ssize_t i = 0; i < given; i++) {
        numbers[i] = (number){0, 0.0};
        if (PyFloat_Check(args[i])) {
            numbers[i].real = PyFloat_AsDouble(args[i]);
        } else {
            numbers[i].whole = PyLong_AsLongLong(args[i]);
            if (numbers[i].whole == -1 && PyErr_Occurred()) return -1;
        }
    }
    return 0;
}

#define POINTER(i) ((void *)(intptr_t)n[i].whole)
#define WHOLE(i) (n[i].whole)
#define REAL(i) ((float)n[i].real)
#define TARGET(i) ((struct target){POINTER(i), WHOLE(i + 1), POINTER(i + 2), POINTER(i + 3), WHOLE(i + 4)})
#define EPILOGUE                                                                                                       \
    ((struct epilogue){POINTER(0), POINTER(1), POINTER(2), WHOLE(3), WHOLE(4), POINTER(5), POINTER(6), WHOLE(7),       \
                       WHOLE(8), WHOLE(9), WHOLE(10)})
#define CACHE(i)                                                                                                       \
    ((struct cache){POINTER(i), POINTER(i + 1), POINTER(i + 2), POINTER(i + 3), WHOLE(i + 4), WHOLE(i + 5),            \
                    WHOLE(i + 6), WHOLE(i + 7), WHOLE(i + 8)})

/* A function of `count` numbers that computes `call` without Python's lock. */
#define FUNCTION(name, count, call)                                                                                    \
    static PyObject *call_##name(PyObject *self, PyObject *const *args, Py_ssize_t given) {                            \
        (void)self;                                                                                                    \
        number n[MOST_ARGUMENTS];                                                                                      \
        if (read_numbers(args, given, count, n) != 0) return NULL;                                                     \
        int failed;                                                                                                    \
        Py_BEGIN_ALLOW_THREADS failed = call;                                                                          \
        Py_END_ALLOW_THREADS if (failed) return PyErr_NoMemory();                                                      \
        Py_RETURN_NONE;                                                                                                \
    }

FUNCTION(int8_product, 8,
         int8_product(POINTER(0), POINTER(1), POINTER(2), WHOLE(3), WHOLE(4), WHOLE(5), WHOLE(6), WHOLE(7)))
FUNCTION(int8_product_vnni, 8,
         int8_product_vnni(POINTER(0), POINTER(1), POINTER(2), WHOLE(3), WHOLE(4), WHOLE(5), WHOLE(6), WHOLE(7)))
FUNCTION(int8_product_amx, 8,
         int8_product_amx(POINTER(0), POINTER(1), POINTER(2), WHOLE(3), WHOLE(4), WHOLE(5), WHOLE(6), WHOLE(7)))
FUNCTION(int8_linear_amx, 18,
         int8_linear_amx(POINTER(11), POINTER(12), WHOLE(13), WHOLE(14), WHOLE(15), EPILOGUE, POINTER(16), WHOLE(17)))
FUNCTION(int8_linear_vnni, 18,
         linear_over(int8_product_vnni, POINTER(11), POINTER(12), WHOLE(13), WHOLE(14), WHOLE(15), EPILOGUE,
                     POINTER(16), WHOLE(17)))
FUNCTION(int8_linear, 18,
         int8_linear(POINTER(11), POINTER(12), WHOLE(13), WHOLE(14), WHOLE(15), EPILOGUE, POINTER(16), WHOLE(17)))
FUNCTION(quantize, 10, rows.quantize(POINTER(0), WHOLE(1), WHOLE(2), WHOLE(3), WHOLE(4), TARGET(5)))
FUNCTION(rms_norm, 14,
         rows.rms_norm(POINTER(0), POINTER(1), POINTER(2), WHOLE(3), POINTER(4), WHOLE(5), REAL(6), WHOLE(7), WHOLE(8),
                       TARGET(9)))
FUNCTION(silu_mul, 9, rows.silu_mul(POINTER(0), WHOLE(1), WHOLE(2), WHOLE(3), TARGET(4)))
FUNCTION(finish, 16, rows.finish(EPILOGUE, TARGET(11)))
FUNCTION(finish_gated, 16, rows.finish_gated(EPILOGUE, TARGET(11)))
FUNCTION(rope_and_cache, 22,
         attention.rope_and_cache((struct rope){POINTER(0), POINTER(1), POINTER(2), POINTER(3), POINTER(4), POINTER(5),
                                                POINTER(6), WHOLE(7), WHOLE(8), WHOLE(9), WHOLE(10), WHOLE(11), REAL(12)},
                                  CACHE(13)))
FUNCTION(decode_attention, 19,
         attention.decode_attention((struct decode){POINTER(0), POINTER(1), POINTER(2), POINTER(3), WHOLE(4), WHOLE(5),
                                                    WHOLE(6), WHOLE(7), WHOLE(8), REAL(9)},
                                    CACHE(10)))

FUNCTION(prompt_attention_amx, 17,
         prompt_attention_amx((struct prompt){POINTER(0), POINTER(1), POINTER(2), WHOLE(3), WHOLE(4), WHOLE(5), WHOLE(6),
                                              REAL(7), BFLOAT16},
                              CACHE(8)))
FUNCTION(prompt_attention, 18,
         attention.prompt_attention((struct prompt){POINTER(0), POINTER(1), POINTER(2), WHOLE(3), WHOLE(4), WHOLE(5),
                                                    WHOLE(6), REAL(7), WHOLE(8)},
                                    CACHE(9)))

static PyObject *call_use_threads(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    number n[1];
    if (read_numbers(args, given, 1, n) != 0) return NULL;
    use_threads(POINTER(0));
    Py_RETURN_NONE;
}

static PyObject *call_use_avx512(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    number n[1];
    if (read_numbers(args, given, 1, n) != 0) return NULL;
    return PyBool_FromLong(use_wide_vectors(WHOLE(0) != 0));
}

static PyObject *call_is_supported(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self, (void)args, (void)given;
    return PyBool_FromLong(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
}

static PyObject *call_has_vnni(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self, (void)args, (void)given;
    return PyBool_FromLong(has_vnni());
}

static PyObject *call_has_amx(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self, (void)args, (void)given;
    return PyBool_FromLong(has_amx());
}

static PyObject *call_has_amx_bfloat16(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self, (void)args, (void)given;
    return PyBool_FromLong(has_amx_bfloat16());
}

#define METHOD(name, does) {#name, (PyCFunction)(void (*)(void))call_##name, METH_FASTCALL, does}
static PyMethodDef methods[] = {
    METHOD(is_supported, "Whether this processor has the instructions that everything here is compiled to."),
    METHOD(use_avx512, "Use AVX-512 where the processor has it, as at first, or with 0 not. Returns whether it is used."),
    METHOD(use_threads, "Work on torch's threads; the argument is the address of its torch_parallel_for."),
    METHOD(int8_product, "See product.h."),
    METHOD(has_vnni, "Whether this processor has the instructions of int8_product_vnni."),
    METHOD(int8_product_vnni, "See product.h."),
    METHOD(has_amx, "Whether this process can use the instructions of int8_product_amx."),
    METHOD(int8_product_amx, "See product.h."),
    METHOD(int8_linear_amx, "See product.h."),
    METHOD(int8_linear_vnni, "The same where there is no AMX, for few rows."),
    METHOD(int8_linear, "The same with AVX2 alone."),
    METHOD(quantize, "See rows.h."),
    METHOD(rms_norm, "See rows.h."),
    METHOD(silu_mul, "See rows.h."),
    METHOD(finish, "See rows.h."),
    METHOD(finish_gated, "See rows.h."),
    METHOD(rope_and_cache, "See attention.h."),
    METHOD(decode_attention, "See attention.h."),
    METHOD(has_amx_bfloat16, "Whether this process can use the instructions of prompt_attention_amx."),
    METHOD(prompt_attention_amx, "See attention.h."),
    METHOD(prompt_attention, "See attention.h."),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "native", "Ops on CPU tensors in C.", -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_native(void) {
    use_wide_vectors(1);
    return PyModule_Create(&module);
}

#define OTTAVA_AVX512
#include "rows.c"

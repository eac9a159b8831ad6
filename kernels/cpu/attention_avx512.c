#define OTTAVA_AVX512
#include "attention.c"

#define OTTAVA_AVX512
#include "attention_prompts.c"

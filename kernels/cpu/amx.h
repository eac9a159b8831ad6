/* What the files for processors with AMX share. The C of both is left out where OTTAVA_AMX is not defined: the compiler does
 * not know the instructions, or this is another system. */
#ifndef OTTAVA_AMX_H
#define OTTAVA_AMX_H

#include "native.h"

#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11)
#define OTTAVA_AMX

#define AMX_TARGETS "amx-tile,amx-int8,avx512f,avx512bw,avx512vl"
#define INLINE_AMX static inline __attribute__((always_inline, target(AMX_TARGETS)))

/* A tile is SIDE rows of TILE_ROW bytes. */
enum { SIDE = 16, TILE_ROW = 64, TILE = SIDE * TILE_ROW };

/* What a tile is, for each of the eight. */
INLINE_AMX void use_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t num_rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = TILE_ROW, config.num_rows[tile] = SIDE;
    _tile_loadconfig(&config);
}

/* The first n of 16 numbers, all of them from 16 on and none below 1. */
INLINE_AMX __mmask16 first_of(int64_t n) {
    return n >= SIDE ? (__mmask16)0xffff : n <= 0 ? 0 : (__mmask16)((1 << n) - 1);
}

#endif
#endif

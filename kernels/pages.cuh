// Pages of the cache: PAGE_TOKENS tokens of one key and value head, contiguous, for cache.cu and decode.cu.
//
// Keys and values lie as the left operands of m16n8k16, 16 x 16 tiles in the order of their registers, so that a
// lane's part of a tile is one word of codes, or four of f16:
//
//     keys, tile s:    rows are tokens, columns are channels 16 s ..;   values, tile j: rows are channels 16 j .., columns are tokens
//
//     lane 4 g + t     register 0: row g, columns 2 t, 2 t + 1   1: row g + 8, the same columns
//                               2: row g, columns 2 t + 8, + 9   3: row g + 8
//
//     a word of codes  | 31..28 | 27..24 | 23..20 | 19..16 | 15..12 | 11..8 | 7..4 | 3..0 |
//     register             3        2        1        0        3       2      1      0
//     column of the pair  odd      odd      odd      odd     even    even   even   even
//
// So `word & 0x000f000f` is register 0 as two f16 of code * 2^-24, exactly: subnormal numbers, which the tensor
// cores multiply like any other. `word & 0x00f000f0` is register 1, 16 times as large; a shift by 8 yields the others.
//
// Codes of more than 4 bits are held in 8, in two words of a lane and tile:
//
//     word w           | 31..24 | 23..16 | 15..8 | 7..0 |
//     register          2 w + 1    2 w    2 w + 1   2 w
//     column of the pair  odd      odd      even    even
//
// `word & 0x00ff00ff` is register 2 w, and after a shift by 8 register 2 w + 1, both as code * 2^-24.
//
//     QUANTIZED:  key words | value words | 8 x {scale, zero point of token g, of g + 8} of keys | 8 x {scale of g, of g + 8} of values
//                 | 4 x {zero points of tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9} of values          (f16; CODE_BITS * 4 * HEAD_DIM + 128 bytes)
//     else:       key words | value words                                                          (64 * HEAD_DIM bytes)
//
// A lane loads the words of four tiles together where there are four.

#if !defined(PAGE_TOKENS) || !defined(WIDEST_HEAD) || !defined(SIDE_BYTES) || !defined(PAGE_BYTES)
#error "a constant is missing: src/backend/cuda/kernels/cache.rs declares them"
#endif

#define QUANTIZED (KV_BITS < 16)
/// Bits that hold a code, or an f16.
#define CODE_BITS (KV_BITS <= 4 ? 4 : KV_BITS <= 8 ? 8 : 16)
/// Tiles of keys, and of values.
#define TILES (HEAD_DIM / 16)
/// Words of a lane in a tile.
#define TILE_WORDS (CODE_BITS / 4)
/// Registers of a word.
#define WORD_REGISTERS (4 / TILE_WORDS)

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= WIDEST_HEAD && PAGE_TOKENS == 16, "pages hold tiles of 16 x 16");
static_assert(SIDE_BYTES == TILES * TILE_WORDS * 128, "keys, and values: a word or four a lane and tile");

/// Where a lane's word of a tile lies, in words from the side's first: word `which` of TILE_WORDS.
static __device__ __forceinline__ int word_at(int tile, int lane, int which) {
    if (!QUANTIZED) return (tile * 32 + lane) * 4 + which;
    const int first = tile / 4 * 4, width = TILES - first < 4 ? TILES - first : 4;
    return (first * 32 + lane * width + tile % 4) * TILE_WORDS + which;
}

// Where a token's numbers lie after the codes, in f16.
static __device__ __forceinline__ int key_scale_at(int token) { return (token % 8 * 2 + token / 8) * 2; }
static __device__ __forceinline__ int value_scale_at(int token) { return 32 + token % 8 * 2 + token / 8; }
static __device__ __forceinline__ int value_zero_at(int token) { return 48 + token % 8 / 2 * 4 + token / 8 * 2 + token % 2; }

// Value norms ‖v W‖₁ of many entries of one key/value head by AMX's products of bf16 tiles; see value_norms.py.
//
// Compiled for one DIM, the numbers of a value, a multiple of 32. A tile has 16 lines of 64 bytes: 16 entries by 32
// numbers of their values, 32 numbers by 16 columns of the weight, or 16 entries by 16 columns of the product, in fp32.
// Products are exact, summed in fp32, and never stored: the magnitudes of a tile are added to its entries' sums. The
// process must have been allowed to use tiles.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if DIM % 32
#error "DIM is a multiple of 32"
#endif
#define SIDE 16        // lines of a tile, and columns of the product
#define DEPTH 32       // numbers of a value that a tile has
#define ROWS (2 * SIDE) // entries that are multiplied with the same part of the weight
#define CHUNK 512      // entries of a thread's piece of work, a multiple of ROWS

typedef uint16_t number;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} tile_config;

// The weight in tiles, of each SIDE columns one after the other: in a line, two numbers of a column are neighbours.
static void pack(const number *weight, int64_t columns, number *panel) {
    int64_t blocks = (columns + SIDE - 1) / SIDE;
    for (int64_t block = 0; block < blocks; block++)
        for (int d = 0; d < DIM; d += 2) {
            number *line = panel + (block * DIM + d) * SIDE;
            const number *even = weight + d * columns + block * SIDE, *odd = even + columns;
            int width = columns - block * SIDE < SIDE ? (int)(columns - block * SIDE) : SIDE;
            for (int c = 0; c < width; c++) {
                line[2 * c] = even[c];
                line[2 * c + 1] = odd[c];
            }
            memset(line + 2 * width, 0, 2 * (SIDE - width) * sizeof(number));
        }
}

static inline void add_magnitudes(const float *products, __m512 *sums) {
    for (int r = 0; r < ROWS; r++) sums[r] = _mm512_add_ps(sums[r], _mm512_abs_ps(_mm512_load_ps(products + r * SIDE)));
}

// The magnitudes of a block's products are added while those of the next one are made.
static void norms_of_rows(const number *values, const number *panel, int64_t blocks, __m512 *sums) {
    _Alignas(64) float products[2][ROWS * SIDE] = {0};
    memset(sums, 0, ROWS * sizeof *sums);
    for (int64_t block = 0; block < blocks; block++) {
        float *own = products[block % 2];
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < DIM; d += DEPTH, panel += DEPTH * SIDE) {
            _tile_loadd(2, panel, 64);
            _tile_loadd(3, values + d, DIM * sizeof(number));
            _tile_loadd(4, values + SIDE * DIM + d, DIM * sizeof(number));
            _tile_dpbf16ps(0, 3, 2);
            _tile_dpbf16ps(1, 4, 2);
        }
        add_magnitudes(products[(block + 1) % 2], sums);
        _tile_stored(0, own, 64);
        _tile_stored(1, own + SIDE * SIDE, 64);
    }
    add_magnitudes(products[(blocks + 1) % 2], sums);
}

// norms[i] = sum over j of |values[i] . weight[:, j]|, for values (n, DIM) and weight (DIM, columns), both bf16; `panel`
// has room for the weight with its columns rounded up to a multiple of SIDE.
void value_norms_amx(const number *values, const number *weight, int64_t n, int64_t columns, int threads, number *panel,
                     float *norms) {
    pack(weight, columns, panel);
    int64_t blocks = (columns + SIDE - 1) / SIDE;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t chunk = 0; chunk < n; chunk += CHUNK) {
        tile_config config = {.palette = 1};
        for (int tile = 0; tile < 5; tile++) config.line_bytes[tile] = 64, config.lines[tile] = SIDE;
        _tile_loadconfig(&config);
        for (int64_t first = chunk; first < n && first < chunk + CHUNK; first += ROWS) {
            int64_t count = n - first < ROWS ? n - first : ROWS;
            number whole[ROWS * DIM];
            const number *rows = values + first * DIM;
            if (count < ROWS) { // tiles are read whole
                memset(whole, 0, sizeof whole);
                rows = memcpy(whole, rows, count * DIM * sizeof(number));
            }
            __m512 sums[ROWS];
            norms_of_rows(rows, panel, blocks, sums);
            for (int64_t r = 0; r < count; r++) norms[first + r] = _mm512_reduce_add_ps(sums[r]);
        }
        _tile_release();
    }
}

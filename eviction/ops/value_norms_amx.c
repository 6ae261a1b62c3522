// Value norms ‖v W‖₁ of many entries of one key/value head by AMX's products of bf16 tiles; see value_norms.py.
//
// Compiled for one DIM, the numbers of a value, a multiple of 32. A tile has 16 lines of 64 bytes: 16 entries by 32
// numbers of their values, 32 numbers by 16 columns of the weight, or 16 entries by 16 columns of the product, in fp32.
// Products of bf16 numbers are exact, summed in fp32, and never stored: the magnitudes of a tile are added to its
// entries' sums. Without BF16 values and weight are fp32: each is a bf16 number and a rest that is rounded to bf16, and of
// the four products that of the rests, 2^-16 of the whole at most, is left out. The process must have been allowed to use
// tiles.

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

typedef uint16_t half;

#ifdef BF16
#define PARTS 1
typedef uint16_t number;

static inline void divide(number x, half *parts) { parts[0] = x; }
#else
#define PARTS 2
typedef float number;

static inline half narrow(float x) { // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : (half)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void divide(number x, half *parts) {
    parts[0] = narrow(x);
    uint32_t bits = (uint32_t)parts[0] << 16;
    float first;
    memcpy(&first, &bits, sizeof first);
    parts[1] = narrow(x - first);
}
#endif

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} tile_config;

// Some columns of the weight, in tiles: in a line, two numbers of a column are neighbours.
typedef struct {
    half pairs[DIM / 2][SIDE][2];
} columns_of_weight;

static int64_t blocks_of(int64_t columns) { return (columns + SIDE - 1) / SIDE; }

// One member's weight (DIM, columns) in blocks of SIDE columns, each of PARTS parts.
static void pack(const number *weight, int64_t dim_step, int64_t column_step, int64_t columns, columns_of_weight *panel) {
    for (int64_t first = 0; first < columns; first += SIDE, panel += PARTS) {
        int width = columns - first < SIDE ? (int)(columns - first) : SIDE;
        const number *block = weight + first * column_step;
        if (width < SIDE) memset(panel, 0, PARTS * sizeof *panel);
        for (int d = 0; d < DIM; d += 2)
            for (int c = 0; c < width; c++) {
                half even[PARTS], odd[PARTS];
                divide(block[c * column_step + d * dim_step], even);
                divide(block[c * column_step + (d + 1) * dim_step], odd);
                for (int p = 0; p < PARTS; p++) {
                    panel[p].pairs[d / 2][c][0] = even[p];
                    panel[p].pairs[d / 2][c][1] = odd[p];
                }
            }
    }
}

static inline void add_magnitudes(const float *products, __m512 *sums) {
    for (int r = 0; r < ROWS; r++) sums[r] = _mm512_add_ps(sums[r], _mm512_abs_ps(_mm512_load_ps(products + r * SIDE)));
}

static inline void multiply(const half *values, const columns_of_weight *panel, int d) {
    _tile_loadd(2, panel->pairs[d / 2], 64);
    _tile_loadd(3, values + d, DIM * sizeof(half));
    _tile_loadd(4, values + SIDE * DIM + d, DIM * sizeof(half));
    _tile_dpbf16ps(0, 3, 2);
    _tile_dpbf16ps(1, 4, 2);
}

// The magnitudes of a block's products are added while those of the next one are made.
static void norms_of_rows(half values[PARTS][ROWS * DIM], const columns_of_weight *panel, int64_t blocks, __m512 *sums) {
    _Alignas(64) float products[2][ROWS * SIDE] = {0};
    memset(sums, 0, ROWS * sizeof *sums);
    for (int64_t block = 0; block < blocks; block++, panel += PARTS) {
        float *own = products[block % 2];
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < DIM; d += DEPTH) {
            multiply(values[0], panel, d);
            if (PARTS == 2) {
                multiply(values[0], panel + PARTS - 1, d);
                multiply(values[PARTS - 1], panel, d);
            }
        }
        add_magnitudes(products[(block + 1) % 2], sums);
        _tile_stored(0, own, 64);
        _tile_stored(1, own + SIDE * SIDE, 64);
    }
    add_magnitudes(products[(blocks + 1) % 2], sums);
}

// norms[i] = the mean over `members` of the sum over j of |values[i] . weight[member, :, j]|, for values (n, DIM) and
// weight (members, DIM, columns), whose numbers are these steps apart; those of a value are neighbours. `panel` has room
// for the weight with each member's columns rounded up to a multiple of SIDE, PARTS times.
void value_norms_amx(const number *values, int64_t step, int64_t n, const number *weight, int64_t member_step,
                     int64_t dim_step, int64_t column_step, int64_t members, int64_t columns, int threads,
                     columns_of_weight *panel, float *norms) {
    int64_t blocks = blocks_of(columns);
    for (int64_t m = 0; m < members; m++)
        pack(weight + m * member_step, dim_step, column_step, columns, panel + m * blocks * PARTS);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t chunk = 0; chunk < n; chunk += CHUNK) {
        tile_config config = {.palette = 1};
        for (int tile = 0; tile < 5; tile++) config.line_bytes[tile] = 64, config.lines[tile] = SIDE;
        _tile_loadconfig(&config);
        for (int64_t first = chunk; first < n && first < chunk + CHUNK; first += ROWS) {
            int64_t count = n - first < ROWS ? n - first : ROWS;
            half rows[PARTS][ROWS * DIM];
            if (count < ROWS) memset(rows, 0, sizeof rows); // tiles are read whole
            for (int64_t r = 0; r < count; r++)
                for (int d = 0; d < DIM; d++) {
                    half parts[PARTS];
                    divide(values[(first + r) * step + d], parts);
                    for (int p = 0; p < PARTS; p++) rows[p][r * DIM + d] = parts[p];
                }
            __m512 sums[ROWS];
            norms_of_rows(rows, panel, members * blocks, sums);
            for (int64_t r = 0; r < count; r++) norms[first + r] = _mm512_reduce_add_ps(sums[r]) / members;
        }
        _tile_release();
    }
}

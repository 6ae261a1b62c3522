// Value norms ‖v W‖₁ of many entries of one key/value head, without storing the products; see value_norms.py.
//
// Compiled for one DIM, the numbers of a value. With BF16, which needs AVX512-BF16 and an even DIM, values and weight
// are bf16 and multiplied two at a time, else fp32; sums are fp32 in both cases.

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define ROWS 12 // entries whose products with 2 * LANES columns are held in registers
#else
#define LANES 8
#define ROWS 6
#endif
#define COLUMNS (2 * LANES)
#define CHUNK 480 // entries of a thread's piece of work, a multiple of ROWS; their values stay in the cache

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

// `factor` is what a step multiplies of an entry's value, `factors` of 2 * LANES columns of the weight.
#ifdef BF16
#include <immintrin.h>
typedef uint16_t number;
typedef uint32_t factor; // two numbers; x86 is little-endian
typedef words factors;
#define STEPS (DIM / 2)

static inline vec multiply_add(vec sum, factors columns, factor value) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)columns, (__m512bh)_mm512_set1_epi32((int)value));
}

static inline factor column_factor(const number *weight, int64_t columns, int step) {
    return weight[2 * step * columns] | (uint32_t)weight[(2 * step + 1) * columns] << 16;
}
#else
typedef float number;
typedef float factor;
typedef vec factors;
#define STEPS DIM

static inline vec multiply_add(vec sum, factors columns, factor value) { return sum + columns * value; }

static inline factor column_factor(const number *weight, int64_t columns, int step) { return weight[step * columns]; }
#endif

static inline vec absolute(vec x) { return (vec)((words)x & 0x7fffffffu); }

static void norms_of_chunk(const number *values, const number *weight, int64_t columns, int count, float *norms) {
    factor rows[CHUNK][STEPS]; // beyond `count`: zeros, so that every tile is whole
    float sums[CHUNK] = {0};
    memcpy(rows, values, count * sizeof *rows);
    memset(rows + count, 0, (CHUNK - count) * sizeof *rows);
    for (int64_t start = 0; start < columns; start += COLUMNS) {
        int width = columns - start < COLUMNS ? (int)(columns - start) : COLUMNS;
        factors panel[STEPS][2]; // these columns of the weight
        for (int step = 0; step < STEPS; step++) {
            factor line[COLUMNS] = {0};
            for (int c = 0; c < width; c++) line[c] = column_factor(weight + start + c, columns, step);
            memcpy(panel[step], line, sizeof line);
        }
        for (int first = 0; first < count; first += ROWS) {
            vec product[ROWS][2];
            memset(product, 0, sizeof product);
            for (int step = 0; step < STEPS; step++)
                for (int r = 0; r < ROWS; r++) {
                    product[r][0] = multiply_add(product[r][0], panel[step][0], rows[first + r][step]);
                    product[r][1] = multiply_add(product[r][1], panel[step][1], rows[first + r][step]);
                }
            for (int r = 0; r < ROWS; r++) {
                vec both = absolute(product[r][0]) + absolute(product[r][1]);
                float sum = 0;
                for (int l = 0; l < LANES / 2; l++) sum += both[l] + both[l + LANES / 2];
                sums[first + r] += sum;
            }
        }
    }
    memcpy(norms, sums, count * sizeof(float));
}

// norms[i] = sum over j of |values[i] . weight[:, j]|, for values (n, DIM) and weight (DIM, columns).
void value_norms(const number *values, const number *weight, int64_t n, int64_t columns, int threads, float *norms) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t first = 0; first < n; first += CHUNK)
        norms_of_chunk(values + first * DIM, weight, columns, n - first < CHUNK ? (int)(n - first) : CHUNK,
                       norms + first);
}

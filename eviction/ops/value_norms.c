// Value norms ‖v W‖₁ of many entries of one key/value head, without storing the products; see value_norms.py.
//
// Compiled for one DIM, the numbers of a value.

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

static inline vec absolute(vec x) { return (vec)((words)x & 0x7fffffffu); }

static void norms_of_chunk(const float *values, const float *weight, int64_t columns, int count, float *norms) {
    float rows[CHUNK][DIM], sums[CHUNK] = {0}; // beyond `count`: zeros, so that every tile is whole
    memcpy(rows, values, count * sizeof *rows);
    memset(rows + count, 0, (CHUNK - count) * sizeof *rows);
    for (int64_t start = 0; start < columns; start += COLUMNS) {
        int width = columns - start < COLUMNS ? (int)(columns - start) : COLUMNS;
        vec panel[DIM][2]; // these columns of the weight
        memset(panel, 0, sizeof panel);
        for (int d = 0; d < DIM; d++) memcpy(panel[d], weight + d * columns + start, width * sizeof(float));
        for (int first = 0; first < count; first += ROWS) {
            vec product[ROWS][2];
            memset(product, 0, sizeof product);
            for (int d = 0; d < DIM; d++)
                for (int r = 0; r < ROWS; r++) {
                    product[r][0] += panel[d][0] * rows[first + r][d];
                    product[r][1] += panel[d][1] * rows[first + r][d];
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
void value_norms(const float *values, const float *weight, int64_t n, int64_t columns, int threads, float *norms) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t first = 0; first < n; first += CHUNK)
        norms_of_chunk(values + first * DIM, weight, columns, n - first < CHUNK ? (int)(n - first) : CHUNK,
                       norms + first);
}

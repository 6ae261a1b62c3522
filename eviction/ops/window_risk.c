// Attention of a window of queries over the entries of each key/value head, reduced to its worst case and its mean; see
// window_risk_by_heads.py.
//
// One compilation serves one DIM, the numbers of a key. With BF16 queries and keys are bf16, else fp32; all else is fp32.
// The lanes of a vector are queries, so that what is done along the entries needs no other lane. With AMX, for which DIM
// is a multiple of 32 and the process must have been allowed to use tiles, bf16 numbers are multiplied tile by tile.

#include <omp.h>
#include <stddef.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#include "lanes.h"

#define LOWEST -3.0e38f
#define KEYS 8    // entries whose logits are held in registers
#define BLOCK 128 // entries that are summed before the sum is added to those before; a multiple of LANES

#ifdef AMX
#define SIDE 16  // lines of a tile: entries, or queries
#define DEPTH 32 // numbers of a key that a tile has

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} tile_config;

typedef struct {
    number pairs[DIM / 2][SIDE][2];
} asking;

static void pack(asking *to, int lane, const number *query) {
    for (int d = 0; d < DIM; d++) to->pairs[d / 2][lane][d % 2] = query ? query[d] : 0;
}

// logits[i][lane]: the product of key i and the query of that lane.
static void multiply(const asking *queries, const number *keys, int64_t step, int64_t n, vec *logits) {
    tile_config config = {.palette = 1};
    for (int tile = 0; tile < 3; tile++) config.line_bytes[tile] = 64, config.lines[tile] = SIDE;
    _tile_loadconfig(&config);
    for (int64_t first = 0; first < n; first += SIDE) {
        number whole[SIDE * DIM];
        const number *rows = keys + first * step;
        int64_t line = step * (int64_t)sizeof(number);
        if (n - first < SIDE) { // tiles are read whole
            memset(whole, 0, sizeof whole);
            for (int64_t i = 0; i < n - first; i++) memcpy(whole + i * DIM, rows + i * step, DIM * sizeof(number));
            rows = whole;
            line = DIM * sizeof(number);
        }
        _tile_zero(0);
        for (int d = 0; d < DIM; d += DEPTH) {
            _tile_loadd(1, rows + d, line);
            _tile_loadd(2, queries->pairs[d / 2], 64);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, logits + first, 64);
    }
    _tile_release();
}
#else
typedef struct {
    vec numbers[DIM];
} asking;

static void pack(asking *to, int lane, const number *query) {
    for (int d = 0; d < DIM; d++) to->numbers[d][lane] = query ? widen(query[d]) : 0;
}

// logits[i][lane]: the product of key i and the query of that lane.
static void multiply(const asking *queries, const number *keys, int64_t step, int64_t n, vec *logits) {
    for (int64_t first = 0; first < n; first += KEYS) {
        float wide[KEYS][DIM];
        vec sums[KEYS];
        for (int i = 0; i < KEYS; i++) {
            const number *key = keys + (first + i < n ? first + i : n - 1) * step;
            for (int d = 0; d < DIM; d++) wide[i][d] = widen(key[d]);
        }
        memset(sums, 0, sizeof sums);
        for (int d = 0; d < DIM; d++)
            for (int i = 0; i < KEYS; i++) sums[i] += queries->numbers[d] * wide[i][d];
        for (int i = 0; i < KEYS; i++) logits[first + i] = sums[i];
    }
}
#endif

// The number of a head's entries at positions below `bound`; positions ascend, then there are -1.
static int64_t count_below(const int64_t *positions, int64_t n, int64_t bound) {
    int64_t low = 0;
    while (low < n) {
        int64_t middle = (low + n) / 2;
        if (positions[middle] >= 0 && positions[middle] < bound) low = middle + 1;
        else n = middle;
    }
    return low;
}

// The queries of a block of lanes, and what scales their weights.
typedef struct {
    int64_t positions[LANES]; // -1: no query
    vec inverse, scale;       // 1 / denominator, or 0 without one; and what the pooled weights are multiplied by
} block;

// Makes logits of `n` entries the weights exp(logit - highest), and writes what scales them. All queries of the head see
// the first `common` entries; the first `counted` ones are pooled over `reach` neighbours on each side.
static void weigh(block *of, vec *weights, const int64_t *positions, int64_t n, int64_t common, int64_t counted,
                  int64_t reach, float scaling) {
    vec lowest = (vec){0} + LOWEST, highest = lowest;
    for (int64_t i = 0; i < n; i++) {
        vec logits = weights[i] * scaling;
        if (i >= common)
            for (int lane = 0; lane < LANES; lane++)
                if (positions[i] > of->positions[lane]) logits[lane] = LOWEST;
        weights[i] = logits;
        highest = larger(highest, logits);
    }
    vec total = {0}, mass = {0}, pooled = {0};
    for (int64_t start = 0; start < n; start += BLOCK) {
        vec block_total = {0}, block_mass = {0}, block_pooled = {0};
        int64_t stop = n - start < BLOCK ? n : start + BLOCK;
        for (int64_t i = start; i < stop; i++) {
            float *lanes = (float *)(weights + i);
            const float *most = (const float *)&highest;
#pragma omp simd
            for (int lane = 0; lane < LANES; lane++) lanes[lane] = exponential(lanes[lane] - most[lane]);
            block_total += weights[i];
            if (i < counted) {
                int64_t last = i + reach < counted ? i + reach : counted - 1, before = i < reach ? 0 : i - reach;
                block_mass += weights[i];
                block_pooled += weights[i] * (float)(last - before + 1);
            }
        }
        total += block_total;
        mass += block_mass;
        pooled += block_pooled;
    }
    for (int lane = 0; lane < LANES; lane++) {
        int seen = of->positions[lane] >= 0 && highest[lane] > LOWEST;
        of->inverse[lane] = seen ? 1 / total[lane] : 0;
        of->scale[lane] = seen && pooled[lane] > 0 ? mass[lane] / pooled[lane] / total[lane] : 0;
    }
}

static void add_mean(const block *of, const vec *weights, int64_t n, float share, float *mean) {
    for (int64_t start = 0; start < n; start += LANES) {
        vec rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = weights[start + i] * of->inverse;
        vec sums = sum_each(rows) * share;
        for (int i = 0; i < LANES && start + i < n; i++) mean[start + i] += sums[i];
    }
}

// `weights` has `reach` vectors before the first entry and behind the last one, all zeros.
static void raise_worst(const block *of, const vec *weights, int64_t counted, int64_t reach, float *worst) {
    float check = 0; // a maximum hides what is not a number, and one such logit makes all weights of its query so
    for (int lane = 0; lane < LANES; lane++) check += of->inverse[lane];
    if (check != check)
        for (int64_t i = 0; i < counted; i++) worst[i] = check;
    for (int64_t start = 0; start < counted; start += LANES) {
        vec rows[LANES];
        for (int i = 0; i < LANES; i++) {
            vec pooled = weights[start + i];
            for (int64_t shift = 1; shift <= reach; shift++)
                pooled += weights[start + i - shift] + weights[start + i + shift];
            rows[i] = pooled * of->scale;
        }
        vec most = largest_each(rows);
        for (int i = 0; i < LANES && start + i < counted; i++)
            if (most[i] > worst[start + i]) worst[start + i] = most[i]; // stays what is not a number
    }
}

// queries (batch, heads * group, window, DIM), positions (batch, heads, n), query_positions (batch, window) and limits
// (batch) are contiguous; keys (batch, heads, n, DIM) have these steps between rows, heads and entries. worst and mean
// (batch, heads, n) are zeros before. A thread's scratch has room for n + 2 * reach + LANES + KEYS vectors. worst may be
// null.
void window_risk(const number *queries, const number *keys, const int64_t *positions, const int64_t *query_positions,
                 const int64_t *limits, int64_t batch, int64_t heads, int64_t n, int64_t group, int64_t window,
                 int64_t row_step, int64_t head_step, int64_t step, float scaling, int64_t reach, int threads,
                 float *scratch, float *worst, float *mean) {
    int64_t room = (n + 2 * reach + LANES + KEYS) * LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t segment = 0; segment < batch * heads; segment++) {
        int64_t row = segment / heads;
        const number *own_keys = keys + row * row_step + segment % heads * head_step;
        const number *own_queries = queries + segment * group * window * DIM;
        const int64_t *own_positions = positions + segment * n, *times = query_positions + row * window;
        vec *before = (vec *)(scratch + omp_get_thread_num() * room), *weights = before + reach;
        int64_t present = 0, earliest = INT64_MAX;
        for (int64_t i = 0; i < window; i++) {
            present += times[i] >= 0;
            if (times[i] < earliest) earliest = times[i] < 0 ? -1 : times[i];
        }
        int64_t length = count_below(own_positions, n, INT64_MAX);
        int64_t common = count_below(own_positions, length, earliest + 1);
        int64_t counted = count_below(own_positions, length, limits[row]);
        if (!length || !present) continue;
        for (int64_t first = 0; first < group * window; first += LANES) {
            block of;
            asking packed;
            for (int lane = 0; lane < LANES; lane++) {
                int64_t query = first + lane;
                int exists = query < group * window;
                of.positions[lane] = exists ? times[query % window] : -1;
                pack(&packed, lane, exists ? own_queries + query * DIM : NULL);
            }
            multiply(&packed, own_keys, step, length, weights);
            weigh(&of, weights, own_positions, length, common, counted, reach, scaling);
            add_mean(&of, weights, length, 1.0f / (float)(present * group), mean + segment * n);
            if (!worst) continue;
            memset(before, 0, reach * sizeof(vec));
            memset(weights + counted, 0, (reach + LANES) * sizeof(vec));
            raise_worst(&of, weights, counted, reach, worst + segment * n);
        }
    }
}

// Attention of one query per head over ragged segments, whose entries are contiguous or in pages; compiled and called by
// segment_attention.py.
//
// One compilation serves one shape: GROUP query heads share a key/value head, KEY_DIM and VALUE_DIM numbers of a head.
// With BF16, queries, keys, values and results are bf16, else fp32; sums and weights are fp32 in both cases. With CAPPED,
// logits x become softcap * tanh(x / softcap); with SINKS, each query head has one more entry, whose value is zero and
// whose logit is learned.

#include <math.h>

#if defined(__AVX512F__) && KEY_DIM % 32 == 0 && VALUE_DIM % 32 == 0
#define LANES 16
#elif KEY_DIM % 16 == 0 && VALUE_DIM % 16 == 0
#define LANES 8
#else
#define LANES 4
#endif
#if KEY_DIM % 8 || VALUE_DIM % 8
#error "KEY_DIM and VALUE_DIM are multiples of 8"
#endif

#define BLOCK 128 // entries whose keys are read together, and then their values; a multiple of LANES
#define AHEAD 16  // entries between the one that is read and the one that is brought into the nearest cache meanwhile
#define WORTH_THREADS 4096 // entries, some 30 us of one thread: fewer take less time than starting others
#define LOWEST -3.0e38f

// The sums over a block are taken for TILE numbers at a time, as many as registers hold for all queries.
#define TILE (GROUP * VALUE_DIM <= 24 * LANES ? VALUE_DIM : 2 * LANES)

#include "lanes.h"

// `load` widens the next 2 * LANES numbers. Those in bf16 are the upper halves of fp32 ones, and two of them share a
// word, so they come as the even and the odd ones; PLACE(d) is where number d of a head is then.
#ifdef BF16
#define PLACE(d) ((d) / (2 * LANES) * (2 * LANES) + (d) % 2 * LANES + (d) % (2 * LANES) / 2)

static inline void load(const number *from, vec *first, vec *second) {
    words pairs = *(const unaligned_words *)from; // little-endian
    *first = (vec)(pairs << 16);
    *second = (vec)(pairs & 0xffff0000u);
}

static inline number narrow(float x) { // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : (number)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
#define PLACE(d) (d)

static inline void load(const number *from, vec *first, vec *second) {
    *first = *(const unaligned_vec *)from;
    *second = *(const unaligned_vec *)(from + LANES);
}

static inline number narrow(float x) { return x; }
#endif

// From memory into the second cache: the nearest one waits for fewer lines at a time than memory can deliver.
static inline void fetch(const number *from, int count) {
    for (int d = 0; d < count; d += 64 / (int)sizeof(number)) __builtin_prefetch(from + d, 0, 2);
}

static inline void fetch_near(const number *from, int count) {
    for (int d = 0; d < count; d += 64 / (int)sizeof(number)) __builtin_prefetch(from + d, 0, 3);
}

// Entries of a segment, from the place `first` on: places in `pages`, or slots if there are no pages.
typedef struct {
    const int32_t *pages;
    int64_t first, length;
} list;

// Takes up to BLOCK entries from two lists, one after the other, and returns how many; writes their slots.
static inline int take(list *lists, int64_t page_size, int64_t *slots) {
    int count = 0;
    for (list *from = lists; from < lists + 2; from++)
        while (from->length > 0 && count < BLOCK) {
            int64_t start = from->first, room = from->length;
            if (from->pages) {
                int64_t place = start % page_size;
                if (room > page_size - place) room = page_size - place;
                start = from->pages[start / page_size] * page_size + place;
            }
            if (room > BLOCK - count) room = BLOCK - count;
            for (int i = 0; i < (int)room; i++) slots[count + i] = start + i;
            count += (int)room;
            from->first += room;
            from->length -= room;
        }
    return count;
}

#ifdef CAPPED
// softcap * tanh(x / softcap), to 2e-7 of softcap.
static inline float cap(float x, float softcap) {
    float power = exponential((x < 0 ? x : -x) * 2 / softcap), size = softcap * (1 - power) / (1 + power);
    return x < 0 ? -size : size;
}
#endif

// Softmax of a group's queries over the entries of two lists, block by block with a running maximum: keys and values are
// read once. softcap and sinks, the group's, count with CAPPED and SINKS. log_sum: the logarithms of the denominators.
static void attend(const number *query, const number *key, const number *value, list *lists, int64_t page_size,
                   float scaling, float softcap, const float *sinks, number *out, float *log_sum) {
    (void)softcap, (void)sinks;
    vec scaled[GROUP][KEY_DIM / LANES], sums[GROUP][VALUE_DIM / LANES];
    float total[GROUP], highest[GROUP];
    memset(sums, 0, sizeof sums);
    for (int g = 0; g < GROUP; g++) {
#ifdef SINKS
        total[g] = 1;
        highest[g] = sinks[g];
#else
        total[g] = 0;
        highest[g] = LOWEST;
#endif
        for (int d = 0; d < KEY_DIM; d++)
            scaled[g][PLACE(d) / LANES][PLACE(d) % LANES] = widen(query[g * KEY_DIM + d]) * scaling;
    }
    int64_t slots[2][BLOCK];
    int count = take(lists, page_size, slots[0]), following;
    for (int turn = 0; count; turn = !turn, count = following) {
        const int64_t *at = slots[turn], *next = slots[!turn];
        following = take(lists, page_size, slots[!turn]);
        float weights[GROUP][BLOCK]; // first the logits
        int padded = (count + LANES - 1) / LANES * LANES;
        for (int start = 0; start < padded; start += LANES) {
            vec logits[GROUP][LANES];
            for (int i = 0; i < LANES; i++) {
                int place = start + i < count ? start + i : count - 1;
                if (place + AHEAD < count) fetch_near(key + at[place + AHEAD] * KEY_DIM, KEY_DIM);
                fetch(value + at[place] * VALUE_DIM, VALUE_DIM);
                const number *k = key + at[place] * KEY_DIM;
                vec products[GROUP];
                memset(products, 0, sizeof products);
                for (int d = 0; d < KEY_DIM / LANES; d += 2) {
                    vec first, second;
                    load(k + d * LANES, &first, &second);
                    for (int g = 0; g < GROUP; g++) {
                        products[g] += first * scaled[g][d];
                        products[g] += second * scaled[g][d + 1];
                    }
                }
                for (int g = 0; g < GROUP; g++) logits[g][i] = products[g];
            }
            for (int g = 0; g < GROUP; g++) *(unaligned_vec *)(weights[g] + start) = sum_each(logits[g]);
        }
        for (int g = 0; g < GROUP; g++) {
            float most = highest[g], added = 0;
#ifdef CAPPED
#pragma omp simd
            for (int i = 0; i < padded; i++) weights[g][i] = cap(weights[g][i], softcap);
#endif
            for (int i = count; i < padded; i++) weights[g][i] = LOWEST;
#pragma omp simd reduction(max : most)
            for (int i = 0; i < padded; i++) most = weights[g][i] > most ? weights[g][i] : most;
#pragma omp simd reduction(+ : added)
            for (int i = 0; i < padded; i++) {
                weights[g][i] = exponential(weights[g][i] - most);
                added += weights[g][i];
            }
            float rescale = exponential(highest[g] - most);
            total[g] = total[g] * rescale + added;
            highest[g] = most;
            for (int d = 0; d < VALUE_DIM / LANES; d++) sums[g][d] *= rescale;
        }
        for (int tile = 0; tile < VALUE_DIM; tile += TILE) {
            vec added[GROUP][TILE / LANES];
            memset(added, 0, sizeof added);
            for (int i = 0; i < count; i++) {
                const number *v = value + at[i] * VALUE_DIM + tile;
                if (tile == 0 && i < following) fetch(key + next[i] * KEY_DIM, KEY_DIM);
                if (tile == 0 && i + AHEAD < count) fetch_near(value + at[i + AHEAD] * VALUE_DIM, VALUE_DIM);
                for (int d = 0; d < TILE / LANES; d += 2) {
                    vec first, second;
                    load(v + d * LANES, &first, &second);
                    for (int g = 0; g < GROUP; g++) {
                        added[g][d] += first * weights[g][i];
                        added[g][d + 1] += second * weights[g][i];
                    }
                }
            }
            for (int g = 0; g < GROUP; g++)
                for (int d = 0; d < TILE / LANES; d++) sums[g][tile / LANES + d] += added[g][d];
        }
    }
    for (int g = 0; g < GROUP; g++) {
        float inverse = total[g] != 0 ? 1 / total[g] : 0;
        log_sum[g] = total[g] != 0 ? highest[g] + logf(total[g]) : -INFINITY;
        for (int d = 0; d < VALUE_DIM; d++)
            out[g * VALUE_DIM + d] = narrow(sums[g][PLACE(d) / LANES][PLACE(d) % LANES] * inverse);
    }
}

// Segment s is the entries [starts[s], ends[s]); its queries and results are the s-th GROUP ones. Of the sinks, those of
// `heads` groups, they have the (s % heads)-th.
void segment_attention(const number *query, const number *key, const number *value, const int64_t *starts,
                       const int64_t *ends, int64_t segments, int64_t heads, float scaling, float softcap,
                       const float *sinks, int threads, number *out) {
    int64_t entries = 0;
    for (int64_t s = 0; s < segments; s++) entries += ends[s] - starts[s];
#pragma omp parallel for num_threads(threads) if (threads > 1 && entries >= WORTH_THREADS) schedule(dynamic)
    for (int64_t s = 0; s < segments; s++) {
        list lists[2] = {{0, starts[s], ends[s] - starts[s]}, {0, 0, 0}};
        float log_sum[GROUP];
        attend(query + s * GROUP * KEY_DIM, key, value, lists, 1, scaling, softcap, sinks ? sinks + s % heads * GROUP : 0,
               out + s * GROUP * VALUE_DIM, log_sum);
    }
}

// The pages of a sequence: those of its compressed prompt, if it has one, in which segment s has lengths[s] entries from
// page bounds[s] on; then a table with a row of `stride` pages for each segment, which has `tokens` entries in it.
typedef struct {
    const int32_t *ragged;
    const int64_t *bounds;
    const int32_t *lengths, *table;
    int64_t stride, tokens;
} sequence;

// The segments [first, first + heads) of every sequence. Unless new_key is null, the last of the `tokens` entries of each
// segment is written first: no two segments share the page in which it is.
void paged_attention(const number *query, number *key, number *value, const sequence *sequences, int64_t rows,
                     int64_t first, int64_t heads, int64_t page_size, float scaling, int threads, const number *new_key,
                     const number *new_value, number *out, float *log_sums) {
    int64_t entries = 0;
    for (int64_t i = 0; i < rows * heads; i++) {
        const sequence *from = sequences + i / heads;
        entries += from->tokens + (from->ragged ? from->lengths[first + i % heads] : 0);
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && entries >= WORTH_THREADS) schedule(dynamic)
    for (int64_t i = 0; i < rows * heads; i++) {
        const sequence *from = sequences + i / heads;
        int64_t s = first + i % heads;
        const int32_t *pages = from->table + s * from->stride;
        list lists[2] = {{0, 0, 0}, {pages, 0, from->tokens}};
        if (new_key) {
            int64_t last = from->tokens - 1, slot = pages[last / page_size] * page_size + last % page_size;
            memcpy(key + slot * KEY_DIM, new_key + i * KEY_DIM, KEY_DIM * sizeof(number));
            memcpy(value + slot * VALUE_DIM, new_value + i * VALUE_DIM, VALUE_DIM * sizeof(number));
        }
        if (from->ragged) lists[0] = (list){from->ragged + from->bounds[s], 0, from->lengths[s]};
        attend(query + i * GROUP * KEY_DIM, key, value, lists, page_size, scaling, 0, 0,
               out + i * GROUP * VALUE_DIM, log_sums + i * GROUP);
    }
}

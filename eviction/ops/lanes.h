// Vectors of LANES numbers, which the including file chooses, and what the kernels here do with them.

#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t unaligned_words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

#ifdef BF16
typedef uint16_t number;

static inline float widen(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}
#else
typedef float number;

static inline float widen(number x) { return x; }
#endif

// One number for each of LANES vectors, which are overwritten: number i is made of the lanes of vector i. A step with a
// width joins the halves of each block of 2 * width lanes, and puts those of vector i + width behind those of vector i.
#define LANE(i, width) (i) - (i) % (2 * (width)) + (i) % (width) + ((i) & (width) ? LANES : 0)
#define TWO(i, width, more) LANE(i, width) + more, LANE(i + 1, width) + more
#define FOUR(i, width, more) TWO(i, width, more), TWO(i + 2, width, more)
#if LANES == 16
#define ALL(width, more) FOUR(0, width, more), FOUR(4, width, more), FOUR(8, width, more), FOUR(12, width, more)
#elif LANES == 8
#define ALL(width, more) FOUR(0, width, more), FOUR(4, width, more)
#else
#define ALL(width, more) FOUR(0, width, more)
#endif
#define STEP(width, join)                                                               \
    for (int i = 0; i < width; i++)                                                     \
        of[i] = join(__builtin_shufflevector(of[i], of[i + width], ALL(width, 0)),      \
                     __builtin_shufflevector(of[i], of[i + width], ALL(width, width)));
#if LANES == 16
#define STEPS(join) STEP(8, join) STEP(4, join) STEP(2, join) STEP(1, join)
#elif LANES == 8
#define STEPS(join) STEP(4, join) STEP(2, join) STEP(1, join)
#else
#define STEPS(join) STEP(2, join) STEP(1, join)
#endif

static inline vec sum(vec a, vec b) { return a + b; }

static inline vec larger(vec a, vec b) {
#if LANES == 16 && defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    words first = (words)(a > b);
    return (vec)(((words)a & first) | ((words)b & ~first));
#endif
}

static inline vec sum_each(vec *of) {
    STEPS(sum)
    return of[0];
}

static inline vec largest_each(vec *of) {
    STEPS(larger)
    return of[0];
}

// exp(x) for x <= 0 with the polynomial of Cephes' expf, to 2e-7 of it; 0 below -87, where fp32 becomes denormal.
static inline float exponential(float x) {
    float capped = x < -87.0f ? -87.0f : x;
    float shifted = capped * 1.44269504f + 12582912.0f; // adding 1.5 * 2^23 rounds to an integer, in the low bits
    float power = shifted - 12582912.0f;
    float rest = capped - power * 0.693359375f + power * 2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float two_to_power;
    memcpy(&two_to_power, &bits, sizeof two_to_power);
    return x < -87.0f ? 0.0f : series * two_to_power;
}

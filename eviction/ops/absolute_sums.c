// Sums of the magnitudes of bf16 numbers, row by row, in fp32; see value_norms.py.

#include <stdint.h>
#include <string.h>

#define LANES 32 // words, two numbers each, that are added side by side

void absolute_sums(const uint16_t *numbers, int64_t rows, int64_t columns, float *sums) {
    for (int64_t row = 0; row < rows; row++, numbers += columns) {
        float lanes[LANES] = {0}, sum = 0;
        int64_t column = 0;
        for (; column + 2 * LANES <= columns; column += 2 * LANES) {
            uint32_t words[LANES];
            memcpy(words, numbers + column, sizeof words);
#pragma omp simd
            for (int l = 0; l < LANES; l++) { // a bf16 number is the upper half of a fp32 one; little-endian
                uint32_t first = (words[l] & 0x7fffu) << 16, second = words[l] & 0x7fff0000u;
                float low, high;
                memcpy(&low, &first, sizeof low);
                memcpy(&high, &second, sizeof high);
                lanes[l] += low + high;
            }
        }
        for (; column < columns; column++) {
            uint32_t word = (uint32_t)(numbers[column] & 0x7fffu) << 16;
            float magnitude;
            memcpy(&magnitude, &word, sizeof magnitude);
            sum += magnitude;
        }
        for (int l = 0; l < LANES; l++) sum += lanes[l];
        sums[row] = sum;
    }
}

// Writes one entry to the next slot of each segment; compiled and called by write_entries.py.

#include <stdint.h>
#include <string.h>

// Segment s gets the s-th of the new entries at next[s], which goes to last[s] and is then one more.
void write_entries(int64_t *next, int64_t *last, int64_t segments, char *key, int64_t key_bytes, char *value,
                   int64_t value_bytes, int32_t *position, const char *new_key, const char *new_value,
                   const int32_t *new_position) {
    for (int64_t s = 0; s < segments; s++) {
        int64_t slot = last[s] = next[s]++;
        memcpy(key + slot * key_bytes, new_key + s * key_bytes, key_bytes);
        memcpy(value + slot * value_bytes, new_value + s * value_bytes, value_bytes);
        position[slot] = new_position[s];
    }
}

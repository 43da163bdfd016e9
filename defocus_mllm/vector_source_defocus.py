"""C source that the compiled cores share: vectors of floats, and the functions that the cores apply to them.

It stands in a Python file because a checkpoint that carries its own code carries Python files only.
"""

VECTOR_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define BLOCK 64 /* channels that are worked on together: what belongs to them stays in the cache */
#define CHUNK 16 /* tokens that are worked on together */
#define LOG2_E 1.44269504f
#define LN_2 0.69314718f
#define INLINE static inline __attribute__((always_inline))

/* The extension that gcc and clang share; each turns it into the vectors of the processor at hand. */
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

INLINE vec all(float x) { return x - (vec){}; }

INLINE vec load(const float *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float *p, vec x) { memcpy(p, &x, sizeof x); }

/* The first `count` lanes (if there are as many); the others are 0. */
INLINE vec load_some(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
    vec x = {};
    memcpy(&x, p, count * sizeof(float));
    return x;
}

INLINE void store_some(float *p, vec x, int64_t count) {
    if (count >= LANES) store(p, x);
    else memcpy(p, &x, count * sizeof(float));
}

INLINE vec choose(ints condition, vec yes, vec no) {
    return (vec)((condition & (ints)yes) | (~condition & (ints)no));
}

INLINE vec smaller(vec a, vec b) { return choose(a > b, b, a); } /* NaN if a is */

INLINE float sum(vec x) {
    float lanes[LANES];
    store(lanes, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

INLINE float dot(const float *a, const float *b, int64_t size) {
    vec products = {};
    for (int64_t i = 0; i < size; i += LANES) products += load_some(a + i, size - i) * load_some(b + i, size - i);
    return sum(products);
}

/* 2^x for x < 127, relative error 2e-7; 0 below -125. 1.5 * 2^23 rounds x to a whole number in the lowest bits. */
INLINE vec exp2_below(vec x) {
    vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
    vec p = 1.0f + r * (6.931470037e-1f + r * (2.402224243e-1f + r * (5.550733581e-2f + r * (9.671512991e-3f +
            r * 1.326472731e-3f))));
    return (vec)(((ints)p + ((ints)shifted << 23)) & ~(x <= -125.0f));
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp2_below(smaller(x * -LOG2_E, all(126.0f)))); }

/* log(1 + e^x) = max(x, 0) + log(1 + z) with z = e^-|x|, and log(1 + z) = 2 artanh(z / (2 + z)) as a series. */
INLINE vec softplus(vec x) {
    vec positive = (vec)((ints)x & ~(x < 0.0f)), z = exp2_below((x - 2.0f * positive) * LOG2_E), s = z / (2.0f + z);
    vec q = s * s;
    vec series = 1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9 + q * (1.0f / 11 +
                 q * (1.0f / 13 + q * (1.0f / 15)))))));
    return positive + 2.0f * s * series;
}
"""

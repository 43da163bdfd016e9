"""C source of the compiled selective scan; see `compiled_defocus.py`.

It stands in a Python file because a checkpoint that carries its own code carries Python files only.
"""

SCAN_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 16 /* tokens whose states are kept at once in the backward pass */
#define INLINE static inline __attribute__((always_inline))

/* exp for x <= 0 in float, relative error 2e-7: libm's does not vectorise with every compiler. */
INLINE float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float whole = nearbyintf(x * 1.44269504f);
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16664853e-2f + r * (8.33336077e-3f +
              r * 1.39314353e-3f)))));
    union { int32_t bits; float value; } scale = {((int32_t)whole + 127) << 23};
    return p * scale.value;
}

/* One image, forward over tokens [0, tokens): state (channels, states) is updated in place; y may be NULL. If `kept` is
   given, it receives the state before each token and `factors` the decay at each token. */
INLINE void run(int64_t tokens, int64_t channels, int64_t states, const float *x, const float *delta,
                const float *decay_delta, const float *A, const float *B, const float *C, float *state, float *y,
                float *kept, float *factors) {
    int64_t size = channels * states;
    for (int64_t t = 0; t < tokens; t++) {
        const float *b = B + t * states, *c = C + t * states;
        if (kept) memcpy(kept + t * size, state, size * sizeof(float));
        for (int64_t e = 0; e < channels; e++) {
            float step = decay_delta[t * channels + e], input = delta[t * channels + e] * x[t * channels + e];
            float *h = state + e * states, sum = 0.0f;
            const float *a = A + e * states;
            #pragma GCC ivdep
            for (int64_t n = 0; n < states; n++) {
                float factor = exp_negative(step * a[n]);
                if (factors) factors[t * size + e * states + n] = factor;
                h[n] = factor * h[n] + input * b[n];
                sum += h[n] * c[n];
            }
            if (y) y[t * channels + e] = sum;
        }
    }
}

/* One image, backward over tokens [0, tokens) of a chunk; g (channels, states) is the gradient of the state after the
   chunk on entry and before it on return; `after` is scratch for the states after a token. */
INLINE void run_back(int64_t tokens, int64_t channels, int64_t states, const float *x, const float *delta,
                     const float *decay_delta, const float *A, const float *B, const float *C, const float *kept,
                     const float *factors, const float *dy, float *g, float *dx, float *ddelta, float *ddecay,
                     float *dA, float *dB, float *dC) {
    int64_t size = channels * states;
    for (int64_t t = tokens - 1; t >= 0; t--) {
        const float *b = B + t * states, *c = C + t * states;
        float *db = dB + t * states, *dc = dC + t * states;
        memset(db, 0, states * sizeof(float));
        memset(dc, 0, states * sizeof(float));
        for (int64_t e = 0; e < channels; e++) {
            int64_t i = t * channels + e;
            float step = decay_delta[i], input = delta[i] * x[i], out = dy[i], of_input = 0.0f, of_step = 0.0f;
            const float *a = A + e * states, *before = kept + t * size + e * states;
            const float *factor = factors + t * size + e * states;
            float *ge = g + e * states, *da = dA + e * states;
            #pragma GCC ivdep
            for (int64_t n = 0; n < states; n++) {
                float gn = ge[n] + out * c[n], decayed = factor[n] * before[n];
                dc[n] += out * (decayed + input * b[n]);
                db[n] += gn * input;
                of_input += gn * b[n];
                of_step += gn * decayed * a[n];
                da[n] += gn * decayed * step;
                ge[n] = gn * factor[n];
            }
            dx[i] = of_input * delta[i];
            ddelta[i] = of_input * x[i];
            ddecay[i] = of_step;
        }
    }
}

/* One image, backward; `scratch` holds what `scratch_size` says. */
INLINE void back_image(float *scratch, int64_t tokens, int64_t channels, int64_t states, const float *x,
                       const float *delta, const float *decay_delta, const float *A, const float *B, const float *C,
                       const float *initial, const float *dy, float *g, float *dx, float *ddelta, float *ddecay,
                       float *dA, float *dB, float *dC) {
    int64_t size = channels * states, chunks = (tokens + CHUNK - 1) / CHUNK;
    float *starts = scratch, *state = starts + chunks * size, *kept = state + size, *factors = kept + CHUNK * size;
    memcpy(state, initial, size * sizeof(float));
    for (int64_t k = 0; k < chunks; k++) {
        int64_t t = k * CHUNK, length = tokens - t < CHUNK ? tokens - t : CHUNK;
        memcpy(starts + k * size, state, size * sizeof(float));
        if (k + 1 < chunks)
            run(length, channels, states, x + t * channels, delta + t * channels, decay_delta + t * channels, A,
                B + t * states, C + t * states, state, NULL, NULL, NULL);
    }
    memset(dA, 0, size * sizeof(float));
    for (int64_t k = chunks - 1; k >= 0; k--) {
        int64_t t = k * CHUNK, length = tokens - t < CHUNK ? tokens - t : CHUNK;
        memcpy(state, starts + k * size, size * sizeof(float));
        run(length, channels, states, x + t * channels, delta + t * channels, decay_delta + t * channels, A,
            B + t * states, C + t * states, state, NULL, kept, factors);
        run_back(length, channels, states, x + t * channels, delta + t * channels, decay_delta + t * channels, A,
                 B + t * states, C + t * states, kept, factors, dy + t * channels, g, dx + t * channels,
                 ddelta + t * channels, ddecay + t * channels, dA, dB + t * states, dC + t * states);
    }
}

/* The states before every chunk, a running state, and for the tokens of a chunk the states and the decays. */
static size_t scratch_size(int64_t tokens, int64_t channels, int64_t states) {
    int64_t chunks = (tokens + CHUNK - 1) / CHUNK;
    return (size_t)(chunks + 1 + 2 * CHUNK) * channels * states * sizeof(float);
}

/* A constant number of states lets the compiler unroll and keep them in registers. */
#define FOR_STATES(CALL) \
    switch (states) { \
        case 4: { const int64_t states = 4; CALL; break; } \
        case 8: { const int64_t states = 8; CALL; break; } \
        case 16: { const int64_t states = 16; CALL; break; } \
        case 32: { const int64_t states = 32; CALL; break; } \
        default: { CALL; } \
    }

int defocus_scan_forward(int64_t batch, int64_t tokens, int64_t channels, int64_t states, int64_t threads,
                         const float *x, const float *delta, const float *decay_delta, const float *A, const float *B,
                         const float *C, const float *initial, float *y, float *last) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < batch; i++) {
        int64_t wide = i * tokens * channels, narrow = i * tokens * states;
        float *state = last + i * channels * states;
        memcpy(state, initial + i * channels * states, channels * states * sizeof(float));
        FOR_STATES(run(tokens, channels, states, x + wide, delta + wide, decay_delta + wide, A, B + narrow, C + narrow,
                       state, y + wide, NULL, NULL))
    }
    return 0;
}

int defocus_scan_backward(int64_t batch, int64_t tokens, int64_t channels, int64_t states, int64_t threads,
                          const float *x, const float *delta, const float *decay_delta, const float *A, const float *B,
                          const float *C, const float *initial, const float *dy, const float *dlast, float *dx,
                          float *ddelta, float *ddecay, float *dA, float *dB, float *dC, float *dinitial) {
    int failed = 0;
    #pragma omp parallel num_threads(threads) reduction(|:failed)
    {
        /* Once a thread: memory given back and asked for again for every image costs more than the arithmetic. */
        float *scratch = malloc(scratch_size(tokens, channels, states));
        failed |= !scratch;
        #pragma omp for
        for (int64_t i = 0; i < batch; i++) {
            if (!scratch) continue;
            int64_t wide = i * tokens * channels, narrow = i * tokens * states, square = i * channels * states;
            memcpy(dinitial + square, dlast + square, channels * states * sizeof(float));
            FOR_STATES(back_image(scratch, tokens, channels, states, x + wide, delta + wide, decay_delta + wide, A,
                                  B + narrow, C + narrow, initial + square, dy + wide, dinitial + square, dx + wide,
                                  ddelta + wide, ddecay + wide, dA + square, dB + narrow, dC + narrow))
        }
        free(scratch);
    }
    return failed;
}
"""

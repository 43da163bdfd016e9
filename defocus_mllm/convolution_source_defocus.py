"""C source of the causal convolution of every channel and its SiLU, forward and backward; see `compiled_defocus.py`."""

CONVOLUTION_SOURCE = r"""
/* in, d_in, out, d_out: (batch, tokens, channels), all but `in` contiguous; window, d_window: the inputs before the
   first token, (batch, channels, kernel - 1), NULL for zeros; weight: (channels, kernel); bias: (channels), or NULL.
   d_weight (batch, channels, kernel) and d_bias (batch, channels) are those of each image. */
typedef struct {
    int64_t batch, tokens, channels, kernel, threads, in_stride; /* floats from a token to the next */
    const float *in, *window, *weight, *bias, *d_out;
    float *out, *d_in, *d_window, *d_weight, *d_bias;
} convolution;

static size_t convolution_scratch(const convolution *c) {
    return (2 * (c->kernel - 1 + CHUNK) + 2 * c->kernel + 2) * BLOCK * sizeof(float);
}

/* The values of `channels` (elements of (channels, width)) as rows (width, BLOCK), or back. */
INLINE void to_rows(float *rows, const float *values, int64_t channels, int64_t width) {
    for (int64_t e = 0; e < channels; e++)
        for (int64_t k = 0; k < width; k++) rows[k * BLOCK + e] = values[e * width + k];
}

INLINE void from_rows(float *values, const float *rows, int64_t channels, int64_t width) {
    for (int64_t e = 0; e < channels; e++)
        for (int64_t k = 0; k < width; k++) values[e * width + k] = rows[k * BLOCK + e];
}

/* Rows of the gradient: those of tokens before the first belong to the window. */
INLINE void put_gradients(const convolution *c, int64_t image, int64_t first, int64_t channels, const float *rows,
                          int64_t token, int64_t count) {
    for (int64_t t = token; t < token + count; t++, rows += BLOCK) {
        if (t >= 0)
            memcpy(c->d_in + (image * c->tokens + t) * c->channels + first, rows, channels * sizeof(float));
        else if (c->d_window)
            for (int64_t e = 0; e < channels; e++)
                c->d_window[(image * c->channels + first + e) * (c->kernel - 1) + c->kernel - 1 + t] = rows[e];
    }
}

/* Channels [first, first + channels) of one image; row `kernel - 1 + t` of `in` holds token t of the chunk. */
INLINE void convolve(const convolution *c, int64_t image, int64_t first, int64_t channels, float *scratch,
                     const int backward) {
    int64_t before = c->kernel - 1, rows = before + CHUNK, place = image * c->channels + first;
    float *in = scratch, *d_in = in + rows * BLOCK, *weight = d_in + rows * BLOCK;
    float *d_weight = weight + c->kernel * BLOCK, *bias = d_weight + c->kernel * BLOCK, *d_bias = bias + BLOCK;
    memset(scratch, 0, convolution_scratch(c));
    to_rows(weight, c->weight + first * c->kernel, channels, c->kernel);
    if (c->bias) memcpy(bias, c->bias + first, channels * sizeof(float));
    if (c->window) to_rows(in, c->window + place * before, channels, before);
    for (int64_t start = 0; start < c->tokens; start += CHUNK) {
        int64_t length = least(CHUNK, c->tokens - start), token = image * c->tokens + start;
        for (int64_t t = 0; t < length; t++)
            for (int64_t e = 0; e < channels; e += LANES)
                store(in + (before + t) * BLOCK + e,
                      load_some(c->in + (token + t) * c->in_stride + first + e, channels - e));
        for (int64_t t = 0; t < length; t++)
            for (int64_t e = 0; e < channels; e += LANES) {
                int64_t i = (token + t) * c->channels + first + e;
                vec x = load(bias + e);
                for (int64_t k = 0; k < c->kernel; k++)
                    x += load(weight + k * BLOCK + e) * load(in + (t + k) * BLOCK + e);
                vec s = sigmoid(x);
                if (!backward) {
                    store_some(c->out + i, x * s, channels - e);
                    continue;
                }
                vec d = load_some(c->d_out + i, channels - e) * s * (1.0f + x * (1.0f - s));
                store(d_bias + e, load(d_bias + e) + d);
                for (int64_t k = 0; k < c->kernel; k++) {
                    float *of_weight = d_weight + k * BLOCK + e, *of_in = d_in + (t + k) * BLOCK + e;
                    store(of_weight, load(of_weight) + d * load(in + (t + k) * BLOCK + e));
                    store(of_in, load(of_in) + d * load(weight + k * BLOCK + e));
                }
            }
        memmove(in, in + length * BLOCK, before * BLOCK * sizeof(float));
        if (backward) {
            put_gradients(c, image, first, channels, d_in, start - before, length);
            memmove(d_in, d_in + length * BLOCK, before * BLOCK * sizeof(float));
            memset(d_in + before * BLOCK, 0, CHUNK * BLOCK * sizeof(float));
        }
    }
    if (backward) {
        put_gradients(c, image, first, channels, d_in, c->tokens - before, before);
        from_rows(c->d_weight + place * c->kernel, d_weight, channels, c->kernel);
        if (c->d_bias) memcpy(c->d_bias + place, d_bias, channels * sizeof(float));
    }
}

/* Work on the blocks of channels of all images in parallel; non-zero if there is no memory. */
INLINE int convolve_all(const convolution *c, const int backward) {
    int failed = 0;
    int64_t blocks = (c->channels + BLOCK - 1) / BLOCK;
    #pragma omp parallel num_threads(c->threads) reduction(|:failed)
    {
        float *scratch = aligned_alloc(64, convolution_scratch(c));
        failed |= !scratch;
        #pragma omp for
        for (int64_t unit = 0; unit < c->batch * blocks; unit++) {
            int64_t first = unit % blocks * BLOCK;
            if (scratch) convolve(c, unit / blocks, first, least(BLOCK, c->channels - first), scratch, backward);
        }
        free(scratch);
    }
    return failed;
}

int defocus_convolution_forward(const convolution *c) { return convolve_all(c, 0); }

int defocus_convolution_backward(const convolution *c) { return convolve_all(c, 1); }
"""

"""C source of the selective scan and what surrounds it in De-focus Mamba; see `compiled_defocus.py`.

A vector holds neighbouring channels, and the loop over the states of a channel keeps them in registers over the tokens
of a chunk. The softplus of the steps, the norm, the skip and the gate are applied to a chunk while it is in the cache.
"""

SCAN_SOURCE = r"""
/* x, delta, decay, gate, y: (batch, tokens, channels); B, C: (batch, tokens, states); A: (channels, states);
   D: (channels); initial, last: (batch, channels, states); starts, the states before every chunk:
   (batch, chunks, states, channels). Each is contiguous but for the strides below. Gradients are shaped alike, except
   that d_A, d_D and the d_decay of a constant decay are those of each image, and d_B and d_C (batch, parts, tokens,
   states) those of each part of the channels. NULL: decay (the steps themselves), D (no skip), gate (no gate), starts
   (not kept). */
typedef struct {
    int64_t batch, tokens, channels, states, threads, parts;
    int64_t group, softplus;                                /* group: channels of the norm, 0 for none */
    int64_t B_stride, C_stride, gate_stride, decay_stride;  /* floats from a token to the next */
    int64_t decay_image;                                    /* and from an image to the next; decay_stride may be 0 */
    double eps, scale;                                      /* of the norm; of the steps after their softplus */
    const float *x, *delta, *decay, *A, *B, *C, *D, *gate, *initial, *d_y, *d_last;
    float *y, *last, *starts, *d_x, *d_delta, *d_decay, *d_A, *d_B, *d_C, *d_D, *d_gate, *d_initial;
} scan;

/* The channels that are worked on together: some groups of the norm. */
INLINE int64_t block_of(const scan *s) {
    if (!s->group) return BLOCK;
    return s->group < BLOCK ? BLOCK / s->group * s->group : s->group;
}

/* Some channels of some tokens of an image, and the memory of the thread: [token][row] what belongs to a channel,
   [vector][state][lane] what belongs to a state. */
typedef struct {
    int64_t image, start, length, first, channels, row;
    float *A, *state, *d_state, *d_A, *kept, *factors, *d_B, *d_C;
    float *step, *input, *y, *inverse, *d_y, *d_step, *d_input, *d_x, *d_D, *d_decay;
} piece;

INLINE int64_t state_place(const scan *s, int64_t vector, int64_t state) {
    return (vector * s->states + state) * LANES;
}

INLINE int64_t place(const scan *s, const piece *p, int64_t t) {
    return (p->image * s->tokens + p->start + t) * s->channels + p->first;
}

INLINE int64_t token(const scan *s, const piece *p, int64_t t) { return p->image * s->tokens + p->start + t; }

INLINE const float *decay_row(const scan *s, const piece *p, int64_t t) {
    return s->decay + p->image * s->decay_image + (p->start + t) * s->decay_stride + p->first;
}

/* Steps and inputs of a chunk; clears y. */
INLINE void prepare(const scan *s, const piece *p) {
    for (int64_t t = 0; t < p->length; t++)
        for (int64_t e = 0; e < p->channels; e += LANES) {
            int64_t left = p->channels - e, at = t * p->row + e;
            vec step = load_some(s->delta + place(s, p, t) + e, left);
            if (s->softplus) step = softplus(step) * (float)s->scale;
            store(p->input + at, step * load_some(s->x + place(s, p, t) + e, left));
            store(p->step + at, s->decay ? load_some(decay_row(s, p, t) + e, left) : step);
            store(p->y + at, all(0.0f));
        }
}

/* `count` states of a vector of channels over a chunk: moves `state` on and adds to y; `kept` and `factors`, if given,
   take the states before every token and their decays, `kept_stride` floats from a token to the next. */
INLINE void run_states(const int count, int64_t length, int64_t row, const float *A, const float *step,
                       const float *input, const float *B, int64_t B_stride, const float *C, int64_t C_stride,
                       float *state, float *y, float *kept, float *factors, int64_t kept_stride) {
    vec h[16];
    for (int n = 0; n < count; n++) h[n] = load(state + n * LANES);
    for (int64_t t = 0; t < length; t++) {
        vec rate = load(step + t * row), in = load(input + t * row), out = load(y + t * row);
        #pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            vec factor = exp2_below(rate * load(A + n * LANES));
            if (kept) {
                store(kept + t * kept_stride + n * LANES, h[n]);
                store(factors + t * kept_stride + n * LANES, factor);
            }
            h[n] = factor * h[n] + in * B[t * B_stride + n];
            out += h[n] * C[t * C_stride + n];
        }
        store(y + t * row, out);
    }
    for (int n = 0; n < count; n++) store(state + n * LANES, h[n]);
}

/* A constant number of states lets the compiler keep them in registers. */
#define BY_STATES(CALL) \
    for (int64_t n = 0; n < s->states;) { \
        if (s->states - n >= 16) { CALL(16); n += 16; } \
        else if (s->states - n >= 4) { CALL(4); n += 4; } \
        else { CALL(1); n += 1; } \
    }

/* The scan of a chunk. */
INLINE void run(const scan *s, const piece *p, const int keep) {
    int64_t stride = state_place(s, p->row / LANES, 0);
    const float *B = s->B + token(s, p, 0) * s->B_stride, *C = s->C + token(s, p, 0) * s->C_stride;
    for (int64_t e = 0; e < p->channels; e += LANES) {
        #define RUN(COUNT) { \
            int64_t at = state_place(s, e / LANES, n); \
            run_states(COUNT, p->length, p->row, p->A + at, p->step + e, p->input + e, B + n, s->B_stride, C + n, \
                       s->C_stride, p->state + at, p->y + e, keep ? p->kept + at : NULL, \
                       keep ? p->factors + at : NULL, stride); \
        }
        BY_STATES(RUN)
    }
}

/* What the norm multiplies every channel of a token by: the inverse root mean square of its group. */
INLINE void normalise(const scan *s, const piece *p, int64_t t) {
    for (int64_t e = 0; e < p->channels; e += s->group) {
        float square = dot(p->y + t * p->row + e, p->y + t * p->row + e, s->group);
        float inverse = 1.0f / sqrtf(square / s->group + (float)s->eps);
        for (int64_t i = e; i < e + s->group; i++) p->inverse[i] = inverse;
    }
}

/* Norm, skip and gate of a chunk. */
INLINE void finish(const scan *s, const piece *p) {
    for (int64_t t = 0; t < p->length; t++) {
        if (s->group) normalise(s, p, t);
        for (int64_t e = 0; e < p->channels; e += LANES) {
            int64_t left = p->channels - e;
            vec out = load(p->y + t * p->row + e);
            if (s->group) out *= load(p->inverse + e);
            if (s->D) out += load_some(s->D + p->first + e, left) * load_some(s->x + place(s, p, t) + e, left);
            if (s->gate) {
                vec gate = load_some(s->gate + token(s, p, t) * s->gate_stride + p->first + e, left);
                out *= gate * sigmoid(gate);
            }
            store_some(s->y + place(s, p, t) + e, out, left);
        }
    }
}

/* (channels, states) of some channels, to vectors and back. */
INLINE void to_vectors(const scan *s, float *to, const float *from, int64_t channels, float factor) {
    for (int64_t e = 0; e < channels; e++)
        for (int64_t n = 0; n < s->states; n++)
            to[state_place(s, e / LANES, n) + e % LANES] = from[e * s->states + n] * factor;
}

INLINE void from_vectors(const scan *s, float *to, const float *from, int64_t channels) {
    for (int64_t e = 0; e < channels; e++)
        for (int64_t n = 0; n < s->states; n++) to[e * s->states + n] = from[state_place(s, e / LANES, n) + e % LANES];
}

INLINE float *starts_row(const scan *s, const piece *p, int64_t n) {
    int64_t chunks = (s->tokens + CHUNK - 1) / CHUNK;
    return s->starts + ((p->image * chunks + p->start / CHUNK) * s->states + n) * s->channels + p->first;
}

INLINE void keep_start(const scan *s, const piece *p) {
    for (int64_t n = 0; n < s->states; n++)
        for (int64_t e = 0; e < p->channels; e += LANES)
            store_some(starts_row(s, p, n) + e, load(p->state + state_place(s, e / LANES, n)), p->channels - e);
}

INLINE void recall_start(const scan *s, const piece *p) {
    for (int64_t n = 0; n < s->states; n++)
        for (int64_t e = 0; e < p->channels; e += LANES)
            store(p->state + state_place(s, e / LANES, n), load_some(starts_row(s, p, n) + e, p->channels - e));
}

/* Forward over a chunk. */
INLINE void forward(const scan *s, const piece *p) {
    if (s->starts) keep_start(s, p);
    prepare(s, p);
    run(s, p, 0);
    finish(s, p);
}

/* The gradients of gate, skip and norm: leaves that of the scan's output in d_y, and in d_x that of x by the skip. */
INLINE void finish_back(const scan *s, const piece *p) {
    for (int64_t t = 0; t < p->length; t++) {
        const float *y = p->y + t * p->row;
        float *d_y = p->d_y + t * p->row;
        if (s->group) normalise(s, p, t);
        for (int64_t e = 0; e < p->channels; e += LANES) {
            int64_t left = p->channels - e, at = place(s, p, t) + e;
            vec x = load_some(s->x + at, left), d = load_some(s->d_y + at, left), of_x = all(0.0f);
            vec D = s->D ? load_some(s->D + p->first + e, left) : of_x;
            if (s->gate) {
                vec gate = load_some(s->gate + token(s, p, t) * s->gate_stride + p->first + e, left), g = sigmoid(gate);
                vec out = load(y + e) * (s->group ? load(p->inverse + e) : all(1.0f)) + D * x;
                store_some(s->d_gate + at, d * out * g * (1.0f + gate * (1.0f - g)), left);
                d *= gate * g;
            }
            store(d_y + e, d);
            store(p->d_x + t * p->row + e, d * D);
            store(p->d_D + e, load(p->d_D + e) + d * x);
        }
        for (int64_t e = 0; s->group && e < p->channels; e += s->group) {
            float inverse = p->inverse[e], mean = dot(d_y + e, y + e, s->group) / s->group * inverse * inverse;
            for (int64_t i = e; i < e + s->group; i++) d_y[i] = inverse * (d_y[i] - y[i] * mean);
        }
    }
}

/* Back through `run_states`; d_state is the gradient of the state after the chunk on entry and before it on return.
   d_B and d_C, `narrow` floats from a token to the next, still have a sum for each lane. */
INLINE void run_states_back(const int count, int64_t length, int64_t row, const float *A, const float *step,
                            const float *input, const float *B, int64_t B_stride, const float *C, int64_t C_stride,
                            const float *kept, const float *factors, int64_t kept_stride, const float *d_y,
                            float *d_state, float *d_A, float *d_B, float *d_C, int64_t narrow, float *d_step,
                            float *d_input) {
    vec g[16];
    for (int n = 0; n < count; n++) g[n] = load(d_state + n * LANES);
    for (int64_t t = length - 1; t >= 0; t--) {
        vec rate = load(step + t * row), in = load(input + t * row), out = load(d_y + t * row);
        vec of_rate = load(d_step + t * row), of_in = load(d_input + t * row);
        #pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            int64_t lane = n * LANES, at = t * kept_stride + lane;
            float b = B[t * B_stride + n], *of_b = d_B + t * narrow + lane, *of_c = d_C + t * narrow + lane;
            vec factor = load(factors + at), decayed = factor * load(kept + at);
            vec total = g[n] + out * C[t * C_stride + n], of_exponent = total * decayed;
            store(of_c, load(of_c) + out * (decayed + in * b));
            store(of_b, load(of_b) + total * in);
            store(d_A + lane, load(d_A + lane) + of_exponent * rate);
            of_rate += of_exponent * load(A + lane);
            of_in += total * b;
            g[n] = total * factor;
        }
        store(d_step + t * row, of_rate);
        store(d_input + t * row, of_in);
    }
    for (int n = 0; n < count; n++) store(d_state + n * LANES, g[n]);
}

INLINE void run_back(const scan *s, const piece *p) {
    int64_t stride = state_place(s, p->row / LANES, 0), narrow = s->states * LANES;
    const float *B = s->B + token(s, p, 0) * s->B_stride, *C = s->C + token(s, p, 0) * s->C_stride;
    memset(p->d_step, 0, CHUNK * p->row * sizeof(float));
    memset(p->d_input, 0, CHUNK * p->row * sizeof(float));
    for (int64_t e = 0; e < p->channels; e += LANES) {
        #define RUN_BACK(COUNT) { \
            int64_t at = state_place(s, e / LANES, n); \
            run_states_back(COUNT, p->length, p->row, p->A + at, p->step + e, p->input + e, B + n, s->B_stride, C + n, \
                            s->C_stride, p->kept + at, p->factors + at, stride, p->d_y + e, p->d_state + at, \
                            p->d_A + at, p->d_B + n * LANES, p->d_C + n * LANES, narrow, p->d_step + e, \
                            p->d_input + e); \
        }
        BY_STATES(RUN_BACK)
    }
}

/* Back through `prepare`. A and with it the gradient of the step are in units of log2(e). */
INLINE void prepare_back(const scan *s, const piece *p) {
    for (int64_t t = 0; t < p->length; t++)
        for (int64_t e = 0; e < p->channels; e += LANES) {
            int64_t left = p->channels - e, at = t * p->row + e, there = place(s, p, t) + e;
            vec raw = load_some(s->delta + there, left), of_input = load(p->d_input + at);
            vec step = s->softplus ? softplus(raw) * (float)s->scale : raw;
            vec of_step = of_input * load_some(s->x + there, left), of_decay = load(p->d_step + at) * LN_2;
            store_some(s->d_x + there, of_input * step + load(p->d_x + at), left);
            if (!s->decay) of_step += of_decay;
            else if (s->decay_stride) store_some(s->d_decay + there, of_decay, left);
            else store(p->d_decay + e, load(p->d_decay + e) + of_decay);
            if (s->softplus) of_step *= sigmoid(raw) * (float)s->scale;
            store_some(s->d_delta + there, of_step, left);
        }
}

/* Backward over a chunk. */
INLINE void backward(const scan *s, const piece *p) {
    recall_start(s, p);
    prepare(s, p);
    run(s, p, 1);
    finish_back(s, p);
    run_back(s, p);
    prepare_back(s, p);
}

/* The memory of a thread for `blocks` blocks of the channels, in floats. */
INLINE int64_t floats(const scan *s, int64_t blocks, const int back) {
    int64_t row = round_up(block_of(s), LANES), states = row * s->states;
    int64_t size = blocks * 2 * states + CHUNK * 3 * row + row;
    return back ? size + blocks * 2 * (states + row) + CHUNK * (2 * states + 2 * s->states * LANES + 4 * row) : size;
}

INLINE float *take(float **memory, int64_t size) {
    float *taken = *memory;
    *memory += size;
    return taken;
}

/* Block number `block` of those that `memory` is for, at the chunk that begins at token `start`. */
INLINE piece piece_at(const scan *s, int64_t image, int64_t start, int64_t begin, int64_t end, int64_t block,
                      float *memory, const int back) {
    int64_t width = block_of(s), row = round_up(width, LANES), states = row * s->states, blocks = end - begin;
    int64_t first = block * width, own = block - begin;
    piece p = {.image = image, .start = start, .length = least(CHUNK, s->tokens - start), .first = first,
               .channels = least(width, s->channels - first), .row = row};
    p.A = take(&memory, blocks * states) + own * states;
    p.state = take(&memory, blocks * states) + own * states;
    p.step = take(&memory, CHUNK * row);
    p.input = take(&memory, CHUNK * row);
    p.y = take(&memory, CHUNK * row);
    p.inverse = take(&memory, row);
    if (!back) return p;
    p.d_A = take(&memory, blocks * states) + own * states;
    p.d_state = take(&memory, blocks * states) + own * states;
    p.d_D = take(&memory, blocks * row) + own * row;
    p.d_decay = take(&memory, blocks * row) + own * row;
    p.kept = take(&memory, CHUNK * states);
    p.factors = take(&memory, CHUNK * states);
    p.d_B = take(&memory, CHUNK * s->states * LANES);
    p.d_C = take(&memory, CHUNK * s->states * LANES);
    p.d_y = take(&memory, CHUNK * row);
    p.d_step = take(&memory, CHUNK * row);
    p.d_input = take(&memory, CHUNK * row);
    p.d_x = take(&memory, CHUNK * row);
    return p;
}

/* Part `part` of the channels of an image: chunk by chunk, and in a chunk block by block. */
INLINE void scan_part(const scan *s, int64_t image, int64_t part, float *memory, const int back) {
    int64_t width = block_of(s), blocks = (s->channels + width - 1) / width, own = image * s->parts + part;
    int64_t begin = part * blocks / s->parts, end = (part + 1) * blocks / s->parts;
    memset(memory, 0, floats(s, end - begin, back) * sizeof(float));
    for (int64_t b = begin; b < end; b++) {
        piece p = piece_at(s, image, 0, begin, end, b, memory, back);
        int64_t at = (image * s->channels + p.first) * s->states;
        to_vectors(s, p.A, s->A + p.first * s->states, p.channels, LOG2_E);
        if (back) to_vectors(s, p.d_state, s->d_last + at, p.channels, 1.0f);
        else to_vectors(s, p.state, s->initial + at, p.channels, 1.0f);
    }
    int64_t chunks = (s->tokens + CHUNK - 1) / CHUNK;
    for (int64_t k = 0; k < chunks; k++) {
        int64_t start = (back ? chunks - 1 - k : k) * CHUNK;
        piece p = piece_at(s, image, start, begin, end, begin, memory, back);
        if (back) memset(p.d_B, 0, 2 * CHUNK * s->states * LANES * sizeof(float)); /* and d_C, which follows */
        for (int64_t b = begin; b < end; b++) {
            p = piece_at(s, image, start, begin, end, b, memory, back);
            if (back) backward(s, &p);
            else forward(s, &p);
        }
        for (int64_t i = 0; back && i < p.length * s->states; i++) {
            s->d_B[(own * s->tokens + start) * s->states + i] = sum(load(p.d_B + i * LANES));
            s->d_C[(own * s->tokens + start) * s->states + i] = sum(load(p.d_C + i * LANES));
        }
    }
    for (int64_t b = begin; b < end; b++) {
        piece p = piece_at(s, image, 0, begin, end, b, memory, back);
        int64_t channel = image * s->channels + p.first;
        if (!back) {
            from_vectors(s, s->last + channel * s->states, p.state, p.channels);
            continue;
        }
        from_vectors(s, s->d_initial + channel * s->states, p.d_state, p.channels);
        from_vectors(s, s->d_A + channel * s->states, p.d_A, p.channels);
        if (s->D) memcpy(s->d_D + channel, p.d_D, p.channels * sizeof(float));
        if (s->decay && !s->decay_stride) memcpy(s->d_decay + channel, p.d_decay, p.channels * sizeof(float));
    }
}

/* Work on the parts of all images in parallel; non-zero if there is no memory. */
INLINE int scan_all(const scan *s, const int back) {
    int failed = 0;
    int64_t width = block_of(s), blocks = (s->channels + width - 1) / width;
    size_t size = round_up(floats(s, (blocks + s->parts - 1) / s->parts, back) * sizeof(float), 64);
    #pragma omp parallel num_threads(s->threads) reduction(|:failed)
    {
        /* Once a thread: memory given back and asked for again costs more than the arithmetic. */
        float *memory = aligned_alloc(64, size);
        failed |= !memory;
        #pragma omp for
        for (int64_t unit = 0; unit < s->batch * s->parts; unit++)
            if (memory) scan_part(s, unit / s->parts, unit % s->parts, memory, back);
        free(memory);
    }
    return failed;
}

int defocus_scan_forward(const scan *s) { return scan_all(s, 0); }

int defocus_scan_backward(const scan *s) { return scan_all(s, 1); }
"""

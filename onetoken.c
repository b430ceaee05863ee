// A token, or a few, of each text through a Transformer: the whole forward pass that decoding repeats, in plain C.
//
//   x (C) ─ norm ─ q (H, D), k and v (K, D) ─ rotate ─ cache ─ attend (H, D) ─ o ─ + ─ norm ─ w1, w3 ─ f ─ w2 ─ +
//
// Decoding reads every weight once for a token, so its speed is bandwidth over bytes, if nothing else takes time. From
// Python much does: eighty operators a block, each with code that the weights have pushed out of the cache meanwhile.
// Here nearly all of it is `linear`: rows of weights divided among the threads, each number read once, whatever it is
// stored in. onetoken.py compiles this page, fills in the structures, and says which models it can run.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { F32, BF16, INT8, INT4 };                          // how numbers are stored
enum { NONE, RMS, LAYER };                               // norms
enum { SWIGLU, SILU, GELU, RELU2 };                      // feed-forward layers
#define GROUP 64                                         // numbers of int4 that share a scale and a shift

typedef struct {                                         // (d_out, d_in), row by row, and a bias or NULL
    const void *w;
    const uint16_t *scale;                               // bfloat16: one a row of int8; scale, shift a GROUP of int4
    const float *bias;
    int kind, d_out, d_in;
} Matrix;

typedef struct { const float *weight, *bias; float eps; int kind; } Norm;

typedef struct {
    Norm ln1, ln2, q_norm, k_norm;
    Matrix q, k, v, o, w1, w3, w2;
    int window, rotate;                                  // keys that a query sees, 0 = all; whether RoPE turns them
} Layer;

typedef struct {
    int n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, ffn, interleaved, shift_keys, cache_kind;
    int max_length, n_slots, n_tokens;
    int64_t next_row, next_head, next_slot;              // in the cache, in numbers
    const float *cos, *sin;                              // (max_length, D / 2)
    const Layer *layers;
    Norm last;
    Matrix head;
} Model;

static inline float from_bf16(uint16_t half) {           // the upper half of a float32
    uint32_t whole = (uint32_t)half << 16;
    float x;
    memcpy(&x, &whole, 4);
    return x;
}

static inline uint16_t to_bf16(float x) {                // to the nearest, ties to even; NaN stays NaN
    uint32_t whole;
    memcpy(&whole, &x, 4);
    return x != x ? 0x7fc0 : (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
}

// --- dot products ---
// ROWS rows of x by OUT rows of W at a time: that many sums in registers, which the compiler makes vectors of.

#define DOT(NAME, TYPE, VALUE, ROWS, OUT)                                                                   \
    static void NAME(const float *restrict x, const TYPE *restrict w, float *restrict y, int n) {           \
        float sum[ROWS][OUT] = {{0}};                                                                       \
        for (int i = 0; i < n; i++)                                                                         \
            for (int o = 0; o < OUT; o++) {                                                                 \
                TYPE number = w[(int64_t)o * n + i];                                                        \
                float value = VALUE;                                                                        \
                for (int r = 0; r < ROWS; r++) sum[r][o] += x[(int64_t)r * n + i] * value;                  \
            }                                                                                               \
        memcpy(y, sum, sizeof sum);                                                                         \
    }
DOT(f32_1x1, float, number, 1, 1)
DOT(f32_1x4, float, number, 1, 4)
DOT(f32_4x4, float, number, 4, 4)
DOT(bf16_1x4, uint16_t, from_bf16(number), 1, 4)
DOT(int8_1x4, int8_t, (float)number, 1, 4)

// int4: w ≈ scale (q - 8) + shift. Number 16 k + i of two GROUPs: bits 4 k … 4 k + 3 of the i-th of 16 words.
// There they become the upper bits of a float's mantissa, without conversion: 1 + q / 16 = u. Then w ≈ 16 scale u
// + (shift - 24 scale), and a GROUP's part of y is 16 scale Σ u x + (shift - 24 scale) Σ x; `totals` has Σ x.
#ifdef __AVX512F__
enum { LANES = 16 };                                     // floats of a register
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));                    // GCC's and Clang's own vectors
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

static inline Floats four(const float *x, Words w, int k) {      // Σ u x of every word's k-th number and the next three
    Floats sum = {0}, numbers;
    for (int j = 0; j < 4; j++, k++) {
        memcpy(&numbers, x + 16 * j, sizeof numbers);
        sum += numbers * (Floats)(((k < 5 ? w << (19 - 4 * k) : w >> (4 * k - 19)) & 0x780000) | 0x3f800000);
    }
    return sum;
}

static float dot_int4(const float *restrict x, const float *totals, const uint32_t *restrict w, const uint16_t *scale,
                      int groups) {
    const uint16_t *shift = scale + groups;
    Floats sums = {0};
    float y = 0;
    for (int g = 0; g < groups; g += 2)
        for (int i = 0; i < 16; i += LANES) {
            Words words;
            memcpy(&words, w + g * 8 + i, sizeof words);
            sums += from_bf16(scale[g]) * four(x + g * GROUP + i, words, 0);
            if (g + 1 < groups) sums += from_bf16(scale[g + 1]) * four(x + (g + 1) * GROUP + i, words, 4);
        }
    for (int g = 0; g < groups; g++) y += (from_bf16(shift[g]) - 24 * from_bf16(scale[g])) * totals[g];
    for (int i = 0; i < LANES; i++) y += 16 * sums[i];
    return y;
}

static int64_t row_bytes(const Matrix *m) {
    return m->kind == INT4 ? (m->d_in / GROUP + 1) / 2 * 64 : m->d_in * (m->kind == F32 ? 4 : m->kind == BF16 ? 2 : 1);
}

static void widen_row(const Matrix *m, int o, float *restrict out) {             // row o of W in float32
    int n = m->d_in, groups = n / GROUP;
    const void *w = (const char *)m->w + o * row_bytes(m);
    if (m->kind == F32) memcpy(out, w, 4 * n);
    if (m->kind == BF16)
        for (int i = 0; i < n; i++) out[i] = from_bf16(((const uint16_t *)w)[i]);
    if (m->kind == INT8)
        for (int i = 0; i < n; i++) out[i] = from_bf16(m->scale[o]) * (float)((const int8_t *)w)[i];
    for (int g = 0; g < groups && m->kind == INT4; g++) {
        const uint32_t *words = (const uint32_t *)w + g / 2 * 16;
        const uint16_t *scale = m->scale + (int64_t)o * 2 * groups + g;
        float s = from_bf16(scale[0]), shift = from_bf16(scale[groups]);
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 16; i++)
                out[g * GROUP + 16 * k + i] = s * ((float)(words[i] >> (g % 2 * 16 + 4 * k) & 15) - 8) + shift;
    }
}

void widen(const Matrix *m, float *out) {                // (d_out, d_in)
    #pragma omp parallel for schedule(static)
    for (int o = 0; o < m->d_out; o++) widen_row(m, o, out + (int64_t)o * m->d_in);
}

// --- products ---

// y (rows, d_out) = x (rows, d_in) Wᵀ + bias for `count` matrices that follow one another, as do their y; one call for
// several costs one meeting of the threads. scratch: d_in / GROUP numbers.
void linear(const Matrix *m, int count, const float *x, float *y, int rows, float *scratch) {
    int n = m->d_in, groups = n / GROUP;
    for (int g = 0; g < groups && rows == 1; g++) {      // for int4, its totals
        scratch[g] = 0;
        for (int i = 0; i < GROUP; i++) scratch[g] += x[g * GROUP + i];
    }
    #pragma omp parallel firstprivate(m, y)
    for (int j = 0; j < count; y += (int64_t)rows * m->d_out, m++, j++) {
        int kind = m->kind, d_out = m->d_out;
        int64_t stride = row_bytes(m), block = 4 * stride;
        #pragma omp for schedule(static) nowait
        for (int o = 0; o < d_out; o += 4) {
            int outputs = d_out - o < 4 ? d_out - o : 4, widens = kind != F32 && (rows > 1 || outputs < 4), step;
            const char *w = (const char *)m->w + o * stride;
            float widened[widens ? 4 * n : 1], sum[16];
            for (int k = 0; k < outputs && widens; k++) widen_row(m, o + k, widened + k * n);  // for all rows of x
            const float *wide = widens ? widened : (const float *)w;
            for (int r = 0; r < rows; r += step) {
                const float *row = x + (int64_t)r * n;
                step = rows - r < 4 || outputs < 4 ? 1 : 4;
                // Ask for the next rows of W, a part at each step; for one row of float32 the processor does so itself.
                int64_t from = kind == F32 && rows == 1 ? block : block * r / rows;
                for (; from < block * (r + step) / rows; from += 64) __builtin_prefetch(w + block + from);
                if (outputs < 4)
                    for (int k = 0; k < outputs; k++) f32_1x1(row, wide + k * n, sum + k, n);
                else if (step == 4)
                    f32_4x4(row, wide, sum, n);
                else if (widens || kind == F32)
                    f32_1x4(row, wide, sum, n);
                else if (kind == BF16)
                    bf16_1x4(row, (const uint16_t *)w, sum, n);
                else if (kind == INT8)
                    int8_1x4(row, (const int8_t *)w, sum, n);
                else
                    for (int k = 0; k < 4; k++)
                        sum[k] = dot_int4(row, scratch, (const uint32_t *)(w + k * stride),
                                          m->scale + (int64_t)(o + k) * 2 * groups, groups);
                for (int i = 0; i < step * outputs; i++) {
                    int k = o + i % outputs;
                    float scale = kind == INT8 && !widens ? from_bf16(m->scale[k]) : 1, bias = m->bias ? m->bias[k] : 0;
                    y[(int64_t)(r + i / outputs) * d_out + k] = sum[i] * scale + bias;
                }
            }
        }
    }
}

// --- the rest, a row at a time ---

static void norm(const Norm *m, const float *x, float *y, int n) {
    float mean = 0, square = 0;
    if (m->kind == LAYER)
        for (int i = 0; i < n; i++) mean += x[i] / n;
    for (int i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    float r = m->kind == NONE ? 1 : 1 / sqrtf(square / n + m->eps);
    for (int i = 0; i < n; i++)
        y[i] = (x[i] - mean) * r * (m->weight ? m->weight[i] : 1) + (m->bias ? m->bias[i] : 0);
}

// Turn each pair of a head's numbers by the angle of its position.
static void rotate(const Model *m, float *x, int position) {
    int half = m->head_dim / 2;
    const float *cos = m->cos + (int64_t)position * half, *sin = m->sin + (int64_t)position * half;
    for (int i = 0; i < half; i++) {
        int a = m->interleaved ? 2 * i : i, b = m->interleaved ? 2 * i + 1 : i + half;
        float first = x[a], second = x[b];
        x[a] = first * cos[i] - second * sin[i];
        x[b] = first * sin[i] + second * cos[i];
    }
}

static inline void put(const Model *m, void *store, int64_t i, float x) {
    if (m->cache_kind == F32) ((float *)store)[i] = x;
    else ((uint16_t *)store)[i] = to_bf16(x);
}

// Where the numbers of a text's position begin in the cache, for one head.
static inline int64_t place(const Model *m, const int *slots, int text, int head, int position) {
    int slot = slots ? slots[(int64_t)text * m->n_slots + position] : position;
    return text * m->next_row + head * m->next_head + slot * m->next_slot;
}

static inline float cached(const Model *m, const void *store, int64_t i) {
    return m->cache_kind == F32 ? ((const float *)store)[i] : from_bf16(((const uint16_t *)store)[i]);
}

// Scores of one head's query with the keys first … position, softmax, and the weighted sum of the values. The key of
// position s lies in slot s, or in slots[s]; `start` is where this row and head begin in the cache.
static void attend(const Model *m, const float *q, const void *keys, const void *values, int64_t start,
                   const int *slots, int first, int position, float *scores, float *y) {
    int D = m->head_dim;
    float most = -INFINITY, total = 0;
    for (int s = first; s <= position; s++) {
        int64_t at = start + (slots ? slots[s] : s) * m->next_slot;
        float sum = 0;
        int size = m->cache_kind == F32 ? 4 : 2;
        for (int i = 0; i < D * size; i += 64) __builtin_prefetch((const char *)values + at * size + i);
        if (m->cache_kind == F32)
            for (int i = 0; i < D; i++) sum += q[i] * ((const float *)keys)[at + i];
        else
            for (int i = 0; i < D; i++) sum += q[i] * from_bf16(((const uint16_t *)keys)[at + i]);
        scores[s] = sum / sqrtf(D);
        if (scores[s] > most) most = scores[s];
    }
    for (int i = 0; i < D; i++) y[i] = 0;
    for (int s = first; s <= position; s++) {
        int64_t at = start + (slots ? slots[s] : s) * m->next_slot;
        float p = expf(scores[s] - most);
        total += p;
        for (int i = 0; i < D; i++) y[i] += p * cached(m, values, at + i);
    }
    for (int i = 0; i < D; i++) y[i] /= total;
}

static float activation(int kind, float x) {
    if (kind == RELU2) return x < 0 ? 0 : x * x;         // asked this way round, NaN stays NaN
    if (kind == GELU) return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    return x / (1 + expf(-x));
}

// Every other number of each key of k (rows, K, D) becomes that of the position before; in `raw` it is kept as it was.
// From the last row on: a row's key is still as it was when the next one asks for it.
static void shift(const Model *m, float *k, void *raw, const int *slots, const int *positions, int rows) {
    int K = m->n_kv_heads, D = m->head_dim;
    for (int i = rows * K - 1; i >= 0; i--) {
        int r = i / K, text = r / m->n_tokens, p = positions[r];
        int64_t at = place(m, slots, text, i % K, p), last = p ? place(m, slots, text, i % K, p - 1) : 0;
        float *key = k + (int64_t)i * D;
        for (int d = 0; d < D; d++) {
            put(m, raw, at + d, key[d]);
            if (d % 2 == 0) key[d] = r % m->n_tokens ? key[d - K * D] : p ? cached(m, raw, last + d) : 0;
        }
    }
}

// x (rows, C): embeddings in, overwritten; every n_tokens of them belong to one text, whose later ones see the earlier.
// positions (rows): where each token stands. keys, values, raw: a pointer for each layer. slots: (texts, n_slots), slot
// of each position, or NULL: slot p for position p. logits (rows, V) out. scratch: what onetoken.py counts.
void one_token(const Model *m, float *x, const int *positions, int rows, void **keys, void **values, void **raw,
               const int *slots, float *logits, float *scratch) {
    int C = m->d_model, H = m->n_heads, K = m->n_kv_heads, D = m->head_dim, S = m->max_length, F = m->d_ff;
    float *h = scratch, *q = h + (int64_t)rows * C, *k = q + (int64_t)rows * H * D, *v = k + (int64_t)rows * K * D;
    float *y = v + (int64_t)rows * K * D, *gate = y + (int64_t)rows * H * D, *up = gate + (int64_t)rows * F;
    float *scores = up + (int64_t)rows * F, *more = scores + (int64_t)rows * H * S;
    for (int l = 0; l < m->n_layers; l++) {
        const Layer *layer = m->layers + l;
        for (int r = 0; r < rows; r++) norm(&layer->ln1, x + (int64_t)r * C, h + (int64_t)r * C, C);
        linear(&layer->q, 3, h, q, rows, more);          // and k, v
        if (m->shift_keys) shift(m, k, raw[l], slots, positions, rows);
        for (int i = 0; i < rows * (H + K); i++) {       // every head of q, then of k
            float *head = i < rows * H ? q + (int64_t)i * D : k + (int64_t)(i - rows * H) * D;
            const Norm *own = i < rows * H ? &layer->q_norm : &layer->k_norm;
            if (own->kind != NONE) norm(own, head, head, D);
            if (layer->rotate) rotate(m, head, positions[i < rows * H ? i / H : (i - rows * H) / K]);
        }
        for (int i = 0; i < rows * K; i++) {             // into the cache, in its dtype
            int64_t at = place(m, slots, i / K / m->n_tokens, i % K, positions[i / K]), from = (int64_t)i * D;
            for (int d = 0; d < D; d++) {
                put(m, keys[l], at + d, k[from + d]);
                put(m, values[l], at + d, v[from + d]);
            }
        }
        #pragma omp parallel for schedule(static)
        for (int i = 0; i < rows * H; i++) {             // each row's heads; H / K of them share a key head
            int r = i / H, text = r / m->n_tokens, first = layer->window ? positions[r] - layer->window + 1 : 0;
            int64_t start = text * m->next_row + i % H / (H / K) * m->next_head;
            attend(m, q + (int64_t)i * D, keys[l], values[l], start, slots ? slots + (int64_t)text * m->n_slots : NULL,
                   first > 0 ? first : 0, positions[r], scores + (int64_t)i * S, y + (int64_t)i * D);
        }
        linear(&layer->o, 1, y, h, rows, more);
        for (int i = 0; i < rows * C; i++) x[i] += h[i];
        for (int r = 0; r < rows; r++) norm(&layer->ln2, x + (int64_t)r * C, h + (int64_t)r * C, C);
        linear(&layer->w1, m->ffn == SWIGLU ? 2 : 1, h, gate, rows, more);               // and w3: up
        for (int i = 0; i < rows * F; i++) gate[i] = activation(m->ffn, gate[i]) * (m->ffn == SWIGLU ? up[i] : 1);
        linear(&layer->w2, 1, gate, h, rows, more);
        for (int i = 0; i < rows * C; i++) x[i] += h[i];
    }
    for (int r = 0; r < rows; r++) norm(&m->last, x + (int64_t)r * C, h + (int64_t)r * C, C);
    linear(&m->head, 1, h, logits, rows, more);
}

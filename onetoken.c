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
#define AHEAD 4096                                       // bytes: weights asked for so early are there in time

typedef struct {                                         // (d_out, d_in), row by row, and a bias or NULL
    const void *w;
    const uint16_t *scale;                               // bfloat16: one a row of int8; scale, shift a GROUP of int4
    const float *bias;
    int kind, d_out, d_in;
} Matrix;

typedef struct { const float *weight, *bias; float eps; int kind; } Norm;

typedef struct {
    Norm ln1, ln2, q_norm, k_norm;
    Matrix q, k, v, o, w1, w2, w3;
    int window;                                          // keys that a query sees, 0 = all
} Layer;

typedef struct {
    int n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, ffn, rotate, interleaved, cache_kind, max_length;
    int n_slots, n_tokens;
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

static inline uint16_t to_bf16(float x) {                // rounded to the nearest, ties to even
    uint32_t whole;
    memcpy(&whole, &x, 4);
    return (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
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
#define DOTS(NAME, TYPE, VALUE) \
    DOT(NAME##1x1, TYPE, VALUE, 1, 1) DOT(NAME##1x4, TYPE, VALUE, 1, 4) DOT(NAME##4x4, TYPE, VALUE, 4, 4)
DOTS(f32_, float, number)
DOTS(bf16_, uint16_t, from_bf16(number))
DOTS(int8_, int8_t, (float)number)

typedef void (*Dot)(const float *, const void *, float *, int);
#define ENTRY(NAME) {{(Dot)NAME##1x1, (Dot)NAME##1x4}, {NULL, (Dot)NAME##4x4}}
static const Dot dots[3][2][2] = {ENTRY(f32_), ENTRY(bf16_), ENTRY(int8_)};      // [kind][four rows][four outputs]
static const int bytes[] = {4, 2, 1};

// int4: w ≈ scale (q - 8) + shift, two numbers q to a byte, the first above. `unzip` has put x's even numbers first,
// then the odd ones, and `totals` has the sum of each GROUP: its part of y is scale (Σ q x - 8 Σ x) + shift Σ x.
static void unzip(const float *x, float *out, float *totals, int n) {
    for (int i = 0; i < n / 2; i++) out[i] = x[2 * i], out[n / 2 + i] = x[2 * i + 1];
    for (int g = 0; g < n / GROUP; g++) {
        totals[g] = 0;
        for (int i = 0; i < GROUP; i++) totals[g] += x[g * GROUP + i];
    }
}

static float dot_int4(const float *restrict x, const float *total, const uint8_t *restrict w, const uint16_t *scale,
                      int n) {
    const float *even = x, *odd = x + n / 2;
    float sums[GROUP / 2] = {0}, y = 0;                  // one for each byte of a group, added up at the end
    for (int g = 0; g < n / GROUP; g++, w += GROUP / 2, even += GROUP / 2, odd += GROUP / 2) {
        float s = from_bf16(scale[2 * g]);
        for (int i = 0; i < GROUP / 2; i++) sums[i] += s * (even[i] * (float)(w[i] >> 4) + odd[i] * (float)(w[i] & 15));
        y += (from_bf16(scale[2 * g + 1]) - 8 * s) * total[g];
    }
    for (int i = 0; i < GROUP / 2; i++) y += sums[i];
    return y;
}

static void widen_int4(const uint8_t *restrict w, const uint16_t *scale, float *restrict out, int n) {
    for (int g = 0; g < n / GROUP; g++) {
        float s = from_bf16(scale[2 * g]), shift = from_bf16(scale[2 * g + 1]) - 8 * s;
        for (int i = g * GROUP / 2; i < (g + 1) * GROUP / 2; i++) {
            out[i] = s * (float)(w[i] >> 4) + shift;
            out[n / 2 + i] = s * (float)(w[i] & 15) + shift;
        }
    }
}

// --- products: y (rows, d_out) = x (rows, d_in) Wᵀ + bias; scratch: rows · d_in · (1 + 1 / GROUP) numbers ---

void linear(const Matrix *m, const float *x, float *y, int rows, float *scratch) {
    int n = m->d_in, d_out = m->d_out, kind = m->kind, row_bytes = kind == INT4 ? n / 2 : n * bytes[kind];
    float *totals = scratch + (int64_t)rows * n;
    if (kind == INT4) {
        for (int r = 0; r < rows; r++)
            unzip(x + (int64_t)r * n, scratch + (int64_t)r * n, totals + (int64_t)r * (n / GROUP), n);
        x = scratch;
    }
    #pragma omp parallel for schedule(static)
    for (int o = 0; o < d_out; o += 4) {
        int outputs = d_out - o < 4 ? d_out - o : 4, type = kind, stride = row_bytes;
        const char *w = (const char *)m->w + (int64_t)o * row_bytes;
        const uint16_t *pairs = m->scale + (int64_t)o * (n / GROUP) * 2;         // of int4
        for (int i = 0; i < 4 * row_bytes; i += 64) __builtin_prefetch(w + AHEAD + i);
        float widened[kind == INT4 && rows > 1 ? 4 * n : 1], sum[16];
        if (kind == INT4 && rows > 1) {                  // several rows share the widening
            for (int k = 0; k < outputs; k++)
                widen_int4((const uint8_t *)w + k * row_bytes, pairs + k * (n / GROUP) * 2, widened + k * n, n);
            w = (const char *)widened, type = F32, stride = 4 * n;
        }
        for (int r = 0, step; r < rows; r += step) {
            const float *row = x + (int64_t)r * n;
            step = rows - r < 4 ? 1 : 4;
            if (type == INT4)
                for (int k = 0; k < outputs; k++)
                    sum[k] = dot_int4(row, totals, (const uint8_t *)w + k * row_bytes, pairs + k * (n / GROUP) * 2, n);
            else if (outputs == 4)
                dots[type][step == 4][1](row, w, sum, n);
            else
                for (int i = 0; i < step * outputs; i++)
                    dots[type][0][0](row + i / outputs * n, w + (int64_t)(i % outputs) * stride, sum + i, n);
            for (int i = 0; i < step * outputs; i++) {
                int k = o + i % outputs;
                float scale = kind == INT8 ? from_bf16(m->scale[k]) : 1, bias = m->bias ? m->bias[k] : 0;
                y[(int64_t)(r + i / outputs) * d_out + k] = sum[i] * scale + bias;
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

// x (rows, C): embeddings in, overwritten; every n_tokens of them belong to one text, whose later ones see the earlier.
// positions (rows): where each token stands. keys, values: a pointer for each layer. slots: (texts, n_slots), the slot
// of each position, or NULL: slot p for position p. logits (rows, V) out. scratch: what onetoken.py counts.
void one_token(const Model *m, float *x, const int *positions, int rows, void **keys, void **values, const int *slots,
               float *logits, float *scratch) {
    int C = m->d_model, H = m->n_heads, K = m->n_kv_heads, D = m->head_dim, S = m->max_length, F = m->d_ff;
    float *h = scratch, *q = h + (int64_t)rows * C, *k = q + (int64_t)rows * H * D, *v = k + (int64_t)rows * K * D;
    float *y = v + (int64_t)rows * K * D, *gate = y + (int64_t)rows * H * D, *up = gate + (int64_t)rows * F;
    float *scores = up + (int64_t)rows * F, *more = scores + (int64_t)rows * H * S;
    for (int l = 0; l < m->n_layers; l++) {
        const Layer *layer = m->layers + l;
        for (int r = 0; r < rows; r++) norm(&layer->ln1, x + (int64_t)r * C, h + (int64_t)r * C, C);
        linear(&layer->q, h, q, rows, more);
        linear(&layer->k, h, k, rows, more);
        linear(&layer->v, h, v, rows, more);
        for (int i = 0; i < rows * (H + K); i++) {       // every head of q, then of k
            float *head = i < rows * H ? q + (int64_t)i * D : k + (int64_t)(i - rows * H) * D;
            const Norm *own = i < rows * H ? &layer->q_norm : &layer->k_norm;
            if (own->kind != NONE) norm(own, head, head, D);
            if (m->rotate) rotate(m, head, positions[i < rows * H ? i / H : (i - rows * H) / K]);
        }
        for (int i = 0; i < rows * K * D; i++) {         // into the cache, in its dtype
            int r = i / (K * D), text = r / m->n_tokens;
            int slot = slots ? slots[(int64_t)text * m->n_slots + positions[r]] : positions[r];
            int64_t at = text * m->next_row + i / D % K * m->next_head + slot * m->next_slot + i % D;
            if (m->cache_kind == F32)
                ((float *)keys[l])[at] = k[i], ((float *)values[l])[at] = v[i];
            else
                ((uint16_t *)keys[l])[at] = to_bf16(k[i]), ((uint16_t *)values[l])[at] = to_bf16(v[i]);
        }
        #pragma omp parallel for schedule(static)
        for (int i = 0; i < rows * H; i++) {             // each row's heads; H / K of them share a key head
            int r = i / H, text = r / m->n_tokens, first = layer->window ? positions[r] - layer->window + 1 : 0;
            int64_t start = text * m->next_row + i % H / (H / K) * m->next_head;
            attend(m, q + (int64_t)i * D, keys[l], values[l], start, slots ? slots + (int64_t)text * m->n_slots : NULL,
                   first > 0 ? first : 0, positions[r], scores + (int64_t)i * S, y + (int64_t)i * D);
        }
        linear(&layer->o, y, h, rows, more);
        for (int i = 0; i < rows * C; i++) x[i] += h[i];
        for (int r = 0; r < rows; r++) norm(&layer->ln2, x + (int64_t)r * C, h + (int64_t)r * C, C);
        linear(&layer->w1, h, gate, rows, more);
        if (m->ffn == SWIGLU) linear(&layer->w3, h, up, rows, more);
        for (int i = 0; i < rows * F; i++) gate[i] = activation(m->ffn, gate[i]) * (m->ffn == SWIGLU ? up[i] : 1);
        linear(&layer->w2, gate, h, rows, more);
        for (int i = 0; i < rows * C; i++) x[i] += h[i];
    }
    for (int r = 0; r < rows; r++) norm(&m->last, x + (int64_t)r * C, h + (int64_t)r * C, C);
    linear(&m->head, h, logits, rows, more);
}

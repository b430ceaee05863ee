// What a Transformer does between its matrix products, forward and backward, each in one pass over the numbers.
//
// torch's operators read and write all of x each: RMSNorm alone is ten passes with its gradient. Here a row is widened
// to float32, worked on in the first cache, and rounded once. Layouts: rows of n numbers, float32 or bfloat16 (`kind`).

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { F32, BF16 };

static void widen(int kind, const void *from, int64_t at, float *restrict to, int n) {
    if (kind == F32) memcpy(to, (const float *)from + at, n * sizeof *to);
    const uint16_t *restrict half = (const uint16_t *)from + at;             // the upper half of a float32
    if (kind == BF16)
        for (int i = 0; i < n; i++) {
            uint32_t whole = (uint32_t)half[i] << 16;
            memcpy(to + i, &whole, 4);
        }
}

static void narrow(int kind, const float *restrict from, void *to, int64_t at, int n) {
    if (kind == F32) memcpy((float *)to + at, from, n * sizeof *from);
    uint16_t *restrict half = (uint16_t *)to + at;
    if (kind == BF16)
        for (int i = 0; i < n; i++) {                    // to the nearest, ties to even; NaN stays NaN
            uint32_t whole;
            memcpy(&whole, from + i, 4);
            half[i] = from[i] != from[i] ? 0x7fc0 : (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
        }
}

// exp(x) = 2^i exp(r) with r = x - i ln 2, |r| <= ln 2 / 2, and ln 2 in two parts, the first with few digits, so that
// i times it is exact. exp(r) is a polynomial, 2^i goes into the exponent. Seven digits.
static inline float expo(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float i = rintf(x * 1.44269504f), r = (x - i * .693359375f) + i * 2.12194440e-4f, scale;
    float p = 1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f)));
    p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * p)));
    uint32_t bits = (uint32_t)((int32_t)i + 127) << 23;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

// --- RMSNorm: y = n w with n = x r, r = 1 / sqrt(mean(x²) + eps) ---

void rms_forward(int kind, const void *x, const float *w, void *y, float *r, int64_t rows, int n, float eps) {
    #pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < rows; k++) {
        float a[n], square = 0;
        widen(kind, x, k * n, a, n);
        #pragma omp simd reduction(+ : square)
        for (int i = 0; i < n; i++) square += a[i] * a[i];
        r[k] = 1 / sqrtf(square / n + eps);
        for (int i = 0; i < n; i++) a[i] *= r[k] * w[i];
        narrow(kind, a, y, k * n, n);
    }
}

// dx = r (g w - n mean(g w n)); dw = Σ g n, one sum in `parts` for each of `threads`, zero before.
void rms_backward(int kind, const void *dy, const void *x, const float *w, const float *r, void *dx, float *parts,
                  int64_t rows, int n, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < rows; k++) {
        float a[n], g[n], inner = 0, *dw = parts + (int64_t)omp_get_thread_num() * n;
        widen(kind, x, k * n, a, n);
        widen(kind, dy, k * n, g, n);
        #pragma omp simd reduction(+ : inner)
        for (int i = 0; i < n; i++) {
            a[i] *= r[k];
            dw[i] += g[i] * a[i];
            g[i] *= w[i];
            inner += g[i] * a[i];
        }
        for (int i = 0; i < n; i++) g[i] = r[k] * (g[i] - a[i] * inner / n);
        narrow(kind, g, dx, k * n, n);
    }
}

// --- RoPE: each pair of a head's numbers is turned by the angle of its position, back again for the gradient ---
// x (positions · heads, n); cos, sin (period, n / 2): position p uses row p % period.

void rotate(int kind, const void *x, const float *cos, const float *sin, void *y, int64_t rows, int heads, int period,
            int n, int back) {
    int half = n / 2;
    #pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < rows; k++) {
        float a[n], b[n];
        const float *c = cos + k / heads % period * half, *s = sin + k / heads % period * half;
        widen(kind, x, k * n, a, n);
        for (int i = 0; i < half; i++) {
            float turn = back ? -s[i] : s[i];
            b[i] = a[i] * c[i] - a[i + half] * turn;
            b[i + half] = a[i] * turn + a[i + half] * c[i];
        }
        narrow(kind, b, y, k * n, n);
    }
}

// --- SwiGLU: y = gate σ(gate) up, in pieces that fit the first cache ---

enum { PIECE = 1024 };

void swiglu_forward(int kind, const void *gate, const void *up, void *y, int64_t n) {
    #pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < n; at += PIECE) {
        int size = n - at < PIECE ? n - at : PIECE;
        float a[PIECE], b[PIECE];
        widen(kind, gate, at, a, size);
        widen(kind, up, at, b, size);
        for (int i = 0; i < size; i++) a[i] *= b[i] / (1 + expo(-a[i]));
        narrow(kind, a, y, at, size);
    }
}

void swiglu_backward(int kind, const void *dy, const void *gate, const void *up, void *dgate, void *dup, int64_t n) {
    #pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < n; at += PIECE) {
        int size = n - at < PIECE ? n - at : PIECE;
        float a[PIECE], b[PIECE], g[PIECE];
        widen(kind, gate, at, a, size);
        widen(kind, up, at, b, size);
        widen(kind, dy, at, g, size);
        for (int i = 0; i < size; i++) {
            float s = 1 / (1 + expo(-a[i])), d = s * (1 + a[i] * (1 - s));       // of silu
            b[i] *= g[i] * d;
            a[i] *= g[i] * s;
        }
        narrow(kind, b, dgate, at, size);
        narrow(kind, a, dup, at, size);
    }
}

// --- cross entropy: loss = log Σ exp(x) - x[target]; its gradient is softmax(x) - onehot(target) ---

// sums: a row's greatest number m and log Σ exp(x - m); their sum would round at the size of m.
void entropy_forward(int kind, const void *x, float *sums, int64_t rows, int n) {
    #pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < rows; k++) {
        float a[PIECE], most = -INFINITY, sum = 0;
        for (int at = 0; at < n; at += PIECE) {
            int size = n - at < PIECE ? n - at : PIECE;
            float before = most;
            widen(kind, x, k * n + at, a, size);
            #pragma omp simd reduction(max : most)
            for (int i = 0; i < size; i++) most = a[i] > most ? a[i] : most;
            if (at && before != most) sum *= expo(before - most);                // a larger one came: scale anew
            float shift = most > -INFINITY ? most : 0;           // only -inf so far, and less itself that is NaN
            #pragma omp simd reduction(+ : sum)
            for (int i = 0; i < size; i++) sum += expo(a[i] - shift);
        }
        sums[2 * k] = most, sums[2 * k + 1] = logf(sum);
    }
}

void entropy_backward(int kind, const float *g, const void *x, const int64_t *targets, const float *sums, void *dx,
                      int64_t rows, int n) {
    #pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < rows; k++)
        for (int at = 0; at < n; at += PIECE) {
            int size = n - at < PIECE ? n - at : PIECE;
            float a[PIECE];
            widen(kind, x, k * n + at, a, size);
            for (int i = 0; i < size; i++) a[i] = g[k] * expo(a[i] - sums[2 * k] - sums[2 * k + 1]);
            if (targets[k] >= at && targets[k] < at + size) a[targets[k] - at] -= g[k];
            narrow(kind, a, dx, k * n + at, size);
        }
}

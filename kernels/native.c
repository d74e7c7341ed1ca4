/* The passes between matrix products on a CPU, each element read and written once, computed in fp32.

   Compiled by native.py, after real.h, for the processor it runs on: with -DBF16 tensors are bf16, else fp32. Rows go
   to threads; sums over rows are made in PARTS whatever the number of threads, so that results do not depend on it. */

#include <math.h>
#include <string.h>

#define ROWS_PARALLEL(count) _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")
enum { PARTS = 64 };

/* --- norms: bias (LayerNorm) or none (RMSNorm); residual: the sum of both is stored and normalised --- */

void norm_forward(const real *x, const real *residual, const float *weight, const float *bias, real *y, real *summed,
                  float *mean, float *rstd, i64 rows, i64 n, float scale, float eps, int threads) {
    ROWS_PARALLEL(rows)
    for (i64 row = 0; row < rows; row++) {
        const real *a = x + row * n;
        real *out = y + row * n;
        if (residual) {
            const real *b = residual + row * n;
            real *s = summed + row * n;
#pragma omp simd
            for (i64 i = 0; i < n; i++) s[i] = put(get(b[i]) + get(put(get(a[i]) * scale)));
            a = s;
        }
        float centre = 0, squares = 0;
        if (bias) {
#pragma omp simd reduction(+ : centre)
            for (i64 i = 0; i < n; i++) centre += get(a[i]);
            centre /= n;
            mean[row] = centre;
        }
#pragma omp simd reduction(+ : squares)
        for (i64 i = 0; i < n; i++) { float d = get(a[i]) - centre; squares += d * d; }
        /* a sum that overflows must be seen, and not become a row of zeros */
        float by = rstd[row] = squares < INFINITY ? 1.f / sqrtf(squares / n + eps) : NAN;
        if (bias) {
#pragma omp simd
            for (i64 i = 0; i < n; i++) out[i] = put((get(a[i]) - centre) * by * weight[i] + bias[i]);
        } else { /* rounded before the weight, as the published LLaMA models were trained */
#pragma omp simd
            for (i64 i = 0; i < n; i++) out[i] = put(get(put(get(a[i]) * by)) * weight[i]);
        }
    }
}

/* dx = rstd (g - mean(g) - xhat mean(g xhat)) + dsummed with g = dy weight; no mean(g) for RMSNorm.
   partial: [PARTS, n], and as much again for dbias. */
void norm_backward(const real *dy, const real *dsummed, const real *x, const float *weight, const float *mean,
                   const float *rstd, real *dx, float *dweight, float *dbias, float *partial, i64 rows, i64 n,
                   int threads) {
    ROWS_PARALLEL(PARTS)
    for (int part = 0; part < PARTS; part++) {
        float *dw = partial + part * n, *db = partial + (PARTS + part) * n;
        memset(dw, 0, n * sizeof(float));
        if (dbias) memset(db, 0, n * sizeof(float));
        for (i64 row = rows * part / PARTS; row < rows * (part + 1) / PARTS; row++) {
            const real *d = dy + row * n, *a = x + row * n, *more = dsummed ? dsummed + row * n : 0;
            real *out = dx + row * n;
            float by = rstd[row], centre = mean ? mean[row] : 0.f, sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
            for (i64 i = 0; i < n; i++) {
                float g = get(d[i]) * weight[i];
                sum += g;
                product += g * (get(a[i]) - centre);
            }
            sum = mean ? sum / n : 0.f;
            product *= by * by / n;
#pragma omp simd
            for (i64 i = 0; i < n; i++) {
                float away = get(a[i]) - centre, g = get(d[i]);
                dw[i] += g * away * by;
                out[i] = put(by * (g * weight[i] - sum - away * product) + (more ? get(more[i]) : 0.f));
            }
            if (dbias)
#pragma omp simd
                for (i64 i = 0; i < n; i++) db[i] += get(d[i]);
        }
    }
    for (int which = 0; which < (dbias ? 2 : 1); which++) {
        float *total = which ? dbias : dweight;
        memset(total, 0, n * sizeof(float));
        for (int part = 0; part < PARTS; part++)
#pragma omp simd
            for (i64 i = 0; i < n; i++) total[i] += partial[(which * PARTS + part) * n + i];
    }
}

/* --- SwiGLU: rows of f, *_step apart --- */

void swiglu_forward(const real *gate, const real *up, real *y, i64 rows, i64 f, i64 gate_step, i64 up_step,
                    int threads) {
    ROWS_PARALLEL(rows)
    for (i64 row = 0; row < rows; row++) {
        const real *g = gate + row * gate_step, *u = up + row * up_step;
        real *out = y + row * f;
#pragma omp simd
        for (i64 i = 0; i < f; i++) out[i] = put(get(g[i]) / (1.f + exp_(-get(g[i]))) * get(u[i]));
    }
}

void swiglu_backward(const real *dy, const real *gate, const real *up, real *dgate, real *dup, i64 rows, i64 f,
                     i64 gate_step, i64 up_step, i64 d_step, int threads) {
    ROWS_PARALLEL(rows)
    for (i64 row = 0; row < rows; row++) {
        const real *d = dy + row * f, *g = gate + row * gate_step, *u = up + row * up_step;
        real *dg = dgate + row * d_step, *du = dup + row * d_step;
#pragma omp simd
        for (i64 i = 0; i < f; i++) {
            float z = get(g[i]), s = 1.f / (1.f + exp_(-z)), by = get(d[i]);
            dg[i] = put(by * get(u[i]) * s * (1.f + z * (1.f - s)));
            du[i] = put(by * z * s);
        }
    }
}

/* --- rotary positions: steps of batch, token and head in x and y; cosines and sines [tokens, pairs], a batch's
   table_step after another's --- */

void rope_turn(const real *x, real *y, const float *cosines, const float *sines, i64 batch, i64 tokens, i64 heads,
               i64 turned, i64 d, i64 pairs, i64 table_step, const i64 *steps, int interleaved, int back, int threads) {
    ROWS_PARALLEL(batch * tokens)
    for (i64 at = 0; at < batch * tokens; at++) {
        i64 b = at / tokens, t = at % tokens;
        const float *c = cosines + b * table_step + t * pairs, *s = sines + b * table_step + t * pairs;
        float sign = back ? -1.f : 1.f;
        for (i64 h = 0; h < heads; h++) {
            const real *from = x + b * steps[0] + t * steps[1] + h * steps[2];
            real *to = y + b * steps[3] + t * steps[4] + h * steps[5];
            i64 rest = h < turned ? 2 * pairs : 0;
            if (rest && interleaved) {
#pragma omp simd
                for (i64 i = 0; i < pairs; i++) {
                    float p = get(from[2 * i]), q = get(from[2 * i + 1]), si = sign * s[i];
                    to[2 * i] = put(p * c[i] - q * si);
                    to[2 * i + 1] = put(q * c[i] + p * si);
                }
            } else if (rest) {
#pragma omp simd
                for (i64 i = 0; i < pairs; i++) {
                    float p = get(from[i]), q = get(from[pairs + i]), si = sign * s[i];
                    to[i] = put(p * c[i] - q * si);
                    to[pairs + i] = put(q * c[i] + p * si);
                }
            }
            if (to != from) memmove(to + rest, from + rest, (d - rest) * sizeof(real));
        }
    }
}

/* --- softmax of causal scores, in place: row i of each [rows, keys] sees keys 0 … first + i --- */

void causal_softmax(real *scores, i64 heads, i64 rows, i64 keys, i64 first, float scale, int threads) {
    ROWS_PARALLEL(heads * rows)
    for (i64 at = 0; at < heads * rows; at++) {
        real *p = scores + at * keys;
        i64 seen = first + at % rows + 1;
        float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
        for (i64 i = 0; i < seen; i++) { float z = scale * get(p[i]); top = z > top ? z : top; }
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < seen; i++) sum += exp_(scale * get(p[i]) - top);
        float by = 1.f / sum;
#pragma omp simd
        for (i64 i = 0; i < seen; i++) p[i] = put(exp_(scale * get(p[i]) - top) * by);
        memset(p + seen, 0, (keys - seen) * sizeof(real));
    }
}

/* dp becomes scale p (dp - sum(p dp)). */
void softmax_backward(const real *probabilities, real *gradients, i64 rows, i64 keys, float scale, int threads) {
    ROWS_PARALLEL(rows)
    for (i64 row = 0; row < rows; row++) {
        const real *p = probabilities + row * keys;
        real *d = gradients + row * keys;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < keys; i++) sum += get(p[i]) * get(d[i]);
#pragma omp simd
        for (i64 i = 0; i < keys; i++) d[i] = put(scale * get(p[i]) * (get(d[i]) - sum));
    }
}

/* --- cross-entropy of rows of logits; in place, unless grad is 0, the gradient of the losses times weights;
   whether a label is no word --- */

int score(real *logits, const i64 *labels, const float *weights, float *nll, i64 rows, i64 words, float scale,
           int grad, int threads) {
    int wrong = 0;
    ROWS_PARALLEL(rows)
    for (i64 row = 0; row < rows; row++) {
        if (labels[row] < 0 || labels[row] >= words) {
#pragma omp atomic write
            wrong = 1;
            continue;
        }
        real *z = logits + row * words;
        float top = -INFINITY, sum = 0, label = scale * get(z[labels[row]]);
#pragma omp simd reduction(max : top)
        for (i64 i = 0; i < words; i++) { float s = scale * get(z[i]); top = s > top ? s : top; }
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < words; i++) sum += exp_(scale * get(z[i]) - top);
        nll[row] = logf(sum) + top - label;
        if (!grad) continue;
        float each = weights[row] * scale, by = each / sum;
#pragma omp simd
        for (i64 i = 0; i < words; i++) z[i] = put(exp_(scale * get(z[i]) - top) * by);
        z[labels[row]] = put(exp_(label - top) * by - each);
    }
    return wrong;
}

/* --- AdamW: m and v take in the gradient times scale, then w -= step m / (sqrt(v) / root + eps) + decay w --- */

struct adamw { float scale, m_new, v_kept, v_new, step, root, eps, decay; };

static inline float updated(float w, float *m, float *v, float g, const struct adamw *by) {
    g *= by->scale;
    *m += by->m_new * (g - *m);
    *v = by->v_kept * *v + by->v_new * g * g;
    return w - (by->step * *m / (sqrtf(*v) / by->root + by->eps) + by->decay * w);
}

static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

/* rounded, unless 0, becomes the weight in bf16, half-up */
void adamw(float *weight, float *m, float *v, const real *gradient, uint16_t *rounded, const float *numbers, i64 n,
           int threads) {
    struct adamw by; memcpy(&by, numbers, sizeof by);
    ROWS_PARALLEL(PARTS)
    for (i64 part = 0; part < PARTS; part++)
        if (rounded) {
#pragma omp simd
            for (i64 i = n * part / PARTS; i < n * (part + 1) / PARTS; i++) {
                weight[i] = updated(weight[i], m + i, v + i, get(gradient[i]), &by);
                rounded[i] = (bits_of(weight[i]) + 0x8000) >> 16;
            }
        } else {
#pragma omp simd
            for (i64 i = n * part / PARTS; i < n * (part + 1) / PARTS; i++)
                weight[i] = updated(weight[i], m + i, v + i, get(gradient[i]), &by);
        }
}

/* the same of weights in two 16-bit halves, high << 16 + low, of which rounded becomes the high one */
void adamw_halves(uint16_t *high, int16_t *low, float *m, float *v, const real *gradient, uint16_t *rounded,
                  const float *numbers, i64 n, int threads) {
    struct adamw by; memcpy(&by, numbers, sizeof by);
    ROWS_PARALLEL(PARTS)
    for (i64 part = 0; part < PARTS; part++)
#pragma omp simd
        for (i64 i = n * part / PARTS; i < n * (part + 1) / PARTS; i++) {
            uint32_t bits = ((uint32_t)high[i] << 16) + (uint32_t)(int32_t)low[i];
            bits = bits_of(updated(of_bits(bits), m + i, v + i, get(gradient[i]), &by));
            uint32_t top = (bits + 0x8000) >> 16;
            high[i] = rounded[i] = top;
            low[i] = bits - (top << 16);
        }
}

/* sum of squares; partial: [PARTS] */
float square_sum(const real *x, float *partial, i64 n, int threads) {
    ROWS_PARALLEL(PARTS)
    for (i64 part = 0; part < PARTS; part++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 i = n * part / PARTS; i < n * (part + 1) / PARTS; i++) sum += get(x[i]) * get(x[i]);
        partial[part] = sum;
    }
    float total = 0;
    for (int part = 0; part < PARTS; part++) total += partial[part];
    return total;
}

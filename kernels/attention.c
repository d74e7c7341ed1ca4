/* Causal attention y = softmax(scale q k^T) v and its gradients, without ever holding all probabilities.

   Compiled by attention_native.py after real.h: with -DBF16 tensors are bf16, else fp32; arithmetic is fp32. A head of
   a sequence is one thread's from beginning to end, so that results do not depend on the number of threads.

   Queries are worked through BLOCK at a time against CHUNK keys at a time, all of it in scratch memory that stays in
   the cache. What lies beyond the causal mask is left out but for the rest of a tile. */

#include <math.h>
#include <omp.h>
#include <string.h>

/* Matrix products are made in tiles of TALL rows and two vectors, as many sums as there are registers for. */
#if defined __AVX512F__
enum { BYTES = 64, TALL = 12 };
#elif defined __AVX__
enum { BYTES = 32, TALL = 6 };
#elif defined __aarch64__
enum { BYTES = 16, TALL = 12 };
#else
enum { BYTES = 16, TALL = 6 };
#endif
typedef float vec __attribute__((vector_size(BYTES), may_alias));
typedef float four __attribute__((vector_size(16), may_alias));
typedef int32_t four_at __attribute__((vector_size(16)));

enum { WIDTH = BYTES / sizeof(float), LINE = 16 /* floats in 64 bytes */ };
enum { BLOCK = 48, CHUNK = 6 * BLOCK, ROW = CHUNK + LINE /* floats from one row of scores to the next */ };

#define INLINE static inline __attribute__((always_inline))

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 up_to(i64 multiple, i64 n) { return (n + multiple - 1) / multiple * multiple; }
/* floats from one row of n to the next: an odd number of lines, for a column of tiles then lies all over the cache */
INLINE i64 row_of(i64 n) { return (n + LINE - 1) / LINE * LINE | LINE; }

/* --- C (+)= A B: one tile. A's element (i, k) is a[i * a_row + k * a_step]; rows of B and C have whole vectors --- */

INLINE void tile(const float *a, const i64 a_row, const i64 a_step, const float *b, i64 b_row, float *c, i64 c_row,
                 i64 depth, const int add, const int vectors) {
    vec sum[TALL][2];
#pragma GCC unroll 12
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sum[i][j] = add ? ((vec *)(c + i * c_row))[j] : (vec){};
    for (i64 k = 0; k < depth; k++, a += a_step, b += b_row) {
        vec b0 = ((vec *)b)[0], b1 = vectors > 1 ? ((vec *)b)[1] : b0;
#pragma GCC unroll 12
        for (int i = 0; i < TALL; i++) {
            float x = a[i * a_row];
            sum[i][0] += x * b0;
            if (vectors > 1) sum[i][1] += x * b1;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) ((vec *)(c + i * c_row))[j] = sum[i][j];
}

/* The three kinds of products. `first` is the number of keys that come before the one that row 0 sees last. */

/* S [rows, keys] = A B, A [depth, BLOCK] lying on its side, B [depth, ROW] */
static void scores(const float *a, const float *b, float *s, i64 rows, i64 keys, i64 depth, i64 first) {
    for (i64 j = 0; j < keys; j += 2 * WIDTH)
        for (i64 i = most(0, j - first) / TALL * TALL; i < rows; i += TALL)
            if (j + WIDTH < keys) tile(a + i, 1, BLOCK, b + j, ROW, s + i * ROW + j, ROW, depth, 0, 2);
            else tile(a + i, 1, BLOCK, b + j, ROW, s + i * ROW + j, ROW, depth, 0, 1);
}

/* C [rows, width] += P B, B [keys, width] */
static void rows_times(const float *p, const float *b, float *c, i64 row, i64 rows, i64 keys, i64 width, i64 first) {
    for (i64 j = 0; j < width; j += 2 * WIDTH)
        for (i64 i = 0; i < rows; i += TALL) {
            i64 depth = least(keys, first + i + TALL);
            if (j + WIDTH < width) tile(p + i * ROW, ROW, 1, b + j, row, c + i * row + j, row, depth, 1, 2);
            else tile(p + i * ROW, ROW, 1, b + j, row, c + i * row + j, row, depth, 1, 1);
        }
}

/* C [keys, width] += P^T B, B [rows, width] */
static void columns_times(const float *p, const float *b, float *c, i64 row, i64 rows, i64 keys, i64 width, i64 first) {
    for (i64 j = 0; j < width; j += 2 * WIDTH)
        for (i64 i = 0; i < keys; i += TALL) {
            i64 from = most(0, i - first), at = from * ROW + i;
            if (j + WIDTH < width)
                tile(p + at, 1, ROW, b + from * row + j, row, c + i * row + j, row, rows - from, 1, 2);
            else
                tile(p + at, 1, ROW, b + from * row + j, row, c + i * row + j, row, rows - from, 1, 1);
        }
}

/* --- tensors to scratch and back --- */

/* rows of x, `step` apart, times scale, to rows of n in whole vectors, the rest zero; rows up to `padded` are zero */
static void pack(const real *x, i64 step, i64 rows, i64 padded, i64 n, float scale, float *to, i64 row) {
    for (i64 i = 0; i < rows; i++) {
#pragma omp simd
        for (i64 j = 0; j < n; j++) to[i * row + j] = scale * get(x[i * step + j]);
        for (i64 j = n; j < up_to(LINE, n); j++) to[i * row + j] = 0;
    }
    for (i64 i = rows; i < padded; i++) memset(to + i * row, 0, up_to(LINE, n) * sizeof(float));
}

/* to [n, rows] = the transpose of x [rows, n], both in whole lines */
static void transpose(const float *x, i64 row, i64 rows, i64 n, float *to, i64 to_row) {
    const four_at low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
    for (i64 i = 0; i < rows; i += 4)
        for (i64 j = 0; j < n; j += 4) {
            const float *at = x + i * row + j;
            four a = *(four *)at, b = *(four *)(at + row), c = *(four *)(at + 2 * row), d = *(four *)(at + 3 * row);
            four ac = __builtin_shuffle(a, c, low), bd = __builtin_shuffle(b, d, low);
            four ca = __builtin_shuffle(a, c, high), db = __builtin_shuffle(b, d, high);
            float *out = to + j * to_row + i;
            *(four *)out = __builtin_shuffle(ac, bd, low);
            *(four *)(out + to_row) = __builtin_shuffle(ac, bd, high);
            *(four *)(out + 2 * to_row) = __builtin_shuffle(ca, db, low);
            *(four *)(out + 3 * to_row) = __builtin_shuffle(ca, db, high);
        }
}

static void unpack(const float *x, i64 row, i64 rows, i64 n, float scale, real *to, i64 step) {
    for (i64 i = 0; i < rows; i++)
#pragma omp simd
        for (i64 j = 0; j < n; j++) to[i * step + j] = put(scale * x[i * row + j]);
}

/* --- the operator --- */

/* tensors [batch, heads, length, n], the last dimension adjacent; steps: of one tensor after another, from one
   sequence, head and token to the next */
struct shape { i64 batch, heads, length, n; };
#define AT(tensor, which) ((tensor) + b * steps[3 * (which)] + h * steps[3 * (which) + 1])
#define STEP(which) steps[3 * (which) + 2]

/* floats of scratch memory that a thread needs */
i64 attention_scratch(i64 length, i64 n, int backward) {
    i64 row = row_of(n), lines = up_to(LINE, n), padded = up_to(BLOCK, length);
    i64 turned = lines * BLOCK, block = BLOCK * row, p = BLOCK * ROW;
    if (!backward) return up_to(CHUNK, length) / CHUNK * lines * ROW + padded * row + turned + 2 * block + p;
    return 3 * CHUNK * row + 2 * lines * ROW + padded * row + 2 * (turned + block + p) + CHUNK * row;
}

INLINE i64 whole_lines(i64 n) { return (n + LINE - 1) & -LINE; } /* gcc sees that loops to here have no remainder */

INLINE void fill(float *x, i64 from, i64 to, float by) {
    for (i64 j = from; j < to; j++) x[j] = by;
}

/* The part of one chunk of keys: scores become exponentials, sums and sums of values are kept up to date. */
static void softmax(float *s, float *y, i64 row, i64 n, i64 rows, i64 keys, i64 first, float *tops, float *sums) {
    for (i64 i = 0; i < rows; i++, s += ROW, y += row) {
        i64 seen = least(keys, first + i + 1), end = whole_lines(seen);
        fill(s, seen, end, -INFINITY);
        float top = tops[i], sum = 0;
#pragma omp simd reduction(max : top)
        for (i64 j = 0; j < end; j++) top = s[j] > top ? s[j] : top;
        float minus = top == -INFINITY ? 0 : top; /* a row that has seen nothing but -inf has sum 0, and becomes nan */
#pragma omp simd reduction(+ : sum)
        for (i64 j = 0; j < end; j++) { s[j] = exp_(s[j] - minus); sum += s[j]; }
        fill(s, end, least(keys, first + up_to(TALL, i + 1)), 0);
        if (top != tops[i] && tops[i] != -INFINITY) {
            float by = exp_(tops[i] - minus);
            sums[i] *= by;
#pragma omp simd
            for (i64 j = 0; j < n; j++) y[j] *= by;
        }
        tops[i] = top;
        sums[i] += sum;
    }
}

/* lse: [batch, heads, length], of the scaled scores; steps of q, k, v, y */
void attention_forward(const real *q, const real *k, const real *v, real *y, float *lse, float *scratch,
                       const i64 *numbers, const i64 *steps, float scale, int threads) {
    struct shape of; memcpy(&of, numbers, sizeof of);
    i64 length = of.length, n = of.n, lines = up_to(LINE, n), width = up_to(WIDTH, n), row = row_of(n);
    i64 each = attention_scratch(length, n, 0);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (i64 head = 0; head < of.batch * of.heads; head++) {
        i64 b = head / of.heads, h = head % of.heads;
        float *kt = scratch + omp_get_thread_num() * each, *vs = kt + up_to(CHUNK, length) / CHUNK * lines * ROW;
        float *qt = vs + up_to(BLOCK, length) * row, *rows_in = qt + lines * BLOCK, *sum_v = rows_in + BLOCK * row;
        float *p = sum_v + BLOCK * row;

        pack(AT(v, 2), STEP(2), length, length, n, 1, vs, row);
        for (i64 at = 0; at < length; at += BLOCK) {
            i64 rows = least(BLOCK, length - at), chunk = at / CHUNK;
            pack(AT(k, 1) + at * STEP(1), STEP(1), rows, BLOCK, n, 1, rows_in, row);
            transpose(rows_in, row, BLOCK, lines, kt + chunk * lines * ROW + at - chunk * CHUNK, ROW);
        }
        for (i64 at = 0; at < length; at += BLOCK) {
            i64 rows = least(BLOCK, length - at), tall = up_to(TALL, rows);
            float tops[BLOCK], sums[BLOCK] = {0};
            for (int i = 0; i < BLOCK; i++) tops[i] = -INFINITY;
            pack(AT(q, 0) + at * STEP(0), STEP(0), rows, BLOCK, n, scale, rows_in, row);
            transpose(rows_in, row, BLOCK, lines, qt, BLOCK);
            memset(sum_v, 0, BLOCK * row * sizeof(float));
            for (i64 from = 0; from <= at; from += CHUNK) {
                i64 first = at - from, keys = least(least(CHUNK, length - from), first + rows);
                scores(qt, kt + from / CHUNK * lines * ROW, p, tall, keys, n, first);
                softmax(p, sum_v, row, n, rows, keys, first, tops, sums);
                rows_times(p, vs + from * row, sum_v, row, tall, keys, width, first);
            }
            for (i64 i = 0; i < rows; i++) {
                unpack(sum_v + i * row, row, 1, n, 1 / sums[i], AT(y, 3) + (at + i) * STEP(3), 0);
                lse[head * length + at + i] = tops[i] + logf(sums[i]);
            }
        }
    }
}

/* Scores and gradients of probabilities become probabilities and gradients of scores. */
static void softmax_back(float *p, float *ds, i64 rows, i64 tall, i64 keys, i64 first, const float *lse,
                         const float *product) {
    i64 width = up_to(TALL, keys);
    for (i64 i = 0; i < tall; i++, p += ROW, ds += ROW) {
        i64 seen = i < rows ? least(keys, first + i + 1) : 0, end = whole_lines(seen);
        fill(p, seen, end, -INFINITY);
        fill(ds, seen, most(end, width), 0);
        float minus = lse[i], less = product[i];
#pragma omp simd
        for (i64 j = 0; j < end; j++) {
            p[j] = exp_(p[j] - minus);
            ds[j] = p[j] * (ds[j] - less);
        }
        fill(p, end, width, 0);
    }
}

/* steps of dy, y, q, k, v, dq, dk, dv */
void attention_backward(const real *dy, const real *y, const real *q, const real *k, const real *v, const float *lse,
                        real *dq, real *dk, real *dv, float *scratch, const i64 *numbers, const i64 *steps,
                        float scale, int threads) {
    struct shape of; memcpy(&of, numbers, sizeof of);
    i64 length = of.length, n = of.n, lines = up_to(LINE, n), width = up_to(WIDTH, n), row = row_of(n);
    i64 each = attention_scratch(length, n, 1);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (i64 head = 0; head < of.batch * of.heads; head++) {
        i64 b = head / of.heads, h = head % of.heads;
        float *ks = scratch + omp_get_thread_num() * each, *kt = ks + CHUNK * row, *vt = kt + lines * ROW;
        float *dks = vt + lines * ROW, *dvs = dks + CHUNK * row, *dqs = dvs + CHUNK * row;
        float *qs = dqs + up_to(BLOCK, length) * row, *dys = qs + BLOCK * row, *qt = dys + BLOCK * row;
        float *dyt = qt + lines * BLOCK, *p = dyt + lines * BLOCK, *ds = p + BLOCK * ROW, *vs = ds + BLOCK * ROW;

        memset(dqs, 0, up_to(BLOCK, length) * row * sizeof(float));
        for (i64 from = 0; from < length; from += CHUNK) {
            i64 here = least(CHUNK, length - from), padded = up_to(BLOCK, here);
            pack(AT(k, 3) + from * STEP(3), STEP(3), here, padded, n, 1, ks, row);
            pack(AT(v, 4) + from * STEP(4), STEP(4), here, padded, n, 1, vs, row);
            transpose(ks, row, padded, lines, kt, ROW);
            transpose(vs, row, padded, lines, vt, ROW);
            memset(dks, 0, padded * row * sizeof(float));
            memset(dvs, 0, padded * row * sizeof(float));
            for (i64 at = from; at < length; at += BLOCK) {
                i64 rows = least(BLOCK, length - at), tall = up_to(TALL, rows);
                i64 first = at - from, keys = least(here, first + rows);
                float product[BLOCK] = {0}, minus[BLOCK] = {0};
                pack(AT(q, 2) + at * STEP(2), STEP(2), rows, BLOCK, n, scale, qs, row);
                pack(AT(dy, 0) + at * STEP(0), STEP(0), rows, BLOCK, n, 1, dys, row);
                for (i64 i = 0; i < rows; i++) {
                    const real *out = AT(y, 1) + (at + i) * STEP(1);
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (i64 j = 0; j < n; j++) sum += dys[i * row + j] * get(out[j]);
                    product[i] = sum;
                    minus[i] = lse[head * length + at + i];
                }
                transpose(qs, row, BLOCK, lines, qt, BLOCK);
                transpose(dys, row, BLOCK, lines, dyt, BLOCK);
                scores(qt, kt, p, tall, keys, n, first);
                scores(dyt, vt, ds, tall, keys, n, first);
                softmax_back(p, ds, rows, tall, keys, first, minus, product);
                columns_times(p, dys, dvs, row, rows, keys, width, first);
                columns_times(ds, qs, dks, row, rows, keys, width, first);
                rows_times(ds, ks, dqs + at * row, row, tall, keys, width, first);
            }
            unpack(dks, row, here, n, 1, AT(dk, 6) + from * STEP(6), STEP(6));
            unpack(dvs, row, here, n, 1, AT(dv, 7) + from * STEP(7), STEP(7));
        }
        unpack(dqs, row, length, n, scale, AT(dq, 5), STEP(5));
    }
}

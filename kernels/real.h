/* Elements of tensors, fp32 or with -DBF16 bf16, and e^x: what native.c and attention.c are compiled after. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

#ifdef BF16
typedef uint16_t real;
static inline float get(real x) { uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }
static inline real put(float x) { /* to the nearest, ties to even */
    uint32_t bits; memcpy(&bits, &x, 4);
    uint32_t up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : up;
}
#else
typedef float real;
static inline float get(real x) { return x; }
static inline real put(float x) { return x; }
#endif

/* a b + c, in one step where the processor has it; fmaf would be a call for each number where it has not */
#ifdef __FP_FAST_FMAF
#define FMA(a, b, c) fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* e^x to one unit in the last place: 2^n times a polynomial in the rest, |rest| <= ln 2 / 2. 0 below -87.3. */
static inline float exp_(float x) {
    float n = (x < 88.7f ? x : 88.7f) * 1.44269504f + 12582912.f;
    int32_t whole; memcpy(&whole, &n, 4);
    n -= 12582912.f;
    float r = FMA(n, -1.42860677e-6f, FMA(n, -0.693145752f, x));
    float p = 1.38888889e-3f;
    p = FMA(p, r, 8.33333333e-3f);
    p = FMA(p, r, 4.16666667e-2f);
    p = FMA(p, r, 0.166666667f);
    p = FMA(p, r, 0.5f);
    p = FMA(p, r, 1.f);
    p = FMA(p, r, 1.f);
    int32_t exponent = (whole + 127) << 23; /* the low bits of 12582912 + n are n */
    float power; memcpy(&power, &exponent, 4);
    float y = p * power;
    return x < -87.3f ? 0.f : x > 88.7f ? INFINITY : y;
}

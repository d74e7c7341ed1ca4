/* zlib's CRC-32 by carry-less multiplication: registers of 64 or 256 bytes are folded onto the bytes that follow.
   Compiled by crc32.py. V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction",
   Intel 2009; the constants are x^(n+32) and x^(n-32) by the reflected polynomial 0xEDB88320, n the bits folded over. */

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define NARROW __attribute__((target("pclmul,sse4.1")))
#define WIDE __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.1")))

/* 0: not at all, 1: fold_narrow, 2: fold_wide too. */
int can_fold(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("pclmul") || !__builtin_cpu_supports("sse4.1"))
        return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq") ? 2 : 1;
}

NARROW static inline __m128i onto(__m128i x, __m128i by, __m128i next) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), next);
}

/* x[0 … 3], 64 bytes in order, and all whole 64 bytes from `at` on; `rest` gets 16 bytes of the same remainder. */
NARROW static void finish(__m128i *x, const __m128i *at, const __m128i *end, uint8_t *rest) {
    const __m128i by512 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i by128 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    for (; at < end; at += 4)
        for (int i = 0; i < 4; i++)
            x[i] = onto(x[i], by512, _mm_loadu_si128(at + i));
    for (int i = 1; i < 4; i++)
        x[i] = onto(x[i - 1], by128, x[i]);
    _mm_storeu_si128((__m128i *)rest, x[3]);
}

/* `rest` gets 16 bytes whose CRC, from a register of 0, is that of `size` bytes (a multiple of 64, at least one) from
   the register `crc`. */
NARROW void fold_narrow(const uint8_t *data, size_t size, uint32_t crc, uint8_t *rest) {
    const __m128i *at = (const __m128i *)data;
    __m128i x[4];
    for (int i = 0; i < 4; i++)
        x[i] = _mm_loadu_si128(at + i);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
    finish(x, at + 4, (const __m128i *)(data + size), rest);
}

WIDE static inline __m512i wide_onto(__m512i x, __m512i by, __m512i next) {
    return _mm512_ternarylogic_epi64(
        _mm512_clmulepi64_epi128(x, by, 0x00), _mm512_clmulepi64_epi128(x, by, 0x11), next, 0x96);
}

/* The same of 256 bytes or more. */
WIDE void fold_wide(const uint8_t *data, size_t size, uint32_t crc, uint8_t *rest) {
    const __m512i by2048 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x01322d1430, 0x011542778a));
    const __m512i by512 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x01c6e41596, 0x0154442bd4));
    const uint8_t *at = data + 256, *end = data + size / 256 * 256;
    __m512i x[4];
    for (int i = 0; i < 4; i++)
        x[i] = _mm512_loadu_si512(data + 64 * i);
    x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    for (; at < end; at += 256)
        for (int i = 0; i < 4; i++)
            x[i] = wide_onto(x[i], by2048, _mm512_loadu_si512(at + 64 * i));
    for (int i = 1; i < 4; i++)
        x[i] = wide_onto(x[i - 1], by512, x[i]);
    __m128i last[4];
    _mm512_storeu_si512(last, x[3]);
    finish(last, (const __m128i *)at, (const __m128i *)(data + size), rest);
}
#else
int can_fold(void) { return 0; }
void fold_narrow(const uint8_t *data, size_t size, uint32_t crc, uint8_t *rest) {}
void fold_wide(const uint8_t *data, size_t size, uint32_t crc, uint8_t *rest) {}
#endif

/* Rows of float32, float16 or bfloat16 in memory, as floats and back; of float8 (e4m3fn) as floats only. */
#ifndef DIT_ACCEL_ROWS_H
#define DIT_ACCEL_ROWS_H

#include "vectors.h"

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, FLOAT8 = 3 };

INLINE int64_t bytes_of(int type) { return type == FLOAT32 ? 4 : type == FLOAT8 ? 1 : 2; }
INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

INLINE uint16_t to_bfloat16(float x) { /* to nearest, ties to even */
    uint32_t u = bits_of(x);
    return (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

INLINE float from_float16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    /* the exponent is off by 112: a product with 2^112 mends it, of subnormal numbers too */
    return float_of(bits_of(float_of(rest << 13) * 0x1p112f) | sign);
}

INLINE uint16_t to_float16(float x) {
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00;
    if (rest >= 0x477ff000) return sign | 0x7c00; /* 65520 and more round to infinity */
    if (rest < 0x38800000) /* subnormal: the sum with 1/2 rounds at the place of 2^-24 */
        return sign | (uint16_t)(bits_of(float_of(rest) + 0.5f) - 0x3f000000);
    return sign | (uint16_t)((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13);
}

INLINE float from_float8(uint8_t byte) { /* as from_float16; there is no infinity, and one NaN */
    uint32_t sign = (uint32_t)(byte & 0x80) << 24, rest = byte & 0x7f;
    uint32_t bits = bits_of(float_of(rest << 20) * 0x1p120f);
    return float_of((rest == 0x7f ? 0x7fc00000 : bits) | sign);
}

static void load_row(const void *from, int type, int64_t n, float *restrict to) {
    const uint16_t *half = from;
    const uint8_t *byte = from;
    int64_t i = 0;
    if (type == FLOAT32) memcpy(to, from, n * 4);
    if (type == BFLOAT16)
        for (; i < n; i++) to[i] = float_of((uint32_t)half[i] << 16);
    if (type == FLOAT8)
        for (; i < n; i++) to[i] = from_float8(byte[i]);
    if (type != FLOAT16) return;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
#endif
    for (; i < n; i++) to[i] = from_float16(half[i]);
}

static void store_row(const float *restrict from, int type, int64_t n, void *to) {
    uint16_t *half = to;
    int64_t i = 0;
    if (type == FLOAT32) memcpy(to, from, n * 4);
    if (type == BFLOAT16)
        for (; i < n; i++) half[i] = to_bfloat16(from[i]);
    if (type != FLOAT16) return;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(half + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) half[i] = to_float16(from[i]);
}

#endif

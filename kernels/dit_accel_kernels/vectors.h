/* One vector of floats and the few operations that kernels need, at the width that the build is for.

LANES floats a vector; TILE_VECTORS vectors times TILE_ROWS rows of sums, the vectors of one step and one broadcast
fill the register file: 32 registers with AVX-512, 16 otherwise. A source that uses vectors wider than the machine's
spills every one of them and is ten times slower.

All of this must be built without -ffast-math, which may fold away the rounding constants. */
#ifndef DIT_ACCEL_VECTORS_H
#define DIT_ACCEL_VECTORS_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define TILE_ROWS 6

/* 2^f on [-1/2, 1/2] as 1 + f C1 + ... + f^5 C5, with the least largest relative error: 1e-7, one unit of float. */
#define EXP2_C1 6.931469776e-1f
#define EXP2_C2 2.402224208e-1f
#define EXP2_C3 5.550733744e-2f
#define EXP2_C4 9.671512786e-3f
#define EXP2_C5 1.326472725e-3f
#define EXP2_LOWEST -160.0f /* 2^-160 is 0 in float: what a masked key weighs */

#if defined(__AVX512F__)

#define LANES 16
#define TILE_VECTORS 4
typedef __m512 vec;
INLINE vec v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec v_all(float x) { return _mm512_set1_ps(x); }
INLINE vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); } /* b where one is NaN */
INLINE vec v_gather(const float *p, int stride) {
    __m512i place = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(stride));
    return _mm512_i32gather_ps(place, p, 4);
}
INLINE float v_largest(vec x) { return _mm512_reduce_max_ps(x); }
INLINE float v_sum(vec x) { return _mm512_reduce_add_ps(x); }
INLINE vec v_scale_exp2(vec p, vec n) { return _mm512_scalef_ps(p, n); }
INLINE vec v_round(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#elif defined(__AVX2__)

#define LANES 8
#define TILE_VECTORS 2
typedef __m256 vec;
INLINE vec v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vec x) { _mm256_storeu_ps(p, x); }
INLINE vec v_all(float x) { return _mm256_set1_ps(x); }
INLINE vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec v_round(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* n in two halves, so that each power is a normal number and the product may underflow */
INLINE vec v_scale_exp2(vec p, vec n) {
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    __m256i other = _mm256_sub_epi32(whole, half), one = _mm256_set1_epi32(127);
    vec low = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
    vec high = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(other, one), 23));
    return v_mul(v_mul(p, low), high);
}

#else /* any machine: GCC and Clang lower these to what it has, NEON or SSE2 or scalars */

#define LANES 4
#define TILE_VECTORS 2
typedef float vec __attribute__((vector_size(16)));
typedef int32_t whole_vec __attribute__((vector_size(16)));
INLINE vec v_load(const float *p) { vec x; memcpy(&x, p, sizeof x); return x; }
INLINE void v_store(float *p, vec x) { memcpy(p, &x, sizeof x); }
INLINE vec v_all(float x) { return (vec){x, x, x, x}; }
INLINE vec v_add(vec a, vec b) { return a + b; }
INLINE vec v_sub(vec a, vec b) { return a - b; }
INLINE vec v_mul(vec a, vec b) { return a * b; }
INLINE vec v_fma(vec a, vec b, vec c) { return a * b + c; }
INLINE vec v_max(vec a, vec b) {
    whole_vec left = a > b;
    return (vec)(((whole_vec)a & left) | ((whole_vec)b & ~left));
}
INLINE vec v_round(vec x) { return (x + 12582912.0f) - 12582912.0f; } /* 1.5 * 2^23: no bits left for a fraction */
INLINE vec v_scale_exp2(vec p, vec n) {
    whole_vec whole = (whole_vec)(n + 12582912.0f) - 0x4B400000, half = whole >> 1;
    return p * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23);
}

#endif

#if !defined(__AVX512F__)
INLINE vec v_gather(const float *p, int stride) {
    float x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = p[i * stride];
    return v_load(x);
}
INLINE float v_largest(vec x) {
    float part[LANES], top;
    v_store(part, x);
    top = part[0];
    for (int i = 1; i < LANES; i++) top = part[i] > top ? part[i] : top;
    return top;
}
INLINE float v_sum(vec x) {
    float part[LANES], sum = 0;
    v_store(part, x);
    for (int i = 0; i < LANES; i++) sum += part[i];
    return sum;
}
#endif

/* 2^x for x <= 0, and 0 for -inf; NaN stays NaN. */
INLINE vec v_exp2(vec x) {
    x = v_max(v_all(EXP2_LOWEST), x);
    vec n = v_round(x), f = v_sub(x, n);
    vec p = v_fma(v_all(EXP2_C5), f, v_all(EXP2_C4));
    p = v_fma(p, f, v_all(EXP2_C3));
    p = v_fma(p, f, v_all(EXP2_C2));
    p = v_fma(p, f, v_all(EXP2_C1));
    p = v_fma(p, f, v_all(1.0f));
    return v_scale_exp2(p, n);
}

#endif

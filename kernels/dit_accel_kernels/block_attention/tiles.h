/* A few rows of queries over up to 64 keys: scores, online softmax, weighted sum, in the first-level cache. */
#ifndef DIT_ACCEL_TILES_H
#define DIT_ACCEL_TILES_H

#include "packing.h"

/* ---------------------------------------------------------------- products */

/* c [R][NV vectors] = keep[r] * c + a [R][steps] b [steps][NV vectors]; c starts from 0 where keep is NULL. */
#define DEFINE_TILE(name, product)                                                                             \
    INLINE void name(const int R, const int NV, const float *restrict a, int64_t lda, const float *restrict b,  \
                     int64_t ldb, float *restrict c, int64_t ldc, int64_t steps, const float *keep) {            \
        vec sum[TILE_ROWS][TILE_VECTORS], right[TILE_VECTORS];                                                   \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)                                                      \
            _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++)                                                 \
                sum[r][j] = keep ? v_mul(v_load(c + r * ldc + j * LANES), v_all(keep[r])) : v_all(0.0f);         \
        for (int64_t i = 0; i < steps; i++) {                                                                    \
            _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++) right[j] = v_load(b + i * ldb + j * LANES);     \
            _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                \
                vec left = v_all(a[r * lda + i]);                                                                \
                _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++) sum[r][j] = product(left, right[j], sum[r][j]); \
            }                                                                                                    \
        }                                                                                                        \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)                                                      \
            _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++) v_store(c + r * ldc + j * LANES, sum[r][j]);    \
    }

DEFINE_TILE(tile_floats, v_fma)
#if PAIRS
INLINE vec v_pairs(vec a, vec b, vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
DEFINE_TILE(tile_pairs, v_pairs)
#else
#define tile_pairs tile_floats
#endif

typedef struct { const float *a, *b; float *c; int64_t lda, ldb, ldc, steps; const float *keep; } Product;

#define TILE(pairs, R, NV)                                                                   \
    ((pairs) ? tile_pairs(R, NV, p.a, p.lda, p.b, p.ldb, p.c, p.ldc, p.steps, p.keep)        \
             : tile_floats(R, NV, p.a, p.lda, p.b, p.ldb, p.c, p.ldc, p.steps, p.keep))

/* R rows times `vectors` vectors, 1 to TILE_VECTORS. */
INLINE void multiply(const int pairs, const int R, int64_t vectors, Product p) {
#if TILE_VECTORS == 4
    if (vectors == 4) TILE(pairs, R, 4);
    if (vectors == 3) TILE(pairs, R, 3);
#endif
    if (vectors == 2) TILE(pairs, R, 2);
    if (vectors == 1) TILE(pairs, R, 1);
}

/* ---------------------------------------------------------------- one group of keys */

INLINE void store_weights(const int pairs, float *to, int64_t j, vec first, vec second) {
#if PAIRS
    if (pairs) { /* the first half of the pairs is `first` */
        _mm512_storeu_si512(to + j / 2 * LANES, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        return;
    }
#endif
    (void)pairs;
    v_store(to + j * LANES, first);
    v_store(to + (j + 1) * LANES, second);
}

INLINE vec weight(const float *s, vec scale, const float *bias, int64_t j, vec shift) {
    vec x = v_load(s + j * LANES);
    if (bias) return v_exp2(v_sub(v_fma(x, scale, v_load(bias + j * LANES)), shift));
    return v_exp2(v_fma(x, scale, v_sub(v_all(0.0f), shift)));
}

/* Scores [R][vectors] become weights in their place, as floats or as pairs; running maxima and totals go on; `keep`
   is what the sums so far are to be scaled by. */
INLINE void softmax(const int pairs, const int R, const int64_t vectors, float *scores, float scale,
                    const float *bias, float *top, float *total, float *keep) {
    vec all_scale = v_all(scale);
    float drop[16] = {0};
    for (int r = 0; r < R; r++) {
        vec most = v_all(FLOOR);
        for (int64_t j = 0; j < vectors; j++) {
            vec x = v_mul(v_load(scores + r * KEYS + j * LANES), all_scale);
            most = v_max(most, bias ? v_add(x, v_load(bias + j * LANES)) : x);
        }
        float largest = v_largest(most), before = top[r];
        top[r] = largest > before ? largest : before;
        drop[r] = before - top[r];
    }
    for (int r = 0; r < R; r += LANES) v_store(keep + r, v_exp2(v_load(drop + r)));
    for (int r = 0; r < R; r++) {
        float *s = scores + r * KEYS;
        vec sum = v_all(0.0f), shift = v_all(top[r]);
        for (int64_t j = 0; j < vectors; j += 2) {
            vec first = weight(s, all_scale, bias, j, shift), second = v_all(0.0f);
            if (j + 1 < vectors) second = weight(s, all_scale, bias, j + 1, shift);
            store_weights(pairs, s, j, first, second);
            sum = v_add(sum, v_add(first, second));
        }
        v_store(total + r * LANES, v_fma(v_load(total + r * LANES), v_all(keep[r]), sum));
    }
}

typedef struct { /* up to KEYS keys of one block */
    const float *k, *v, *bias;
    int64_t vectors, panel_keys; /* of keys that are looked at; padded keys from here to the end of the block */
} Keys;

/* R rows of queries, from `row` on, over one group of keys. */
INLINE void attend_rows(const int pairs, const int R, const Job *job, const Scratch *s, Keys keys, int64_t row) {
    int64_t units = job->units, width = job->padded_width, vectors = width / LANES, n;
    float keep[16], scale = job->call->scale * LOG2E, *top = s->top + row, *total = s->total + row * LANES;
    const int64_t panel = TILE_VECTORS * LANES;
    for (int64_t j = 0; j < keys.vectors; j += n) {
        int64_t left = keys.panel_keys - j * LANES;
        n = keys.vectors - j < TILE_VECTORS ? keys.vectors - j : TILE_VECTORS;
        multiply(pairs, R, n, (Product){s->q + row * units, keys.k + j * LANES * units, s->scores + j * LANES, units,
                                        left < panel ? left : panel, KEYS, units, NULL});
    }
    if (keys.vectors == KEYS / LANES && !keys.bias)
        softmax(pairs, R, KEYS / LANES, s->scores, scale, NULL, top, total, keep);
    else
        softmax(pairs, R, keys.vectors, s->scores, scale, keys.bias, top, total, keep);
    for (int64_t d = 0; d < vectors; d += n) { /* tiles of even width: 5 vectors are 3 and 2 */
        int64_t tiles = (vectors - d + TILE_VECTORS - 1) / TILE_VECTORS;
        n = (vectors - d + tiles - 1) / tiles;
        multiply(pairs, R, n, (Product){s->scores, keys.v + d * LANES, s->sums + row * width + d * LANES, KEYS, width,
                                        width, keys.vectors * LANES / (pairs ? 2 : 1), keep});
    }
}

static void attend_floats(const Job *job, const Scratch *s, Keys keys, int64_t rows) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS) attend_rows(0, TILE_ROWS, job, s, keys, row);
    for (; row < rows; row += 2) attend_rows(0, 2, job, s, keys, row);
}

static void attend_pairs(const Job *job, const Scratch *s, Keys keys, int64_t rows) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS) attend_rows(PAIRS, TILE_ROWS, job, s, keys, row);
    for (; row < rows; row += 2) attend_rows(PAIRS, 2, job, s, keys, row);
}

#endif

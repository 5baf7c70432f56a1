/* block_attention on a CPU, in plain C: no headers of torch, one function, called through ctypes.

K and V of the heads that attend are packed once: keys of a block in panels as wide as a tile of sums, V in rows
padded to whole vectors, both zero where a key is not seen. Items (head, query block) are taken longest first from
a shared counter. For each 64 keys and 6 rows of queries, scores, online softmax and weighted sum happen in the
first-level cache. Softmax runs in powers of two; the LSE that leaves is natural.

With AVX512-BF16 and bfloat16 inputs, both products take pairs of bfloat16 numbers: neighbours in D for the scores,
neighbouring keys for the sums. A "unit" is 32 bits of such a product's inputs: one float, or one such pair.

Sources: online softmax as in flash attention (arXiv:2205.14135); tail and residual as in `__init__.py`. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>

#include "rows.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define PAIRS 1
#else
#define PAIRS 0
#endif

#define KEYS 64          /* taken at a time: a panel of K and one of V stay in the first-level cache */
#define FLOOR -1e30f     /* the running maximum before any key: -inf minus it is -inf, not NaN */
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453

enum { ATTEND, COPY, SKIP, ADD, MERGE, EMIT_RESIDUAL, EMIT_TAIL }; /* plan.Kind */
enum { BATCH, TOKEN, HEAD };                                       /* of strides, in elements */

typedef struct { /* cpu.py has the same fields in the same order */
    const void *q, *k, *v;
    void *out, *cached;
    float *lse, *cached_lse;
    const float *bias;    /* or NULL */
    const int32_t *valid; /* or NULL */
    const int32_t *q_starts, *k_starts, *pattern, *kind, *slot, *pointers, *split, *indices, *work;
    void *workspace;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3], cached_stride[3];
    int64_t lse_stride[3], cached_lse_stride[3], bias_stride[3];
    int64_t batch, packs, heads, width, q_blocks, k_blocks, items, block, threads; /* packs: 1, or batch */
    int32_t type, out_type, cached_type;
    float scale;
} Call;

/* Where things lie in the workspace. `first[j]` is the place of key block j among padded keys. */
typedef struct {
    const Call *call;
    int pairs;                         /* units are pairs of bfloat16 */
    int64_t units, padded_width, keys; /* of a row of q; floats of a row of sums; padded keys of a head */
    int64_t rows;                      /* scratch rows of a thread, whole tiles */
    int32_t *first, *seen;             /* [k_blocks + 1]; [packs, heads, k_blocks] keys up to the last seen one */
    uint8_t *biased;                   /* [packs, heads, k_blocks] */
    float *bias, *k, *v, *scratch;
    int64_t k_size, v_size, scratch_size, bytes;
    atomic_long packed, taken;
    pthread_mutex_t lock;
    pthread_cond_t all_here;
    int64_t waiting;
} Job;

typedef struct { float *q, *sums, *kept, *top, *total, *scores, *row; } Scratch;

static int64_t rounded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static int64_t place(const int64_t *stride, int64_t batch, int64_t token, int64_t head) {
    return batch * stride[BATCH] + token * stride[TOKEN] + head * stride[HEAD];
}

static int64_t key_block_size(const Call *c, int64_t j) { return c->k_starts[j + 1] - c->k_starts[j]; }

/* ---------------------------------------------------------------- layout of the workspace */

static void *take(char *base, int64_t *used, int64_t bytes) {
    void *here = base ? base + *used : NULL;
    *used += rounded(bytes, 64);
    return here;
}

static void lay_out(Job *job, const Call *c, char *base) {
    int64_t used = 0, padded = 0, cells = c->packs * c->heads * c->k_blocks;
    job->call = c;
    job->pairs = PAIRS && c->type == BFLOAT16;
    for (int64_t j = 0; j < c->k_blocks; j++) padded += rounded(key_block_size(c, j), LANES);
    job->keys = padded;
    job->units = job->pairs ? c->width / 2 : c->width;
    job->padded_width = rounded(c->width, LANES);
    job->rows = rounded(c->block, TILE_ROWS);
    job->k_size = padded * job->units;
    job->v_size = padded * job->padded_width / (job->pairs ? 2 : 1);
    job->scratch_size = job->rows * (job->units + 2 * job->padded_width + 1 + LANES) + TILE_ROWS * KEYS +
                        (KEYS + 2) * job->padded_width + 7 * 16;
    job->first = take(base, &used, (c->k_blocks + 1) * 4);
    job->seen = take(base, &used, cells * 4);
    job->biased = take(base, &used, cells);
    job->bias = take(base, &used, c->packs * c->heads * padded * 4);
    job->k = take(base, &used, c->packs * c->heads * job->k_size * 4);
    job->v = take(base, &used, c->packs * c->heads * job->v_size * 4);
    job->scratch_size = rounded(job->scratch_size, 16);
    job->scratch = take(base, &used, c->threads * job->scratch_size * 4);
    job->bytes = used;
    if (!base) return;
    job->first[0] = 0;
    for (int64_t j = 0; j < c->k_blocks; j++)
        job->first[j + 1] = job->first[j] + rounded(key_block_size(c, j), LANES);
}

static Scratch scratch_of(const Job *job, int64_t thread) {
    int64_t used = 0;
    char *base = (char *)(job->scratch + thread * job->scratch_size);
    Scratch s;
    s.q = take(base, &used, job->rows * job->units * 4);
    s.sums = take(base, &used, job->rows * job->padded_width * 4);
    s.kept = take(base, &used, job->rows * job->padded_width * 4);
    s.top = take(base, &used, job->rows * 4);
    s.total = take(base, &used, job->rows * LANES * 4);
    s.scores = take(base, &used, TILE_ROWS * KEYS * 4);
    s.row = take(base, &used, (KEYS + 2) * job->padded_width * 4);
    return s;
}

/* ---------------------------------------------------------------- packing */

/* Powers of two added to the scores of one key block, -inf where a key is not seen; says how many keys are. */
static void pack_bias(Job *job, int64_t pack, int64_t head, int64_t j) {
    const Call *c = job->call;
    int64_t cell = (pack * c->heads + head) * c->k_blocks + j, start = c->k_starts[j], size = key_block_size(c, j);
    int64_t padded = rounded(size, LANES), end = c->valid ? c->valid[pack] - start : size;
    float *bias = job->bias + (pack * c->heads + head) * job->keys + job->first[j];
    int32_t seen = 0;
    uint8_t biased = size % LANES != 0;
    for (int64_t i = 0; i < padded; i++) {
        float x = i < size && i < end ? 0.0f : -INFINITY;
        if (x == 0 && c->bias)
            x = LOG2E * c->bias[pack * c->bias_stride[BATCH] + head * c->bias_stride[HEAD] + (start + i) * c->bias_stride[TOKEN]];
        bias[i] = x;
        if (x != -INFINITY) seen = i + 1;
        if (x != 0) biased = 1;
    }
    job->seen[cell] = seen;
    job->biased[cell] = biased;
}

/* `width` rows of units -> [units][width], in whole vectors. */
static void transpose(const float *from, int64_t stride, int64_t units, int64_t width, float *to) {
    for (int64_t u = 0; u < units; u++)
        for (int64_t i = 0; i < width; i += LANES)
            v_store(to + u * width + i, v_gather(from + i * stride + u, stride));
}

/* One row of K or V as units or floats; zeros for a key that is not seen, whatever it holds. */
static void load_key(const Job *job, const void *from, int seen, int raw, float *to) {
    int64_t width = job->call->width;
    if (!seen)
        memset(to, 0, width * (raw ? 2 : 4));
    else if (raw)
        memcpy(to, from, width * 2);
    else
        load_row(from, job->call->type, width, to);
}

static void pack_keys(Job *job, int64_t pack, int64_t head, int64_t j, float *row) {
    const Call *c = job->call;
    int64_t padded = job->first[j + 1] - job->first[j], panel = TILE_VECTORS * LANES;
    const float *bias = job->bias + (pack * c->heads + head) * job->keys + job->first[j];
    float *to = job->k + (pack * c->heads + head) * job->k_size + job->first[j] * job->units;
    const char *k = (const char *)c->k + place(c->k_stride, pack, c->k_starts[j], head) * bytes_of(c->type);
    int64_t step = c->k_stride[TOKEN] * bytes_of(c->type);
    for (int64_t start = 0; start < padded; start += panel) {
        int64_t width = padded - start < panel ? padded - start : panel;
        for (int64_t i = 0; i < width; i++)
            load_key(job, k + (start + i) * step, bias[start + i] != -INFINITY, job->pairs, row + i * job->units);
        transpose(row, job->units, job->units, width, to + start * job->units);
    }
}

static void pack_values(Job *job, int64_t pack, int64_t head, int64_t j, float *row) {
    const Call *c = job->call;
    int64_t padded = job->first[j + 1] - job->first[j], width = job->padded_width;
    const float *bias = job->bias + (pack * c->heads + head) * job->keys + job->first[j];
    const char *v = (const char *)c->v + place(c->v_stride, pack, c->k_starts[j], head) * bytes_of(c->type);
    int64_t step = c->v_stride[TOKEN] * bytes_of(c->type);
    float *to = job->v + (pack * c->heads + head) * job->v_size + job->first[j] * width / (job->pairs ? 2 : 1);
    if (!job->pairs) {
        for (int64_t i = 0; i < padded; i++, to += width) {
            load_key(job, v + i * step, bias[i] != -INFINITY, 0, to);
            memset(to + c->width, 0, (width - c->width) * 4);
        }
        return;
    }
    memset(row, 0, width * 2 * 4);
    for (int64_t i = 0; i < padded; i += 2, to += width) {
        const uint16_t *even = (const uint16_t *)row, *odd = (const uint16_t *)(row + width);
        load_key(job, v + i * step, bias[i] != -INFINITY, 1, row);
        load_key(job, v + (i + 1) * step, bias[i + 1] != -INFINITY, 1, row + width);
        for (int64_t d = 0; d < width; d++) to[d] = float_of(even[d] | (uint32_t)odd[d] << 16);
    }
}

static int attends(const Call *c, int64_t head) { return c->kind[head] != COPY && c->kind[head] != SKIP; }

static void pack_all(Job *job, float *row) {
    const Call *c = job->call;
    for (;;) {
        long task = atomic_fetch_add(&job->packed, 1);
        int64_t j = task % c->k_blocks, head = task / c->k_blocks % c->heads, pack = task / c->k_blocks / c->heads;
        if (pack >= c->packs) return;
        if (!attends(c, head)) continue;
        pack_bias(job, pack, head, j);
        pack_keys(job, pack, head, j, row);
        pack_values(job, pack, head, j, row);
    }
}

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

/* ---------------------------------------------------------------- one item */

typedef struct { int64_t batch, head, kind, slot, start, rows; } Item;

static void start(const Job *job, const Scratch *s, Item item) {
    const Call *c = job->call;
    const char *q = (const char *)c->q + place(c->q_stride, item.batch, item.start, item.head) * bytes_of(c->type);
    memset(s->q, 0, job->rows * job->units * 4);
    for (int64_t r = 0; r < item.rows; r++, q += c->q_stride[TOKEN] * bytes_of(c->type)) {
        if (job->pairs)
            memcpy(s->q + r * job->units, q, c->width * 2);
        else
            load_row(q, c->type, c->width, s->q + r * job->units);
    }
    memset(s->sums, 0, job->rows * job->padded_width * 4);
    memset(s->total, 0, job->rows * LANES * 4);
    for (int64_t r = 0; r < job->rows; r++) s->top[r] = FLOOR;
}

static void walk(const Job *job, const Scratch *s, Item item, int64_t from, int64_t to) {
    const Call *c = job->call;
    int64_t pack = c->packs == 1 ? 0 : item.batch, head = pack * c->heads + item.head;
    for (int64_t at = from; at < to; at++) {
        int64_t j = c->indices[at], cell = head * c->k_blocks + j, first = job->first[j];
        for (int64_t key = 0; key < job->seen[cell]; key += KEYS) {
            int64_t left = job->seen[cell] - key, place = first + key;
            Keys keys = {job->k + head * job->k_size + place * job->units,
                         job->v + head * job->v_size + place * job->padded_width / (job->pairs ? 2 : 1),
                         job->biased[cell] ? job->bias + head * job->keys + place : NULL,
                         rounded(left < KEYS ? left : KEYS, LANES) / LANES, job->first[j + 1] - place};
            (job->pairs ? attend_pairs : attend_floats)(job, s, keys, item.rows);
        }
    }
}

/* What row r amounts to so far; its natural LSE, -inf where it saw no key. */
static double result(const Job *job, const Scratch *s, int64_t r, float *row) {
    float total = v_sum(v_load(s->total + r * LANES));
    float inverse = total == 0 ? 0 : 1 / total;
    for (int64_t d = 0; d < job->padded_width; d++) row[d] = s->sums[r * job->padded_width + d] * inverse;
    return total == 0 ? -INFINITY : (s->top[r] + log2(total)) * LN2;
}

/* row = (row, lse) merged with (other, other_lse), as merge.py does. */
static double merge(int64_t width, float *row, double lse, const float *other, double other_lse) {
    double top = lse > other_lse ? lse : other_lse;
    if (top == -INFINITY) top = 0;
    double sum = log(exp(lse - top) + exp(other_lse - top)) + top, shift = sum == -INFINITY ? 0 : sum;
    float mine = exp(lse - shift), others = exp(other_lse - shift);
    for (int64_t d = 0; d < width; d++) row[d] = row[d] * mine + other[d] * others;
    return sum;
}

static char *cached_row(const Call *c, Item item, int64_t r) {
    return (char *)c->cached +
           place(c->cached_stride, item.batch, item.start + r, item.slot) * bytes_of(c->cached_type);
}

static float *cached_lse(const Call *c, Item item, int64_t r) {
    return c->cached_lse + place(c->cached_lse_stride, item.batch, item.start + r, item.slot);
}

static void finish(const Job *job, const Scratch *s, Item item, int64_t r) {
    const Call *c = job->call;
    float *row = s->row, *other = s->row + job->padded_width, *kept = s->kept + r * job->padded_width;
    double lse = item.kind == COPY ? -INFINITY : result(job, s, r, row);
    if (item.kind == COPY) load_row(cached_row(c, item, r), c->cached_type, c->width, row);
    if (item.kind == ADD || item.kind == MERGE) load_row(cached_row(c, item, r), c->cached_type, c->width, other);
    if (item.kind == ADD)
        for (int64_t d = 0; d < c->width; d++) row[d] += other[d];
    if (item.kind == MERGE) lse = merge(c->width, row, lse, other, *cached_lse(c, item, r));
    if (item.kind == EMIT_RESIDUAL) {
        for (int64_t d = 0; d < c->width; d++) other[d] = row[d] - kept[d];
        store_row(other, c->cached_type, c->width, cached_row(c, item, r));
    }
    store_row(row, c->out_type, c->width,
              (char *)c->out + place(c->out_stride, item.batch, item.start + r, item.head) * bytes_of(c->out_type));
    c->lse[place(c->lse_stride, item.batch, item.start + r, item.head)] = lse;
}

static void run_item(const Job *job, const Scratch *s, int64_t number) {
    const Call *c = job->call;
    const int32_t *work = c->work + 2 * (number / c->batch);
    int64_t head = work[0], i = work[1], list = c->pattern[head] * c->q_blocks + i;
    int64_t near = c->pointers[list], rest = c->split[list], end = c->pointers[list + 1];
    Item item = {number % c->batch, head, c->kind[head], c->slot[head], c->q_starts[i], c->q_starts[i + 1] - c->q_starts[i]};
    if (item.kind != COPY) {
        start(job, s, item);
        if (item.kind == EMIT_TAIL) { /* the tail first: what it leaves behind is then gone on with */
            walk(job, s, item, rest, end);
            for (int64_t r = 0; r < item.rows; r++) {
                *cached_lse(c, item, r) = result(job, s, r, s->row);
                store_row(s->row, c->cached_type, c->width, cached_row(c, item, r));
            }
        }
        walk(job, s, item, near, rest);
        if (item.kind == EMIT_RESIDUAL) {
            for (int64_t r = 0; r < item.rows; r++) result(job, s, r, s->kept + r * job->padded_width);
            walk(job, s, item, rest, end);
        }
    }
    for (int64_t r = 0; r < item.rows; r++) finish(job, s, item, r);
}

/* ---------------------------------------------------------------- threads */

/* Everything is packed before anything is attended. Waiting threads sleep. */
static void wait_for_all(Job *job) {
    pthread_mutex_lock(&job->lock);
    job->waiting--;
    if (job->waiting == 0) pthread_cond_broadcast(&job->all_here);
    while (job->waiting > 0) pthread_cond_wait(&job->all_here, &job->lock);
    pthread_mutex_unlock(&job->lock);
}

typedef struct { Job *job; int64_t number; } Worker;

static void *work(void *given) {
    Worker *worker = given;
    Job *job = worker->job;
    Scratch s = scratch_of(job, worker->number);
    int64_t items = job->call->items * job->call->batch;
    pack_all(job, s.row);
    wait_for_all(job);
    for (int64_t n; (n = atomic_fetch_add(&job->taken, 1)) < items;) run_item(job, &s, n);
    return NULL;
}

#define MOST_THREADS 256

int64_t block_attention_workspace(const Call *c) {
    Job job;
    lay_out(&job, c, NULL);
    return job.bytes;
}

/* Threads live for one call, so that none spins or is left over in a fork; one takes about 20 us to start. */
void block_attention(const Call *c) {
    Job job = {.lock = PTHREAD_MUTEX_INITIALIZER, .all_here = PTHREAD_COND_INITIALIZER};
    pthread_t threads[MOST_THREADS];
    Worker workers[MOST_THREADS];
    int64_t started = 1, wanted = c->threads < MOST_THREADS ? c->threads : MOST_THREADS;
    lay_out(&job, c, c->workspace);
    job.waiting = wanted;
    for (; started < wanted; started++) {
        workers[started] = (Worker){&job, started};
        if (pthread_create(&threads[started], NULL, work, &workers[started])) break;
    }
    pthread_mutex_lock(&job.lock);
    job.waiting -= wanted - started; /* those that could not be started */
    pthread_mutex_unlock(&job.lock);
    workers[0] = (Worker){&job, 0};
    work(&workers[0]);
    for (int64_t i = 1; i < started; i++) pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&job.lock);
    pthread_cond_destroy(&job.all_here);
}

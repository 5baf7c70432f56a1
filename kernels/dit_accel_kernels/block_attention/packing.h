/* What a call of block_attention is given, how its workspace is laid out, and K and V packed into it. */
#ifndef DIT_ACCEL_PACKING_H
#define DIT_ACCEL_PACKING_H

#include <math.h>
#include <stdatomic.h>

#include "../rows.h"

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
    atomic_long packed, taken, numbers; /* the next block to pack, item to attend, and thread's scratch */
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
            x = LOG2E * c->bias[place(c->bias_stride, pack, start + i, head)];
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

#endif

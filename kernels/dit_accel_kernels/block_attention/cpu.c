/* block_attention on a CPU, in plain C: no headers of torch, one function, called through ctypes.

K and V of the heads that attend are packed once: keys of a block in panels as wide as a tile of sums, V in rows
padded to whole vectors, both zero where a key is not seen. Items (head, query block) are taken longest first from
a shared counter. For each 64 keys and 6 rows of queries, scores, online softmax and weighted sum happen in the
first-level cache. Softmax runs in powers of two; the LSE that leaves is natural.

With AVX512-BF16 and bfloat16 inputs, both products take pairs of bfloat16 numbers: neighbours in D for the scores,
neighbouring keys for the sums. A "unit" is 32 bits of such a product's inputs: one float, or one such pair.

Sources: online softmax as in flash attention (arXiv:2205.14135); tail and residual as in `__init__.py`. */

#define _GNU_SOURCE /* threads.h */
#include "../threads.h"
#include "tiles.h"

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
    int64_t first = c->q_starts[i], rows = c->q_starts[i + 1] - first;
    Item item = {number % c->batch, head, c->kind[head], c->slot[head], first, rows};
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

static void pack_part(void *given) {
    Job *job = given;
    pack_all(job, scratch_of(job, atomic_fetch_add(&job->numbers, 1)).row);
}

static void attend_part(void *given) {
    Job *job = given;
    Scratch s = scratch_of(job, atomic_fetch_add(&job->numbers, 1));
    int64_t items = job->call->items * job->call->batch;
    for (int64_t n; (n = atomic_fetch_add(&job->taken, 1)) < items;) run_item(job, &s, n);
}

static void together(Job *job, void (*part)(void *)) {
    atomic_store(&job->numbers, 0);
    on_threads(job, part, job->call->threads);
}

int64_t block_attention_workspace(const Call *c) {
    Job job;
    lay_out(&job, c, NULL);
    return job.bytes;
}

void block_attention(const Call *c) {
    Job job = {0};
    lay_out(&job, c, c->workspace);
    together(&job, pack_part); /* everything is packed before anything is attended */
    together(&job, attend_part);
}

/* history_mix on a CPU, in plain C: one pass over memory, rounded once.

A row is taken PIECE numbers at a time, so that its sum stays in the first-level cache while each operand is read
once; threads take shares of consecutive pieces. All that is read of a piece is read before it is written, so `out` may be one
of the operands, element for element. */

#define _GNU_SOURCE /* threads.h */
#include <stdatomic.h>

#include "../rows.h"
#include "../threads.h"

#define AXES 3     /* of rows: layout.py merges what can be merged */
#define MOST 8     /* entries of a history */
#define PIECE 1024 /* floats: three buffers of 4 KB */
#define SHARES 4   /* of a thread: one that is held up leaves the rest to the others */

typedef struct { /* cpu.py has the same fields in the same order */
    void *data;  /* NULL where it is left out */
    int64_t stride[AXES], type; /* in elements, of rows; of a row's own elements it is 1 */
} Operand;

typedef struct {
    Operand out, x, gate, y[MOST], scale[MOST];
    int64_t size[AXES], width, count, threads; /* count: of ys */
    float weight[MOST];
} Call;

typedef struct { const Call *call; int64_t shares; atomic_long taken; } Job;

static char *at(const Operand *o, const int64_t *row, int64_t column) {
    int64_t place = column;
    for (int i = 0; i < AXES; i++) place += row[i] * o->stride[i];
    return (char *)o->data + place * bytes_of(o->type);
}

/* A piece as floats: where it lies if it is that already, else in `buffer`. */
static const float *floats(const Operand *o, const int64_t *row, int64_t column, int64_t n, float *buffer) {
    const char *from = at(o, row, column);
    if (o->type == FLOAT32) return (const float *)from;
    load_row(from, o->type, n, buffer);
    return buffer;
}

/* to = keep to + v a + w b, where b may be NULL. What starts does not add to 0: that loses the sign of a zero. */
static void weigh(float *restrict to, int keep, float v, const float *a, float w, const float *b, int64_t n) {
    if (keep && b)
        for (int64_t i = 0; i < n; i++) to[i] += v * a[i] + w * b[i];
    else if (keep)
        for (int64_t i = 0; i < n; i++) to[i] += v * a[i];
    else if (b)
        for (int64_t i = 0; i < n; i++) to[i] = v * a[i] + w * b[i];
    else
        for (int64_t i = 0; i < n; i++) to[i] = v * a[i];
}

/* to = x + gate sum, where x and gate may be NULL and `to` may be x. */
static void finish(float *to, const float *restrict sum, const float *gate, const float *x, int64_t n) {
    if (gate && x) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) to[i] = x[i] + gate[i] * sum[i];
    } else if (x) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) to[i] = x[i] + sum[i];
    } else if (gate) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) to[i] = gate[i] * sum[i];
    } else if (to != sum)
        memcpy(to, sum, n * sizeof *to);
}

static float weight(const Call *c, int64_t j, const int64_t *row) {
    return c->scale[j].data ? c->weight[j] * *(const float *)at(&c->scale[j], row, 0) : c->weight[j];
}

static void mix(const Call *c, const int64_t *row, int64_t column, int64_t n) {
    float sum[PIECE], one[PIECE], two[PIECE];
    for (int64_t j = 0; j < c->count; j += 2) {
        int both = j + 1 < c->count;
        const float *a = floats(&c->y[j], row, column, n, one);
        const float *b = both ? floats(&c->y[j + 1], row, column, n, two) : NULL;
        weigh(sum, j > 0, weight(c, j, row), a, both ? weight(c, j + 1, row) : 0, b, n);
    }
    const float *gate = c->gate.data ? floats(&c->gate, row, column, n, one) : NULL;
    const float *x = c->x.data ? floats(&c->x, row, column, n, two) : NULL;
    char *out = at(&c->out, row, column);
    float *to = c->out.type == FLOAT32 ? (float *)out : sum;
    finish(to, sum, gate, x, n);
    if (to == sum) store_row(sum, c->out.type, n, out);
}

/* Until every share is taken: a team may have fewer threads than it was asked for. */
static void part(void *given) {
    Job *job = given;
    const Call *c = job->call;
    int64_t pieces = (c->width + PIECE - 1) / PIECE, all = c->size[0] * c->size[1] * c->size[2] * pieces;
    for (int64_t share; (share = atomic_fetch_add(&job->taken, 1)) < job->shares;) {
        for (int64_t n = all * share / job->shares; n < all * (share + 1) / job->shares; n++) {
            int64_t r = n / pieces, column = n % pieces * PIECE, left = c->width - column;
            int64_t row[AXES] = {r / (c->size[1] * c->size[2]), r / c->size[2] % c->size[1], r % c->size[2]};
            mix(c, row, column, left < PIECE ? left : PIECE);
        }
    }
}

void history_mix(const Call *c) {
    Job job = {.call = c, .shares = c->threads == 1 ? 1 : c->threads * SHARES};
    on_threads(&job, part, c->threads);
}

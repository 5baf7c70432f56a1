"""The Triton source of block_attention: one program computes one (sample, head, query block) of a plan.

What Triton 3.6 and 3.9 both compile, and the interpreter of both runs: arithmetic in float32 and int32 only
(16-bit types are loaded, stored and multiplied as matrices), no block pointers, no inline assembly.
Online softmax in base 2 (log2 e is folded into the scale), as in arXiv:2205.14135; the kinds are `plan.Kind`.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MINUS_INF = tl.constexpr(float("-inf"))

# plan.Kind: a kernel reads no enum of its host
COPY = tl.constexpr(1)
ADD = tl.constexpr(3)
MERGE = tl.constexpr(4)
EMIT_RESIDUAL = tl.constexpr(5)
EMIT_TAIL = tl.constexpr(6)


# Sizes that change from call to call would otherwise compile anew where they are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_q_blocks", "num_keys", "batch"])
def attend_blocks(
    Q,  # [B, Nq, H, D]
    K,  # [B or 1, Nk, H, D]: a pointer, or with DESCRIPTORS a descriptor of [1, BLOCK_N, 1, PADDED] boxes
    V,  # likewise
    OUT,  # [B, Nq, H, D]
    LSE,  # [B, Nq, H] float32
    CACHED,  # [B, Nq, slots, D] or None
    CACHED_LSE,  # [B, Nq, slots] or None
    KEY_BIAS,  # [B or 1, H or 1, Nk] or None; strides of 0 broadcast
    VALID_KEYS,  # [B] or None
    Q_STARTS,
    K_STARTS,
    PATTERN,
    KIND,
    SLOT,
    POINTERS,
    SPLIT,
    INDICES,
    WORK,
    num_q_blocks,
    num_keys,
    batch,
    scale,
    q_b,
    q_n,
    q_h,
    k_b,  # 0 where one batch of keys serves all samples
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    out_b,
    out_n,
    out_h,
    lse_b,
    lse_n,
    lse_h,
    cached_b,
    cached_n,
    cached_s,
    tail_b,
    tail_n,
    tail_s,
    bias_b,
    bias_h,
    bias_n,
    D: tl.constexpr,
    PADDED: tl.constexpr,  # D rounded up to a power of two
    BLOCK_M: tl.constexpr,  # rows of a program: a block of queries
    BLOCK_N: tl.constexpr,  # keys in flight
    TILES: tl.constexpr,  # steps of BLOCK_N in a block of keys
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the matrix products: that of q; float32 in the interpreter
):
    item = tl.program_id(0) // batch  # the items are sorted, so all samples of the longest one start first
    sample = (tl.program_id(0) % batch).to(tl.int64)  # 64 bits: offsets within a batch go beyond 2^31
    head = tl.load(WORK + 2 * item)
    q_block = tl.load(WORK + 2 * item + 1)
    kind = tl.load(KIND + head)
    slot = tl.load(SLOT + head).to(tl.int64)
    q_start = tl.load(Q_STARTS + q_block).to(tl.int64)
    num_rows = (tl.load(Q_STARTS + q_block + 1) - q_start).to(tl.int32)
    rows = tl.arange(0, BLOCK_M)
    width = tl.arange(0, PADDED)
    here = rows < num_rows
    inside = _inside(here, width, D, PADDED)

    head_64 = head.to(tl.int64)
    q_base = Q + sample * q_b + q_start * q_n + head_64 * q_h
    # a copied head attends nothing: its query is not even read
    asks = _inside(rows < tl.where(kind == COPY, 0, num_rows), width, D, PADDED)
    q = tl.load(q_base + rows[:, None] * q_n + width[None, :], mask=asks, other=0.0)
    q = q.to(DOT)
    valid = num_keys
    if VALID_KEYS is not None:
        valid = tl.minimum(num_keys, tl.load(VALID_KEYS + sample).to(tl.int32))

    row = tl.load(PATTERN + head) * num_q_blocks + q_block
    first = tl.load(POINTERS + row)
    split = tl.load(SPLIT + row)
    last = tl.load(POINTERS + row + 1)
    emits = (kind == EMIT_RESIDUAL) | (kind == EMIT_TAIL)
    split = tl.where(kind == COPY, first, split)  # out = 0 + cached: an ADD with an empty list

    out_base = OUT + sample * out_b + q_start * out_n + head_64 * out_h
    top = tl.full([BLOCK_M], MINUS_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    # The tail is what stands alone, so it is walked first there; elsewhere the near list is. Two walks one
    # after the other: in a loop over both, what lies between them would hold registers all the time.
    rest_first = kind == EMIT_TAIL
    one_lo = tl.where(rest_first, split, first)
    one_hi = tl.where(rest_first, last, split)
    two_lo = tl.where(rest_first, first, split)
    two_hi = tl.where(emits, tl.where(rest_first, split, last), two_lo)
    # fmt: off
    top, total, acc = _walk(
        top, total, acc, one_lo, one_hi,
        q, K, V, KEY_BIAS, K_STARTS, INDICES, sample, head, valid, scale,
        k_b, k_n, k_h, v_b, v_n, v_h, bias_b, bias_h, bias_n,
        D, PADDED, BLOCK_N, TILES, DESCRIPTORS, STAGES, DOT,
    )
    # fmt: on
    # What the first walk found alone waits in `cached`, and what that rounds away in `out`, which nobody has
    # written yet: kept in registers through the second walk it would not fit at a width of 128.
    first_lse = tl.full([BLOCK_M], MINUS_INF, tl.float32)
    if CACHED is not None:  # noqa: SIM102  (this is known when compiling, the rest is not)
        if emits:
            cached_base = CACHED + sample * cached_b + q_start * cached_n + slot * cached_s
            cacheds = cached_base + rows[:, None] * cached_n + width[None, :]
            outs = out_base + rows[:, None] * out_n + width[None, :]
            alone = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            high = alone.to(CACHED.dtype.element_ty)
            tl.store(cacheds, high, mask=inside)
            tl.store(outs, (alone - high.to(tl.float32)).to(OUT.dtype.element_ty), mask=inside)
            first_lse = _log_sum(top, total)
            if CACHED_LSE is not None:
                tail_base = CACHED_LSE + sample * tail_b + q_start * tail_n + slot * tail_s
                keeps = rows < tl.where(kind == EMIT_TAIL, num_rows, 0)
                tl.store(tail_base + rows * tail_n, first_lse * LN2, mask=keeps)
            top = tl.full([BLOCK_M], MINUS_INF, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
            tl.debug_barrier()  # other threads of this program may read what this one has written

    # fmt: off
    top, total, acc = _walk(
        top, total, acc, two_lo, two_hi,
        q, K, V, KEY_BIAS, K_STARTS, INDICES, sample, head, valid, scale,
        k_b, k_n, k_h, v_b, v_n, v_h, bias_b, bias_h, bias_n,
        D, PADDED, BLOCK_N, TILES, DESCRIPTORS, STAGES, DOT,
    )
    # fmt: on

    lse = _log_sum(top, total)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    outs = out_base + rows[:, None] * out_n + width[None, :]
    theirs = tl.zeros([BLOCK_M], tl.float32)
    merges = (kind == MERGE) | emits
    if CACHED is not None:
        other_lse = first_lse
        if CACHED_LSE is not None:
            tail_base = CACHED_LSE + sample * tail_b + q_start * tail_n + slot * tail_s
            tails = rows < tl.where(kind == MERGE, num_rows, 0)
            tail = tl.load(tail_base + rows * tail_n, mask=tails, other=MINUS_INF).to(tl.float32)
            other_lse = tl.where(kind == MERGE, tail * LOG2E, first_lse)
        ours, theirs, both = _merge_weights(lse, other_lse)
        lse = tl.where(merges, both, lse)
        share *= tl.where(merges, ours, 1.0)
        theirs = tl.where(merges, theirs, 1.0)
    lse_base = LSE + sample * lse_b + q_start * lse_n + head_64 * lse_h
    tl.store(lse_base + rows * lse_n, lse * LN2, mask=here)

    result = acc * share[:, None]
    if CACHED is not None:
        cached_base = CACHED + sample * cached_b + q_start * cached_n + slot * cached_s
        cacheds = cached_base + rows[:, None] * cached_n + width[None, :]
        reads = (kind == COPY) | (kind == ADD) | merges
        wants = _inside(rows < tl.where(reads, num_rows, 0), width, D, PADDED)
        waits = _inside(rows < tl.where(emits, num_rows, 0), width, D, PADDED)
        cached = tl.load(cacheds, mask=wants, other=0.0).to(tl.float32)
        cached += tl.load(outs, mask=waits, other=0.0).to(tl.float32)
        tl.debug_barrier()  # all have read before any writes
        result += cached * theirs[:, None]
        keeps = _inside(rows < tl.where(kind == EMIT_RESIDUAL, num_rows, 0), width, D, PADDED)
        tl.store(cacheds, (result - cached).to(CACHED.dtype.element_ty), mask=keeps)
    tl.store(outs, result.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _walk(
    top,  # [BLOCK_M]: maximum of the scores so far
    total,  # [BLOCK_M]: sum of the weights
    acc,  # [BLOCK_M, PADDED]: weighted sum of the values
    lo,
    hi,  # from where to where in INDICES
    q,
    K,
    V,
    KEY_BIAS,
    K_STARTS,
    INDICES,
    sample,
    head,
    valid,  # keys of this sample
    scale,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    bias_b,
    bias_h,
    bias_n,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attends the key blocks of a list, going on from a running softmax."""
    head_64 = head.to(tl.int64)
    width = tl.arange(0, PADDED)
    for tile in tl.range(lo * TILES, hi * TILES, num_stages=STAGES):
        k_block = tl.load(INDICES + tile // TILES)
        start = tl.load(K_STARTS + k_block) + (tile % TILES) * BLOCK_N
        stop = tl.minimum(tl.load(K_STARTS + k_block + 1), valid)
        columns = tl.arange(0, BLOCK_N)
        seen = start + columns < stop
        bias = tl.where(seen, 0.0, MINUS_INF)
        start_64 = start.to(tl.int64)
        if KEY_BIAS is not None:
            biases = KEY_BIAS + sample * bias_b + head_64 * bias_h + start_64 * bias_n
            bias = tl.load(biases + columns * bias_n, mask=seen, other=MINUS_INF).to(tl.float32) * LOG2E
            seen = bias > MINUS_INF
        if DESCRIPTORS:
            k_sample = sample.to(tl.int32) * (k_b != 0).to(tl.int32)
            k = K.load([k_sample, start, head, 0]).reshape(BLOCK_N, PADDED)
        else:
            k_base = K + sample * k_b + start_64 * k_n + head_64 * k_h
            k_mask = _inside(seen, width, D, PADDED)
            k = tl.load(k_base + columns[:, None] * k_n + width[None, :], mask=k_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee")
        scores = scores * (scale * LOG2E) + bias[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen nothing has a maximum of -inf, and -inf - -inf is NaN: shift it by 0 instead
        shift = tl.where(new_top == MINUS_INF, 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        if DESCRIPTORS:
            v_sample = sample.to(tl.int32) * (v_b != 0).to(tl.int32)
            v = V.load([v_sample, start, head, 0]).reshape(BLOCK_N, PADDED)
        else:
            v_base = V + sample * v_b + start_64 * v_n + head_64 * v_h
            v_mask = _inside(seen, width, D, PADDED)
            v = tl.load(v_base + columns[:, None] * v_n + width[None, :], mask=v_mask, other=0.0)
        acc = tl.dot(weights.to(DOT), v.to(DOT), acc, input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _inside(rows, width, D: tl.constexpr, PADDED: tl.constexpr):
    """The mask of a [rows, PADDED] tile; a width that needs no padding costs nothing."""
    mask = rows[:, None]
    if D != PADDED:
        mask = mask & (width[None, :] < D)
    return mask


@triton.jit
def _log_sum(top, total):
    """log2 of the sum of 2^score; -inf where nothing was seen."""
    empty = total == 0.0
    return tl.where(empty, MINUS_INF, top + tl.log2(tl.where(empty, 1.0, total)))


@triton.jit
def _merge_weights(a, b):
    """Weights of two parts from their log-sums in base 2 and the log-sum of both; zeros for none."""
    top = tl.maximum(a, b)
    shift = tl.where(top == MINUS_INF, 0.0, top)
    weight_a = tl.exp2(a - shift)
    weight_b = tl.exp2(b - shift)
    total = weight_a + weight_b
    divisor = tl.where(total == 0.0, 1.0, total)
    return weight_a / divisor, weight_b / divisor, _log_sum(shift, total)

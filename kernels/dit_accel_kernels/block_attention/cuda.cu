// block_attention for Hopper (sm_90a): TMA feeds shared memory, wgmma multiplies, one persistent block per SM.
//
// One warpgroup produces, two consume. A work item is (sample, head, query block) and comes from an atomic ticket over
// the plan's list, longest first. Each consumer owns 64 of the 128 queries. While the tensor cores compute the scores
// of key block j and the values of block j - 1, the consumer is in the softmax of j: two score tiles in flight
// (arXiv:2407.08608, section 3.2).
// Blocks may be ragged and start at any token: a box always brings 128 rows, and rows that are not of the block, or
// that the sample does not have, may hold anything, NaN too. Their scores become -inf and their rows of V zeros,
// since 0 * NaN is NaN. Softmax runs in base 2.
//
// Built as cuda_builds.py says: HEAD_DIM 64 or 128, KV_STAGES, SHARED_BYTES, and FP16 for fp16 instead of bf16.
#include "arguments.h"
#include "hopper.cuh"

constexpr int D = HEAD_DIM;
constexpr int BLOCK = 128;                          // queries of an item, and keys of a tile
constexpr int CONSUMERS = 2;                        // warpgroups of 64 queries
constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int STAGES = KV_STAGES;                   // of K and of V
constexpr int PRODUCER_REGISTERS = 40;              // 128 * 40 + 256 * 232 = 384 * 168 = all of an SM
constexpr int CONSUMER_REGISTERS = 232;
constexpr int COLUMN_TILES = D / 64;                // a swizzled row holds 64 numbers, so D = 128 takes two tiles
constexpr int TILE_BYTES = BLOCK * SWIZZLE_ROW_BYTES;
constexpr int OPERAND_BYTES = COLUMN_TILES * TILE_BYTES;
constexpr int K_STEP_BYTES = 2 * K_STEP;            // along a row of Q or K
constexpr int SCORES_LEADING_BYTES = 16;            // unused by swizzled K-major operands
constexpr int SCORES_STRIDE_BYTES = SWIZZLE_ATOM_BYTES;   // 8 queries or keys further
constexpr int VALUES_LEADING_BYTES = TILE_BYTES;          // 64 columns of V further
constexpr int VALUES_STRIDE_BYTES = SWIZZLE_ATOM_BYTES;   // 8 keys further
constexpr int VALUES_STEP_BYTES = K_STEP * SWIZZLE_ROW_BYTES;
constexpr int CONSUMER_QUERY_BYTES = 64 * SWIZZLE_ROW_BYTES;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

enum Kind { ATTEND, COPY, SKIP, ADD, MERGE, EMIT_RESIDUAL, EMIT_TAIL };  // plan.Kind

// Lies in shared memory: registers are what D = 128 is short of. `first` to `middle` is the near list, from there to
// `end` the rest, empty but for emitting heads.
struct Item {
  int batch, head, block, kind, first, middle, end, ended;
  __device__ __forceinline__ bool emits() const { return kind == EMIT_RESIDUAL || kind == EMIT_TAIL; }
  __device__ __forceinline__ void read(const Arguments& a, int ticket) {
    int row = ticket / a.batch;  // samples side by side: the longest items of all samples come first
    batch = ticket - row * a.batch;
    head = __ldg(a.work + 2 * row);
    block = __ldg(a.work + 2 * row + 1);
    kind = __ldg(a.kind + head);
    int list = __ldg(a.pattern + head) * a.q_blocks + block;
    first = __ldg(a.pointers + list);
    middle = kind == COPY ? first : __ldg(a.split + list);
    end = emits() ? __ldg(a.pointers + list + 1) : middle;
    ended = 0;
  }
};

struct Shared {
  unsigned char q[OPERAND_BYTES];
  unsigned char k[STAGES][OPERAND_BYTES];
  unsigned char v[STAGES][OPERAND_BYTES];
  float near[CONSUMERS][D / 2][128];   // emitting heads: the near part, each thread its own column
  float bias[CONSUMERS][2][BLOCK];     // what is added to the scores, base 2; two, so that one barrier is enough
  int2 keys[STAGES];                   // first token and number of keys seen in the K tile of a stage
  Item item;                           // goes with Q
  u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], q_full, q_empty;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cuda_builds.py says what a launch asks for");
static_assert(sizeof(Shared) <= 227 * 1024, "an SM of compute capability 9.0 gives a block 227 KiB");

__device__ __forceinline__ void load_operand(unsigned char* to, const TensorMap& map, u64* full, int token, int head,
                                             int batch) {
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) tma_load(to + c * TILE_BYTES, &map, full, c * 64, token, head, batch);
}

__device__ __forceinline__ void produce(Shared& s, const Arguments& a, const TensorMap& q, const TensorMap& k,
                                        const TensorMap& v) {
  int stage = 0;
  u32 parity = 1, q_parity = 1;  // a barrier that nobody has used yet passes a wait for parity 1
  int total = a.batch * a.items;
  for (int ticket = blockIdx.x; ticket < total; q_parity ^= 1) {
    int next = gridDim.x + atomicAdd(a.ticket, 1);  // asked for early: the answer takes a while
    Item item;
    item.read(a, ticket);
    barrier_wait(&s.q_empty, q_parity);
    s.item = item;
    if (item.first == item.end) {
      barrier_arrive(&s.q_full);
    } else {
      barrier_expect(&s.q_full, OPERAND_BYTES);
      load_operand(s.q, q, &s.q_full, __ldg(a.q_starts + item.block), item.head, item.batch);
    }
    int seen = a.valid_keys ? __ldg(a.valid_keys + item.batch) : 0x7fffffff;
    int kv_batch = a.kv_batch == 1 ? 0 : item.batch;
    for (int j = item.first; j < item.end; j++) {
      int block = __ldg(a.indices + j);
      int start = __ldg(a.k_starts + block), stop = min(__ldg(a.k_starts + block + 1), seen);
      barrier_wait(&s.k_empty[stage], parity);
      s.keys[stage] = make_int2(start, max(stop - start, 0));
      barrier_expect(&s.k_full[stage], OPERAND_BYTES);
      load_operand(s.k[stage], k, &s.k_full[stage], start, item.head, kv_batch);
      barrier_wait(&s.v_empty[stage], parity);
      barrier_expect(&s.v_full[stage], OPERAND_BYTES);
      load_operand(s.v[stage], v, &s.v_full[stage], start, item.head, kv_batch);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    ticket = next;
  }
  barrier_wait(&s.q_empty, q_parity);
  s.item.ended = 1;
  barrier_arrive(&s.q_full);
}

// One warp says that it has read a stage; the barrier counts the warps of all consumers.
__device__ __forceinline__ void release(u64* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// A place in the ring of stages.
struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// One consumer thread's share: rows `row` and `row + 8` of the item, columns 8 i + 2 (lane % 4) + {0, 1}; element
// (half, i, odd) of a tile is number 4 i + 2 half + odd (hopper_model.accumulator_place).
struct Consumer {
  Shared& s;
  const Arguments& a;
  int number, thread, bias_parity;
  float scale2;                      // scale in base 2
  float o[D / 2], scores[64], top[2], total[2];
  u32 weights[32];
  // of the newest K tile
  bool masked, hidden;               // hidden: the row of V with this thread's number is not seen

  __device__ __forceinline__ Consumer(Shared& s, const Arguments& a, int number, int bias_parity)
      : s(s), a(a), number(number), thread(threadIdx.x % 128), bias_parity(bias_parity) {
    scale2 = a.scale * LOG2_E;
  }

  __device__ __forceinline__ void start_scores(const Ring& ring) {
    u64 q = matrix_descriptor(shared_address(s.q) + number * CONSUMER_QUERY_BYTES, SCORES_LEADING_BYTES,
                              SCORES_STRIDE_BYTES);
    u64 k = matrix_descriptor(shared_address(s.k[ring.stage]), SCORES_LEADING_BYTES, SCORES_STRIDE_BYTES);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / K_STEP; step++) {
      int at = step / 4 * TILE_BYTES + step % 4 * K_STEP_BYTES;
      wgmma_scores(scores, q + at / 16, k + at / 16, step > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void start_values(const Ring& ring) {
    u64 v = matrix_descriptor(shared_address(s.v[ring.stage]), VALUES_LEADING_BYTES, VALUES_STRIDE_BYTES);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK / K_STEP; step++)
      wgmma_values(o, weights + 4 * step, v + step * VALUES_STEP_BYTES / 16);
    wgmma_commit();
  }

  // What is to be added to the scores of this K tile, one key a thread; runs under the tensor cores.
  __device__ __forceinline__ void prepare_bias(const Ring& ring) {
    int2 keys = s.keys[ring.stage];
    masked = keys.y < BLOCK || a.key_bias || !(a.scale > 0);  // the plain path needs scores that rise with q . k
    hidden = false;
    if (!masked) return;
    float bias = thread < keys.y ? 0.0f : -infinity();
    if (a.key_bias && thread < keys.y)
      bias = LOG2_E * __ldg(a.key_bias + s.item.batch * a.bias_stride[0] + s.item.head * a.bias_stride[1] +
                            (keys.x + thread) * a.bias_stride[2]);
    hidden = bias == -infinity();
    bias_parity ^= 1;
    s.bias[number][bias_parity][thread] = bias;
    warpgroup_sync(1 + number);
  }

  // Scores in base 2 with their bias. An unseen score may be NaN, and fminf takes the other side of a NaN. Written as
  // a selection this keeps a second copy of the scores alive, and D = 128 spills.
  __device__ __forceinline__ void add_bias() {
    const float* bias = s.bias[number][bias_parity] + thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      float2 b = *(const float2*)(bias + i * 2);
      float2 most = make_float2(b.x == -infinity() ? b.x : infinity(), b.y == -infinity() ? b.y : infinity());
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        scores[i + half] = fminf(fmaf(scores[i + half], scale2, b.x), most.x);
        scores[i + half + 1] = fminf(fmaf(scores[i + half + 1], scale2, b.y), most.y);
      }
    }
  }

  // Zeros for unseen rows of V. Both consumers write the same zeros, so neither waits for the other.
  __device__ __forceinline__ void hide_values(const Ring& ring, bool hide) {
    if (hide) {
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++) {
        uint4* row = (uint4*)(s.v[ring.stage] + c * TILE_BYTES + thread * SWIZZLE_ROW_BYTES);
#pragma unroll 1
        for (int i = 0; i < SWIZZLE_ROW_BYTES / 16; i++) row[i] = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_proxy();
    warpgroup_sync(1 + number);
  }

  // Scores to weights, in place; `decay` is what the sums so far are worth under the new maximum.
  __device__ __forceinline__ void softmax(float (&decay)[2]) {
    if (masked) add_bias();
    float factor = masked ? 1.0f : scale2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float best = -infinity(), sum = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < 64; i += 4) best = fmaxf(best, fmaxf(scores[i], scores[i + 1]));
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
      best = fmaxf(top[half], best * factor);
      float shift = best == -infinity() ? 0.0f : best;  // -inf - -inf is NaN
      decay[half] = exp2_fast(top[half] - shift);
      top[half] = best;
#pragma unroll
      for (int i = 2 * half; i < 64; i += 4) {
        scores[i] = exp2_fast(fmaf(scores[i], factor, -shift));
        scores[i + 1] = exp2_fast(fmaf(scores[i + 1], factor, -shift));
        sum += scores[i] + scores[i + 1];
      }
      total[half] = total[half] * decay[half] + sum;
    }
  }

  // Numbers 2 i and 2 i + 1 of an accumulator are register i of the next product's A (hopper_model.operand_place).
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < 32; i++) weights[i] = pack(scores[2 * i], scores[2 * i + 1]);
  }

  // o, top and total over `blocks` key blocks; `ring` is at the first of them, and left behind the last.
  __device__ __forceinline__ void attend(Ring& ring, int blocks) {
    float decay[2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0.0f;
    top[0] = top[1] = -infinity();
    total[0] = total[1] = 0.0f;
    if (blocks == 0) return;
    barrier_wait(&s.k_full[ring.stage], ring.parity);
    start_scores(ring);
    prepare_bias(ring);
    wgmma_wait<0>();
    pin(scores);
    release(&s.k_empty[ring.stage]);
    softmax(decay);
    pack_weights();
    Ring last = ring;  // whose weights are ready
    ring.advance();
#pragma unroll 1
    for (int j = 1; j < blocks; j++) {
      barrier_wait(&s.k_full[ring.stage], ring.parity);
      start_scores(ring);
      bool hide_last = masked, hidden_last = hidden;
      prepare_bias(ring);
      barrier_wait(&s.v_full[last.stage], last.parity);
      if (hide_last) hide_values(last, hidden_last);
      start_values(last);
      wgmma_wait<1>();
      pin(scores);
      release(&s.k_empty[ring.stage]);
      softmax(decay);
      wgmma_wait<0>();
      pin(o);
      release(&s.v_empty[last.stage]);
#pragma unroll
      for (int i = 0; i < D / 2; i++) o[i] *= decay[i / 2 % 2];
      pack_weights();
      last = ring;
      ring.advance();
    }
    barrier_wait(&s.v_full[last.stage], last.parity);
    if (masked) hide_values(last, hidden);
    start_values(last);
    wgmma_wait<0>();
    pin(o);
    release(&s.v_empty[last.stage]);
  }

  // o becomes the attention's output; lse its natural log-sum-exp, -inf where no key was seen.
  __device__ __forceinline__ void normalise(float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = total[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
      lse[half] = sum == 0.0f ? -infinity() : (top[half] + log2f(sum)) * LN_2;
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] *= inverse[i / 2 % 2];
  }

  __device__ __forceinline__ void finish(const Item& item, const float (&near_lse)[2], float (&lse)[2]);
};

// Natural log of the sum of two log-sum-exps, and what each side weighs in it (merge.py).
__device__ __forceinline__ float merge_weights(float lse_a, float lse_b, float& weight_a, float& weight_b) {
  float top = fmaxf(lse_a, lse_b);
  if (top == -infinity()) {
    weight_a = weight_b = 0.0f;
    return top;
  }
  float a = exp2f((lse_a - top) * LOG2_E), b = exp2f((lse_b - top) * LOG2_E), sum = a + b;
  weight_a = a / sum;
  weight_b = b / sum;
  return top + log2f(sum) * LN_2;
}

// What becomes of the attended output: plan.Kind, as reference._finish. For emitting heads o is the rest part.
__device__ __forceinline__ void Consumer::finish(const Item& item, const float (&near_lse)[2], float (&lse)[2]) {
  int start = __ldg(a.q_starts + item.block), rows = __ldg(a.q_starts + item.block + 1) - start;
  int slot = __ldg(a.slot + item.head);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = number * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    if (row >= rows) continue;
    long long token = start + row;
    long long out_at = item.batch * a.out_stride[0] + token * a.out_stride[1] + item.head * a.out_stride[2];
    long long cached_at = item.batch * a.cached_stride[0] + token * a.cached_stride[1] + slot * a.cached_stride[2];
    float* kept_lse = a.cached_lse + item.batch * a.cached_lse_stride[0] + token * a.cached_lse_stride[1] +
                      slot * a.cached_lse_stride[2];
    u32* out = (u32*)((unsigned short*)a.out + out_at) + thread % 4;
    u32* cached = (u32*)((unsigned short*)a.cached + cached_at) + thread % 4;
    float own = 1.0f, other = 0.0f, row_lse = lse[half];
    if (item.kind == COPY) own = 0.0f, other = 1.0f;
    if (item.kind == ADD) other = 1.0f;
    if (item.kind == MERGE) row_lse = merge_weights(row_lse, *kept_lse, own, other);
    if (item.kind == EMIT_TAIL && thread % 4 == 0) *kept_lse = row_lse;
    if (item.emits()) row_lse = merge_weights(row_lse, near_lse[half], own, other);
    bool reads = item.kind == COPY || item.kind == ADD || item.kind == MERGE;
#pragma unroll
    for (int i = 2 * half; i < D / 2; i += 4) {
      int column = i / 4 * 4;  // in pairs
      float2 second = make_float2(0.0f, 0.0f), result;
      if (reads) second = unpack(cached[column]);
      if (item.emits()) second = make_float2(s.near[number][i][thread], s.near[number][i + 1][thread]);
      result.x = own * o[i] + other * second.x;
      result.y = own * o[i + 1] + other * second.y;
      if (item.kind == EMIT_TAIL) cached[column] = pack(o[i], o[i + 1]);
      if (item.kind == EMIT_RESIDUAL) cached[column] = pack(result.x - second.x, result.y - second.y);
      out[column] = pack(result.x, result.y);
    }
    if (thread % 4 == 0)
      a.lse[item.batch * a.lse_stride[0] + token * a.lse_stride[1] + item.head * a.lse_stride[2]] = row_lse;
  }
}

__device__ __forceinline__ void consume(Shared& s, const Arguments& a, int number) {
  Ring ring;
  u32 q_parity = 0;
  int bias_parity = 0;
  while (true) {
    barrier_wait(&s.q_full, q_parity);
    if (s.item.ended) return;
    Consumer c(s, a, number, bias_parity);
    float near_lse[2], lse[2];
#pragma unroll 1
    for (int part = 0; part <= s.item.emits(); part++) {
      c.attend(ring, part ? s.item.end - s.item.middle : s.item.middle - s.item.first);
      c.normalise(lse);
      if (part < s.item.emits()) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) s.near[number][i][c.thread] = c.o[i];
        near_lse[0] = lse[0], near_lse[1] = lse[1];
      }
    }
    Item item = s.item;
    release(&s.q_empty);  // the next item's Q may come while this one is written
    c.finish(item, near_lse, lse);
    bias_parity = c.bias_parity;
    q_parity ^= 1;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    block_attention_forward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                            const __grid_constant__ TensorMap v, const __grid_constant__ Arguments a) {
  extern __shared__ __align__(SWIZZLE_ATOM_BYTES) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // says that it is the same in a warp
  if (threadIdx.x == 0) {
    constexpr int readers = 4 * CONSUMERS;  // warps
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&s.k_full[i], 1), barrier_init(&s.k_empty[i], readers);
      barrier_init(&s.v_full[i], 1), barrier_init(&s.v_empty[i], readers);
    }
    barrier_init(&s.q_full, 1), barrier_init(&s.q_empty, readers);
    publish_barriers();
  }
  __syncthreads();
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (threadIdx.x == 0) {
      tma_prefetch(&q), tma_prefetch(&k), tma_prefetch(&v);
      produce(s, a, q, k, v);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    consume(s, a, warpgroup - 1);
  }
}

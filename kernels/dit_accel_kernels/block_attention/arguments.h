// What the host hands the kernel besides the tensor maps. Plain C: a test compiles it and compares the layout with
// that of `cuda.Arguments`. Strides count elements; those of sizes that broadcast are 0.
#pragma once

struct Arguments {
  void* out;                    // [B, Nq, H, D]
  float* lse;                   // [B, Nq, H]
  void* cached;                 // [B, Nq, slots, D] or null
  float* cached_lse;            // [B, Nq, slots] or null
  const float* key_bias;        // [B, H, Nk] or null
  const int* valid_keys;        // [B] or null
  const int* q_starts;          // from here to work: the plan's tensors
  const int* k_starts;
  const int* pattern;
  const int* kind;
  const int* slot;
  const int* pointers;
  const int* split;
  const int* indices;
  const int* work;
  int* ticket;                  // one zero: work handed out so far, beyond the first item of each block
  long long out_stride[3];      // batch, token, head
  long long lse_stride[3];
  long long cached_stride[3];   // batch, token, slot
  long long cached_lse_stride[3];
  long long bias_stride[3];     // batch, head, token
  int batch;
  int items;                    // rows of work
  int q_blocks;
  int kv_batch;                 // 1 or batch
  float scale;
  int padding;
};

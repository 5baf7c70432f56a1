// Hopper's asynchronous machinery (sm_90a) in as few words as the kernel needs: mbarriers, TMA loads, wgmma.
// No header is included, so nvcc and NVRTC take the same text; no assembler label is used, so inlining is safe.
// Source: PTX ISA 8.x, sections on mbarrier, cp.async.bulk.tensor and wgmma. The layouts are modelled in
// hopper_model.py, and tests hold the constants below to that model.
#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

constexpr int SWIZZLE_ROW_BYTES = 128;     // one row of a swizzle atom: what TMA's SWIZZLE_128B permutes within
constexpr int SWIZZLE_ATOM_BYTES = 1024;   // 8 such rows; also the alignment of every tile
constexpr int DESCRIPTOR_SWIZZLE_128B = 1; // bits 62-63 of a shared memory matrix descriptor
constexpr int K_STEP = 16;                 // wgmma's K for 16-bit operands

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- mbarriers -------------------------------------------------------------------------------------------------
__device__ __forceinline__ void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_expect(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // to the copy engine too
}
// The four warps of one warpgroup; barrier 0 is __syncthreads.
__device__ __forceinline__ void warpgroup_sync(int name) {
  asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory");
}
// Before wgmma or TMA touch shared memory that ordinary stores have written.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- TMA -------------------------------------------------------------------------------------------------------
// A box of the tensor map at (column, token, head, batch); rows beyond the tensor arrive as zeros and count as bytes.
__device__ __forceinline__ void tma_load(void* to, const TensorMap* map, u64* barrier, int column, int token,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(token), "r"(head), "r"(batch)
      : "memory");
}
__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- wgmma -----------------------------------------------------------------------------------------------------
// Shared memory matrix descriptor: 16-byte units, start in bits 0-13, leading offset 16-29, stride offset 32-45.
__device__ __forceinline__ u64 matrix_descriptor(u32 address, int leading_bytes, int stride_bytes) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading_bytes >> 4) << 16 | (u64)(stride_bytes >> 4) << 32 |
         (u64)DESCRIPTOR_SWIZZLE_128B << 62;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler sees no link between a wait and an accumulator: this one keeps reads behind the wait.
template <int N>
__device__ __forceinline__ void pin(float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(values[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(u32 (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(values[i])::"memory");
}

#define ACC8(d, i)                                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),      \
      "+f"(d[i + 7])
#define ACC32(d, i) ACC8(d, i), ACC8(d, i + 8), ACC8(d, i + 16), ACC8(d, i + 24)
#define LIST32                                                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "      \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST64                                                                                                     \
  LIST32                                                                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "    \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." OPERAND_TYPE "." OPERAND_TYPE

#ifdef FP16
#define OPERAND_TYPE "f16"
#else
#define OPERAND_TYPE "bf16"
#endif

// d (64 x 128) = a (shared, K-major) b (shared, K-major)^T, on top of d where `accumulate`.
__device__ __forceinline__ void wgmma_scores(float (&d)[64], u64 a, u64 b, int accumulate) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; " WGMMA(128) " {" LIST64 "}, %64, %65, p, 1, 1, 0, 0; }"
               : ACC32(d, 0), ACC32(d, 32)
               : "l"(a), "l"(b), "r"(accumulate));
}
// d (64 x D) += a (registers) b (shared, MN-major): the last 1 says that b's rows are the summed index.
__device__ __forceinline__ void wgmma_values(float (&d)[64], const u32* a, u64 b) {
  asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; " WGMMA(128) " {" LIST64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
               : ACC32(d, 0), ACC32(d, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_values(float (&d)[32], const u32* a, u64 b) {
  asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; " WGMMA(64) " {" LIST32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
               : ACC32(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// ---- numbers ---------------------------------------------------------------------------------------------------
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two numbers in 32 bits, the first in the low half, rounded to nearest even.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
#ifdef FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}
__device__ __forceinline__ float2 unpack(u32 both) {
  float2 pair;
#ifdef FP16
  asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(both));
#else
  pair.x = __uint_as_float(both << 16);
  pair.y = __uint_as_float(both & 0xffff0000u);
#endif
  return pair;
}

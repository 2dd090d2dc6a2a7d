// Hopper's asynchronous units, one thin function per PTX instruction: mbarriers, the bulk tensor copy engine
// (TMA), and 8-bit warpgroup products (wgmma). Needs sm_90a. Meaning and layouts: PTX ISA, "Asynchronous
// Warpgroup Level Matrix Instructions" and "Asynchronous copy".
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cosmos_fast::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- mbarriers ---------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers, and what ordinary stores wrote, visible to the copy engine and the tensor
// cores.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed != 0;
}

// Returns once the phase of this parity has completed. With COSMOS_FAST_WATCHDOG it gives up after
// milliseconds, which only a fault of the pipeline takes: a wrong result in place of a hang. (A trap would
// keep ptxas from using setmaxnreg.)
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef COSMOS_FAST_WATCHDOG
  for (const int64_t start = clock64(); !barrier_passed(barrier, parity) && clock64() - start < 4'000'000;) {
  }
#else
  while (!barrier_passed(barrier, parity)) {
  }
#endif
}

// --- named barriers of a part of the block -----------------------------------------------------------

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- registers between roles -------------------------------------------------------------------------

template <int kCount>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- copies ------------------------------------------------------------------------------------------

// One box of a 3-D tensor into shared memory; completes bytes on the barrier. Outside the tensor reads as
// zero.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y,
                                         int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
      "%5}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The same box into every block of the cluster that has a bit in blocks, at the same place of its shared
// memory; each block's own barrier, at the same place too, learns of its bytes.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap* map,
                                            uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

// --- clusters ----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of every block of the cluster; what each wrote before, all see after.
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();  // the instruction takes whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at the barrier that lies at this address in the shared memory of another block of the cluster. It
// orders what this thread read before within its own block only: released to the cluster, each arrival would
// wait for all memory accesses of the thread as seen by the whole GPU (MEMBAR.ALL.GPU), and what a stage's
// readers have to show is that their products ended, which waiting for them did.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// --- products ----------------------------------------------------------------------------------------

// Descriptor of a K-major operand whose rows are kRowBytes wide (32, 64 or 128) and swizzled at that width,
// as the copy engine leaves them. A step of 32 bytes along K adds 2.
template <int kRowBytes>
__device__ __forceinline__ uint64_t operand(uint32_t address) {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128);
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  constexpr uint64_t kEightRows = 8 * kRowBytes;
  return uint64_t{(address & 0x3FFFF) >> 4} | (uint64_t{1} << 16) | ((kEightRows >> 4) << 32) |
         (kSwizzle << 62);
}

// Before the first product that reads or writes registers which ordinary instructions touched.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Ties registers to this point of the program, so that the compiler moves no use of them across it.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Waits until at most kPending committed groups run, after which results may be used.
template <int kPending, int kCount>
__device__ __forceinline__ void product_wait(float (&results)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(results);
}

#define COSMOS_R16_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define COSMOS_R16_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define COSMOS_R16_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define COSMOS_R16_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define COSMOS_R16_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define COSMOS_R16_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define COSMOS_R32 COSMOS_R16_0 ", " COSMOS_R16_1
#define COSMOS_R48 COSMOS_R32 ", " COSMOS_R16_2
#define COSMOS_R64 COSMOS_R48 ", " COSMOS_R16_3
#define COSMOS_R80 COSMOS_R64 ", " COSMOS_R16_4
#define COSMOS_R96 COSMOS_R80 ", " COSMOS_R16_5
#define COSMOS_D4(how, i) how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3])
#define COSMOS_D16(how, i) \
  COSMOS_D4(how, i), COSMOS_D4(how, i + 4), COSMOS_D4(how, i + 8), COSMOS_D4(how, i + 12)
#define COSMOS_D32(how) COSMOS_D16(how, 0), COSMOS_D16(how, 16)
#define COSMOS_D48(how) COSMOS_D32(how), COSMOS_D16(how, 32)
#define COSMOS_D64(how) COSMOS_D48(how), COSMOS_D16(how, 48)
#define COSMOS_D80(how) COSMOS_D64(how), COSMOS_D16(how, 64)
#define COSMOS_D96(how) COSMOS_D80(how), COSMOS_D16(how, 80)

// d (64, N) (+)= a (64, 32) @ b (N, 32)^T, e4m3 operands, fp32 result spread over the warpgroup: thread t of
// quad g holds in d[4 j + e] column 8 j + 2 t + e % 2 of row 16 warp + g + 8 (e / 2). a lies in shared
// memory, or in four registers: the first holds row g, columns 4 t .. 4 t + 3, the second row g + 8, the last
// two the same 16 columns on. first_product takes nothing from d; it is a function of its own because an
// operand that is read ties d to what it held before.
#define COSMOS_PRODUCT(N, COUNT, A, A1, A2, A3, B_RS)                                               \
  __device__ __forceinline__ void product(float (&d)[COUNT], uint64_t a, uint64_t b) {              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" COSMOS_R##COUNT       \
                 "}, %" #A ", %" #A1 ", 1, 1, 1;"                                                   \
                 : COSMOS_D##COUNT("+f")                                                            \
                 : "l"(a), "l"(b));                                                                 \
  }                                                                                                 \
  __device__ __forceinline__ void first_product(float (&d)[COUNT], uint64_t a, uint64_t b) {        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" COSMOS_R##COUNT       \
                 "}, %" #A ", %" #A1 ", 0, 1, 1;"                                                   \
                 : COSMOS_D##COUNT("=f")                                                            \
                 : "l"(a), "l"(b));                                                                 \
  }                                                                                                 \
  __device__ __forceinline__ void product(float (&d)[COUNT], const uint32_t* a, uint64_t b) {       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" COSMOS_R##COUNT       \
                 "}, {%" #A ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B_RS ", 1, 1, 1;"                 \
                 : COSMOS_D##COUNT("+f")                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
  }                                                                                                 \
  __device__ __forceinline__ void first_product(float (&d)[COUNT], const uint32_t* a, uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" COSMOS_R##COUNT       \
                 "}, {%" #A ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B_RS ", 0, 1, 1;"                 \
                 : COSMOS_D##COUNT("=f")                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
  }

COSMOS_PRODUCT(64, 32, 32, 33, 34, 35, 36)
COSMOS_PRODUCT(96, 48, 48, 49, 50, 51, 52)
COSMOS_PRODUCT(128, 64, 64, 65, 66, 67, 68)
COSMOS_PRODUCT(160, 80, 80, 81, 82, 83, 84)
COSMOS_PRODUCT(192, 96, 96, 97, 98, 99, 100)

#undef COSMOS_PRODUCT
#undef COSMOS_D96
#undef COSMOS_D80
#undef COSMOS_D64
#undef COSMOS_D48
#undef COSMOS_D32
#undef COSMOS_R96
#undef COSMOS_R80
#undef COSMOS_R64
#undef COSMOS_R48
#undef COSMOS_R32
#undef COSMOS_D16
#undef COSMOS_D4
#undef COSMOS_R16_0
#undef COSMOS_R16_1
#undef COSMOS_R16_2
#undef COSMOS_R16_3
#undef COSMOS_R16_4
#undef COSMOS_R16_5

__device__ __forceinline__ float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cosmos_fast::hopper

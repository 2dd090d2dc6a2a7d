// 8-bit attention for Hopper. One block computes 64 queries per consumer warpgroup of one head; a producer
// warp keeps a ring of key and value tiles filled through the copy engine. docs/kernels/attention8.md says
// how it came to be.
#pragma once

#include "attention8_persistent.cuh"

namespace cosmos_fast::attention8 {

template <class C>
__global__ void __launch_bounds__(Plan<C>::kThreads, 1)
    attention8_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const __grid_constant__ Params p) {
  using P = Plan<C>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared<C> shared{shared_address(memory)};
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform, as the compiler then knows
  if (threadIdx.x == 0) {
    if (shared.base % 1024 != 0) __trap();  // swizzles repeat every 1024 bytes
    for (int slot = 0; slot < P::kQuerySlots; ++slot) {
      barrier_init(shared.queries_full(slot), 1);
      if constexpr (C::persistent) barrier_init(shared.queries_empty(slot), 4 * C::warpgroups);
    }
    for (int stage = 0; stage < C::stages; ++stage) {
      barrier_init(shared.keys_full(stage), 1);
      barrier_init(shared.values_full(stage), 1);
      barrier_init(shared.keys_empty(stage), 4 * C::warpgroups * C::cluster);
      barrier_init(shared.values_empty(stage), 4 * C::warpgroups * C::cluster);
    }
  }
  fence_async_proxy();
  __syncthreads();
  if constexpr (C::cluster > 1) cluster_sync();  // no copy into a block that has no barriers yet
  const bool producer = warpgroup == C::warpgroups, speaker = threadIdx.x % 128 == 0;
  if constexpr (C::persistent) {
    if (producer) {
      registers_lower<P::kProducerRegisters>();
      if (speaker) produce_items<C>(&q_map, &k_map, &v_map, shared, p);
    } else {
      registers_raise<P::kConsumerRegisters>();
      consume_items<C>(p, shared, warpgroup);
    }
    return;
  }
  const int head = blockIdx.y, query_tile = blockIdx.x;
  const Tiles<C> tiles(p, head * gridDim.x + query_tile);
  if (producer) {
    registers_lower<P::kProducerRegisters>();
    if (speaker && tiles.count > 0) {
      copy_queries(&q_map, shared, 0, head, query_tile);
      produce_tiles(&k_map, &v_map, shared, tiles, head, 0);
    }
    if constexpr (C::cluster > 1) cluster_sync();
  } else {
    registers_raise<P::kConsumerRegisters>();
    Consumer<C>(p, shared, tiles, warpgroup, head, query_tile).run(query_tile);
    if constexpr (C::cluster > 1) cluster_sync();  // no block leaves while another arrives at its barriers
  }
}

}  // namespace cosmos_fast::attention8

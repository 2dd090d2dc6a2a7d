// 8-bit attention for Hopper. One block computes 64 queries per consumer warpgroup of one head; a producer
// warp keeps a ring of key and value tiles filled through the copy engine. docs/kernels/attention8.md says
// how it came to be.
#pragma once

#include "attention8_math.cuh"

namespace cosmos_fast::attention8 {

// What one thread of a consumer warpgroup knows: two rows of its warp's sixteen, g and g + 8, with a quarter
// of their columns. Index r below is 0 for row g, 1 for row g + 8.
template <class C>
struct Consumer {
  using P = Plan<C>;
  using Scores = float[P::kScores];
  static_assert(C::schedule == Schedule::kOverlap || !(C::late_sums || C::lean));

  const Params& p;
  const Shared<C>& shared;
  const Tiles<C>& tiles;
  const float* k_scale;
  int warpgroup, head, ragged;  // ragged: the key tile that reaches past the last key, or -1
  float q_scale, block_scale;
  Rows<C> rows;
  float owed[2] = {};  // shrinks not yet applied to the exact sums
  uint32_t q[C::q_registers ? 16 : 1];
  uint32_t probabilities[P::kScores / 4];
  float out[P::kOuts];

  __device__ Consumer(const Params& p, const Shared<C>& shared, const Tiles<C>& tiles, int warpgroup,
                      int head, int query_tile)
      : p(p), shared(shared), tiles(tiles), warpgroup(warpgroup), head(head) {
    const int row = query_tile * P::kQueries + 64 * warpgroup;
    const int block = p.q_scale_rows ? min(row, p.num_queries - 1) / p.q_scale_rows : 0;
    q_scale = p.scale_log2 * (p.q_scale ? p.q_scale[int64_t{head} * p.q_scale_head + block] : 1.0f);
    k_scale = p.k_scale + int64_t{head} * p.k_scale_head;
    ragged = p.num_keys % C::keys ? p.num_keys / C::keys : -1;
    block_scale = fmaxf(q_scale * __ldg(k_scale), 1e-30f);
#pragma unroll
    for (int i = 0; i < P::kOuts; ++i) out[i] = 0.0f;
  }

  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int warp() const { return threadIdx.x / 32 % 4; }

  // Once a warp, at the barrier of every block whose copies fill the stage.
  __device__ void arrive(uint32_t barrier) const {
    if constexpr (C::cluster == 1) {
      if (lane() == 0) barrier_arrive(barrier);
    } else {
      if (lane() < C::cluster) barrier_arrive_at(barrier, lane());
    }
  }
  __device__ void release_keys(int i) const { arrive(shared.keys_empty(i % C::stages)); }
  __device__ void release_values(int i) const { arrive(shared.values_empty(i % C::stages)); }

  // Queries from shared memory into the registers of a product's first operand.
  __device__ void load_queries() {
    barrier_wait(shared.queries_full(), 0);
    if constexpr (C::q_registers) {
      const int g = lane() / 4, t = lane() % 4;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int row = 16 * warp() + g + 8 * (i % 2),
                  part = 2 * (i / 4) + i % 4 / 2;  // part: 16 bytes of the row
        const uint32_t at = shared.queries(warpgroup) + 128 * row + 16 * (part ^ row % 8) + 4 * t;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(q[i]) : "r"(at));
      }
    }
  }

  __device__ __forceinline__ void await_keys(int i) const {
    barrier_wait(shared.keys_full(i % C::stages), i / C::stages & 1);
  }
  __device__ __forceinline__ void await_values(int i) const {
    barrier_wait(shared.values_full(i % C::stages), i / C::stages & 1);
  }

  // Starts scores = Q K^T of tile i. Past the last tile the products read what the stage holds, and nobody
  // reads them: a branch around them would make the compiler wait for every product.
  __device__ __forceinline__ void start_scores(Scores& scores, int i) {
    const int stage = i % C::stages;
    if (!C::lean && (C::schedule != Schedule::kDeep || i < tiles.count)) await_keys(i);
    const uint64_t b = operand<128>(shared.keys(stage));
    product_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t queries = operand<128>(shared.queries(warpgroup)) + 2 * k;
      if constexpr (C::q_registers)
        k == 0 ? first_product(scores, q, b) : product(scores, q + 4 * k, b + 2 * k);
      else
        k == 0 ? first_product(scores, queries, b) : product(scores, queries, b + 2 * k);
    }
    product_commit();
  }

  // Starts out += probabilities V of tile i.
  __device__ __forceinline__ void start_values(int i) {
    const int stage = i % C::stages;
    if (!C::lean) await_values(i);
    const uint64_t b = operand<P::kValueRowBytes>(shared.values(stage));
    product_fence();
#pragma unroll
    for (int k = 0; k < C::keys / 32; ++k) {
      const int chunk = 32 * k / P::kValueRowBytes, within = 32 * k % P::kValueRowBytes;
      product(out, probabilities + 4 * k, b + (chunk * P::kValueChunk + within) / 16);
    }
    product_commit();
  }

  // Of the scores of tile i, to powers of 2; positive, so that -inf stays -inf.
  __device__ __forceinline__ float scale_of(int i) const {
    // Tiles that do not divide a block of keys have one scale a head (attention8_launch.cuh).
    if constexpr (C::lean && kAttention8ScaleKeys % C::keys != 0) return block_scale;
    const int block = tiles[i] * C::keys / kAttention8ScaleKeys * p.k_scale_step;
    return fmaxf(q_scale * __ldg(k_scale + block), 1e-30f);
  }

  // Whether the keys end within tile i. Lists are read only where they end within any.
  __device__ __forceinline__ bool ends(int i) const {
    if constexpr (C::sparse)
      if (ragged < 0) return false;
    return tiles[i] == ragged;
  }

  // Scores of tile i to weights. Keys past the last weigh nothing.
  __device__ __forceinline__ void softmax(Scores& s, int i, float scale) {
    if (ends(i)) {
      const int left = p.num_keys - ragged * C::keys - lane() % 4 * 2;
#pragma unroll
      for (int e = 0; e < P::kScores; ++e)
        if (e / 4 * 8 + e % 2 >= left) s[e] = -INFINITY;
    }
    rows.weigh(s, scale);
  }

  // Waits for all products and brings the output to the present peak. All warps of a warpgroup must come to a
  // wait on the same way (PTX ISA, wgmma.wait_group), so it cannot stand in a branch that one warp takes. Nor
  // can it follow the exponentials without a branch between: the compiler would put it before them, and
  // nothing would overlap. So there is one that all take alike, which is to say never.
  __device__ __forceinline__ void finish_and_rescale() {
    if (p.num_queries < 0) {
      product_wait<0>(out);
      rescale();
    }
    product_wait<0>(out);
    if (rows.moved) {
      rescale();
      if constexpr (C::promote > 0) owed[0] *= rows.shrink[0], owed[1] *= rows.shrink[1];
    }
  }

  __device__ __forceinline__ void rescale() {
#pragma unroll
    for (int e = 0; e < P::kOuts; ++e) out[e] *= rows.shrink[e / 2 % 2];
  }

  // Scores to the first operand of the next product. Column order: kAttention8Order.
  __device__ __forceinline__ void pack(const Scores& s) {
#pragma unroll
    for (int k = 0; k < P::kScores / 16; ++k)
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int e = 16 * k + 8 * (a / 2) + 2 * (a % 2);
        probabilities[4 * k + a] = e4m3x4(s[e], s[e + 1], s[e + 4], s[e + 5]);
      }
  }

  // Adds the output to its fp32 master in shared memory every C::promote tiles, and to the registers at the
  // end. The tensor cores keep some 14 bits of their accumulator, which loses small terms of long sums.
  __device__ __forceinline__ void promote(int i, bool last) {
    if constexpr (C::promote > 0) {
      if (!last && (i + 1) % C::promote != 0) return;
      extern __shared__ __align__(1024) unsigned char memory[];
      float4* master = reinterpret_cast<float4*>(memory + P::kMasterAt) + warpgroup * 128 * (P::kOuts / 4) +
                       threadIdx.x % 128;
      const bool first = i < C::promote;
#pragma unroll
      for (int e = 0; e < P::kOuts; e += 4) {
        float4 exact = first ? float4{} : master[e / 4 * 128];
        exact.x = fmaf(exact.x, owed[0], out[e]);
        exact.y = fmaf(exact.y, owed[0], out[e + 1]);
        exact.z = fmaf(exact.z, owed[1], out[e + 2]);
        exact.w = fmaf(exact.w, owed[1], out[e + 3]);
        if (last) {
          out[e] = exact.x, out[e + 1] = exact.y, out[e + 2] = exact.z, out[e + 3] = exact.w;
        } else {
          master[e / 4 * 128] = exact;
          out[e] = out[e + 1] = out[e + 2] = out[e + 3] = 0.0f;
        }
      }
      owed[0] = owed[1] = 1.0f;
    }
  }

  // Consumer warpgroups issue their products one after the other, 0, 1, ..., 0: each waits for the one
  // before.
  __device__ void await_turn() const {
    if constexpr (C::turns) named_sync(1 + warpgroup, 256);
  }
  __device__ void pass_turn(bool last_tile) const {
    if constexpr (C::turns) {
      const bool wraps = warpgroup + 1 == C::warpgroups;
      if (!(wraps && last_tile)) named_arrive(wraps ? 1 : 2 + warpgroup, 256);
    }
  }
  __device__ void open_turns() const {
    if constexpr (C::turns)
      if (warpgroup + 1 == C::warpgroups) named_arrive(1, 256);
  }

  __device__ void run_serial() {
    Scores s;
    open_turns();
    for (int i = 0; i < tiles.count; ++i) {
      const float scale = scale_of(i);
      await_turn();
      start_scores(s, i);
      pass_turn(i + 1 == tiles.count);
      product_wait<0>(s);
      release_keys(i);
      softmax(s, i, scale);
      finish_and_rescale();
      pack(s);
      start_values(i);
      product_wait<0>(out);
      release_values(i);
      if (i + 1 < tiles.count) promote(i, false);
    }
  }

  __device__ void run_overlap() {
    Scores s;
    const int last = tiles.count - 1;
    float scale = scale_of(0);
    if constexpr (C::lean) await_keys(0);
    start_scores(s, 0);
    product_wait<0>(s);
    release_keys(0);
    softmax(s, 0, scale);
    pack(s);
    if constexpr (C::late_sums) rows.add(s);
    if (last > 0) open_turns();
    for (int i = 1; i <= last; ++i) {
      scale = scale_of(i);
      if constexpr (C::lean) await_keys(i), await_values(i - 1);
      await_turn();
      start_scores(s, i);
      start_values(i - 1);
      pass_turn(i == last);
      product_wait<1>(s);
      release_keys(i);
      softmax(s, i, scale);
      finish_and_rescale();
      release_values(i - 1);
      promote(i - 1, false);
      pack(s);
      if constexpr (C::late_sums) rows.add(s);
    }
    if constexpr (C::lean) await_values(last);
    start_values(last);
    product_wait<0>(out);
  }

  // At entry the scores of tile i are in s and the probabilities of i - 1 packed; nothing is in flight.
  __device__ __forceinline__ void deep_step(Scores& s, Scores& other, int i) {
    await_turn();
    start_values(i - 1);
    start_scores(other, i + 1);
    pass_turn(i + 1 == tiles.count);
    softmax(s, i, scale_of(i));
    finish_and_rescale();
    pin(other);
    release_values(i - 1);
    if (i + 1 < tiles.count) release_keys(i + 1);
    promote(i - 1, false);
    pack(s);
  }

  __device__ void run_deep() {
    Scores even, odd;
    const int last = tiles.count - 1;
    start_scores(even, 0);
    start_scores(odd, 1);
    product_wait<0>(even);
    pin(odd);
    release_keys(0);
    if (last > 0) release_keys(1), open_turns();
    softmax(even, 0, scale_of(0));
    pack(even);
    int i = 1;
    for (; i < last; i += 2) {
      deep_step(odd, even, i);
      deep_step(even, odd, i + 1);
    }
    if (i == last) deep_step(odd, even, i);
    start_values(last);
    product_wait<0>(out);
  }

  // Of row r the values of columns 8 j + 2 t and the next. scale, mean: of v, from column 2 t on.
  __device__ __forceinline__ float2 values_of(int r, int j, float share, const float* scale,
                                              const float* mean) const {
    const float2 factor = *reinterpret_cast<const float2*>(scale + 8 * j);
    float2 y{out[4 * j + 2 * r] * share * factor.x, out[4 * j + 2 * r + 1] * share * factor.y};
    if (mean) y.x += mean[8 * j], y.y += mean[8 * j + 1];
    return y;
  }

  // Row r as codes. A quad turns its pairs of bytes so that each thread writes 16 columns, the quad 64. All
  // lanes come here.
  __device__ __forceinline__ void store_codes(int r, int row, float share, const float* scale,
                                              const float* mean) const {
    const int t = lane() % 4;
    const float unit = 1.0f / __ldg(p.out_step);
    uint8_t* to = static_cast<uint8_t*>(p.out) + row * p.out_row + head * p.out_head + 16 * t;
    const auto pairs = [&](int j) {
      const float2 a = values_of(r, j, share, scale, mean), b = values_of(r, j + 2, share, scale, mean);
      return e4m3x4(a.x * unit, a.y * unit, b.x * unit, b.y * unit);
    };
#pragma unroll
    for (int j = 0; j < 16; j += 8) {
      const uint2 a = turned_in_quad(pairs(j), pairs(j + 4), t);
      const uint2 b = turned_in_quad(pairs(j + 1), pairs(j + 5), t);
      if (row < p.num_queries) *reinterpret_cast<uint4*>(to + 8 * j) = make_uint4(a.x, a.y, b.x, b.y);
    }
  }

  __device__ void store(int query_tile) {
    const int g = lane() / 4, t = lane() % 4;
    const float* scale = p.v_scale + head * 128 + 2 * t;
    const float* mean = p.v_mean ? p.v_mean + head * 128 + 2 * t : nullptr;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = rows.sum[r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int row = query_tile * P::kQueries + 64 * warpgroup + 16 * warp() + g + 8 * r;
      const float share = total > 0.0f ? 1.0f / total : 0.0f;
      if (p.out_step) store_codes(r, row, share, scale, mean);
      if (row >= p.num_queries) continue;
      if (p.lse && t == 0)
        p.lse[int64_t{head} * p.num_queries + row] = 0.69314718f * (rows.peak[r] - kLift + __log2f(total));
      if (p.out_step) continue;
      __nv_bfloat16* to = static_cast<__nv_bfloat16*>(p.out) + row * p.out_row + head * p.out_head + 2 * t;
#pragma unroll
      for (int j = 0; j < 16; ++j)
        *reinterpret_cast<__nv_bfloat162*>(to + 8 * j) =
            __float22bfloat162_rn(values_of(r, j, share, scale, mean));
    }
  }

  __device__ void run(int query_tile) {
    if (tiles.count > 0) {
      load_queries();
      if constexpr (C::schedule == Schedule::kSerial) run_serial();
      if constexpr (C::schedule == Schedule::kOverlap) run_overlap();
      if constexpr (C::schedule == Schedule::kDeep) run_deep();
      promote(tiles.count - 1, true);
    }
    store(query_tile);
  }
};

template <class C>
__global__ void __launch_bounds__(Plan<C>::kThreads, 1)
    attention8_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const __grid_constant__ Params p) {
  using P = Plan<C>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared<C> shared{shared_address(memory)};
  const int head = blockIdx.y, query_tile = blockIdx.x,
            warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform, as the compiler then knows
  if (threadIdx.x == 0) {
    if (shared.base % 1024 != 0) __trap();  // swizzles repeat every 1024 bytes
    barrier_init(shared.queries_full(), 1);
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
  const Tiles<C> tiles(p, head, query_tile);
  if (warpgroup == C::warpgroups) {
    registers_lower<P::kProducerRegisters>();
    if (threadIdx.x % 128 == 0 && tiles.count > 0)
      produce<C>(&q_map, &k_map, &v_map, shared, tiles, head, query_tile);
    if constexpr (C::cluster > 1) cluster_sync();
  } else {
    registers_raise<P::kConsumerRegisters>();
    Consumer<C>(p, shared, tiles, warpgroup, head, query_tile).run(query_tile);
    if constexpr (C::cluster > 1) cluster_sync();  // no block leaves while another arrives at its barriers
  }
}

}  // namespace cosmos_fast::attention8

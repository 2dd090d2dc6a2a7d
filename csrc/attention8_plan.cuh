// Versions of the 8-bit attention kernel, what they keep where, and the producer that feeds them.
#pragma once

#include <cuda_bf16.h>

#include "attention8.h"
#include "e4m3.cuh"
#include "hopper.cuh"

namespace cosmos_fast::attention8 {

using namespace hopper;

enum class Schedule {
  kSerial,   // scores, softmax, values, one after the other
  kOverlap,  // the scores of tile i + 1 and the values of tile i are in flight together
  kDeep,     // two score tiles: the softmax of i runs beside the scores of i + 1 and the values of i - 1
};

// Work left out to learn what it costs. The result is wrong; versions of the package leave nothing out.
enum class Probe { kNone, kNoExponentials, kNoMaxima, kNoSoftmax };

// One version of the kernel: derive and hide the members that differ.
struct Config {
  static constexpr int warpgroups = 2;  // consumers, 64 queries each
  static constexpr int keys = 128;      // of one tile: 64, 96, 128, 160 or 192
  static constexpr int stages = 4;      // tiles of K and of V in shared memory
  static constexpr Schedule schedule = Schedule::kSerial;
  static constexpr bool turns =
      false;  // consumers issue products in turn: one's softmax meets the other's products
  static constexpr int poly = 0;  // exponentials of every eight that the FMA units compute
  static constexpr int promote =
      0;  // tiles after which the products' accumulator joins an exact fp32 one; 0: never
  static constexpr bool q_registers = false;  // queries stay in registers
  static constexpr bool sparse = false;       // key tiles from a list
  static constexpr bool max3 = false;  // maxima of three at a time, as integers, while they are positive
  static constexpr bool vote = false;  // rows gather their maxima only in tiles in which a peak may follow
  static constexpr bool late_sums = false;  // weights are summed behind the exponentials, not among them
  static constexpr bool lean = false;  // operands are awaited before the turn, one scale is loaded per block
  static constexpr int cluster = 1;    // blocks that share their key tiles: each fetches a part for all
  static constexpr Probe probe = Probe::kNone;
};

struct Params {
  void* out;  // bf16, or e4m3 with an out_step
  float* lse;
  const float *q_scale, *k_scale, *v_scale, *v_mean, *out_step;  // q_scale may be null, for 1
  const int *key_tiles, *key_counts;
  int64_t out_row, out_head;
  int num_queries, num_keys, q_scale_head, k_scale_head, q_scale_rows, key_capacity;
  int k_scale_step;  // 1 with a k_scale per block, 0 with one per head
  float scale_log2;  // softmax_scale * log2(e)
};

// Sizes and places in shared memory, in bytes.
template <class C>
struct Plan {
  static constexpr int kThreads = (C::warpgroups + 1) * 128;
  static constexpr int kQueries = C::warpgroups * 64;
  static constexpr int kScores = C::keys / 2;  // registers of a score tile
  static constexpr int kOuts = 64;             // of an output tile
  static constexpr int kValueRowBytes = C::keys % 128 == 0  ? 128
                                        : C::keys % 64 == 0 ? 64
                                                            : 32;  // one swizzled row
  static constexpr int kValueChunk = 128 * kValueRowBytes;
  static constexpr int kQueryBytes = kQueries * 128;
  static constexpr int kKeyBytes = C::keys * 128;
  static constexpr int kValueBytes = 128 * C::keys;
  static constexpr int kMasterBytes = C::promote ? C::warpgroups * 128 * kOuts * 4 : 0;
  static constexpr int kKeysAt = kQueryBytes;
  static constexpr int kValuesAt = kKeysAt + C::stages * kKeyBytes;
  static constexpr int kMasterAt = kValuesAt + C::stages * kValueBytes;
  static constexpr int kBarriersAt = kMasterAt + kMasterBytes;
  static constexpr int kBytes = kBarriersAt + (4 * C::stages + 1) * 8;
  static constexpr int kProducerRegisters = C::warpgroups == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = C::warpgroups == 2 ? 240 : 160;
  static_assert(kBytes <= 227 * 1024 && kValueBytes % 1024 == 0 &&
                (C::warpgroups == 2 || C::warpgroups == 3));
  static_assert(C::cluster == 1 || (C::cluster == 2 && !C::sparse && C::keys % 16 == 0));
};

// Shared-memory addresses of a block.
template <class C>
struct Shared {
  uint32_t base;
  using P = Plan<C>;
  __device__ uint32_t queries(int warpgroup) const { return base + warpgroup * 64 * 128; }
  __device__ uint32_t keys(int stage) const { return base + P::kKeysAt + stage * P::kKeyBytes; }
  __device__ uint32_t values(int stage) const { return base + P::kValuesAt + stage * P::kValueBytes; }
  __device__ uint32_t barrier(int index) const { return base + P::kBarriersAt + 8 * index; }
  __device__ uint32_t queries_full() const { return barrier(4 * C::stages); }
  __device__ uint32_t keys_full(int stage) const { return barrier(stage); }
  __device__ uint32_t keys_empty(int stage) const { return barrier(C::stages + stage); }
  __device__ uint32_t values_full(int stage) const { return barrier(2 * C::stages + stage); }
  __device__ uint32_t values_empty(int stage) const { return barrier(3 * C::stages + stage); }
};

// The key tiles of one query tile, in order.
template <class C>
struct Tiles {
  const int* list;
  int count;

  __device__ Tiles(const Params& p, int head, int query_tile) {
    if constexpr (C::sparse) {
      const int row = head * gridDim.x + query_tile;
      list = p.key_tiles + int64_t{row} * p.key_capacity;
      count = p.key_counts[row];
    } else {
      list = nullptr;
      count = (p.num_keys + C::keys - 1) / C::keys;
    }
  }
  __device__ int operator[](int i) const {
    if constexpr (C::sparse) return __ldg(list + i);
    return i;
  }
};

// Parts of a cluster's key tiles: block r fetches keys r / cluster on and, of the values, channels likewise.
template <class C>
struct Part {
  static constexpr int kKeys = C::keys / C::cluster, kChannels = 128 / C::cluster;
  static constexpr uint16_t kAll = (1 << C::cluster) - 1;
};

template <class C>
__device__ __forceinline__ void copy_part(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y,
                                          int z) {
  if constexpr (C::cluster == 1)
    copy_box(to, map, barrier, x, y, z);
  else
    copy_box_to(Part<C>::kAll, to, map, barrier, x, y, z);
}

template <class C>
__device__ void produce(const CUtensorMap* q_map, const CUtensorMap* k_map, const CUtensorMap* v_map,
                        const Shared<C>& shared, const Tiles<C>& tiles, int head, int query_tile) {
  using P = Plan<C>;
  const int rank = C::cluster == 1 ? 0 : cluster_rank();
  const int key_part = rank * Part<C>::kKeys, channel_part = rank * Part<C>::kChannels;
  barrier_expect(shared.queries_full(), P::kQueryBytes);
  copy_box(shared.base, q_map, shared.queries_full(), 0, head, query_tile * P::kQueries);
  int next = tiles[0];
  for (int i = 0; i < tiles.count; ++i) {
    const int stage = i % C::stages, first_key = next * C::keys;
    if (i + 1 < tiles.count) next = tiles[i + 1];  // from memory, if sparse: asked for before the waits
    const uint32_t free = (i / C::stages & 1) ^ 1;
    barrier_wait(shared.keys_empty(stage), free);
    barrier_expect(shared.keys_full(stage), P::kKeyBytes);
    copy_part<C>(shared.keys(stage) + 128 * key_part, k_map, shared.keys_full(stage), 0, head,
                 first_key + key_part);
    barrier_wait(shared.values_empty(stage), free);
    barrier_expect(shared.values_full(stage), 128 * C::keys);
#pragma unroll
    for (int chunk = 0; chunk < C::keys / P::kValueRowBytes; ++chunk)
      copy_part<C>(shared.values(stage) + chunk * P::kValueChunk + channel_part * P::kValueRowBytes, v_map,
                   shared.values_full(stage), first_key + chunk * P::kValueRowBytes, channel_part, head);
  }
}

}  // namespace cosmos_fast::attention8

// Blocks that stay: as many as there are multiprocessors, each going through items, which are the query tiles
// of all heads, from its own number on in steps of the grid. The ring of tiles runs on from item to item: the
// producer fetches the next item's queries and first tiles while consumers are at the last of the one before,
// and the first scores of an item are computed beside the last values of the one before.
//
// Key tiles are numbered from the block's first to its last, over all items: the number gives stage and
// phase. "round" is the number of an item among those of the block that have keys: it gives the queries' slot
// and its phase.
#pragma once

#include "attention8.cuh"

namespace cosmos_fast::attention8 {

template <class C>
__device__ __forceinline__ int query_tiles(const Params& p) {
  return (p.num_queries + Plan<C>::kQueries - 1) / Plan<C>::kQueries;
}

// The first of a block's items, from this one on, that has keys, or one past all.
template <class C>
__device__ __forceinline__ int with_keys(const Params& p, int item) {
  if constexpr (C::sparse)
    while (item < p.num_items && __ldg(p.key_counts + item) == 0) item += gridDim.x;
  return item;
}

// One thread: every item that has keys.
template <class C>
__device__ void produce_items(const CUtensorMap* q_map, const CUtensorMap* k_map, const CUtensorMap* v_map,
                              const Shared<C>& shared, const Params& p) {
  int tile = 0, round = 0;
  for (int item = with_keys<C>(p, blockIdx.x); item < p.num_items; item = with_keys<C>(p, item + gridDim.x)) {
    const Tiles<C> tiles(p, item);
    const int head = item / query_tiles<C>(p), query_tile = item % query_tiles<C>(p);
    barrier_wait(shared.queries_empty(round), (round / Plan<C>::kQuerySlots & 1) ^ 1);
    copy_queries(q_map, shared, round, head, query_tile);
    produce_tiles(k_map, v_map, shared, tiles, head, tile);
    tile += tiles.count, ++round;
  }
}

// What is the same in all lanes, so that the compiler knows: it then keeps stages and descriptors in uniform
// registers, and fewer instructions stand between the products of a turn.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// One consumer warpgroup: what `Consumer::run_overlap` of lean versions does, without end. Turns go on
// through all items, so that at an end nobody waits for the others: all consumers have the same items of the
// same counts, so each turn that one passes another awaits, but for the very last, which is not passed.
template <class C>
__device__ void consume_items(const Params& p, const Shared<C>& shared, int warpgroup) {
  static_assert(C::lean && C::schedule == Schedule::kOverlap && C::late_sums && !C::q_registers &&
                !C::promote && C::cluster == 1);
  float s[Plan<C>::kScores];
  Tiles<C> tiles{};
  Consumer<C> c(p, shared, tiles, warpgroup, 0, 0);
  const int tiles_a_head = query_tiles<C>(p);
  // item: the one to be stored next; first: the first of its key tiles.
  int item = blockIdx.x, next = with_keys<C>(p, item), first = 0, round = 0;
  if (next < p.num_items) {
    c.load_queries(round), c.await_keys(first);
    c.open_turns();
  }
  c.start_scores(s, first);
  product_wait<0>(s);
  for (;;) {
    // The item that was computed, and those without keys up to the one that comes.
    for (; item < min(next, p.num_items); item += gridDim.x) {
      c.head = item / tiles_a_head;
      c.store(item % tiles_a_head);
      c.clear();
    }
    if (item >= p.num_items) return;

    // Here s holds the scores of the item's first tile.
    tiles = Tiles<C>(p, item);
    tiles.count = uniform(tiles.count);
    c.begin(item / tiles_a_head, item % tiles_a_head);
    c.queries = uniform(shared.queries(warpgroup, round));
    first = uniform(first);
    next = with_keys<C>(p, item + gridDim.x);
    c.release_keys(first);
    c.softmax(s, 0, c.scale_of(0));
    c.pack(s);
    c.rows.add(s);
    for (int i = 1; i < tiles.count; ++i) {
      const int before = first + i - 1;
      __builtin_assume(before >= 0);
      const float scale = c.scale_of(i);
      c.await_keys(first + i), c.await_values(before);
      c.await_turn();
      c.start_scores(s, first + i);
      c.start_values(before);
      c.pass_turn(false);
      product_wait<1>(s);
      c.release_keys(first + i);
      c.softmax(s, i, scale);
      c.finish_and_rescale();
      c.release_values(before);
      c.pack(s);
      c.rows.add(s);
    }

    // The last values, and beside them the first scores of the next item; at the end nobody reads these.
    c.arrive(shared.queries_empty(round++));
    first += tiles.count;
    const bool more = next < p.num_items;
    if (more) c.load_queries(round), c.await_keys(first);
    c.await_values(first - 1);
    c.await_turn();
    c.start_scores(s, first);
    c.start_values(first - 1);
    c.pass_turn(!more);
    product_wait<0>(c.out);
    pin(s);
    c.release_values(first - 1);
  }
}

}  // namespace cosmos_fast::attention8

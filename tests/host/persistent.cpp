// Blocks of the persistent 8-bit attention kernel on `machine.h`: every warpgroup multiplies the tiles of its
// items, in order and no others, and every query row gets the mean of its values.
//   persistent SEED RUNS
#include "attention8_persistent.cuh"

using namespace cosmos_fast;
using namespace cosmos_fast::attention8;
using machine::fail;

namespace {

struct Dense : Config {
  static constexpr int warpgroups = 3, keys = 96;
  static constexpr Schedule schedule = Schedule::kOverlap;
  static constexpr bool turns = true, vote = true, late_sums = true, lean = true, persistent = true;
};
struct Listed : Dense {
  static constexpr bool sparse = true;
};
struct Free : Listed {
  static constexpr bool turns = false;
};
struct Shallow : Listed {
  static constexpr int stages = 2;
};

struct Problem {
  int heads, queries, keys, grid;
  std::vector<std::vector<int>> lists;  // of each item
};

template <class C>
void run_block(const Problem& problem, const Params& p, int index, unsigned seed) {
  using P = Plan<C>;
  machine::Block block;
  block.draw.seed(seed);
  machine::block = &block;
  blockIdx.x = index, gridDim.x = problem.grid;
  const Shared<C> shared{1024};
  const auto init = [&](uint32_t at, int arrivals) { block.barriers[at] = {arrivals, arrivals}; };
  for (int slot = 0; slot < P::kQuerySlots; ++slot)
    init(shared.queries_full(slot), 1), init(shared.queries_empty(slot), C::warpgroups);
  for (int stage = 0; stage < C::stages; ++stage) {
    init(shared.keys_full(stage), 1), init(shared.values_full(stage), 1);
    init(shared.keys_empty(stage), C::warpgroups), init(shared.values_empty(stage), C::warpgroups);
  }
  if (block.barriers.size() != size_t(P::kBarriers)) fail("barriers in one place");
  const CUtensorMap q{'q', P::kQueryBytes}, k{'k', P::kKeyBytes}, v{'v', P::kValueChunk};
  machine::start(128 * C::warpgroups, [&] { produce_items<C>(&q, &k, &v, shared, p); });
  for (int w = 0; w < C::warpgroups; ++w) machine::start(128 * w, [&, w] { consume_items<C>(p, shared, w); });
  machine::run();

  const int tiles = (problem.queries + P::kQueries - 1) / P::kQueries;
  for (int w = 0; w < C::warpgroups; ++w) {
    const machine::Fiber& fiber = *block.fibers[1 + w];
    size_t at = 0;
    for (int item = index; item < problem.heads * tiles; item += problem.grid)
      for (int tile : problem.lists[item]) {
        const int head = item / tiles, row = item % tiles * P::kQueries;
        if (at >= fiber.scores.size() || 3 * at + 2 >= fiber.values.size()) fail("tiles left out");
        if (!(fiber.scores[at].queries == machine::Box{'q', 0, head, row})) fail("scores of other queries");
        if (!(fiber.scores[at].keys == machine::Box{'k', 0, head, tile * C::keys}))
          fail("scores of other keys");
        for (int part = 0; part < 3; ++part)
          if (!(fiber.values[3 * at + part] == machine::Box{'v', tile * C::keys + 32 * part, 0, head}))
            fail("other values");
        ++at;
      }
    if (fiber.values.size() != 3 * at || fiber.scores.size() != at + 1) fail("more tiles than listed");
  }
}

template <class C>
void run(Problem problem, std::mt19937& draw) {
  using P = Plan<C>;
  const int tiles = (problem.queries + P::kQueries - 1) / P::kQueries, items = problem.heads * tiles;
  const int columns = (problem.keys + C::keys - 1) / C::keys;
  std::vector<int> lists(items * columns), counts(items);
  problem.lists.assign(items, {});
  for (int item = 0; item < items; ++item) {
    for (int tile = 0; tile < columns; ++tile)
      if (!C::sparse || draw() % 3 == 0) problem.lists[item].push_back(tile);
    if (C::sparse && draw() % 3 == 0) problem.lists[item].clear();
    counts[item] = problem.lists[item].size();
    std::copy(problem.lists[item].begin(), problem.lists[item].end(), lists.begin() + item * columns);
  }
  std::vector<float> out(size_t(problem.queries) * problem.heads * 128, NAN), ones(problem.heads * 128, 1.0f);
  Params p{};
  p.out = out.data(), p.k_scale = p.v_scale = ones.data();
  p.key_tiles = lists.data(), p.key_counts = counts.data(), p.key_capacity = columns;
  p.out_row = problem.heads * 128, p.out_head = 128;
  p.num_queries = problem.queries, p.num_keys = problem.keys, p.num_items = items, p.scale_log2 = 1.0f;
  for (int b = 0; b < std::min(problem.grid, items); ++b) run_block<C>(problem, p, b, draw());
  for (int item = 0; item < items; ++item)
    for (int r = 0; r < P::kQueries; r += r % 64 ? 56 : 8) {  // rows of the first thread: 0 and 8 of every 64
      const int head = item / tiles, row = item % tiles * P::kQueries + r;
      if (row >= problem.queries) break;
      float mean = 0;
      for (int tile : problem.lists[item]) mean += hopper::value_of(head, tile) / counts[item];
      for (int c : {0, 1, 120})
        if (!(std::abs(out[row * p.out_row + head * 128 + c] - mean) < 1e-3f)) fail("output of other values");
    }
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937 draw(std::atoi(arguments[1]));
  for (int n = std::atoi(arguments[2]); n > 0; --n) {
    Problem problem{
        int(draw() % 3) + 1, int(draw() % 1500) + 1, 96 * (int(draw() % 11) + 1), int(draw() % 5) + 1, {}};
    run<Dense>(problem, draw);
    run<Listed>(problem, draw);
    run<Free>(problem, draw);
    run<Shallow>(problem, draw);
  }
  std::puts("ok");
}

// First-fit-decreasing bin packing in O(n log n).

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace phi4r {

// lengths[n], each in 1..capacity -> the bin of each item. Items go longest first (ties by index), each into the first
// bin with room. A segment tree over the bins holds in each node the most room below it, so the first bin with room is
// found by one walk down: left if anything fits there. There are never more bins than items, so the tree is full size
// from the start and an unopened bin is simply one with all its room.
inline std::vector<int32_t> pack_ffd(const int64_t* lengths, size_t n, int64_t capacity) {
  for (size_t i = 0; i < n; ++i) {
    if (lengths[i] < 1 || lengths[i] > capacity) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "] = " + std::to_string(lengths[i]) +
                                  " is not between 1 and the capacity " + std::to_string(capacity));
    }
  }
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  size_t leaves = 1;
  while (leaves < n) leaves *= 2;
  std::vector<int64_t> room(2 * leaves, capacity);
  std::vector<int32_t> bins(n);
  for (const int64_t item : order) {
    const int64_t length = lengths[item];
    size_t node = 1;
    while (node < leaves) {
      node *= 2;
      if (room[node] < length) ++node;
    }
    bins[item] = static_cast<int32_t>(node - leaves);
    room[node] -= length;
    while (node > 1) {
      node /= 2;
      room[node] = std::max(room[2 * node], room[2 * node + 1]);
    }
  }
  return bins;
}

}  // namespace phi4r

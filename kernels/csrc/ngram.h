// How often the n-grams of a token sequence repeat, counted exactly.

#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace phi4r {

struct NgramStatistics {
  int64_t num_ngrams = 0;          // max(n - ngram + 1, 0)
  int64_t num_over_threshold = 0;  // distinct n-grams that occur more than `threshold` times
  int64_t max_count = 0;           // of the most frequent one
};

// One pass with a rolling polynomial hash (mod 2^64) and an open-addressing table. A slot remembers where its n-gram
// first stood, and equal hashes are compared token by token, so a collision costs time and never a wrong count.
// hash_bits < 64 keeps only that many bits of the hash: a test's way to meet collisions.
inline NgramStatistics ngram_repetition(const int32_t* tokens, int64_t n, int64_t ngram, int64_t threshold,
                                        int hash_bits) {
  if (ngram < 1) throw std::invalid_argument("ngram must be positive");
  NgramStatistics result;
  if (n < ngram) return result;
  result.num_ngrams = n - ngram + 1;

  struct Slot {
    uint64_t hash = 0;
    int64_t first = -1;  // -1: empty
    int64_t count = 0;
  };
  uint64_t size = 16;
  while (size < 2 * static_cast<uint64_t>(result.num_ngrams)) size *= 2;
  std::vector<Slot> table(size);

  constexpr uint64_t kBase = 0x9E3779B97F4A7C15ull;  // odd, so multiplication by it loses nothing mod 2^64
  const uint64_t keep = hash_bits == 64 ? ~0ull : (1ull << hash_bits) - 1;
  const auto value = [&](int64_t i) { return static_cast<uint64_t>(static_cast<uint32_t>(tokens[i])) + 1; };
  uint64_t leading = 1;  // kBase^(ngram-1)
  uint64_t rolling = 0;
  for (int64_t i = 0; i < ngram; ++i) {
    rolling = rolling * kBase + value(i);
    if (i > 0) leading *= kBase;
  }
  for (int64_t at = 0;; ++at) {
    const uint64_t mixed = (rolling ^ (rolling >> 32)) * 0xD6E8FEB86659FD93ull;
    const uint64_t hash = (mixed ^ (mixed >> 32)) & keep;
    for (uint64_t index = hash & (size - 1);; index = (index + 1) & (size - 1)) {
      Slot& slot = table[index];
      if (slot.first < 0) slot = Slot{hash, at, 0};
      if (slot.hash != hash || !std::equal(tokens + at, tokens + at + ngram, tokens + slot.first)) continue;
      ++slot.count;
      if (slot.count == std::max<int64_t>(threshold, 0) + 1) ++result.num_over_threshold;
      result.max_count = std::max(result.max_count, slot.count);
      break;
    }
    if (at + ngram >= n) break;
    rolling = (rolling - leading * value(at)) * kBase + value(at + ngram);
  }
  return result;
}

}  // namespace phi4r

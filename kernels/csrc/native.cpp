// phi4r_kernels._native: host code on plain arrays, free of torch. Each function has a Python reference of the same
// meaning in phi4r/data/native.py, which also documents shapes and errors; the two agree exactly.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>

#include "ngram.h"
#include "packing.h"

namespace nb = nanobind;

namespace {

using Lengths = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bins = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;

Bins pack_ffd(Lengths lengths, int64_t capacity) {
  auto* bins = new std::vector<int32_t>();
  nb::capsule owner(bins, [](void* data) noexcept { delete static_cast<std::vector<int32_t>*>(data); });
  {
    nb::gil_scoped_release release;
    *bins = phi4r::pack_ffd(lengths.data(), lengths.shape(0), capacity);
  }
  return Bins(bins->data(), {bins->size()}, owner);
}

std::tuple<int64_t, int64_t, int64_t> ngram_repetition(Tokens tokens, int64_t ngram, int64_t threshold, int hash_bits) {
  if (hash_bits < 0 || hash_bits > 64) throw std::invalid_argument("hash_bits must be between 0 and 64");
  nb::gil_scoped_release release;
  const phi4r::NgramStatistics s =
      phi4r::ngram_repetition(tokens.data(), static_cast<int64_t>(tokens.shape(0)), ngram, threshold, hash_bits);
  return {s.num_ngrams, s.num_over_threshold, s.max_count};
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Native host code of phi4r: packing and n-gram statistics.";
  module.def("pack_ffd", &pack_ffd, nb::arg("lengths").noconvert(), nb::arg("capacity"),
             "Bin of each item by first-fit-decreasing: int64[n], capacity -> int32[n].");
  module.def("ngram_repetition", &ngram_repetition, nb::arg("tokens").noconvert(), nb::arg("ngram"), nb::arg("threshold"),
             nb::arg("hash_bits") = 64,
             "(n-grams, distinct n-grams above threshold, largest count) of int32[n]. hash_bits < 64 weakens the hash, "
             "so that a test meets collisions.");
}

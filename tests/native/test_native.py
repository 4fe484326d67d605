"""The C++ module and its Python reference give the same answer, and both give the right one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4r.data import native

try:
    from phi4r_kernels import _native
except ImportError:
    _native = None

needs_native = pytest.mark.skipif(_native is None, reason="phi4r_kernels._native is not built (no compiler?)")

packings = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)
# Few symbols, so that n-grams repeat; the int32 limits, so that no hash can assume small ids.
sequences = st.lists(st.sampled_from([0, 1, 2, -1, 2**31 - 1, -(2**31)]), max_size=120) | st.lists(
    st.integers(0, 1), max_size=300
)


def first_fit_by_definition(lengths: list[int], capacity: int) -> list[int]:
    room: list[int] = []
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for index in range(len(room)):
            if room[index] >= lengths[item]:
                break
        else:
            index = len(room)
            room.append(capacity)
        room[index] -= lengths[item]
        bins[item] = index
    return bins


def count_by_definition(tokens: list[int], ngram: int, threshold: int) -> tuple[int, int, int]:
    grams = [tuple(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1)]
    counts = {gram: grams.count(gram) for gram in set(grams)}
    return len(grams), sum(c > threshold for c in counts.values()), max(counts.values(), default=0)


@settings(max_examples=200, deadline=None)
@given(packings)
@pytest.mark.proves("The Python twin is first-fit decreasing", how="its definition, random lengths")
def test_the_python_packing_is_first_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    bins = native.pack_ffd_python(np.array(lengths, dtype=np.int64), capacity)
    assert bins.dtype == np.int32
    assert bins.tolist() == first_fit_by_definition(lengths, capacity)


@needs_native
@settings(max_examples=500, deadline=None)
@given(packings)
@pytest.mark.proves("Packing in C++ equals its Python twin", how="random lengths, to the last bit")
def test_packing_agrees_in_cpp_and_python(case: tuple[list[int], int]) -> None:
    lengths, capacity = np.array(case[0], dtype=np.int64), case[1]
    bins = _native.pack_ffd(lengths, capacity)
    assert bins.dtype == np.int32
    assert bins.tolist() == native.pack_ffd_python(lengths, capacity).tolist()


@needs_native
def test_packing_agrees_at_full_size() -> None:
    random = np.random.default_rng(0)
    lengths = np.minimum(1 + random.lognormal(7.5, 1.0, size=50_000).astype(np.int64), 32_768)
    bins = _native.pack_ffd(lengths, 32_768)
    assert np.array_equal(bins, native.pack_ffd_python(lengths, 32_768))
    assert np.bincount(bins, weights=lengths).max() <= 32_768


@settings(max_examples=200, deadline=None)
@given(sequences, st.integers(1, 6), st.integers(-1, 6))
def test_the_python_statistics_count_ngrams(tokens: list[int], ngram: int, threshold: int) -> None:
    result = native.ngram_repetition_python(np.array(tokens, dtype=np.int32), ngram, threshold)
    assert result == count_by_definition(tokens, ngram, threshold)


@needs_native
@settings(max_examples=500, deadline=None)
@given(sequences, st.integers(1, 6), st.integers(-1, 6), st.sampled_from([0, 1, 3, 64]))
@pytest.mark.proves(
    "Counts of repeated n-grams in C++ equal their Python twin",
    how="random tokens, hashes cut to 0 to 64 bits",
)
def test_ngram_statistics_agree_in_cpp_and_python_even_when_hashes_collide(
    tokens: list[int], ngram: int, threshold: int, hash_bits: int
) -> None:
    array = np.array(tokens, dtype=np.int32)
    result = _native.ngram_repetition(array, ngram, threshold, hash_bits)
    assert result == native.ngram_repetition_python(array, ngram, threshold)


@needs_native
def test_ngram_statistics_agree_on_a_long_response() -> None:
    random = np.random.default_rng(0)
    loop = np.tile(random.integers(0, 100_352, size=37), 300)
    tokens = np.concatenate([random.integers(0, 100_352, size=20_000), loop]).astype(np.int32)
    result = _native.ngram_repetition(tokens, 5, 5)
    assert result == native.ngram_repetition_python(tokens, 5, 5)
    assert result == (len(tokens) - 4, 37, 300)


@pytest.mark.parametrize(
    ("lengths", "capacity", "reason"),
    [
        ([3, 9], 8, r"lengths\[1\] = 9 is not between 1 and the capacity 8"),
        ([0], 8, r"lengths\[0\] = 0 is not"),
        ([-1], 8, r"lengths\[0\] = -1 is not"),
        ([1], 0, "capacity must be positive"),
        ([[1]], 8, "must be a vector"),
    ],
)
def test_bad_lengths_are_refused(lengths: list[int], capacity: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        native.pack_ffd(lengths, capacity)


@needs_native
def test_the_cpp_functions_check_their_own_input() -> None:
    with pytest.raises(ValueError, match=r"lengths\[1\] = 9 is not between"):
        _native.pack_ffd(np.array([3, 9]), 8)
    with pytest.raises(ValueError, match="ngram must be positive"):
        _native.ngram_repetition(np.zeros(3, dtype=np.int32), 0, 5)
    with pytest.raises(TypeError):
        _native.pack_ffd(np.array([3.0]), 8)


def test_empty_and_short_input_has_an_answer() -> None:
    assert native.pack_ffd([], 8).tolist() == []
    assert native.ngram_repetition([], 5, 5) == (0, 0, 0)
    assert native.ngram_repetition([1, 2, 3, 4], 5, 5) == (0, 0, 0)
    assert native.ngram_repetition([1, 1, 1, 1, 1], 5, 5) == (1, 0, 1)
    assert native.ngram_repetition(np.arange(20)[::2], 1, 0) == (10, 10, 1)


def backend_in_a_new_process(**env: str) -> str:
    code = (
        "from phi4r.data import native as n\n"
        "print(n.backend(), bool(n.reason()), n.pack_ffd([3, 6], 8).tolist())"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_environment_forces_the_python_references() -> None:
    assert backend_in_a_new_process(PHI4R_NATIVE="0") == "python True [1, 0]"


@needs_native
def test_the_cpp_module_is_used_when_it_is_there() -> None:
    assert backend_in_a_new_process(PHI4R_NATIVE="1") == "native False [1, 0]"

"""`phi4r data build`: the rows SFT would pack, the same bytes whatever happens, in bounded memory."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi4r.core.errors import UserError
from phi4r.data import build, mixture
from phi4r.data.packing import PackedRow
from phi4r.data.sft_data import build_sft_data
from phi4r.data.shards import ShardRows, read_index
from phi4r.data.tokenizer import Tokenizer
from tests.data import corpus

SMALL = build.Options(span_bytes=4096, shard_tokens=128 * 20)
ROOT = Path(__file__).resolve().parents[2]


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file of a finished build."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same_row(left: PackedRow, right: PackedRow) -> bool:
    names = ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens")
    pairs = [(getattr(left, name), getattr(right, name)) for name in names]
    return left.num_tokens == right.num_tokens and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(input file, folder built from it in many small parts and shards)."""
    folder = tmp_path_factory.mktemp("built")
    path = corpus.write_jsonl(folder / "in.jsonl", corpus.rows(300))
    build.main(corpus.config(path), folder / "out", SMALL)
    return path, folder / "out"


def test_the_rows_are_those_that_sft_packs_in_memory(built: tuple[Path, Path]) -> None:
    path, out = built
    config = corpus.config(path)
    expected = build_sft_data(config.data, Tokenizer.builtin(), config.seed)
    assert len(read_index(out)["shards"]["train"]) > 3
    for part, rows in (("train", expected.train_rows), ("heldout", expected.heldout_rows)):
        found = ShardRows(out, part)
        assert len(found) == len(rows)
        assert all(same_row(a, b) for a, b in zip(found, rows, strict=True))
    train = read_index(out)["statistics"]["train"]
    report = expected.report
    assert (train["documents"], train["tokens"]) == (report.train_documents, report.train_tokens)
    assert (train["targets"], train["rows"]) == (report.train_targets, report.train_rows)
    assert train["efficiency"] == pytest.approx(report.efficiency)
    assert read_index(out)["statistics"]["overlap"] == report.overlap > 0


def test_the_number_of_workers_changes_no_byte(built: tuple[Path, Path], tmp_path: Path) -> None:
    path, out = built
    build.main(corpus.config(path), tmp_path / "out", dataclasses.replace(SMALL, workers=2))
    assert digests(tmp_path / "out") == digests(out)


@pytest.mark.proves("A build killed at any moment goes on to the same bytes", how="kill -9")
def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    path, out = built
    program = (
        "import sys; from pathlib import Path; from phi4r.data import build; from tests.data import corpus;"
        "build.main(corpus.config(Path(sys.argv[1])), Path(sys.argv[2]),"
        " build.Options(span_bytes=4096, shard_tokens=2560))"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "out")]
    watched = tmp_path / "out"
    drawn, kills = random.Random(7), 0
    for files in (2, 9, 20, 40):
        started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while started.poll() is None and time.monotonic() < deadline:
            if sum(1 for _ in watched.rglob("*.*")) >= files:
                time.sleep(drawn.random() * 0.01)
                os.killpg(started.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        started.wait(timeout=60)
        if (watched / "index.json").exists():
            break
    assert kills >= 2
    assert not digests(watched).items() >= digests(out).items()
    assert subprocess.run(command, cwd=ROOT, timeout=120, check=False, capture_output=True).returncode == 0
    found = {name: value for name, value in digests(watched).items() if not name.endswith(".tmp")}
    assert found == digests(out)


def test_a_finished_build_is_left_alone_and_another_one_is_refused(
    built: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = built
    before = digests(out)
    build.main(corpus.config(path), out, SMALL)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="another seed: 0, now 1"):
        build.main(corpus.config(path, "seed=1"), out, SMALL)
    assert digests(out) == before


def test_parquet_gives_the_rows_of_jsonl(built: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = built
    table = pa.Table.from_pylist(corpus.rows(300))
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=70)
    build.main(corpus.config(tmp_path / "in.parquet"), tmp_path / "out", SMALL)
    pairs = zip(ShardRows(tmp_path / "out"), ShardRows(out), strict=True)
    assert all(same_row(a, b) for a, b in pairs)


def test_mixture_weights_are_epochs(tmp_path: Path) -> None:
    path = corpus.write_jsonl(tmp_path / "in.jsonl", corpus.rows(400))
    options = dataclasses.replace(SMALL, mixture="math=2.5, code=0")
    index = build.main(corpus.config(path, "data.heldout=0"), tmp_path / "out", options)
    clusters = index["statistics"]["clusters"]
    sources = Counter(row["source"] for row in corpus.rows(400))
    assert clusters["web"] == {**clusters["web"], "documents": sources["web"], "seen": sources["web"]}
    assert clusters["code"]["seen"] == 0
    # 2.5 epochs: each document twice, and a third time with probability a half (4 standard deviations).
    expected, spread = 2.5 * sources["math"], 4 * 0.5 * sources["math"] ** 0.5
    assert abs(clusters["math"]["seen"] - expected) < spread
    assert clusters["math"]["documents"] == sources["math"]
    seen: Counter[bytes] = Counter()
    for row in ShardRows(tmp_path / "out"):
        bounds = row.cu_seqlens[row.cu_seqlens <= row.num_tokens].tolist()
        seen.update(row.input_ids[a:b].tobytes() for a, b in itertools.pairwise(bounds))
    assert sum(seen.values()) == index["statistics"]["train"]["documents"]


def test_no_row_holds_a_document_twice(tmp_path: Path) -> None:
    """Documents all of different lengths: packed together, the copies of one would be neighbours."""
    content = [
        {"id": f"p{i}", "problem": f"{i}+1?", "answer": "3", "trace": "1" * i, "source": "math"}
        for i in range(1, 40)
    ]
    path = corpus.write_jsonl(tmp_path / "in.jsonl", content)
    options = dataclasses.replace(SMALL, mixture="math=3")
    build.main(corpus.config(path, "data.heldout=0"), tmp_path / "out", options)
    rows = [(row, itertools.pairwise(row.cu_seqlens.tolist())) for row in ShardRows(tmp_path / "out")]
    documents = [[row.input_ids[a:b].tobytes() for a, b in pairs] for row, pairs in rows]
    assert sum(map(len, documents)) > 3 * 39
    assert all(len(set(row)) == len(row) for row in documents)


def test_a_fraction_of_an_epoch_does_not_depend_on_the_other_documents() -> None:
    ids = np.arange(1000, dtype=np.uint64) * np.uint64(2**40 + 7)
    cluster = np.zeros(1000, np.int32)
    all_of_them = mixture.copies(ids, cluster, ["a/1"], {"a": 0.3}, seed=3)
    half = mixture.copies(ids[::2], cluster[::2], ["a/1"], {"a": 0.3}, seed=3)
    assert np.array_equal(all_of_them[::2], half)
    assert abs(all_of_them.mean() - 0.3) < 4 * (0.21 / 1000) ** 0.5
    assert not np.array_equal(all_of_them, mixture.copies(ids, cluster, ["a/1"], {"a": 0.3}, seed=4))


def test_a_weight_for_nobody_is_an_error() -> None:
    with pytest.raises(UserError, match="no document is in cluster 'maths' \\(there are: code, math\\)"):
        mixture.copies(np.zeros(1, np.uint64), np.zeros(1, np.int32), ["math", "code"], {"maths": 2.0}, 0)
    with pytest.raises(UserError, match='expected "cluster=epochs'):
        mixture.parse("math=two")


def test_a_bad_row_stops_the_build_with_its_place_or_is_set_aside(tmp_path: Path) -> None:
    content = corpus.rows(60)
    del content[41]["answer"]
    content[50]["id"] = content[3]["id"]
    path = corpus.write_jsonl(tmp_path / "in.jsonl", content)
    with pytest.raises(UserError, match=r"in.jsonl:42: field 'answer'"):
        build.main(corpus.config(path), tmp_path / "stopped", dataclasses.replace(SMALL, workers=2))
    index = build.main(corpus.config(path, "data.on_bad_row=skip"), tmp_path / "skipped", SMALL)
    assert index["statistics"]["rows_read"] == 60
    assert index["statistics"]["rejected"] == 2
    content[41]["answer"] = "1"
    path = corpus.write_jsonl(tmp_path / "again.jsonl", content)
    with pytest.raises(UserError, match=r"again.jsonl:51: field 'id': already used"):
        build.main(corpus.config(path), tmp_path / "repeated", SMALL)


def test_documents_beyond_a_row_follow_the_length_rule(tmp_path: Path) -> None:
    content = corpus.rows(60)
    content[7]["trace"] = "1+2=3;" * 60
    path = corpus.write_jsonl(tmp_path / "in.jsonl", content)
    with pytest.raises(UserError, match=r"p7 has \d+ tokens, data\.seq_length is 128"):
        build.main(corpus.config(path), tmp_path / "error", SMALL)
    for rule, key in (("skip", "left_out"), ("truncate", "truncated")):
        config = corpus.config(path, f"data.on_long={rule}")
        assert build.main(config, tmp_path / rule, SMALL)["statistics"][key] == 1


def peak_mib(path: Path, out: Path) -> float:
    """Largest resident set of a build in one process. Not ru_maxrss: that of a child begins with its
    parent's."""
    program = (
        "import re, sys; from pathlib import Path; from phi4r.data import build;"
        "from tests.data import corpus;"
        "build.main(corpus.config(Path(sys.argv[1])), Path(sys.argv[2]), build.Options(span_bytes=2**18,"
        " shard_tokens=2**16));"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024)"
    )
    command = [sys.executable, "-c", program, str(path), str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    return float(ended.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_grows_by_the_tables_only(tmp_path: Path) -> None:
    """20,000 rows hold 2.4M tokens: 10 MiB as int32, many times that as Python objects. What may grow is some
    50 bytes a document, a few times over while rows are planned."""
    few = corpus.write_jsonl(tmp_path / "few.jsonl", corpus.rows(1_000))
    many = corpus.write_jsonl(tmp_path / "many.jsonl", corpus.rows(20_000))
    peak = peak_mib(many, tmp_path / "many")
    grown = peak - peak_mib(few, tmp_path / "few")
    assert grown * 2**20 < 19_000 * 600
    assert peak < 600

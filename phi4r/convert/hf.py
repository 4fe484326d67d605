"""`phi4r convert hf-to-phi4r SRC DST` and `phi4r convert phi4r-to-hf SRC DST`.

Both directions stream: memory holds one tensor (and what rearranging it needs), never the model. Values are
not touched: bf16 stays bf16 and fp32 stays fp32, bit for bit. DST appears whole or not at all.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from phi4r.core.console import Progress, is_main_rank, say
from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_json
from phi4r.data.tokenizer import Tokenizer
from phi4r.families.hf_config import hf_config
from phi4r.families.model import Dtype
from phi4r.models.huggingface import (
    INDEX,
    TOKENIZER_FILES,
    HFWeights,
    ShardWriter,
    plan_shards,
    read_hf_config,
    read_raw_config,
    shard_names,
)
from phi4r.train.folders import (
    DIST,
    MANIFEST,
    TOKENIZER,
    Manifest,
    read_manifest,
    resolve_checkpoint,
    write_manifest,
)

SHARD_BYTES = 5_000_000_000
"""Largest safetensors shard, as transformers cuts them."""
CARRIED = "hf"
"""Folder in a converted checkpoint that keeps what a Hugging Face folder says beside weights and
tokenizer.
"""

Direction = Literal["hf-to-phi4r", "phi4r-to-hf"]


def main(direction: Direction, src: str | Path, dst: str | Path, parallel: Any = None) -> None:
    """Convert SRC to the new folder DST.

    parallel: a ParallelConfig, accepted so that scripts may say for which layout they convert; the checkpoint
    format has no layout in it, so it changes nothing. Where several ranks were started, rank 0 converts.
    Raises UserError for anything wrong with SRC or DST.
    """
    if not is_main_rank():
        return
    src, dst = Path(src), Path(dst)
    if direction == "hf-to-phi4r":
        hf_to_phi4r(src, dst)
    else:
        phi4r_to_hf(src, dst)
    say(f"wrote {dst}")


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A temporary folder that becomes `dst` when the block ends without an error, and is deleted
    otherwise.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: exists already; give a new folder")
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = dst.parent / f".tmp-{dst.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(dst)
    except BaseException as error:
        shutil.rmtree(temporary)
        if isinstance(error, OSError):
            raise UserError(f"{dst}: cannot be written: {error}") from None
        raise


def _progress(num_tensors: int) -> Progress:
    return Progress("tensors", num_tensors, every=max(1, num_tensors // 8))


# --- Hugging Face -> phi4r


def hf_to_phi4r(src: Path, dst: Path) -> None:
    """Write the checkpoint folder `dst` (weights only, step 0) from the Hugging Face folder `src`."""
    import torch

    from phi4r.convert.stream import StreamWriter
    from phi4r.models.names import hf_tensors, read, to_mcore, weight_table

    model = read_hf_config(src)
    weights = HFWeights(src)
    weights.check(hf_tensors(model))
    # Files count, not what the config says of them: nothing is cast.
    model = replace(model, dtype=weights.dtype)
    table = weight_table(model)
    with new_folder(dst) as folder, torch.no_grad(), _progress(len(table)) as progress:
        writer = StreamWriter(folder / DIST, model.num_layers)
        for done, weight in enumerate(table, start=1):
            writer.write(weight, to_mcore(weight, read(weight, weights.get_tensor)))
            progress.update(done, {"tensor": weight.hf})
        writer.finish()
        names = _copy(src, folder / TOKENIZER, TOKENIZER_FILES)
        _copy(src, folder / CARRIED, ("config.json", "generation_config.json"))
        write_manifest(folder, Manifest(step=0, model=model, tokenizer=names, source=str(src.resolve())))
    if not names:
        say(f"note: {src} has no tokenizer files; {dst} holds weights only")


def _copy(src: Path, dst: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(name for name in names if (src / name).is_file())
    for name in found:
        dst.mkdir(exist_ok=True)
        shutil.copyfile(src / name, dst / name)
    return found


# --- phi4r -> Hugging Face


def phi4r_to_hf(src: Path, dst: Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write the Hugging Face folder `dst` from a checkpoint or run folder (its newest checkpoint) of any
    layout.
    """
    import torch

    from phi4r.convert.stream import StreamReader
    from phi4r.models.names import from_mcore, hf_tensors, parts, weight_table

    kind, checkpoint = resolve_checkpoint(src)
    if kind != "phi4r":
        raise UserError(
            f"{src}: a Hugging Face folder, expected a phi4r checkpoint ({MANIFEST}) or a run folder"
        )
    manifest = read_manifest(checkpoint)
    table = weight_table(manifest.model)
    reader = StreamReader(checkpoint / DIST, table)
    names: dict[torch.dtype, Dtype] = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
    dtype = names[reader.dtype]
    model = replace(manifest.model, dtype=dtype)
    tensors = list(hf_tensors(model).items())
    shards = plan_shards(tensors, dtype, max_shard_bytes)
    ready = (part for weight in table for part in parts(weight, from_mcore(weight, reader.read(weight))))
    weight_map = {}
    with new_folder(dst) as folder, torch.no_grad(), _progress(len(tensors)) as progress:
        for file_name, shard in zip(shard_names(len(shards)), shards, strict=True):
            with ShardWriter(folder / file_name, shard, dtype) as writer:
                for name, tensor in itertools.islice(ready, len(shard)):
                    writer.write(name, tensor)
                    weight_map[name] = file_name
                    progress.update(len(weight_map), {"tensor": name})
        if len(shards) > 1:
            size = model.num_parameters * reader.dtype.itemsize
            atomic_write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _copy(checkpoint / TOKENIZER, folder, manifest.tokenizer)
        _write_configs(checkpoint, folder, manifest, model)
    if not manifest.tokenizer:
        say(f"note: {checkpoint} has no tokenizer; {dst} holds weights only")


def _write_configs(checkpoint: Path, folder: Path, manifest: Manifest, model: Any) -> None:
    carried = checkpoint / CARRIED
    base = read_raw_config(carried) if (carried / "config.json").is_file() else {}
    eos_ids: tuple[int, ...] = ()
    pad_id = None
    if manifest.tokenizer and not base:
        tokenizer = Tokenizer.load(checkpoint / TOKENIZER)
        eos_ids, pad_id = tokenizer.eos_ids, tokenizer.pad
    atomic_write_json(folder / "config.json", hf_config(model, base, eos_ids, pad_id))
    if not _copy(carried, folder, ("generation_config.json",)) and eos_ids:
        recommended = asdict(model.description.sampling)
        generation = {"do_sample": True, "eos_token_id": list(eos_ids), "pad_token_id": pad_id, **recommended}
        text = json.dumps(generation, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")

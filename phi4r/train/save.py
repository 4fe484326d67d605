"""Writing checkpoints while training goes on.

`CheckpointSaver.begin` is collective and short: it plans which rank stores what, and copies this rank's part
into host memory. A thread then writes the copy; it takes part in no collective, so that it cannot meet those
of the training steps. `poll`, called between steps, asks whether all ranks are done; then rank 0 adds the
index and the manifest and renames the folder. Until then nothing is visible, and a process that dies leaves a
`.tmp-*` folder that the next start clears away.

The files are megatron-core's `torch_dist` (`phi4r.train.checkpoint` loads them). Its own asynchronous writers
are forked processes, which neither CUDA nor threads like; ours is a thread, because torch.save and CRC-32
hold the interpreter only for moments.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from phi4r.configs.sections import ModelConfig
from phi4r.core.errors import UserError
from phi4r.parallel.layout import broadcast_object
from phi4r.train import folders
from phi4r.train.checkpoint import (
    fill_adam_state,
    on_main_rank,
    optimizer_kind,
    optimizer_parts,
    quiet,
    sharded_state,
)
from phi4r.train.folders import DIST, TOKENIZER, Manifest
from phi4r.train.retention import Retention
from phi4r.train.state_chunks import state_chunks

WEIGHTS, OPTIMIZER = "weights", "optimizer"
"""What a rank's two data files are called: `__<rank>_weights.distcp`, `__<rank>_optimizer.distcp`."""


class CheckpointError(UserError):
    """A checkpoint could not be written; earlier ones are as they were. Raised on every rank."""


class SavesFiles(Protocol):
    """A tokenizer, as far as a checkpoint cares."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has become visible."""

    step: int
    folder: Path
    num_bytes: int
    """All ranks' data."""
    stall_s: float
    """Seconds that training stood still for it on this rank."""
    write_s: float
    """Seconds that the slowest rank's thread took."""


# --- one rank's files


class ChunkFile:
    """A `torch_dist` data file that is written chunk after chunk. `crc32` is that of the bytes as they were
    handed to the operating system, so that it shows what goes wrong on their way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.crc32 = 0
        self.num_bytes = 0
        self._file = open(path, "wb")

    def write(self, data: Any) -> int:
        """What torch.save calls."""
        self.crc32 = zlib.crc32(data, self.crc32)
        written = self._file.write(data)
        self.num_bytes += written
        return written

    def flush(self) -> None:
        """What torch.save calls at the end of a tensor."""

    def save(self, value: Any) -> None:
        """Append what torch.save makes of a value. Raises OSError where the file cannot take it."""
        try:
            # torch asks for no more of a file than write and flush
            torch.save(value, self)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch puts an error of its own before the file's (a full disk)
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def add(self, item: WriteItem, data: Tensor | io.BytesIO) -> WriteResult:
        """Append a chunk."""
        start = self.num_bytes
        if isinstance(data, Tensor):
            # torch.save would write all of the storage that a view looks at
            is_view = data.untyped_storage().nbytes() != data.nbytes
            self.save(data.clone() if is_view else data)
        else:
            self.write(data.getbuffer())
        length = self.num_bytes - start
        return WriteResult(item.index, length, _StorageInfo(self.path.name, start, length))

    def close(self, sync: bool) -> None:
        """End the file, on the disk if `sync`."""
        try:
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


@contextmanager
def open_chunk_file(path: Path) -> Iterator[ChunkFile]:
    """A new `ChunkFile`, brought to the disk at the end of the block. An OSError says which file it was."""
    file = ChunkFile(path)
    try:
        try:
            yield file
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                file.close(sync=False)
            raise
        file.close(sync=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@dataclass
class _Written:
    """What a rank's thread reports."""

    results: list[WriteResult] = field(default_factory=list)
    crc32: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    manifest: Manifest
    temporary: Path
    began: float
    chunks: list[tuple[WriteItem, Tensor | io.BytesIO]]
    common: Any
    written: _Written = field(default_factory=_Written)
    bug: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)
    stall_s: float = 0.0


class _Plan(SaveShardedStrategy):
    """The strategy that megatron-core's parallelisation wrapper wants; only its sharing-out is used."""

    can_handle_sharded_objects = True

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        raise AssertionError("CheckpointSaver writes the files")


# --- the saver


class CheckpointSaver:
    """Writes the checkpoints of one model and optimizer into one run folder.

    All methods are collective: every rank calls them with the same arguments in the same order.
    """

    def __init__(
        self,
        run_dir: str | Path,
        chunks: Sequence[nn.Module],
        optimizer: Any | None,
        *,
        model_cfg: ModelConfig,
        tokenizer: SavesFiles | None = None,
        layout: dict[str, Any] | None = None,
        retention: Retention | None = None,
        background: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        """chunks: this rank's model chunks, wrapped or not. optimizer: megatron-core's, or None for weights
        only. background: `begin` returns while a thread writes; else it writes itself. timeout_s: how long
        `wait` waits for the thread.
        """
        self.run_dir, self.chunks, self.optimizer = Path(run_dir), chunks, optimizer
        self.model_cfg, self.tokenizer, self.layout = model_cfg, tokenizer, layout or {}
        self.retention, self.background, self.timeout_s = retention or Retention(), background, timeout_s
        if dist.get_rank() == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self.pending: _Pending | None = None
        """The checkpoint that was begun and is not visible yet, the same on all ranks."""
        self._plan: SavePlan | None = None
        self._index: Metadata | None = None
        self._share_out: Any = None
        self._buffers: dict[Any, Tensor] = {}
        self._cleaner: threading.Thread | None = None

    def begin(self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Copy what the checkpoint of `step` needs and start writing it; `poll` or `wait` finishes it.

        state: small, JSON-able and the same on all ranks; rank 0's is kept. metrics: what retention may look
        at. Raises CheckpointError where the folder cannot be made.
        """
        assert self.pending is None, "one checkpoint at a time: call wait first"
        began = time.perf_counter()
        finish_param_gather(self.chunks)
        temporary = on_main_rank(lambda: folders.begin(self.run_dir, step), CheckpointError)
        kind = optimizer_kind(self.optimizer)
        manifest = Manifest(step, self.model_cfg, self.layout, kind, state, metrics=dict(metrics or {}))
        with quiet():
            chunks, common = self._snapshot()
        self.pending = pending = _Pending(step, manifest, temporary, began, chunks, common)
        if self.background:
            threading.Thread(target=self._write, args=(pending,), name="checkpoint", daemon=True).start()
        else:
            self._write(pending)
        pending.stall_s = time.perf_counter() - began

    def poll(self) -> Saved | None:
        """The checkpoint that was begun, once all ranks have written their parts; None before that, or
        without one. Raises CheckpointError if a rank could not write."""
        if self.pending is None:
            return None
        done = torch.tensor(int(self.pending.done.is_set()), device=_device())
        if dist.get_world_size() > 1:
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return self._finish() if int(done) else None

    def wait(self) -> Saved | None:
        """Like `poll`, but waits for the threads of all ranks."""
        return self._finish() if self.pending is not None else None

    def close(self) -> None:
        """Wait for the deletion of retired checkpoints."""
        if self._cleaner is not None:
            self._cleaner.join()

    # --- in the training thread

    def _snapshot(self) -> tuple[list[tuple[WriteItem, Tensor | io.BytesIO]], Any]:
        """This rank's chunks in host memory, and the state that is no tensor."""
        if self.optimizer is not None:
            fill_adam_state(self.optimizer)
        tree = sharded_state(self.chunks, self.optimizer, is_loading=False)
        states = self._states(tree)
        # What belongs together is checked once: models and layouts do not change within a run.
        sharded, common = save_preprocess(tree, self._plan is None)
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        if group.size() > 1:
            if self._share_out is None:
                self._share_out = FullyParallelSaveStrategyWrapper(_Plan(), group, True)
            self._share_out.apply_saving_parallelization(sharded)
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(tensors, False), None, dist.get_rank() == 0)
        local = planner.create_local_plan()
        local = replace(local, items=[*local.items, *(item for item, _ in states)])
        if self._plan is None:
            self._make_plan(planner, local)
        assert self._plan is not None
        assert len(local.items) == len(self._plan.items), "the model has changed since the first checkpoint"
        own = {item.index: value for item, value in states}
        chunks: list[tuple[WriteItem, Tensor | io.BytesIO]] = []
        for item in self._plan.items:
            data = own[item.index] if item.index in own else planner.resolve_data(item)
            chunks.append((item, self._copy(item.index, data) if isinstance(data, Tensor) else data))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return chunks, common

    def _states(self, tree: dict[str, Any]) -> list[tuple[WriteItem, Tensor]]:
        """What this rank stores of a distributed optimizer's state."""
        if self.optimizer is None:
            return []
        model = {name: entries for name, entries in tree.items() if name != "optimizer"}
        return state_chunks(optimizer_parts(self.optimizer), model)

    def _make_plan(self, planner: MCoreSavePlanner, local: SavePlan) -> None:
        """Agree once on who writes what (`_plan`) and on the index of all chunks (`_index`, rank 0)."""
        size = dist.get_world_size()
        plans: list[Any] = gather(local)
        mine: list[Any] = [None]
        if dist.get_rank() == 0:
            plans, self._index = planner.create_global_plan(plans)
            mine = plans[:1]
        if size > 1:
            dist.scatter_object_list(mine, plans if dist.get_rank() == 0 else None)
        self._plan = planner.finish_plan(mine[0])

    def _copy(self, key: Any, tensor: Tensor) -> Tensor:
        """A copy in host memory (page-locked where there is a GPU), in a buffer that is kept for the next
        time."""
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)

    # --- in the writing thread: no collectives here

    def _write(self, pending: _Pending) -> None:
        began = time.perf_counter()
        try:
            self._write_files(pending)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else f"{pending.temporary}: "
            pending.written.error = f"{where}{error.strerror or error}"
        except Exception as error:  # noqa: BLE001  (a bug: raised again by `_finish`, in the training thread)
            pending.bug = error
            pending.written.error = f"{type(error).__name__}: {error}"
        pending.chunks = []
        pending.written.seconds = time.perf_counter() - began
        pending.done.set()

    def _write_files(self, pending: _Pending) -> None:
        written, folder = pending.written, pending.temporary
        for kind in (WEIGHTS, OPTIMIZER):
            mine = [
                c for c in pending.chunks if c[0].index.fqn.startswith("optimizer") == (kind == OPTIMIZER)
            ]
            if mine:
                name = f"{DIST}/__{dist.get_rank()}_{kind}.distcp"
                with open_chunk_file(folder / name) as file:
                    written.results += [file.add(item, data) for item, data in mine]
                written.crc32[name] = file.crc32
                written.num_bytes += file.num_bytes
        if dist.get_rank() == 0:
            with open_chunk_file(folder / DIST / "common.pt") as file:
                file.save(pending.common)
            save_config(CheckpointingConfig("torch_dist", 1), str(folder / DIST))
            if self.tokenizer is not None:
                self.tokenizer.save(folder / TOKENIZER)

    # --- in the training thread again

    def _finish(self) -> Saved:
        pending, self.pending = self.pending, None
        assert pending is not None
        began = time.perf_counter()
        written, problem = pending.written, ""
        if not pending.done.wait(self.timeout_s):
            problem = f"{pending.temporary}: not written within {self.timeout_s:g} s (parallel.timeout_s)"
        elif pending.bug is not None:
            raise pending.bug
        report = (problem or written.error, written.num_bytes, written.seconds)
        reports: list[Any] = [report]
        if dist.get_world_size() > 1:
            reports = [None] * dist.get_world_size()
            dist.all_gather_object(reports, report)
        for rank, (error, _, _) in enumerate(reports):
            if error:
                self._give_up(pending, f"{error} (rank {rank})")
        parts = gather((written.results, written.crc32))
        try:
            folder = on_main_rank(lambda: self._publish(pending, parts), CheckpointError)
        except CheckpointError as error:
            self._give_up(pending, str(error))
        _, sizes, seconds = zip(*reports, strict=True)
        stall_s = pending.stall_s + time.perf_counter() - began
        return Saved(pending.step, folder, sum(sizes), stall_s, max(seconds))

    def _give_up(self, pending: _Pending, reason: str) -> NoReturn:
        """Remove what was written and raise CheckpointError, on all ranks."""

        def clear() -> str:
            shutil.rmtree(pending.temporary, ignore_errors=True)
            newest = folders.find_latest(self.run_dir)
            return f"the newest whole one is {newest}" if newest else "there is no earlier one"

        left = broadcast_object(clear() if dist.get_rank() == 0 else None)
        raise CheckpointError(f"checkpoint of step {pending.step}: {reason}; {left}")

    def _publish(self, pending: _Pending, parts: list[Any]) -> Path:
        """Index, manifest, name, retention: on rank 0. parts: (write results, checksums) of every rank."""
        assert self._index is not None
        FileSystemWriter(pending.temporary / DIST).finish(self._index, [results for results, _ in parts])
        names: tuple[str, ...] = ()
        if self.tokenizer is not None:
            names = tuple(sorted(path.name for path in (pending.temporary / TOKENIZER).iterdir()))
        known = {name: value for _, checksums in parts for name, value in checksums.items()}
        manifest = replace(pending.manifest, tokenizer=names)
        folders.write_manifest(pending.temporary, manifest, known)
        folder = folders.reveal(self.run_dir, pending.step, pending.temporary)
        self._delete(folders.retire(self.run_dir, self.retention))
        return folder

    def _delete(self, trashes: list[Path]) -> None:
        """Delete retired checkpoints, which may take a while on a shared disk, beside the training."""

        def delete() -> None:
            for trash in trashes:
                shutil.rmtree(trash, ignore_errors=True)

        self.close()
        self._cleaner = threading.Thread(target=delete, name="checkpoint-cleaner")
        self._cleaner.start()
        if not self.background:
            self.close()


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    chunks: Sequence[nn.Module],
    optimizer: Any | None,
    *,
    state: dict[str, Any],
    model_cfg: ModelConfig,
    tokenizer: SavesFiles | None = None,
    layout: dict[str, Any] | None = None,
    retention: Retention | None = None,
) -> Path:
    """Write RUN/checkpoints/step_<step> at once and return it; the arguments are `CheckpointSaver`'s.
    Collective."""
    saver = CheckpointSaver(
        run_dir, chunks, optimizer, model_cfg=model_cfg, tokenizer=tokenizer, layout=layout,
        retention=retention,
    )  # fmt: skip
    saver.begin(step, state)
    saved = saver.wait()
    assert saved is not None
    return saved.folder


def gather(value: Any) -> list[Any]:
    """Every rank's picklable value on rank 0, and [] on the others."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None)
    return values


def finish_param_gather(chunks: Sequence[nn.Module]) -> None:
    """With overlapped gathering the optimizer's new weights reach the model only in the next forward pass:
    fetch them.
    """
    for chunk in chunks:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )

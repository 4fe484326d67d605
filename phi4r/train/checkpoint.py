"""Loading training through megatron-core's dist_checkpointing (`torch_dist` format), in any layout.

The format has no layout in it: a tensor is stored once under its global name, each rank asks for its part.
Saving is in `phi4r.train.save`; folders and what makes a checkpoint whole in `phi4r.train.folders`.

The states of a distributed optimizer are read by `phi4r.train.state_chunks`, all else by megatron-core.

megatron-core 0.16.1 without transformer-engine or apex cannot resume its distributed optimizer by itself. The
two work-rounds are `fill_adam_state` and `unshare_steps`; `WORK_ROUNDS` names them so that a test can leave
each one out and see what breaks. (A third fault is in its code for the states.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch import nn

from phi4r.configs.sections import ModelConfig
from phi4r.core.errors import UserError
from phi4r.models.huggingface import HFWeights
from phi4r.models.names import hf_tensors, load_weights, local_weights, shard, unwrap
from phi4r.train import folders
from phi4r.train.folders import (
    DIST,
    Manifest,
    read_manifest,
    read_model_config,
    resolve_checkpoint,
)
from phi4r.train.state_chunks import load_states, states_left_out

T = TypeVar("T")

WORK_ROUNDS = {
    "fill_adam_state": "a fresh AdamW has no state, but DistributedOptimizer.state_dict wants a common step",
    "unshare_steps": "all loaded parameters share one step tensor, so AdamW counts a step once per parameter",
}


class DamagedError(UserError):
    """A checkpoint whose bytes are not those that were written. Raised on every rank."""


# --- load


def load_checkpoint(
    path: str | Path,
    chunks: Sequence[nn.Module],
    optimizer: Any | None = None,
    *,
    leave_out: Collection[str] = (),
) -> dict[str, Any]:
    """Fill the model chunks, and the optimizer if given, from a phi4r checkpoint folder; returns the saved
    `state`.

    Collective. Any layout loads any checkpoint; values are cast to the dtype of the parameters. Without
    `optimizer` only weights are read (a trainer then calls the optimizer's `reload_model_params`). Every byte
    of the folder is checked first, each rank reading its share. Raises DamagedError for a damaged folder,
    UserError for another model or another kind of optimizer. leave_out: names from `WORK_ROUNDS` to skip
    (tests only).
    """
    folder = Path(path)
    check_bytes(folder)
    manifest = on_main_rank(lambda: read_manifest(folder))
    _check_model(folder, manifest.model, chunks)
    if optimizer is not None:
        _check_optimizer(folder, manifest, optimizer)
        if "fill_adam_state" not in leave_out:
            fill_adam_state(optimizer)
    location = str(folder / DIST)
    strategy: Any = get_default_load_sharded_strategy(location)
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    tree = sharded_state(chunks, optimizer, is_loading=True)
    with quiet():
        loaded = dist_checkpointing.load(tree, location, sharded_strategy=strategy)
    for index, chunk in enumerate(chunks):
        result = unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("._extra_state")]
        assert not missing, f"not loaded: {missing}"
        assert not result.unexpected_keys, f"left over: {result.unexpected_keys}"
    if optimizer is not None:
        if manifest.optimizer == "plain":
            # megatron-core's plain optimizers leave a step of 0 out when they save
            plain = loaded["optimizer"].get("optimizer", loaded["optimizer"])
            plain["state"].setdefault("common_step", torch.tensor(0.0))
        parts = optimizer_parts(optimizer)
        with states_left_out(parts):
            optimizer.load_state_dict(loaded["optimizer"])
        load_states(folder / DIST, parts, sharded_state(chunks, None, is_loading=True))
        if "unshare_steps" not in leave_out:
            unshare_steps(optimizer)
    dist.barrier()
    return manifest.state


def check_bytes(folder: Path) -> None:
    """DamagedError on every rank, naming the file, unless all bytes of a checkpoint are those that were
    written. Collective: every rank reads a share of the files."""
    found = folders.damage(folder, dist.get_rank(), dist.get_world_size())
    if dist.get_world_size() > 1:
        lists: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(lists, found)
        found = [problem for part in lists for problem in part]
    if found:
        more = len(set(found)) - 1
        raise DamagedError(found[0] + (f" (and {more} more files)" if more else ""))


def load_model(path: str | Path, chunks: Sequence[nn.Module]) -> None:
    """Fill the model chunks with the weights of a checkpoint, run or Hugging Face folder. Collective.

    Values are cast to the dtype of the parameters. Raises UserError for anything that is not a model of this
    size.
    """
    kind, folder = on_main_rank(lambda: resolve_checkpoint(path))
    if kind == "phi4r":
        load_checkpoint(folder, chunks)
        return
    model, weights = read_model_config(folder), HFWeights(folder)
    weights.check(hf_tensors(model))
    _check_model(folder, model, chunks)
    tp, tp_rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    load_weights(chunks, model, weights.get_tensor, tp_rank, tp)
    dist.barrier()


def _check_model(folder: Path, model: ModelConfig, chunks: Sequence[nn.Module]) -> None:
    """UserError naming the first parameter whose size is not the checkpoint's.

    megatron-core itself lets vocabularies of another size pass and fills the rest with zeros.
    """
    tp, tp_rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    num_layers = unwrap(chunks[0]).get_submodule("decoder").config.num_layers  # type: ignore[union-attr]
    if num_layers != model.num_layers:
        raise UserError(f"{folder}: a model of {model.num_layers} layers, expected {num_layers}")
    for weight, parameter in local_weights(chunks, model):
        local = shard(weight, torch.empty(weight.shape, device="meta"), tp_rank, tp).shape
        if local != parameter.shape:
            raise UserError(
                f"{folder}: {weight.hf} is {list(weight.shape)}, which at tp {tp} gives {list(local)}, "
                f"but the model to fill has {list(parameter.shape)}"
            )


def optimizer_kind(optimizer: Any | None) -> Any:
    if optimizer is None:
        return ""
    return "distributed" if hasattr(optimizer_parts(optimizer)[0], "gbuf_ranges") else "plain"


def _check_optimizer(folder: Path, manifest: Manifest, optimizer: Any) -> None:
    kind = optimizer_kind(optimizer)
    if not manifest.optimizer:
        raise UserError(
            f"{folder}: holds weights only, so training cannot be resumed from it "
            "(init.checkpoint can start from it)"
        )
    if manifest.optimizer != kind:
        flag = {"distributed": "true", "plain": "false"}
        raise UserError(
            f"{folder}: saved with parallel.distributed_optimizer = {flag[manifest.optimizer]}, "
            f"resumed with {flag[kind]}"
        )


# --- what is stored


def sharded_state(chunks: Sequence[nn.Module], optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        # The other formats are tied to one layout, or dead in this version of megatron-core.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    model = {
        f"model{index}": {
            # Layers say that they have an extra state: None, or transformer-engine's, which our FP8 recipes
            # leave empty. Without it any kind of layers loads a checkpoint.
            name: entry
            for name, entry in unwrap(chunk).sharded_state_dict(metadata=metadata).items()  # type: ignore[operator]
            if not isinstance(entry, ShardedObject)
        }
        for index, chunk in enumerate(chunks)
    }
    if optimizer is None:
        return model
    with states_left_out(optimizer_parts(optimizer)):
        state = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return model | {"optimizer": state}


# --- the work-rounds (see WORK_ROUNDS)


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers that megatron-core has chained, or the one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _torch_parts(optimizer: Any) -> list[Any]:
    """Those that step with torch's AdamW; transformer-engine's and offloaded ones need no work-round."""
    return [part for part in optimizer_parts(optimizer) if isinstance(part.optimizer, torch.optim.AdamW)]


def fill_adam_state(optimizer: Any) -> None:
    """Give every parameter of a fresh torch AdamW the state that its first step would make: zeros."""
    for part in _torch_parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state.get(parameter):
                    part.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


def unshare_steps(optimizer: Any) -> None:
    """Give every parameter a `step` tensor of its own."""
    for part in _torch_parts(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


# --- ranks


@contextmanager
def quiet() -> Iterator[None]:
    """torch deprecates the ShardedTensor that megatron-core hands it, at every save and load."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
        yield


def on_main_rank(action: Callable[[], T], kind: type[UserError] = UserError) -> T:
    """Run `action` on rank 0 and give its result, or raise its error, on every rank. No rank passes before it
    is done. An OSError becomes `kind`.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except (OSError, UserError) as error:
            box[1] = error if isinstance(error, UserError) else kind(f"checkpoint: {error}")
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]

"""The name table: every weight of a model under its Hugging Face and its megatron-core name.

Three forms of one weight:

- *HF tensor*: `model.layers.3.self_attn.qkv_proj.weight`, rows [Q | K | V]. Files of some families hold it in
  parts (`q_proj`, `k_proj`, `v_proj`): `tensors` names what lies in files, `read` joins it, `parts` cuts it.
- *full mcore tensor*: the same shape in megatron-core's row order, not cut by tensor parallelism. Only two
  kinds differ from HF: QKV rows are interleaved per KV group ([q-heads of group 0, k0, v0, q-heads of group
  1, ...]) and fc1 stays [gate | up].
- *shard*: what one tensor-parallel rank holds. For fc1, gate and up are cut separately and joined again.

Shape letters: `V` vocabulary, `D` hidden, `F` FFN, `N` query heads, `K` KV heads, `H` head dim.
Everything here is a pure function of tensors; no megatron import, no process group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from phi4r.configs.stages import vocab_rows
from phi4r.core.errors import UserError
from phi4r.families.family import Kind, LayerTensor
from phi4r.families.model import ModelConfig

GetTensor = Callable[[str], Tensor]
"""Name of a tensor in a Hugging Face file -> the full tensor."""

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Weight:
    """One tensor of the model. `shape` is the full shape, the same in HF and in megatron-core form."""

    hf: str
    mcore: str
    shape: tuple[int, ...]
    kind: Kind = "plain"
    shard_dim: int | None = None
    """Dimension cut by tensor parallelism; None: every rank holds it whole (the norms)."""
    layer: int | None = None
    """Global 0-based layer, None outside the decoder layers."""
    qkv: tuple[int, int, int] | None = None
    """(N, K, H) of a QKV weight."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(name, shape) of what files hold, whose rows one after another are the HF tensor."""

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are tokens: the embedding and the head, which tensor parallelism may pad."""
        return self.layer is None and self.shard_dim == 0


def _layer_weight(model: ModelConfig, tensor: LayerTensor, layer: int) -> Weight:
    sizes = model.layer_sizes()
    D, F, H = sizes.hidden, sizes.ffn, sizes.head_dim
    rows = {"qkv": (sizes.q, sizes.kv, sizes.kv), "gate_up": (F, F)}.get(tensor.kind, ())
    shapes: dict[str, tuple[int, ...]] = {
        "self_attention.linear_qkv.weight": (sum(rows), D),
        "self_attention.linear_proj.weight": (D, sizes.q),
        "self_attention.q_layernorm.weight": (H,),
        "self_attention.k_layernorm.weight": (H,),
        "mlp.linear_fc1.weight": (sum(rows), D),
        "mlp.linear_fc2.weight": (D, F),
    }
    shape = shapes.get(tensor.mcore, (D,))
    prefix = f"model.layers.{layer}."
    stored = tuple((prefix + part, (count, D)) for part, count in zip(tensor.parts, rows, strict=False))
    return Weight(
        prefix + tensor.hf,
        f"decoder.layers.{layer}.{tensor.mcore}",
        shape,
        tensor.kind,
        tensor.shard_dim,
        layer=layer,
        qkv=(sizes.num_heads, sizes.kv // H, H) if tensor.kind == "qkv" else None,
        tensors=stored or ((prefix + tensor.hf, shape),),
    )


def _outer_weight(hf: str, mcore: str, shape: tuple[int, ...], shard_dim: int | None = None) -> Weight:
    return Weight(hf, mcore, shape, shard_dim=shard_dim, tensors=((hf, shape),))


@lru_cache(maxsize=8)
def weight_table(model: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of the model, in the order of the forward pass (243 for Phi-4: 6 a layer and 3). Tied
    embeddings are one weight: the head has none of its own."""
    V, D = model.vocab_size, model.hidden_size
    table = [_outer_weight("model.embed_tokens.weight", EMBEDDING, (V, D), 0)]
    for layer in range(model.num_layers):
        table += [_layer_weight(model, tensor, layer) for tensor in model.description.tensors]
    table.append(_outer_weight("model.norm.weight", "decoder.final_layernorm.weight", (D,)))
    if not model.tie_embeddings:
        table.append(_outer_weight("lm_head.weight", HEAD, (V, D), 0))
    return tuple(table)


def hf_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> full shape, for every tensor that a file of this model has."""
    return {name: shape for weight in weight_table(model) for name, shape in weight.tensors}


# --- what files hold <-> HF form


def read(weight: Weight, get_tensor: GetTensor) -> Tensor:
    """The full HF tensor of a weight from what files hold of it. Raises UserError naming a tensor of the
    wrong shape."""
    found = []
    for name, shape in weight.tensors:
        tensor = get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
        found.append(tensor)
    return found[0] if len(found) == 1 else torch.cat(found)


def parts(weight: Weight, hf_tensor: Tensor) -> list[tuple[str, Tensor]]:
    """(name, tensor) of what files hold of a full HF tensor: views of its rows."""
    rows = [shape[0] for _, shape in weight.tensors]
    return [(name, part) for (name, _), part in zip(weight.tensors, hf_tensor.split(rows), strict=True)]


# --- HF form <-> megatron-core form


def to_mcore(weight: Weight, hf_tensor: Tensor) -> Tensor:
    """Full HF tensor -> full mcore tensor of the same shape and dtype (a view where nothing moves)."""
    if weight.kind != "qkv":
        return hf_tensor
    assert weight.qkv is not None
    N, K, H = weight.qkv
    q, k, v = hf_tensor.split([N * H, K * H, K * H])
    groups = [
        q.unflatten(0, (K, N // K * H)),
        k.unflatten(0, (K, H)),
        v.unflatten(0, (K, H)),
    ]
    return torch.cat(groups, 1).flatten(0, 1)


def from_mcore(weight: Weight, mcore_tensor: Tensor) -> Tensor:
    """Full mcore tensor -> full HF tensor; the exact inverse of `to_mcore`."""
    if weight.kind != "qkv":
        return mcore_tensor
    assert weight.qkv is not None
    N, K, H = weight.qkv
    q, k, v = mcore_tensor.unflatten(0, (K, (N // K + 2) * H)).split([N // K * H, H, H], 1)
    return torch.cat([q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)])


# --- full mcore tensor <-> tensor-parallel shards


def shard(weight: Weight, mcore_tensor: Tensor, tp_rank: int, tp: int) -> Tensor:
    """The part of a full mcore tensor that rank `tp_rank` of `tp` holds (a view where possible). A vocabulary
    that `tp` does not divide ends in rows of zeros.

    Raises UserError where `tp` does not divide what else it has to cut (KV heads, FFN).
    """
    if tp == 1 or weight.shard_dim is None:
        return mcore_tensor
    if weight.is_vocabulary:
        rows = vocab_rows(weight.shape[0], tp)
        part = mcore_tensor[tp_rank * rows : (tp_rank + 1) * rows]
        return (
            torch.cat([part, part.new_zeros(rows - len(part), weight.shape[1])]) if len(part) < rows else part
        )
    if weight.kind == "gate_up":
        gate, up = mcore_tensor.chunk(2)
        return torch.cat([_cut(weight, gate, tp_rank, tp), _cut(weight, up, tp_rank, tp)])
    if weight.qkv is not None and weight.qkv[1] % tp:
        raise UserError(
            f"{weight.hf}: {weight.qkv[1]} KV heads cannot be cut into {tp} tensor-parallel parts"
        )
    return _cut(weight, mcore_tensor, tp_rank, tp)


def unshard(weight: Weight, shards: Sequence[Tensor]) -> Tensor:
    """The full mcore tensor from the shards of all tensor-parallel ranks, in rank order; inverse of
    `shard`.
    """
    if len(shards) == 1 or weight.shard_dim is None:
        return shards[0]
    if weight.kind == "gate_up":
        halves = [s.chunk(2) for s in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    whole = torch.cat(list(shards), weight.shard_dim)
    return whole[: weight.shape[0]] if weight.is_vocabulary else whole


def _cut(weight: Weight, tensor: Tensor, tp_rank: int, tp: int) -> Tensor:
    assert weight.shard_dim is not None
    size, rest = divmod(tensor.shape[weight.shard_dim], tp)
    if rest:
        raise UserError(
            f"{weight.hf}: dimension {weight.shard_dim} of size {tensor.shape[weight.shard_dim]} "
            f"cannot be cut into {tp} equal tensor-parallel parts"
        )
    return tensor.narrow(weight.shard_dim, tp_rank * size, size)


# --- the local parameters of model chunks


def unwrap(module: nn.Module) -> nn.Module:
    """The GPTModel inside DistributedDataParallel / Float16Module wrappers."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


def local_weights(
    chunks: Iterable[nn.Module], model_cfg: ModelConfig
) -> Iterator[tuple[Weight, nn.Parameter]]:
    """(table entry, local parameter) for every parameter of this rank's model chunks (wrapped or not).

    The global layer of a local layer is its `layer_number - 1`, so it holds for any pipeline layout.
    """
    by_mcore_name = {w.mcore: w for w in weight_table(model_cfg)}
    if model_cfg.tie_embeddings:  # a last stage without the embedding holds a copy of it
        by_mcore_name[HEAD] = by_mcore_name[EMBEDDING]
    for chunk in chunks:
        model = unwrap(chunk)
        layers = model.get_submodule("decoder.layers")
        first = int(layers[0].layer_number) - 1 if len(layers) else 0  # type: ignore[arg-type, index]
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first)
            weight = by_mcore_name.get(".".join(parts))
            assert weight is not None, f"parameter {name} has no place in the name table"
            yield weight, parameter


@torch.no_grad()
def load_weights(
    chunks: Sequence[nn.Module],
    model_cfg: ModelConfig,
    get_tensor: GetTensor,
    tp_rank: int,
    tp: int,
) -> None:
    """Fill the parameters of this rank's model chunks from full HF tensors, one tensor at a time.

    `get_tensor(name)` returns a full tensor of any float dtype; values are cast to the parameter's. Raises
    UserError naming a tensor of the wrong shape.
    """
    filled: set[str] = set()
    for weight, parameter in local_weights(chunks, model_cfg):
        local = shard(weight, to_mcore(weight, read(weight, get_tensor)), tp_rank, tp)
        assert parameter.shape == local.shape, f"{weight.mcore}: {parameter.shape} is not {local.shape}"
        assert weight.hf not in filled, f"{weight.hf} is held twice by the chunks of one rank"
        parameter.copy_(local)
        filled.add(weight.hf)


# --- random initialisation


def random_weights(model_cfg: ModelConfig, seed: int) -> GetTensor:
    """Name in a file -> full random fp32 tensor, a pure function of (seed, name): the same in every layout.

    `model_cfg.init_scheme` "normal": std `init_std` for every matrix, `o_proj` and `down_proj` divided by
    sqrt(2 num_layers) (they are summed 2 num_layers times into the residual stream). "fan_in": embedding and
    lm_head 0.02, every other matrix fan_in**-0.5, `o_proj` and `down_proj` half of that. Norms are ones.
    """
    shapes = hf_tensors(model_cfg)

    def std(name: str, fan_in: int) -> float:
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        if model_cfg.init_scheme == "fan_in":
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                return 0.02
            return fan_in**-0.5 * (0.5 if is_residual else 1.0)
        return model_cfg.init_std / ((2 * model_cfg.num_layers) ** 0.5 if is_residual else 1.0)

    def get_tensor(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        # 63 bits: the generator takes a signed 64-bit seed
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randn(shape, generator=generator).mul_(std(name, shape[1]))

    return get_tensor

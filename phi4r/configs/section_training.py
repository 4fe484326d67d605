"""Sections of everything that trains: model, layout, data, optimizer, checkpoints, logs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from phi4r.core.checks import at_least, between, positive, require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is cut over tp x pp x cp x dp ranks. The results are the same whatever the layout."""

    tp: int = 1
    """Tensor parallel ranks: each holds a slice of every matrix. Must divide the query heads, KV heads and
    ffn_hidden_size; a vocabulary that it does not divide is padded."""
    pp: int = 1
    """Pipeline parallel ranks: each holds num_layers / pp consecutive layers."""
    vpp: int = 1
    """Virtual pipeline stages per rank (interleaved schedule, smaller bubble); 1 = plain pipeline."""
    stage_layers: str = ""
    """Layers of every pipeline stage, pp x vpp numbers in the order of the layers, as in "11,10,10,9": the
    last stage also has the head ("": evenly, or with fewer on the last stage)."""
    cp: int = 1
    """Context parallel ranks: each holds 1 / cp of every packed row."""
    dp: int = 1
    """Data parallel ranks: each works on its own rows of the global batch."""
    sp: bool = False
    """Sequence parallelism: tensor parallel ranks also split the activations of norms and residuals (needs tp
    > 1)."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over dp x cp ranks instead of copying it."""
    overlap: bool = False
    """Overlap gradient reduction and parameter gathering with compute."""
    timeout_s: int = 600
    """Seconds after which a collective, or the start of the ranks, is given up."""
    threads: int = 1
    """CPU threads per rank. One is fastest for tiny models; results repeat bit for bit only at the same
    number."""

    def __post_init__(self) -> None:
        at_least("parallel", self, tp=1, pp=1, vpp=1, cp=1, dp=1, threads=1)
        positive("parallel", self, "timeout_s")
        require(not self.sp or self.tp > 1, "parallel.sp", f"needs parallel.tp > 1, which is {self.tp}")
        require(
            self.vpp == 1 or self.pp > 1,
            "parallel.vpp",
            f"{self.vpp} needs parallel.pp > 1, which is {self.pp}",
        )
        words = self.stage_layers.split(",") if self.stage_layers else []
        require(
            len(words) in (0, self.pp * self.vpp) and all(w.strip().isdecimal() and int(w) for w in words),
            "parallel.stage_layers",
            f"expected parallel.pp x parallel.vpp = {self.pp * self.vpp} numbers of at least 1 with commas"
            f" between, got {self.stage_layers!r}",
        )

    @property
    def world_size(self) -> int:
        """Number of ranks: tp x pp x cp x dp."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def row_multiple(self) -> int:
        """Packed rows must be a multiple of this many tokens: CP deals each rank two chunks, SP cuts a
        rank's part once more."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sp else 1)

    def fit_row(self, num_tokens: int) -> int:
        """The shortest row of at least `num_tokens` tokens that the layout can cut."""
        return -(-num_tokens // self.row_multiple) * self.row_multiple


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Text to token ids."""

    path: str = ""
    """A Hugging Face folder, a tokenizer.json or a SentencePiece .model ("": the small built-in one for
    generated tasks)."""
    think_tokens: str = ""
    """Two tokens of a tokenizer.json that take the place of <think> and </think>, comma between ("": it has
    them). For Phi-4's own tokenizer: "<|dummy_86|>,<|dummy_87|>"."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The documents of supervised fine-tuning."""

    path: str = ""
    """JSONL or Parquet of messages, or of problem + answer (+ trace); a file or a folder ("": generate from
    `task`)."""
    task: str = "modchain"
    """Generator used while `path` is empty: a registered task that generates problems with traces, or the
    import path of one, package.module:name."""
    num_generated: int = 25_600
    """Documents to generate while `path` is empty."""
    seq_length: int = 256
    """Tokens in a packed row. The paper packs to 32,768."""
    on_long: Literal["error", "truncate", "skip"] = "error"
    """What to do with a document longer than a row. Truncated and skipped ones are counted in the log."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do with a malformed row; skipped rows are written to rejects.jsonl in the run folder."""
    system_message: str = "none"
    """System message put first: "none", "reasoning" (that of Phi-4-reasoning) or any text."""
    heldout: int = 256
    """Documents kept out of training to measure the evaluation loss (0: none)."""
    heldout_path: str = ""
    """A file or folder of its own for the evaluation loss, instead of holding documents out."""
    loader: Literal["thread", "dali"] = "thread"
    """What reads packed shards ahead: a thread, or NVIDIA DALI's worker processes (see docs/data.md)."""

    def __post_init__(self) -> None:
        at_least("data", self, num_generated=1, seq_length=8, heldout=0)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 2e-3
    """Peak learning rate. The paper: 1e-5 for SFT, 5e-8 for RL."""
    min_lr_ratio: float = 0.0
    """Where the decay ends, as a share of lr."""
    warmup_steps: int = 50
    """Steps of linear warm-up from 0. The paper: 450 for SFT, 10 for RL."""
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape after the warm-up, until train.num_steps. The paper does not say; the phi4 recipes stay
    constant."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (norm weights have none). The paper: 1e-4."""
    beta1: float = 0.9
    """Adam's averaging of the gradient."""
    beta2: float = 0.98
    """Adam's averaging of the squared gradient. The paper does not say; the phi4 recipes use 0.95."""
    eps: float = 1e-8
    """Adam's denominator floor."""
    clip_grad: float = 1.0
    """Largest global gradient norm; longer gradients are scaled down (0: never)."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Type of Adam's two averages. bf16 takes a third off the optimizer's memory; it needs
    transformer-engine, model.dtype = bf16 and parallel.distributed_optimizer (megatron-core's precision-aware
    optimizer)."""
    offload: float = 0.0
    """Share of the optimizer's state that is kept and stepped in host memory, 0 to 1; needs a GPU,
    transformer-engine, model.dtype = bf16 and parallel.distributed_optimizer."""

    def __post_init__(self) -> None:
        at_least("optimizer", self, lr=0, warmup_steps=0, weight_decay=0, clip_grad=0)
        between("optimizer", self, 0, 1, "min_lr_ratio", "offload")
        require(
            self.moments == "fp32" or self.offload == 0,
            "optimizer.moments",
            f"must be fp32 with optimizer.offload = {self.offload:g}: the host's AdamW has no other",
        )
        positive("optimizer", self, "eps")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", f"must be at least 0 and below 1, got {value}")

    def learning_rate(self, step: int, num_steps: int) -> float:
        """Of optimizer step `step` (from 0): linear warm-up, then the decay to `min_lr_ratio * lr` at
        `num_steps`. The paper warms SFT up over 450 steps and does not say how it decays."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps))
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * shape)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    num_steps: int = 800
    """Optimizer steps (SFT) or rollout steps (RL)."""
    global_batch_size: int = 4
    """Packed rows per optimizer step over all ranks. RL steps take as many rows as their samples fill."""
    logit_chunk_size: int = 4096
    """Tokens whose logits exist at once: the loss walks over the vocabulary head in chunks of this size."""
    head_backend: Literal["auto", "triton", "torch"] = "auto"
    """Elementwise part of the head: Triton kernels or plain torch; "auto" takes Triton on CUDA, torch on
    CPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass: nothing, attention only, or whole layers."""
    layers: Literal["local", "transformer_engine"] = "local"
    """Matrix products of the layers: megatron-core's own, or those of the package transformer-engine (on a
    GPU). Weights and checkpoints are the same."""
    fp8: Literal["off", "tensorwise", "blockwise", "mxfp8"] = "off"
    """SFT: matrix products in FP8, by how their scales are found; needs train.layers = transformer_engine and
    model.dtype = bf16. tensorwise and blockwise on Hopper, mxfp8 on Blackwell."""
    eval_every: int = 100
    """SFT: steps between measurements of the held-out loss (0: never). GRPO samples anew in every step."""
    max_nonfinite_steps: int = 10
    """Steps in a row whose gradient may be inf or NaN (they are skipped) before the run stops and saves the
    batch for `phi4r replay`."""
    spike_sigmas: float = 10.0
    """A loss this many robust standard deviations above the median of the last 128 is flagged (0: never)."""
    check_replicas_every: int = 100
    """Steps between comparisons of the data-parallel copies of the model, bit for bit (0: never)."""

    def __post_init__(self) -> None:
        at_least(
            "train",
            self,
            num_steps=1,
            global_batch_size=1,
            logit_chunk_size=1,
            eval_every=0,
            max_nonfinite_steps=0,
            spike_sigmas=0,
            check_replicas_every=0,
        )
        require(
            self.fp8 == "off" or self.layers == "transformer_engine",
            "train.fp8",
            f"{self.fp8} needs train.layers = transformer_engine, which is {self.layers}",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and how much to keep."""

    every: int = 100
    """Steps between checkpoints (0: only at the end)."""
    keep_last: int = 2
    """Newest checkpoints that are kept (0: all)."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept as well (0: none)."""
    best_metric: str = ""
    """The checkpoint with the best value of this metric is kept as well, as in "heldout_loss" ("": none). A
    checkpoint counts if its step measured the metric."""
    best_mode: Literal["min", "max"] = "min"
    """Whether a small or a large best_metric is good."""
    save_final: bool = True
    """Save after the last step."""
    background: bool = True
    """Write from a copy in host memory while the next steps run. A run has one such save at a time."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (a full disk): end the run, or warn and try again when the next is
    due. The last one of a run always has to succeed."""
    on_damaged: Literal["stop", "older"] = "stop"
    """When the newest checkpoint turns out to be damaged: end with the name of the file and of an older
    checkpoint, or set it aside and go on from the older one."""

    def __post_init__(self) -> None:
        at_least("checkpoint", self, every=0, keep_last=0, keep_every=0)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl and the console."""

    every: int = 1
    """Steps between lines on the console; metrics.jsonl has every step."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; "offline" needs no account and writes under the run folder."""
    wandb_project: str = "phi4r"
    """Project name at Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard event files under the run folder."""
    ref_kl: bool = False
    """RL: log the KL to the weights that the run started from (kl_ref) where the objective has no use for
    them: a frozen copy of the model and a forward pass a step."""

    def __post_init__(self) -> None:
        at_least("log", self, every=1)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where the weights come from."""

    checkpoint: str = ""
    """A phi4r checkpoint, a run folder (its newest checkpoint) or a Hugging Face folder ("": random
    weights)."""

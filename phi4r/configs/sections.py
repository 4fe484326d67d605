"""The sections of a configuration: one frozen dataclass each, one documented field per setting.

The string under a field is its documentation: `phi4r <command> --help` prints it. A section checks itself
when it is made; what depends on several sections is checked in `stages`. Defaults are those of the tiny quick
start, except where the paper gives a value that has no small-scale twin.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from phi4r.configs.model_presets import PRESETS
from phi4r.errors import ConfigError


def require(condition: bool, key: str, reason: str) -> None:
    """Raise ConfigError(key, reason) unless `condition` holds."""
    if not condition:
        raise ConfigError(key, reason)


def _at_least(section: str, config: object, **minimums: float) -> None:
    for name, minimum in minimums.items():
        value = getattr(config, name)
        require(value >= minimum, f"{section}.{name}", f"must be at least {minimum:g}, got {value}")


def _between(section: str, config: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(
            low <= value <= high, f"{section}.{name}", f"must lie between {low:g} and {high:g}, got {value}"
        )


def _positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}", f"must be greater than 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer. Phi-4 is a pre-norm decoder with grouped-query attention, RoPE and a SiLU-gated
    MLP."""

    preset: str = ""
    """A named size that fills in the fields below: phi4, phi4_reasoning, tiny or tiny_deep ("": take them as
    given)."""
    num_layers: int = 3
    """Decoder layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_hidden_size: int = 448
    """Width inside the gated MLP."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int = 2
    """Key/value heads, each shared by num_attention_heads / num_query_groups query heads."""
    head_dim: int = 32
    """Width of one head; RoPE turns all of it."""
    vocab_size: int = 0
    """Rows of the embedding and of the output head (0: the tokenizer's size rounded up to a multiple of
    64)."""
    rope_theta: float = 10_000.0
    """Base of the rotary angles. Phi-4 uses 250,000, doubled for the reasoning models."""
    max_position_embeddings: int = 512
    """Longest document, in tokens, that the model is meant for."""
    rms_norm_eps: float = 1e-5
    """Added to the variance inside RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of random weights when init_scheme is "normal"."""
    init_scheme: Literal["normal", "fan_in"] = "fan_in"
    """Random weights: "normal" = N(0, init_std) as in Phi-4; "fan_in" = N(0, 1/fan_in), which suits tiny
    models."""
    dtype: Literal["fp64", "fp32", "bf16"] = "fp32"
    """Compute and weight type. With bf16 the optimizer keeps fp32 master weights. fp64 is for proofs on CPU:
    it leaves a chaotic run nine more digits before rounding shows."""
    attention_backend: Literal["auto", "reference", "sdpa", "triton"] = "auto"
    """Attention: "reference" is written out in fp32, "sdpa" is torch's, "triton" our kernels; "auto" takes
    the fastest that runs here (see `phi4r doctor`)."""

    def __post_init__(self) -> None:
        names = ", ".join(PRESETS)
        require(
            self.preset == "" or self.preset in PRESETS,
            "model.preset",
            f"expected one of {names}, got {self.preset!r}",
        )
        _positive(
            "model",
            self,
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "head_dim",
            "rope_theta",
            "max_position_embeddings",
            "rms_norm_eps",
            "init_std",
        )
        _at_least("model", self, vocab_size=0)
        require(
            self.head_dim % 2 == 0, "model.head_dim", f"must be even (RoPE turns pairs), got {self.head_dim}"
        )
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            "model.num_attention_heads",
            f"{self.num_attention_heads} heads cannot share {self.num_query_groups} KV heads",
        )

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> ModelConfig:
        """The named size with `changes` on top. (`ModelConfig(preset=...)` by itself only records the
        name.)"""
        if preset not in PRESETS:
            raise ConfigError("model.preset", f"expected one of {', '.join(PRESETS)}, got {preset!r}")
        return cls(**{"preset": preset, **PRESETS[preset], **changes})

    @property
    def num_parameters(self) -> int:
        """Exact number of weights (Phi-4: 14,659,507,200). Raises ConfigError while vocab_size is 0 (not yet
        known)."""
        require(
            self.vocab_size > 0,
            "model.vocab_size",
            "is 0 (taken from the tokenizer), so the size is not known yet",
        )
        q, kv = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        attention = self.hidden_size * (q + 2 * kv) + q * self.hidden_size
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        per_layer = attention + mlp + 2 * self.hidden_size
        return self.num_layers * per_layer + self.hidden_size + 2 * self.vocab_size * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is cut over tp x pp x cp x dp ranks. The results are the same whatever the layout."""

    tp: int = 1
    """Tensor parallel ranks: each holds a slice of every matrix. Must divide the query heads, KV heads and
    vocabulary."""
    pp: int = 1
    """Pipeline parallel ranks: each holds num_layers / pp consecutive layers."""
    vpp: int = 1
    """Virtual pipeline stages per rank (interleaved schedule, smaller bubble); 1 = plain pipeline."""
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
        _at_least("parallel", self, tp=1, pp=1, vpp=1, cp=1, dp=1, threads=1)
        _positive("parallel", self, "timeout_s")
        require(not self.sp or self.tp > 1, "parallel.sp", f"needs parallel.tp > 1, which is {self.tp}")
        require(
            self.vpp == 1 or self.pp > 1,
            "parallel.vpp",
            f"{self.vpp} needs parallel.pp > 1, which is {self.pp}",
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
    """Generator used while `path` is empty: modchain, addition or countdown."""
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

    def __post_init__(self) -> None:
        _at_least("data", self, num_generated=1, seq_length=8, heldout=0)


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

    def __post_init__(self) -> None:
        _at_least("optimizer", self, lr=0, warmup_steps=0, weight_decay=0, clip_grad=0)
        _between("optimizer", self, 0, 1, "min_lr_ratio")
        _positive("optimizer", self, "eps")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", f"must be at least 0 and below 1, got {value}")


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
        _at_least(
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
        _at_least("checkpoint", self, every=0, keep_last=0, keep_every=0)


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

    def __post_init__(self) -> None:
        _at_least("log", self, every=1)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where the weights come from."""

    checkpoint: str = ""
    """A phi4r checkpoint, a run folder (its newest checkpoint) or a Hugging Face folder ("": random
    weights)."""


@dataclass(frozen=True, kw_only=True)
class ProblemsConfig:
    """Problems with checkable answers, for RL, curation and evaluation."""

    path: str = ""
    """JSONL or Parquet of problem + answer; a file or a folder ("": generate from `task`)."""
    task: str = "modchain"
    """How answers are checked, and the generator while `path` is empty: modchain, addition, countdown or
    math."""
    num_generated: int = 4096
    """Problems to generate while `path` is empty."""
    difficulty_min: int = 0
    """Easiest generated problem (0: the task's own range)."""
    difficulty_max: int = 0
    """Hardest generated problem (0: the task's own range)."""
    system_message: str = "none"
    """System message put first: "none", "reasoning" (that of Phi-4-reasoning) or any text."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do with a malformed row; skipped rows are written to rejects.jsonl in the run folder."""

    def __post_init__(self) -> None:
        _at_least("problems", self, num_generated=1, difficulty_min=0, difficulty_max=0)
        require(
            self.difficulty_max == 0 or self.difficulty_max >= self.difficulty_min,
            "problems.difficulty_max",
            f"must be at least problems.difficulty_min ({self.difficulty_min}), got {self.difficulty_max}",
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling answers from the model that is being trained."""

    engine: Literal["embedded"] = "embedded"
    """Where samples come from: "embedded" = the trainer's own weights, in its own processes."""
    prompts_per_step: int = 32
    """Problems drawn per step. The paper: 64."""
    group_size: int = 8
    """Samples per problem, compared with each other by the advantage. The paper: 8."""
    max_prompt_tokens: int = 64
    """Longest prompt; longer problems are left out and counted. The paper: 1,024."""
    max_new_tokens: int = 64
    """Longest response. The paper: 31,744."""
    temperature: float = 1.0
    """Sampling temperature (log-probs are taken at the same temperature)."""
    num_slots: int = 256
    """Sequences decoded at once; a finished one makes room for the next. Samples do not depend on it."""
    row_tokens: int = 256
    """Tokens in a packed row of the training pass (at least max_prompt_tokens + max_new_tokens is taken)."""
    top_p: float = 1.0
    """Nucleus sampling. RL needs 1.0: a filter would bias the probability ratio."""
    top_k: int = 0
    """Sampling from the k likeliest tokens (0: all). RL needs 0."""

    def __post_init__(self) -> None:
        _at_least(
            "rollout",
            self,
            prompts_per_step=1,
            group_size=1,
            max_prompt_tokens=1,
            max_new_tokens=1,
            num_slots=1,
            top_k=0,
        )
        _positive("rollout", self, "temperature", "top_p")
        require(self.top_p <= 1, "rollout.top_p", f"must be at most 1, got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The paper's length-aware reward, R = accuracy_weight x R_acc + repetition_weight x R_rep."""

    max_tokens: int = 0
    """L_max, the longest response that counts (0: rollout.max_new_tokens). The paper: 31,744."""
    positive_tokens: int = 0
    """L_pos: a right answer loses reward beyond this length (0: 25,600/31,744 of L_max)."""
    negative_tokens: int = 0
    """L_neg: a wrong answer is punished less as it approaches this length (0: 3,702/31,744 of L_max)."""
    accuracy_weight: float = 8 / 13
    """Weight of the accuracy part."""
    repetition_weight: float = 1 / 13
    """Weight of the repetition penalty."""
    repetition_ngram: int = 5
    """Length, in tokens, of the n-grams whose repetition is punished."""
    repetition_threshold: int = 5
    """An n-gram counts as repeated when it occurs more often than this."""
    verifier_timeout_s: float = 5.0
    """Seconds a single answer may be checked for; then its outcome is "timeout"."""
    verifier_workers: int = 2
    """Processes that check answers in parallel."""

    def __post_init__(self) -> None:
        _at_least(
            "reward",
            self,
            max_tokens=0,
            positive_tokens=0,
            negative_tokens=0,
            accuracy_weight=0,
            repetition_weight=0,
            repetition_ngram=1,
            repetition_threshold=1,
            verifier_workers=1,
        )
        _positive("reward", self, "verifier_timeout_s")
        if self.max_tokens and self.positive_tokens:
            require(
                self.positive_tokens < self.max_tokens,
                "reward.positive_tokens",
                f"must be below reward.max_tokens ({self.max_tokens}), got {self.positive_tokens}",
            )

    def resolved(self, max_new_tokens: int) -> RewardConfig:
        """This section with the lengths that are 0 filled in, in the paper's proportions (rounded to whole
        tokens)."""
        longest = self.max_tokens or max_new_tokens
        return dataclasses.replace(
            self,
            max_tokens=longest,
            positive_tokens=self.positive_tokens or max(1, round(longest * 25_600 / 31_744)),
            negative_tokens=self.negative_tokens or max(1, round(longest * 3_702 / 31_744)),
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The GRPO objective: a clipped surrogate with group-standardised advantages, a KL and an entropy
    term."""

    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 0.0
    """Bound c > 1 on the loss of negative advantages at large ratios (0: off)."""
    normalization: Literal["token", "sequence", "constant"] = "token"
    """Sum over tokens / all tokens (as the paper's run), mean of per-response means (as printed), or / a
    constant (Dr. GRPO)."""
    kl_coef: float = 0.001
    """Weight of the KL penalty (beta)."""
    kl_reference: Literal["old", "ref"] = "old"
    """KL against the policy that sampled ("old", as printed) or a frozen copy of the starting weights
    ("ref")."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimate: log ratio, half its square, or the unbiased and non-negative third."""
    entropy_coef: float = 0.001
    """Weight of the entropy bonus (gamma)."""
    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: each token's probability ratio, or their geometric mean over the response (GSPO)."""
    importance_cap: float = 0.0
    """Weight tokens by pi_old / pi_rollout, truncated here, where the sampler computes other log-probs than
    the trainer (0: off)."""
    updates_per_rollout: int = 1
    """Optimizer steps on each set of samples. 1 is strictly on-policy and needs no second log-prob pass."""
    advantage_norm: Literal["std", "none"] = "std"
    """Divide centred rewards by the group's population standard deviation, or only centre them."""
    min_informative: float = 0.0
    """Skip a step when a smaller share of its groups than this has rewards that differ."""

    def __post_init__(self) -> None:
        _at_least(
            "objective",
            self,
            clip_low=0,
            clip_high=0,
            kl_coef=0,
            entropy_coef=0,
            importance_cap=0,
            updates_per_rollout=1,
        )
        _between("objective", self, 0, 1, "min_informative")
        require(self.clip_low < 1, "objective.clip_low", f"must be below 1, got {self.clip_low}")
        require(
            self.dual_clip == 0 or self.dual_clip > 1,
            "objective.dual_clip",
            f"must be 0 (off) or greater than 1, got {self.dual_clip}",
        )


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Repeated evaluation runs and their statistics."""

    runs: int = 8
    """Independent runs with seeds of their own. The paper: 5, and 50 for AIME 2025."""
    part: int = 0
    """Which `runs` of a larger evaluation: those with the seeds part x runs and on. For job arrays; see
    `phi4r merge`."""
    num_problems: int = 256
    """Problems per run, the first of the set (0: all)."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int = 64
    """Longest response."""
    compare: str = ""
    """Another checkpoint, evaluated on the same problems and compared in pairs ("": none)."""
    bootstrap: int = 2000
    """Resamples of problems and runs behind each interval."""

    def __post_init__(self) -> None:
        _at_least("eval", self, runs=1, part=0, num_problems=0, max_new_tokens=1, bootstrap=100)
        _positive("eval", self, "temperature")


@dataclass(frozen=True, kw_only=True)
class CurateSettings:
    """What is removed from a set of problems, and what is kept."""

    checkpoint: str = ""
    """The model whose pass rate measures difficulty: checkpoint, run folder or Hugging Face folder ("": not
    measured)."""
    heldout_path: str = ""
    """Problems that must not leak into training: JSONL/Parquet, file or folder ("": the task's own held-out
    set)."""
    dedup_threshold: float = 0.8
    """Problems whose n-gram sets overlap at least this much (Jaccard) are near-duplicates; the first is
    kept."""
    ngram: int = 13
    """Words in the n-grams of decontamination; shorter held-out problems are matched whole. Phi-4: a hybrid
    of 13 and 7."""
    mask_numbers: bool = False
    """Match held-out problems also with their numbers replaced; reported apart, never for pure arithmetic."""
    max_problem_chars: int = 8192
    """Problems with a longer text are removed."""
    max_trace_chars: int = 131_072
    """Problems with a longer trace are removed. The paper's traces: up to 32K tokens."""
    num_heldout: int = 256
    """Held-out problems to generate while `heldout_path` is empty."""
    planted_defects: bool = True
    """Give the generated raw pool the defects of real data (duplicates, leaks, wrong answers, bad rows)."""
    pass_rate_k: int = 8
    """Samples per problem behind its pass rate."""
    pass_rate_chunk: int = 1024
    """Problems whose pass rates are measured and saved together; the model is opened once for each chunk."""
    band_low: float = 0.1
    """Problems solved less often than this are too hard to teach anything."""
    band_high: float = 0.9
    """Problems solved more often than this are too easy."""
    mixture: str = ""
    """Epochs per cluster (task, or task/difficulty), as in "modchain/6=2, modchain=0.5" ("": one each)."""

    def __post_init__(self) -> None:
        _at_least(
            "curate",
            self,
            ngram=1,
            pass_rate_k=1,
            pass_rate_chunk=1,
            num_heldout=0,
            max_problem_chars=1,
            max_trace_chars=1,
        )
        _positive("curate", self, "dedup_threshold")
        _between("curate", self, 0, 1, "dedup_threshold", "band_low", "band_high")
        require(
            self.band_low <= self.band_high,
            "curate.band_high",
            f"must be at least curate.band_low ({self.band_low}), got {self.band_high}",
        )

"""The configuration of each stage: a seed and its sections, with the checks that need more than one
section."""

from __future__ import annotations

from dataclasses import dataclass, field

from phi4r.configs.sections import (
    CheckpointConfig,
    CurateSettings,
    DataConfig,
    EvalSettings,
    GenerateSettings,
    InitConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    ProblemsConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    TokenizerConfig,
    TrainConfig,
    VLLMConfig,
    require,
)


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """Decoder layers of every model chunk: [pipeline rank][virtual stage].

    `parallel.stage_layers` where it is given. Else the same for all, or, where pp does not divide the layers,
    the rounded share for stages between the first and the last; of what is left the last gets the fewer: it
    also runs the head."""
    pp, vpp = parallel.pp, parallel.vpp
    if parallel.stage_layers:
        counts = [int(word) for word in parallel.stage_layers.split(",")]
    elif num_layers % (pp * vpp) == 0:
        counts = [num_layers // (pp * vpp)] * (pp * vpp)
    else:
        assert vpp == 1, "check_layout refuses uneven virtual stages that are not spelt out"
        middle = round(num_layers / pp) if pp > 2 else 0
        rest = num_layers - middle * (pp - 2)
        counts = [rest - rest // 2, *([middle] * (pp - 2)), rest // 2]
    return [counts[rank::pp] for rank in range(pp)]


VOCAB_ROWS = 64
"""Padded vocabularies give every rank a multiple of this many rows, where they are long enough for it."""


def vocab_rows(vocab_size: int, tp: int) -> int:
    """Rows of embedding and head that each tensor parallel rank holds: vocab_size / tp where that is whole,
    else so many that the last rank's last rows are padding (Phi-4 at tp 5: 20,096, of which 128 are)."""
    if vocab_size % tp == 0:
        return vocab_size // tp
    rows = -(-vocab_size // tp)
    aligned = -(-rows // VOCAB_ROWS) * VOCAB_ROWS
    return aligned if aligned * (tp - 1) < vocab_size else rows


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a layout that cannot hold the model: raises ConfigError with the two numbers that disagree."""
    tp = parallel.tp
    for name, count, what in (
        ("num_query_groups", model.num_query_groups, "KV heads"),
        ("num_attention_heads", model.num_attention_heads, "query heads"),
    ):
        fits = [
            n
            for n in range(1, count + 1)
            if model.num_query_groups % n == 0 and model.num_attention_heads % n == 0
        ]
        listed = ", ".join(map(str, fits[:-1])) + f" or {fits[-1]}" if len(fits) > 1 else "1"
        is_published = model.preset and not model.preset.startswith("tiny")
        owner = model.description.title if is_published else "the model"
        reason = f"{tp} does not divide the {count} {what} (model.{name}): {owner} has"
        require(
            count % tp == 0,
            "parallel.tp",
            f"{reason} {model.num_query_groups} KV heads, so TP is {listed}",
        )
    ffn, vocabulary = model.ffn_hidden_size, model.vocab_size
    require(ffn % tp == 0, "parallel.tp", f"{tp} does not divide model.ffn_hidden_size ({ffn})")
    require(
        vocabulary == 0 or vocab_rows(vocabulary, tp) * (tp - 1) < vocabulary,
        "parallel.tp",
        f"{tp} ranks cannot each hold a part of model.vocab_size ({vocabulary}) rows",
    )
    require(
        not parallel.sp or model.hidden_size % tp == 0,
        "parallel.tp",
        f"{tp} does not divide model.hidden_size ({model.hidden_size})",
    )
    stages = parallel.pp * parallel.vpp
    require(
        model.num_layers >= stages,
        "parallel.vpp" if parallel.vpp > 1 else "parallel.pp",
        f"{stages} pipeline stages need as many layers, and model.num_layers is {model.num_layers}",
    )
    if parallel.stage_layers:
        found = sum(map(sum, stage_layers(model.num_layers, parallel)))
        require(
            found == model.num_layers,
            "parallel.stage_layers",
            f"{parallel.stage_layers} are {found} layers, and model.num_layers is {model.num_layers}",
        )
    require(
        bool(parallel.stage_layers) or parallel.vpp == 1 or model.num_layers % stages == 0,
        "parallel.vpp",
        f"parallel.pp x parallel.vpp = {parallel.pp} x {parallel.vpp} does not divide model.num_layers"
        f" ({model.num_layers}); parallel.stage_layers can say which stage gets how many",
    )


def check_sampling(sampling: SamplingConfig, parallel: ParallelConfig, vllm: VLLMConfig) -> None:
    """Refuse what has no effect on a stage that samples from fixed weights: raises ConfigError."""
    require(vllm.transfer == "files", "vllm.transfer", "is for RL: weights that do not change are files")
    require(not vllm.registry, "vllm.registry", "is for RL: give the servers' addresses (vllm.addresses)")
    require(
        sampling.engine == "embedded" or parallel.world_size == 1,
        "parallel",
        f"{parallel.world_size} ranks have nothing to do with sampling.engine {sampling.engine!r}: servers"
        " have a layout of their own (vllm.options)",
    )


FP8_MULTIPLE = 16
"""Sides of an FP8 product are multiples of this."""


def check_precision(
    model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig, train: TrainConfig
) -> None:
    """Refuse what megatron-core's reduced precision and offloading cannot be combined with: ConfigError."""
    for key, is_set in (
        ("optimizer.moments", optimizer.moments != "fp32"),
        ("optimizer.offload", optimizer.offload > 0),
        ("train.fp8", train.fp8 != "off"),
    ):
        require(not is_set or model.dtype == "bf16", key, f"needs model.dtype = bf16, which is {model.dtype}")
        require(
            not is_set or key == "train.fp8" or parallel.distributed_optimizer,
            key,
            "needs parallel.distributed_optimizer = true",
        )
    if train.fp8 == "off":
        return
    for name, width in (
        ("hidden_size", model.hidden_size),
        ("ffn_hidden_size", model.ffn_hidden_size // parallel.tp),
        ("head_dim", model.num_query_groups * model.head_dim // parallel.tp),
    ):
        require(
            width % FP8_MULTIPLE == 0,
            f"model.{name}",
            f"train.fp8 needs products whose sides are multiples of {FP8_MULTIPLE}, and at parallel.tp ="
            f" {parallel.tp} this gives {width}",
        )


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning on packed chat documents."""

    seed: int = 0
    """Seed of every random choice of the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", f"must be at least 0, got {self.seed}")
        check_layout(self.model, self.parallel)
        p, rows, length = self.parallel, self.train.global_batch_size, self.data.seq_length
        require(
            rows % p.dp == 0,
            "train.global_batch_size",
            f"{rows} rows cannot be shared evenly by parallel.dp = {p.dp} ranks",
        )
        require(
            p.vpp == 1 or (rows // p.dp) % p.pp == 0,
            "train.global_batch_size",
            f"{rows} rows over parallel.dp = {p.dp} are {rows // p.dp} microbatches;"
            f" the interleaved pipeline needs a multiple of parallel.pp = {p.pp}",
        )
        require(
            length % p.row_multiple == 0,
            "data.seq_length",
            f"{length} is not a multiple of {p.row_multiple}, which parallel.cp = {p.cp}"
            + (f" and parallel.sp at tp = {p.tp} need" if p.sp else " needs"),
        )
        require(
            length <= self.model.max_position_embeddings,
            "data.seq_length",
            f"{length} is beyond model.max_position_embeddings ({self.model.max_position_embeddings})",
        )
        check_precision(self.model, self.parallel, self.optimizer, self.train)
        require(
            self.train.fp8 == "off" or length // p.cp % FP8_MULTIPLE == 0,
            "data.seq_length",
            f"train.fp8 needs a multiple of {FP8_MULTIPLE} tokens on a rank, {length} at parallel.cp = {p.cp}"
            f" gives {length // p.cp}",
        )


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """GRPO: sample, verify and reward, compare within groups, step."""

    seed: int = 0
    """Seed of every random choice of the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    init: InitConfig = field(default_factory=InitConfig)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the starting weights is loaded, and run on each step's samples."""
        return self.objective.needs_ref or self.log.ref_kl

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", f"must be at least 0, got {self.seed}")
        check_layout(self.model, self.parallel)
        rollout, sampling = self.rollout, self.sampling
        require(
            rollout.group_size >= 2,
            "rollout.group_size",
            f"must be at least 2 for RL (advantages compare samples of one group), got {rollout.group_size}",
        )
        keep = self.objective.group_keep
        require(
            keep == 0 or 2 <= keep <= rollout.group_size,
            "objective.group_keep",
            f"must be 0 (all) or lie between 2 and rollout.group_size ({rollout.group_size}), got {keep}",
        )
        require(
            rollout.mode == "sync" or self.objective.importance_cap > 0,
            "objective.importance_cap",
            f"must be above 0 with rollout.mode {rollout.mode!r}: the samples are of older weights",
        )
        require(
            sampling.engine != "openai",
            "sampling.engine",
            '"openai" is not for RL: it needs the policy\'s own weights and their log-probs',
        )
        require(sampling.temperature > 0, "sampling.temperature", "must be greater than 0 for RL, got 0")
        bias = "must be {} for RL (a filtered sampler is not the policy, which biases the ratio), got {}"
        require(sampling.top_p == 1.0, "sampling.top_p", bias.format("1.0", sampling.top_p))
        require(sampling.top_k == 0, "sampling.top_k", bias.format("0", sampling.top_k))
        longest = rollout.max_prompt_tokens + sampling.max_new_tokens
        require(
            longest <= self.model.max_position_embeddings,
            "sampling.max_new_tokens",
            f"rollout.max_prompt_tokens + sampling.max_new_tokens = {longest} is beyond"
            f" model.max_position_embeddings ({self.model.max_position_embeddings})",
        )
        reason = self.model.rotary.why_not_sampled(longest)
        require(not reason, "sampling.max_new_tokens", f"prompts and answers of {reason}")
        check_precision(self.model, self.parallel, self.optimizer, self.train)
        require(
            self.train.fp8 == "off",
            "train.fp8",
            "is for SFT: in RL the model also decodes a few tokens at a time, which FP8 products do not take",
        )
        self.reward.resolved(sampling.max_new_tokens)  # its own check, now that L_max is known


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Curation: near-duplicates and leaks out, difficulty measured, the teachable band kept."""

    seed: int = 0
    """Seed of every random choice of the run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    curate: CurateSettings = field(default_factory=CurateSettings)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", f"must be at least 0, got {self.seed}")
        check_sampling(self.sampling, self.parallel, self.vllm)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation: repeated runs, intervals over problems and samples, paired comparison."""

    seed: int = 0
    """Seed of every random choice of the run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalSettings = field(default_factory=EvalSettings)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", f"must be at least 0, got {self.seed}")
        check_sampling(self.sampling, self.parallel, self.vllm)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generation: answers of a model to prompts, to read or to train on (traces of a teacher)."""

    seed: int = 0
    """Seed of every random choice of the run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", f"must be at least 0, got {self.seed}")
        check_sampling(self.sampling, self.parallel, self.vllm)


StageConfig = SFTConfig | RLConfig | CurateConfig | EvalConfig | GenerateConfig

STAGES: dict[str, type] = {
    "sft": SFTConfig,
    "rl": RLConfig,
    "curate": CurateConfig,
    "eval": EvalConfig,
    "generate": GenerateConfig,
}
"""Stage name -> its configuration. The names are also the tables `[sft.*]`, `[rl.*]`, ... of a recipe."""

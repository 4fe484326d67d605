"""Sections of what samples answers and judges them: sampling, rollouts, rewards, curation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from phi4r.core.checks import at_least, between, positive, require


@dataclass(frozen=True, kw_only=True)
class ProblemsConfig:
    """Problems with checkable answers, for RL, curation and evaluation."""

    path: str = ""
    """JSONL or Parquet of problem + answer; a file or a folder ("": generate from `task`)."""
    task: str = "modchain"
    """Generator while `path` is empty: a registered task, or the import path of one, package.module:name.
    Problems of a file name their own tasks; those that name none are math, or of this task where it is an
    import path."""
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
        at_least("problems", self, num_generated=1, difficulty_min=0, difficulty_max=0)
        require(
            self.difficulty_max == 0 or self.difficulty_max >= self.difficulty_min,
            "problems.difficulty_max",
            f"must be at least problems.difficulty_min ({self.difficulty_min}), got {self.difficulty_max}",
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling answers from a model: where, how tokens are drawn, and how many at once."""

    engine: Literal["embedded", "vllm", "openai"] = "embedded"
    """What samples: "embedded" = the model in phi4r's own processes; "vllm" = vLLM servers (section vllm),
    which phi4r gives the weights; "openai" = whatever model a URL serves (not for RL)."""
    url: str = ""
    """Engine "openai": base URL of an OpenAI-compatible server, such as http://host:8000/v1. Its key: the
    variable PHI4R_API_KEY."""
    model: str = ""
    """Engine "openai": name of the model at the server."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the likeliest token (not for RL). Log-probs are taken at the same
    temperature."""
    top_p: float = 1.0
    """Nucleus sampling (1: off). RL needs 1: a filter would bias the probability ratio. The paper's
    evaluation: 0.95."""
    top_k: int = 0
    """Sampling from the k likeliest tokens (0: all). RL needs 0. The paper's evaluation: 50."""
    max_new_tokens: int = 64
    """Longest response, in tokens. The paper: 31,744."""
    num_slots: int = 256
    """Engine "embedded": sequences decoded at once on each copy of the model; a finished one makes room for
    the next. Samples do not depend on it."""
    max_in_flight: int = 64
    """Engines "vllm" and "openai": requests sent to one server at once; the others wait here."""
    request_timeout_s: float = 1800.0
    """Engines "vllm" and "openai": seconds for one answer; a server that takes longer counts as failed."""
    max_failures: int = 20
    """Engine "openai": requests that may fail, retries included, before sampling stops."""

    def __post_init__(self) -> None:
        at_least(
            "sampling", self, temperature=0, max_new_tokens=1, num_slots=1, top_k=0, max_in_flight=1,
            max_failures=0,
        )  # fmt: skip
        positive("sampling", self, "top_p", "request_timeout_s")
        require(self.top_p <= 1, "sampling.top_p", f"must be at most 1, got {self.top_p}")
        require(
            not self.url or self.url.startswith(("http://", "https://")),
            "sampling.url",
            f"must begin with http:// or https://, got {self.url!r}",
        )
        for name in ("url", "model"):
            require(
                bool(getattr(self, name)) == (self.engine == "openai"),
                f"sampling.{name}",
                f'belongs to sampling.engine "openai", which needs it; the engine is {self.engine!r}',
            )


RolloutMode = Literal["sync", "one_step", "continuous"]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The prompts of an RL step, and when they are sampled (section sampling says how)."""

    mode: RolloutMode = "sync"
    """"sync": sample with the weights that are trained. "one_step": sample the next step's prompts while this
    step trains (a gain with vLLM only). "continuous": keep up to max_policy_lag later prompt batches in
    flight; new weights interrupt partial rollouts, which are resumed with them. Batches are trained on
    complete and in order. All but sync need objective.importance_cap."""
    max_policy_lag: int = 2
    """Mode "continuous": optimizer steps by which a token's weights may lag behind those that are trained."""
    prompts_per_step: int = 32
    """Problems in a prompt batch. The paper: 64."""
    group_size: int = 8
    """Samples per problem, compared with each other by the advantage. The paper: 8."""
    max_prompt_batches: int = 1
    """Max prompt batches per step: more are sampled in place of groups whose rewards are all equal, until
    prompts_per_step groups differ (DAPO's dynamic sampling); 1 disables."""
    curriculum: Literal["none", "pass_rate"] = "none"
    """Order of prompts: every problem once an epoch, or by running pass rates: those within the band once an
    epoch and rather early, the others once in curriculum_rest epochs (phi4r/rl/curriculum.py)."""
    curriculum_low: float = 0.1
    """Problems solved less often than this are too hard to teach anything yet."""
    curriculum_high: float = 0.9
    """Problems solved more often than this are too easy."""
    curriculum_rest: int = 4
    """Epochs in which a problem outside that band comes once."""
    max_prompt_tokens: int = 64
    """Longest prompt; longer problems are left out and counted. The paper: 1,024."""
    row_tokens: int = 256
    """Tokens in a packed row of the training pass (at least max_prompt_tokens + sampling.max_new_tokens is
    taken)."""
    gap_threshold: float = 0.1
    """A token whose log-prob differs by more than this between sampler and trainer, in nats, is counted as
    far."""
    gap_alarm: float = 0.05
    """A mean difference between the sampler's and the trainer's log-probs, in nats per token, that raises an
    alarm."""
    on_gap_alarm: Literal["warn", "stop"] = "warn"
    """What an alarm does: a line on the console, or the end of the run before the step is saved."""

    def __post_init__(self) -> None:
        at_least(
            "rollout",
            self,
            prompts_per_step=1,
            group_size=1,
            max_prompt_batches=1,
            curriculum_rest=1,
            max_prompt_tokens=1,
            max_policy_lag=1,
        )
        positive("rollout", self, "gap_threshold", "gap_alarm")
        between("rollout", self, 0, 1, "curriculum_low", "curriculum_high")
        require(
            self.curriculum_low <= self.curriculum_high,
            "rollout.curriculum_high",
            f"must be at least rollout.curriculum_low ({self.curriculum_low}), got {self.curriculum_high}",
        )

    @property
    def policy_lag(self) -> int:
        """Largest policy lag of a token, in optimizer steps."""
        return {"sync": 0, "one_step": 1, "continuous": self.max_policy_lag}[self.mode]


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward; the paper's is R = accuracy_weight x R_acc + repetition_weight x R_rep, length-aware."""

    function: str = "length_aware"
    """What rewards a graded response: "length_aware" (the paper's; the lengths, weights and repetition below
    are its settings), or the import path of a function, package.module:name (docs/tutorials)."""
    max_tokens: int = 0
    """L_max, the longest response that counts (0: sampling.max_new_tokens). The paper: 31,744."""
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
    overlong_weight: float = 0.0
    """Weight of DAPO's soft punishment of responses near the length limit, right or wrong (0: off)."""
    overlong_tokens: int = 0
    """How far below max_tokens that punishment begins (0: a fifth of it)."""
    answer_style: Literal["boxed", "line", "tag"] = "boxed"
    """Where the answer of a response stands: "boxed" (the last box), "line" (the last line `Answer: X`) or
    "tag" (the last `<answer>X</answer>`). With the last two, boxes do not count."""
    verifier_timeout_s: float = 5.0
    """Seconds a single answer may be checked for; then its outcome is "timeout"."""
    verifier_workers: int = 2
    """Processes that check answers in parallel."""
    audit_share: float = 1.0
    """Share of mathematical answers that a second, independent method checks too; it never changes a reward,
    and where the two disagree the case is in RUN/audit (`phi4r rollouts audit RUN`; 0: off)."""
    judge_url: str = ""
    """OpenAI-compatible server, such as http://host:8000/v1, whose model is asked about mathematical answers
    that end in prose without a box ("": they stay no_answer). Its key: the variable PHI4R_JUDGE_API_KEY."""
    judge_model: str = ""
    """Name of that model at the server; it must say one word at once, not think aloud."""
    judge_timeout_s: float = 20.0
    """Seconds for one question to it, retries included; then the outcome is no_answer, as without it."""
    judge_deadline_s: float = 60.0
    """Seconds for all questions of a step; those that are open then are no_answer."""
    judge_concurrency: int = 16
    """Questions that are open at once."""

    def __post_init__(self) -> None:
        at_least(
            "reward",
            self,
            max_tokens=0,
            positive_tokens=0,
            negative_tokens=0,
            accuracy_weight=0,
            repetition_weight=0,
            repetition_ngram=1,
            repetition_threshold=1,
            overlong_weight=0,
            overlong_tokens=0,
            verifier_workers=1,
            judge_concurrency=1,
        )
        positive("reward", self, "verifier_timeout_s", "judge_timeout_s", "judge_deadline_s")
        require(
            not self.judge_url or self.judge_url.startswith(("http://", "https://")),
            "reward.judge_url",
            f"must begin with http:// or https://, got {self.judge_url!r}",
        )
        require(
            bool(self.judge_url) == bool(self.judge_model),
            "reward.judge_model" if self.judge_url else "reward.judge_url",
            "must be given too: reward.judge_url and reward.judge_model belong together",
        )
        between("reward", self, 0, 1, "audit_share")
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
            overlong_tokens=self.overlong_tokens or max(1, round(longest / 5)),
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
    compare: str = ""
    """Another checkpoint, evaluated on the same problems and compared in pairs ("": none)."""
    bootstrap: int = 2000
    """Resamples of problems and runs behind each interval."""

    def __post_init__(self) -> None:
        at_least("eval", self, runs=1, part=0, num_problems=0, bootstrap=100)


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Answers to prompts, to read or to train on."""

    samples: int = 1
    """Answers to each prompt, with seeds of their own."""

    def __post_init__(self) -> None:
        at_least("generate", self, samples=1)


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
        at_least(
            "curate",
            self,
            ngram=1,
            pass_rate_k=1,
            pass_rate_chunk=1,
            num_heldout=0,
            max_problem_chars=1,
            max_trace_chars=1,
        )
        positive("curate", self, "dedup_threshold")
        between("curate", self, 0, 1, "dedup_threshold", "band_low", "band_high")
        require(
            self.band_low <= self.band_high,
            "curate.band_high",
            f"must be at least curate.band_low ({self.band_low}), got {self.band_high}",
        )

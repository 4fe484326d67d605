"""Section `objective`: what RL minimises."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from phi4r.core.checks import at_least, between, positive, require

SURROGATE_SETTINGS: dict[str, tuple[str, ...]] = {
    "clip": ("clip_low", "clip_high", "dual_clip", "ratio"),
    "cispo": ("clip_low", "clip_high", "ratio"),
    "sapo": ("sapo_positive", "sapo_negative", "ratio"),
    "gmpo": ("clip_low", "clip_high"),
    "clip_cov": ("clip_low", "clip_high", "dual_clip", "cov_share", "cov_low", "cov_high"),
    "kl_cov": ("cov_share", "cov_kl_coef"),
}
"""Surrogates by name (functions of `phi4r.objectives.surrogates`) -> the settings below that each one reads;
another surrogate's are refused. One named by import path may read all."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What RL minimises: a surrogate with group-standardised advantages, a KL and an entropy term."""

    surrogate: str = "clip"
    """What takes the place of ratio x advantage: clip (PPO, GRPO, GSPO: a token that has moved far enough
    stops), cispo (it goes on, the weight of its log-prob's gradient bounded; its authors clip above only:
    clip_low = 1), sapo (a soft gate), gmpo (geometric mean of clipped ratios), clip_cov, kl_cov (tokens that
    would lower the entropy most are stopped, or held back), or your own function, package.module:name."""
    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low (gmpo: its logarithm at -clip_low)."""
    clip_high: float = 0.2
    """The probability ratio is clipped above at 1 + clip_high (gmpo: its logarithm at clip_high)."""
    dual_clip: float = 0.0
    """Bound c > 1 on the loss of negative advantages at large ratios (0: off)."""
    ratio: Literal["token", "sequence"] = "token"
    """Whose ratio: each token's, or their geometric mean over the response (GSPO)."""
    sapo_positive: float = 1.0
    """sapo: the gate's steepness for positive advantages."""
    sapo_negative: float = 1.05
    """sapo: the gate's steepness for the others."""
    cov_share: float = 0.0002
    """clip_cov, kl_cov: share of a step's tokens that are stopped, or held back; at least one."""
    cov_low: float = 1.0
    """clip_cov: tokens are drawn from those whose covariance is above this."""
    cov_high: float = 5.0
    """clip_cov: tokens are drawn from those whose covariance is below this."""
    cov_kl_coef: float = 1.0
    """kl_cov: weight of |log ratio| for the tokens held back."""
    normalization: Literal["token", "sequence", "constant"] = "token"
    """Sum over tokens / all tokens (as the paper's run), mean of per-response means (as printed), or mean of
    per-response sums / a constant (Dr. GRPO; LUSPO: constant = 1)."""
    constant: int = 0
    """Tokens that "constant" divides a response's sum by (0: reward.max_tokens)."""
    kl_coef: float = 0.001
    """Weight of the KL penalty (beta)."""
    kl_reference: Literal["old", "ref"] = "old"
    """KL against the policy that sampled ("old", as printed) or a frozen copy of the starting weights
    ("ref")."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimate: log ratio, half its square, or the unbiased and non-negative third."""
    kl_ratio: bool = False
    """Multiply the KL estimate by the probability ratio, which corrects it for samples of older weights."""
    kl_in_reward: bool = False
    """Subtract kl_coef x the KL estimate, summed over the answer, from the reward instead of adding it to the
    loss. Needs kl_reference = "ref"."""
    entropy_coef: float = 0.001
    """Weight of the entropy bonus (gamma)."""
    entropy_mean: Literal["loss", "token"] = "loss"
    """Average the entropy as the loss is normalised, or over all tokens."""
    top_entropy: float = 1.0
    """Share of a step's tokens, those with the largest entropy before its first update, that have a surrogate
    and an entropy bonus (1: all)."""
    importance_cap: float = 0.0
    """Weight tokens by pi_old / pi_rollout, at most this, where the sampler computes other log-probs than the
    trainer (0: off)."""
    importance_floor: float = 0.0
    """Lower bound of these weights."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """Beyond the bounds a weight takes the bound's value, or 0 (IcePop, with a floor)."""
    importance_level: Literal["token", "sequence", "mean"] = "token"
    """Weights of tokens, of responses (the product of their tokens'), or the geometric mean over them."""
    off_policy_limit: float = 0.0
    """Leave out the surrogate of responses of negative advantage whose tokens are less likely than when they
    were sampled by more nats than this on average (0: off)."""
    drop_truncated: bool = False
    """Leave answers that reached the length limit out of the loss; their rewards count in their group."""
    updates_per_rollout: int = 1
    """Optimizer steps on each set of samples. 1 is strictly on-policy and needs no second log-prob pass."""
    baseline: Literal["mean", "rloo", "opo"] = "mean"
    """What is subtracted from a reward: the group's mean, the mean of the group's others (RLOO), or the mean
    weighted by length (OPO)."""
    advantage_norm: Literal["std", "sample_std", "none", "batch", "tokens"] = "std"
    """Divide centred rewards by the group's population or sample standard deviation, not at all (Dr. GRPO),
    by that of the step, or shift and divide by mean and deviation over the step's tokens
    (REINFORCE++-baseline)."""
    group_keep: int = 0
    """Compare only this many samples of each group, chosen by group_filter (GFPO); the others get no
    advantage (0: compare all)."""
    group_filter: Literal["length", "efficiency"] = "length"
    """What group_keep keeps: the shortest responses, or those of the highest reward per token."""
    min_informative: float = 0.0
    """Skip a step when a smaller share of its groups than this has rewards that differ."""

    @property
    def needs_ref(self) -> bool:
        """Whether the objective reads the frozen reference's log-probs."""
        return self.kl_reference == "ref" and self.kl_coef != 0

    @property
    def selects_tokens(self) -> bool:
        """Whether some tokens are chosen among all of a step, by the policy before its first update."""
        return self.top_entropy < 1 or self.surrogate in ("clip_cov", "kl_cov")

    @property
    def needs_old(self) -> bool:
        """Whether log-probs or entropies of the policy before the step's first update are computed apart."""
        return self.updates_per_rollout > 1 or self.selects_tokens or self.kl_in_reward

    @property
    def reads_sequences(self) -> bool:
        """Whether the loss of a token depends on its response's other tokens."""
        correction = self.importance_cap > 0 and self.importance_level != "token"
        return self.ratio == "sequence" or self.surrogate == "gmpo" or correction or self.off_policy_limit > 0

    def __post_init__(self) -> None:
        at_least(
            "objective", self, clip_low=0, clip_high=0, kl_coef=0, entropy_coef=0, importance_cap=0,
            importance_floor=0, off_policy_limit=0, cov_kl_coef=0, constant=0, updates_per_rollout=1,
        )  # fmt: skip
        positive("objective", self, "sapo_positive", "sapo_negative", "cov_share", "top_entropy")
        between("objective", self, 0, 1, "min_informative", "cov_share", "top_entropy")
        if self.surrogate != "gmpo":
            require(self.clip_low <= 1, "objective.clip_low", f"must be at most 1, got {self.clip_low}")
        self._check_surrogate()
        self._check_settings_in_force()

    def _check_surrogate(self) -> None:
        """Settings of other surrogates than the one in force are refused."""
        known = SURROGATE_SETTINGS.get(self.surrogate)
        if known is None:
            require(
                ":" in self.surrogate,
                "objective.surrogate",
                f"must be one of {', '.join(SURROGATE_SETTINGS)}, or package.module:name, got"
                f" {self.surrogate!r}",
            )
            return
        others = {name for names in SURROGATE_SETTINGS.values() for name in names} - set(known)
        for field in fields(self):
            if field.name in others:
                require(
                    getattr(self, field.name) == field.default,
                    f"objective.{field.name}",
                    f"{self.surrogate} does not read it: must be {field.default!r}, got"
                    f" {getattr(self, field.name)!r}",
                )

    def _check_settings_in_force(self) -> None:
        """Settings that would do nothing, or not what they say, are refused."""
        require(
            self.dual_clip == 0 or self.dual_clip > 1,
            "objective.dual_clip",
            f"must be 0 (off) or greater than 1, got {self.dual_clip}",
        )
        require(
            self.cov_low < self.cov_high,
            "objective.cov_low",
            f"must be below objective.cov_high ({self.cov_high:g}), got {self.cov_low:g}",
        )
        require(
            self.constant == 0 or self.normalization == "constant",
            "objective.constant",
            f'only normalization = "constant" reads it: must be 0, got {self.constant}',
        )
        without = (self.importance_floor, self.importance_mode, self.importance_level)
        require(
            self.importance_cap > 0 or without == (0.0, "truncate", "token"),
            "objective.importance_cap",
            "must be above 0 where importance_floor, importance_mode or importance_level is set",
        )
        require(
            self.importance_floor <= self.importance_cap,
            "objective.importance_floor",
            f"must be at most objective.importance_cap ({self.importance_cap:g}), got"
            f" {self.importance_floor:g}",
        )
        require(
            not self.kl_in_reward or (self.needs_ref and not self.kl_ratio),
            "objective.kl_in_reward",
            'needs kl_reference = "ref", kl_coef above 0 and kl_ratio = false: a reward is given before any'
            " update",
        )
        require(
            not self.kl_ratio or self.kl_coef > 0,
            "objective.kl_ratio",
            "must be false where kl_coef is 0: there is no KL penalty",
        )
        require(
            self.entropy_mean == "loss" or self.entropy_coef > 0,
            "objective.entropy_mean",
            'must be "loss" where entropy_coef is 0: there is no entropy bonus',
        )
        require(
            self.baseline == "mean" or self.advantage_norm == "none",
            "objective.advantage_norm",
            f'must be "none" with baseline = "{self.baseline}", got "{self.advantage_norm}"',
        )
        require(
            not self.group_keep or (self.baseline == "mean" and self.advantage_norm != "tokens"),
            "objective.group_keep",
            'goes with baseline = "mean" and an advantage_norm other than "tokens"',
        )

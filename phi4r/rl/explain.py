"""`phi4r rl RECIPE --explain`: the objective in force, as formulas with its numbers."""

from __future__ import annotations

from phi4r.configs.stages import RLConfig
from phi4r.core.console import say
from phi4r.objectives.formula import formula


def explain(cfg: RLConfig) -> str:
    """What a step minimises: advantages from rewards, then the loss; one definition a line."""
    size, objective = cfg.rollout.group_size, cfg.objective
    group = "R kept" if objective.group_keep else f"R_1 .. R_{size}"
    baseline = {"mean": f"mean({group})", "rloo": "mean(R of the group's others)",
                "opo": "mean(R weighted by length)"}[objective.baseline]  # fmt: skip
    centred = f"R_i - {baseline}"
    spread = {"std": f"std({group})", "sample_std": f"sample std({group})", "none": "",
              "batch": "std(all centred R of the step)",
              "tokens": "sample std over the step's tokens"}[objective.advantage_norm]  # fmt: skip
    if objective.advantage_norm == "tokens":
        centred += " - mean over the step's tokens"
    advantage = f"({centred}) / {spread}" if spread else centred
    if objective.group_keep:
        best = {"length": "shortest", "efficiency": "best by reward per token"}[objective.group_filter]
        advantage += f" for the {objective.group_keep} {best} of {size}, 0 for the others"
    rollout, lag = cfg.rollout, cfg.rollout.policy_lag
    old = "the weights that sampled"
    if lag:
        age = "1 step" if lag == 1 else f"{lag} steps"
        old = "the weights before the step; pi_rollout: those that sampled"
        old += f" the token, at most {age} older" if rollout.mode == "continuous" else ", 1 step older"
    policies = [
        f"pi: the policy; pi_old: {old}"
        + (" (one update per rollout: pi_old = pi, r_t = 1)" if objective.updates_per_rollout == 1 else ""),
        f"samples: {cfg.rollout.prompts_per_step} prompts x {size}, from the {cfg.sampling.engine} engine at"
        f" temperature {cfg.sampling.temperature:g}"
        + (
            f", up to {rollout.max_prompt_batches} prompt batches until so many groups have rewards that"
            " differ"
            if rollout.max_prompt_batches > 1
            else ""
        )
        + (
            f"; {lag} later prompt batches are in flight meanwhile, each trained on complete, in its turn"
            if rollout.mode == "continuous"
            else ""
        ),
    ]
    return "\n".join([*policies, f"A_t = {advantage}", formula(objective)])


def main(cfg: RLConfig) -> None:
    """Print it."""
    say(explain(cfg))

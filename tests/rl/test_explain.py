"""`phi4r rl --explain` says what would be minimised, with the numbers in force and without what is off."""

from __future__ import annotations

from phi4r.configs.load import load_stage
from phi4r.rl.explain import explain


def test_the_tiny_recipes_objective_is_written_out() -> None:
    loaded = load_stage("rl", "tiny", ["objective.clip_high=0.28", "objective.importance_cap=2"])
    assert explain(loaded.config).splitlines() == [
        "pi: the policy; pi_old: the weights that sampled (one update per rollout: pi_old = pi, r_t = 1)",
        "samples: 32 prompts x 8, from the embedded engine at temperature 1",
        "A_t = (R_i - mean(R_1 .. R_8)) / std(R_1 .. R_8)",
        "r_t = pi(o_t) / pi_old(o_t)",
        "s_t = min(r_t A_t, clip(r_t, 0.8, 1.28) A_t)",
        "i_t = min(pi_old(o_t) / pi_rollout(o_t), 2)",
        "KL_t = exp(-d_t) - 1 + d_t,  d_t = log pi(o_t) - log pi_old(o_t)",
        "H_t = entropy of pi at token t",
        "l_t = -i_t s_t + 0.001 KL_t - 0.001 H_t",
        "loss = sum_i sum_t l_t / sum_i |o_i|",
    ]


def test_filters_and_norms_are_said_as_they_are() -> None:
    def line(*overrides: str) -> str:
        return explain(load_stage("rl", "tiny", overrides).config).splitlines()[2]

    assert line("objective.advantage_norm=none") == "A_t = R_i - mean(R_1 .. R_8)"
    assert line("objective.advantage_norm=batch") == (
        "A_t = (R_i - mean(R_1 .. R_8)) / std(all centred R of the step)"
    )
    assert line("objective.group_keep=4", "objective.group_filter=efficiency") == (
        "A_t = (R_i - mean(R kept)) / std(R kept) for the 4 best by reward per token of 8, 0 for the others"
    )
    drawn = explain(load_stage("rl", "tiny", ["rollout.max_prompt_batches=4"]).config).splitlines()[1]
    assert drawn.endswith(", up to 4 prompt batches until so many groups have rewards that differ")


def test_the_age_of_samples_is_said() -> None:
    def lines(*overrides: str) -> list[str]:
        found = load_stage("rl", "tiny", ["objective.importance_cap=2", *overrides])
        return explain(found.config).splitlines()[:2]

    assert lines("rollout.mode=one_step")[0] == (
        "pi: the policy; pi_old: the weights before the step; pi_rollout: those that sampled, 1 step older"
        " (one update per rollout: pi_old = pi, r_t = 1)"
    )
    policies, samples = lines("rollout.mode=continuous")
    assert "pi_rollout: those that sampled the token, at most 2 steps older" in policies
    assert samples.endswith(
        "; 2 later prompt batches are in flight meanwhile, each trained on complete, in its turn"
    )

"""The objective's values and gradients in float64 against a second, direct implementation, for every
option.

The direct one below works response by response on scalars, as the report prints the formula; it shares no
code with `phi4r.objectives`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from phi4r_kernels.linear_loss import Tokens

from phi4r.configs.sections import ObjectiveConfig
from phi4r.objectives.formula import formula
from phi4r.objectives.objective import PolicyObjective
from phi4r.objectives.terms import kl_estimate, normalization_weights

LENGTHS = [3, 5, 1, 4]
ADVANTAGES = [1.3, -0.8, 0.0, -1.7]
L_MAX = 11
VOCABULARY = 6
PLAIN = ObjectiveConfig(kl_coef=0.0, entropy_coef=0.0)

# Every option in every combination.
OPTIONS = [
    ObjectiveConfig(
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=dual,
        normalization=normalization,
        kl_coef=kl_coef,
        kl_reference=reference,
        kl_estimator=estimator,
        entropy_coef=entropy,
    )
    for dual, normalization, (kl_coef, reference, estimator), entropy in itertools.product(
        (0.0, 1.5),
        ("token", "sequence", "constant"),
        [(0.0, "old", "k3"), *itertools.product((0.3,), ("old", "ref"), ("k1", "k2", "k3"))],
        (0.0, 0.05),
    )
]
CISPO = [
    ObjectiveConfig(
        surrogate="cispo", clip_low=low, clip_high=0.28, normalization=normalization, kl_coef=0.3,
        entropy_coef=0.05,
    )
    for low, normalization in itertools.product((0.2, 1.0), ("token", "sequence", "constant"))
]  # fmt: skip


def token_loss(policy_T, entropy_T, old_T, ref_T, advantages_T, weights_T, config, **more):
    """(sum of the objective over tokens, its metrics summed); old_T None: strictly on-policy."""
    tokens = Tokens(
        policy_logprobs=policy_T, entropy=entropy_T, weights=weights_T, advantages=advantages_T,
        old_logprobs=policy_T.detach() if old_T is None else old_T, ref_logprobs=ref_T, **more,
    )  # fmt: skip
    loss_T, metrics = PolicyObjective.make(config)(tokens)
    return loss_T.sum(), {name: value.detach().sum() for name, value in metrics.items()}


def constant(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def direct_loss(logits_TV, targets_T, old_T, ref_T, config, on_policy):
    """-J of the report, term by term. Returns the loss."""
    num_responses, start = len(LENGTHS), 0
    total = torch.zeros((), dtype=torch.float64)
    for length, advantage in zip(LENGTHS, ADVANTAGES, strict=True):
        of_response = torch.zeros((), dtype=torch.float64)
        for t in range(start, start + length):
            probabilities = torch.exp(logits_TV[t]) / torch.exp(logits_TV[t]).sum()
            p = probabilities[targets_T[t]]
            p_old = p.detach() if on_policy else torch.exp(old_T[t])
            r = p / p_old
            clipped = min(max(r, constant(1 - config.clip_low)), constant(1 + config.clip_high))
            surrogate = min(r * advantage, clipped * advantage)
            if config.surrogate == "cispo":
                surrogate = clipped.item() * advantage * torch.log(p)
            if advantage < 0 and config.dual_clip > 0:
                surrogate = max(surrogate, constant(config.dual_clip * advantage))
            q = p_old if config.kl_reference == "old" else torch.exp(ref_T[t])
            kl = {
                "k1": torch.log(p / q),
                "k2": torch.log(p / q) ** 2 / 2,
                "k3": q / p - 1 - torch.log(q / p),
            }[config.kl_estimator]
            entropy = -(probabilities * torch.log(probabilities)).sum()
            of_response = of_response + surrogate - config.kl_coef * kl + config.entropy_coef * entropy
        start += length
        weight = {
            "token": 1 / sum(LENGTHS),
            "sequence": 1 / length / num_responses,
            "constant": 1 / L_MAX / num_responses,
        }[config.normalization]
        total = total - weight * of_response
    return total


def batch(seed: int = 0, spread: float = 0.5):
    """(logits [T, V] with gradient, targets, old, ref, each [T]) with ratios beyond both clips."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(LENGTHS)
    logits_TV = torch.randn(num_tokens, VOCABULARY, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    policy_T = logits_TV.log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    old_T = policy_T + spread * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    ref_T = policy_T + spread * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    return logits_TV.requires_grad_(), targets_T, old_T, ref_T


def our_loss(logits_TV, targets_T, old_T, ref_T, config):
    log_probs_TV = logits_TV.log_softmax(-1)
    policy_T = log_probs_TV.gather(1, targets_T[:, None])[:, 0]
    entropy_T = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
    weights_B, count = normalization_weights(LENGTHS, config.normalization, L_MAX)
    weights_T = torch.from_numpy(np.repeat(weights_B, LENGTHS))
    advantages_T = torch.from_numpy(np.repeat(ADVANTAGES, LENGTHS))
    loss_sum, metrics = token_loss(policy_T, entropy_T, old_T, ref_T, advantages_T, weights_T, config)
    return loss_sum / count, metrics


def gradient(loss: torch.Tensor, logits_TV: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits_TV, retain_graph=True)[0]


def assert_equal_to_rounding(ours: torch.Tensor, direct: torch.Tensor) -> None:
    """Both sum at most a few hundred float64 terms of size up to about 10."""
    torch.testing.assert_close(ours, direct, rtol=0, atol=1000 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("config", OPTIONS + CISPO, ids=lambda config: (
    f"{config.surrogate}{config.clip_low:g}-{config.normalization}-dual{config.dual_clip:g}"
    f"-kl{config.kl_coef:g}{config.kl_reference}{config.kl_estimator}"
    f"-ent{config.entropy_coef:g}"))  # fmt: skip
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.proves(
    "The objective's value and gradient, with every option", how="a direct implementation, float64"
)
def test_value_and_gradient_equal_the_direct_implementation(config: ObjectiveConfig, on_policy: bool) -> None:
    logits_TV, targets_T, old_T, ref_T = batch()
    ours, _ = our_loss(logits_TV, targets_T, None if on_policy else old_T, ref_T, config)
    direct = direct_loss(logits_TV, targets_T, old_T, ref_T, config, on_policy)
    assert_equal_to_rounding(ours, direct)
    assert_equal_to_rounding(gradient(ours, logits_TV), gradient(direct, logits_TV))


def test_the_batch_reaches_every_branch() -> None:
    """Otherwise the comparison above would prove less than it says."""
    config = replace(PLAIN, dual_clip=1.5)
    _, metrics = our_loss(*batch(), config)
    assert all(metrics[name] > 0 for name in ("clipped_low", "clipped_high", "dual_clipped"))


@pytest.mark.parametrize("config", [replace(OPTIONS[-1], kl_reference="old"), OPTIONS[-1], OPTIONS[3]])
@pytest.mark.proves("The objective's gradient is its derivative", how="finite differences, float64")
def test_gradients_agree_with_finite_differences(config: ObjectiveConfig) -> None:
    logits_TV, *rest = batch(seed=1)
    assert torch.autograd.gradcheck(lambda logits: our_loss(logits, *rest, config)[0], (logits_TV,))


def test_on_policy_equals_old_log_probs_that_are_the_policys_own() -> None:
    config = ObjectiveConfig(kl_coef=0.1, kl_estimator="k2", entropy_coef=0.01)
    logits_TV, targets_T, _, ref_T = batch()
    own_T = logits_TV.detach().log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    without, metrics = our_loss(logits_TV, targets_T, None, ref_T, config)
    given, _ = our_loss(logits_TV, targets_T, own_T, ref_T, config)
    assert torch.equal(without, given)
    assert torch.equal(gradient(without, logits_TV), gradient(given, logits_TV))
    assert metrics["ratio"] == sum(LENGTHS)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_against_old_has_no_gradient_at_ratio_one(estimator: str) -> None:
    logits_TV, targets_T, _, _ = batch()
    without, _ = our_loss(logits_TV, targets_T, None, None, PLAIN)
    held = replace(PLAIN, kl_coef=5.0, kl_reference="old", kl_estimator=estimator)
    with_kl, _ = our_loss(logits_TV, targets_T, None, None, held)
    assert torch.equal(gradient(without, logits_TV), gradient(with_kl, logits_TV))


def test_the_estimators_average_to_the_exact_kl() -> None:
    generator = torch.Generator().manual_seed(3)
    policy_V, other_V = torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy_V.exp() * (policy_V - other_V)).sum()
    for estimator in ("k1", "k3"):
        expected = (policy_V.exp() * kl_estimate(policy_V - other_V, estimator)).sum()
        torch.testing.assert_close(expected, exact, rtol=0, atol=1e-14)
    assert (kl_estimate(policy_V - other_V, "k3") >= 0).all()


def test_the_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely() -> None:
    config = replace(PLAIN, dual_clip=3.0)
    policy_T = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    old_T, advantage_T, one_T = torch.tensor([[-6.0], [-2.0], [1.0]], dtype=torch.float64)
    loss, metrics = token_loss(policy_T, one_T, old_T, None, advantage_T, one_T, config)
    assert loss == 6.0
    assert metrics["dual_clipped"] == 1
    assert torch.autograd.grad(loss, policy_T)[0] == 0
    unbounded, _ = token_loss(policy_T, one_T, old_T, None, advantage_T, one_T, PLAIN)
    assert unbounded.item() == pytest.approx(2 * np.exp(6), rel=1e-15)


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_sums_and_counts_do_not_care_how_tokens_are_cut(normalization: str) -> None:
    logits_TV, targets_T, old_T, ref_T = batch()
    config = replace(OPTIONS[-1], normalization=normalization)
    whole, metrics = our_loss(logits_TV, targets_T, old_T, ref_T, config)
    log_probs_TV = logits_TV.log_softmax(-1)
    policy_T = log_probs_TV.gather(1, targets_T[:, None])[:, 0]
    entropy_T = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
    weights_B, count = normalization_weights(LENGTHS, config.normalization, L_MAX)
    weights_T = torch.from_numpy(np.repeat(weights_B, LENGTHS))
    advantages_T = torch.from_numpy(np.repeat(ADVANTAGES, LENGTHS))
    # Cuts in the middle of responses: a microbatch or context-parallel rank may see any part.
    parts = [
        token_loss(
            policy_T[cut], entropy_T[cut], old_T[cut], ref_T[cut], advantages_T[cut], weights_T[cut], config
        )
        for cut in (slice(0, 2), slice(2, 7), slice(7, None))
    ]
    assert_equal_to_rounding(sum(loss for loss, _ in parts) / count, whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(each[name] for _, each in parts), value, rtol=1e-13, atol=1e-13)


def test_clip_counts_are_of_tokens_whose_gradient_the_clip_removed() -> None:
    logits_TV, targets_T, old_T, _ = batch()
    policy_T = logits_TV.detach().log_softmax(-1).gather(1, targets_T[:, None])[:, 0].requires_grad_()
    advantages_T = torch.from_numpy(np.repeat(ADVANTAGES, LENGTHS))
    ones_T = torch.ones_like(advantages_T)
    loss, metrics = token_loss(policy_T, ones_T, old_T, None, advantages_T, ones_T, PLAIN)
    (gradient_T,) = torch.autograd.grad(loss, policy_T)
    assert metrics["clipped_low"] + metrics["clipped_high"] == ((gradient_T == 0) & (advantages_T != 0)).sum()


def test_ratios_beyond_any_float_give_no_nan() -> None:
    policy_T = torch.tensor([0.0, -2000.0, 0.0], dtype=torch.float32, requires_grad=True)
    old_T = torch.tensor([-2000.0, 0.0, -2000.0])
    advantages_T, ones_T = torch.tensor([1.0, -1.0, -1.0]), torch.ones(3)
    loss, _ = token_loss(
        policy_T, ones_T, old_T, old_T, advantages_T, ones_T, ObjectiveConfig(kl_estimator="k2")
    )
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, policy_T)[0]).all()


# --- normalisation, settings and text


def test_normalization_weights_by_hand() -> None:
    weights, count = normalization_weights([2, 4], "token")
    assert (weights.tolist(), count) == ([1.0, 1.0], 6)
    weights, count = normalization_weights([2, 4], "sequence")
    assert (weights.tolist(), count) == ([0.5, 0.25], 2)
    weights, count = normalization_weights([2, 4], "constant", 8)
    assert (weights.tolist(), count) == ([0.125, 0.125], 2)
    assert all(
        type(normalization_weights([2, 4], mode, 8)[1]) is int for mode in ("token", "sequence", "constant")
    )


def test_normalization_refuses_what_it_cannot_divide_by() -> None:
    with pytest.raises(ValueError, match="positive"):
        normalization_weights([3, 0], "sequence")
    with pytest.raises(ValueError, match="constant"):
        normalization_weights([3], "constant")
    with pytest.raises(ValueError, match="'mean'"):
        normalization_weights([3], "mean")  # type: ignore[arg-type]


def test_the_formula_says_what_is_on_and_only_that() -> None:
    everything = ObjectiveConfig(clip_high=0.28, dual_clip=3.0, kl_reference="ref", normalization="sequence")
    assert formula(everything).splitlines() == [
        "r_t = pi(o_t) / pi_old(o_t)",
        "s_t = min(r_t A_t, clip(r_t, 0.8, 1.28) A_t)",
        "s_t = max(s_t, 3 A_t) where A_t < 0",
        "KL_t = exp(-d_t) - 1 + d_t,  d_t = log pi(o_t) - log pi_ref(o_t)",
        "H_t = entropy of pi at token t",
        "l_t = -s_t + 0.001 KL_t - 0.001 H_t",
        "loss = 1/n sum_i 1/|o_i| sum_t l_t",
    ]
    gspo = replace(PLAIN, ratio="sequence", importance_cap=2.0)
    assert formula(gspo).splitlines()[0] == "r_t = exp(mean over the response of log pi(o) - log pi_old(o))"
    assert formula(gspo).splitlines()[2:4] == [
        "i_t = min(pi_old(o_t) / pi_rollout(o_t), 2)",
        "l_t = -i_t s_t",
    ]
    cispo = replace(PLAIN, surrogate="cispo", clip_low=1.0)
    assert formula(cispo).splitlines()[1] == (
        "s_t = clip(r_t, 0, 1.2) A_t log pi(o_t),  the clipped ratio without gradient"
    )
    assert formula(PLAIN).splitlines()[2:] == ["l_t = -s_t", "loss = sum_i sum_t l_t / sum_i |o_i|"]
    assert not PLAIN.needs_ref
    assert everything.needs_ref

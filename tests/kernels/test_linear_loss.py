"""The one-pass head against whole logits and autograd in float64: values, gradients, FLOPs and memory."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phi4r_kernels.linear_loss import FusedLoss, Tokens, linear_logprobs, linear_loss
from phi4r_kernels.linear_loss import elementwise_torch as plain
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.linear_loss_reference import (
    Batch,
    LossSpec,
    assert_within_budget,
    call,
    gradients,
    make_batch,
    measured,
    written_out,
)

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
from phi4r_kernels import interpreter


@pytest.fixture(autouse=True)
def _mended() -> None:
    interpreter.install()


EVERYTHING = LossSpec(
    kind="policy", clip_low=0.2, clip_high=0.28, dual_clip=1.5, kl_coef=0.3, kl_reference="ref",
    entropy_coef=0.1, importance_cap=1.2,
)  # fmt: skip
GSPO = replace(EVERYTHING, ratio="sequence")
# Every option in every combination.
OPTIONS = [LossSpec()] + [
    LossSpec(
        kind="policy", clip_low=0.2, clip_high=0.28, dual_clip=dual, kl_coef=kl_coef, kl_reference=reference,
        kl_estimator=estimator, entropy_coef=entropy, importance_cap=cap, ratio=ratio,
    )
    for dual, (kl_coef, reference, estimator), entropy, cap, ratio in itertools.product(
        (0.0, 1.5),
        [(0.0, "old", "k3"), *itertools.product((0.3,), ("old", "ref"), ("k1", "k2", "k3"))],
        (0.0, 0.1), (0.0, 1.2), ("token", "sequence"),
    )
] + [
    LossSpec(
        kind="policy", surrogate="cispo", clip_low=low, clip_high=0.28, kl_coef=kl_coef, kl_reference="ref",
        entropy_coef=0.1, importance_cap=cap,
    )
    for low, kl_coef, cap in itertools.product((0.2, 1.0), (0.0, 0.3), (0.0, 1.2))
]  # fmt: skip


def ours(batch: Batch, spec: LossSpec, on_policy: bool = False, **options: object) -> list[Tensor]:
    """[loss, log-probs, entropies, gradient of hidden, of weight] of the head."""
    result = call(batch, spec, on_policy=on_policy, **options)
    values = [result.loss.detach(), result.logprobs_T, result.entropy_T]
    return values + gradients(result.loss, batch)


def assert_equal_in_float64(found: list[Tensor], expected: list[Tensor]) -> None:
    """Sums of at most some hundred terms of size up to about 30."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e5 * torch.finfo(torch.float64).eps)


# --- the driver and the loss, in float64


@pytest.mark.parametrize("on_policy", [False, True], ids=["off_policy", "on_policy"])
@pytest.mark.proves(
    "The one-pass head's loss and gradients, with every option of the objective",
    how="autograd on whole logits, float64",
)
def test_every_combination_of_options_equals_autograd_on_whole_logits(on_policy: bool) -> None:
    batch = make_batch(23, 5, 17, 6, sequence_lengths=[3, 9, 0, 6, 5], temperature=0.8).to(torch.float64)
    # Both clips, dual clip and the importance cap act on some token.
    ratio, gain = (written_out(batch, LossSpec(), 0.8)[1] - batch.old).exp(), batch.advantages * batch.weights
    assert ((ratio > 1.28) & (gain > 0)).any()
    assert ((ratio < 0.8) & (gain < 0)).any()
    assert ((ratio > 1.5) & (gain < 0)).any()
    assert (((batch.old - batch.rollout).exp() > 1.2) & (gain != 0)).any()
    for spec in OPTIONS:
        found = ours(batch, spec, on_policy, temperature=0.8, chunk_size=7)
        expected = measured(batch, spec, 0.8, on_policy)
        assert_equal_in_float64(found, expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=0, max_size=5), dim=st.integers(1, 6),
    vocab=st.integers(1, 30), chunk=st.integers(1, 13),
    temperature=st.sampled_from([1.0, 0.7, 2.0]), on_policy=st.booleans(),
    spec=st.sampled_from([LossSpec(), EVERYTHING, GSPO]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_and_chunk_size_equals_autograd(
    lengths: list[int], dim: int, vocab: int, chunk: int, temperature: float, on_policy: bool,
    spec: LossSpec, seed: int,
) -> None:  # fmt: skip
    made = make_batch(sum(lengths), dim, vocab, seed, sequence_lengths=lengths, temperature=temperature)
    batch = made.to(torch.float64)
    found = ours(batch, spec, on_policy, temperature=temperature, chunk_size=chunk)
    if not (batch.weights != 0).any():
        assert not any(value.any() for value in found)
    else:
        assert_equal_in_float64(found, measured(batch, spec, temperature, on_policy))


@pytest.mark.parametrize("chunk", [4, 10, 100], ids=["all span", "one spans", "none spans"])
def test_ratios_of_sequences_are_right_wherever_chunks_end(chunk: int) -> None:
    batch = make_batch(30, 4, 11, 3, sequence_lengths=[6, 17, 7]).to(torch.float64)
    batch = replace(batch, weights=batch.weights + 0.1)
    found = call(batch, GSPO, chunk_size=chunk)
    assert_equal_in_float64(
        [found.loss.detach(), *gradients(found.loss, batch)],
        [value for i, value in enumerate(measured(batch, GSPO, 1.0, False)) if i not in (1, 2)],
    )
    means = [(found.logprobs_T - batch.old)[batch.sequences == i].mean() for i in range(3)]
    assert_equal_in_float64([found.metrics["ratio"]], [torch.stack(means).exp()[batch.sequences]])


def test_the_upstream_gradient_scales_and_backward_runs_once() -> None:
    batch = make_batch(9, 4, 11).to(torch.float64)
    loss = call(batch, EVERYTHING).loss
    expected = gradients(written_out(batch, EVERYTHING)[0] * -1.7, batch)
    scaled = loss * -1.7
    assert_equal_in_float64(
        list(torch.autograd.grad(scaled, (batch.hidden, batch.weight), retain_graph=True)), expected
    )
    with pytest.raises(RuntimeError, match="runs once"):
        torch.autograd.grad(scaled, (batch.hidden, batch.weight))


def test_only_the_gradients_that_are_needed_are_made() -> None:
    batch = make_batch(9, 4, 11).to(torch.float64)
    both = ours(batch, EVERYTHING)
    for name, index in (("hidden", 3), ("weight", 4)):
        fixed = replace(batch, **{name: getattr(batch, name).detach()})
        leaf = fixed.weight if name == "hidden" else fixed.hidden
        (found,) = torch.autograd.grad(call(fixed, EVERYTHING).loss, (leaf,))
        assert torch.equal(found, both[7 - index])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_gradients_values_are_the_same_and_nothing_requires_grad(backend: str) -> None:
    batch = make_batch(9, 4, 37, dtype=torch.float32).to(torch.float32)
    with_grad = call(batch, EVERYTHING, backend=backend)
    with torch.no_grad():
        without = call(batch, EVERYTHING, backend=backend)
    assert with_grad.loss.requires_grad
    assert not without.loss.requires_grad
    assert not with_grad.loss_T.requires_grad
    for a, b in zip(with_grad[:4], without[:4], strict=True):
        # Fused and in steps, exp and log are not the same function in the interpreter to the last bit.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_logprobs_of_selected_tokens_are_those_of_the_loss() -> None:
    batch = make_batch(9, 4, 11).to(torch.float64)
    result = call(batch, LossSpec())
    logprobs, entropy = linear_logprobs(
        batch.hidden,
        batch.weight,
        batch.targets,
        select_T=batch.weights != 0,
        with_entropy=True,
        chunk_size=4,
    )
    assert_equal_in_float64([logprobs, entropy], [result.logprobs_T, result.entropy_T])
    everything, zeros = linear_logprobs(batch.hidden, batch.weight, batch.targets)
    assert (everything < 0).all()
    assert not zeros.any()
    assert not logprobs.requires_grad


# --- Triton's kernels in the interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("spec", "on_policy"),
    [
        (LossSpec(), False),
        (LossSpec(kind="policy", surrogate="cispo", kl_coef=0.3, kl_reference="ref"), False),
        (replace(EVERYTHING, kl_reference="old", kl_estimator="k1", importance_cap=0.0), False),
        (replace(EVERYTHING, kl_estimator="k2", dual_clip=0.0), False),
        (EVERYTHING, False),
        (EVERYTHING, True),
        (GSPO, False),
    ],
    ids=["cross-entropy", "cispo", "k1", "k2", "everything", "on-policy", "gspo"],
)
def test_the_kernels_stay_within_the_budget_of_a_plain_implementation(
    spec: LossSpec, on_policy: bool, dtype: torch.dtype
) -> None:
    batch = make_batch(13, 6, 133, 5, dtype=dtype, sequence_lengths=[4, 9], temperature=0.8).to(dtype)
    batch = replace(
        batch, **{n: v.to(torch.float32) for n, v in vars(batch).items() if v.dim() == 1 and n not in IDS}
    )
    found = ours(batch, spec, on_policy, temperature=0.8, chunk_size=5, backend="triton")
    assert found[3].dtype == dtype
    assert_within_budget(found, batch, spec, 0.8, on_policy)


IDS = ("targets", "sequences")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(num_tokens=st.integers(1, 6), vocab=st.integers(1, 90), dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_kernels_take_any_shape(num_tokens: int, vocab: int, dim: int, seed: int) -> None:
    batch = make_batch(num_tokens, dim, vocab, seed, dtype=torch.float32).to(torch.float32)
    batch = replace(batch, weights=batch.weights + 0.1)
    found = ours(batch, EVERYTHING, chunk_size=4, backend="triton")
    assert_within_budget(found, batch, EVERYTHING, 1.0, False)


def by_autograd(spec: LossSpec, logits: Tensor, terms: Tensor, on_policy: bool) -> Tensor:
    """[5, C] of target 0 at temperature 0.8: log-prob, entropy, the objective's loss, and its derivatives by
    both from autograd. terms [5, C]: weights, advantages, old, reference and rollout log-probs."""
    logp_CV = (logits / 0.8).log_softmax(-1)
    logprob, entropy = logp_CV[:, 0].clone(), -(logp_CV.exp() * logp_CV).sum(-1)
    leaves = [value.requires_grad_() for value in (logprob, entropy)]
    weights, advantages, old, ref, rollout = terms
    loss, _ = spec.objective()[0](
        Tokens(
            policy_logprobs=logprob, entropy=entropy, weights=weights, advantages=advantages,
            old_logprobs=logprob.detach() if on_policy else old, ref_logprobs=ref, rollout_logprobs=rollout,
        )
    )  # fmt: skip
    slopes = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    slopes = [torch.zeros_like(loss) if slope is None else slope for slope in slopes]
    return torch.stack([logprob, entropy, loss, *slopes]).detach()


@pytest.mark.parametrize("on_policy", [False, True], ids=["off_policy", "on_policy"])
@pytest.mark.proves(
    "The fused kernel's loss and derivatives are those of the torch objective, with every option",
    how="autograd in float64, the kernel in Triton's interpreter",
)
def test_the_fused_loss_of_a_token_is_autograd_of_the_objective(on_policy: bool) -> None:
    from phi4r_kernels.linear_loss import elementwise_triton as kernels

    random = torch.Generator().manual_seed(0)
    count = 60
    logits, terms = torch.randn(count, 5, generator=random), torch.randn(5, count, generator=random)
    terms[2:] = (logits / 0.8).log_softmax(-1)[:, 0] + 0.5 * terms[2:]
    terms[2:, :9] = torch.tensor([-70.0, 70.0, -22.0])[:, None]  # ratios beyond MAX_LOG_RATIO
    targets = torch.zeros(count, dtype=torch.int64)
    fused_specs = [spec for spec in OPTIONS if spec.objective()[1] is not None]
    assert len(fused_specs) == 57
    for spec in fused_specs:
        fused = spec.objective()[1]
        assert fused is not None
        found, _ = kernels.loss_and_grad(
            logits.clone(), targets, terms, fused, 0.8**-1, on_policy, logits.dtype
        )
        exact = by_autograd(spec, logits.double(), terms.double(), on_policy)
        eager = by_autograd(spec, logits, terms, on_policy)
        for row in range(5):
            budget = 2 * (eager[row] - exact[row]).abs() + 1e-5 * exact[row].abs() + 1e-6
            assert ((found[row] - exact[row]).abs() <= budget).all(), (spec, row)


def test_only_what_the_fused_kernel_states_is_fused() -> None:
    assert EVERYTHING.objective()[1] == FusedLoss(
        policy=True, clip_low=0.2, clip_high=0.28, dual_clip=1.5, kl_coef=0.3, kl_reference="ref",
        entropy_coef=0.1, importance_cap=1.2,
    )  # fmt: skip
    for change in (dict(ratio="sequence"), dict(surrogate="cispo", dual_clip=0.0)):
        assert replace(EVERYTHING, **change).objective()[1] is None


def test_the_kl_of_nearby_policies_does_not_cancel() -> None:
    from phi4r_kernels.linear_loss import elementwise_triton as kernels

    d = torch.logspace(-5, 1, 61)
    terms = torch.zeros(5, len(d))
    terms[0], terms[2] = 1.0, -d
    logits = torch.zeros(len(d), 1)  # log-prob 0
    fused = FusedLoss(policy=True, kl_coef=1.0)
    targets = torch.zeros(len(d), dtype=torch.int64)
    found = kernels.loss_and_grad(logits, targets, terms, fused, 1.0, False, torch.float32)[0][2]
    exact = torch.expm1(-d.double()) + d.double()
    assert ((found - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact).all()


# Two blocks and a tail, and less than a warp.
@pytest.mark.parametrize("vocab", [2 * 8192 + 77, 5])
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_rows_longer_than_a_block_and_gradients_over_the_logits_memory(vocab: int, low: bool) -> None:
    from phi4r_kernels.linear_loss import elementwise_triton as kernels

    random = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(3, vocab, generator=random)
    targets = torch.tensor([vocab - 1, 0, -1])  # the last is another rank's
    stats = kernels.logit_stats(logits, targets, 1.25, True)
    torch.testing.assert_close(stats, plain.logit_stats(logits, targets, 1.25, True), rtol=2e-6, atol=1e-6)
    terms = torch.rand(5, 3, generator=random)
    dtype = torch.bfloat16 if low else torch.float32
    one, other = logits.clone(), logits.clone()
    fused_loss = EVERYTHING.objective()[1]
    assert fused_loss is not None
    values, fused = kernels.loss_and_grad(other, targets, terms, fused_loss, 1.25, True, dtype)
    logprob, entropy, largest, log_sum = plain.combine(stats[None].double(), 1.25)
    torch.testing.assert_close(
        values[:2], torch.stack([logprob, entropy]).to(torch.float32), rtol=1e-5, atol=1e-5
    )
    points = torch.stack([largest, log_sum, entropy, *values[3:].double()])
    expected = plain.logit_grad(logits.double().clone(), targets, points, 1.25, torch.float64, True)
    steps = kernels.logit_grad(one, targets, points.to(torch.float32), 1.25, dtype, True)
    assert steps.data_ptr() == one.data_ptr()
    assert fused.dtype == dtype
    for found in (steps, fused):
        # A rounding of the result, and exponents of up to 30 that are right to an ulp.
        error = (found.double() - expected).abs()
        assert (error <= expected.abs() * (torch.finfo(dtype).eps / 2 + 1e-5) + 1e-12).all()


def test_a_row_does_not_depend_on_its_chunk() -> None:
    from phi4r_kernels.linear_loss import elementwise_triton as kernels

    random = torch.Generator().manual_seed(4)
    logits, terms = torch.randn(5, 300, generator=random), torch.rand(5, 5, generator=random)
    targets = torch.arange(5)
    fused = EVERYTHING.objective()[1]
    assert fused is not None

    def both(rows: slice) -> tuple[Tensor, Tensor]:
        return kernels.loss_and_grad(
            logits[rows].clone(), targets[rows], terms[:, rows].contiguous(), fused, 1.0, False, logits.dtype
        )

    values, grads = both(slice(None))
    for i in range(5):
        alone = both(slice(i, i + 1))
        assert torch.equal(alone[0][:, 0], values[:, i])
        assert torch.equal(alone[1][0], grads[i])


def test_operators_agree_with_their_fake_kernels() -> None:
    from phi4r_kernels.linear_loss import elementwise_triton as kernels

    logits, targets, terms = torch.randn(3, 40), torch.arange(3), torch.rand(5, 3)
    fused = EVERYTHING.objective()[1]
    assert fused is not None
    numbers, flags = kernels._numbers(fused), kernels._flags(fused, False)
    checks = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (kernels._stats_op, (logits, targets, 1.0, True)),
        (kernels._grad_op, (logits, targets, torch.rand(5, 3), 1.0, False, True)),
        (kernels._loss_and_grad_op, (logits, targets, terms, 1.0, True, numbers, flags)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=checks)


# --- what may be anything, what is never held, what it costs


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("spec", [LossSpec(), EVERYTHING, GSPO], ids=["ce", "everything", "gspo"])
def test_tokens_without_weight_may_hold_anything(backend: str, spec: LossSpec) -> None:
    batch = make_batch(11, 4, 19, 1, dtype=torch.float32, sequence_lengths=[5, 6]).to(torch.float32)
    off = batch.weights == 0
    assert off.any()
    nan = float("nan")
    poison = {name: getattr(batch, name).where(~off, nan) for name in ("advantages", "old", "ref", "rollout")}
    poison["hidden"] = batch.hidden.detach().where(~off[:, None], nan).requires_grad_()
    poison["targets"] = batch.targets.where(~off, -100)
    clean, poisoned = (
        ours(b, spec, chunk_size=4, backend=backend) for b in (batch, replace(batch, **poison))
    )
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
    assert not poisoned[3][off].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_in_a_token_that_counts_is_not_lost(backend: str) -> None:
    batch = make_batch(6, 4, 19, dtype=torch.float32).to(torch.float32)
    batch = replace(batch, weights=torch.ones(6))
    for name in ("old", "ref", "advantages", "rollout"):
        bad = replace(batch, **{name: getattr(batch, name).index_fill(0, torch.tensor([2]), float("nan"))})
        assert call(bad, EVERYTHING, backend=backend).loss.isnan(), name
    hidden = batch.hidden.detach().index_fill(0, torch.tensor([2]), float("inf"))
    assert not call(replace(batch, hidden=hidden), EVERYTHING, backend=backend).loss.isfinite()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_large_logits_do_not_overflow(backend: str) -> None:
    hidden = torch.full((2, 7), 1e3, requires_grad=True)
    weight = torch.linspace(-1, 1, 23)[:, None].expand(23, 7).contiguous()
    objective = LossSpec(kind="policy", entropy_coef=0.1).objective()[0]
    terms = {"advantages": torch.ones(2)}
    result = linear_loss(
        hidden, weight, torch.tensor([22, 0]), torch.ones(2), objective=objective, terms=terms,
        with_entropy=True, backend=backend,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in result[:4])
    assert result.logprobs_T[0] == 0
    assert result.logprobs_T[1] < -1e4
    assert torch.autograd.grad(result.loss, hidden)[0].isfinite().all()


def gemm_flops(spec: LossSpec, chunk: int, lengths: list[int], leaves: str, weighted: int) -> float:
    """FLOPs of a call and its backward in units of 2 N D V, N tokens with a weight."""
    num_tokens, dim, vocab = sum(lengths), 8, 32
    batch = make_batch(num_tokens, dim, vocab, sequence_lengths=lengths).to(torch.float64)
    batch = replace(batch, weights=(torch.arange(num_tokens) < weighted).double())
    batch = replace(
        batch, **{n: getattr(batch, n).detach() for n in ("hidden", "weight") if n not in leaves.split()}
    )
    with FlopCounterMode(display=False) as counter:
        result = call(batch, spec, chunk_size=chunk)
        if result.loss.requires_grad:
            result.loss.backward()
    return counter.get_total_flops() / (2 * weighted * dim * vocab)


def test_gemms_are_3_for_a_step_1_without_gradients_4_for_sequences() -> None:
    both = "hidden weight"
    assert gemm_flops(EVERYTHING, 7, [24], both, 24) == 3
    assert gemm_flops(EVERYTHING, 7, [24], both, 10) == 3, "tokens without weight cost nothing"
    assert gemm_flops(EVERYTHING, 7, [24], "hidden", 24) == 2
    assert gemm_flops(EVERYTHING, 7, [24], "", 24) == 1
    assert gemm_flops(GSPO, 8, [8, 3, 5, 8], both, 24) == 3, "no sequence is longer than a chunk"
    assert gemm_flops(GSPO, 8, [24], both, 24) == 4
    assert gemm_flops(GSPO, 12, [6, 18], both, 24) == 3.75, "only the long one goes through twice"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.proves("The head never holds logits of all tokens", how="largest allocation of torch, profiled")
def test_no_full_logits_are_ever_held(backend: str) -> None:
    num_tokens, vocab, chunk = 256, 4096, 64
    batch = make_batch(num_tokens, 8, vocab, dtype=torch.float32).to(torch.float32)
    batch = replace(batch, weights=torch.ones(num_tokens))
    with torch.profiler.profile(profile_memory=True) as profile:
        call(batch, EVERYTHING, chunk_size=chunk, backend=backend).loss.backward()
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten"))
    assert largest <= 4 * vocab * chunk * 1.01  # a chunk of fp32 logits, 1 MiB, of 4 MiB


# --- what is refused


@pytest.mark.parametrize("spec", [EVERYTHING, GSPO], ids=["everything", "gspo"])
def test_a_call_without_a_token_reports_the_same_metrics(spec: LossSpec) -> None:
    batch = make_batch(5, 4, 9, sequence_lengths=[2, 3]).to(torch.float64)
    result = call(replace(batch, weights=torch.zeros(5)), spec)
    assert list(result.metrics) == list(call(batch, spec).metrics)
    assert not any(values.any() for values in (*result[:4], *result.metrics.values()))
    assert not any(gradient.any() for gradient in gradients(result.loss, batch))


def test_shapes_and_options_that_disagree_are_refused() -> None:
    batch = make_batch(5, 4, 9).to(torch.float64)
    good = dict(
        hidden_TD=batch.hidden, weight_VD=batch.weight, targets_T=batch.targets, weights_T=batch.weights
    )
    policy, _ = LossSpec(kind="policy").objective()
    for change, message in (
        (dict(hidden_TD=batch.hidden[:, :3]), r"\(5, 3\) and weight \(9, 4\)"),
        (dict(hidden_TD=batch.hidden.to(torch.float32)), "float32 and weight torch.float64"),
        (dict(targets_T=batch.targets[:3]), r"targets has shape \(3,\) for 5 tokens"),
        (dict(terms={"advantages": batch.advantages[:1]}), r"advantages has shape \(1,\)"),
        (dict(temperature=0.0), "positive"),
        (dict(chunk_size=0), "positive"),
        (dict(backend="cuda"), "'cuda'"),
        (dict(objective=lambda tokens: (tokens.policy_logprobs.sum(), {})), r"loss has shape \(\) for"),
        (dict(objective=lambda tokens: (-tokens.sequence_mean(tokens.weights), {})), "sequences_T"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_loss(**{**good, **change})
    needs = dict(weights_T=torch.ones(5), terms={"advantages": batch.advantages}, objective=policy)
    with pytest.raises(ValueError, match="must not decrease"):
        linear_loss(**{**good, **needs, "sequences_T": torch.tensor([0, 1, 0, 1, 1])})

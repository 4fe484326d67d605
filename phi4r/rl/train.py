"""GRPO on verifiable problems: the loop that made Phi-4-reasoning-plus.

    give the engine the weights -> choose prompts -> roll out group_size samples -> verify and reward ->
    advantages -> packed rows -> reference and old log-probs, where needed -> optimizer steps -> log

Every sample of a step comes from the weights that the step begins with or, unless `rollout.mode` is sync,
from weights of a bounded policy lag (`rl.queue`). With one update per rollout the old policy is the
one that is trained, the ratio is 1 by definition, and no pass for old log-probs is run; where the sampler is
another program or lags, `objective.importance_cap` weighs each token by what its log-prob under the weights
that sampled it differs by.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi4r.configs.sections import RolloutConfig
from phi4r.configs.stages import RLConfig
from phi4r.core.console import say
from phi4r.core.seeds import Stream, epoch_order
from phi4r.data.packing import Document, PackedRow
from phi4r.objectives.terms import kl_estimate
from phi4r.parallel.layout import distributed_session, init_layout
from phi4r.rl.advantages import advantages_of
from phi4r.rl.batch import (
    pack_updates,
    policy_loss,
    response_documents,
    with_entropy_weights,
    with_extra,
    with_selected_tokens,
)
from phi4r.rl.collect import Collector, Trajectory
from phi4r.rl.problems import load_run_problems
from phi4r.rl.rollout_log import write_audit, write_rollouts
from phi4r.sampling.open import open_rollout_engine
from phi4r.train.engine import Engine, StepResult
from phi4r.train.loop import open_loop
from phi4r.train.session import open_frozen, open_tokenizer, resolve_model
from phi4r.verify.pool import VerifierPool


def main(cfg: RLConfig, run_dir: Path) -> None:
    """Train, on every rank of the job; the same call with the same run folder resumes."""
    with distributed_session():
        layout = init_layout(cfg.parallel, cfg.seed)
        tokenizer = open_tokenizer(cfg.tokenizer, cfg.init.checkpoint)
        model = resolve_model(cfg.model, tokenizer, cfg.init.checkpoint)
        problems, prompts = load_run_problems(cfg.problems, cfg.rollout, tokenizer, cfg.seed, run_dir, layout)
        policy = Engine(model, cfg.parallel, layout, cfg.train, cfg.optimizer)
        reference = open_frozen(policy, cfg.parallel, cfg.init, cfg.seed) if cfg.needs_reference else None
        say(
            f"rl: {model.num_parameters:,} parameters on {layout.world_size} rank(s),"
            f" {len(problems):,} problems"
        )
        with (
            VerifierPool(cfg.reward.verifier_workers, cfg.reward.verifier_timeout_s) as verifier,
            open_loop(cfg, run_dir, policy, tokenizer, "rl") as loop,
            open_rollout_engine(cfg, policy, tokenizer.eos_ids, prompts, run_dir) as engine,
        ):
            collector = Collector(
                cfg, engine, verifier, tokenizer, problems, prompts, run_dir,
                next_batch=loop.state.next_batch, step=loop.start_step, order_state=loop.state.curriculum,
            )  # fmt: skip
            for step in loop.steps():
                loop.begin_step()
                loop.clock.phase("rollout")
                collector.queue.before_sync()
                loop.clock.phase("sync")
                synced = engine.sync(step)
                loop.clock.phase("rollout")
                found = collector.collect(step)
                loop.clock.sampled(found.sampling)
                loop.state = replace(
                    loop.state, next_batch=collector.next_batch, curriculum=collector.order.state()
                )
                if layout.is_main:
                    rows = (t.record(step + 1, tokenizer) for t in found.trajectories)
                    write_rollouts(run_dir, step + 1, rows)
                    graded = ((t.problem, t.sample, t.verdict) for t in found.trajectories)
                    write_audit(run_dir / "audit", step + 1, graded, cfg.seed)
                metrics = found.metrics(step) | synced
                informative = found.groups.informative_share >= cfg.objective.min_informative
                loop.clock.phase("train")
                metrics |= update(cfg, policy, reference, found.used, step, informative, loop.check_finite)
                check_gap(cfg.rollout, metrics, step + 1)
                shown: dict[str, Any] = {
                    k: metrics[k] for k in ("reward", "accuracy", "response_length", "loss") if k in metrics
                }
                loop.finish_step(step, metrics, shown, sum(t.sample.num_tokens for t in found.used))


def update(
    cfg: RLConfig,
    policy: Engine,
    reference: Engine | None,
    trajectories: Sequence[Trajectory],
    step: int,
    informative: bool,
    check: Callable[[int, StepResult, Sequence[PackedRow], float], None],
) -> dict[str, Any]:
    """The optimizer steps on one set of trajectories; returns their metrics (means over the updates).

    Where the samples are not `informative` the weights stay as they are and the metrics are only measured:
    groups without variance have no advantages, and what is left pulls on noise.
    """
    objective, temperature = cfg.objective, cfg.sampling.temperature
    constant = cfg.reward.max_tokens or cfg.sampling.max_new_tokens
    documents = response_documents(
        [t.sample for t in trajectories],
        [t.advantage for t in trajectories],
        objective,
        constant,
    )
    num_updates = objective.updates_per_rollout
    updates = pack_updates(
        documents, deal(len(documents), num_updates, cfg.seed, step), row_length(cfg, documents)
    )
    rows = [row for part in updates for row in part]
    if reference is not None:
        rows = with_extra(rows, "ref_logprobs", reference.forward(rows, temperature=temperature)[0])
    metrics: dict[str, Any] = {}
    if objective.needs_old:
        old_RT, entropies_RT = policy.forward(rows, temperature=temperature, with_entropy=True)
        rows = with_extra(rows, "old_logprobs", old_RT)
        if objective.kl_in_reward:
            rows, metrics = subtract_kl(rows, trajectories, cfg)
        if objective.selects_tokens:
            random = np.random.default_rng([cfg.seed, Stream.SELECTED_TOKENS, step])
            rows = with_selected_tokens(rows, entropies_RT, objective, random)
    loss = policy_loss(objective, on_policy=num_updates == 1, gap_threshold=cfg.rollout.gap_threshold)
    lr = cfg.optimizer.learning_rate(step, cfg.train.num_steps)
    results, left = [], iter(rows)
    for part in updates:
        batch = list(itertools.islice(left, len(part)))
        batch = with_entropy_weights(batch) if objective.entropy_mean == "token" else batch
        if informative:
            result = policy.train_step(batch, loss, lr, temperature=temperature, with_entropy=True)
            check(step, result, batch, temperature)
        else:
            result = policy.evaluate(batch, loss, temperature=temperature, with_entropy=True)
        results.append(result)
    return {**metrics, **update_metrics(results), "lr": lr}


def deal(num_documents: int, num_updates: int, seed: int, step: int) -> list[np.ndarray]:
    """The indices of the documents in `num_updates` parts of nearly equal size, shuffled by the counters
    (seed, step)."""
    if num_updates == 1:
        return [np.arange(num_documents)]
    order = epoch_order(seed, Stream.UPDATES, step, num_documents)
    return [part for part in np.array_split(order, num_updates) if len(part)]


def row_length(cfg: RLConfig, documents: Sequence[Document]) -> int:
    """Tokens of a packed row: `rollout.row_tokens`, or more where the longest possible sample needs it."""
    longest = max(len(document.tokens) for document in documents)
    possible = cfg.rollout.max_prompt_tokens + cfg.sampling.max_new_tokens
    return cfg.parallel.fit_row(max(longest, possible, cfg.rollout.row_tokens))


def subtract_kl(
    rows: Sequence[PackedRow], trajectories: Sequence[Trajectory], cfg: RLConfig
) -> tuple[list[PackedRow], dict[str, Any]]:
    """The rows with the advantages of rewards from which kl_coef times the answer's KL estimate is
    subtracted, and the mean of these estimates as metric `reward_kl`."""
    kl = np.zeros(len(trajectories))
    for row in rows:
        targets = row.loss_mask > 0
        difference = (row.extras["old_logprobs"] - row.extras["ref_logprobs"])[targets].astype(np.float64)
        estimate = kl_estimate(torch.from_numpy(difference), cfg.objective.kl_estimator)
        np.add.at(kl, row.doc_index[targets], estimate.numpy())
    shape = (-1, cfg.rollout.group_size)
    rewards = np.array([t.reward.total for t in trajectories]) - cfg.objective.kl_coef * kl
    lengths = np.array([t.sample.num_tokens for t in trajectories])
    groups = advantages_of(rewards.reshape(shape), lengths.reshape(shape), cfg.objective)
    advantages = groups.advantages.ravel()
    values = [np.where(row.loss_mask > 0, advantages[row.doc_index], 0.0) for row in rows]
    return with_extra(rows, "advantages", values), {"reward_kl": float(np.mean(kl))}


def update_metrics(results: Sequence[StepResult]) -> dict[str, Any]:
    """The objective's metrics over the updates of a step: per-token means, and means of losses and gradient
    norms. `effective_sample_share` is (sum w)^2 / (n sum w^2) of w = pi_trainer / pi_rollout: 1 where sampler
    and trainer agree."""
    totals = {name: sum(r.sums[name] for r in results) for name in results[0].sums}
    num_tokens = max(totals["num_tokens"], 1.0)
    others = ("num_tokens", "max_logprob_gap", "logprob_far", "rollout_weight", "rollout_weight_squared")
    weight, squared = totals["rollout_weight"], totals["rollout_weight_squared"]
    return {
        "loss": float(np.mean([r.loss for r in results])),
        "grad_norm": float(np.mean([r.grad_norm for r in results])),
        **{name: total / num_tokens for name, total in totals.items() if name not in others},
        "max_logprob_gap": max(r.sums["max_logprob_gap"] for r in results),
        "logprob_far_share": totals["logprob_far"] / num_tokens,
        "effective_sample_share": weight**2 / max(squared * num_tokens, 1e-12),
        "num_valid_tokens": int(totals["num_tokens"]),
        "skipped": sum(not r.applied for r in results),
    }


def check_gap(rollout: RolloutConfig, metrics: dict[str, Any], step: int) -> None:
    """Raise the alarm where sampler and trainer are too far apart: adds `gap_alarm` to the metrics. Raises
    RuntimeError where the run is to stop."""
    gap = metrics["logprob_gap"]
    metrics["gap_alarm"] = int(not gap <= rollout.gap_alarm)
    if not metrics["gap_alarm"]:
        return
    text = (
        f"step {step}: the sampler's log-probs differ from the trainer's by {gap:.4g} nats a token on average"
        f" (at most {metrics['max_logprob_gap']:.4g}, {metrics['logprob_far_share']:.1%} of tokens by more"
        f" than {rollout.gap_threshold:g}); rollout.gap_alarm = {rollout.gap_alarm:g}"
    )
    if rollout.on_gap_alarm == "stop":
        raise RuntimeError(text)
    say(f"rl: warning: {text}")

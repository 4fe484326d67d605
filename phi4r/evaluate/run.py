"""`phi4r eval`: repeated runs over a set of problems, their statistics, and a paired comparison.

The one module of this folder that samples from a model; the others work on result files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from phi4r.configs.stages import EvalConfig
from phi4r.core.console import console, is_main_rank
from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_json
from phi4r.core.problem import Problem
from phi4r.core.seeds import Stream
from phi4r.evaluate.results import (
    Results,
    SummarySettings,
    compare,
    evaluate_samples,
    summarise,
    summary_table,
    write_results,
)
from phi4r.parallel.layout import broadcast_object, distributed_session, init_layout
from phi4r.rl.problems import get_problems
from phi4r.rl.rollout_log import write_audit
from phi4r.sampling.service import open_service
from phi4r.sampling.types import Response, to_responses
from phi4r.tasks import grade_responses
from phi4r.verify.pool import VerifierPool
from phi4r.verify.strict import Verdict


def main(cfg: EvalConfig, checkpoint: str, run_dir: Path) -> None:
    """Evaluate `checkpoint`, and `eval.compare` if set, on every rank; rank 0 writes results.jsonl and
    summary.json."""
    with distributed_session():
        settings = SummarySettings(bootstrap=cfg.eval.bootstrap, seed=cfg.seed)
        before, summaries, gain = None, {}, None
        # The two are told apart by their names, or by their whole paths where these are the same.
        same_name = Path(cfg.eval.compare).name == Path(checkpoint).name
        name, other = (path if same_name else Path(path).name for path in (checkpoint, cfg.eval.compare))
        if cfg.eval.compare:
            before = evaluate_checkpoint(cfg, cfg.eval.compare, run_dir / "compare_results.jsonl")
            summaries[other] = summarise(before, settings)
        results = evaluate_checkpoint(cfg, checkpoint, run_dir / "results.jsonl")
        summaries[name] = summarise(results, settings)
        document = {"checkpoint": checkpoint, **summaries[name]}
        if before is not None:
            gain = compare(before, results, settings)
            document |= {"compare": {"checkpoint": cfg.eval.compare, **summaries[other]}, "gain": gain}
        if is_main_rank():
            atomic_write_json(run_dir / "summary.json", document)
        console().print(summary_table(summaries, gain), soft_wrap=False)


def evaluate_checkpoint(cfg: EvalConfig, checkpoint: str, path: Path) -> Results:
    """All runs of one checkpoint; writes the result file on rank 0 and returns the results on every rank."""
    layout = init_layout(cfg.parallel)
    problems = broadcast_object(_problems(cfg, path.parent) if layout.is_main else None)
    first_run = cfg.eval.part * cfg.eval.runs
    seeds = list(range(first_run, first_run + cfg.eval.runs))
    with open_service(
        cfg.sampling, cfg.vllm, cfg.parallel, cfg.tokenizer, checkpoint, path.parent
    ) as service:
        system = cfg.problems.system_message
        requests = [
            service.request(problem, system, (cfg.seed, Stream.EVAL_SAMPLES, run, index))
            for run in seeds
            for index, problem in enumerate(problems)
        ]
        answers = service.answer(requests, f"eval {Path(checkpoint).name}")
    results = None
    if layout.is_main:
        runs = [
            to_responses(answers[start : start + len(problems)], 1, service.tokenizer)
            for start in range(0, len(answers), len(problems))
        ]
        audit = path.with_name(path.name.replace("results.jsonl", "audit"))
        with VerifierPool(cfg.reward.verifier_workers, cfg.reward.verifier_timeout_s) as pool:
            results = evaluate_samples(problems, runs, checker(pool, cfg, audit), seeds=seeds)
        write_results(path, results)
    return broadcast_object(results)


def _problems(cfg: EvalConfig, run_dir: Path) -> list[Problem]:
    count = cfg.eval.num_problems
    problems = get_problems(cfg.problems, cfg.seed, run_dir / "rejects.jsonl", use="eval", count=count)
    if not problems:
        raise UserError("eval: there are no problems")
    return problems[:count] if count else problems


def checker(
    pool: VerifierPool, cfg: EvalConfig, audit: Path
) -> Callable[[Sequence[Problem], Sequence[Response]], list[Verdict]]:
    """The check of evaluation: the one that serves the reward. Run by run; disagreements of its audit are
    written to the folder `audit`, a file for each run."""
    runs = itertools.count(cfg.eval.part * cfg.eval.runs)

    def check(problems: Sequence[Problem], samples: Sequence[Response]) -> list[Verdict]:
        pairs = [(p, s.text) for p, s in zip(problems, samples, strict=True)]
        verdicts = grade_responses(pairs, pool, cfg.reward, [s.finished for s in samples])
        write_audit(audit, next(runs), zip(problems, samples, verdicts, strict=True), cfg.seed)
        return verdicts

    return check

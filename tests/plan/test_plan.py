"""`phi4r plan` and `phi4r.plan.check`: what they answer, and how quickly."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from phi4r.configs.load import load_stage
from phi4r.configs.sections import ModelConfig, ParallelConfig, TrainConfig
from phi4r.configs.stages import RLConfig, SFTConfig
from phi4r.core.errors import UserError
from phi4r.plan import check, scale, split
from phi4r.plan.command import Options, main, plan, prepare
from phi4r.plan.hardware import GPUS, load_rates
from phi4r.plan.memory import GIB, kv_bytes, worst_stage
from phi4r.plan.search import overrides
from phi4r.plan.speed import model_flops_per_token, step_time, tokens_per_step
from phi4r.plan.states import rank_states

ROOT = Path(__file__).resolve().parents[2]


def recipe(stage: str, name: str, *words: str) -> SFTConfig | RLConfig:
    config = load_stage(stage, name, words).config
    assert isinstance(config, SFTConfig | RLConfig)
    return config


def test_recipes_fit_the_gpus_they_are_laid_out_for() -> None:
    for stage, name in (("sft", "phi4_sft"), ("rl", "phi4_grpo")):
        verdict = check(recipe(stage, name), gpus=32, gpu_memory_gib=GPUS["h100"].memory_gib)
        assert verdict.fits, verdict.reason
        assert 20 < verdict.needed_gib < verdict.usable_gib


def test_a_run_that_does_not_fit_is_told_by_how_much_and_why() -> None:
    config = recipe("sft", "phi4_sft", "train.recompute=none", "parallel.cp=1", "parallel.dp=8")
    verdict = check(config, gpus=32, gpu_memory_gib=79.1)
    assert not verdict.fits
    excess = f"{verdict.needed_gib - verdict.usable_gib:.1f} GiB too much"
    assert excess in verdict.reason
    assert "activations" in verdict.reason


def test_a_layout_for_another_number_of_gpus_does_not_fit() -> None:
    verdict = check(recipe("sft", "phi4_sft"), gpus=16, gpu_memory_gib=79.1)
    assert not verdict.fits
    assert "32 ranks, but there are 16 GPUs" in verdict.reason


def test_an_unknown_vocabulary_is_said_and_not_guessed() -> None:
    verdict = check(recipe("sft", "tiny"), gpus=1, gpu_memory_gib=79.1)
    assert verdict.fits
    assert "vocab_size" in verdict.reason


def test_phi4_weights_and_adam_take_the_bytes_of_the_formula() -> None:
    model = ModelConfig.from_preset("phi4")
    plain = rank_states(model, ParallelConfig(distributed_optimizer=False))
    numel = 14_659_507_200
    assert (plain.parameters, plain.gradients, plain.optimizer) == (2 * numel, 4 * numel, 12 * numel)
    cut = ParallelConfig(dp=8)
    shards = [rank_states(model, cut, shard=shard).optimizer for shard in range(8)]
    assert sum(shards) == 12 * numel
    assert max(shards) - min(shards) <= 12 * 128


def test_a_full_sequence_of_phi4_keeps_6_25_gib_of_keys_and_values() -> None:
    config = recipe("rl", "phi4_grpo", "sampling.num_slots=1", "parallel.tp=1", "parallel.sp=false",
                    "parallel.pp=1")  # fmt: skip
    assert isinstance(config, RLConfig)
    assert kv_bytes(config, config.model.num_layers) == 32_768 * 204_800


def test_flops_per_token_are_those_of_the_reference() -> None:
    config = recipe("sft", "phi4_sft")
    fixed = model_flops_per_token(config, 0)
    assert fixed == pytest.approx(84.9e9, rel=1e-3)
    assert (model_flops_per_token(config, 1000) - fixed) / 1000 == pytest.approx(1.23e6, rel=1e-2)


def test_the_best_layout_fits_every_gpu_and_is_given_as_overrides() -> None:
    loaded = load_stage("sft", "phi4_sft")
    found, cluster, _ = plan(loaded, Options(nodes=4))
    best = found.fitting[0]
    words = [word.removeprefix("--").replace(" ", "=") for word in overrides(best.config)]
    again = recipe("sft", "phi4_sft", *words)
    assert again.parallel == best.config.parallel
    assert check(again, gpus=cluster.gpus, gpu_memory_gib=cluster.rates.gpu.memory_gib).fits
    times = [candidate.time.total for candidate in found.fitting]
    assert times == sorted(times)
    assert all(candidate.excess_gib(cluster) > 0 for candidate in found.too_big)


def test_tensor_parallel_five_and_ten_are_for_nodes_that_they_divide() -> None:
    found, _, _ = plan(load_stage("sft", "phi4_sft"), Options(nodes=5))
    assert "8 GPUs of a node" in found.refused["tp 5"]
    assert {c.config.parallel.tp for c in found.fitting + found.too_big} == {1, 2}
    rows = ["data.seq_length=32760"]  # sequence parallelism cuts rows into tp parts
    found, _, _ = plan(load_stage("sft", "phi4_sft", rows), Options(nodes=4, gpus_per_node=10))
    assert {c.config.parallel.tp for c in found.fitting + found.too_big} == {1, 2, 5, 10}


def test_recomputing_layers_costs_time_and_saves_memory() -> None:
    rates = load_rates(GPUS["h100"])
    _, _, work = plan(load_stage("sft", "phi4_sft"), Options())
    none = recipe("sft", "phi4_sft", "train.recompute=none")
    full = recipe("sft", "phi4_sft", "train.recompute=full")
    slower, faster = (step_time(config, rates, 8, work).total for config in (full, none))
    assert 1.2 < slower / faster < 1.4
    assert worst_stage(full).activations < worst_stage(none).activations / 4


def test_measured_rows_replace_anchors_and_say_so(tmp_path: Path) -> None:
    columns = "device,op,mode,impl,dtype,tokens,tflops,gemm_tflops,copy_gb_s\n"
    line = "NVIDIA H200,attention,forward,ours,bfloat16,32768,500,700,4000\n"
    (tmp_path / "attention.csv").write_text(columns + line)
    rates = load_rates(GPUS["h200"], tmp_path)
    assert (rates.attention_forward.value, rates.gemm.value, rates.copy.value) == (500, 700, 4000)
    assert "measured (attention.csv" in rates.attention_forward.source
    assert "anchor" in rates.attention_backward.source
    assert "anchor" in load_rates(GPUS["h100"], tmp_path).gemm.source


def test_no_layout_that_fits_is_an_error_after_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no layout fits"):
        main(load_stage("sft", "phi4_sft"), Options(nodes=1, gpus_per_node=1))
    assert "does not fit, recompute full" in capsys.readouterr().out


def planned(*words: str) -> subprocess.CompletedProcess[str]:
    """`phi4r plan`, with the names of all modules it imports on stderr. Its time: benchmarks/startup.py."""
    command = [sys.executable, "-X", "importtime", "-m", "phi4r", "plan", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return ended


def test_the_command_answers_without_torch() -> None:
    ended = planned("phi4_sft", "--nodes", "64")
    assert "| torch" not in ended.stderr
    for part in ("best: ", "does not fit", "not legal: tp 5", "rates:", "--parallel.tp", "submit:"):
        assert part in ended.stdout


def test_a_simulation_answers_without_torch_and_says_which_split_is_best() -> None:
    ended = planned("phi4_grpo", "--nodes", "4", "--simulate")
    for module in ("torch", "numpy", "matplotlib"):
        assert f"| {module}\n" not in ended.stderr
    for part in ("1 + 3 (12 of 2 GPUs)", "over-sampled, 2 ahead", "best: ", "14,000", "days in all"):
        assert part in ended.stdout


def rl_plan(nodes: int, growth: tuple[int, ...], *words: str) -> split.Plan:
    config, cluster = prepare(load_stage("rl", "phi4_grpo", words), Options(nodes=nodes))
    assert isinstance(config, RLConfig)
    return split.plan_splits(config, cluster, growth)


def test_the_best_split_is_the_fastest_and_the_sentence_says_so() -> None:
    found = rl_plan(4, (4000,))
    assert {(one.trainer_nodes, one.rollout_nodes) for one in found.splits} == {(1, 3), (2, 2), (3, 1)}
    steps = [min(run.mean_step_s for run in one.results.values()) for one in found.splits]
    assert steps == sorted(steps)
    first = found.splits[0]
    assert first.results[found.best_mode].mean_step_s == steps[0]
    assert f"{steps[0]:.1f} s a step" in split.explain(found)
    for one in found.splits:
        assert one.servers.count * one.server_gpus == 8 * one.rollout_nodes
        for name, run in one.results.items():
            assert min(run.trainer_busy, run.rollouts_busy) <= one.gpu_use(name)
            assert one.gpu_use(name) <= max(run.trainer_busy, run.rollouts_busy)
    assert found.growth == [(4000, first.results)]


def test_longer_answers_take_longer_and_cheaper_weights_less() -> None:
    found = rl_plan(3, (2000, 6000, 12_000))
    for mode in found.modes:
        steps = [results[mode.name].mean_step_s for _, results in found.growth]
        assert steps == sorted(steps)
        # a run goes evenly through them, so that each half weighs the mean of its ends
        assert split.mean(steps) == pytest.approx((steps[0] + 2 * steps[1] + steps[2]) / 4)
    config, cluster = prepare(load_stage("rl", "phi4_grpo"), Options(nodes=3))
    assert isinstance(config, RLConfig)
    quick = split.plan_splits(config, cluster, (6000,), sync_s=1.0)
    slower, faster = (
        plan.splits[0].results["synchronous"].mean_step_s for plan in (rl_plan(3, (6000,)), quick)
    )
    assert slower - faster == pytest.approx(found.runs.sync_s - 1.0)


def test_a_server_cannot_decode_faster_than_it_reads_its_weights() -> None:
    config = recipe("rl", "phi4_grpo")
    assert isinstance(config, RLConfig)
    rates = load_rates(GPUS["h100"], None)
    cost = split.server_cost(config, rates, 2)
    weights = 2 * 14_659_507_200 / 2
    assert cost.fixed_s == pytest.approx(weights / 3e12 + split.LAUNCH_S * 40)
    assert cost.context_s == pytest.approx(204_800 / 2 / 3e12)  # keys and values of a token over two GPUs
    assert cost.step_s(8) == cost.fixed_s, "few sequences cost nothing more"
    assert cost.step_s(400) > 1.5 * cost.fixed_s, "many are bound by products"


def test_the_simulation_is_drawn(tmp_path: Path) -> None:
    main(load_stage("rl", "phi4_grpo"), Options(nodes=2, response_tokens=3000, plot=str(tmp_path / "a.png")))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"--plot .*a\.xyz"):
        main(
            load_stage("rl", "phi4_grpo"),
            Options(nodes=2, response_tokens=3000, plot=str(tmp_path / "a.xyz")),
        )


def test_what_cannot_be_simulated_is_refused() -> None:
    for stage, name, options, reason in (
        ("sft", "phi4_sft", Options(simulate=True), "--simulate is for rl"),
        ("rl", "phi4_grpo", Options(simulate=True, nodes=1), "--nodes must be 2 or more"),
        ("rl", "phi4_grpo", Options(simulate=True, response_tokens=40_000), "max_new_tokens is 31,744"),
    ):
        with pytest.raises(UserError, match=reason):
            main(load_stage(stage, name), options)


def test_more_data_parallel_ranks_than_rows_are_refused_by_the_batch() -> None:
    config = dataclasses.replace(recipe("sft", "phi4_sft"), train=TrainConfig(global_batch_size=32))
    assert tokens_per_step(config, plan(load_stage("sft", "phi4_sft"), Options())[2]) == 32 * 32_768
    found, _, _ = plan(load_stage("sft", "phi4_sft"), Options(nodes=64))
    assert "32 rows cannot be shared evenly" in found.refused["train.global_batch_size"]
    assert max(c.config.parallel.dp for c in found.fitting) <= 32


def test_memory_of_the_worst_stage_adds_up() -> None:
    memory = worst_stage(recipe("sft", "phi4_sft"))
    assert memory.kv_cache == 0
    assert sum(gib for _, gib in memory.lines()) * GIB == pytest.approx(memory.total)


def test_the_table_of_the_docs_is_what_its_command_prints() -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    table = text.partition("<!-- scale -->\n")[2].partition("<!-- /scale -->")[0]
    assert table == scale.table() + "\n"

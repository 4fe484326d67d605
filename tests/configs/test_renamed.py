"""Run folders that phi4r 0.1.0 wrote load under today's keys; its keys elsewhere are refused with the new
name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi4r.configs.load import from_tree, load_stage, prepare_run_dir, refuse_idle
from phi4r.configs.renamed import RENAMED, REPLACED, new_name
from phi4r.configs.schema import as_dict
from phi4r.core.errors import ConfigError

# The sections that changed, as 0.1.0 wrote them.
ROLLOUT = {
    "engine": "embedded", "prompts_per_step": 4, "group_size": 2, "max_draws": 3, "staleness": 0,
    "continuous": False, "curriculum": "none", "curriculum_low": 0.1, "curriculum_high": 0.9,
    "curriculum_rest": 4, "max_prompt_tokens": 60, "max_new_tokens": 40, "temperature": 0.7, "num_slots": 9,
    "row_tokens": 256,
    "top_p": 1.0, "top_k": 0, "gap_threshold": 0.1, "gap_alarm": 0.05, "on_gap_alarm": "warn",
}  # fmt: skip
VLLM = {"num_servers": 2, "max_in_flight": 5, "request_timeout_s": 7.0}


def write(folder: Path, stage: str, **sections: Any) -> Path:
    """A run folder of 0.1.0."""
    folder.mkdir(exist_ok=True)
    document = {"phi4r_version": "0.1.0", "stage": stage, "config": {"seed": 3, **sections}}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("staleness", "continuous", "mode", "lag"),
    [
        (0, False, "sync", 0),
        (1, False, "one_step", 1),
        (1, True, "continuous", 1),
        (4, True, "continuous", 4),
    ],
)
def test_an_rl_run_of_0_1_0_loads(
    tmp_path: Path, staleness: int, continuous: bool, mode: str, lag: int
) -> None:
    rollout = {**ROLLOUT, "staleness": staleness, "continuous": continuous}
    folder = write(tmp_path / "run", "rl", rollout=rollout, vllm=VLLM, objective={"importance_cap": 2.0})
    config = load_stage("rl", folder).config
    assert (config.rollout.mode, config.rollout.policy_lag) == (mode, lag)
    assert (config.rollout.max_prompt_batches, config.rollout.max_prompt_tokens) == (3, 60)
    sampling = config.sampling
    assert (sampling.engine, sampling.max_new_tokens, sampling.temperature) == ("embedded", 40, 0.7)
    assert (sampling.num_slots, sampling.max_in_flight, sampling.request_timeout_s) == (9, 5, 7.0)
    assert prepare_run_dir(config, folder) == []  # the same run, to be continued
    assert load_stage("rl", folder).config == config
    assert (
        from_tree("rl", {"seed": 3, "rollout": rollout, "objective": {"importance_cap": 2.0}}).rollout.mode
        == mode
    )


def test_evaluations_and_curations_of_0_1_0_load(tmp_path: Path) -> None:
    settings = {"runs": 2, "temperature": 0.5, "max_new_tokens": 11}
    config = load_stage("eval", write(tmp_path / "eval", "eval", eval=settings)).config
    assert (config.sampling.temperature, config.sampling.max_new_tokens, config.eval.runs) == (0.5, 11, 2)
    # The embedded engine sampled for curation whatever was said.
    rollout = {**ROLLOUT, "engine": "vllm", "staleness": 1}
    config = load_stage("curate", write(tmp_path / "curate", "curate", rollout=rollout)).config
    assert (config.sampling.engine, config.sampling.num_slots) == ("embedded", 9)


@pytest.mark.parametrize("stage", ["rl", "eval", "curate", "generate"])
def test_a_tree_of_today_reaches_the_ranks_unchanged(stage: str) -> None:
    words = ["sampling.engine=vllm", "sampling.max_in_flight=3", "sampling.top_k=0", "vllm.num_servers=2"]
    config = load_stage(stage, "tiny", words).config
    assert from_tree(stage, as_dict(config)) == config
    assert config.sampling.engine == "vllm"


@pytest.mark.parametrize("old", [*RENAMED, *REPLACED])
def test_an_old_key_is_refused_with_its_new_name(tmp_path: Path, old: str) -> None:
    with pytest.raises(ConfigError, match="now") as caught:
        load_stage("rl", "tiny", [f"{old}=1"])
    assert new_name(old) in str(caught.value)
    section, key = old.split(".")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f"[{section}]\n{key} = 1\n")
    with pytest.raises(ConfigError, match=r"mine\.toml, line 2"):
        load_stage("rl", recipe)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["vllm.num_servers=2"], "vllm.num_servers"),
        (["sampling.max_in_flight=2"], "sampling.max_in_flight"),
        (["sampling.engine=vllm", "sampling.num_slots=2"], "sampling.num_slots"),
        (["sampling.engine=vllm", "sampling.max_failures=2"], "sampling.max_failures"),
        (["rollout.max_policy_lag=2"], "rollout.max_policy_lag"),
    ],
)
def test_a_setting_without_effect_is_refused(words: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match="has no effect with") as caught:
        refuse_idle(load_stage("rl", "tiny", words))
    assert caught.value.key == key


def test_settings_with_an_effect_are_taken() -> None:
    for words in (
        ["sampling.num_slots=4"], ["sampling.engine=vllm", "vllm.num_servers=2", "sampling.max_in_flight=3"],
        ["rollout.mode=continuous", "rollout.max_policy_lag=3", "objective.importance_cap=2"],
    ):  # fmt: skip
        refuse_idle(load_stage("rl", "tiny", words))


def test_curation_takes_no_setting_that_it_would_ignore() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.engine now"):
        load_stage("curate", "tiny", ["rollout.engine=vllm"])
    with pytest.raises(ConfigError, match="has no section 'rollout'"):
        load_stage("curate", "tiny", ["rollout.group_size=4"])
    assert load_stage("curate", "tiny", ["sampling.engine=vllm"]).config.sampling.engine == "vllm"

"""Recipes, overrides and resolved configurations: who wins, and what an error says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4r.configs.load import (
    COMMAND_LINE,
    all_sections,
    from_tree,
    load_parallel,
    load_pipeline,
    load_stage,
    prepare_run_dir,
    recipe_names,
    resolve_key,
    split_overrides,
    write_resolved,
)
from phi4r.configs.schema import as_dict, fields_of
from phi4r.configs.stages import STAGES, EvalConfig, RLConfig, SFTConfig
from phi4r.core.errors import ConfigError, UserError


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(tmp_path: Path, text: str, overrides: tuple[str, ...] = (), stage: str = "sft") -> str:
    with pytest.raises(UserError) as caught:
        load_stage(stage, recipe(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- who wins


def test_stage_tables_lie_over_shared_ones_and_the_command_line_over_both(tmp_path: Path) -> None:
    path = recipe(tmp_path, "[train]\nnum_steps = 1\neval_every = 2\n[rl.train]\nnum_steps = 3\n")
    assert load_stage("sft", path).config.train.num_steps == 1
    rl = load_stage("rl", path).config
    assert (rl.train.num_steps, rl.train.eval_every) == (3, 2)
    assert load_stage("rl", path, ["train.num_steps=4"]).config.train.num_steps == 4
    assert load_stage("rl", path, ["train.num_steps=4", "rl.train.num_steps=5"]).config.train.num_steps == 5


def test_a_preset_lies_under_everything_that_is_set_beside_it(tmp_path: Path) -> None:
    path = recipe(tmp_path, '[model]\npreset = "phi4"\nnum_layers = 2\n')
    model = load_stage("sft", path, ["model.rope_theta=1"]).config.model
    assert (model.num_layers, model.rope_theta, model.hidden_size) == (2, 1.0, 5120)


def test_sources_say_who_set_what(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'seed = 7\n\n[model]\npreset = "tiny"\n[sft.optimizer]\nlr = 1\n')
    sources = load_stage("sft", path, ["data.heldout=1"]).sources
    assert sources["seed"] == f"{path}, line 1"
    assert sources["optimizer.lr"] == f"{path}, line 6"
    assert sources["model.hidden_size"] == "preset tiny"
    assert sources["data.heldout"] == COMMAND_LINE
    assert "train.num_steps" not in sources


def test_eval_names_a_section_and_a_stage(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, '[eval]\nruns = 3\n[eval.problems]\ntask = "addition"\n[eval.eval]\nbootstrap = 500\n'
    )
    config = load_stage("eval", path).config
    assert isinstance(config, EvalConfig)
    assert (config.eval.runs, config.eval.bootstrap, config.problems.task) == (3, 500, "addition")
    assert load_stage("rl", path).config.problems.task == "modchain"


def test_a_pipeline_gives_an_override_to_every_stage_that_has_the_section() -> None:
    stages = load_pipeline("tiny", ["parallel.tp=2", "rl.train.num_steps=5", "seed=9"])
    assert {loaded.config.parallel.tp for loaded in stages.values()} == {2}
    assert {loaded.config.seed for loaded in stages.values()} == {9}
    assert stages["rl"].config.train.num_steps == 5
    assert stages["sft"].config.train.num_steps != 5


# --- what an error says


def test_an_unknown_key_is_named_with_file_line_known_keys_and_the_closest(tmp_path: Path) -> None:
    message = error_of(tmp_path, "[train]\n\nnum_step = 3\n")
    assert "mine.toml, line 3" in message
    assert "did you mean 'num_steps'?" in message
    assert all(name in message for name in fields_of(all_sections()["train"]))


def test_an_unknown_section_or_table_is_an_error_even_when_it_is_empty(tmp_path: Path) -> None:
    assert "did you mean 'optimizer'?" in error_of(tmp_path, "[optimiser]\nlr = 1\n")
    assert "unknown section 'foo'" in error_of(tmp_path, "[foo]\n")
    assert "unknown section 'foo'" in error_of(tmp_path, "[sft.foo]\n")
    assert "unknown section 'rollout'" in error_of(tmp_path, "[sft.rollout]\ngroup_size = 8\n")
    assert "unknown key 'foo'" in error_of(tmp_path, "foo = 1\n")
    assert "too deep" in error_of(tmp_path, "[sft.train.foo]\nx = 1\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[train]\nnum_steps = 1.5", "expected an integer, got 1.5"),
        ("[train]\nnum_steps = true", "expected an integer, got True"),
        ("[train]\nnum_steps = '3'", "expected an integer, got '3'"),
        ("[optimizer]\nlr = 'fast'", "expected a number, got 'fast'"),
        ("[optimizer]\nlr = nan", "expected a number, got nan"),
        ("[optimizer]\nlr = true", "expected a number, got True"),
        ("[parallel]\nsp = 1", "expected true or false, got 1"),
        ("[data]\npath = 3", "expected a text, got 3"),
        ("[log]\nwandb = 'yes'", "expected one of off, offline, online, got 'yes'"),
        ("[data]\npath = ['a']", "expected a text, got ['a']"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(
    tmp_path: Path, line: str, expected: str
) -> None:
    message = error_of(tmp_path, line)
    assert expected in message
    assert "mine.toml, line 2" in message


def test_a_whole_number_is_a_number() -> None:
    assert load_stage("sft", None, ["optimizer.lr=1"]).config.optimizer.lr == 1.0


def test_stages_that_are_not_run_are_checked_too(tmp_path: Path) -> None:
    assert "rollout.group_size: must be at least 2" in error_of(tmp_path, "[rl.rollout]\ngroup_size = 1\n")
    assert "unknown key 'nope'" in error_of(tmp_path, "[curate.problems]\nnope = 1\n")


def test_a_combination_that_cannot_be_names_the_key_and_who_set_it(tmp_path: Path) -> None:
    message = error_of(tmp_path, '[model]\npreset = "phi4"\n[parallel]\ntp = 4\n')
    assert message.startswith("parallel.tp: 4 does not divide the 10 KV heads")
    assert message.endswith("mine.toml, line 4)")
    message = error_of(tmp_path, '[model]\npreset = "phi4"\n', ("parallel.tp=8",))
    assert message.endswith("(command line)")


def test_toml_that_does_not_parse_is_named_with_its_line(tmp_path: Path) -> None:
    assert "mine.toml:2: not valid TOML" in error_of(tmp_path, "seed = 1\n[optimizer\nlr = 1\n")
    assert "mine.toml:2: not valid TOML" in error_of(tmp_path, "seed = 1\nx = ")


def test_a_recipe_that_is_not_there_lists_the_ones_that_are() -> None:
    with pytest.raises(
        UserError,
        match=r"no recipe 'tyny'.*phi4_grpo, phi4_mini_grpo, phi4_mini_sft, phi4_sft, tiny, did you mean",
    ):
        load_stage("sft", "tyny")


def test_settings_of_other_stages_are_refused_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="has no section 'rollout'"):
        load_stage("sft", "tiny", ["rollout.group_size=4"])
    with pytest.raises(ConfigError, match="no effect"):
        load_stage("sft", "tiny", ["rl.train.num_steps=4"])
    with pytest.raises(ConfigError, match=r"only parallel\.\*"):
        load_parallel(["train.num_steps=4"])
    assert load_parallel(["parallel.tp=2"]).tp == 2


# --- the command line


def test_overrides_are_taken_out_of_the_words() -> None:
    text = "tiny --parallel.sp here --train.num_steps 4 --optimizer.lr=-1 --run-dir d --parallel.sp false x"
    rest, overrides = split_overrides(text.split())
    assert rest == ["tiny", "here", "--run-dir", "d", "x"]
    assert overrides == ["parallel.sp=true", "train.num_steps=4", "optimizer.lr=-1", "parallel.sp=false"]


def test_words_after_a_double_dash_are_left_alone() -> None:
    assert split_overrides(["--data.path=a b=c", "--", "--train.num_steps", "3"]) == (
        ["--", "--train.num_steps", "3"],
        ["data.path=a b=c"],
    )


@pytest.mark.parametrize("words", [["--train.num_steps"], ["--train.num_steps", "--seed", "3"]])
def test_a_setting_without_its_value_is_an_error(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train.num_steps: needs a value"):
        split_overrides(words)


ALL_KEYS = [("", name, key) for name, cls in all_sections().items() for key in fields_of(cls)] + [
    (stage, name, key)
    for stage, cls in STAGES.items()
    for name, section in [(n, s) for n, s in all_sections().items() if n in cls.__dataclass_fields__]  # type: ignore[attr-defined]
    for key in fields_of(section)
]


@given(st.sampled_from(ALL_KEYS))
def test_every_key_is_found_by_its_dotted_name(key: tuple[str, str, str]) -> None:
    assert resolve_key([part for part in key if part], "test") == key


# --- resolved configurations


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("name", ["tiny", "phi4_sft", "phi4_grpo", "phi4_mini_sft", "phi4_mini_grpo"])
def test_a_resolved_configuration_can_be_given_back(tmp_path: Path, stage: str, name: str) -> None:
    config = load_stage(stage, name, ["seed=3"]).config
    path = write_resolved(config, tmp_path)
    assert load_stage(stage, path).config == config
    assert load_stage(stage, tmp_path).config == config  # the run folder stands for its config.json
    assert from_tree(stage, as_dict(config)) == config
    assert json.loads(path.read_text())["stage"] == stage


def test_another_preset_over_a_resolved_configuration_changes_the_model(tmp_path: Path) -> None:
    path = write_resolved(load_stage("sft", "tiny", ["model.rope_theta=5"]).config, tmp_path)
    model = load_stage("sft", path, ["model.preset=tiny_deep"]).config.model
    assert (model.num_layers, model.rope_theta) == (4, 5.0)


def test_a_resolved_configuration_serves_its_own_stage_only(tmp_path: Path) -> None:
    write_resolved(SFTConfig(), tmp_path)
    with pytest.raises(UserError, match="belongs to a sft run"):
        load_stage("rl", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not the config\.json of a run"):
        load_stage("sft", tmp_path)
    (tmp_path / "config.json").write_text("{\n,")
    with pytest.raises(UserError, match=r"config.json:2: not valid JSON"):
        load_stage("sft", tmp_path)


def test_a_run_folder_tells_what_changed_and_refuses_another_stage(tmp_path: Path) -> None:
    assert prepare_run_dir(SFTConfig(), tmp_path) == []
    assert prepare_run_dir(SFTConfig(), tmp_path) == []
    longer = load_stage("sft", None, ["train.num_steps=900"]).config
    assert prepare_run_dir(longer, tmp_path) == ["train.num_steps: 800 -> 900"]
    with pytest.raises(UserError, match=r"was started with optimizer.lr = 0.002, now 1.0"):
        prepare_run_dir(load_stage("sft", None, ["optimizer.lr=1"]).config, tmp_path)
    assert load_stage("sft", tmp_path).config == longer  # a refused start leaves the folder as it was
    with pytest.raises(UserError, match="holds a sft run"):
        prepare_run_dir(RLConfig(), tmp_path)


def test_a_run_that_is_older_than_a_setting_goes_on_with_its_default(tmp_path: Path) -> None:
    prepare_run_dir(SFTConfig(), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["config"]["data"]["loader"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"was started with data.loader = 'thread', now 'dali'"):
        prepare_run_dir(load_stage("sft", None, ["data.loader=dali"]).config, tmp_path)
    assert prepare_run_dir(SFTConfig(), tmp_path) == []


# --- the recipes themselves


def test_the_phi4_recipes_hold_the_papers_values() -> None:
    sft = load_stage("sft", "phi4_sft").config
    assert isinstance(sft, SFTConfig)
    assert (sft.data.seq_length, sft.train.global_batch_size) == (32_768, 32)
    assert (sft.optimizer.lr, sft.optimizer.warmup_steps, sft.optimizer.weight_decay) == (1e-5, 450, 1e-4)
    assert (sft.model.rope_theta, sft.model.num_parameters) == (500_000.0, 14_659_507_200)
    assert sft.parallel.world_size == 32
    rl = load_stage("rl", "phi4_grpo").config
    assert isinstance(rl, RLConfig)
    assert (rl.rollout.prompts_per_step, rl.rollout.group_size, rl.optimizer.lr) == (64, 8, 5e-8)
    assert (rl.rollout.max_prompt_tokens, rl.sampling.max_new_tokens) == (1024, 31_744)
    assert (rl.reward.max_tokens, rl.reward.positive_tokens, rl.reward.negative_tokens) == (
        31_744,
        25_600,
        3702,
    )
    assert (rl.reward.accuracy_weight, rl.reward.repetition_weight) == (8 / 13, 1 / 13)
    assert (rl.objective.kl_coef, rl.objective.entropy_coef, rl.optimizer.warmup_steps) == (0.001, 0.001, 10)
    assert rl.parallel.world_size == 32


def test_every_recipe_serves_every_stage() -> None:
    assert recipe_names() == ["phi4_grpo", "phi4_mini_grpo", "phi4_mini_sft", "phi4_sft", "tiny"]
    for name in recipe_names():
        for stage in STAGES:
            load_stage(stage, name)

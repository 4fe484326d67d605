"""Where a configuration comes from: defaults < model preset < recipe < `--section.key value`, with its
provenance.

A recipe is a TOML file. Its tables `[model]`, `[optimizer]`, ... and the top-level `seed` hold for every
stage; `[sft.train]`, `[rl.optimizer]`, ... lie over them for one stage only, so that one page describes a
pipeline. All of it is checked whatever stage is run. A run folder's config.json, which holds the complete
tree of one stage, is a recipe too.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import phi4r
from phi4r.configs.renamed import new_name, upgraded
from phi4r.configs.schema import as_dict, closest, coerce, fields_of, from_text, sections_of, unknown
from phi4r.configs.sections import ParallelConfig
from phi4r.configs.stages import STAGES, StageConfig
from phi4r.core.errors import ConfigError, UserError
from phi4r.core.io import atomic_write_json
from phi4r.families.registry import presets

COMMAND_LINE = "command line"
ENGINES_OF = {
    "vllm.": ("vllm",),
    "sampling.num_slots": ("embedded",),
    "sampling.max_in_flight": ("vllm", "openai"),
    "sampling.request_timeout_s": ("vllm", "openai"),
    "sampling.max_failures": ("openai",),
}
"""Key, or how keys begin -> the engines that they have an effect on."""


class Setting(NamedTuple):
    """A checked value and who set it."""

    value: Any
    source: str


Settings = dict[tuple[str, str], Setting]
"""(section, key) -> setting; a stage's own values, such as `seed`, have the section ""."""


@dataclass(frozen=True)
class Recipe:
    """A recipe file taken apart: what holds for every stage, and what for one stage only."""

    name: str
    path: Path
    shared: Settings = field(default_factory=dict)
    stages: dict[str, Settings] = field(default_factory=dict)
    resolved_stage: str = ""
    """The stage of a resolved config.json ("": a TOML recipe, which serves every stage)."""


@dataclass(frozen=True)
class Loaded:
    """A stage's configuration, the recipe it came from and, per dotted key, who set it (defaults are not
    listed)."""

    stage: str
    config: StageConfig
    recipe: Recipe
    sources: dict[str, str]


# --- keys


def all_sections() -> dict[str, type]:
    """Every section of every stage. A section name means the same dataclass in all stages that have it."""
    return {name: cls for stage in STAGES.values() for name, cls in sections_of(stage).items()}


def _dotted(stage: str, section: str, key: str) -> str:
    return ".".join(part for part in (stage, section, key) if part)


def resolve_key(parts: Sequence[str], source: str) -> tuple[str, str, str]:
    """Dotted key -> (stage or "", section or "", key). Unknown ones raise ConfigError with the known ones.

    `eval` and `curate` name both a stage and a section: two parts mean the section (`eval.runs`), three the
    stage (`eval.problems.task`).
    """
    dotted, sections = ".".join(parts), all_sections()
    if name := new_name(".".join(parts[-2:])):
        raise ConfigError(dotted, f"is {name} now", source)
    if len(parts) == 3 or (len(parts) == 2 and parts[0] not in sections and parts[0] in STAGES):
        stage, rest = parts[0], parts[1:]
        if stage not in STAGES:
            raise unknown(dotted, "stage", stage, STAGES, source)
        sections = sections_of(STAGES[stage])
    else:
        stage, rest = "", parts
    if len(rest) == 2:
        section, key = rest
        if section not in sections:
            raise unknown(dotted, "section", section, sections, source)
        known = fields_of(sections[section])
        if key in known:
            return stage, section, key
        if key == "seed" and section in STAGES and not stage:
            return section, "", key
        raise unknown(dotted, "key", key, known, source)
    own = fields_of(STAGES[stage] if stage else STAGES["sft"])
    if len(rest) == 1 and rest[0] in own:
        return stage, "", rest[0]
    raise unknown(
        dotted, "key", rest[0] if rest else dotted, [*own, *(f"{name}.*" for name in sections)], source
    )


def _hint(stage: str, section: str, key: str) -> Any:
    owner = all_sections()[section] if section else STAGES[stage or "sft"]
    return fields_of(owner)[key].hint


# --- overrides


_DOTTED = re.compile(r"--([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)+)(?:=(.*))?", re.DOTALL)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words -> (the other words, overrides as `section.key=value`).

    `--a.b value`, `--a.b=value` and, for a true/false setting, the bare flag `--a.b` are taken; everything
    after `--` is left alone. Keys are checked here, values when the stage is built.
    """
    rest: list[str] = []
    overrides: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            return rest + list(words[position - 1 :]), overrides
        match = _DOTTED.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        key, value = match[1].replace("-", "_"), match[2]
        hint = _hint(*resolve_key(key.split("."), COMMAND_LINE))
        if value is None:
            following = words[position] if position < len(words) else None
            is_value = following is not None and not following.startswith("--")
            if hint is bool and not (
                is_value and following is not None and following.lower() in ("true", "false")
            ):
                value = "true"
            elif is_value and following is not None:
                value, position = following, position + 1
            else:
                raise ConfigError(key, f"needs a value: --{key} VALUE", COMMAND_LINE)
        overrides.append(f"{key}={value}")
    return rest, overrides


def parse_overrides(overrides: Iterable[str]) -> dict[str, Settings]:
    """Overrides as `section.key=value` (or `stage.section.key=value`) -> settings by stage, "" for all
    stages."""
    result: dict[str, Settings] = {}
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError(key, "needs a value: section.key=value", COMMAND_LINE)
        stage, section, name = resolve_key(key.split("."), COMMAND_LINE)
        hint = _hint(stage, section, name)
        checked = coerce(_dotted(stage, section, name), from_text(value, hint), hint, COMMAND_LINE)
        result.setdefault(stage, {})[(section, name)] = Setting(checked, COMMAND_LINE)
    return result


# --- recipes


def recipe_names() -> list[str]:
    """The recipes that come with phi4r."""
    folder = resources.files("phi4r") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def _find(recipe: str) -> Path:
    if recipe in recipe_names():
        return Path(str(resources.files("phi4r") / "recipes" / f"{recipe}.toml"))
    path = Path(recipe)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        if path.suffix not in (".toml", ".json"):
            raise UserError(f"{path}: a recipe is a .toml file or the config.json of a run, not {path.name}")
        return path
    names = recipe_names()
    known = ", ".join(names)
    raise UserError(f"no recipe {recipe!r}: not a file, and not one of {known}{closest(recipe, names)}")


def _key_lines(text: str) -> dict[str, int]:
    """Dotted key -> line of a TOML file, for the plain `key = value` lines under `[table]` headers."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"\s*\[([\w.\s-]+)\]\s*(#.*)?$", line):
            table = match[1].replace(" ", "")
            lines.setdefault(table, number)
        elif match := re.match(r"\s*([\w.-]+)\s*=", line):
            lines.setdefault(f"{table}.{match[1]}" if table else match[1], number)
    return lines


def _read_toml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), _key_lines(text)
    except tomllib.TOMLDecodeError as error:
        match = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        where = f"{path}:{match[1] if match else max(1, len(text.splitlines()))}"
        what = str(error)[: match.start()] + f" (column {match[2]})" if match else str(error)
        raise UserError(f"{where}: not valid TOML: {what}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            if not value and len(prefix) < 2:  # an empty table still has to have a known name
                yield (*prefix, key), value
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _collect(tree: dict[str, Any], source_of: Callable[[str], str]) -> dict[str, Settings]:
    """A parsed file's tables -> checked settings by stage ("": shared)."""
    result: dict[str, Settings] = {}
    for parts, value in _leaves(tree):
        dotted = ".".join(parts)
        source = source_of(dotted)
        if isinstance(value, dict):
            if parts[-1] not in all_sections() and parts[-1] not in STAGES:
                raise unknown(dotted, "section", parts[-1], all_sections(), source)
            continue
        if len(parts) > 3:
            raise ConfigError(dotted, "too deep: keys are section.key or stage.section.key", source)
        stage, section, name = resolve_key(parts, source)
        checked = coerce(dotted, value, _hint(stage, section, name), source)
        result.setdefault(stage, {})[(section, name)] = Setting(checked, source)
    return result


def read_recipe(recipe: str | Path) -> Recipe:
    """A recipe by name, by path (.toml, or a config.json), or a run folder (its config.json), all keys and
    types checked."""
    path = _find(str(recipe))
    if path.suffix == ".json":
        return _read_resolved(path)
    tree, lines = _read_toml(path)

    def source_of(dotted: str) -> str:
        return f"{path}, line {lines[dotted]}" if dotted in lines else str(path)

    settings = _collect(tree, source_of)
    return Recipe(path.stem, path, settings.pop("", {}), settings)


def _read_resolved(path: Path) -> Recipe:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if (
        not isinstance(content, dict)
        or content.get("stage") not in STAGES
        or not isinstance(content.get("config"), dict)
    ):
        raise UserError(f'{path}: not the config.json of a run: expected "stage" and "config"')
    tree = upgraded(content["stage"], content["config"])
    settings = _collect(tree, lambda _: str(path)).pop("", {})
    # What the preset gives is left to the preset, so that `--model.preset other` changes what it should.
    preset = presets().get(settings.get(("model", "preset"), Setting("", "")).value, {})
    shared = {
        (section, key): setting
        for (section, key), setting in settings.items()
        if not (section == "model" and key in preset and preset[key] == setting.value)
    }
    return Recipe(path.parent.name or path.stem, path, shared, {}, content["stage"])


# --- building


def _build(stage: str, layers: Sequence[Settings]) -> tuple[StageConfig, dict[str, str]]:
    cls = STAGES[stage]
    merged: Settings = {}
    for layer in layers:
        merged.update(layer)
    preset = merged.get(("model", "preset"), Setting("", "")).value
    sources = {_dotted("", section, key): setting.source for (section, key), setting in merged.items()}
    try:
        values: dict[str, Any] = {
            key: setting.value for (section, key), setting in merged.items() if not section
        }
        for name, section_cls in sections_of(cls).items():
            own: dict[str, Any] = {}
            if name == "model" and preset:
                if preset not in presets():
                    raise unknown("model.preset", "preset", preset, presets(), "")
                own.update(presets()[preset])
                for key in presets()[preset]:
                    sources.setdefault(f"model.{key}", f"preset {preset}")
            own.update({key: setting.value for (section, key), setting in merged.items() if section == name})
            values[name] = section_cls(**own)
        return cls(**values), sources
    except ConfigError as error:
        raise ConfigError(error.key, error.reason, sources.get(error.key, "default")) from None


def _layers(recipe: Recipe, stage: str, overrides: dict[str, Settings]) -> list[Settings]:
    return [recipe.shared, recipe.stages.get(stage, {}), overrides.get("", {}), overrides.get(stage, {})]


def _check_other_stages(recipe: Recipe, running: Iterable[str]) -> None:
    """Build the stages that the recipe describes but that are not run now, so that a recipe is right or wrong
    as a whole."""
    for stage in recipe.stages:
        if stage not in running:
            _build(stage, _layers(recipe, stage, {}))


def load_stage(stage: str, recipe: str | Path | None, overrides: Iterable[str] = ()) -> Loaded:
    """The configuration of one stage (`sft`, `rl`, `curate`, `eval`).

    `recipe`: a name, a path, a run folder, or None for the defaults; `overrides`: texts `section.key=value`.
    Raises ConfigError or UserError with key, file, line and what was expected.
    """
    source = read_recipe(recipe) if recipe is not None else Recipe("defaults", Path())
    if source.resolved_stage not in ("", stage):
        raise UserError(
            f"{source.path}: belongs to a {source.resolved_stage} run; `phi4r {stage}` needs a recipe"
            f" (one of {', '.join(recipe_names())}, or a .toml file)"
        )
    given = parse_overrides(overrides)
    known = sections_of(STAGES[stage])
    for owner, settings in given.items():
        for section, key in settings:
            dotted = _dotted(owner, section, key)
            if owner not in ("", stage):
                raise ConfigError(dotted, f"has no effect on `phi4r {stage}`", COMMAND_LINE)
            if section and section not in known:
                reason = f"`phi4r {stage}` has no section {section!r}; it has {', '.join(known)}"
                raise ConfigError(dotted, reason, COMMAND_LINE)
    _check_other_stages(source, [stage])
    config, sources = _build(stage, _layers(source, stage, given))
    return Loaded(stage, config, source, sources)


def refuse_idle(loaded: Loaded) -> None:
    """Raise ConfigError for a setting of the command line that has no effect with the engine or mode chosen
    (a recipe may hold settings for several)."""
    sampling, rollout = getattr(loaded.config, "sampling", None), getattr(loaded.config, "rollout", None)
    for key, source in loaded.sources.items():
        if source != COMMAND_LINE:
            continue
        engines = next((engines for prefix, engines in ENGINES_OF.items() if key.startswith(prefix)), None)
        if sampling is not None and engines is not None and sampling.engine not in engines:
            raise ConfigError(key, f"has no effect with sampling.engine {sampling.engine!r}", source)
        if key == "rollout.max_policy_lag" and rollout is not None and rollout.mode != "continuous":
            raise ConfigError(key, f"has no effect with rollout.mode {rollout.mode!r}", source)


def load_pipeline(recipe: str | Path, overrides: Iterable[str] = ()) -> dict[str, Loaded]:
    """Every stage of a TOML recipe. `section.key=value` goes to all stages that have the section,
    `stage.section.key=value` to one."""
    source = read_recipe(recipe)
    if source.resolved_stage:
        raise UserError(
            f"{source.path}: holds the {source.resolved_stage} stage only; expected a .toml recipe"
        )
    given = parse_overrides(overrides)
    result: dict[str, Loaded] = {}
    for stage in STAGES:
        config, sources = _build(stage, _layers(source, stage, given))
        result[stage] = Loaded(stage, config, source, sources)
    return result


# --- resolved configurations


def resolved_tree(stage: str, config: StageConfig) -> dict[str, Any]:
    """What config.json holds: the complete tree, the stage and the version that wrote it."""
    return {"phi4r_version": phi4r.__version__, "stage": stage, "config": as_dict(config)}


def write_resolved(config: StageConfig, run_dir: str | Path) -> Path:
    """Write RUN_DIR/config.json, which can be given back as a recipe; returns its path."""
    stage = next(name for name, cls in STAGES.items() if isinstance(config, cls))
    path = Path(run_dir) / "config.json"
    atomic_write_json(path, resolved_tree(stage, config))
    return path


def from_tree(stage: str, tree: dict[str, Any]) -> StageConfig:
    """A stage's configuration from its complete tree (`as_dict`), as handed to the ranks of a job."""
    settings = _collect(upgraded(stage, tree), lambda _: "payload").get("", {})
    return _build(stage, [settings])[0]


def load_parallel(overrides: Iterable[str]) -> ParallelConfig:
    """The layout of a command that has no recipe: only `parallel.*` may be set."""
    given = parse_overrides(overrides)
    for owner, settings in given.items():
        for section, key in settings:
            if owner or section != "parallel":
                dotted = _dotted(owner, section, key)
                raise ConfigError(dotted, "this command takes only parallel.* settings", COMMAND_LINE)
    try:
        return ParallelConfig(**{key: setting.value for (_, key), setting in given.get("", {}).items()})
    except ConfigError as error:
        raise ConfigError(error.key, error.reason, COMMAND_LINE) from None


# What may differ when a training run is continued: it changes speed, output or length, not the run itself.
MAY_CHANGE_SECTIONS = ("parallel", "checkpoint", "log")
MAY_CHANGE_KEYS = ("train.num_steps", "train.eval_every", "train.recompute", "train.logit_chunk_size")


def _may_change(stage: str, key: str) -> bool:
    return stage not in ("sft", "rl") or key.split(".")[0] in MAY_CHANGE_SECTIONS or key in MAY_CHANGE_KEYS


def prepare_run_dir(config: StageConfig, run_dir: str | Path) -> list[str]:
    """Write RUN_DIR/config.json and return what changed since the run that is there already
    (`key: old -> new`).

    Raises UserError if the folder holds a run of another stage, or something that is no run, or a training
    run that was started with other settings than those that may change: continuing it would make it neither
    the one nor the other.
    """
    run_dir = Path(run_dir)
    stage = next(name for name, cls in STAGES.items() if isinstance(config, cls))
    path = run_dir / "config.json"
    changes: list[str] = []
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: expected a run folder, found a file")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict) or before.get("stage") not in STAGES:
            raise UserError(f"{path}: not the config.json of a run; choose another run folder")
        if before["stage"] != stage:
            raise UserError(
                f"{run_dir}: holds a {before['stage']} run; choose another run folder for {stage}"
            )
        # What the run was started without is younger than it, and was as its default is.
        trees = (as_dict(type(config)()), upgraded(stage, before["config"]), as_dict(config))
        default, written, new = (dict(_leaves(tree)) for tree in trees)
        old = default | written
        for parts, value in new.items():
            key = ".".join(parts)
            if old.get(parts) == value:
                continue
            if not _may_change(stage, key):
                raise UserError(
                    f"{run_dir}: was started with {key} = {old.get(parts)!r}, now {value!r}; continue"
                    " with the same settings or choose another run folder"
                )
            changes.append(f"{key}: {old.get(parts)!r} -> {value!r}")
    write_resolved(config, run_dir)
    return changes

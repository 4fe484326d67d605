"""The parts that a recipe names, found before a run folder is made."""

from __future__ import annotations

from phi4r.configs.stages import CurateConfig, EvalConfig, RLConfig, SFTConfig, StageConfig
from phi4r.core.registry import is_import_path
from phi4r.rewards.function import get_reward
from phi4r.tasks import get_task


def check(config: StageConfig) -> None:
    """Find the tasks, the reward and the objective of a stage (a family was found with the configuration).
    ConfigError for one that does not fit. torch is imported only where an objective has an import path."""
    if isinstance(config, SFTConfig) and not config.data.path:
        get_task(config.data.task, "data.task")
    if isinstance(config, RLConfig | CurateConfig | EvalConfig):
        get_task(config.problems.task, "problems.task")
    if isinstance(config, RLConfig):
        get_reward(config.reward.function)
        if is_import_path(config.objective.surrogate):
            from phi4r.objectives.objective import surrogate_of

            surrogate_of(config.objective)

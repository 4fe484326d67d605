"""The sections of a configuration: one frozen dataclass each, one documented field per setting.

The string under a field is its documentation: `phi4r <command> --help` prints it. A section checks itself
when it is made; what depends on several sections is checked in `stages`. Defaults are those of the tiny quick
start, except where the paper gives a value that has no small-scale twin.
"""

from phi4r.configs.section_objective import SURROGATE_SETTINGS, ObjectiveConfig
from phi4r.configs.section_sampling import (
    CurateSettings,
    EvalSettings,
    GenerateSettings,
    ProblemsConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
)
from phi4r.configs.section_training import (
    CheckpointConfig,
    DataConfig,
    InitConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerConfig,
    TrainConfig,
)
from phi4r.configs.section_vllm import VLLMConfig
from phi4r.core.checks import require
from phi4r.families.model import ModelConfig

__all__ = [
    "SURROGATE_SETTINGS",
    "CheckpointConfig",
    "CurateSettings",
    "DataConfig",
    "EvalSettings",
    "GenerateSettings",
    "InitConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProblemsConfig",
    "RewardConfig",
    "RolloutConfig",
    "SamplingConfig",
    "TokenizerConfig",
    "TrainConfig",
    "VLLMConfig",
    "require",
]

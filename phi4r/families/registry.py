"""Families by name, and the named sizes (presets) of all of them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from phi4r.core.errors import ConfigError

if TYPE_CHECKING:
    from phi4r.families.family import Family

FAMILIES = {
    "phi4": "phi4r.families.phi4:PHI4",
}
"""Name -> import path. A Hugging Face folder is given to the first family that covers its config."""


@functools.cache
def get_family(name: str) -> Family:
    """The family registered as `name`. Raises ConfigError for another name."""
    if name not in FAMILIES:
        raise ConfigError("model.family", f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    found: Family = getattr(importlib.import_module(module), attribute)
    return found


@functools.cache
def presets() -> Mapping[str, Mapping[str, Any]]:
    """Preset name -> the fields of `ModelConfig` that it fills in."""
    return {
        preset: {"family": name, **numbers}
        for name in FAMILIES
        for preset, numbers in get_family(name).presets.items()
    }

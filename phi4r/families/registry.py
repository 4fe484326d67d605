"""Families by name, and the named sizes (presets) of all of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from phi4r.core.registry import resolve
from phi4r.families.family import ChatFormat, Family

FAMILIES: dict[str, Family | str] = {
    "phi4": "phi4r.families.phi4:PHI4",
    "phi4_mini": "phi4r.families.phi4_mini:PHI4_MINI",
    "qwen3": "phi4r.families.qwen3:QWEN3",
}
"""Name -> import path. A Hugging Face folder is given to the first family that covers its config."""


@functools.cache
def get_family(name: str) -> Family:
    """The family of that registered name or import path, `package.module:name`. Raises ConfigError where
    there is none."""
    return resolve("family", name, FAMILIES, key="model.family", fit=_fit)


def _fit(found: Any) -> Family:
    if not isinstance(found, Family):
        raise TypeError(f"expected a phi4r.families.family.Family, got {type(found).__name__}")
    return found


@functools.cache
def chat_formats() -> tuple[ChatFormat, ...]:
    """How the registered families write conversations."""
    return tuple(dict.fromkeys(get_family(name).chat for name in FAMILIES))


@functools.cache
def presets() -> Mapping[str, Mapping[str, Any]]:
    """Preset name -> the fields of `ModelConfig` that it fills in."""
    return {
        preset: {"family": name, **numbers}
        for name in FAMILIES
        for preset, numbers in get_family(name).presets.items()
    }

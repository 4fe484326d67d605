"""What dataclasses of settings check their own fields with."""

from __future__ import annotations

from phi4r.core.errors import ConfigError


def require(condition: bool, key: str, reason: str) -> None:
    """Raise ConfigError(key, reason) unless `condition` holds."""
    if not condition:
        raise ConfigError(key, reason)


def at_least(section: str, config: object, **minimums: float) -> None:
    """Each named field of `config` must be at least the number given."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        require(value >= minimum, f"{section}.{name}", f"must be at least {minimum:g}, got {value}")


def between(section: str, config: object, low: float, high: float, *names: str) -> None:
    """Each named field of `config` must lie in [low, high]."""
    for name in names:
        value = getattr(config, name)
        require(
            low <= value <= high, f"{section}.{name}", f"must lie between {low:g} and {high:g}, got {value}"
        )


def positive(section: str, config: object, *names: str) -> None:
    """Each named field of `config` must be greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}", f"must be greater than 0, got {value}")

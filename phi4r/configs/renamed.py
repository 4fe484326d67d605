"""Keys that have another name now. Run folders that were written with the old names still load; on a command
line and in a recipe the error says the new one."""

from __future__ import annotations

from typing import Any

RENAMED = {
    **{
        f"rollout.{key}": f"sampling.{key}"
        for key in ("engine", "temperature", "top_p", "top_k", "max_new_tokens", "num_slots")
    },
    "eval.temperature": "sampling.temperature",
    "eval.max_new_tokens": "sampling.max_new_tokens",
    "vllm.max_in_flight": "sampling.max_in_flight",
    "vllm.request_timeout_s": "sampling.request_timeout_s",
    "rollout.max_draws": "rollout.max_prompt_batches",
}
"""Old dotted key -> new one."""

MODE = 'rollout.mode ("sync", "one_step" or "continuous") and rollout.max_policy_lag'
REPLACED = {"rollout.staleness": MODE, "rollout.continuous": MODE}
"""Old dotted key -> what has taken its place."""


def new_name(dotted: str) -> str:
    """What an old key is called now; "" if it never was one."""
    return RENAMED.get(dotted, REPLACED.get(dotted, ""))


def upgraded(stage: str, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a run's config.json with today's keys; one of today is left as it is."""
    new = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for old, name in RENAMED.items():
        section, key = old.split(".")
        if key in new.get(section, {}):
            target, target_key = name.split(".")
            new.setdefault(target, {})[target_key] = new[section].pop(key)
    rollout = new.get("rollout", {})
    if "staleness" in rollout:
        lag, continuous = rollout.pop("staleness"), rollout.pop("continuous", False)
        rollout["mode"] = "continuous" if continuous else "one_step" if lag else "sync"
        if continuous:
            rollout["max_policy_lag"] = lag
    if stage == "curate" and new.pop("rollout", None) is not None:  # its other keys had no effect there,
        new.get("sampling", {}).pop("engine", None)  # nor had this one: the embedded engine sampled
    return new

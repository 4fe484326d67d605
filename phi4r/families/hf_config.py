"""config.json of a Hugging Face folder <-> ModelConfig, by the families' descriptions.

A config is read key by key: numbers become fields, keys that the arithmetic depends on must have a value
that the family is right for, keys that say nothing about it are passed over, and any other key is refused by
name. Both spellings of RoPE are read: `rope_theta` and `rope_scaling` beside the other keys (transformers
4), and the dictionary `rope_parameters` (transformers 5).
"""

from __future__ import annotations

import math
from typing import Any, cast

from phi4r.core.errors import ConfigError, UserError
from phi4r.families.family import Family
from phi4r.families.model import Dtype, ModelConfig
from phi4r.families.registry import FAMILIES, get_family
from phi4r.families.rotary import factors_text

NUMBERS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "init_std",
}
"""Key of config.json -> field."""

REQUIRED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip

ORIGINAL = "original_max_position_embeddings"
LONGROPE = ("longrope", "su")
"""Its name, and an older one."""

ROPE = (
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "original_max_position_embeddings",
)  # fmt: skip

SILENT = (
    "architectures", "model_type", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "_name_or_path",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "gradient_checkpointing",
    "id2label", "label2id", "num_labels", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "tokenizer_class", "finetuning_task", "task_specific_params", "prefix",
    "pruned_heads", "max_length", "min_length", "do_sample", "temperature", "top_p", "top_k", "is_decoder",
    "is_encoder_decoder", "chunk_size_feed_forward", "model_name", "_commit_hash",
)  # fmt: skip
"""Keys that say nothing about the arithmetic of a forward pass."""

FAMILY_KEY = "phi4r_family"
"""Key of config.json with the import path of a family that is not registered; transformers passes it over."""

DTYPES: dict[str, Dtype] = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16"}
"""torch's name of a dtype -> ours."""


def candidates(raw: dict[str, Any]) -> list[str]:
    """The names of the families whose `architectures` and `model_type` a config has; of registered ones, or
    of the one that it names by import path. Raises ConfigError for one that cannot be found."""
    architectures, kind = raw.get("architectures") or [], raw.get("model_type")
    families = {name: get_family(name) for name in ([raw[FAMILY_KEY]] if raw.get(FAMILY_KEY) else FAMILIES)}
    return [
        name
        for name, family in families.items()
        if architectures in ([], [family.architecture]) and kind in (None, family.model_type)
    ]


def model_config(raw: dict[str, Any], where: str, dtype: Dtype | None = None) -> ModelConfig:
    """The ModelConfig of a parsed config.json. dtype: that of the weights, for a config that names none.

    The first family that covers the config gets it. Raises UserError, on one line, with every reason why the
    last candidate does not."""
    names = candidates(raw)
    if not names:
        listed = raw.get("architectures")
        is_text = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
        found = ", ".join(listed or []) if is_text else _short(listed)
        found = found or _short(raw.get("model_type"))
        known = dict.fromkeys(get_family(raw.get(FAMILY_KEY) or name).architecture for name in FAMILIES)
        raise UserError(f"{where}: is a {found}, expected {' or '.join(known)}")
    reasons: list[str] = []
    for name in names:
        reasons = _reasons_against(get_family(name), raw)
        if not reasons:
            return _read(name, raw, where, dtype)
    raise UserError(f"{where}: " + "; ".join(reasons))


def _read(name: str, raw: dict[str, Any], where: str, dtype: Dtype | None) -> ModelConfig:
    family = get_family(name)
    values = {**family.defaults, **{key: value for key, value in raw.items() if value is not None}}
    heads = values["num_attention_heads"]
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("head_dim", values["hidden_size"] // heads)
    fields = {field: values[key] for key, field in NUMBERS.items()}
    named = _dtype_name(raw)
    fields |= {"dtype": DTYPES[named] if named else dtype, "init_scheme": "normal", "family": name}
    fields["tie_embeddings"] = values.get("tie_word_embeddings", False)
    try:
        return ModelConfig(**fields, **_rope(family, raw)[0])
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None


# --- what is refused


def _reasons_against(family: Family, raw: dict[str, Any]) -> list[str]:
    """Why a config is not of a model that the family covers, one reason a difference."""
    reasons = [*_size_reasons(raw), *_rope(family, raw)[1]]
    tied = raw.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        reasons.append(f"tie_word_embeddings {_short(tied)} is neither true nor false")
    elif tied and "tied_embeddings" not in family.options:
        reasons.append("tied embeddings are not supported")
    reasons += _window_reasons(raw)
    for key, allowed in family.fixed.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            reasons.append(f"{key} {raw[key]!r} is not supported (expected {allowed[0]!r})")
    if raw.get("quantization_config") or raw.get("quantization"):
        reasons.append("quantized weights are not supported")
    if (named := _dtype_name(raw)) and named not in DTYPES:
        reasons.append(f"dtype {named!r} is not supported (expected bfloat16, float32 or float64)")
    known = {*NUMBERS, *ROPE, *SILENT, *family.fixed, *WINDOW, "tie_word_embeddings", FAMILY_KEY}
    for key, value in raw.items():
        if key not in known and value not in (None, False, {}, []) and "quantization" not in key:
            reasons.append(f"the key {key!r} ({_short(value)}) is not known and may change what is computed")
    return list(dict.fromkeys(reasons))


def _size_reasons(raw: dict[str, Any]) -> list[str]:
    missing = [key for key in REQUIRED if raw.get(key) is None]
    reasons = [f"{', '.join(missing)}: missing"] if missing else []
    for key in NUMBERS:
        value = raw.get(key)
        is_real = key in ("rms_norm_eps", "initializer_range")
        kinds = (int, float) if is_real else (int,)
        if value is not None and not (type(value) in kinds and 0 < value < math.inf):
            what = "number" if is_real else "whole number"
            reasons.append(f"{key} {value!r} is not a {what} above 0")
    return reasons


WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def _window_reasons(raw: dict[str, Any]) -> list[str]:
    """A window counts where it is shorter than the context, unless `use_sliding_window` says that it is
    off."""
    reasons = []
    window, positions = raw.get("sliding_window"), raw.get("max_position_embeddings")
    is_short = not isinstance(window, int) or not isinstance(positions, int) or window < positions
    if window is not None and raw.get("use_sliding_window", True) and is_short:
        reasons.append(f"sliding_window {window} is smaller than max_position_embeddings {positions}")
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list):
        reasons.append(f"layer_types {_short(layers)} is not a list")
    elif kinds := {str(kind) for kind in layers} - {"full_attention"}:
        reasons.append(f"layer_types {', '.join(sorted(kinds))} is not supported")
    return reasons


def _rope_keys_of(family: Family, raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(what a config says of RoPE wherever it says it, reasons why it says no one thing)."""
    merged: dict[str, Any] = {}
    reasons = []
    own = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor", ORIGINAL)}
    for section in (raw.get("rope_parameters"), raw.get("rope_scaling"), own):
        if section is not None and not isinstance(section, dict):
            reasons.append(f"RoPE is described by {_short(section)}, expected an object")
            continue
        for name, value in (section or {}).items():
            key = "rope_type" if name == "type" else name
            if value is not None and merged.setdefault(key, value) != value:
                reasons.append(f"{key} is given twice: {_short(merged[key])} and {_short(value)}")
    return {key: value for key, value in family.defaults.items() if key in ROPE} | merged, reasons


def _rope(family: Family, raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(fields of ModelConfig, reasons why the family has no such RoPE)."""
    merged, reasons = _rope_keys_of(family, raw)
    kind, theta = merged.pop("rope_type", "default"), merged.pop("rope_theta")
    fraction, original = merged.pop("partial_rotary_factor", 1.0), merged.pop(ORIGINAL, None)
    fields: dict[str, Any] = {"rope_theta": theta, "rotary_fraction": fraction}
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", fraction)):
        if not (type(value) in (int, float) and 0 < value < math.inf):
            reasons.append(f"{key} {_short(value)} is not a number above 0")
    if fraction != 1 and "partial_rotary" not in family.options:
        reasons.append(f"partial_rotary_factor {_short(fraction)} is not supported (expected 1.0)")
    if kind in LONGROPE and "longrope" in family.options:
        factors = [merged.pop(key, None) for key in ("short_factor", "long_factor")]
        if all(isinstance(f, list) and all(type(x) in (int, float) for x in f) and f for f in factors):
            short, long = (factors_text(cast(list[float], f)) for f in factors)
            fields |= {"rope_short_factors": short, "rope_long_factors": long}
        else:
            reasons.append("longrope needs short_factor and long_factor, lists of numbers")
        if isinstance(original, int) and original > 1:
            fields[ORIGINAL] = original
        else:
            reasons.append(f"longrope needs {ORIGINAL}, a whole number, got {_short(original)}")
    elif kind != "default":
        reasons.append(f"RoPE scaling {kind!r} is not supported")
    if merged:
        reasons.append(f"RoPE's {', '.join(merged)} is not supported")
    return fields, reasons


def _dtype_name(raw: dict[str, Any]) -> str:
    return str(raw.get("dtype") or raw.get("torch_dtype") or "").removeprefix("torch.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- the way back


def hf_config(
    model: ModelConfig, base: dict[str, Any], eos_ids: tuple[int, ...], pad_id: int | None
) -> dict[str, Any]:
    """The config.json of `model`. `base`: the config it was converted from, for keys that are not ours ({} if
    none).
    """
    family = model.description
    own: dict[str, Any] = {key: getattr(model, field) for key, field in NUMBERS.items()}
    if model.head_dim * model.num_attention_heads == model.hidden_size and "head_dim" not in family.defaults:
        del own["head_dim"]
    own |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_embeddings,
        "sliding_window": None,
        "attention_bias": False,
        "torch_dtype": next(theirs for theirs, ours in DTYPES.items() if ours == model.dtype),
        **_rope_keys(model),
    }
    if model.family not in FAMILIES:
        own[FAMILY_KEY] = model.family
    ids: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": eos_ids[0] if eos_ids else None,
        "pad_token_id": pad_id,
    }
    defaults = {"attention_dropout": 0.0, "use_cache": True, **family.written}
    rest = {key: value for key, value in base.items() if key not in ("dtype", "head_dim")}
    return {**defaults, **ids, **rest, **own}


def _rope_keys(model: ModelConfig) -> dict[str, Any]:
    """RoPE in both spellings: transformers 4 reads `rope_theta` and `rope_scaling`, 5 `rope_parameters`."""
    rotary, longest = model.rotary, model.max_position_embeddings
    scaling: dict[str, Any] = {"rope_type": "default"}
    keys: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_scaling": None}
    if rotary.long:
        factors = {"short_factor": [*rotary.short], "long_factor": [*rotary.long]}
        scaling = {"rope_type": LONGROPE[0], **factors}
        keys["rope_scaling"] = {"type": LONGROPE[0], **factors}  # transformers 4 takes no other key
    if "partial_rotary_factor" in model.description.defaults:  # Phi-3's own keys
        keys |= {ORIGINAL: rotary.switch or longest, "partial_rotary_factor": model.rotary_fraction}
        scaling["partial_rotary_factor"] = model.rotary_fraction
    if rotary.long:
        scaling[ORIGINAL] = rotary.switch
    return {**keys, "rope_parameters": {**scaling, "rope_theta": model.rope_theta}}

"""config.json, judged before transformers builds what it asks for.

transformers lets this file choose code: `auto_map` names Python files, an attention implementation may name a kernel
to fetch (CVE-2026-4372, CVE-2026-22807). And it believes any count: a million layers keep it busy for hours.
"""

import re
from pathlib import Path
from typing import Any

from quantailor.errors import UntrustedInput
from quantailor.store.jsonio import read_json
from quantailor.store.paths import shown

# Keys that hold a count, and the largest that a real model comes near. Null is a count left to its default.
_COUNTS = (
    (re.compile(r"(num_|n_|encoder_|decoder_)(\w+_)?(layers?|blocks)|depths?"), 2048),
    (re.compile(r"(num_|n_|encoder_|decoder_)(\w+_)?(heads?|experts)"), 2**16),
    (re.compile(r"(\w+_)?(hidden|intermediate|vocab|embedding)_size|head_dim|n_embd|n_inner|d_model|d_ff|d_kv"), 2**24),
    (re.compile(r"(\w+_)?(position_embeddings|n_positions|n_ctx)"), 2**31 - 1),
)
_LABELS = {"id2label", "label2id"}  # their keys are the words of a data set


def read_config(path: Path, *, follow: bool = True) -> dict[str, Any]:
    """The configuration in `path`.

    Raises: UntrustedInput if it is no JSON object within the limits, asks for code, or holds an impossible count.
    """
    config = read_json(path, follow=follow)
    if not isinstance(config, dict):
        raise UntrustedInput(
            f"{shown(path)} is a JSON {type(config).__name__}, not an object; use the model's own config.json"
        )
    to_check: list[Any] = [config]
    while to_check:
        value = to_check.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                _check_code(path, key, item)
                _check_count(path, key, item)
            to_check.extend(item for key, item in value.items() if key not in _LABELS)
        elif isinstance(value, list):
            to_check.extend(value)
    return config


def _check_code(path: Path, key: str, value: Any) -> None:
    if key == "auto_map" and value:
        raise UntrustedInput(
            f"{shown(path)} has auto_map, which runs Python files of the model; "
            "remove the key if transformers knows this model_type without it"
        )
    about_kernels = key.endswith("_implementation") or "_implementation_internal" in key or "kernel" in key
    if key == "_attn_implementation_internal" or (
        key.startswith("_") and about_kernels and isinstance(value, str | dict)
    ):
        raise UntrustedInput(f"{shown(path)} has {shown(key)} = {shown(value)}, which can load code; remove the key")
    if key.endswith("_implementation") and any("/" in name for name in _texts(value)):
        raise UntrustedInput(
            f"{shown(path)} has {shown(key)} = {shown(value)}, a kernel to download and run; "
            "use eager or sdpa, or remove the key"
        )


def _texts(value: Any) -> list[str]:
    """A text, or those in an object of them (an implementation for each part of a model)."""
    values = [value, *value, *value.values()] if isinstance(value, dict) else [value]
    return [item for item in values if isinstance(item, str)]


def _check_count(path: Path, key: str, value: Any) -> None:
    for form, largest in _COUNTS:
        if form.fullmatch(key):
            for item in value if isinstance(value, list) else [value]:
                if item is None or isinstance(item, dict):
                    continue
                if type(item) is not int or not 0 <= item <= largest:
                    raise UntrustedInput(
                        f"{shown(path)} has {key} = {shown(repr(item))}, which must be a whole number "
                        f"from 0 to {largest}; use the model's own config.json"
                    )

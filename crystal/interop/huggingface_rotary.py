"""The rotary base of a config.json, from every place where transformers 5 reads it, in its order.

`convert_rope_params_to_dict` of transformers 5 takes the section `rope_scaling` if it says anything, else
`rope_parameters`; what the section lacks comes from the keys beside it (`rope_theta`, `partial_rotary_factor`), and
last from a default of 10,000. Its `rope_type` counts before the older `type`. A key that is there with null is not
filled in: transformers then fails, and here it is refused.

Scaled frequencies (linear, dynamic, yarn, longrope, llama3, proportional) and heads that are rotated in part are no
LLaMA that our decoder has: refused by name. transformers 5 itself ignores a partial factor in a LLaMA's file while
other readers apply it, so a file with one means two models.
"""

from __future__ import annotations

import math
from typing import Any

from crystal.config.bounded_yaml import shortened
from crystal.errors import ConfigError

DEFAULT_BASE = 10000.0
_KNOWN = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rotary_base(mapping: dict, where: str) -> float:
    """The base of a LLaMA's rotation. Raises ConfigError naming `where` and the dotted key."""
    section = "rope_scaling" if mapping.get("rope_scaling") else "rope_parameters"
    rope = mapping.get(section) or {}
    if not isinstance(rope, dict):
        raise _wrong(where, section, "a mapping", rope)
    key = "rope_type" if "rope_type" in rope or "type" not in rope else "type"
    if (kind := rope.get(key, "default")) != "default":
        raise _wrong(where, f"{section}.{key}", "default, frequencies that are not scaled", kind)
    for name in rope:
        if name not in _KNOWN:
            raise ConfigError(f"{where}: {section}.{name}: expected no such key where nothing is scaled")
    for at, values in ((f"{section}.", rope), ("", mapping)):
        if (factor := values.get("partial_rotary_factor")) is not None and factor != 1:
            raise _wrong(where, f"{at}partial_rotary_factor", "1, whole heads are rotated", factor)
    if "rope_theta" in rope:
        return _base(rope["rope_theta"], where, f"{section}.rope_theta")
    return _base(mapping.get("rope_theta", DEFAULT_BASE), where, "rope_theta")


def check_fixed_base(mapping: dict, where: str) -> None:
    """That a CrystalCoder's file asks for no other rotation than the one in its published class, which reads no key."""
    base = rotary_base({k: v for k, v in mapping.items() if k != "partial_rotary_factor"}, where)
    if base != DEFAULT_BASE:
        raise ConfigError(
            f"{where}: rope_theta: expected {DEFAULT_BASE:g}, the base of CrystalCoder's code, got {base:g}"
        )


def _base(value: Any, where: str, key: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise _wrong(where, key, "a number above 0", value)
    return float(value)


def _wrong(where: str, key: str, expected: str, got: Any) -> ConfigError:
    return ConfigError(f"{where}: {key}: expected {expected}, got {shortened(repr(got), 60)}")

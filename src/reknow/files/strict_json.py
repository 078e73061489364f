"""JSON that every parser reads: NaN and infinity, which only some take, are written as null."""

from __future__ import annotations

import json
import math
from typing import Any


def strict_json(value: Any, **layout: Any) -> str:
    """JSON values as text, with null for numbers that are none.

    Args:
        layout: of `json.dumps`: indent, ensure_ascii, default.
    """
    return json.dumps(finite(value), allow_nan=False, **layout)


def finite(value: Any) -> Any:
    """JSON values with None in place of NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value

"""Numbers as JSON can hold them."""

import math
from typing import Any


def plain(value: Any) -> Any:
    """The same dictionaries and lists; numbers that JSON lacks (inf, nan) become strings."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

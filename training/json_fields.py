"""The type of an argument that is a dictionary."""

from __future__ import annotations

import json
from typing import Any


class JsonDict(dict[str, Any]):
    """A dictionary field: a mapping in YAML, JSON text on the command line."""

    def __init__(self, value: Any = "{}") -> None:
        parsed = json.loads(value) if isinstance(value, str) else dict(value)
        if not isinstance(parsed, dict):
            raise ValueError(f"expected a JSON object such as '{{\"hidden_size\": 96}}', got {value!r}")
        super().__init__(parsed)

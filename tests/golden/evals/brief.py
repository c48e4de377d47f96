"""Long texts and token ids by their hash, so that expected answers stay small."""

import hashlib
import json
from typing import Any

LONGEST = 200  # characters of JSON


def brief(value: Any) -> Any:
    """The value itself, or {"sha256", "length"} of it where its JSON is long.

    sha256: 32 hex digits, of its JSON as `json.dumps(value, ensure_ascii=False)` writes it.
    """
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= LONGEST:
        return value
    return {"sha256": hashlib.sha256(text.encode()).hexdigest()[:32], "length": len(value)}

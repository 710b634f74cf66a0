"""Numbers that names alone decide: what every seed, hold-out and sentence is derived from."""

import hashlib
import json


def stable_hash(*parts: str | int) -> int:
    """A 64-bit number that the parts alone decide, in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")

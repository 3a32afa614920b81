"""What a local server keeps for its next start: ports and random secrets, for our eyes only."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_secret(path: Path, text: str) -> None:
    """Write `text` to a file that only its owner may read, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def remembered(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read what an earlier start wrote to `path`, or make it and keep it there."""
    if not path.exists():
        write_secret(path, json.dumps(make()))
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept

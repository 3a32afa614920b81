"""`python -m tests.support.link_table FILE`: measurements as the table of docs/reliability.md."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.support.links import FAULTS


def table(lines: Iterable[str]) -> Iterator[str]:
    measured: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        case: dict[str, Any] = json.loads(line)
        times = (case["noticed_seconds"], case["recovered_seconds"], case["exit_seconds"])
        shown = " / ".join("-" if time is None else f"{time:.1f}" for time in times)
        measured.setdefault((case["process"], case["link"]), {})[case["fault"]] = shown
    yield "| process | link | " + " | ".join(fault.value for fault in FAULTS) + " |"
    yield "|---|---|" + "---|" * len(FAULTS)
    for (process, link), times_of in sorted(measured.items()):
        cells = (times_of.get(fault.value, "") for fault in FAULTS)
        yield f"| {process} | {link} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    results = Path(sys.argv[1]).read_text().splitlines()
    sys.stdout.writelines(f"{line}\n" for line in table(results))

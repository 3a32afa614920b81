"""How a fault reads in a verdict."""

from collections.abc import Iterable

MAX_SHOWN = 3


def fault(what: str, items: Iterable[str]) -> list[str]:
    """One line with the number of items and the first of them; nothing if there are none."""
    found = list(items)
    return [f"{len(found)} {what}: {', '.join(found[:MAX_SHOWN])}"] if found else []

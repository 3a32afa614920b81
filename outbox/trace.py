"""
The trace that an event belongs to: W3C Trace Context, level 1 (https://www.w3.org/TR/trace-context/).

Invalid headers are dropped, as the standard requires; they must not prevent an event.
"""

import re
from collections.abc import Mapping

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

#: Version, trace, parent, flags; versions after 00 may append more.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[\x21-\x7e]{0,200})?"
)

#: The standard requires that at least this much is propagated.
TRACESTATE_LIMIT_CHARACTERS = 512


def trace_headers(given: Mapping[str, str]) -> dict[str, str]:
    """
    The trace headers among those given; empty without a valid `traceparent`.

    given: a mapping with names in lower case, or one that ignores case.
    """
    traceparent = given.get(TRACEPARENT, "").strip()
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or (match[1] is not None and traceparent.startswith("00")):
        return {}
    tracestate = given.get(TRACESTATE, "").strip()
    if tracestate and len(tracestate) <= TRACESTATE_LIMIT_CHARACTERS and _is_plain(tracestate):
        return {TRACEPARENT: traceparent, TRACESTATE: tracestate}
    return {TRACEPARENT: traceparent}


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()

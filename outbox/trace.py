"""
The trace that an event belongs to, as its writer was given it: W3C Trace Context, level 1.

https://www.w3.org/TR/trace-context/ . What does not fit is left out, as the standard asks: a trace
that is broken must not keep an event back.
"""

import re
from collections.abc import Mapping

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

#: Version, trace, parent, flags; a later version than 00 may have more behind them.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[\x21-\x7e]{0,200})?"
)

#: The standard asks for this much at least to be passed on.
TRACESTATE_LIMIT_CHARACTERS = 512


def trace_headers(given: Mapping[str, str]) -> dict[str, str]:
    """
    Those of the given headers that say which trace this is: none without a valid `traceparent`.

    given: names in lower case, or a mapping that ignores case.
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

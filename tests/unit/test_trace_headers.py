"""Which trace headers of a request are kept: valid ones only."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.trace import trace_headers

TRACE = {
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "bot=00f067aa0ba902b7",
}


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        (TRACE, TRACE),
        ({"traceparent": TRACE["traceparent"]}, {"traceparent": TRACE["traceparent"]}),
        # a trace alone says where it belongs; its vendors' states alone say nothing
        ({"tracestate": "bot=1"}, {}),
        ({**TRACE, "tracestate": "x" * 513}, {"traceparent": TRACE["traceparent"]}),
        ({**TRACE, "tracestate": "a=\r\nb"}, {"traceparent": TRACE["traceparent"]}),
        ({"traceparent": TRACE["traceparent"].upper()}, {}),
        ({"traceparent": TRACE["traceparent"] + "-more"}, {}),
        ({"traceparent": "ff" + TRACE["traceparent"][2:]}, {}),
        ({"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"}, {}),
        ({"traceparent": f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01"}, {}),
        # a version that is not known yet may say more
        (
            {"traceparent": "01" + TRACE["traceparent"][2:] + "-more"},
            {"traceparent": "01" + TRACE["traceparent"][2:] + "-more"},
        ),
    ],
)
def test_a_broken_trace_is_left_out(headers: Mapping[str, str], kept: Mapping[str, str]) -> None:
    assert trace_headers(headers) == kept


@given(
    st.text(), st.sampled_from(["", TRACE["traceparent"], "01" + TRACE["traceparent"][2:] + "-"])
)
def test_nothing_that_could_break_a_message_is_kept(text: str, valid: str) -> None:
    for value in trace_headers({"traceparent": valid + text, "tracestate": text}).values():
        assert value.isascii()
        assert value.isprintable()

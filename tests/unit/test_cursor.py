"""Cursors of the request list."""

from base64 import urlsafe_b64encode
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from service.listing import Cursor


@given(
    st.datetimes(timezones=st.just(UTC)).map(
        lambda moment: moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    ),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_a_cursor_leads_back_to_where_it_was_taken(moment: datetime, request_id: str) -> None:
    cursor = Cursor(moment, request_id)
    assert Cursor.read(str(cursor)) == cursor


def encoded(plain: bytes) -> str:
    return urlsafe_b64encode(plain).decode().rstrip("=")


@given(
    st.text(max_size=64)
    | st.binary(max_size=64).map(encoded)
    | st.integers(-(10**20), 10**20).map(lambda number: encoded(f"{number}:x".encode()))
)
def test_no_text_breaks_the_reading_of_a_cursor(text: str) -> None:
    try:
        cursor = Cursor.read(text)
    except ValueError:
        return
    assert str(cursor) == text

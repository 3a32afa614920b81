"""No secret of a URL is repeated in an excerpt of a response."""

import re

from hypothesis import given
from hypothesis import strategies as st

from consumers.channels.http import secrets_of


@given(st.text("ABC123/=?&%-_", min_size=12, max_size=80))
def test_no_long_part_of_a_url_is_told_by_its_own_answer(path: str) -> None:
    url = "https://hooks.example/" + path
    long_words = [word for word in re.split(r"[/?&=]", path) if len(word) >= 12]
    assert set(long_words) <= set(secrets_of(url))

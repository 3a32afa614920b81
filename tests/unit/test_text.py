"""What a stranger wrote, as it leaves the product: to third parties, and into logs."""

import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assistance.request import is_blank
from consumers.channels.text import clean_text, one_line, quoted
from runtime.printable import escape_unprintable
from tests.support.processes import bare_environment

#: More of what hurts than random text would have.
hostile = st.text(
    st.one_of(st.characters(), st.sampled_from("\x00\x1b\r\n\x85\u2028\u202e\u2066\u200b> "))
)


@given(hostile)
def test_clean_text_has_no_control_character_and_no_direction(text: str) -> None:
    clean = clean_text(text)
    hidden = {one for one in clean if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert hidden <= set("\n\t\u200c\u200d")
    assert clean_text(clean) == clean
    assert clean.encode().decode() == clean


@given(hostile)
def test_one_line_is_one_line(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1


@given(hostile)
def test_every_line_of_a_quotation_is_marked_as_one(text: str) -> None:
    assert all(line.startswith("> ") for line in quoted(text).splitlines())


@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")) | st.just("\n")))
def test_plain_text_stays_as_it_was_written(text: str) -> None:
    assert clean_text(text) == text


@pytest.mark.parametrize("text", ["é\u0301", "👩\u200d🔧", "שלום", "نمی\u200cروم", "a\tb"])
def test_what_people_write_stays_as_it_was_written(text: str) -> None:
    assert clean_text(text) == text


@given(st.text(st.sampled_from(" \t\n\x00\u200b\u200e\u2060\ufeff\u3164\u2800\ufe0f\u00ad\u00a0")))
def test_text_in_which_nothing_can_be_seen_is_blank(text: str) -> None:
    assert is_blank(text)
    assert not is_blank(text + "?")


@pytest.mark.parametrize("text", ["?", "🙂", "é", "你", "\ue000", "\U0001fae9"])
def test_text_in_which_something_can_be_seen_is_not_blank(text: str) -> None:
    assert not is_blank(f"\u200b{text}\u200b")


@given(hostile)
def test_printable_text_cannot_steer_a_terminal_or_begin_a_line(text: str) -> None:
    assert escape_unprintable(text).isprintable()


LOG_HOSTILE_TEXT = """
from loguru import logger
from runtime.logs import set_up_logs

set_up_logs("test", level="INFO", format="pretty")
forged = "1\\x1b[2J\\n12:00:00.000 INFO    test delivery.attempted\\u202e"
logger.info("message.refused", event_id=forged)
logger.info(forged)
"""


def test_no_value_in_a_pretty_log_steers_the_terminal_or_forges_a_line() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOG_HOSTILE_TEXT],
        env=bare_environment(),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    first, second = ended.stderr.splitlines()
    for line in (first, second):
        assert "1\\x1b[2J\\n12:00" in line
        assert "\u202e" not in line

"""The tables of answers in docs/channels.md are those of the code."""

import pytest

from assistance.delivery import UnknownRule
from consumers.channels import email, find_channel, slack, unknown_rule, webhook
from consumers.channels.answers import Meaning, Row
from tests.support.paths import REPOSITORY

TABLES = {"slack": slack.ANSWERS, "email": email.ANSWERS, "webhook": webhook.ANSWERS}


@pytest.mark.parametrize("channel", TABLES)
def test_the_page_has_every_row_of_the_table(channel: str) -> None:
    page = (REPOSITORY / "docs" / "channels.md").read_text().splitlines()
    rows = ["|---|---|---|---|", *(_written(row) for row in TABLES[channel]), ""]
    starts = [at for at, line in enumerate(page) if line == rows[0]]
    assert rows in [page[at : at + len(rows)] for at in starts]


@pytest.mark.parametrize("channel", TABLES)
def test_no_answer_has_two_meanings(channel: str) -> None:
    answers = [(row.moment, row.answer) for row in TABLES[channel]]
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize("channel", TABLES)
def test_an_unknown_outcome_has_a_reason(channel: str) -> None:
    assert all(row.reason for row in TABLES[channel] if row.meaning is Meaning.UNKNOWN)


def test_every_channel_of_the_product_has_a_table() -> None:
    assert all(find_channel(channel) for channel in TABLES)


def _written(row: Row) -> str:
    return f"| {row.moment} | {row.answer} | {row.meaning.value} | {row.reason} |"


def test_only_a_third_party_that_recognises_a_repeat_gets_one_on_schedule() -> None:
    rules = {name: unknown_rule(find_channel(name), None).value for name in TABLES}
    assert rules == {"slack": "rarely", "email": "rarely", "webhook": "repeat"}
    assert unknown_rule(find_channel("slack"), UnknownRule.REPEAT) is UnknownRule.REPEAT

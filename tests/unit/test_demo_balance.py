"""The demo's last line: it balances only when everything that was accepted has arrived."""

import pytest

from sandbox.demo import balance_of

ALL_WELL = {"a": "succeeded", "b": "succeeded"}


def test_what_arrived_is_even_and_repeats_are_counted() -> None:
    balance = balance_of(ALL_WELL, ["a", "b", "b"], unexplained=0)
    assert balance.is_even
    assert str(balance) == "posted 2, delivered 2, failed 0, lost 0, unexplained 0, repeated 1"


@pytest.mark.parametrize(
    ("statuses", "received", "unexplained", "shown"),
    [
        (ALL_WELL, ["a"], 0, "delivered 1, failed 0, lost 1, unexplained 0"),
        (ALL_WELL, ["a", "b"], 1, "delivered 2, failed 0, lost 0, unexplained 1"),
        ({"a": "succeeded", "b": "failed"}, ["a"], 0, "delivered 1, failed 1, lost 0"),
        # it arrived, and the answer was lost until the last try
        ({"a": "succeeded", "b": "failed"}, ["a", "b"], 0, "delivered 2, failed 1, lost 0"),
    ],
)
def test_whatever_is_missing_failed_or_unexplained_is_not_even(
    statuses: dict[str, str], received: list[str], unexplained: int, shown: str
) -> None:
    balance = balance_of(statuses, received, unexplained=unexplained)
    assert not balance.is_even
    assert shown in str(balance)

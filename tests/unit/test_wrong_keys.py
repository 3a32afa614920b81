"""The throttling of wrong API keys: its rate, its memory, and what an address is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import wrong_keys
from service.wrong_keys import WrongKeys, address_of


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def guess(keys: WrongKeys, address: str) -> bool:
    """Whether the key is checked; it is wrong."""
    if keys.wait_seconds(address) > 0:
        return False
    keys.count(address)
    return True


def test_a_minutes_number_at_once_then_one_after_its_share() -> None:
    clock = Clock()
    keys = WrongKeys(6, clock)
    assert sum(guess(keys, "a") for _ in range(100)) == 6
    assert keys.wait_seconds("a") == pytest.approx(10)
    assert keys.wait_seconds("b") == 0
    clock.seconds += 10
    assert sum(guess(keys, "a") for _ in range(100)) == 1
    clock.seconds += 3600
    assert sum(guess(keys, "a") for _ in range(100)) == 6


@given(pauses=st.lists(st.floats(0, 30), max_size=200), per_minute=st.integers(1, 60))
def test_no_pattern_of_guesses_beats_the_rate(pauses: list[float], per_minute: int) -> None:
    clock = Clock()
    keys = WrongKeys(per_minute, clock)
    checked = 0
    for pause in pauses:
        clock.seconds += pause
        checked += guess(keys, "a")
    assert checked <= per_minute + (clock.seconds - 1000) * per_minute / 60 + 1


def test_it_can_be_disabled() -> None:
    keys = WrongKeys(0)
    assert all(guess(keys, "a") for _ in range(1000))
    assert len(keys) == 0


def test_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrong_keys, "MAX_ADDRESSES", 10)
    keys = WrongKeys(1, Clock())
    for number in range(100):
        guess(keys, str(number))
    assert len(keys) == 10
    assert keys.wait_seconds("99") > 0
    assert keys.wait_seconds("0") == 0


def test_throttling_is_news_once_until_it_has_ended() -> None:
    clock = Clock()
    keys = WrongKeys(1, clock)
    for _ in range(2):
        guess(keys, "a")
        assert [keys.is_news("a"), keys.is_news("a")] == [True, False]
        clock.seconds += 61


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("192.0.2.7", 5), "192.0.2.7"),
        (("2001:db8::1:2:3:4", 5), "2001:db8::/64"),
        (("::ffff:192.0.2.7", 5), "192.0.2.7"),
        (("\x1b[31m forged", 0), "unknown"),
        (None, "unknown"),
    ],
)
def test_an_address_is_one_client(client: Any, address: str) -> None:
    assert address_of({"client": client}) == address

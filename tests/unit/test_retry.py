"""The delays between retries, with backoff and with a replacement for it."""

from collections.abc import Iterator
from itertools import islice
from random import uniform
from types import ModuleType
from typing import Any

import backoff
import pytest

from runtime import retry


class PlainBackoff:
    """What `runtime/retry.py` needs of backoff, in plain Python."""

    @staticmethod
    def expo(factor: float, max_value: float) -> Iterator[float | None]:
        yield None
        delay_seconds = factor
        while True:
            yield min(delay_seconds, max_value)
            delay_seconds = min(delay_seconds * 2, max_value)

    @staticmethod
    def full_jitter(limit_seconds: float) -> float:
        return uniform(0, limit_seconds)


@pytest.fixture(autouse=True, params=[backoff, PlainBackoff], ids=["backoff", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(retry, "backoff", request.param)
    return request.param


def test_only_one_name_leads_to_backoff() -> None:
    from_backoff = [
        name
        for name, value in vars(retry).items()
        if getattr(value, "__module__", "").startswith("backoff")
        or (isinstance(value, ModuleType) and value.__name__.startswith("backoff."))
    ]
    assert not from_backoff, "a replacement of `backoff` would not reach these"


def test_delays_double_up_to_the_cap_and_keep_their_lower_half() -> None:
    full = [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    for _ in range(100):
        delays = list(islice(retry.growing_delays(first_seconds=0.1, cap_seconds=1.0), 6))
        assert all(
            longest / 2 <= delay <= longest for delay, longest in zip(delays, full, strict=True)
        )


def test_delays_of_two_processes_differ() -> None:
    first, second = (list(islice(retry.growing_delays(), 5)) for _ in range(2))
    assert first != second


def test_delays_never_end() -> None:
    *_, late = islice(retry.growing_delays(cap_seconds=5.0), 2000)
    assert 2.5 <= late <= 5.0

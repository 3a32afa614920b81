"""What a process makes of it when the system gives it nothing any more."""

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from loguru import logger

from runtime import process
from runtime.exit_codes import ExitCode
from runtime.process import Exhaustion, probe, run_process, why_exhausted
from runtime.shutdown import Stop


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setattr(process, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(process, "REPEAT_SECONDS", 0.1)
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 0.25)
    seen: list[str] = []
    sink = logger.add(lambda message: seen.append(message.record["message"]), level="ERROR")
    yield seen
    logger.remove(sink)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, ""), "file descriptors are in use"),
        (OSError(errno.ENFILE, ""), "the machine is short of it"),
        (OSError(errno.ENOMEM, ""), "the machine is short of it"),
        (MemoryError(), "no memory"),
        (RuntimeError("can't start new thread"), "no more threads"),
    ],
)
def test_what_has_run_out_is_named(error: Exception, said: str) -> None:
    assert said in str(why_exhausted(error))


@pytest.mark.parametrize("error", [OSError(errno.ECONNREFUSED, ""), RuntimeError("other")])
def test_other_errors_are_not_exhaustion(error: Exception) -> None:
    assert why_exhausted(error) is None


def test_nothing_has_run_out() -> None:
    assert probe() is None


@pytest.mark.parametrize(
    ("target", "name", "error"),
    [
        (socket, "socket", OSError(errno.EMFILE, "")),
        (threading.Thread, "start", RuntimeError("can't start new thread")),
    ],
)
async def test_it_is_logged_slowly_and_then_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, events: list[str], target: Any, name: str, error: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    stop, exhaustion = Stop(), Exhaustion()
    with monkeypatch.context() as refusing:
        refusing.setattr(target, name, refuse)
        await asyncio.wait_for(exhaustion.watch(stop), 5)
    assert stop.requested
    assert exhaustion.is_final
    assert events[0] == "process.exhausted"
    assert events[-1] == "process.gives_up"
    assert 2 <= len(events) <= 5


async def test_a_shortage_that_passes_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, events: list[str]
) -> None:
    answers = iter(["short"] * 5)
    monkeypatch.setattr(process, "probe", lambda: next(answers, None))
    stop = Stop()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Exhaustion().watch(stop), 0.5)
    assert not stop.requested
    assert events == ["process.exhausted"]


@pytest.mark.usefixtures("events")
def test_an_error_for_want_of_it_exits_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    # it would end the tests' own process in time
    monkeypatch.setattr(Stop, "on_signals", lambda *_, **__: None)

    async def life(_stop: Stop) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(SystemExit) as ended:
        run_process(life, grace_seconds=1)
    assert ended.value.code == ExitCode.EXHAUSTED

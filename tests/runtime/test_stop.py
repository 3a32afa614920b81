"""A process ends after its grace time whatever hangs: its event loop, its log, or a thread."""

import signal
import subprocess
import sys
from time import monotonic

import pytest

from runtime.exit_codes import ExitCode
from tests.support.paths import REPOSITORY

PROGRAM = """
import asyncio, sys, threading, time
from runtime import shutdown
from runtime.process import run_process

shutdown.CLOSING_SECONDS = 0.3

async def life(stop):
    print("ready", flush=True)
    {hang}

run_process(life, grace_seconds=0.2)
"""

HANGING = {
    "the loop": "time.sleep(60)",
    "the loop, in code of our own": "while True: pass",
    "the log": "while True: sys.stderr.write('x' * 65536)",
    "a task that refuses to be cancelled": (
        "await asyncio.shield(asyncio.to_thread(time.sleep, 60))"
    ),
    "a thread, at the exit": (
        "threading.Thread(target=time.sleep, args=[60]).start(); await stop.wait()"
    ),
}


def start(hang: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(hang=hang)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,  # which nothing reads
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("hang", HANGING.values(), ids=HANGING.keys())
def test_what_hangs_is_ended_after_the_grace_time(hang: str) -> None:
    with start(hang) as process:
        began_at = monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(10) == ExitCode.UNFINISHED
        finally:
            process.kill()
        assert monotonic() - began_at < 5


@pytest.mark.parametrize("hang", ["time.sleep(60)", "await asyncio.sleep(60)"])
def test_a_second_signal_ends_it_at_once(hang: str) -> None:
    with start(hang) as process:
        try:
            while process.poll() is None:
                process.send_signal(signal.SIGINT)
            assert process.wait(5) in {ExitCode.INTERRUPTED, ExitCode.UNFINISHED}
        finally:
            process.kill()


def test_a_process_that_stops_in_time_exits_with_zero() -> None:
    with start("await stop.wait()") as process:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(5) == 0
        finally:
            process.kill()

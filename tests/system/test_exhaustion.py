"""A process that is given no more file descriptors says so, and exits for its supervisor to see."""

import json
import resource

import pytest

from runtime.exit_codes import ExitCode
from runtime.process import PATIENCE_SECONDS
from sandbox.waiting import wait_until
from tests.support.links import Mode
from tests.support.subjects import CLOSING_SECONDS, GRACE_SECONDS, SUBJECTS, Subject, Surroundings

#: What the process reports now and then, and what its libraries say at each try.
LINES_LIMIT = 80

CASES = [
    pytest.param(process, marks=[] if process in {"relay", "worker"} else [pytest.mark.link_faults])
    for process in SUBJECTS
    if process != "e-mail worker"
]


def take_all_descriptors(subject: Subject) -> None:
    """None above those of standard input, output and error; what is open stays open."""
    resource.prlimit(subject.process.pid, resource.RLIMIT_NOFILE, (3, 3))


@pytest.mark.parametrize("process", CASES)
def test_no_file_descriptors_are_left(surroundings: Surroundings, process: str) -> None:
    subject = SUBJECTS[process](surroundings)
    try:
        subject.ask()
        wait_until(lambda: not subject.open_count(), "it works")
        lines_before = len(subject.process.output().splitlines())
        take_all_descriptors(subject)
        for link in subject.links.values():
            link.switch(Mode.CLOSING)
            link.switch(Mode.PASS)
        exit_code = subject.process.wait_exit(PATIENCE_SECONDS + GRACE_SECONDS + CLOSING_SECONDS)
    finally:
        subject.close()
    assert exit_code == ExitCode.EXHAUSTED
    lines = [json.loads(line) for line in subject.process.output().splitlines()[lines_before:]]
    reported = [line["message"] for line in lines]
    assert len(lines) < LINES_LIMIT
    assert reported.count("process.gives_up") == 1
    assert 1 <= reported.count("process.exhausted") <= 4

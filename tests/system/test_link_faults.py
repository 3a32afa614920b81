"""
Every link of every process, spoiled in five ways.

In each case the process has work to do, notices within seconds that a link is spoiled, does all of
the work once the link is mended, and exits within its grace time while the link is spoiled again.
The measured times are in docs/reliability.md. `make link-faults` runs all cases; `make test` six.
"""

import os
from dataclasses import asdict
from json import dumps
from pathlib import Path

import pytest

from runtime.exit_codes import ExitCode
from tests.support.links import FAULTS, Link, Mode
from tests.support.subjects import (
    CHANGE_STREAM,
    CLOSING_SECONDS,
    GRACE_SECONDS,
    SUBJECTS,
    Surroundings,
    measure,
    port_of,
)

#: Where `make link-faults` collects what was measured, one JSON object a line.
RESULTS = os.environ.get("LINKS_RESULTS")

ONLY_THE_CHANGE_STREAM = "mongodb, change stream only"

#: A fault is reported, or work resumes, within this time. A confirm that was lost while the link
#: was spoiled is waited for up to the relay's confirm deadline of 30 s.
NOTICE_SECONDS = 25
RECOVERY_SECONDS = 35

ALL_CASES = [
    (process, peer, mode)
    for process, subject in SUBJECTS.items()
    for peer in (*subject.peers, *((ONLY_THE_CHANGE_STREAM,) if process == "relay" else ()))
    for mode in FAULTS
]

CHOSEN = {
    ("relay", ONLY_THE_CHANGE_STREAM, Mode.SILENT),
    ("relay", "mongodb", Mode.SILENT),
    ("relay", "rabbitmq", Mode.SILENT),
    ("worker", "mongodb", Mode.TRICKLING),
    ("worker", "rabbitmq", Mode.LOSING),
    ("service", "mongodb", Mode.SILENT),
}

CASES = [
    pytest.param(
        *case, marks=[] if case in CHOSEN else [pytest.mark.link_faults], id=" ".join(case)
    )
    for case in ALL_CASES
]


@pytest.mark.parametrize(("process", "peer", "mode"), CASES)
def test_a_spoiled_link_is_noticed_and_recovered_from_and_holds_up_no_stop(
    surroundings: Surroundings, process: str, peer: str, mode: Mode
) -> None:
    subject = SUBJECTS[process](surroundings)
    try:
        if peer == ONLY_THE_CHANGE_STREAM:
            measured = measure(subject, "mongodb", mode, carrying=CHANGE_STREAM)
        else:
            measured = measure(subject, peer, mode)
    finally:
        subject.close()
    if RESULTS is not None:
        case = {"process": process, "link": peer, "fault": mode.value, **asdict(measured)}
        with Path(RESULTS).open("a") as results:
            results.write(dumps(case) + "\n")
    assert measured.noticed_seconds is None or measured.noticed_seconds < NOTICE_SECONDS
    assert measured.recovered_seconds < RECOVERY_SECONDS
    assert measured.exit_seconds < GRACE_SECONDS + CLOSING_SECONDS


#: Operators' commands, the server that each needs, and what it says when that does not answer.
COMMANDS = {
    ("relay", "position", "show"): ("mongodb", "MongoDB"),
    ("service", "audit"): ("mongodb", "MongoDB"),
    ("consumers", "destinations", "list"): ("mongodb", "MongoDB"),
    ("consumers", "topology"): ("rabbitmq", "topology does not start"),
}

COMMAND_SECONDS = 20

COMMAND_CASES = [
    pytest.param(
        command,
        mode,
        marks=[] if (command[0], mode) == ("relay", Mode.SILENT) else [pytest.mark.link_faults],
        id=f"{' '.join(command)}, {mode}",
    )
    for command in COMMANDS
    for mode in FAULTS
]


@pytest.mark.parametrize(("command", "mode"), COMMAND_CASES)
def test_a_command_ends_with_one_sentence(
    surroundings: Surroundings, command: tuple[str, ...], mode: Mode
) -> None:
    peer, said = COMMANDS[command]
    server = surroundings.mongodb_url if peer == "mongodb" else surroundings.rabbitmq_url
    environment = {
        "MONGODB_URL": surroundings.mongodb_url,
        "MONGODB_DATABASE": surroundings.database_name,
        "RABBITMQ_URL": surroundings.rabbitmq_url,
    }
    with Link("127.0.0.1", port_of(server)) as link:
        query = {"directConnection": "true"} if peer == "mongodb" else {}
        environment[f"{peer}_url".upper()] = link.url(server, **query)
        link.switch(mode)
        process = surroundings.run_process(*command, environment=environment)
        assert process.wait_exit(COMMAND_SECONDS) == ExitCode.UNAVAILABLE
    [line] = [line for line in process.output().splitlines() if not line.startswith("{")]
    assert said in line

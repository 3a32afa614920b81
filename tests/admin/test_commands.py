"""What an operator's command says when something is wrong, and how its tables read."""

import re

from typer.testing import CliRunner

from consumers.__main__ import commands
from runtime.operations import OPERATIONS
from tests.conftest import RunProcess
from tests.support.deliveries import Deliveries
from tests.support.operating import fail_many, json_of, run_command

WHY = ("--why", "a rehearsal", "--who", "ann")


def test_a_command_says_in_one_sentence_that_mongodb_is_away(run_process: RunProcess) -> None:
    nowhere = {"MONGODB_URL": "mongodb://user:hunter2@127.0.0.1:1/?replicaSet=rs0"}
    audit = run_process("service", "audit", environment=nowhere)
    looked = CliRunner().invoke(commands, ["needs-decision", "list"], env=nowhere)
    assert (looked.exit_code, audit.wait_exit()) == (69, 69)
    assert looked.output == audit.output()
    # the words within the parentheses are the driver's
    assert re.fullmatch(
        r"MongoDB at 127\.0\.0\.1:1 is not reachable \(127\.0\.0\.1:1: \[Errno 111\] Connect.+\): "
        "check that it is running and that MONGODB_URL is right\n",
        looked.output,
    )


def test_what_is_decided_or_unknown_is_refused_and_not_recorded(deliveries: Deliveries) -> None:
    first, second = fail_many(deliveries, 2)
    discard = ("dead-letters", "discard", "--yes", *WHY)
    run_command(deliveries, *discard, first)
    said = run_command(deliveries, *discard, first, code=66)
    assert said == "already decided: discarded 1; nothing was changed\n"
    said = run_command(deliveries, "destinations", "resume", "slak", *WHY, code=2)
    assert "there is no destination 'slak'; known: email, slack" in said
    assert deliveries.database[OPERATIONS].count_documents({}) == 1

    said = run_command(deliveries, *discard, first, second)
    assert said.startswith("skipped: discarded: 1\ndiscarded: 1\n")


def test_a_list_names_its_columns_and_says_when_it_is_cut(deliveries: Deliveries) -> None:
    at_once = ("--yes", "--patience-seconds", "0", *WHY)
    for letter_id in fail_many(deliveries, 2):
        run_command(deliveries, "dead-letters", "redrive", letter_id, *at_once)
    [newest] = json_of(deliveries, "dead-letters", "redrives", "list", "--limit", "1")
    said = run_command(deliveries, "dead-letters", "redrives", "list", "--limit", "1")
    title, row = (re.split(" {2,}", line) for line in said.splitlines()[:2])
    assert title == ["redrive", "started UTC", "who", "why", "state", "reason", "result"]
    assert [row[0], row[4], row[6]] == [newest["_id"], "done", "sent 1"]
    assert row[1] == newest["asked_at"][:19].replace("T", " ")
    assert said.endswith("the first 1; --limit shows more\n")
    assert "--limit" not in run_command(deliveries, "dead-letters", "redrives", "list")
    for listing in (
        "needs-decision list",
        "overdue",
        "dead-letters list",
        "dead-letters redrives list",
    ):
        run_command(deliveries, *listing.split(), "--limit", "0", code=2)

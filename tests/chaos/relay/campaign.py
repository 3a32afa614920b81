"""
Rounds of blows under load, each followed by a verdict.

    load begins -> strikes fall -> load ends -> all is settled, one leads -> copies are counted
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pymongo.read_concern import ReadConcern

from sandbox.mongodb import MongoServer
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until
from tests.chaos.relay.blows import Blows
from tests.chaos.relay.load import ENTITIES, id_prefix, load
from tests.chaos.relay.plan import Round
from tests.chaos.relay.relays import Relays
from tests.chaos.relay.verdict import Committed, Evidence, Verdict, decide
from tests.chaos.relay.watch import Watch
from tests.support.outbox_world import OutboxWorld, settled
from tests.support.paths import REPOSITORY
from tests.support.processes import OurProcess

WINDOW = 100
SETTLING_SECONDS = 120.0
RECOVERED_AFTER_EVENTS = 30
COMMAND_SECONDS = 30.0

SETTINGS = {
    "RELAY_WINDOW_MESSAGES": str(WINDOW),
    # a frozen relay is given up after three of these
    "RABBITMQ_HEARTBEAT_SECONDS": "1",
    "PYTHONPATH": str(REPOSITORY),  # where tests.chaos.relay.faulty is found
}

Say = Callable[[str], None]


@dataclass
class Result:
    """Counts of all rounds; faults: of the last one, which they ended."""

    faults: list[str] = field(default_factory=list)
    rounds: int = 0
    committed: int = 0
    repeats: int = 0
    most_repeats: int = 0
    terms: int = 0
    positions_lost: int = 0

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.committed} events committed, {self.terms} terms of"
            f" leadership, {self.positions_lost} positions lost, {self.repeats} repeats"
            f" (at most {self.most_repeats} in a round; window {WINDOW})"
        )


def run_campaign(
    plan: Sequence[Round],
    world: OutboxWorld,
    mongo: MongoServer,
    rabbit: RabbitServer,
    folder: Path,
    *,
    command: Sequence[str] = ("relay", "run"),
    say: Say = lambda _line: None,
) -> Result:
    """Play the rounds up to the first with a fault. The relays are ended; the servers are not."""
    environment = world.environment | SETTINGS
    relays = Relays(command, environment, folder)
    result = Result()

    def run_command(*arguments: str) -> OurProcess:
        process = OurProcess(arguments, environment, folder / "commands.log")
        if process.wait_exit(COMMAND_SECONDS) != 0:
            relays.faults.append(f"{process.name} failed: {process.last_lines(3)}")
        return process

    blows = Blows(world, relays, mongo, rabbit, run_command)
    world.database.create_collection(ENTITIES)
    try:
        relays.fill_up()
        relays.wait_one_leads()
        with Watch(world) as watch:
            campaign = Campaign(world, relays, blows, watch, result, say)
            for round_ in plan:
                campaign.play(round_)
                if result.faults:
                    return result
        relays.stop_all()
        result.faults += relays.check()
    finally:
        relays.end()
    return result


class Campaign:
    def __init__(
        self,
        world: OutboxWorld,
        relays: Relays,
        blows: Blows,
        watch: Watch,
        result: Result,
        say: Say,
    ) -> None:
        self._world = world
        self._relays = relays
        self._blows = blows
        self._watch = watch
        self._result = result
        self._say = say
        self._earlier: set[str] = set()
        self._last_seqs: dict[str, int] = {}
        self._terms = 0
        self._outbox = world.outbox.with_options(read_concern=ReadConcern("majority"))

    def play(self, round_: Round) -> None:
        began = time.monotonic()
        with load(self._world, round_):
            for strike in round_.strikes:
                self._blows.strike(strike)
            faults = self._wait_recovered()
        faults += self._settle(round_)
        self._relays.wait_one_leads()
        committed = self._committed(round_)
        terms = len(self._relays.epochs())
        missed = self._relays.count_said("event.missed")
        if missed:
            faults.append(f"{missed} events were found by the safety net alone")
        verdict = decide(
            Evidence(
                committed=committed,
                copies=[arrival.message_id for arrival in self._world.drain()],
                earlier=self._earlier,
                last_seqs=self._last_seqs,
                terms=terms - self._terms,
                window=WINDOW,
            )
        )
        faults += [*verdict.faults, *self._watch.check(), *self._relays.check()]
        self._earlier |= committed.keys()
        self._last_seqs = dict(verdict.last_seqs)
        self._terms = terms
        self._note(committed, verdict, faults)
        self._say(
            f"round {round_.number:4}  {time.monotonic() - began:5.1f} s"
            f"  {len(committed):5} events  {verdict.repeats:4} repeats"
            f"  {'ok  ' if not faults else 'FAIL'}  {round_}"
        )

    def _wait_recovered(self) -> list[str]:
        """Load goes on until a leader tails the stream again."""
        goal = settled(self._world) + RECOVERED_AFTER_EVENTS
        self._relays.leader()

        def recovered() -> bool:
            checkpoint = self._world.checkpoint()
            tails = checkpoint.get("position") and not checkpoint.get("handover")
            return bool(tails and checkpoint["settled"] > goal)

        try:
            wait_until(recovered, "a leader is at work", deadline_seconds=SETTLING_SECONDS)
        except AssertionError as idle:
            return [f"{idle}: {self._relays.roles()}"]
        return []

    def _settle(self, round_: Round) -> list[str]:
        """
        Wait until every event is published.

        A position that has passed a moment at which an event was pending, and it still is, has lost
        it: nothing but the safety net would find it.
        """
        now = self._world.client.admin.command("ping")["operationTime"]
        pending = {**_of(round_), "state": {"$ne": "published"}}
        faults: list[str] = []

        def all_published() -> bool:
            checkpoint = self._world.checkpoint()
            place = checkpoint.get("position")
            if not self._outbox.count_documents(pending, limit=1):
                return True
            if place and not checkpoint.get("handover") and place["cluster_time"] > now:
                passed = {**_of(round_), "state": {"$in": [None, "pending"]}}
                if count := self._outbox.count_documents(passed):
                    faults.append(f"the position has passed {count} events that are still pending")
            return bool(faults)

        try:
            wait_until(all_published, "all is published", deadline_seconds=SETTLING_SECONDS)
        except AssertionError as stuck:
            faults.append(f"{stuck}; {self._world.states()}")
        return faults

    def _committed(self, round_: Round) -> dict[str, Committed]:
        events = self._outbox.find(_of(round_), {"key": 1, "seq": 1})
        return {event["_id"]: Committed(event["key"], event["seq"]) for event in events}

    def _note(self, committed: dict[str, Committed], verdict: Verdict, faults: list[str]) -> None:
        result = self._result
        result.faults = faults
        result.rounds += 1
        result.committed += len(committed)
        result.repeats += verdict.repeats
        result.most_repeats = max(result.most_repeats, verdict.repeats)
        result.terms = self._terms
        result.positions_lost = self._relays.count_said("position.lost")


def _of(round_: Round) -> dict[str, object]:
    prefix = id_prefix(round_.number)
    return {"_id": {"$gte": prefix, "$lt": f"{prefix}~"}}

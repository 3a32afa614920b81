"""Carries out what the plan says, on real processes and real servers."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pymongo.errors import PyMongoError

from sandbox.mongodb import MongoServer
from sandbox.rabbitmq import RabbitServer
from sandbox.waiting import wait_until
from tests.chaos.relay.plan import Blow, Strike
from tests.chaos.relay.relays import Relays
from tests.support.outbox_world import OutboxWorld, settled
from tests.support.processes import OurProcess

MOMENT_DEADLINE_SECONDS = 3.0
SERVER_DEADLINE_SECONDS = 60.0
JUNK = "junk"
JUNK_BYTES = 500_000

#: A mongod whose oplog rolls within a second, and that keeps no history for it: 8 MB is the least.
OPLOG_THAT_ROLLS = (
    *("--oplogSize", "8"),
    *("--syncdelay", "1"),
    *("--setParameter", "minSnapshotHistoryWindowInSeconds=0"),
)


class Blows:
    """run_command: `python -m relay …` to its end."""

    def __init__(
        self,
        world: OutboxWorld,
        relays: Relays,
        mongo: MongoServer,
        rabbit: RabbitServer,
        run_command: Callable[..., OurProcess],
    ) -> None:
        self._world = world
        self._relays = relays
        self._mongo = mongo
        self._rabbit = rabbit
        self._run_command = run_command

    def strike(self, strike: Strike) -> None:
        """Wait for the moment, and strike."""
        goal = settled(self._world) + strike.after_events
        # a relay that is held up has its own moments
        with suppress(AssertionError):
            wait_until(
                lambda: settled(self._world) >= goal,
                "it is the moment",
                deadline_seconds=MOMENT_DEADLINE_SECONDS,
            )
        self._execute(strike.blow, strike.hold_seconds)
        self._relays.fill_up()

    def _execute(self, blow: Blow, hold_seconds: float) -> None:
        relays = self._relays
        execute: dict[Blow, Callable[[], object]] = {
            Blow.KILL_LEADER: lambda: relays.kill(relays.leader()),
            Blow.KILL_STANDBY: lambda: relays.kill(relays.standby()),
            Blow.KILL_ALL: relays.kill_all,
            Blow.STOP_LEADER: lambda: relays.stop(relays.leader()),
            Blow.FREEZE_LEADER: lambda: self._freeze_until_another_leads(hold_seconds),
            Blow.FREEZE_LEADER_BRIEFLY: lambda: self._freeze(hold_seconds),
            Blow.RESTART_BROKER: self._rabbit.restart,
            Blow.KILL_BROKER: self._kill_broker,
            Blow.STEP_DOWN: self._step_down,
            Blow.ROLL_OPLOG_UNDER_FROZEN: self._roll_oplog_under_frozen,
            Blow.ROLL_OPLOG_UNDER_DEAD: self._roll_oplog_under_dead,
            Blow.RESET_POSITION: self._reset_position,
            Blow.RESET_POSITION_UNDER_DEAD: self._reset_position_under_dead,
        }
        execute[blow]()

    def _freeze(self, hold_seconds: float) -> None:
        self._relays.freeze(self._relays.leader())
        time.sleep(hold_seconds)
        self._relays.thaw()

    def _freeze_until_another_leads(self, hold_seconds: float) -> None:
        self._relays.freeze(self._relays.leader())
        self._relays.leader()
        time.sleep(hold_seconds)
        self._relays.thaw()

    def _kill_broker(self) -> None:
        self._rabbit.kill()
        self._rabbit.start()

    def _reset_position(self) -> None:
        self._run_command("relay", "position", "reset", "--why", "a campaign")

    def _reset_position_under_dead(self) -> None:
        self._relays.kill_all()
        self._reset_position()

    def _roll_oplog_under_frozen(self) -> None:
        self._relays.freeze_all()
        roll_oplog(self._world)
        self._relays.thaw()

    def _roll_oplog_under_dead(self) -> None:
        self._relays.kill_all()
        roll_oplog(self._world)

    def _step_down(self) -> None:
        """Have the primary step down in favour of a node that has caught up."""
        former = self._primary()

        def another_leads() -> bool:
            with suppress(PyMongoError):  # it cuts its own connection; or no secondary is ready
                self._world.client.admin.command(
                    {"replSetStepDown": 5, "secondaryCatchUpPeriodSecs": 2}
                )
            return self._primary() not in {None, former}

        wait_until(another_leads, "it steps down", deadline_seconds=SERVER_DEADLINE_SECONDS)

    def _primary(self) -> Any:
        with suppress(PyMongoError):
            return self._world.client.admin.command("hello")["me"]
        return None


def roll_oplog(world: OutboxWorld) -> None:
    """Write until the saved position has fallen out of the oplog."""
    place = world.checkpoint()["position"]["cluster_time"]
    junk = world.database[JUNK]
    oplog: Any = world.client["local"]["oplog.rs"]

    def rolled() -> bool:
        with suppress(PyMongoError):
            junk.insert_many([{"junk": b"x" * JUNK_BYTES} for _ in range(4)])
            oldest = oplog.find_one(sort=[("$natural", 1)])
            return bool(oldest["ts"] > place)
        return False

    wait_until(rolled, "the oplog has rolled", deadline_seconds=SERVER_DEADLINE_SECONDS)
    junk.drop()

"""Carries out what the plan says, on real processes and real servers."""

import shutil
import time
from collections.abc import Callable
from typing import Any

from pymongo import MongoClient

from consumers.topology import deliveries_queue
from sandbox.mongodb import MongoServer
from sandbox.rabbitmq import LocalRabbit, RabbitServer
from sandbox.waiting import wait_until
from tests.chaos.delivery.plan import WORKERS, Blow
from tests.chaos.delivery.processes import (
    DEAD_LETTERS,
    DEADLINE_SECONDS,
    RECONCILER,
    RELAY,
    DeliveryProcesses,
)

WAITING_COUNT = 5
FREEZE_SECONDS = 6.0
VHOST = "/"


def end_transactions_soon(client: MongoClient[dict[str, Any]]) -> None:
    """What a killed process was writing is locked for two seconds, until MongoDB is restarted."""
    client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": 2})


class Blows:
    """client: of `mongo`."""

    def __init__(
        self,
        processes: DeliveryProcesses,
        mongo: MongoServer,
        rabbit: RabbitServer,
        client: MongoClient[dict[str, Any]],
    ) -> None:
        self._client = client
        self._processes = processes
        self._mongo = mongo
        self._rabbit = rabbit

    def execute(self, blow: Blow) -> None:
        processes = self._processes
        steps: dict[Blow, Callable[[], object]] = {
            Blow.RESTART_BROKER: self._rabbit.restart,
            Blow.KILL_BROKER: self._kill_broker,
            Blow.WIPE_BROKER: self._wipe_broker,
            Blow.RESTART_MONGODB: self._restart_mongodb,
            Blow.KILL_MONGODB: self._kill_mongodb,
            Blow.KILL_RELAY: lambda: processes.kill(RELAY),
            Blow.KILL_RECONCILER: lambda: processes.kill(RECONCILER),
            Blow.KILL_DEAD_LETTERS: lambda: processes.kill(DEAD_LETTERS),
            Blow.STOP_WORKERS: self._stop_workers,
            Blow.FREEZE_WORKERS: self._freeze_workers,
        }
        steps[blow]()

    def _kill_broker(self) -> None:
        self._rabbit.kill()
        self._rabbit.start()

    def _wipe_broker(self) -> None:
        """While requests wait; then what an operator does after it."""
        assert isinstance(self._rabbit, LocalRabbit)
        self._processes.stop_workers()
        for name in WORKERS:
            self._wait_waiting(name)
        self._rabbit.kill()
        shutil.rmtree(self._rabbit.folder / "data")
        self._rabbit.start()
        self._processes.run_command("consumers", "topology")
        self._processes.start_workers()
        resend = ("consumers", "resend", "--rate", "1000")
        self._processes.run_command(*resend, "--why", "the broker's disk was wiped")

    def _wait_waiting(self, destination: str) -> None:
        queue = deliveries_queue(destination)
        wait_until(
            lambda: self._rabbit.queue_depth(VHOST, queue) >= WAITING_COUNT,
            f"{WAITING_COUNT} hints wait for {destination}",
            deadline_seconds=DEADLINE_SECONDS,
        )

    def _restart_mongodb(self) -> None:
        self._mongo.stop()
        self._start_mongodb()

    def _kill_mongodb(self) -> None:
        self._mongo.kill()
        self._start_mongodb()

    def _start_mongodb(self) -> None:
        self._mongo.start()
        end_transactions_soon(self._client)

    def _stop_workers(self) -> None:
        self._processes.stop_workers()
        self._processes.start_workers()

    def _freeze_workers(self) -> None:
        for worker in self._processes.workers.values():
            worker.freeze()
        time.sleep(FREEZE_SECONDS)
        for worker in self._processes.workers.values():
            worker.thaw()

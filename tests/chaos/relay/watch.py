"""Looks at the position all the time: (epoch, settled) never goes back."""

import threading
from types import TracebackType
from typing import Self

from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern

from relay.checkpoint import CHECKPOINTS
from tests.support.outbox_world import OutboxWorld

LOOK_SECONDS = 0.02


class Watch:
    def __init__(self, world: OutboxWorld) -> None:
        self._world = world
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._highest: tuple[int, int] = (0, 0)
        self._faults: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> list[str]:
        faults, self._faults = self._faults, []
        return faults

    def _look(self) -> None:
        checkpoints = self._world.database.get_collection(
            CHECKPOINTS, read_concern=ReadConcern("majority")
        )
        # causally consistent: a new primary must not show an older moment than its forerunner did
        with self._world.client.start_session(causal_consistency=True) as session:
            while not self._over.wait(LOOK_SECONDS):
                try:
                    seen = checkpoints.find_one({}, session=session)
                except PyMongoError:
                    continue
                if seen is None:
                    continue
                place = (seen["epoch"], seen["settled"])
                if place < self._highest or place[1] < self._highest[1]:
                    self._faults.append(f"the position went back from {self._highest} to {place}")
                self._highest = max(place, self._highest)

"""
Our relay with a broker that costs nothing: every publish is confirmed at once, nothing is sent.

What remains is reading, settling, marking and saving: the ceiling of everything but RabbitMQ.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from relay.__main__ import commands
from runtime import rabbit

OnConfirm = Callable[[int, bool, bool], None]


class NullChannel(rabbit.AmqpChannel):
    """Confirms together what was published in one turn of the loop."""

    _published = 0
    _confirmed = 0
    _on_confirm: OnConfirm

    async def confirm_publishes(self, *, on_confirm: OnConfirm, **_: Any) -> None:
        self._on_confirm = on_confirm

    def publish(self, **_: Any) -> None:
        if self._published == self._confirmed:
            asyncio.get_running_loop().call_soon(self._confirm)
        self._published += 1

    def _confirm(self) -> None:
        self._confirmed = self._published
        self._on_confirm(self._published, True, True)


if __name__ == "__main__":
    # the relay knows nothing of this: the channels of this process are made of another class
    rabbit.AmqpChannel = NullChannel  # type: ignore[misc]
    commands(["run"])

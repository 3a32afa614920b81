"""The three third parties together."""

import asyncio

from sandbox.third_parties.answering import Desk
from sandbox.third_parties.inbox import Inbox, Kind
from sandbox.third_parties.listener import LOOPBACK, Listener, http_listener
from sandbox.third_parties.mailbox import smtp_listener
from sandbox.third_parties.misbehaviour import Misbehaviour, Misbehaviours
from sandbox.third_parties.slack import slack_app
from sandbox.third_parties.webhooks import webhook_app

LAST_WORDS_SECONDS = 0.5


class ThirdParties:
    """
    Each party has a port of its own, so that one can refuse while the others go on.

    Port 0 chooses a free one. Raises OSError where a port is taken.
    """

    def __init__(
        self, *, slack_port: int, webhook_port: int, smtp_port: int, host: str = LOOPBACK
    ) -> None:
        self.inbox = Inbox()
        self.misbehaviours = Misbehaviours()
        desk = Desk(self.inbox, self.misbehaviours)
        self._parties: dict[Kind, Listener] = {
            "slack": http_listener(slack_port, slack_app(desk), host=host),
            "webhook": http_listener(webhook_port, webhook_app(desk), host=host),
            "email": smtp_listener(smtp_port, self.inbox, self.misbehaviours, host=host),
        }

    @property
    def addresses(self) -> dict[str, str]:
        slack, webhook, email = (
            f"{LOOPBACK}:{self._parties[kind].port}" for kind in ("slack", "webhook", "email")
        )
        return {
            "slack": f"http://{slack}/services/T000/B000/sandbox",
            "slack_api": f"http://{slack}/api/chat.postMessage",
            "webhooks": f"http://{webhook}/webhooks/",
            "smtp": email,
        }

    async def open(self) -> None:
        await self._open_those_not_refusing()

    async def misbehave(self, misbehaviour: Misbehaviour) -> None:
        """Return once it is in effect: a port that is to refuse refuses by then."""
        self.misbehaviours.begin(misbehaviour)
        await self._open_those_not_refusing()

    async def behave(self) -> None:
        self.misbehaviours.end()
        await self._open_those_not_refusing()

    async def close(self) -> None:
        """Release whom a misbehaviour holds first: a hanging call must not delay the end."""
        self.misbehaviours.end()
        for listener in self._parties.values():
            listener.give_up_port()
        conversations = asyncio.all_tasks() - {asyncio.current_task()}
        if conversations:
            await asyncio.wait(conversations, timeout=LAST_WORDS_SECONDS)

    async def _open_those_not_refusing(self) -> None:
        refusing = self.misbehaviours.refusing()
        for kind, listener in self._parties.items():
            if kind in refusing:
                listener.close()
            else:
                await listener.open()

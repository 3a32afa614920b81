"""
How a third party misbehaves: one way at a time for each kind, until `/behave` is called.

status            answers with `code` (and `retry_after`, `body`); the message is not kept
ok_false          Slack only: 200 with {"ok": false, "error": ...}; not kept
hang              takes the call and never answers, until released or the caller leaves; not kept
slow              keeps the message at once and answers after `delay_seconds`
reset             resets the connection instead of answering; not kept
refuse            the port does not listen; connections that were open are reset
accept_then_fail  keeps the message, then resets the connection: the answer is lost

For e-mail, `stage` names the moment: `connect` (the greeting), `MAIL`, `RCPT`, or `DATA`
(the default: the whole message was read and its final reply is due).
"""

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from sandbox.third_parties.inbox import KINDS, Kind

Mode = Literal["status", "ok_false", "hang", "slow", "reset", "refuse", "accept_then_fail"]
Stage = Literal["connect", "MAIL", "RCPT", "DATA"]
OneLine = Annotated[str, Field(pattern=r"^[\x20-\x7e]*$", max_length=400)]

_SLACK: dict[str, set[str]] = {
    "status": {"code", "retry_after", "body"},
    "ok_false": {"error"},
    "hang": set(),
    "slow": {"delay_seconds"},
    "reset": set(),
    "refuse": set(),
    "accept_then_fail": set(),
}
_WEBHOOK = {mode: options for mode, options in _SLACK.items() if mode != "ok_false"}
_EMAIL: dict[str, set[str]] = {
    "status": {"code", "body", "stage"},
    "hang": {"stage"},
    "slow": {"delay_seconds", "stage"},
    "reset": {"stage"},
    "refuse": set(),
    "accept_then_fail": set(),
}
OPTIONS: dict[Kind, dict[str, set[str]]] = {"slack": _SLACK, "webhook": _WEBHOOK, "email": _EMAIL}
REQUIRED = {"status": "code", "slow": "delay_seconds"}
LOWEST_SMTP_REFUSAL = 400


class Misbehaviour(BaseModel):
    """
    What to do to the next calls of one kind.

    `times` counts calls; without it the misbehaviour lasts until another one or `behave`.
    `retry_after` is sent as it stands: seconds, an HTTP date, or nonsense.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    mode: Mode
    times: PositiveInt | None = None
    code: Annotated[int, Field(ge=300, le=599)] | None = None
    retry_after: Annotated[int, Field(ge=0)] | OneLine | None = None
    body: OneLine | None = None
    error: OneLine = "internal_error"
    delay_seconds: Annotated[float, Field(gt=0, le=600)] | None = None
    stage: Stage = "DATA"

    @model_validator(mode="after")
    def _options_fit_kind_and_mode(self) -> Self:
        options = OPTIONS[self.kind].get(self.mode)
        if options is None:
            raise ValueError(
                f"{self.kind} knows no mode {self.mode}; it knows {', '.join(OPTIONS[self.kind])}"
            )
        if stray := self.model_fields_set - {"kind", "mode", "times"} - options:
            raise ValueError(
                f"{self.kind} {self.mode} takes no {', '.join(sorted(stray))}; "
                f"it takes {', '.join(sorted({'times', *options}))}"
            )
        if (required := REQUIRED.get(self.mode)) and getattr(self, required) is None:
            raise ValueError(f"{self.mode} needs {required}")
        if self.kind == "email" and self.code is not None and self.code < LOWEST_SMTP_REFUSAL:
            raise ValueError("code of an SMTP refusal is 400 to 599")
        if self.mode == "refuse" and self.times is not None:
            raise ValueError(
                "refuse takes no times: a refused connection never arrives to be counted; "
                "end it with POST /behave"
            )
        return self


@dataclass
class _Active:
    misbehaviour: Misbehaviour
    used: int = 0

    @property
    def used_up(self) -> bool:
        return self.used == self.misbehaviour.times

    def as_json(self) -> dict[str, Any]:
        return {
            **self.misbehaviour.model_dump(exclude_unset=True),
            "used": self.used,
        }


class Misbehaviours:
    """What is to go wrong now, and who waits for it to end."""

    def __init__(self) -> None:
        self._active: dict[Kind, _Active] = {}
        self._released: dict[Kind, asyncio.Event] = {kind: asyncio.Event() for kind in KINDS}

    def begin(self, misbehaviour: Misbehaviour) -> None:
        """Take the place of what was active for this kind, and release whom it holds."""
        self._release(misbehaviour.kind)
        self._active[misbehaviour.kind] = _Active(misbehaviour)

    def end(self) -> None:
        self._active.clear()
        for kind in KINDS:
            self._release(kind)

    def take(self, kind: Kind, stage: Stage = "DATA") -> Misbehaviour | None:
        """What this call meets, if anything; counts it against `times`."""
        active = self._active.get(kind)
        # A refused port is the listener's affair: a call that slipped in before is a good one.
        if active is None or active.misbehaviour.mode == "refuse":
            return None
        if active.misbehaviour.stage != stage:
            return None
        active.used += 1
        if active.used_up:
            del self._active[kind]
        return active.misbehaviour

    async def released(self, kind: Kind) -> None:
        """Wait until what is active for this kind now has been ended or replaced."""
        await self._released[kind].wait()

    async def rest(self, misbehaviour: Misbehaviour) -> None:
        """Wait `delay_seconds`, or until released."""
        try:
            async with asyncio.timeout(misbehaviour.delay_seconds):
                await self.released(misbehaviour.kind)
        except TimeoutError:
            return

    def active(self) -> list[dict[str, Any]]:
        return [active.as_json() for active in self._active.values()]

    def refusing(self) -> set[Kind]:
        return {
            kind for kind, active in self._active.items() if active.misbehaviour.mode == "refuse"
        }

    def _release(self, kind: Kind) -> None:
        self._released[kind].set()
        self._released[kind] = asyncio.Event()

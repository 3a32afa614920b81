"""
`python -m tests.chaos.delivery.mortal FOLDER FAULT run slack`: a worker that dies when ordered.

It goes through `receive -> claim -> call -> record -> acknowledge` as it always does, and kills
itself with SIGKILL at a named point; the parent starts the next life, as an init system would.
What a life was at is noted before it ends, so that the campaign knows and need not guess.

    FOLDER/orders     where to die, a line each, written by the campaign
    FOLDER/arrivals   the event id of each message that was received
    FOLDER/deaths     what was in hand, a line for each order that was carried out

FAULT is `none`, or a deliberate fault that the campaign must find, or it is blind.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import consumers.delivery.ledger
from assistance.verdict import Done, Verdict
from consumers.__main__ import commands
from consumers.channels import OutboundMessage
from consumers.delivery.worker import Worker
from runtime.mongo import Client, Session
from runtime.rabbit import AmqpChannel, AmqpMessage
from tests.chaos.delivery.plan import Order, Point

ORDERS, ARRIVALS, DEATHS = "orders", "arrivals", "deaths"

#: A message to the broker is on its way by then.
FLUSHED_SECONDS = 0.05

Result = TypeVar("Result")


class Life:
    """From the start of a process to the point at which it was ordered to die."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._orders_done = len(_lines(folder / DEATHS))
        self._order: Order | None = None
        self._visits = 0
        self._in_hand: set[str] = set()
        self._calling: set[str] = set()

    def receives(self, event_id: str) -> None:
        self._in_hand.add(event_id)
        _append(self._folder / ARRIVALS, event_id)

    def has_acknowledged(self, event_id: str) -> None:
        self._in_hand.discard(event_id)

    def begins_call(self, request_id: str) -> None:
        self._calling.add(request_id)

    def has_recorded(self, request_id: str) -> None:
        self._calling.discard(request_id)

    def comes_to(self, point: Point, request_id: str = "") -> None:
        if self.dies_at(point, request_id):
            self.die(request_id)

    def dies_at(self, point: Point, request_id: str = "") -> Order | None:
        """The order, if this is when it is to be carried out. Counts the visit."""
        order = self._next_order()
        if order is None or order.point is not point or order.request_id not in {"", request_id}:
            return None
        self._visits += 1
        return order if self._visits >= order.nth else None

    def die(self, request_id: str) -> NoReturn:
        assert self._order is not None
        death = {
            "point": self._order.point,
            "request_id": request_id,
            "in_hand": sorted(self._in_hand),
            "calling": sorted(self._calling),
        }
        _append(self._folder / DEATHS, json.dumps(death))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def _next_order(self) -> Order | None:
        if self._order is None:
            orders = _lines(self._folder / ORDERS)[self._orders_done :]
            self._order = read_order(orders[0]) if orders else None
        return self._order


def read_order(line: str) -> Order:
    fields = json.loads(line)
    return Order(**{**fields, "point": Point(fields["point"])})


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _append(file: Path, line: str) -> None:
    with file.open("a") as opened:
        opened.write(f"{line}\n")


def make_mortal(life: Life) -> None:
    """Between each two steps of a worker, look whether it is to die there."""
    patched: Any = Worker
    handle, claim, call = patched.handle, patched._claim, patched._call
    send, record = patched._send, patched._record
    ledger: Any = consumers.delivery.ledger
    in_transaction = ledger.in_transaction
    recording: ContextVar[str] = ContextVar("recording", default="")

    async def handling(self: Worker, message: AmqpMessage, channel: AmqpChannel) -> None:
        event_id = str(message.message_id)
        life.receives(event_id)
        await handle(self, message, channel)
        life.has_acknowledged(event_id)
        life.comes_to(Point.ACKNOWLEDGED)

    async def claiming(self: Worker, hint: Any, *more: Any) -> Any:
        life.comes_to(Point.RECEIVED, hint.request_id)
        return await claim(self, hint, *more)

    async def calling(self: Worker, claimed: Any, *more: Any) -> Any:
        life.comes_to(Point.CLAIMED, claimed.request_id)
        return await call(self, claimed, *more)

    async def sending(self: Worker, message: OutboundMessage) -> Verdict:
        life.begins_call(message.request_id)
        if order := life.dies_at(Point.CALLING, message.request_id):
            sent = asyncio.create_task(send(self, message))
            await asyncio.wait([sent], timeout=order.wait_seconds)
            life.die(message.request_id)
        verdict: Verdict = await send(self, message)
        return verdict

    async def recording_outcome(self: Worker, claimed: Any, *more: Any) -> None:
        life.comes_to(Point.CALLED, claimed.request_id)
        recording.set(claimed.request_id)
        await record(self, claimed, *more)
        life.has_recorded(claimed.request_id)
        life.comes_to(Point.RECORDED, claimed.request_id)

    async def in_mortal_transaction(
        client: Client, write: Callable[[Session], Awaitable[Result]]
    ) -> Result:
        async def writing(session: Session) -> Result:
            result = await write(session)
            life.comes_to(Point.RECORDING, recording.get())
            return result

        written: Result = await in_transaction(client, writing)
        return written

    patched.handle, patched._claim, patched._call = handling, claiming, calling
    patched._send, patched._record = sending, recording_outcome
    ledger.in_transaction = in_mortal_transaction


class _AcknowledgedBefore:
    """The channel, for one who has acknowledged already."""

    def __init__(self, channel: AmqpChannel) -> None:
        self._channel = channel

    def ack(self, message: AmqpMessage) -> None:
        """It was done before."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


def acknowledge_before_record() -> None:
    """The message is acknowledged as soon as the call is made."""
    patched: Any = Worker
    handle, record = Worker.handle, patched._record
    in_hand: ContextVar[tuple[AmqpMessage, AmqpChannel]] = ContextVar("in_hand")

    async def handling(self: Worker, message: AmqpMessage, channel: AmqpChannel) -> None:
        in_hand.set((message, channel))
        acknowledged: Any = _AcknowledgedBefore(channel)
        await handle(self, message, acknowledged)

    async def recording(self: Worker, *arguments: Any) -> None:
        message, channel = in_hand.get()
        channel.ack(message)
        await asyncio.sleep(FLUSHED_SECONDS)
        await record(self, *arguments)

    patched.handle, patched._record = handling, recording


def record_before_call() -> None:
    """What is about to be done is written as done."""
    patched: Any = Worker
    call = patched._call

    async def calling(self: Worker, claimed: Any, *more: Any) -> Any:
        await self._ledger.record(claimed, Done("200"), 1)
        return await call(self, claimed, *more)

    patched._call = calling


def new_key_each_time() -> None:
    """The third party cannot tell a repeat from another request."""
    patched: Any = Worker
    send = patched._send

    async def sending(self: Worker, message: OutboundMessage) -> Verdict:
        verdict: Verdict = await send(self, replace(message, idempotency_key=str(uuid4())))
        return verdict

    patched._send = sending


def no_fault() -> None:
    pass


FAULTS: dict[str, Callable[[], None]] = {
    "none": no_fault,
    "acknowledge-before-record": acknowledge_before_record,
    "record-before-call": record_before_call,
    "new-key-each-time": new_key_each_time,
}


def live_again_and_again(live: Callable[[], object]) -> NoReturn:
    """One child after the other, until one ends otherwise than by SIGKILL, or a stop is asked."""
    child, stopping = 0, False

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        os.kill(child, signal.SIGTERM)

    while True:
        # a SIGTERM between fork and handler would not reach the child: it is delivered afterwards
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        signal.signal(signal.SIGTERM, pass_on)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        if child == 0:
            live()
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        # it may die before it can be asked
        if stopping and code in {-signal.SIGKILL, -signal.SIGTERM}:
            sys.exit(0)
        if code != -signal.SIGKILL:
            sys.exit(code)


def live() -> None:
    folder, fault = Path(sys.argv.pop(1)), sys.argv.pop(1)
    make_mortal(Life(folder))
    FAULTS[fault]()
    commands()


if __name__ == "__main__":
    live_again_and_again(live)

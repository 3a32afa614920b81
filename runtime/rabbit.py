"""
RabbitMQ over asyncio; the only file that imports pika.

    BrokerError
    ├── BrokerGone       the connection is lost or cannot be made; try again later
    ├── BrokerRefused    wrong user, password, virtual host or permission; says how to fix it
    ├── Unpublishable    this message can never be encoded as AMQP
    └── ChannelClosed    the broker closed the channel, with AMQP's reply code and text
        └── ResourceLocked   405: another connection holds the exclusive queue

A connection belongs to the event loop it was made in. Callbacks from pika run inside its reader,
where an exception would close the connection: they only set a result, append or wake.
"""

import asyncio
import random
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pika
from loguru import logger
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.exceptions import (
    AMQPConnectionError,
    AMQPError,
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from runtime.content_frames import encode_message
from runtime.content_headers import read_properties
from runtime.exit_codes import ExitCode
from runtime.settings import split_amqp_urls

#: RabbitMQ 3.10 never answers a `basic.consume` sent within half a second of its start, while a
#: quorum queue has no leader yet. Heartbeats continue meanwhile, so only a deadline detects it.
ANSWER_DEADLINE_SECONDS = 10.0

#: How long one address may take until a connection is open, before the next one is tried.
ATTEMPT_SECONDS = 3.0

#: How long what was sent may stay without TCP's acknowledgement, in milliseconds.
UNACKNOWLEDGED_MS = 15_000

#: How long the broker may take to agree to the end of a connection or channel.
CLOSE_SECONDS = 1.0

#: A frame's type, channel and length; a content header's class, weight and body length.
FRAME_HEAD = struct.Struct(">BHI")
HEADER_HEAD = struct.Struct(">HHQ")

#: How long a message may stay unacknowledged; stated, so that no broker's configuration decides it.
#: From 4.3 on, the broker then cancels the consumer; older ones ignore this, and close the channel
#: after a time of their own, 30 minutes by default.
CONSUMER_TIMEOUT_SECONDS = 1800.0

ACCESS_REFUSED = 403
NOT_FOUND = 404
RESOURCE_LOCKED = 405
PRECONDITION_FAILED = 406
NOT_ALLOWED = 530

#: Reply codes of a closed connection that a single message may cause: frame, syntax, command and
#: channel errors, and an error inside the broker.
#: https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf, section 1.2
CONNECTION_CODES = frozenset({501, 502, 503, 504, 505, 540, 541})

#: An operator closed the connection, or the broker stops.
CONNECTION_FORCED = 320

#: In the broker's text for NOT_ALLOWED when a user or virtual host has reached its limit.
CONNECTION_LIMIT = "connection limit"


class BrokerError(Exception):
    """The root of the errors defined here."""


class BrokerGone(BrokerError):
    """The connection is lost or cannot be made."""


class BrokerRefused(BrokerError):
    """The broker refuses the credentials or permissions; retrying alone does not help."""


class Unpublishable(BrokerError):
    """AMQP cannot carry this message; nothing was sent, and the channel stays open."""


class ChannelClosed(BrokerError):
    """code: AMQP's reply code; text: the broker's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code, self.text = code, text


class ResourceLocked(ChannelClosed):
    """Another connection holds this exclusive queue."""


def exit_code_of(error: BrokerError) -> ExitCode:
    """How a process ends that this error ends."""
    if isinstance(error, BrokerGone):
        return ExitCode.UNAVAILABLE
    closed = error if isinstance(error, ChannelClosed) else error.__cause__
    if isinstance(closed, ChannelClosed):
        return ExitCode.PERMISSION if closed.code == ACCESS_REFUSED else ExitCode.CONFIGURATION
    return ExitCode.PERMISSION if isinstance(error, BrokerRefused) else ExitCode.INTERNAL_ERROR


@dataclass(frozen=True, slots=True)
class AmqpMessage:
    """
    A message as a consumer gets it.

    delivery_tag: valid on the channel it came from.
    undecodable: why its properties cannot be decoded; then the headers hold only what is text.
    """

    delivery_tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    message_id: str | None
    headers: Mapping[str, Any]
    body: bytes
    undecodable: str | None = None


class _JoiningConnection(AsyncioConnection):  # type: ignore[misc]  # pika publishes no types
    """
    Joins all frames sent in one iteration of the event loop into one write. pika itself makes a
    system call for each of a message's three frames, which costs a third of the client's time.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._unwritten: list[bytes] = []
        super().__init__(*arguments, **options)

    def send_frames(self, frames: bytes) -> None:
        self._adapter_emit_data(frames)

    def _adapter_emit_data(self, data: bytes) -> None:
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self._write_joined)
        self._unwritten.append(data)

    def _write_joined(self) -> None:
        joined, self._unwritten = b"".join(self._unwritten), []
        if self._transport is not None:
            self._transport.write(joined)

    def _read_frame(self) -> Any:
        try:
            return super()._read_frame()
        except Exception as error:  # noqa: BLE001 - pika raises what its decoding happens to raise
            return _read_undecodable_header(self._frame_buffer, error)

    def abort(self) -> None:
        """Close the socket without a word; what is not sent yet is dropped."""
        if self._transport is not None:
            self._transport.abort()


def _read_undecodable_header(frames: bytes, error: Exception) -> Any:
    """A content header whose properties pika cannot decode; raises the error for anything else."""
    kind, channel_number, size = FRAME_HEAD.unpack_from(frames)
    if kind != pika.spec.FRAME_HEADER:
        raise error
    payload = frames[FRAME_HEAD.size : FRAME_HEAD.size + size]
    _class, _weight, body_size = HEADER_HEAD.unpack_from(payload)
    found = read_properties(payload[HEADER_HEAD.size :])
    properties = pika.BasicProperties(headers=found.headers, message_id=found.message_id)
    properties.undecodable = f"its properties cannot be decoded ({type(error).__name__}: {error})"
    header = pika.frame.Header(channel_number, body_size, properties)
    return FRAME_HEAD.size + size + pika.spec.FRAME_END_SIZE, header


class Connection:
    """
    One connection to the broker.

    closed: done as soon as the connection is lost; its result is the reason.
    close_code: AMQP's reply code when the broker closed it; None while it is open, or was lost.
    blocked: true while the broker blocks publishing because of a memory or disk alarm.
    """

    def __init__(self, raw: _JoiningConnection) -> None:
        self._raw = raw
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.close_code: int | None = None
        self.blocked = False
        raw.add_on_close_callback(self._on_close)
        raw.add_on_connection_blocked_callback(self._on_blocked)
        raw.add_on_connection_unblocked_callback(self._on_unblocked)

    async def open_channel(self) -> "AmqpChannel":
        """Raises BrokerGone."""
        if self.closed.done():
            raise BrokerGone(self.closed.result())
        opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            self._raw.channel(on_open_callback=lambda channel: _resolve(opened, channel))
        except AMQPError as error:
            raise BrokerGone(_words(error)) from error
        await _first_of(opened, self.closed, timeout_seconds=ANSWER_DEADLINE_SECONDS)
        if opened.done():
            return AmqpChannel(opened.result(), self)
        raise self.gone()

    async def close(self) -> None:
        """Close; unacknowledged messages are requeued and exclusive queues deleted."""
        if self._raw.is_open:
            self._raw.close()
        await _first_of(self.closed, timeout_seconds=CLOSE_SECONDS)
        if not self.closed.done():
            # the broker would keep what belongs to this connection, such as the relay's lock
            self._raw.abort()

    def gone(self) -> BrokerGone:
        """The error to raise when an answer did not come."""
        if self.closed.done():
            return BrokerGone(self.closed.result())
        return BrokerGone(f"no answer within {ANSWER_DEADLINE_SECONDS:g} s")

    @property
    def frame_limit_bytes(self) -> int:
        """The frame size negotiated with the broker."""
        limit: int = self._raw.params.frame_max
        return limit

    def send(self, frames: bytes) -> None:
        """Send complete frames of an open channel, in order with those that pika sends."""
        self._raw.send_frames(frames)

    def _on_blocked(self, _connection: Any, frame: Any) -> None:
        self.blocked = True
        logger.warning("broker.blocked", reason=frame.method.reason)

    def _on_unblocked(self, *_: Any) -> None:
        self.blocked = False
        logger.info("broker.unblocked")

    def _on_close(self, _connection: Any, reason: BaseException) -> None:
        if isinstance(reason, ConnectionClosedByBroker):
            self.close_code = reason.reply_code
        _resolve(self.closed, _words(reason))


class AmqpChannel:
    """
    One channel. `closed` is done once it is closed; its result is the error that says why.

    All methods raise ChannelClosed, or BrokerGone if the connection was lost.
    """

    def __init__(self, raw: Any, connection: Connection) -> None:
        self._raw = raw
        self._connection = connection
        self.closed: asyncio.Future[BrokerError] = asyncio.get_running_loop().create_future()
        self._prefetch = 0
        raw.add_on_close_callback(self._on_close)

    async def declare_exchange(self, name: str, kind: str) -> None:
        await self._ask(self._raw.exchange_declare, exchange=name, exchange_type=kind, durable=True)

    async def declare_queue(self, name: str, arguments: Mapping[str, Any]) -> None:
        """A durable queue; the same name with other arguments closes the channel (406)."""
        await self._ask(
            self._raw.queue_declare, queue=name, durable=True, arguments=dict(arguments)
        )

    async def lock_queue(self, name: str) -> None:
        """Declare an exclusive queue, which only this connection can use and which ends with it."""
        await self._ask(self._raw.queue_declare, queue=name, exclusive=True, auto_delete=True)

    async def delete_queue(self, name: str) -> None:
        await self._ask(self._raw.queue_delete, queue=name)

    async def bind_queue(self, name: str, exchange: str, routing_key: str) -> None:
        await self._ask(
            self._raw.queue_bind, queue=name, exchange=exchange, routing_key=routing_key
        )

    async def confirm_publishes(
        self,
        *,
        on_confirm: Callable[[int, bool, bool], None],
        on_return: Callable[[str, str, str], None],
    ) -> None:
        """
        Enable publisher confirms: https://www.rabbitmq.com/docs/confirms

        on_confirm(delivery_tag, multiple, accepted): tags count from one, in order of publishing;
        `multiple` covers every open tag up to this one; confirms come in any order.
        on_return(message_id, routing_key, reason): the message reached no queue; its own confirm
        follows. A return has no delivery tag.
        """

        def confirmed(frame: Any) -> None:
            method = frame.method
            on_confirm(method.delivery_tag, method.multiple, method.NAME == "Basic.Ack")

        def returned(_channel: Any, method: Any, properties: Any, _body: bytes) -> None:
            reason = f"{method.reply_code} {method.reply_text}"
            on_return(properties.message_id, method.routing_key, reason)

        self._raw.add_on_return_callback(returned)
        await self._ask(self._raw.confirm_delivery, ack_nack_callback=confirmed)

    def publish(
        self,
        *,
        exchange: str,
        routing_key: str,
        body: bytes,
        message_id: str,
        type: str,
        content_type: str,
        headers: Mapping[str, str],
        timestamp: datetime | None,
        must_route: bool,
    ) -> None:
        """Send a persistent message; its confirm comes later. Raises BrokerGone, Unpublishable."""
        if not self._raw.is_open:
            raise BrokerGone("the channel is closed")
        try:
            frames = encode_message(
                self._raw.channel_number,
                self._connection.frame_limit_bytes,
                exchange=exchange,
                routing_key=routing_key,
                must_route=must_route,
                content_type=content_type,
                headers=headers,
                message_id=message_id,
                timestamp_seconds=None if timestamp is None else int(timestamp.timestamp()),
                type=type,
                body=body,
            )
        except (ValueError, OverflowError, struct.error) as error:
            raise Unpublishable(f"{error.__class__.__name__}: {error}") from error
        self._connection.send(frames)

    async def consume(
        self,
        queue: str,
        *,
        prefetch: int,
        on_message: Callable[[AmqpMessage], None],
    ) -> str:
        """
        Pass messages of the queue to `on_message`, up to `prefetch` unacknowledged at a time.

        Returns the consumer's tag, for `stop_consuming`.
        """

        def received(_channel: Any, method: Any, properties: Any, body: bytes) -> None:
            on_message(
                AmqpMessage(
                    delivery_tag=method.delivery_tag,
                    redelivered=method.redelivered,
                    exchange=method.exchange,
                    routing_key=method.routing_key,
                    message_id=properties.message_id,
                    headers=properties.headers or {},
                    body=body,
                    undecodable=getattr(properties, "undecodable", None),
                )
            )

        def cancelled(_frame: Any) -> None:
            reason = "was deleted, or a message was not acknowledged in time"
            _resolve(
                self.closed,
                ChannelClosed(NOT_FOUND, f"consumer cancelled: queue {queue} {reason}"),
            )

        self._raw.add_on_cancel_callback(cancelled)
        self._prefetch = prefetch
        await self._ask(self._raw.basic_qos, prefetch_count=prefetch)
        answer = await self._ask(
            self._raw.basic_consume,
            queue=queue,
            on_message_callback=received,
            arguments={"x-consumer-timeout": int(CONSUMER_TIMEOUT_SECONDS * 1000)},
        )
        tag: str = answer.method.consumer_tag
        return tag

    async def check_answers(self) -> None:
        """
        Ask the broker something that changes nothing: heartbeats, of eight bytes each, still pass a
        link that is too slow for anything else.
        """
        await self._ask(self._raw.basic_qos, prefetch_count=self._prefetch)

    async def stop_consuming(self, tag: str) -> None:
        """No message comes after this; unacknowledged ones stay with this consumer."""
        await self._ask(self._raw.basic_cancel, consumer_tag=tag)

    def requeue(self, message: AmqpMessage) -> None:
        """Requeue the message at the head of its queue; silent when the channel is closed."""
        if self._raw.is_open:
            self._raw.basic_nack(message.delivery_tag, requeue=True)

    def ack(self, message: AmqpMessage) -> None:
        """Acknowledge the message; silent when the channel is closed."""
        if self._raw.is_open:
            self._raw.basic_ack(message.delivery_tag)

    def dead_letter(self, message: AmqpMessage) -> None:
        """Reject the message: it goes to the dead-letter exchange of its queue."""
        if self._raw.is_open:
            self._raw.basic_reject(message.delivery_tag, requeue=False)

    async def close(self) -> None:
        """Close; unacknowledged messages are requeued."""
        if self._raw.is_open:
            self._raw.close()
            await _first_of(self.closed, self._connection.closed, timeout_seconds=CLOSE_SECONDS)

    async def _ask(self, method: Callable[..., Any], **arguments: Any) -> Any:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            method(callback=lambda frame: _resolve(answered, frame), **arguments)
        except AMQPError as error:
            raise BrokerGone(_words(error)) from error
        await _first_of(
            answered,
            self.closed,
            self._connection.closed,
            timeout_seconds=ANSWER_DEADLINE_SECONDS,
        )
        if answered.done():
            return answered.result()
        if self.closed.done():
            raise self.closed.result()
        raise self._connection.gone()

    def _on_close(self, _channel: Any, reason: BaseException) -> None:
        _resolve(self.closed, _channel_error(reason))


async def connect(urls: str, *, name: str, heartbeat_seconds: int) -> Connection:
    """
    Connect to the first node that answers. All addresses of all hosts are tried in random order;
    each has a few seconds, so that a frozen or unreachable one delays the others by no more.

    urls: one URL or several, as in RABBITMQ_URL.
    name: the connection name shown by the broker's management tools.
    heartbeat_seconds: a frozen peer is detected after two to three of these.

    Raises BrokerGone or BrokerRefused; neither message repeats a URL, which holds a password.
    """
    problems: list[BrokerError] = []
    for parameters in await _addresses(split_amqp_urls(urls), problems):
        parameters.heartbeat = heartbeat_seconds
        parameters.client_properties = {"connection_name": name}
        try:
            return await _connect_to(parameters)
        except BrokerError as problem:
            problems.append(problem)
    refusals = [problem for problem in problems if isinstance(problem, BrokerRefused)]
    raise (refusals or problems)[-1]


async def _addresses(
    urls: Sequence[str], problems: list[BrokerError]
) -> Sequence[pika.ConnectionParameters]:
    """One set of parameters per address; a host that has no address is noted as a problem."""
    found = []
    for url in urls:
        try:
            parameters = pika.URLParameters(url)
        except (ValueError, TypeError) as error:
            raise BrokerRefused("RABBITMQ_URL is not an AMQP URL: correct it") from error
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                answers = await asyncio.get_running_loop().getaddrinfo(
                    parameters.host, parameters.port, type=socket.SOCK_STREAM
                )
        except OSError as error:
            problems.append(BrokerGone(f"{parameters.host}: {_words(error)}"))
            continue
        for host in dict.fromkeys(answer[4][0] for answer in answers):
            one = pika.URLParameters(url)
            if one.ssl_options is not None and one.ssl_options.server_hostname is None:
                one.ssl_options.server_hostname = one.host  # what the certificate is for
            one.host = host
            found.append(one)
    random.shuffle(found)
    return found


async def _connect_to(parameters: pika.ConnectionParameters) -> Connection:
    parameters.connection_attempts = 1
    parameters.socket_timeout = parameters.stack_timeout = ATTEMPT_SECONDS
    parameters.tcp_options = {"TCP_USER_TIMEOUT": UNACKNOWLEDGED_MS}
    opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    raw = _JoiningConnection(
        parameters,
        # created in the callback, so that an immediate loss is noticed
        on_open_callback=lambda raw: _resolve(opened, Connection(raw)),
        on_open_error_callback=lambda _raw, error: _resolve(opened, error),
        custom_ioloop=asyncio.get_running_loop(),
    )
    await _first_of(opened, timeout_seconds=ATTEMPT_SECONDS + 1)
    if not opened.done():
        raw.abort()
        raise BrokerGone(f"no connection within {ATTEMPT_SECONDS:g} s")
    result = opened.result()
    if isinstance(result, BaseException):
        raise _connect_error(result)
    assert isinstance(result, Connection)
    return result


def _connect_error(error: BaseException) -> BrokerError:
    causes: list[BaseException] = [error]
    # pika wraps the error of each attempt in a workflow error
    causes += getattr(error, "exceptions", [])
    causes += [inner for cause in causes for inner in [getattr(cause, "exception", None)] if inner]
    for cause in causes:
        if isinstance(cause, ProbableAuthenticationError | ProbableAccessDeniedError) or (
            isinstance(cause, ConnectionClosedByBroker)
            and cause.reply_code in {ACCESS_REFUSED, NOT_ALLOWED}
        ):
            words = _words(cause)
            if CONNECTION_LIMIT in words:
                return BrokerGone(
                    f"RabbitMQ accepts no more connections ({words}): close unused ones, or raise"
                    " the limit of the user or virtual host"
                )
            return BrokerRefused(
                f"RabbitMQ refuses this user, password or virtual host ({words}): "
                "correct RABBITMQ_URL, or grant the user its permissions on the virtual host"
            )
    return BrokerGone(_words(causes[-1]))


def _channel_error(reason: BaseException) -> BrokerError:
    if isinstance(reason, ChannelClosedByBroker):
        kind = ResourceLocked if reason.reply_code == RESOURCE_LOCKED else ChannelClosed
        return kind(reason.reply_code, _reply_text(reason))
    return BrokerGone(_words(reason))


def _words(error: BaseException) -> str:
    if isinstance(error, ConnectionClosedByBroker | ChannelClosedByBroker):
        return f"{error.reply_code} {_reply_text(error)}"
    if isinstance(error, AMQPConnectionError) and not str(error):
        return type(error).__name__
    return str(error) or type(error).__name__


def _reply_text(error: ConnectionClosedByBroker | ChannelClosedByBroker) -> str:
    """The broker cuts its text at 255 bytes, perhaps inside a character: pika then keeps bytes."""
    text: str | bytes = error.reply_text
    return text if isinstance(text, str) else text.decode(errors="ignore")


async def _first_of(*futures: asyncio.Future[Any], timeout_seconds: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)

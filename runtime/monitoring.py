"""
What a process reports over HTTP: `/metrics`, `/livez`, `/readyz`.

    async with monitored(settings, "worker-slack") as monitor:
        failures = Counter("letters", "…", registry=monitor.registry)
        backlog = monitor.poll("the backlog", count_backlog, every_seconds=10)
        monitor.gauge("backlog", "…", lambda: backlog.value)
        monitor.ready_when(lambda: subscriber.problem)

It answers on the event loop of the process, so a loop that hangs does not answer and the probe
fails. An answer is read from memory; values from elsewhere are polled in the background.
"""

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

import prometheus_client
import pymongo
from loguru import logger
from prometheus_client import CollectorRegistry, Info, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime import clock
from runtime.http_server import HttpConfig, HttpServer
from runtime.settings import MONITORING_PORTS, MonitoringSettings

#: A poll that takes longer has failed; its value is unknown.
POLL_DEADLINE_SECONDS = 3.0

#: Probes and scrapers are few; the pages are open to every process that reaches them.
MAX_CONNECTIONS = 32
HEAD_SECONDS = 5.0

PAGES = ("/metrics", "/livez", "/readyz")

Found = TypeVar("Found")


class Latest(Generic[Found]):
    """value: the result of the last poll; None while unknown, as after a failed poll."""

    value: Found | None = None


class Monitor:
    """
    registry: for the counters and histograms of `prometheus_client`; never the global one.
    is_seen: whether the pages are served; if not, nothing is polled.
    """

    def __init__(self, process: str, *, is_seen: bool) -> None:
        self._is_seen = is_seen
        # creation times of counters are of no use and double the page
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        Info("process", "which process this is", registry=self.registry).info({"process": process})
        self._checks: list[Callable[[], str | None]] = []
        self.gauge(
            "clock_difference_seconds",
            "how far this machine's clock is ahead of MongoDB's, which decides",
            clock.difference_seconds,
        )
        self._polls: list[asyncio.Task[None]] = []

    def gauge(self, name: str, meaning: str, read: Callable[[], float | None]) -> None:
        """A number read at each scrape from memory; absent while it is None."""

        def samples() -> Mapping[str, float]:
            value = read()
            return {} if value is None else {"": value}

        self.registry.register(_Gauge(name, meaning, samples))

    def gauges(
        self,
        name: str,
        meaning: str,
        read: Callable[[], Mapping[str, float] | None],
        *,
        label: str,
    ) -> None:
        """The same for several numbers, one per value of a label such as `destination`."""
        self.registry.register(_Gauge(name, meaning, lambda: read() or {}, label))

    def poll(
        self,
        what: str,
        read: Callable[[], Awaitable[Found]],
        *,
        every_seconds: float,
        even_unseen: bool = False,
    ) -> Latest[Found]:
        """
        Call `read` in the background, again and again, `every_seconds` after the last answer.

        even_unseen: also in a process whose pages are not served.

        An error makes the value unknown, and is logged once while it stays the same.
        """
        latest = Latest[Found]()
        if self._is_seen or even_unseen:
            polling = _poll_forever(what, read, latest, every_seconds)
            self._polls.append(asyncio.create_task(polling))
        return latest

    def ready_when(self, why_not: Callable[[], str | None]) -> None:
        """Add a condition of readiness: None when it is met, else the reason."""
        self._checks.append(why_not)

    def why_not_ready(self) -> str | None:
        if not self._checks:
            return "it is starting"
        reasons = (check() for check in self._checks)
        return "; ".join(reason for reason in reasons if reason) or None

    async def end_polls(self) -> None:
        for poll in self._polls:
            poll.cancel()
        await asyncio.gather(*self._polls, return_exceptions=True)


@asynccontextmanager
async def monitored(settings: MonitoringSettings, process: str) -> AsyncIterator[Monitor]:
    """
    A monitor whose pages are served while the block runs.

    Without a free port the process runs unmonitored, with a warning: its work matters more.
    """
    listener = _bind(settings)
    monitor = Monitor(process, is_seen=listener is not None)
    if listener is None:
        serving = None
    else:
        server = _server(monitor)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        host, port, *_ = listener.getsockname()
        logger.info("monitoring.listening", address=host, port=port)
    try:
        yield monitor
    finally:
        await monitor.end_polls()
        if serving is not None:
            server.should_exit = True
            await serving


def _bind(settings: MonitoringSettings) -> socket.socket | None:
    host, first = settings.monitoring_host, settings.monitoring_port
    if first == 0:
        return None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reason = ""
    for port in range(first, min(first + MONITORING_PORTS, 65536)):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            listener.close()
            reason = f"{host}:{port}: {error.strerror or error}"
            if error.errno != errno.EADDRINUSE:
                break
        else:
            return listener
    logger.warning("monitoring.off", reason=f"{reason}: correct MONITORING_HOST or MONITORING_PORT")
    return None


async def _poll_forever(
    what: str, read: Callable[[], Awaitable[Found]], latest: Latest[Found], every_seconds: float
) -> None:
    logged = None
    while True:
        try:
            with pymongo.timeout(POLL_DEADLINE_SECONDS):
                latest.value = await read()
        except Exception as error:  # noqa: BLE001  # a missing value must not end the process
            latest.value = None
            # its text may hold the topology, or people's data
            reason = type(error).__name__
            if logged != reason:
                logger.warning("monitoring.unknown", what=what, error=reason)
            logged = reason
        else:
            logged = None
        await asyncio.sleep(every_seconds)


class _Gauge(Collector):
    def __init__(
        self,
        name: str,
        meaning: str,
        samples: Callable[[], Mapping[str, float]],
        label: str | None = None,
    ) -> None:
        self._name, self._meaning = name, meaning
        self._labels = [] if label is None else [label]
        self._samples = samples

    def describe(self) -> Iterable[Metric]:
        # by name only: no value is known at registration
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        family = self._family()
        for label, value in self._samples().items():
            family.add_metric([label] if self._labels else [], value)
        return [family]

    def _family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(self._name, self._meaning, labels=self._labels)


def _server(monitor: Monitor) -> HttpServer:
    return HttpServer(
        HttpConfig(
            _pages(monitor),
            max_connections=MAX_CONNECTIONS,
            head_seconds=HEAD_SECONDS,
            log_level="error",
            timeout_graceful_shutdown=1,
        )
    )


def _pages(monitor: Monitor) -> Callable[..., Awaitable[None]]:
    metrics = prometheus_client.make_asgi_app(monitor.registry)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        _ = receive  # a body has no meaning here, and waiting for it could take for good
        path = scope["path"].removesuffix("/")
        if path not in PAGES:
            await _send(send, 404, {"status": "not found: try /metrics, /livez or /readyz"})
        elif scope["method"] not in {"GET", "HEAD"}:
            allow = [(b"allow", b"GET, HEAD")]
            await _send(send, 405, {"status": "method not allowed: use GET"}, allow)
        elif path == "/metrics":
            await metrics({**scope, "method": "GET"}, _no_body, send)
        elif path == "/livez":
            await _send(send, 200, {"status": "alive"})
        elif (reason := monitor.why_not_ready()) is None:
            note = clock.describe_difference()
            await _send(send, 200, {"status": "ready", **({"note": note} if note else {})})
        else:
            await _send(send, 503, {"status": "not_ready", "reason": reason})

    return answer


async def _no_body() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(
    send: Any, status: int, body: Mapping[str, str], headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    content = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        *headers,
    ]
    with suppress(OSError):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

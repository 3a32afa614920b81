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
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Generic, TypeVar

import prometheus_client
import pymongo
import uvicorn
from loguru import logger
from prometheus_client import CollectorRegistry, Info, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime import clock
from runtime.settings import MONITORING_PORTS, MonitoringSettings

#: A poll that takes longer has failed; its value is unknown.
POLL_DEADLINE_SECONDS = 3.0

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
        server = _Server(monitor)
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


class _Server(uvicorn.Server):
    def __init__(self, monitor: Monitor) -> None:
        super().__init__(
            uvicorn.Config(
                _pages(monitor),
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                limit_concurrency=32,
                timeout_graceful_shutdown=1,
            )
        )

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        # the process handles SIGTERM itself
        yield


def _pages(monitor: Monitor) -> Callable[..., Awaitable[None]]:
    metrics = prometheus_client.make_asgi_app(monitor.registry)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        match scope["path"]:
            case "/metrics":
                await metrics(scope, receive, send)
            case "/livez":
                await _send(send, 200, {"status": "alive"})
            case "/readyz":
                reason = monitor.why_not_ready()
                if reason is None:
                    note = clock.describe_difference()
                    await _send(send, 200, {"status": "ready", **({"note": note} if note else {})})
                else:
                    await _send(send, 503, {"status": "not_ready", "reason": reason})
            case _:
                await _send(send, 404, {"status": "not found: try /metrics, /livez or /readyz"})

    return answer


async def _send(send: Any, status: int, body: Mapping[str, str]) -> None:
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    with suppress(OSError):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

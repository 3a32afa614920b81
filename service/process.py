"""The API process: listen, get ready, answer until asked to stop, drain."""

import asyncio
import os
from math import ceil

from fastapi import FastAPI
from loguru import logger

from runtime.http_server import HttpConfig, HttpServer
from runtime.mongo import close, open_client
from runtime.shutdown import Stop
from service.app import create_app
from service.readiness import Readiness
from service.settings import ServiceSettings


async def serve(settings: ServiceSettings, stop: Stop) -> None:
    """
    Returns when all calls in progress have been answered, or the grace time is over.

    Raises UnsuitableServer when MongoDB lacks something that the API needs.
    """
    client = open_client(settings.mongodb_url.get_secret_value(), process="service")
    readiness = Readiness(client, client[settings.mongodb_database])
    listener = _Listener(create_app(settings, client, readiness), settings, stop)
    preparing = asyncio.create_task(_prepare(readiness, stop))
    watching = asyncio.create_task(readiness.watch_clock(stop))
    await listener.serve()
    stop.request()
    await _let_end(preparing, settings.shutdown_grace_seconds)
    # a read that hangs is not waited for
    watching.cancel()
    await close(client)


async def _let_end(preparing: asyncio.Task[None], grace_seconds: float) -> None:
    """After the grace time the process ends, even during an index build or a hanging call."""
    try:
        await asyncio.wait_for(preparing, grace_seconds)
    except TimeoutError:
        logger.warning("service.preparing_interrupted")
        # the driver's thread cannot be cancelled, and Python would wait for it on exit
        os._exit(0)


async def _prepare(readiness: Readiness, stop: Stop) -> None:
    try:
        await readiness.prepare(stop)
    except BaseException:
        # a process that cannot become ready must end rather than stay half alive
        stop.request()
        raise


class _Listener(HttpServer):
    def __init__(self, app: FastAPI, settings: ServiceSettings, stop: Stop) -> None:
        self._stop = stop
        super().__init__(
            HttpConfig(
                app,
                max_connections=settings.api_max_connections,
                head_seconds=settings.api_receive_deadline_seconds,
                host=settings.api_host,
                port=settings.api_port,
                forwarded_allow_ips=settings.api_trusted_proxies,
                timeout_graceful_shutdown=ceil(settings.shutdown_grace_seconds),
            )
        )

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._stop.requested

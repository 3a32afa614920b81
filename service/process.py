"""The API's life: listen, get ready, answer until asked to stop, drain."""

import asyncio
import os
from collections.abc import Generator
from contextlib import contextmanager
from math import ceil

import pymongo
import uvicorn
from fastapi import FastAPI
from loguru import logger

from runtime.mongo import close, open_client
from runtime.shutdown import Stop
from service.app import create_app
from service.readiness import Readiness
from service.settings import ServiceSettings


async def serve(settings: ServiceSettings) -> None:
    """
    Returns when everything that was asked has been answered, or the grace time is over.

    Raises UnsuitableServer when MongoDB can never do what the API needs.
    """
    stop = Stop()
    stop.on_signals()
    client = open_client(settings.mongodb_url.get_secret_value(), process="service")
    readiness = Readiness(client, client[settings.mongodb_database])
    listener = _Listener(create_app(settings, client, readiness), settings, stop)
    preparing = asyncio.create_task(_prepare(readiness, stop))
    await listener.serve()
    stop.request()
    await _let_end(preparing, settings.shutdown_grace_seconds)
    with pymongo.timeout(1.0):
        await close(client)


async def _let_end(preparing: asyncio.Task[None], grace_seconds: float) -> None:
    """Past the grace time the process ends: an index may take hours, a frozen server for ever."""
    try:
        await asyncio.wait_for(preparing, grace_seconds)
    except TimeoutError:
        logger.warning("stopped while MongoDB was still preparing the collections")
        # the driver's thread cannot be cancelled, and Python would wait for it at its exit
        os._exit(0)


async def _prepare(readiness: Readiness, stop: Stop) -> None:
    try:
        await readiness.prepare(stop)
    except BaseException:
        # a process that can never get ready is to be seen dead, not half alive
        stop.request()
        raise


class _Listener(uvicorn.Server):
    def __init__(self, app: FastAPI, settings: ServiceSettings, stop: Stop) -> None:
        self._stop = stop
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.api_host,
                port=settings.api_port,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=ceil(settings.shutdown_grace_seconds),
            )
        )

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        # uvicorn would raise the signal again once it has drained, and the process would die of it
        yield

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._stop.requested

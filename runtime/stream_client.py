"""A MongoDB client for one change stream, whose reads end soon when its connection goes silent."""

from loguru import logger
from pymongo.errors import PyMongoError

from runtime.mongo import Client, Database, close, open_client, ping

#: Above the wait of a read. It is doubled while the server, which answers otherwise, needs longer.
READ_SECONDS = 3.0
MAX_READ_SECONDS = 3600.0


class StreamClient:
    """
    A read of a change stream that gets no answer is given up by the driver's socket, never by
    cancelling it, which would lose the batch on its way; and never by `pymongo.timeout`, which
    would replace the read's `maxTimeMS`. A socket's deadline is a property of the client, so the
    stream has a client of its own.

    The server's silence may be honest: `maxTimeMS` bounds its wait for new changes and not its scan
    of old ones, 120,000 of the oplog's entries a second on one core. So a deadline that is exceeded
    while the server answers a ping is doubled, until `restore` is called.
    """

    def __init__(self, url: str, database_name: str, *, process: str) -> None:
        self._url = url
        self._database_name = database_name
        self._process = process
        self._read_seconds = READ_SECONDS
        self._client: Client | None = None

    @property
    def database(self) -> Database:
        if self._client is None:
            self._client = open_client(
                self._url,
                process=self._process,
                answer_seconds=self._read_seconds,
                overrule_url=True,
            )
        database: Database = self._client[self._database_name]
        return database

    @property
    def is_extended(self) -> bool:
        return self._read_seconds > READ_SECONDS

    async def extend(self) -> None:
        """Call after a read that was given up: allow twice the time, if the server is there."""
        try:
            await ping(self.database.client)
        except PyMongoError:
            return
        self._read_seconds = min(2 * self._read_seconds, MAX_READ_SECONDS)
        logger.info("stream.deadline_extended", read_seconds=self._read_seconds)
        await self.close()

    async def restore(self) -> None:
        """Back to the normal deadline. Cursors of the present client are of no more use."""
        self._read_seconds = READ_SECONDS
        await self.close()

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await close(client)

"""Stands between a client and RabbitMQ, and lets the client believe in larger frames."""

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sandbox.ports import LOOPBACK

#: `connection.tune` and `connection.tune-ok`: class 10, method 30 or 31; channel_max, frame_max,
#: heartbeat; the end of the frame.
TUNE = re.compile(rb"(\x00\x0a\x00\x1e..)(....)(..\xce)", re.DOTALL)
TUNE_OK = re.compile(rb"(\x00\x0a\x00\x1f..)(....)(..\xce)", re.DOTALL)

#: Enough for the handshake, where the frames above are.
READ_BYTES = 65536


@contextmanager
def frame_limit_proxy(broker_port: int, *, broker_limit: int, client_limit: int) -> Iterator[int]:
    """
    The port of a proxy. Frames between the two limits are an error (501) to the broker.

    broker_limit: the broker's own `frame_max`.
    """
    with socket.create_server((LOOPBACK, 0)) as listener:
        thread = threading.Thread(
            target=_serve, args=(listener, broker_port, broker_limit, client_limit), daemon=True
        )
        thread.start()
        yield listener.getsockname()[1]
        # closing alone does not wake a thread that waits in `accept`
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def _serve(listener: socket.socket, port: int, broker_limit: int, client_limit: int) -> None:
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            broker = socket.create_connection((LOOPBACK, port))
            for source, target, replace in (
                (broker, client, _replacing(TUNE, client_limit)),
                (client, broker, _replacing(TUNE_OK, broker_limit)),
            ):
                pump = threading.Thread(target=_pump, args=(source, target, replace), daemon=True)
                pump.start()


def _replacing(frame: re.Pattern[bytes], limit: int) -> Callable[[bytes], bytes]:
    replacement = limit.to_bytes(4, "big")

    def replace(data: bytes) -> bytes:
        return frame.sub(lambda found: found[1] + replacement + found[3], data, count=1)

    return replace


def _pump(source: socket.socket, target: socket.socket, replace: Callable[[bytes], bytes]) -> None:
    with source, target, suppress(OSError):
        while data := source.recv(READ_BYTES):
            target.sendall(replace(data))
        target.shutdown(socket.SHUT_WR)

"""Ports on loopback for local servers."""

import random
import socket

# Below Linux's ephemeral range (32768-60999), so that no outgoing connection takes one of them
# between a stop and the next start.
PORTS = range(20000, 32768)
LOOPBACK = "127.0.0.1"


def port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < count:
        port = random.choice(PORTS)  # noqa: S311  a port is not a secret
        if port not in chosen and port_is_free(port):
            chosen.append(port)
    return chosen


def port_answers(port: int) -> bool:
    try:
        with socket.create_connection((LOOPBACK, port), timeout=0.5):
            return True
    except OSError:
        return False

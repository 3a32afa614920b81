"""Names of servers in settings: what can never be resolved or connected to is refused at boot."""

import re
import socket
from ipaddress import ip_address

MAX_PORT = 65535

#: https://www.rfc-editor.org/rfc/rfc1035#section-2.3.1, with underscores as in container networks
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_MAX_NAME_CHARACTERS = 253


def check_host(host: str) -> str:
    """A host name or an IP address; raises ValueError with the reason."""
    try:
        ip_address(host)
    except ValueError:
        _check_name(host)
    return host


def _check_name(host: str) -> None:
    try:
        name = host.encode("idna").decode().removesuffix(".")
    except UnicodeError:
        name = ""
    labels = name.split(".")
    if len(name) > _MAX_NAME_CHARACTERS or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("must be a host name such as mail.example.org, or an IP address")
    if re.fullmatch(r"\d+|0x[0-9a-f]*", labels[-1], re.IGNORECASE):
        # a name that ends in a number is an IPv4 address, perhaps in a short form such as 127.1
        try:
            socket.inet_aton(name)
        except OSError:
            raise ValueError("is not a valid IPv4 address") from None

"""
Logs: one line per event, on standard error; JSON for machines, short and coloured for a terminal.

Every line about a request or an event has its `request_id` or `event_id`, so that one search finds
the whole path of a request through all processes.
"""

import logging
import sys
from datetime import UTC
from typing import Any

import orjson
from loguru import logger

from runtime.printable import escape_unprintable

#: Libraries that log too much, or secrets: httpx logs whole URLs at INFO, and the URL of a Slack
#: webhook is its secret; pymongo logs whole commands at DEBUG, with people's data; pika's errors
#: repeat what our own log events say.
QUIET_LIBRARIES = {
    "httpx": "WARNING",
    "httpcore": "WARNING",
    "pymongo": "INFO",
    "pika": "CRITICAL",
}

PRETTY = (
    "<dim>{time:HH:mm:ss.SSS}</dim> <level>{level: <7}</level> "
    "<cyan>{extra[process]}</cyan> {message}<dim>{extra[fields]}</dim>"
)


def set_up_logs(process: str, *, level: str, format: str) -> None:
    """
    process: its name in every line; format: `json`, `pretty` or `auto`.

    Tracebacks never show the values of variables, which may be secret.
    """
    pretty = format == "pretty" or (format == "auto" and sys.stderr.isatty())
    logger.remove()
    logger.configure(extra={"process": process}, patcher=_with_fields if pretty else _encodable)
    options: dict[str, Any] = {"level": level, "backtrace": False, "diagnose": False}
    if pretty:
        logger.add(sys.stderr, format=PRETTY, **options)
    else:
        logger.add(_write_json, **options)
    logging.basicConfig(handlers=[_ToLoguru()], level=level, force=True)
    for library, min_level in QUIET_LIBRARIES.items():
        logging.getLogger(library).setLevel(min_level)


def _encodable(record: Any) -> None:
    """Lone surrogates, which foreign writers may send, cannot be encoded: they become `\\udc80`."""
    record["message"] = _escaped(record["message"])
    record["extra"] = {
        name: _escaped(value) if isinstance(value, str) else value
        for name, value in record["extra"].items()
    }


def _escaped(value: object) -> str:
    return str(value).encode(errors="backslashreplace").decode()


def _with_fields(record: Any) -> None:
    _encodable(record)
    record["message"] = escape_unprintable(record["message"])
    fields = (f"{name}={value}" for name, value in record["extra"].items() if name != "process")
    # what is logged may come from a stranger: it must not steer the terminal, or forge a line
    record["extra"]["fields"] = "".join(f" {escape_unprintable(field)}" for field in fields)


def _write_json(message: Any) -> None:
    record = message.record
    line: dict[str, Any] = {
        "time": record["time"].astimezone(UTC).isoformat(timespec="milliseconds"),
        "level": record["level"].name.lower(),
        "message": record["message"],
        **record["extra"],
    }
    if record["exception"] is not None:
        line["error"] = _escaped("".join(str(message).splitlines(keepends=True)[1:]).strip())
    sys.stderr.buffer.write(orjson.dumps(line, default=_escaped) + b"\n")
    sys.stderr.flush()


class _ToLoguru(logging.Handler):
    """Passes the records of libraries that use the standard logging module to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.bind(library=record.name).opt(exception=record.exc_info).log(
            record.levelname, record.getMessage()
        )

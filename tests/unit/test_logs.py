"""Logs: one line an event, whatever is in it."""

import json
import subprocess
import sys

import pytest

from tests.support.processes import bare_environment

LOG_A_SURROGATE = """
from loguru import logger
from runtime.logs import set_up_logs

set_up_logs("test", level="INFO", format={format!r})
logger.info("said \\udc80", key="k\\udc81", shown=ValueError("\\udc82"))
"""


def log_of(format: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", LOG_A_SURROGATE.format(format=format)],
        env=bare_environment(),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return ended.stderr


@pytest.mark.parametrize("format", ["json", "pretty"])
def test_text_that_is_no_unicode_is_logged_in_one_line_with_escapes(format: str) -> None:
    (line,) = log_of(format).splitlines()

    logged = " ".join(map(str, json.loads(line).values())) if format == "json" else line
    for escaped in (r"said \udc80", r"k\udc81", r"\udc82"):
        assert escaped in logged

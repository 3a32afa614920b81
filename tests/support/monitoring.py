"""Reads what a process says about itself."""

import re
from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sandbox.ports import LOOPBACK
from sandbox.waiting import wait_until
from tests.support.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "monitoring.md").read_text()


class Monitoring:
    def __init__(self, port: int) -> None:
        self._url = f"http://{LOOPBACK}:{port}"

    def alive(self) -> bool:
        try:
            return self._get("/livez").status_code == 200
        except httpx.TransportError:
            return False

    def why_not_ready(self) -> str | None:
        """The reason in words; None when it is ready."""
        try:
            answer = self._get("/readyz")
        except httpx.TransportError as error:
            return f"no answer: {error}"
        assert (answer.status_code == 200) == (answer.json()["status"] == "ready")
        reason: str | None = answer.json().get("reason")
        return reason

    def note(self) -> str | None:
        """What is wrong although it is ready; None when nothing is."""
        note: str | None = self._get("/readyz").json().get("note")
        return note

    def wait_ready(self) -> None:
        wait_until(lambda: self.why_not_ready() is None, "it is ready", deadline_seconds=30)

    def wait_unready(self, reason: str = "") -> str:
        """Wait until it is not ready, for a reason that begins so; returns all of it."""

        def reason_shown() -> str | None:
            why = self.why_not_ready()
            return why if why and why.startswith(reason) else None

        return str(wait_until(reason_shown, f"it is not ready: {reason}", deadline_seconds=30))

    def samples_with(self, *names: str, **exactly: float) -> dict[str, float]:
        """Wait until these samples are there, and those have these values; returns all of them."""

        def seen() -> dict[str, float]:
            samples = self.samples()
            met = exactly.items() <= samples.items() and samples.keys() >= set(names)
            return samples if met else {}

        return wait_until(seen, f"{names} {exactly} are shown", deadline_seconds=30)

    def samples(self) -> dict[str, float]:
        """`name` or `name{label="value"}` -> value, as they stand on the page."""
        text = self._get("/metrics").raise_for_status().text
        return {
            sample.name + _labels(sample.labels): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def _get(self, path: str) -> httpx.Response:
        # nothing of it is kept, and without `verify` it reads no certificates either
        return httpx.get(f"{self._url}{path}", trust_env=False, verify=False, timeout=10)


def undocumented(samples: Mapping[str, float]) -> set[str]:
    """Which of our own metrics docs/monitoring.md does not name."""
    names = {re.sub(r"(_bucket|_count|_sum)?({.*)?$", "", name) for name in samples}
    foreign = ("process_", "python_")
    return {name for name in names if f"`{name}" not in PAGE and not name.startswith(foreign)}


def _labels(labels: dict[str, str]) -> str:
    pairs = (f'{name}="{value}"' for name, value in labels.items())
    return f"{{{','.join(pairs)}}}" if labels else ""

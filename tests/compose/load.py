"""Requests at a steady rate, each repeated with its idempotency key until it is accepted."""

import secrets
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import httpx

TOPICS = ("sales", "pricing")
REQUESTS_PER_SECOND = 4.0
CALL_SECONDS = 5.0


@dataclass
class Load:
    """`accepted` are the ids of what was posted; no try of a request is counted twice."""

    base_url: str
    api_key: str
    accepted: list[str] = field(default_factory=list)
    refused: dict[int, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._post_all, name="load", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Returns once the request under way is accepted, or has used up its deadline."""
        self._stop.set()
        self._thread.join()

    def _post_all(self) -> None:
        with httpx.Client(base_url=self.base_url, timeout=CALL_SECONDS, trust_env=False) as api:
            number = 0
            while not self._stop.is_set():
                self._post(api, number)
                number += 1
                self._stop.wait(1 / REQUESTS_PER_SECOND)

    def _post(self, api: httpx.Client, number: int) -> None:
        headers = {"X-API-KEY": self.api_key, "Idempotency-Key": secrets.token_hex(12)}
        body = {"topic": TOPICS[number % len(TOPICS)], "description": f"request {number}"}
        give_up_at = time.monotonic() + 120
        while time.monotonic() < give_up_at:
            try:
                answer = api.post("/api/assistances", headers=headers, json=body)
            except httpx.TransportError:
                pass
            else:
                if answer.status_code == httpx.codes.ACCEPTED:
                    self.accepted.append(answer.json()["id"])
                    return
                code = answer.status_code
                self.refused[code] = self.refused.get(code, 0) + 1
            time.sleep(0.2)

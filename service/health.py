"""Probes, open without a key. `/livez`: the process runs. `/readyz`: it can serve calls."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from runtime import clock
from service import problems
from service.readiness import Readiness


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    """note: what is wrong although calls are served."""

    status: Literal["ready"] = "ready"
    note: str | None = Field(
        default=None,
        examples=[
            "the clock of this machine is 60 s behind that of MongoDB, which decides: ...",
        ],
    )


def health_router(readiness: Readiness) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/livez", summary="Whether the process runs")
    async def livez() -> Alive:
        return Alive()

    @router.get(
        "/readyz",
        summary="Whether a request would be accepted now",
        response_model_exclude_none=True,
        responses=problems.documented(
            problems.unavailable("MongoDB does not answer (ServerSelectionTimeoutError)"),
            instance="/readyz",
        ),
    )
    async def readyz() -> Ready:
        reason = await readiness.why_not_ready()
        if reason is not None:
            raise problems.unavailable(reason)
        return Ready(note=clock.describe_difference())

    return router

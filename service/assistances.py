"""`POST /api/assistances`: how a request is accepted."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any
from uuid import UUID, uuid4

from fastapi import APIRouter, Depends, Request, Response, Security
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError, PydanticKnownError

from assistance.request import DESCRIPTION_LIMIT_CHARACTERS, Status, accept, is_blank
from assistance.routing import Routing
from outbox.trace import trace_headers
from runtime import clock
from service import problems
from service.api_keys import API_KEY_HEADER, ApiKeys, guarded_by
from service.idempotency import REPLAYED_HEADER, Receipt, idempotency_key, receipt
from service.readiness import Readiness
from service.reading import add_reads
from service.request_log import note
from service.schemas import EXAMPLE_DESCRIPTION, PATH, Accepted, create_responses
from service.store import RequestStore
from service.wrong_keys import WrongKeys


def assistances_router(
    *,
    routing: Routing,
    keys: ApiKeys,
    wrong_keys: WrongKeys,
    store: RequestStore,
    readiness: Readiness,
    idempotency_window_seconds: float,
) -> APIRouter:
    topics = routing.topics
    wrong_topic = _wrong_topic(topics)

    class NewAssistance(BaseModel):
        topic: Annotated[str, _one_of(topics, wrong_topic)] = Field(
            examples=[topics[0]], json_schema_extra={"enum": list(topics)}
        )
        description: Annotated[str, AfterValidator(_not_blank)] = Field(
            min_length=1,
            max_length=DESCRIPTION_LIMIT_CHARACTERS,
            description="more than white space",
            examples=[EXAMPLE_DESCRIPTION],
        )

    def prepared() -> None:
        if readiness.why_not_prepared is not None:
            raise problems.unavailable(readiness.why_not_prepared)

    router = APIRouter(
        route_class=guarded_by(keys, wrong_keys),
        dependencies=[Security(API_KEY_HEADER), Depends(prepared)],
        tags=["assistances"],
    )

    @router.post(
        PATH,
        status_code=HTTPStatus.ACCEPTED,
        summary="Request assistance",
        responses=create_responses(wrong_topic.message()),
    )
    async def create(
        new: NewAssistance,
        key: Annotated[str | None, Depends(idempotency_key)],
        request: Request,
        response: Response,
    ) -> Accepted:
        request_id, now = str(uuid4()), clock.now()
        acceptance = accept(
            request_id=request_id,
            topic=new.topic,
            description=new.description,
            destinations=routing.destinations_of(new.topic),
            now=now,
            trace=trace_headers(request.headers),
        )
        note(request.scope, request_id=request_id)
        if key is None:
            await store.insert(acceptance)
        else:
            ours = receipt(
                caller=request.state.caller,
                key=key,
                topic=new.topic,
                description=new.description,
                request_id=request_id,
                now=now,
                window_seconds=idempotency_window_seconds,
            )
            stored = _same_call(ours, await store.insert_once(acceptance, ours))
            if stored["request_id"] != request_id:
                request_id = stored["request_id"]
                note(request.scope, request_id=request_id, replayed=True)
                response.headers[REPLAYED_HEADER] = "true"
        link = f"{PATH}/{request_id}"
        response.headers["Location"] = link
        return Accepted(id=UUID(request_id), status=Status.ACCEPTED, link=link)

    add_reads(router, store)
    return router


def _same_call(ours: Receipt, stored: Receipt | None) -> Receipt:
    """Raises Problem when the stored receipt belongs to another call, or there is none yet."""
    if stored is None:
        raise problems.request_in_progress()
    if stored["fingerprint"] != ours["fingerprint"]:
        raise problems.idempotency_key_reused()
    return stored


def _wrong_topic(topics: Sequence[str]) -> PydanticKnownError:
    *others, last = (repr(topic) for topic in topics)
    expected = f"{', '.join(others)} or {last}" if others else last
    return PydanticKnownError("enum", {"expected": expected})


def _one_of(topics: Sequence[str], wrong_topic: PydanticKnownError) -> BeforeValidator:
    def check(topic: Any) -> Any:
        if topic not in topics:
            raise wrong_topic
        return topic

    return BeforeValidator(check)


def _not_blank(description: str) -> str:
    if is_blank(description):
        raise PydanticCustomError("blank", "Should contain more than white space")
    return description

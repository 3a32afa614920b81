"""Reads of `/api/assistances`: one request, its timeline, and the list in pages."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request

from service import problems
from service.listing import PAGE_LIMIT, Filters, link_to_next, query_of
from service.request_log import note
from service.schemas import (
    EXAMPLE_PATH,
    EXAMPLE_WAIT_SECONDS,
    PATH,
    Assistance,
    Page,
    Timeline,
    assistance,
    timeline_answer,
)
from service.store import RequestStore


def add_reads(router: APIRouter, store: RequestStore) -> None:
    invalid_id = problems.invalid_request(
        [{"path": "path.id", "code": "uuid_parsing", "message": "Should be a valid UUID"}]
    )
    problems_of_a_read = (
        problems.unauthorized(),
        problems.too_many_wrong_keys(EXAMPLE_WAIT_SECONDS),
        problems.internal_error(),
        problems.unavailable("MongoDB does not answer"),
    )

    @router.get(
        f"{PATH}/{{id}}",
        summary="Get a request",
        responses=problems.documented(
            invalid_id, problems.request_not_found(), *problems_of_a_read, instance=EXAMPLE_PATH
        ),
    )
    async def read(id: UUID, request: Request) -> Assistance:
        note(request.scope, request_id=str(id))
        found = await store.find(str(id))
        if found is None:
            raise problems.request_not_found()
        return assistance(found)

    @router.get(
        f"{PATH}/{{id}}/timeline",
        summary="Get a request's timeline: what happened, and what comes next",
        responses=problems.documented(
            invalid_id, problems.request_not_found(), *problems_of_a_read, instance=EXAMPLE_PATH
        ),
    )
    async def read_timeline(id: UUID, request: Request) -> Timeline:
        note(request.scope, request_id=str(id))
        history = await store.find_history(str(id))
        if history is None:
            raise problems.request_not_found()
        return timeline_answer(history.request, history.entries)

    @router.get(
        PATH,
        summary="List requests, newest first",
        responses=problems.documented(
            problems.invalid_request(
                [
                    {
                        "path": "query.limit",
                        "code": "less_than_equal",
                        "message": f"Input should be less than or equal to {PAGE_LIMIT}",
                    }
                ]
            ),
            *problems_of_a_read,
            instance=PATH,
        ),
    )
    async def find(filters: Annotated[Filters, Query()], request: Request) -> Page:
        # one more than is shown, to find out whether there is a next page
        found = await store.page(query_of(filters), filters.limit + 1)
        shown = found[: filters.limit]
        more = len(found) > len(shown)
        asked = request.query_params.multi_items()
        return Page(
            items=[assistance(each) for each in shown],
            next=link_to_next(PATH, asked, shown[-1]) if more else None,
        )

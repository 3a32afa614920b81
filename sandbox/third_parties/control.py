"""What a person or a test sees and steers: the page, the inbox, the misbehaviour."""

import json
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import FileResponse, Response

from sandbox.third_parties.inbox import KEPT_RECEIPTS, Kind
from sandbox.third_parties.misbehaviour import Misbehaviour
from sandbox.third_parties.parties import ThirdParties

PAGE = Path(__file__).with_name("page.html")


def control_app(parties: ThirdParties) -> FastAPI:
    app = FastAPI(title="Third parties in the sandbox", docs_url=None, redoc_url=None)

    @app.get("/")
    async def show_page() -> FileResponse:
        return FileResponse(PAGE, headers={"Cache-Control": "no-store"})

    @app.get("/livez")
    async def livez() -> dict[str, Any]:
        return {"status": "ok", "addresses": parties.addresses}

    @app.get("/inbox")
    async def show_inbox(
        kind: Kind | None = None,
        request_id: str | None = None,
        accepted: bool | None = None,
        limit: Annotated[int, Query(ge=1, le=KEPT_RECEIPTS)] = 100,
    ) -> Response:
        """Totals of everything since the last clearing; the newest matching receipts first."""
        receipts = parties.inbox.newest(
            limit=limit, kind=kind, request_id=request_id, accepted=accepted
        )
        shown = {
            "totals": parties.inbox.totals(),
            "receipts": [receipt.as_json() for receipt in receipts],
        }
        # Escaped to ASCII: what arrived may hold half a surrogate pair, which UTF-8 cannot carry.
        return Response(json.dumps(shown), media_type="application/json")

    @app.delete("/inbox", status_code=HTTPStatus.NO_CONTENT)
    async def clear_inbox() -> None:
        parties.inbox.clear()

    @app.get("/misbehave")
    async def show_misbehaviour() -> dict[str, Any]:
        return {"active": parties.misbehaviours.active()}

    @app.post("/misbehave")
    async def misbehave(misbehaviour: Misbehaviour) -> dict[str, Any]:
        await parties.misbehave(misbehaviour)
        return {"active": parties.misbehaviours.active()}

    @app.post("/behave")
    async def behave() -> dict[str, Any]:
        await parties.behave()
        return {"active": parties.misbehaviours.active()}

    return app

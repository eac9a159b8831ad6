"""POST /admin/reload: switches to another checkpoint without losing a request."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.web.openapi import failures
from service.web.schemas.bodies import Body, Text
from service.web.state import serving_of

router = APIRouter(tags=["operation"])


class ReloadRequest(Body):
    """Which checkpoint to serve."""

    model: Text | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="Folder below the server's `reload_root`; null: read the present one again.",
    )


class ReloadResponse(BaseModel):
    """What is served now."""

    variant: str
    checkpoint: str = Field(description="Name of the folder.")
    generation: int = Field(description="Of the weights, 1 at start.")
    loaded_at: datetime
    load_s: float = Field(description="Seconds to read, check and warm up, while the old weights still served.")
    pause_s: float = Field(description="Seconds during which no request could start.")


@router.post(
    "/admin/reload",
    response_model=ReloadResponse,
    summary="Serve another checkpoint",
    responses=failures(400, 401, 403, 409, 422),
)
async def reload(body: ReloadRequest, http: HTTPRequest) -> Response:
    """Load an int8 checkpoint next to the present one, check it against the baseline, and switch to it.

    Running requests have `reload_wait_s` to finish on the old weights, then they end with 503; queued ones start on the
    new weights. Answers when it is done.
    """
    reloaded = await serving_of(http).reload(body.model)
    return Response(ReloadResponse(**asdict(reloaded)).model_dump_json(), media_type="application/json")

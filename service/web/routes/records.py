"""GET /requests/recent and /compare: the last requests, and a summary of comparisons with the baseline."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from service.web.openapi import failures
from service.web.schemas.operation import CompareResponse, RecentResponse, ShadowState
from service.web.state import Serving, serving_of

router = APIRouter(tags=["operation"], responses=failures(401))
Shared = Annotated[Serving, Depends(serving_of)]


@router.get("/requests/recent", summary="The last hundred requests")
async def recent(serving: Shared) -> RecentResponse:
    """Times and lengths of the last finished runs, oldest first, without text. Shadow replays are left out."""
    return RecentResponse(requests=serving.recent.rows())


@router.get("/compare", summary="Speed-up and agreement so far")
async def compare(serving: Shared) -> CompareResponse:
    """Medians over the last thousand comparisons, separately for `compare` requests and for shadow mode."""
    state = ShadowState(rate=serving.settings.shadow_rate, waiting=serving.shadow.num_waiting)
    return CompareResponse(**serving.comparisons.summary(), shadow_state=state)

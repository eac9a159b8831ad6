"""GET /health, /ready, /info and /metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi import Request as HTTPRequest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_CONTENT
from starlette.responses import JSONResponse, Response

from service.telemetry.negotiation import OPENMETRICS, prefers_openmetrics
from service.web.openapi import failures
from service.web.schemas.limits import Served, served
from service.web.schemas.operation import Health, Readiness
from service.web.state import STOPPING, Serving, serving_of

router = APIRouter(tags=["operation"], responses=failures())
"""Each route answers HEAD as well, which monitors of uptime send; the document of the routes shows GET alone."""
Shared = Annotated[Serving, Depends(serving_of)]


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    summary="Alive?",
    response_model=Health,
    responses={503: {"model": Health, "description": "An engine has stopped after a failure."}},
)
async def health(serving: Shared) -> Response:
    """200 while every engine runs, ready or not; 503 with the reason once one has failed for good."""
    failures = serving.failures()
    if failures:
        return JSONResponse({"status": "failed", "variants": failures}, 503)
    return JSONResponse({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get(
    "/ready",
    summary="Ready?",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "A variant is not ready, and why."}},
)
async def ready(serving: Shared) -> Response:
    """200 if every variant is loaded, self-checked and running; else 503 with the reason for each that is not."""
    reasons = {variant: reason for variant in serving.engines if (reason := serving.why_unready(variant))}
    reasons.update(serving.failures())
    if serving.is_draining:
        reasons = dict.fromkeys(serving.engines, STOPPING) | reasons
    if reasons:
        return JSONResponse(
            {"ready": False, "variants": reasons}, 503, {"retry-after": str(serving.lifecycle.retry_after_s)}
        )
    return JSONResponse({"ready": True, "variants": dict.fromkeys(serving.engines, "ready")})


@router.head("/info", include_in_schema=False)
@router.get("/info", summary="What is served", responses=failures(401, 503))
async def info(serving: Shared) -> Served:
    """Model, variants, scheme, calibration, memory, device, versions and limits; 503 until the engines are open."""
    return served(serving.host.info, serving.settings)


@router.head("/metrics", include_in_schema=False)
@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus' text format or, for those who accept it, OpenMetrics.",
            "content": {name: {"schema": {"type": "string"}} for name in ("text/plain", OPENMETRICS)},
        },
        **failures(401),
    },
)
async def metrics(serving: Shared, http: HTTPRequest) -> Response:
    """Every series in Prometheus' text format; with `Accept: application/openmetrics-text`, with exemplars."""
    if prefers_openmetrics(", ".join(http.headers.getlist("accept"))):
        return Response(serving.metrics.openmetrics(), media_type=OPENMETRICS_CONTENT)
    return Response(serving.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

"""GET /v1/models: the valid values of `model`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from service.web.openai.answers import ModelList, ServedModel
from service.web.openapi import failures
from service.web.state import Serving, serving_of

router = APIRouter(tags=["openai"], responses=failures(401, 503))
Shared = Annotated[Serving, Depends(serving_of)]


@router.get("/v1/models", summary="Served models")
async def models(serving: Shared) -> ModelList:
    """NAME, which is the first variant, then NAME:VARIANT for each. A bare VARIANT is accepted as well."""
    listed = serving.models.listed()
    return ModelList(object="list", data=[_served(name, variant, serving) for name, variant in listed.items()])


# A name may be a path, or contain the slash of a Hugging Face id.
@router.get("/v1/models/{model:path}", summary="One of them", responses=failures(404, 422))
async def model(model: str, serving: Shared) -> ServedModel:
    """The variant of a name."""
    return _served(model, serving.models.variant_of(model), serving)


def _served(name: str, variant: str, serving: Serving) -> ServedModel:
    return ServedModel(
        id=name,
        created=serving.models.created,
        variant=variant,
        max_model_len=serving.engines[variant].max_model_len,
        context_length=serving.engines[variant].max_model_len,
    )

"""What GET /metrics answers once every series there is has been observed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.browser import described
from tests.support.fake_engine import INFO
from tests.support.harness import ThreadLink, app_of, client_of, two_engines

INFO_WITH_KL = replace(
    INFO, variants={"w8a8": replace(described("w8a8"), self_check_kl=0.01), "fp16": described("fp16")}
)


def full_exposition(accept: str = "*/*") -> httpx.Response:
    """The metrics of a server with two variants after one comparison. Its engines seem to have a process: this one."""

    async def go() -> httpx.Response:
        async with client_of(app_of(two_engines(), info=INFO_WITH_KL)) as client:
            (await client.post("/generate", json={"prompt": "a", "compare": True})).raise_for_status()
            return await client.get("/metrics", headers={"accept": accept})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ThreadLink, "pid", os.getpid())
        return asyncio.run(go())


def families(exposition: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name, type, labels) of each family, the times of creation aside. A counter is named as its samples are."""
    for family in text_string_to_metric_families(exposition):
        if family.name.endswith("_created"):
            continue
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield name, family.type, tuple(sorted(labels))


def sample_names(exposition: str) -> set[str]:
    """The names that a query may use."""
    return {sample.name for family in text_string_to_metric_families(exposition) for sample in family.samples}

"""The books of one case: who was asked for, who was answered, and what was expected of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.faults.clients import Kind, Question, Seen
from benchmarks.faults.server import Server

TOKEN_COUNTERS = ("length", "stop")
FAULTY = (Kind.CUT, Kind.SILENT)
"""Ends that lose an accepted request, unless the case is about them."""

Answers = Mapping[tuple[str, str], tuple[int, ...]]
"""(variant, prompt) -> the tokens of a quiet run, as many as the longest request of any case asks for."""


def is_right(question: Question, seen: Seen, answers: Answers) -> bool:
    """Whether the tokens that came are those of the quiet run, all of them where the answer is whole."""
    count = question.max_tokens if seen.kind is Kind.ANSWERED else len(seen.token_ids)
    return seen.is_consistent and seen.token_ids == answers[question.variant, question.prompt][:count]


@dataclass(slots=True)
class Case:
    """One row of the table. What `expect` finds untrue fails it.

    done: what was done, with its numbers.
    seen: what clients saw -> how many; `told` is what else there is to say of it.
    ends: how requests that a server took ended -> how many; lost: those of them that ended without a word.
    blocks: the largest share of KV blocks in use at the end, of all servers of the case.
    rss_mb: before and after, of the server that the case is about.
    """

    name: str
    done: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    blocks: float | None = None
    rss_mb: tuple[float, float] | None = None
    faults: list[str] = field(default_factory=list)
    skipped: str = ""

    def expect(self, is_so: bool, what: str) -> None:
        """Fail the case unless it is so."""
        if not is_so:
            self.faults.append(what)

    def expect_equal(self, found: object, wanted: object, what: str) -> None:
        """Fail the case unless both are the same."""
        self.expect(found == wanted, f"{what}: {found}, expected {wanted}")

    def take(
        self,
        pairs: Iterable[tuple[Question, Seen]],
        answers: Answers,
        allowed: Sequence[Kind] = (Kind.ANSWERED,),
    ) -> Counter[str]:
        """Count what clients saw; returns it. Whoever was answered must have the answer of the quiet run.

        allowed: how requests may end. What ends otherwise without a word is lost.
        """
        counted: Counter[str] = Counter()
        for question, seen in pairs:
            counted[str(seen)] += 1
            if seen.kind not in (Kind.REFUSED, Kind.UNREACHED):
                self.ends[seen.kind] += 1
            is_lost = seen.kind in FAULTY and seen.kind not in allowed
            if not is_right(question, seen, answers):
                is_lost = True
                self.expect(False, f"{question.variant} {question.prompt!r} got another answer than in a quiet run")
            self.lost += is_lost
            self.expect(seen.kind in allowed, f"unexpected: {seen} {seen.message}".strip())
            if seen.status == 503:
                retry_after = seen.headers.get("retry-after", "")
                self.expect(retry_after.isdigit() and int(retry_after) > 0, "a 503 without Retry-After")
        self.seen += counted
        return counted

    @asynccontextmanager
    async def watching(self, server: Server) -> AsyncIterator[Server]:
        """A server that is ready; at the end it must be alive, hold no block, and have counted what clients saw."""
        await self.checked(server)
        before = server.rss_mb
        yield server
        await self.settle(server)
        self.rss_mb = before, server.rss_mb

    async def checked(self, server: Server) -> None:
        """Wait until it is ready, which it must become."""
        ready = await server.checked()
        self.expect_equal(ready.status_code, 200, "/ready")

    async def settle(self, server: Server) -> None:
        """Wait until nobody runs; no block may be in use then."""
        in_use = await server.blocks_in_use()
        self.blocks = max(in_use, self.blocks or 0.0)
        self.expect_equal(in_use, 0.0, "share of KV blocks in use at the end")

    async def expect_counted(self, server: Server, ends: Mapping[str, int]) -> None:
        """The server's own counters, runs by their outcome, must be these."""
        for outcome, wanted in ends.items():
            found = await server.total("ottava_requests_total", f"outcome={outcome}")
            self.expect_equal(int(found), wanted, f"the server's count of {outcome}")

    @property
    def verdict(self) -> str:
        if not self.faults:
            return f"skipped: {self.skipped}" if self.skipped else "ok"
        more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
        return f"FAILED: {self.faults[0]}{more}"

    @property
    def has_failed(self) -> bool:
        return bool(self.faults)

    def row(self) -> dict[str, Any]:
        """The case as a row of the result."""
        return {
            "case": self.name,
            "done": self.done,
            "seen": dict(self.seen),
            "told": self.told,
            "accepted": sum(self.ends.values()),
            "ends": {str(kind): count for kind, count in self.ends.items()},
            "lost": self.lost,
            "blocks_in_use": self.blocks,
            "rss_mb": None if self.rss_mb is None else [round(value, 1) for value in self.rss_mb],
            "faults": self.faults,
            "verdict": self.verdict,
        }

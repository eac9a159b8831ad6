"""Runs a step on the device: inputs, forward pass, sampling.

On a GPU a step is padded to a shape that has been captured, prompts and all, and launched as one graph. Only
`Sampled.read` waits for the device, and the forward pass of a decoder with experts (`can_be_captured` is False).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.tiles import BUCKETS
from service.engine.device.batch import Batch, BatchBuilder
from service.engine.device.graphs import StepGraphs
from service.engine.device.prompt_logprobs import Scores, logits_in_parts, score_prompts
from service.engine.device.ranks import Lead
from service.engine.device.sampler import Choice, Fault, greedy, sample
from service.engine.device.sampling import SamplingBuilder
from service.engine.device.staging import Staging
from service.engine.device.token_counts import TokenCounts
from service.engine.messages import Logprob
from service.engine.request import Request
from service.engine.scheduler import Chunk, Step, StepResults
from service.engine.shapes import DECODES, Shape
from service.engine.step_table import Ints, StepTableBuilder, TableLayout, blocks_of
from service.errors import EngineFailed
from service.models.attention import KVCache
from service.models.decoder import Decoder

TIMED_REPLAYS = 2
"""The last of them is measured."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What the forward pass of a step yields, padding included.

    hidden: [T, hidden_size].   logits: [S, V] float32, or a rank's part [S, W] (`Decoder.own_logits`).
    likeliest: the likeliest tokens of all rows, kept for the next step; of captured steps and of several ranks only.
    """

    hidden: Tensor
    logits: Tensor
    likeliest: Choice | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The sampled tokens and prompt scores of a step, being copied to the host until `ready`.

    begun, ready: when the device began and ended the step; None on a CPU.
    shape: the shape in which a graph ran the step, or None.
    others_late: asks whether another rank launched this step late; None if there is none.
    """

    choice: Choice
    scores: Scores | None
    chunks: list[Chunk]
    begun: torch.cuda.Event | None = None
    ready: torch.cuda.Event | None = None
    shape: Shape | None = None
    others_late: Callable[[], bool] | None = None

    @property
    def is_done(self) -> bool:
        return self.ready is None or bool(self.ready.query())  # type: ignore[no-untyped-call]

    def read(self) -> StepResults:
        """Wait for the step and return its results."""
        if self.ready is not None:
            self.ready.synchronize()
        time_s = time.perf_counter()
        scored = [] if self.scores is None else self.scores.by_request()
        return StepResults(
            time_s,
            self.choice.ids.tolist(),
            self._faults(scored),
            self._logprobs(),
            scored,
            self.shape,
            None if self.begun is None or self.ready is None else self.begun.elapsed_time(self.ready) / 1000,
            self.others_late is not None and self.others_late(),
        )

    def _faults(self, scored: Sequence[tuple[Request, Sequence[Logprob]]]) -> dict[int, EngineFailed]:
        """Place -> error, for each request that the step's numbers have failed."""
        faults = {}
        for place, fault in enumerate(self.choice.faults.tolist()):
            if fault:
                faults[place] = _fault_of(fault, self.chunks[place])
        # The log-probabilities of a prompt are complete with its first output token, so they are checked then.
        unscored = {request for request, logprobs in scored if any(math.isnan(entry.logprob) for entry in logprobs)}
        for place, chunk in enumerate(self.chunks):
            if chunk.index == 0 and chunk.request.params.prompt_logprobs is not None:
                earlier = any(math.isnan(entry.logprob) for entry in chunk.request.prompt_logprobs)
                if earlier or chunk.request in unscored:
                    faults[place] = _not_finite("for a token of the prompt")
        return faults

    def _logprobs(self) -> dict[int, Logprob]:
        if self.choice.logprobs is None:
            return {}
        assert self.choice.top_ids is not None
        assert self.choice.top_logprobs is not None
        rows = zip(
            self.chunks,
            self.choice.logprobs.tolist(),
            self.choice.top_ids.tolist(),
            self.choice.top_logprobs.tolist(),
            strict=True,
        )
        return {
            place: Logprob(logprob, list(zip(top_ids[:wanted], top[:wanted], strict=True)))
            for place, (chunk, logprob, top_ids, top) in enumerate(rows)
            if (wanted := chunk.request.params.logprobs) is not None
        }


def _fault_of(fault: int, chunk: Chunk) -> EngineFailed:
    if fault == Fault.NONE_ALLOWED:
        return EngineFailed(
            f"the answer cannot go on after {chunk.index} tokens: the grammar allows no token that the model holds for "
            "possible; loosen the schema, or use a model with a larger vocabulary"
        )
    return _not_finite(f"for token {chunk.index} of the answer")


def _not_finite(where: str) -> EngineFailed:
    return EngineFailed(
        f"the model's logits {where} are NaN or infinite: this request is lost, others go on; send it to another "
        "variant, or serve weights of another scheme or dtype if it happens again"
    )


class Runner:
    """Runs the steps of a variant: holds its decoder, its KV cache and its requests' state on the device.

    Args:
        decoder: the model.
        num_blocks, block_size: size of the KV cache.
        max_requests, max_tokens: the largest step.
        use_graphs: let `warm_up` capture steps in CUDA graphs.
        caches: KV caches to take over from the runner that this one replaces; None allocates new ones.
        lead: tells the other ranks of the decoder to take part; None if there are none, or on these others.
        has_drafts: whether steps may hold drafts; without them small decode steps take fewer kernels.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        max_requests: int,
        max_tokens: int,
        use_graphs: bool = True,
        caches: list[KVCache] | None = None,
        lead: Lead | None = None,
        has_drafts: bool = True,
    ) -> None:
        self.decoder = decoder
        self._lead = lead
        self.device = decoder.embedding.device
        self.is_async = self.device.type == "cuda"
        can_capture = decoder.is_row_independent and decoder.can_be_captured
        self.use_graphs = use_graphs and self.is_async and can_capture
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        max_blocks = blocks_of(decoder.config.max_model_len, block_size)
        self.layout = TableLayout(max_tokens=max_tokens, max_requests=max_requests, max_blocks=max_blocks)
        self._tables = StepTableBuilder(self.layout, block_size)
        self.caches = decoder.new_caches(num_blocks, block_size) if caches is None else caches
        self._batches = BatchBuilder(self.layout, self.device, self.caches[0].num_heads, has_drafts=has_drafts)
        self._graphs = StepGraphs[Forward](max_tokens, max_requests)
        self._kept: Forward | None = None
        self.step_times_s: dict[Shape, float] = {}
        """What the device takes for a step of each captured shape; empty without graphs."""
        self._sampling = SamplingBuilder(max_requests, decoder.config.vocab_size, self.device)
        self._score_staging = Staging(self.device)
        # The last row takes what padding samples.
        self._last_ids = torch.zeros(max_requests + 1, dtype=torch.int64, device=self.device)
        self._seen = TokenCounts(max_requests, decoder.config.vocab_size, self.device, is_seen=True)
        self._counts = TokenCounts(max_requests, decoder.config.vocab_size, self.device)
        self._followed: tuple[Forward, Batch] | None = None
        self._last: torch.cuda.Event | None = None
        """The end of what was launched last."""

    @property
    def only_launches(self) -> bool:
        """Whether steps are graphs. Else a step may wait for the device, as experts do, and launches many kernels."""
        return self.use_graphs

    @property
    def kv_cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @torch.inference_mode()
    def execute(self, step: Step) -> Sampled:
        """Launch a step; call `read` on the result to wait for it.

        Of the earlier steps, only the last may still be unread: see `Staging`.
        """
        shape = self._graphs.shape_of(step)
        table = self._tables.build(step, self._batches.numbers(), shape)
        others_late = None
        if self._lead is not None:
            slot = self._lead.forward(table, shape, is_behind=not self._has_ended)
            others_late = partial(self._lead.was_late, slot)
        batch = self._batches.build(table)
        # Not before the host has built the step: a device that waits for it would seem slow, and get shorter steps.
        begun = self._mark()
        forward = self._graphs.replay(shape) if shape else self._forward(batch)
        chunks = [chunk for chunk in step.chunks if chunk.samples]
        choice = self._choose(forward, batch, chunks)
        tell = None if self._lead is None else self._lead.scored
        scores = score_prompts(self.decoder, forward.hidden, step.chunks, self._score_staging, tell)
        if not self.is_async:
            return Sampled(choice, scores, chunks, shape=shape)
        on_host = None if scores is None else scores.to_host()
        on_host_choice = choice.to_host()
        self._last = self._mark()
        return Sampled(on_host_choice, on_host, chunks, begun, self._last, shape, others_late)

    @torch.inference_mode()
    def follow(self, numbers: Ints, *, shape: Shape | None, **sizes: int) -> bool:
        """Do another rank's part of a step that the first rank launches. Returns whether the one before had ended.

        Args:
            numbers: `StepTable.columns` of the step, one behind the other; copied before this returns.
            shape: of the captured step to replay, or None.
            sizes: those of `TableLayout.table`.
        """
        self.layout.unpack(numbers, self._batches.numbers(), **sizes)  # type: ignore[arg-type]
        batch = self._batches.launch(**sizes)  # type: ignore[arg-type]
        has_ended = self._has_ended
        self._followed = (self._graphs.replay(shape) if shape else self._forward(batch)), batch
        self._last = self._mark()
        return has_ended

    @torch.inference_mode()
    def take_ids(self, num_samples: int) -> None:
        """Give the first rank the logits of the step that was followed last, and take over the ids that it samples."""
        assert self._followed is not None
        forward, batch = self._followed
        self.decoder.joined(forward.logits[:num_samples])
        rows = batch.sample_rows[:num_samples].long()
        ids = torch.empty(num_samples, dtype=torch.int64, device=self.device)
        self._last_ids[rows] = self.decoder.ranks.broadcast(ids)
        self._last = self._mark()

    @torch.inference_mode()
    def follow_scores(self, rows: Tensor) -> None:
        """Do another rank's part in scoring rows [R] int64 of the step that was followed last."""
        assert self._followed is not None
        for _ in logits_in_parts(self.decoder, self._followed[0].hidden, rows.to(self.device)):
            pass
        self._last = self._mark()

    def warm_up(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every kernel that a request can need, and capture the steps."""
        for done, total in self.warming():
            if on_progress:
                on_progress(done, total)

    def warming(self) -> Iterator[tuple[int, int]]:
        """`warm_up` as an iterator over (done, total), so that another runner's steps can run in between."""
        pieces = self._warming()
        while True:
            if self._lead is not None:
                self._lead.warm()
            piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    @torch.inference_mode()
    def _warming(self) -> Iterator[tuple[int, int]]:
        if not self.is_async:
            return
        longest = self._longest
        decodes = [Shape(count, count, is_decode=True) for count in DECODES if count <= self.max_requests]
        prompts = [Shape(length, 1) for length in sorted({min(length, longest) for length in (2, 4, 8, *BUCKETS)})]
        # Each shape is captured, then timed.
        total = len(decodes + prompts) + (2 * len(self._graphs.shapes) if self.use_graphs else 0)
        for done, shape in enumerate(decodes + prompts, 1):
            self._forward(self._blank(shape))
            torch.cuda.synchronize()
            yield done, total
        if self.use_graphs:
            self._kept = self._allocate()
            captured = self._graphs.capture(self._blank, self._captured)
            for done, _ in enumerate(captured, len(decodes + prompts) + 1):
                yield done, total
            for done, shape in enumerate(self._graphs.shapes, total - len(self._graphs.shapes) + 1):
                self.step_times_s[shape] = self._timed(shape)
                yield done, total
            self._graphs.leave_out_slow(self.step_times_s)

    def close(self) -> None:
        """Destroy the captured graphs; none may be running. The caches stay valid for another runner."""
        self._graphs.destroy()
        self._kept = None

    def _allocate(self) -> Forward:
        """Memory for what captured steps yield: the largest step's, shared by all."""
        config, device = self.decoder.config, self.device
        ids, faults = torch.zeros(2, self.max_requests, dtype=torch.int64, device=device)
        return Forward(
            torch.zeros(self.max_tokens, config.hidden_size, dtype=self.decoder.dtype, device=device),
            torch.zeros(self.max_requests, self.decoder.num_own_logits, dtype=torch.float32, device=device),
            Choice(ids, faults),
        )

    @property
    def _longest(self) -> int:
        """Most token rows of one request in a step."""
        return min(self.max_tokens, self.decoder.config.max_model_len)

    def _blank(self, shape: Shape) -> Batch:
        """A step of a shape, all of it one prompt if it fits the model's context; for a decode, requests of one key."""
        return self._batches.blank(shape, 1 if shape.is_decode else min(shape.num_tokens, self._longest))

    def _timed(self, shape: Shape) -> float:
        """Seconds that the device takes for a captured step of a shape, with nothing before it in the cache."""
        self._blank(shape)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(TIMED_REPLAYS):
            begin.record()
            self._graphs.replay(shape)
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def _captured(self, batch: Batch) -> Forward:
        """A step for a graph: `_forward` into memory of its own, and the likeliest tokens."""
        assert self._kept is not None
        assert self._kept.likeliest is not None
        num_samples = len(batch.sample_index)
        hidden = self._kept.hidden[: len(batch.token_ids)].copy_(self._hidden(batch))
        logits = self._logits(hidden, batch, self._kept.logits[:num_samples])
        found, kept = greedy(logits, self.decoder.ranks), self._kept.likeliest
        likeliest = Choice(kept.ids[:num_samples].copy_(found.ids), kept.faults[:num_samples].copy_(found.faults))
        self._last_ids[batch.sample_rows.long()] = likeliest.ids
        return Forward(hidden, logits, likeliest)

    def _forward(self, batch: Batch) -> Forward:
        hidden = self._hidden(batch)
        logits = self._logits(hidden, batch)
        if self.decoder.ranks.size == 1:
            return Forward(hidden, logits)
        likeliest = greedy(logits, self.decoder.ranks)
        self._last_ids[batch.sample_rows.long()] = likeliest.ids
        return Forward(hidden, logits, likeliest)

    def _hidden(self, batch: Batch) -> Tensor:
        last = self._last_ids[batch.from_row.clamp(min=0)]
        token_ids = torch.where(batch.from_row >= 0, last, batch.token_ids)
        return self.decoder(token_ids, batch.rows, self.caches)

    def _logits(self, hidden: Tensor, batch: Batch, out: Tensor | None = None) -> Tensor:
        """Logits of the sampling rows; in a decode step those are all rows, in order."""
        is_all = batch.rows.is_decode and len(batch.sample_index) == len(hidden)
        return self.decoder.own_logits(hidden if is_all else hidden.index_select(0, batch.sample_index), out)

    def _choose(self, forward: Forward, batch: Batch, chunks: list[Chunk]) -> Choice:
        """The next token of each chunk, which its request's row keeps for the next step."""
        sampling, num_samples = self._sampling.build(chunks), len(chunks)
        if sampling.is_greedy and forward.likeliest is not None:
            likeliest = forward.likeliest
            return Choice(likeliest.ids[:num_samples], likeliest.faults[:num_samples])
        rows = batch.sample_rows[:num_samples].long()
        seen = self._seen.of(chunks, rows) if sampling.is_penalized else None
        counts = self._counts.of(chunks, rows) if sampling.counts_tokens else None
        if self._lead is not None:
            self._lead.chosen(num_samples)
        logits = self.decoder.joined(forward.logits[:num_samples])
        choice = sample(logits, sampling, seen, counts)
        if self._lead is not None:
            self.decoder.ranks.broadcast(choice.ids)
        self._last_ids[rows] = choice.ids
        if sampling.counts_tokens:
            self._counts.add(rows, choice.ids)
        if sampling.is_penalized:
            self._seen.add(rows, choice.ids)
        return choice

    @property
    def _has_ended(self) -> bool:
        """Whether the device has nothing of this runner left to do."""
        return self._last is None or bool(self._last.query())  # type: ignore[no-untyped-call]

    def _mark(self) -> torch.cuda.Event | None:
        """An event after all that has been launched; None on a CPU."""
        if not self.is_async:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

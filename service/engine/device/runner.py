"""Runs a step on the device: inputs, forward pass, sampling.

Only `Sampled.read` waits for the device, and the forward pass of a decoder with experts (`can_be_captured` is False).
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
from service.engine.device.graphs import DecodeGraphs
from service.engine.device.prompt_logprobs import Scores, score_prompts
from service.engine.device.sampler import Choice, Fault, sample
from service.engine.device.sampling import SamplingBuilder
from service.engine.device.staging import Staging
from service.engine.messages import Logprob
from service.engine.request import Request
from service.engine.scheduler import Chunk, Step, StepResults
from service.engine.step_table import StepTableBuilder, TableLayout
from service.errors import EngineFailed
from service.models.attention import KVCache
from service.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Sampled:
    """The sampled tokens and prompt scores of a step, being copied to the host until `ready`."""

    choice: Choice
    scores: Scores | None
    chunks: list[Chunk]
    ready: torch.cuda.Event | None

    def read(self) -> StepResults:
        """Wait for the step and return its results."""
        if self.ready is not None:
            self.ready.synchronize()
        time_s = time.perf_counter()
        scored = [] if self.scores is None else self.scores.by_request()
        return StepResults(time_s, self.choice.ids.tolist(), self._faults(scored), self._logprobs(), scored)

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
        use_graphs: let `warm_up` capture decode steps in CUDA graphs.
        caches: KV caches to take over from the runner that this one replaces; None allocates new ones.
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
    ) -> None:
        self.decoder = decoder
        self.device = decoder.embedding.device
        self.is_async = self.device.type == "cuda"
        can_capture = decoder.is_row_independent and decoder.can_be_captured
        self.use_graphs = use_graphs and self.is_async and can_capture
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        max_blocks = -(-decoder.config.max_model_len // block_size)
        layout = TableLayout(max_tokens=max_tokens, max_requests=max_requests, max_blocks=max_blocks)
        self._tables = StepTableBuilder(layout, block_size)
        self._batches = BatchBuilder(layout, self.device)
        self.caches = decoder.new_caches(num_blocks, block_size) if caches is None else caches
        self._graphs = DecodeGraphs(max_requests)
        self._sampling = SamplingBuilder(max_requests, self.device)
        self._score_staging = Staging(self.device)
        self._last_ids = torch.zeros(max_requests, dtype=torch.int64, device=self.device)
        self._seen: Tensor | None = None
        self._seen_owner: list[tuple[Request | None, int]] = [(None, 0)] * max_requests

    @property
    def kv_cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @torch.inference_mode()
    def execute(self, step: Step) -> Sampled:
        """Launch a step; call `read` on the result to wait for it.

        Of the earlier steps, only the last may still be unread: see `Staging`.
        """
        bucket = self._graphs.bucket_of(step)
        table = self._tables.build(step, self._batches.numbers(), bucket)
        batch = self._batches.build(table)
        chunks = [chunk for chunk in step.chunks if chunk.samples]
        if bucket:
            hidden, logits = None, self._graphs.replay(bucket)[: len(chunks)]
        else:
            hidden = self._hidden(batch)
            logits = self._logits(hidden, batch)
        choice = self._sample(logits, batch, chunks)
        # A decode step scores no prompt token: what follows a prompt's last token is generated.
        scores = None if hidden is None else score_prompts(self.decoder, hidden, step.chunks, self._score_staging)
        return self._send(choice, scores, chunks)

    def warm_up(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every kernel that a request can need, and capture the decode steps."""
        for done, total in self.warming():
            if on_progress:
                on_progress(done, total)

    @torch.inference_mode()
    def warming(self) -> Iterator[tuple[int, int]]:
        """`warm_up` as an iterator over (done, total), so that another runner's steps can run in between."""
        if not self.is_async:
            return
        longest = min(self.max_tokens, self.decoder.config.max_model_len)
        buckets = self._graphs.buckets
        shapes = [(bucket, 1) for bucket in buckets]
        shapes += [(1, length) for length in sorted({min(length, longest) for length in (2, 4, 8, *BUCKETS)})]
        total = len(shapes) + (len(buckets) if self.use_graphs else 0)
        for done, (num_requests, query_len) in enumerate(shapes, 1):
            self._forward(self._batches.blank(num_requests, query_len), is_decode=query_len == 1)
            torch.cuda.synchronize()
            yield done, total
        if self.use_graphs:
            captured = self._graphs.capture(self._batches.blank, partial(self._forward, is_decode=True))
            for done, _ in enumerate(captured, len(shapes) + 1):
                yield done, total
            torch.cuda.synchronize()

    def close(self) -> None:
        """Destroy the captured graphs; none may be running. The caches stay valid for another runner."""
        self._graphs.destroy()

    def _forward(self, batch: Batch, is_decode: bool = False) -> Tensor:
        """Logits of the sampling rows; in a decode step those are all rows, in order."""
        hidden = self._hidden(batch)
        return self.decoder.logits(hidden) if is_decode else self._logits(hidden, batch)

    def _hidden(self, batch: Batch) -> Tensor:
        last = self._last_ids[batch.from_row.clamp(min=0)]
        token_ids = torch.where(batch.from_row >= 0, last, batch.token_ids)
        return self.decoder(token_ids, batch.rows, self.caches)

    def _logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        if len(batch.sample_index) < len(hidden):
            hidden = hidden.index_select(0, batch.sample_index)
        return self.decoder.logits(hidden)

    def _sample(self, logits: Tensor, batch: Batch, chunks: list[Chunk]) -> Choice:
        sampling = self._sampling.build(chunks)
        rows = batch.sample_rows.long()
        seen = self._seen_rows(chunks, rows) if sampling.is_penalized else None
        choice = sample(logits, sampling, seen)
        self._last_ids[rows] = choice.ids
        if self._seen is not None:
            self._seen[rows, choice.ids] = True
        return choice

    def _send(self, choice: Choice, scores: Scores | None, chunks: list[Chunk]) -> Sampled:
        """Launch the copy of the results to the host."""
        if not self.is_async:
            return Sampled(choice, scores, chunks, None)
        on_host = None if scores is None else scores.to_host()
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sampled = Sampled(choice.to_host(), on_host, chunks, ready)
        ready.record()
        return sampled

    def _seen_rows(self, chunks: list[Chunk], rows: Tensor) -> Tensor:
        """[S, V] bool: the tokens in each sampling row's prompt and output. A request new to its row is copied in."""
        if self._seen is None:
            shape = (self.max_requests, self.decoder.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for chunk in chunks:
            request = chunk.request
            owner = (request, request.num_preemptions)
            if self._seen_owner[request.row] != owner:
                known = request.prompt_ids + request.output_ids
                row = self._seen[request.row]
                row.zero_()
                row[torch.tensor(known, device=self.device)] = True
                if chunk.start + chunk.length > len(known):
                    row[self._last_ids[request.row]] = True
                self._seen_owner[request.row] = owner
        return self._seen[rows]

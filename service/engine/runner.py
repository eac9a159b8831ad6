"""One step on the device: inputs, forward pass, sampling.

Nothing in here waits for the device but `Sampled.read`, and a decoder with experts, which `can_be_captured` denies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.tiles import BUCKETS
from service.engine.batch import Batch, BatchBuilder, SamplingBatch
from service.engine.request import Request, Token
from service.engine.sampler import Choice, sample
from service.engine.scheduler import Chunk, Step
from service.models.decoder import Decoder

GRAPH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Batch sizes of captured decode steps; a batch runs in the smallest that holds it."""


class NonFiniteLogits(RuntimeError):
    """The model's output holds NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of a step, on their way to the host."""

    choice: Choice
    is_finite: Tensor
    chunks: list[Chunk]
    ready: torch.cuda.Event | None

    def read(self) -> list[Token]:
        """Wait for the step and return one token per sampling chunk.

        Raises:
            NonFiniteLogits: the step's logits held NaN or infinity.
        """
        if self.ready is not None:
            self.ready.synchronize()
        if not bool(self.is_finite):
            raise NonFiniteLogits("the model's logits are not finite")
        now_s = time.perf_counter()
        ids = self.choice.ids.tolist()
        if self.choice.logprobs is None:
            return [Token(token_id, now_s) for token_id in ids]
        assert self.choice.top_ids is not None
        assert self.choice.top_logprobs is not None
        rows = zip(
            self.chunks,
            ids,
            self.choice.logprobs.tolist(),
            self.choice.top_ids.tolist(),
            self.choice.top_logprobs.tolist(),
            strict=True,
        )
        return [_token(chunk, now_s, *row) for chunk, *row in rows]


def _token(chunk: Chunk, now_s: float, token_id: int, logprob: float, top_ids: list[int], top: list[float]) -> Token:
    wanted = chunk.request.params.logprobs
    if wanted is None:
        return Token(token_id, now_s)
    return Token(token_id, now_s, logprob, tuple(zip(top_ids[:wanted], top[:wanted], strict=True)))


class Runner:
    """Holds a variant's decoder, its KV cache, and what its requests left on the device.

    Args:
        decoder: the model.
        num_blocks, block_size: of the KV cache.
        max_requests, max_tokens: the largest batch a step may bring.
        use_graphs: capture decode steps in CUDA graphs (`warm_up` does it).
    """

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        max_requests: int,
        max_tokens: int,
        use_graphs: bool = True,
    ) -> None:
        self.decoder = decoder
        self.device = decoder.embedding.device
        self.is_async = self.device.type == "cuda"
        can_capture = decoder.is_row_independent and decoder.can_be_captured
        self.use_graphs = use_graphs and self.is_async and can_capture
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        max_blocks = -(-decoder.config.max_model_len // block_size)
        self.builder = BatchBuilder(max_tokens, max_requests, max_blocks, block_size, self.device)
        self.caches = decoder.new_caches(num_blocks, block_size)
        self._last_ids = torch.zeros(max_requests, dtype=torch.int64, device=self.device)
        self._seen: Tensor | None = None
        self._seen_owner: list[tuple[Request | None, int]] = [(None, 0)] * max_requests
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def kv_cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @torch.inference_mode()
    def execute(self, step: Step) -> Sampled:
        """Launch a step. The result's tokens reach the host when it is read."""
        bucket = self._bucket(step)
        batch = self.builder.build(step, bucket)
        chunks = [chunk for chunk in step.chunks if chunk.samples]
        if bucket:
            graph, logits = self._graphs[bucket]
            graph.replay()
            logits = logits[: len(chunks)]
        else:
            logits = self._forward(batch)
        return self._sample(logits, batch, chunks)

    @torch.inference_mode()
    def warm_up(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every kernel that a request can need, and capture the decode steps."""
        if not self.is_async:
            return
        buckets = [bucket for bucket in GRAPH_BUCKETS if bucket <= self.max_requests]
        for bucket in buckets:
            self._forward(self.builder.blank(bucket), is_decode=True)
        longest = min(self.max_tokens, self.decoder.config.max_model_len)
        for query_len in sorted({min(length, longest) for length in (2, 4, 8, *BUCKETS)}):
            self._forward(self.builder.blank(1, query_len))
        torch.cuda.synchronize()
        if not self.use_graphs:
            return
        pool = torch.cuda.graph_pool_handle()
        # Largest first, so that the smaller graphs reuse its memory.
        for done, bucket in enumerate(reversed(buckets)):
            batch = self.builder.blank(bucket)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._forward(batch, is_decode=True)
            self._graphs[bucket] = graph, logits
            if on_progress:
                on_progress(done + 1, len(buckets))
        self._graphs = dict(sorted(self._graphs.items()))
        torch.cuda.synchronize()

    def _bucket(self, step: Step) -> int | None:
        if not self._graphs or not step.is_decode:
            return None
        return next((bucket for bucket in self._graphs if bucket >= len(step.chunks)), None)

    def _forward(self, batch: Batch, is_decode: bool = False) -> Tensor:
        """Logits of the rows that sample; in a decode step those are all rows, in order."""
        last = self._last_ids[batch.from_row.clamp(min=0)]
        token_ids = torch.where(batch.from_row >= 0, last, batch.token_ids)
        hidden = self.decoder(token_ids, batch.rows, self.caches)
        if not is_decode and len(batch.sample_index) < len(hidden):
            hidden = hidden.index_select(0, batch.sample_index)
        return self.decoder.logits(hidden)

    def _sample(self, logits: Tensor, batch: Batch, chunks: list[Chunk]) -> Sampled:
        sampling = SamplingBatch.build(chunks, self.device)
        rows = batch.sample_rows.long()
        seen = self._seen_rows(chunks, rows) if sampling.is_penalized else None
        choice = sample(logits, sampling, seen)
        self._last_ids[rows] = choice.ids
        if self._seen is not None:
            self._seen[rows, choice.ids] = True
        # The largest logit of a row is NaN or infinite if any is NaN or plus infinity: a tenth of looking at each.
        is_finite = logits.amax(-1).isfinite().all()
        if not self.is_async:
            return Sampled(choice, is_finite, chunks, None)
        tensors = (choice.ids, choice.logprobs, choice.top_ids, choice.top_logprobs)
        on_host = Choice(*(None if t is None else t.to("cpu", non_blocking=True) for t in tensors))  # type: ignore[arg-type]
        is_finite = is_finite.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Sampled(on_host, is_finite, chunks, ready)

    def _seen_rows(self, chunks: list[Chunk], rows: Tensor) -> Tensor:
        """Which tokens each sampling row has seen, [S, V] bool; a request new in its row is entered from the host."""
        if self._seen is None:
            shape = (self.max_requests, self.decoder.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for chunk in chunks:
            request = chunk.request
            owner = (request, request.num_preemptions)
            if self._seen_owner[request.row] != owner:
                known = request.prompt_ids + [token.id for token in request.output]
                row = self._seen[request.row]
                row.zero_()
                row[torch.tensor(known, device=self.device)] = True
                if chunk.start + chunk.length > len(known):
                    row[self._last_ids[request.row]] = True
                self._seen_owner[request.row] = owner
        return self._seen[rows]

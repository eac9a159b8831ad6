"""The engine's state of one request."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from service.engine.api import FinishReason, SamplingParams
from service.engine.drafts.drafter import Drafter
from service.engine.grammar import Matcher
from service.engine.messages import Logprob

_serials = itertools.count(1)


@dataclass(slots=True, eq=False)
class Request:
    """One generation, from its arrival to its last token.

    Always: num_computed <= num_tokens. Keys and values of the first num_computed tokens are in the cache (or are
    being written by the step in flight); num_tokens counts the prompt, the tokens the host has read, and the
    num_pending tokens that steps in flight will yield and the host has not yet read (at most 2). What drafts may yield
    beyond that counts once it has been read.

    serial: unlike that of any other request of this process. Whoever has to know later whose a row was keeps this, and
        not the request, which would keep all that it holds.
    num_added: tokens at the start of prompt_ids that are the model's sink and not the submitter's.
    handle: identifies the request in messages; chosen by the submitter.
    number: its place in the order of arrival.
    rank: its place among the running requests of several API keys; 0 while there is but one key.
    matcher: position of the output in its grammar; None without a grammar.
    output_ids: the tokens the host has read.
    row: the request's place in the runner's per-request state while it runs, else -1.
    drafter: guesses its next tokens; None until they are first wanted.
    has_drafts: the step in flight checks draft tokens of it.
    num_steps, num_batch_rows: finished steps it took part in, and the sum of the requests in them.
    is_uncounted: the news must send its step counts, since a step after its last token may have yielded none.
    num_cached: prompt tokens, those of the sink too, whose keys and values were already in the cache on arrival.
    block_keys: the keys of its first blocks, as far as the pool knows what they hold.
    prompt_logprobs: if requested, entry i belongs to the submitter's prompt token i + 1; complete with the first
        output token.
    num_scored: positions of the prompt whose next token is scored, or needs no score, steps in flight included.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival_s: float
    seed: int
    num_added: int = 0
    serial: int = field(default_factory=_serials.__next__)
    handle: int = 0
    number: int = 0
    rank: int = 0
    matcher: Matcher | None = None
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    blocks: list[int] = field(default_factory=list)
    row: int = -1
    drafter: Drafter | None = None
    has_drafts: bool = False
    finish_reason: FinishReason | None = None
    first_scheduled_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    num_steps: int = 0
    num_batch_rows: int = 0
    is_uncounted: bool = True
    num_cached: int = 0
    block_keys: list[int] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    num_scored: int = 0

    def __post_init__(self) -> None:
        self.num_scored = self.num_added

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        return len(self.output_ids) + self.num_pending

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def has_started(self) -> bool:
        return self.first_scheduled_s is not None

    @property
    def is_behind(self) -> bool:
        """Whether it must wait for the host to read its last tokens, and for the mask of its grammar that follows them;
        of drafts nobody knows before how many are right."""
        if self.matcher is not None:
            return self.num_pending > 0 or not self.matcher.is_ready
        return self.num_pending > 0 and self.has_drafts

    @property
    def can_draft(self) -> bool:
        """Whether drafts can be checked: not against a grammar or penalties, which depend on the tokens before."""
        params = self.params
        is_penalized = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        return self.matcher is None and not is_penalized

    def known_ids(self, start: int, stop: int) -> list[int]:
        """The tokens at positions start .. stop - 1 that the host has read."""
        num_prompt = len(self.prompt_ids)
        if stop <= num_prompt:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:] + self.output_ids[max(0, start - num_prompt) : stop - num_prompt]

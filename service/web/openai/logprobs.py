"""Log-probabilities in OpenAI's two formats: the completions' parallel lists, and the chat's entry per token."""

from __future__ import annotations

from collections.abc import Sequence

from service.text.protocols import TokenizerLike
from service.web.openai.answers import UNLIKELY, ChatLogprob, ChatLogprobs, ChatTopLogprob, CompletionLogprobs
from service.web.openai.plans import Prompt
from service.web.schemas.generate import TokenLogprob, TopLogprob


class TextLogprobs:
    """The completions' format, for one answer as it grows.

    A token's offset is the length of the text completed by the tokens before it, so all tokens of one character have
    the offset of that character.
    """

    def __init__(
        self, prompt: Prompt, is_echoed: bool, tokenizer: TokenizerLike, shown: frozenset[str] = frozenset()
    ) -> None:
        """shown: the special tokens that the answer's text shows."""
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._offset = len(prompt.text) if is_echoed else 0
        self._decoder = tokenizer.detokenizer(prompt.ids, shown)

    def of_prompt(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The entries of all prompt tokens; entries holds all but the first, which has no prediction."""
        ids, decoder, offset = self._prompt.ids, self._tokenizer.detokenizer(), 0
        offsets = []
        for token_id in ids:
            offsets.append(min(offset, len(self._prompt.text)))
            offset += len(decoder.push(token_id))
        first = CompletionLogprobs(
            tokens=[self._tokenizer.token_text(ids[0])],
            token_logprobs=[None],
            top_logprobs=[None],
            text_offset=offsets[:1],
        )
        return joined(first, self._shaped(entries, offsets[1:]))

    def of_answer(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The entries of the answer's next tokens."""
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(entry.id))
        return self._shaped(entries, offsets)

    def _shaped(self, entries: Sequence[TokenLogprob], offsets: list[int]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self._tokenizer.token_text(entry.id) for entry in entries],
            token_logprobs=[_number(entry.logprob) for entry in entries],
            top_logprobs=[self._by_text(entry) for entry in entries],
            text_offset=offsets,
        )

    def _by_text(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, then the token itself; of several with the same text, the likeliest."""
        named: dict[str, float] = {}
        for each in (*entry.top, entry):
            named.setdefault(self._tokenizer.token_text(each.id), _number(each.logprob))
        return named


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Concatenate two."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: TokenizerLike) -> ChatLogprobs:
    """The chat's format."""

    def named(entry: TopLogprob) -> ChatTopLogprob:
        text, of_text = tokenizer.token_text(entry.id), tokenizer.token_bytes(entry.id)
        return ChatTopLogprob(token=text, logprob=_number(entry.logprob), bytes=list(of_text))

    return ChatLogprobs(
        content=[
            ChatLogprob(**dict(named(entry)), top_logprobs=[named(likely) for likely in entry.top]) for entry in entries
        ]
    )


def _number(logprob: float | None) -> float:
    return UNLIKELY if logprob is None else logprob

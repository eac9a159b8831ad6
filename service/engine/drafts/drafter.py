"""Draft tokens by prompt lookup: what followed the last tokens of a text where they occurred before."""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (4, 2)
"""Lengths of the last tokens that are looked up, the longest first. With 2 alone a step of an edited file yielded 5 %
fewer tokens, with 4 alone 17 %; 3 or 5 beside them changed nothing."""

WEIGHT = 1 / 8
"""Share of the last token in the hit rate."""


class Drafter:
    """Guesses the next tokens of one text.

    Every token that is added is compared with its guess, whether or not that was drafted, so the hit rate is known
    before the first draft and without any.

    Source: prompt lookup decoding (Saxena, 2023), github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.hit_rate = 0.0
        """Share of tokens that were guessed, with the last ones weighing most."""
        self._ids = list(token_ids)
        # Tokens of a size -> the position behind their last occurrence.
        self._behind: list[dict[tuple[int, ...], int]] = []
        for size in SIZES:
            grams = zip(*(self._ids[start:] for start in range(size)), strict=False)
            # The positions end first, so the tokens at the end, which nothing follows yet, are left out.
            self._behind.append({gram: at for at, gram in zip(range(size, len(self._ids)), grams, strict=False)})
        self._source = self._found(self._last_grams())
        self._learn(self._last_grams())

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, token_id: int) -> None:
        """Append a token to the text."""
        source = self._source
        is_hit = source is not None and self._ids[source] == token_id
        self.hit_rate += WEIGHT * (is_hit - self.hit_rate)
        self._ids.append(token_id)
        grams = self._last_grams()
        self._source = source + 1 if is_hit and source is not None else self._found(grams)
        self._learn(grams)

    def outlook(self, most: int, min_chance: float) -> tuple[int, float]:
        """(drafts that are right with at least this chance, how many of them will be right on average)."""
        count, expected, chance = 0, 0.0, self.hit_rate
        if self._source is not None:
            while count < most and chance >= min_chance:
                count, expected, chance = count + 1, expected + chance, chance * self.hit_rate
        return count, expected

    def propose(self, count: int) -> list[int]:
        """The next tokens, if the text goes on as it did before; none if its end has not occurred before."""
        if self._source is None:
            return []
        # What would be copied from beyond the end is what has been copied just before.
        period = len(self._ids) - self._source
        return [self._ids[self._source + step % period] for step in range(count)]

    def _last_grams(self) -> list[tuple[int, ...]]:
        return [tuple(self._ids[-size:]) for size in SIZES]

    def _found(self, grams: Sequence[tuple[int, ...]]) -> int | None:
        places = (behind.get(gram) for behind, gram in zip(self._behind, grams, strict=True))
        return next((place for place in places if place is not None), None)

    def _learn(self, grams: Sequence[tuple[int, ...]]) -> None:
        for behind, gram in zip(self._behind, grams, strict=True):
            behind[gram] = len(self._ids)

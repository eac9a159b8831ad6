"""The benchmark of drafts: what it asks for, and its table."""

from __future__ import annotations

from typing import Any

from benchmarks.speculation import table, texts


def test_half_of_the_texts_repeat_and_are_greedy() -> None:
    found = texts()
    assert [text.repeats for text in found] == [True, True, False, False]
    assert [text.temperature == 0 for text in found] == [text.repeats for text in found]
    edit = found[0].prompt
    assert edit.count("class Staging") == 1, "the answer starts before it"


def test_the_table_has_both_servers_in_a_line() -> None:
    def row(speculate: str, rate: float, steps: int, drafts: int, accepted: int) -> dict[str, Any]:
        counts = {"tokens": 200, "steps": steps, "drafts": drafts, "accepted": accepted, "cpu_s": steps / 10}
        named = {"text": "edit", "streams": 4, "speculate": speculate, "num_equal": 7, "num_answers": 8}
        return named | counts | {"tokens_per_s": rate}

    lines = table([row("none", 10.0, 100, 0, 0), row("ngram", 25.0, 40, 100, 80)]).splitlines()
    assert len(lines) == 2
    head, of = lines[0].replace("cpu ms/tok", "cpu").split(), lines[1].replace(" of ", "/").split()
    assert len(head) == len(of)
    assert of == ["edit", "4", "10.0", "25.0", "2.50", "2.00", "5.00", "0.50", "0.80", "50.0", "20.0", "7/8"]
    assert "0.00" in table([row("none", 10.0, 100, 0, 0), row("ngram", 10.0, 100, 0, 0)]), "nobody drafted"

"""Grammars are compiled on trial first: within limits, in processes that nothing outlives, fairly and once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from service.engine.grammar import REGEX, GivenUp, GrammarLimits
from service.errors import DeadlineExceeded, EngineFailed, InvalidRequest
from service.text.grammars import compiler as compiling
from service.text.grammars.compiler import RulesCompiler, Turns
from service.text.grammars.trial_process import Verdict
from service.text.grammars.trials import Trials
from tests.support.grammars import EOS, RULES, TOKENS

DEADLINE_S = 60.0
SLOW = "root ::= " + " ".join(f'(x ("," x){{0,{990 - i % 500}}})?' for i in range(3000)) + '\nx ::= "a" | "b" x'
"""Takes half a minute, whatever the vocabulary."""
LIMITS = GrammarLimits(compile_s=0.5, compile_bytes=256 << 20, mask_s=0.1, masks_s=1.0)


@pytest.fixture(scope="module")
def parent() -> Iterator[RulesCompiler]:
    """A compiler whose process of trials has been started."""
    compiler = RulesCompiler(lambda: TOKENS, frozenset({EOS}), LIMITS)
    compiler.compile('root ::= "a"')
    yield compiler
    compiler.close()


@pytest.fixture
def compiler(parent: RulesCompiler) -> RulesCompiler:
    """The same without what it has learnt."""
    parent._made.clear()
    parent._refused.clear()
    return parent


def until(condition: Any) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def children(pid: int | None) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_passes_is_compiled_and_kept(compiler: RulesCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler.compile(RULES)
    assert made.matcher().allowed()
    assert 0 < made.mask_s < 0.1
    monkeypatch.setattr(Trials, "run", None)
    assert compiler.compile(RULES) is made


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (REGEX + "(?=a)b", "Lookahead is not supported"),
        (REGEX + r"\bword", "Word boundary is not supported"),
        (REGEX + "[", "Unclosed '\\['"),
        ("root ::= b", 'Rule "b" is not defined'),
        ('other ::= "a"', 'root rule with name "root" is not found'),
        ("root ::= root", "no text matches it"),
    ],
)
def test_what_is_not_valid(compiler: RulesCompiler, rules: str, words: str) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=f"cannot be compiled: .*{words}"):
            compiler.compile(rules)


@pytest.mark.parametrize(
    "nested", [REGEX + "(" * 1900 + "a" + ")" * 1900, "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000]
)
def test_what_nests_too_deep_is_refused_or_compiled(compiler: RulesCompiler, nested: str) -> None:
    """The library overflows its stack on some; that ends a trial, and nothing else."""
    with suppress(InvalidRequest):
        compiler.compile(nested)
    assert compiler.compile('root ::= "still here"')


def test_the_time_limit(compiler: RulesCompiler) -> None:
    with pytest.raises(InvalidRequest, match=r"within 0.5 s of processor time .max_grammar_compile_s. and 256"):
        compiler.compile(SLOW)
    until(lambda: not children(compiler.trials_pid))


def test_what_was_refused_costs_nothing_again(compiler: RulesCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest):
        compiler.compile(SLOW)
    monkeypatch.setattr(Trials, "run", None)
    with pytest.raises(InvalidRequest, match="not compiled within"):
        compiler.compile(SLOW)
    monkeypatch.setattr(compiling, "MAX_REFUSED", 3)
    for number in range(5):
        with pytest.raises(InvalidRequest):
            compiler._refuse(f"rules {number}", "no")
    assert len(compiler._refused) == 3


def test_only_what_is_kept_is_known(compiler: RulesCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for on threads that must not wait: there is no trial, and nothing is compiled."""
    monkeypatch.setattr(compiling, "CACHE_BYTES", 0)
    first = compiler.compile('root ::= "first"')
    assert compiler.known('root ::= "first"') is first
    with pytest.raises(InvalidRequest, match="mend it"):
        compiler.compile("root ::= b")
    compiler.compile('root ::= "second"')
    monkeypatch.setattr(Trials, "run", lambda *_: pytest.fail("there was a trial"))
    assert compiler.known('root ::= "first"') is None, "it was dropped for the second"
    assert compiler.known('root ::= "third"') is None
    with pytest.raises(InvalidRequest, match="mend it"):
        compiler.known("root ::= b")


def test_the_memory_limit() -> None:
    limits = GrammarLimits(compile_s=20, compile_bytes=24 << 20)
    compiler = RulesCompiler(lambda: TOKENS, frozenset({EOS}), limits)
    try:
        assert compiler.compile(RULES)
        rules = "root ::= " + " | ".join(f"r{i}" for i in range(60_000))
        rules += "\n" + "\n".join(f'r{i} ::= "{i}" [a-z]* "{i}"' for i in range(60_000))
        with pytest.raises(InvalidRequest, match="24 MiB of memory"):
            compiler.compile(rules)
    finally:
        compiler.close()


def test_dear_masks(compiler: RulesCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trials, "run", lambda *_: Verdict(mask_s=0.2))
    with pytest.raises(InvalidRequest, match=r"takes 200 ms; this server's limit is 100 ms .max_mask_ms."):
        compiler.compile(RULES)


def test_answers_are_priced_together(compiler: RulesCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trials, "run", lambda *_: Verdict(mask_s=0.05))
    assert compiler.compile(RULES, 20)
    with pytest.raises(InvalidRequest, match=r"for 21 answers 1.05e.03; this server's limit is 1000 ms a request"):
        compiler.compile(RULES, 21)
    assert compiler.compile(RULES, 20)


def test_whoever_leaves_ends_it(compiler: RulesCompiler) -> None:
    patient = RulesCompiler(lambda: TOKENS, frozenset({EOS}), GrammarLimits(compile_s=DEADLINE_S))
    patient._trials = Trials(patient._vocabulary, GrammarLimits(compile_s=DEADLINE_S))
    given_up: GivenUp = Future()
    told: list[Exception] = []

    def ask() -> None:
        with pytest.raises(DeadlineExceeded) as caught:
            patient.compile(SLOW, 1, given_up)
        told.append(caught.value)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: patient.trials_pid is not None and children(patient.trials_pid))
    given_up.set_result(None)
    thread.join(DEADLINE_S)
    assert told
    until(lambda: not children(patient.trials_pid))
    # It was nobody's fault, so it may be asked for again.
    assert not patient._refused
    patient.close()


def test_a_dead_parent_is_replaced(compiler: RulesCompiler) -> None:
    before = compiler.trials_pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    until(lambda: not is_running(before))
    assert compiler.compile(RULES).mask_s
    assert compiler.trials_pid not in (None, before)


def test_a_parent_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.text.grammars.trials.COMMAND", (sys.executable, "-c", "import sys; sys.exit(1)"))
    compiler = RulesCompiler(lambda: TOKENS, frozenset({EOS}), LIMITS)
    with pytest.raises(EngineFailed, match="no process could be started"):
        compiler.compile(RULES)
    compiler.close()


ENGINE = """
import sys, threading, time
from service.engine.grammar import GrammarLimits
from service.text.grammars.compiler import RulesCompiler
from service.text.grammars.trials import forked_parent
from tests.support.grammars import EOS, TOKENS
parent = forked_parent()
compiler = RulesCompiler(lambda: TOKENS, frozenset({EOS}), GrammarLimits(compile_s=600), parent)
threading.Thread(target=compiler.compile, args=(sys.argv[1],), daemon=True).start()
print(parent.pid, flush=True)
time.sleep(600)
"""


def test_nothing_outlives_an_engine_that_is_killed() -> None:
    """Not the process of trials, which was forked off it, nor a trial that runs."""
    with subprocess.Popen([sys.executable, "-c", ENGINE, SLOW], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        parent = int(engine.stdout.readline())
        until(lambda: children(parent))
        (trial,) = children(parent)
        assert is_running(parent)
        assert is_running(trial)
        engine.kill()
    until(lambda: not is_running(parent) and not is_running(trial))


def test_turns_come_in_order_and_whoever_leaves_loses_his() -> None:
    turns, went = Turns(1), list[int]()
    gates = [threading.Event() for _ in range(4)]
    leaves: list[GivenUp] = [Future() for _ in range(4)]

    def go(number: int) -> None:
        try:
            with turns.turn(leaves[number]):
                went.append(number)
                gates[number].wait(DEADLINE_S)
        except DeadlineExceeded:
            went.append(-number)

    threads = []
    for number in range(4):
        threads.append(threading.Thread(target=go, args=(number,)))
        threads[-1].start()
        until(lambda number=number: len(turns._queue) == number if number else went == [0])
    leaves[1].set_result(None)
    until(lambda: went == [0, -1])
    for gate in gates:
        gate.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert went == [0, -1, 2, 3]


def test_a_forked_parent_keeps_nothing_of_the_engine_open() -> None:
    code = (
        "import socket, time; from pathlib import Path; from service.text.grammars.trials import forked_parent\n"
        "kept = socket.socketpair(); parent = forked_parent(); folder = Path(f'/proc/{parent.pid}/fd')\n"
        "for _ in range(500):\n"
        "    if len(list(folder.iterdir())) == 4: break\n"
        "    time.sleep(0.01)\n"
        "print(len(list(folder.iterdir())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 4, "standard streams, and its end"


def test_closing_twice() -> None:
    compiler = RulesCompiler(lambda: TOKENS, frozenset({EOS}), LIMITS)
    compiler.close()
    compiler.close()
    assert compiler.trials_pid is None

"""Compiles grammars on trial, each in a process of its own: `python -m service.text.grammars.trial_process N`.

The parent of the trials loads the library and the vocabulary once; N is the descriptor of its end of a socket pair. For
each socket that arrives there it forks a child, which reads an `Order` from that socket, compiles it within the limits
and answers with a `Verdict`. A child that exceeds a limit, or whose socket is closed at the other end, is ended by the
kernel without an answer; the parent ends when its own socket is closed. So nothing stays behind, however the engine
dies.
"""

from __future__ import annotations

import array
import fcntl
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
from xgrammar import CompiledGrammar, Grammar, GrammarCompiler, GrammarMatcher, TokenizerInfo, VocabType

from service.engine.grammar import REGEX

NICENESS = 5
"""Steps of the engine come first where there are fewer processors than work."""

STACK_BYTES = 2 << 20
"""Half of what the engine's threads have, or less: a grammar that nests too deep for the engine must fail here."""

WALKS, WALK_TOKENS = 3, 32
"""Random answers whose masks are timed, and tokens of each."""

_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")


class Vocabulary(msgspec.Struct, array_like=True, frozen=True):
    """What the trials compile for: the bytes of each token, and the ids that end an answer."""

    tokens: list[bytes]
    eos_ids: list[int]


class Order(msgspec.Struct, array_like=True, frozen=True):
    """Rules to compile, within so many processor seconds and bytes of memory."""

    rules: str
    compile_s: float
    compile_bytes: int


class Verdict(msgspec.Struct, array_like=True, frozen=True):
    """What became of a trial.

    complaint: why the rules cannot be compiled; None if they can.
    mask_s: processor seconds of the dearest mask on a few random answers.
    """

    complaint: str | None = None
    mask_s: float = 0.0


def compiler_of(vocabulary: Vocabulary) -> GrammarCompiler:
    """A compiler that keeps nothing and starts no threads."""
    info = TokenizerInfo(vocabulary.tokens, VocabType.RAW, stop_token_ids=vocabulary.eos_ids)
    return GrammarCompiler(info, max_threads=1, cache_enabled=False)


def compile_rules(compiler: GrammarCompiler, rules: str) -> CompiledGrammar:
    """Compile rules as `Grammars.compile` takes them.

    Raises:
        ValueError: they are not valid, with the library's words.
    """
    try:
        if rules.startswith(REGEX):
            return compiler.compile_grammar(Grammar.from_regex(rules.removeprefix(REGEX)))
        return compiler.compile_grammar(rules)
    except RuntimeError as error:
        raise ValueError(_PLACE.sub("", str(error)).strip()) from error


def send(end: socket.socket, message: bytes) -> None:
    """Send a message, its length before it."""
    end.sendall(len(message).to_bytes(8, "little") + message)


def receive(end: socket.socket) -> bytes:
    """Receive a message that `send` has sent. Raises EOFError if the other end is closed first."""
    return _exactly(end, int.from_bytes(_exactly(end, 8), "little"))


def serve(end: socket.socket) -> NoReturn:
    """Read the vocabulary, then start a trial for each socket that arrives, until the other end is closed."""
    # Nobody waits for the children.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        compiler = compiler_of(msgspec.msgpack.decode(receive(end), type=Vocabulary))
        while (link := _socket_from(end)) is not None:
            with link:
                if os.fork() == 0:
                    end.close()
                    _try(link, compiler)
    os._exit(0)


def _socket_from(end: socket.socket) -> socket.socket | None:
    """The next socket that is passed; None once the other end is closed."""
    descriptors = array.array("i")
    data, ancillary, _, _ = end.recvmsg(1, socket.CMSG_LEN(descriptors.itemsize))
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(body)
    return socket.socket(fileno=descriptors[0]) if data and descriptors else None


def _try(link: socket.socket, compiler: GrammarCompiler) -> NoReturn:
    """Run one trial in this process, and end it."""
    try:
        order = msgspec.msgpack.decode(receive(link), type=Order)
        # What follows can only end by the limits, or with a verdict.
        send(link, b"")
        _end_with(link)
        _limit(order)
        threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=_answer, args=(link, compiler, order.rules))
        thread.start()
        thread.join()
    finally:
        os._exit(0)


def _answer(link: socket.socket, compiler: GrammarCompiler, rules: str) -> None:
    with suppress(OSError):
        send(link, msgspec.msgpack.encode(_verdict(compiler, rules)))


def _verdict(compiler: GrammarCompiler, rules: str) -> Verdict:
    """Compile, and time masks. Without memory the process ends."""
    try:
        grammar = compile_rules(compiler, rules)
        mask_s = _mask_s(grammar)
    except (ValueError, MemoryError) as error:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            os._exit(1)
        return Verdict(complaint=str(error))
    return Verdict("no text matches it") if mask_s is None else Verdict(mask_s=mask_s)


def _mask_s(grammar: CompiledGrammar) -> float | None:
    """Processor seconds of the dearest mask on random answers; None if no token may begin one."""
    random = np.random.default_rng(0)
    words = np.zeros((1, -(-grammar.tokenizer_info.vocab_size // 32)), dtype=np.int32)
    dearest_s = 0.0
    for _ in range(WALKS):
        matcher = GrammarMatcher(grammar)
        for place in range(WALK_TOKENS):
            words.fill(0)
            begin_s = time.thread_time()
            matcher.fill_next_token_bitmask(words)
            dearest_s = max(dearest_s, time.thread_time() - begin_s)
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8)[0], bitorder="little"))
            if not len(allowed):
                if not place:
                    return None
                break
            matcher.accept_token(int(random.choice(allowed)))
            if matcher.is_terminated():
                break
    return dearest_s


def _end_with(link: socket.socket) -> None:
    """Let the kernel end this process when the other end of the link is closed."""
    # SIGIO is sent when something happens to the socket, and nothing but its end does; it ends a process by default.
    fcntl.fcntl(link, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(link, fcntl.F_SETFL, fcntl.fcntl(link, fcntl.F_GETFL) | os.O_ASYNC)
    with suppress(BlockingIOError):
        link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        os._exit(0)


def _limit(order: Order) -> None:
    os.nice(NICENESS)
    # If the machine's memory runs out, this process is what the kernel should end.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    for kind, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        used = _status_bytes(name)
        if used is not None:
            most = used + order.compile_bytes
            resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # SIGPROF ends a process by default.
    signal.setitimer(signal.ITIMER_PROF, order.compile_s)


def _status_bytes(name: str) -> int | None:
    """A size that Linux tells of this process; None elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None


def _exactly(end: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = end.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

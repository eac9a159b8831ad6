"""What drafts by prompt lookup bring: two servers, one of which speculates, given the same requests in turns over HTTP.

    python -m benchmarks.speculation                                   the demo model, on a GPU if there is one
    python -m benchmarks.speculation --model FOLDER --max-tokens 512 --streams 1,8

Two texts repeat what the prompt holds (a file to edit, quotations of a page), two do not (a story, and tokens drawn so
hot that nothing repeats). `--streams` requests are sent at once, each with another seed. The prompts are in the prefix
cache, so what is timed is nearly all writing. Tokens per second are the medians over rounds; drafts, their acceptance
and tokens per step come from /metrics and do not depend on how busy the machine is; the engine's processor time per
token hardly does, and says the most on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.faults.server import Server, environment
from benchmarks.report import RESULTS, birth_certificate, write

ROOT = Path(__file__).parents[1]
MODES = ("none", "ngram")
COUNTERS = {
    "steps": "ottava_steps_total",
    "drafts": "ottava_speculative_draft_tokens_total",
    "accepted": "ottava_speculative_accepted_tokens_total",
    "cpu_s": "ottava_engine_process_cpu_seconds_total",
}
ANSWER_S = 1800.0


@dataclass(frozen=True, slots=True)
class Text:
    """What is asked for. repeats: whether the answer holds much of the prompt."""

    name: str
    prompt: str
    temperature: float
    repeats: bool


def texts() -> list[Text]:
    """An edit and quotations of this repository's files, greedy; a story and noise, drawn."""
    code = (ROOT / "service" / "engine" / "device" / "staging.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")[:1500]
    begin = code[: code.index("class")]
    return [
        Text("edit", f"{code}\n\nThe same file, with `Staging` renamed to `Stage`:\n\n{begin}", 0.0, repeats=True),
        Text("quotations", f"{page}\n\nThe sentences above that matter, word for word:\n\n- ", 0.0, repeats=True),
        Text("story", "A story about a lighthouse keeper who was afraid of the sea.\n\nOnce", 1.0, repeats=False),
        Text("noise", "Words without any order:", 2.0, repeats=False),
    ]


def main() -> int:
    args = _arguments()
    certificate = birth_certificate(args.commit) | {
        "model": Path(args.model).name if args.model else "demo",
        "engine_threads": int(environment()["OMP_NUM_THREADS"]),
    }
    rows = asyncio.run(_measured(args))
    write(args.out or RESULTS / "speculation-demo-cpu.json", certificate, rows)
    print(table(rows))
    print(json.dumps(rows))
    return 0


async def _measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = [args.model] if args.model else []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        servers = {}
        for mode in MODES:
            words = [*model, "--variants", args.variant, "--speculate", mode, *args.serve.split()]
            servers[mode] = stack.enter_context(Server(Path(scratch) / f"{mode}.log", words))
            await servers[mode].checked()
        rows = []
        for text in texts():
            for streams in args.streams:
                rows += await _rows(servers, text, streams, args)
        return rows


async def _rows(servers: dict[str, Server], text: Text, streams: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of each server. The first round is not counted: it fills the prefix cache."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    counts: dict[str, dict[str, float]] = {mode: dict.fromkeys([*COUNTERS, "tokens"], 0) for mode in MODES}
    num_equal = 0
    for round_ in range(args.rounds + 1):
        answers = {}
        for mode in MODES if round_ % 2 else reversed(MODES):
            before = await _counted(servers[mode])
            begun_s = time.perf_counter()
            answers[mode] = await _asked(servers[mode], text, streams, round_, args.max_tokens)
            if round_:
                seconds[mode].append((time.perf_counter() - begun_s) / sum(map(len, answers[mode])))
                after = await _counted(servers[mode])
                counts[mode]["tokens"] += sum(map(len, answers[mode]))
                for name in COUNTERS:
                    counts[mode][name] = round(counts[mode][name] + after[name] - before[name], 2)
        if round_:
            num_equal += sum(a == b for a, b in zip(*answers.values(), strict=True))
        print(f"{text.name}, {streams} streams: round {round_} of {args.rounds}", file=sys.stderr, flush=True)
    return [
        {"text": text.name, "repeats": text.repeats, "streams": streams, "speculate": mode}
        | {
            "tokens_per_s": round(1 / median(seconds[mode]), 2),
            "num_equal": num_equal,
            "num_answers": args.rounds * streams,
        }
        | counts[mode]
        for mode in MODES
    ]


async def _counted(server: Server) -> dict[str, float]:
    metrics = await server.metrics()
    return {
        key: sum(value for (found, *_), value in metrics.items() if found == name) for key, name in COUNTERS.items()
    }


async def _asked(server: Server, text: Text, streams: int, round_: int, max_tokens: int) -> list[list[int]]:
    """The token ids of as many answers, asked for at once."""
    body = {"prompt": text.prompt, "max_tokens": max_tokens, "temperature": text.temperature, "ignore_eos": True}
    url = f"http://127.0.0.1:{server.port}/generate"
    async with httpx.AsyncClient(timeout=ANSWER_S) as client:
        seeds = [1000 * round_ + number for number in range(streams)]
        replies = await asyncio.gather(*(client.post(url, json=body | {"seed": seed}) for seed in seeds))
    return [reply.raise_for_status().json()["token_ids"] for reply in replies]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per text and number of streams."""
    lines = [
        f"{'text':<12}{'streams':>8}{'tok/s':>9}{'with':>9}{'ratio':>7}{'tok/step':>10}{'with':>7}{'drafted':>9}"
        f"{'accepted':>10}{'cpu ms/tok':>12}{'with':>8}{'same':>11}"
    ]
    for without, with_it in zip(rows[::2], rows[1::2], strict=True):
        drafts, accepted = with_it["drafts"], with_it["accepted"]
        lines.append(
            f"{with_it['text']:<12}{with_it['streams']:>8}{without['tokens_per_s']:>9.1f}{with_it['tokens_per_s']:>9.1f}"
            f"{with_it['tokens_per_s'] / without['tokens_per_s']:>7.2f}"
            f"{without['tokens'] / max(1, without['steps']):>10.2f}{with_it['tokens'] / max(1, with_it['steps']):>7.2f}"
            f"{drafts / with_it['tokens']:>9.2f}{accepted / drafts if drafts else 0.0:>10.2f}"
            f"{_cpu_ms(without):>12.1f}{_cpu_ms(with_it):>8.1f}{with_it['num_equal']:>5} of {with_it['num_answers']}"
        )
    return "\n".join(lines)


def _cpu_ms(row: dict[str, Any]) -> float:
    """The engine's processor time per token."""
    return 1000.0 * float(row["cpu_s"]) / float(row["tokens"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or id; the demo model by default")
    parser.add_argument("--variant", default="w8a8", choices=("w8a8", "fp16"))
    parser.add_argument("--streams", default=[1, 4], type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", default="", help="more flags of `ottava serve`, for both servers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

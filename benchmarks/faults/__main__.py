"""Run every fault against real servers and print what became of it: python -m benchmarks.faults

    python -m benchmarks.faults --cases crowd,sigkill        some of them
    python -m benchmarks.faults --model demo                 a real small model, which takes long

Each case starts `ottava serve` with its two processes, with both variants on the int8 and float paths that are served
everywhere, on loopback. Whoever is answered in it must get the tokens of a quiet run. What is expected of a case stands
in it; where it does not hold, the case fails and with it the script, with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.faults import crowds, disks, engines, lives, manners
from benchmarks.faults.bench import Bench
from benchmarks.faults.case import Case
from benchmarks.faults.clients import Kind
from benchmarks.report import RESULTS, birth_certificate, write
from service.web.uvicorn_config import allow_open_files

Run = Callable[[Bench, Case], Awaitable[None]]

CASES: dict[str, tuple[str, Run]] = {
    "crowd": ("1000 clients at once", crowds.crowd),
    "overload": ("1000 clients, a short queue", crowds.overload),
    "slow-readers": ("slow readers", manners.slow_readers),
    "vanish": ("clients vanish mid-stream", manners.vanishing),
    "bodies": ("oversized and malformed bodies", manners.bodies),
    "headers": ("header floods", manners.headers),
    "ids": ("duplicate ids", crowds.same_ids),
    "nan-row": ("NaN in a token's embedding", engines.nan_in_a_row),
    "nan-layer": ("NaN in a layer", engines.nan_in_a_layer),
    "raise-once": ("a kernel raises once", engines.raising_once),
    "raise-always": ("a kernel raises always", engines.raising_always),
    "blocks": ("out of KV blocks", crowds.out_of_blocks),
    "sigterm": ("SIGTERM under load", lives.terminated),
    "engine": ("SIGKILL of the engine", lives.engine_killed),
    "sigkill": ("SIGKILL under load", lives.killed),
    "disk": ("disk full while quantizing", disks.full_disk),
    "cache": ("corrupted cache", disks.damaged_cache),
    "soak": ("10,000 requests", crowds.soak),
}
HEADING = ("case", "what was done", "what clients saw", "accepted", "lost", "KV in use after", "RSS MB", "verdict")
CASE_LIMIT_S = 900.0


def main() -> None:
    args = _arguments()
    # What waits in `finally` must also run where somebody stops the script.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    allow_open_files(4096)
    torch.set_num_threads(1)
    certificate = birth_certificate(args.commit) | {"model": args.model}
    with tempfile.TemporaryDirectory(prefix="ottava-faults-") as scratch:
        bench = Bench.make(Path(scratch), args.model)
        cases = asyncio.run(_run(bench, {name: CASES[name] for name in args.cases}))
    write(Path(args.out or RESULTS / "faults-cpu.json"), certificate, [case.row() for case in cases])
    print("\n".join(table(cases)))
    sys.exit(any(case.has_failed for case in cases))


async def _run(bench: Bench, chosen: Mapping[str, tuple[str, Run]]) -> list[Case]:
    await bench.ask_in_quiet()
    return [await run_case(title, run, bench) for title, run in chosen.values()]


async def run_case(title: str, run: Run, bench: Bench) -> Case:
    """One case to its end. What it raises fails it and no other."""
    case = Case(title)
    try:
        async with asyncio.timeout(CASE_LIMIT_S):
            await run(bench, case)
    except Exception as error:  # noqa: BLE001 (told in the table and on stderr; the cases after it still run)
        traceback.print_exc()
        case.expect(False, f"{type(error).__name__}: {error}")
    # Where the scratch folder lay tells nobody anything.
    case.told = [text.replace(f"{bench.folder}/", "") for text in case.told]
    print(f"{title}: {case.verdict}", file=sys.stderr, flush=True)
    for fault in case.faults:
        print(f"  {fault}", file=sys.stderr, flush=True)
    return case


def table(cases: Sequence[Case]) -> Iterator[str]:
    """The cases in Markdown."""
    yield f"| {' | '.join(HEADING)} |"
    yield "|" + "---|" * len(HEADING)
    for case in cases:
        seen = [f"{count} x {word}" for word, count in sorted(case.seen.items(), key=lambda pair: -pair[1])]
        cells = [
            case.name,
            case.done,
            "; ".join([", ".join(seen), *case.told] if seen else case.told),
            _accepted(case),
            str(case.lost),
            "" if case.blocks is None else f"{case.blocks:g}",
            "" if case.rss_mb is None else " to ".join(f"{value:.0f}" for value in case.rss_mb),
            case.verdict,
        ]
        yield f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


def _accepted(case: Case) -> str:
    """How many requests were taken, and how they ended where not all were answered."""
    total = sum(case.ends.values())
    if set(case.ends) <= {Kind.ANSWERED}:
        return str(total) if total else ""
    return f"{total}: " + ", ".join(f"{count} {kind}" for kind, count in case.ends.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=_names, default=list(CASES), help=f"of {','.join(CASES)}; default: all")
    parser.add_argument("--model", choices=["tiny", "demo"], default="tiny", help="random and tiny, or the demo model")
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", help="JSON file; default: benchmarks/results/faults-cpu.json")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {unknown[0]!r}; the cases are {', '.join(CASES)}")
    return names


if __name__ == "__main__":
    main()

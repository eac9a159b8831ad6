"""A disk that is full, and files that are not what was written."""

from __future__ import annotations

import asyncio
import filecmp
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.bench import PROMPTS, Bench, ask_all
from benchmarks.faults.case import Case
from benchmarks.faults.clients import Question
from benchmarks.faults.model import WEIGHTS
from benchmarks.faults.server import run_command

SHORT = ("--calibration-windows", "1")
QUANTIZING = "quantizing layers"


async def full_disk(bench: Bench, case: Case) -> None:
    """Quantize onto a disk that is full before a layer is done, then before the whole is; then there is room."""
    whole = bench.folder / "room"
    done = await _quantize(bench, whole)
    case.expect_equal(done.returncode, 0, f"quantizing with room: {done.stderr[-300:]}")
    size = sum(path.stat().st_size for path in whole.iterdir())
    sizes = size // 3, size, 8 * size
    case.done = f"{size >> 10} KiB quantized onto a disk of " + ", then ".join(f"{n >> 10}" for n in sizes) + " KiB"
    try:
        with small_disk(bench.folder / "disk", sizes[0]) as resize:
            for num_bytes in sizes[:2]:
                resize(num_bytes)
                await _expect_no_room(bench, case, bench.folder / "disk" / "out")
            resize(sizes[2])
            await _expect_whole(bench, case, bench.folder / "disk" / "out", whole)
    except NoDisk as error:
        case.skipped = str(error)


async def _expect_no_room(bench: Bench, case: Case, out: Path) -> None:
    """One line that says so and how much is kept, and nothing that could be served."""
    failed = await _quantize(bench, out)
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    kept = re.findall(r"\d+ of \d+ layers are kept", failed.stderr)
    case.seen[f"exit code {failed.returncode}"] += 1
    case.expect(failed.returncode == 1 and len(errors) == len(kept) == 1, f"not one line: {failed.stderr[-400:]}")
    case.expect("No space left" in failed.stderr, f"the reason is not told: {failed.stderr[-400:]}")
    case.expect("Traceback" not in failed.stderr, "a traceback")
    case.expect(not out.exists(), "half a checkpoint stands where a whole one would")
    served = await asyncio.to_thread(run_command, "serve", str(out))
    case.expect_equal(served.returncode, 1, "serving what is not there")
    case.told += [f"no space left, {words}" for words in kept]


async def _expect_whole(bench: Bench, case: Case, out: Path, whole: Path) -> None:
    """The same files as where there always was room, and nothing else."""
    done = await _quantize(bench, out)
    case.seen[f"exit code {done.returncode}"] += 1
    case.expect_equal(done.returncode, 0, f"quantizing with room again: {done.stderr[-300:]}")
    names = sorted(path.name for path in whole.iterdir())
    case.expect_equal(sorted(path.name for path in out.iterdir()), names, "files")
    _, *differing = filecmp.cmpfiles(whole, out, names, shallow=False)
    case.expect_equal(differing, [[], []], "files that differ from those of a disk with room")
    case.expect_equal([path.name for path in out.parent.iterdir()], ["out"], "what is left beside it")
    case.told.append("with room: the same bytes as without the fault")


async def damaged_cache(bench: Bench, case: Case) -> None:
    """Every file of a prepared model, damaged in turn: it is made anew, and nothing wrong is served."""
    cache = bench.folder / "damaged-cache"
    arguments = ("--cache-dir", str(cache), "--variants", "w8a8", *SHORT)
    asked = [Question(prompt, 24) for prompt in PROMPTS]
    answers = dict(bench.answers)
    case.done = f"{len(DAMAGES)} kinds of damage to a prepared model; a server after each, {len(asked)} requests"
    with bench.serve(*arguments, models=(str(bench.float_folder),)) as server:
        await case.checked(server)
        pairs = await ask_all(server.port, asked)
        answers |= {(question.variant, question.prompt): seen.token_ids for question, seen in pairs}
    (folder,) = (path for path in (cache / "quantized").iterdir() if path.is_dir() and not path.name.startswith("."))
    for name, damage in DAMAGES.items():
        damage(folder)
        with bench.serve(*arguments, models=(str(bench.float_folder),)) as server:
            async with case.watching(server):
                case.expect(QUANTIZING in server.said, f"{name}: was not made anew")
                warned = [line for line in server.said.splitlines() if "WARNING" in line and str(folder) in line]
                case.expect(len(warned) == 1, f"{name}: nothing is said of it")
                case.take(await ask_all(server.port, asked), answers)
    case.told.append(f"{len(DAMAGES)} times made anew, each with a warning that names the file")


def _flip(name: str, place: float) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(place * len(content))] ^= 0x40
        (folder / name).write_bytes(content)

    return flip


def _cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut": _cut(WEIGHTS),
    "a bit of a weight flipped": _flip(WEIGHTS, 0.6),
    "a bit of the weights' header flipped": _flip(WEIGHTS, 0.01),
    "weights removed": _remove(WEIGHTS),
    "config.json cut": _cut("config.json"),
    "a bit of config.json flipped": _flip("config.json", 0.5),
    "ottava.json emptied": lambda folder: os.truncate(folder / "ottava.json", 0),
    "the folder emptied": _empty,
}


async def _quantize(bench: Bench, out: Path) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(run_command, "quantize", str(bench.float_folder), str(out), *SHORT)


class NoDisk(Exception):
    """No small file system can be mounted here."""


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Callable[[int], object]]:
    """A file system of so many bytes at the folder; yields what changes its size.

    Raises:
        NoDisk: this user may not mount one.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        raise NoDisk(f"a small file system cannot be mounted here ({mounted.stderr.strip()}); it takes root")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)

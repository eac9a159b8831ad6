"""Runs `ottava bench`: probes the server, sends every load, and gathers the phases of each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from service.errors import BenchError, InvalidSettings
from service.process import settle
from service.tools.bench.arrivals import Concurrency, Load, Rate, arrival_times
from service.tools.bench.client import Client, Target
from service.tools.bench.dialects import ROUTES, Dialect
from service.tools.bench.drive import Driver, Planned, Tally, drive
from service.tools.bench.measure import Phase, Summary, summarize, why_invalid, why_saturated
from service.tools.bench.probe import Prober, first_model, remedy, server_info
from service.tools.bench.prompts import (
    Lengths,
    Material,
    Prefixes,
    Prompt,
    dataset_prompts,
    prefix_prompts,
    random_prompts,
    read_dataset,
)
from service.tools.bench.sweep import Sweep
from service.web.uvicorn_config import allow_open_files

MAX_FILES = 65536

OnTally = Callable[[str, Tally], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is sent.

    dataset, prefixes: in place of random prompts. wants_ids: token ids where the server takes them.
    """

    lengths: Lengths
    dataset: Path | None = None
    prefixes: Prefixes | None = None
    wants_ids: bool = True

    def prompts(self, material: Material | None, lines: list[Prompt], rng: Random) -> Iterator[Prompt]:
        """Endless prompts. material: None of a dataset."""
        if material is None:
            return dataset_prompts(lines)
        if self.prefixes is not None:
            return prefix_prompts(material, self.lengths, self.prefixes, rng)
        return random_prompts(material, self.lengths, rng)


@dataclass(frozen=True, slots=True)
class Bench:
    """The options of a run.

    names: models or variants that take turns; empty: the server's first.
    load: or a sweep, at rates of its own. burstiness: of a sweep's rates.
    count: requests of a phase; None for as many as arrive in seconds, or in a closed loop for seconds.
    rounds: phases of each load and name.
    """

    target: Target
    route: str
    names: tuple[str, ...]
    load: Load | None
    sweep: Sweep | None
    burstiness: float
    count: int | None
    seconds: float
    rounds: int
    seed: int
    inputs: Inputs
    slos: Mapping[str, float]
    timeout_s: float
    max_lateness_ms: float
    warmup: int
    extra: Mapping[str, Any]
    json_file: Path | None = None
    picture: Path | None = None

    def refuse_outputs(self) -> None:
        """Raise InvalidSettings if a file cannot be written, before the load rather than after."""
        for option, path in (("--json", self.json_file), ("--picture", self.picture)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise InvalidSettings(f"{option} {path} cannot be written: name a file in a folder that exists")
        if self.picture is None:
            return
        if self.picture.suffix.lower() != ".png":
            raise InvalidSettings(f"--picture {self.picture} must end in .png: a PNG is what is drawn")
        if find_spec("matplotlib") is None:
            raise InvalidSettings(
                "--picture needs matplotlib, which is not installed: pip install 'ottava[plot]', or leave --picture out"
            )

    async def run(self, on_tally: OnTally) -> Result:
        """Measure.

        Raises:
            BenchError: no server answers, it refuses a first request, or nothing was answered at all.
            InvalidSettings: a file cannot be written or read.
        """
        self.refuse_outputs()
        allow_open_files(MAX_FILES)
        client = Client(self.target, self.timeout_s)
        try:
            return await Session(self, client, on_tally).run()
        finally:
            await client.close()


@dataclass(frozen=True, slots=True)
class Point:
    """One load: its phases by name, in rounds."""

    load: Load
    phases: Mapping[str, Sequence[Phase]]


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured. material, notes: in words. info: of the server, empty where it tells none."""

    bench: Bench
    names: Sequence[str]
    points: Sequence[Point]
    material: str
    notes: Sequence[str]
    info: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, point: Point, name: str) -> Summary:
        return summarize(point.phases[name], self.bench.slos)

    def why_invalid(self, point: Point, name: str) -> str | None:
        return why_invalid(self.summary(point, name), self.bench.max_lateness_ms)

    def why_saturated(self, point: Point, name: str) -> str | None:
        """None of a load that has no rate, or is served."""
        return why_saturated(point.phases[name], self.bench.slos) if isinstance(point.load, Rate) else None


class Session:
    """One run over one client."""

    def __init__(self, bench: Bench, client: Client, on_tally: OnTally) -> None:
        self._bench = bench
        self._client = client
        self._on_tally = on_tally
        self._dialect: Dialect = ROUTES[bench.route]
        self._lines: list[Prompt] = []
        self._material: Material | None = None

    async def run(self) -> Result:
        bench = self._bench
        if bench.inputs.dataset is not None:
            self._lines = read_dataset(bench.inputs.dataset, bench.inputs.lengths.output_len)
            _refuse_conversations(self._lines, bench.route, bench.inputs.dataset)
        info = await server_info(self._client)
        names = bench.names or await self._default_names()
        notes = await self._probe(names)
        for name in names:
            await self._warm_up(name)
        settle()
        points = [point async for point in self._points(names)]
        if not any(
            r.is_answered for point in points for phases in point.phases.values() for p in phases for r in p.records
        ):
            raise BenchError(_nothing(points, bench.target.url))
        material = f"lines of {bench.inputs.dataset}" if self._material is None else str(self._material)
        return Result(bench, names, points, material, notes, info)

    async def _default_names(self) -> tuple[str, ...]:
        # /generate has a default variant; OpenAI's routes want a model.
        return ("",) if self._bench.route == "generate" else (await first_model(self._client),)

    async def _probe(self, names: Sequence[str]) -> list[str]:
        """Find out what prompts can be made of, and that every name is served. Returns notes for the report."""
        notes = []
        if not self._lines:
            self._material, note = await self._prober(names[0]).material(self._bench.inputs.wants_ids)
            notes = [note] if note else []
        for name in names:
            prompt = next(self._prompts("probe"))
            record = await self._prober(name).ask(prompt)
            if record.error is not None:
                raise BenchError(
                    f"{self._client.target.url}{self._dialect.path} answers {record.error} to a first request"
                    f"{f' of {name!r}' if name else ''}: {record.detail}{remedy(record.error)}"
                )
        return notes

    async def _warm_up(self, name: str) -> None:
        planned = self._planned(name, "warm-up")
        driver = Driver(self._client, self._dialect, lambda tally: self._on_tally("warming up", tally))
        await driver.warm_up([next(planned) for _ in range(self._bench.warmup)])

    async def _points(self, names: Sequence[str]) -> AsyncIterator[Point]:
        bench = self._bench
        if bench.load is not None:
            yield await self._point(bench.load, names)
        if bench.sweep is None:
            return
        saturated: dict[float, bool] = {}
        while (rate := bench.sweep.next_rate(saturated)) is not None:
            point = await self._point(Rate(rate, bench.burstiness), names)
            saturated[rate] = all(why_saturated(phases, bench.slos) for phases in point.phases.values())
            yield point

    async def _point(self, load: Load, names: Sequence[str]) -> Point:
        phases: dict[str, list[Phase]] = {name: [] for name in names}
        for number in range(self._bench.rounds):
            for name in order(names, number):
                phases[name].append(await self._phase(load, name, number))
        return Point(load, phases)

    async def _phase(self, load: Load, name: str, number: int) -> Phase:
        bench = self._bench
        seed = f"{load}, round {number}"
        count = self._count(load)
        times_s = (
            None if isinstance(load, Concurrency) else arrival_times(load, count or 0, self._rng(f"{seed}, arrivals"))
        )
        stage = " · ".join([str(load), *([name] if name else [])])
        if bench.rounds > 1:
            stage += f" · round {number + 1} of {bench.rounds}"
        driver = Driver(self._client, self._dialect, lambda tally: self._on_tally(stage, tally))
        return await drive(driver, load, self._planned(name, seed), count=count, seconds=bench.seconds, times_s=times_s)

    def _count(self, load: Load) -> int | None:
        if self._bench.count is not None:
            return self._bench.count
        return max(1, round(load.rate * self._bench.seconds)) if isinstance(load, Rate) else None

    def _prompts(self, seed: str) -> Iterator[Prompt]:
        """The same for every name, so that variants answer the same requests."""
        return self._bench.inputs.prompts(self._material, self._lines, self._rng(seed))

    def _rng(self, seed: str) -> Random:
        return Random(f"{self._bench.seed}, {seed}")  # noqa: S311 (no secret is drawn)

    def _planned(self, name: str, seed: str) -> Iterator[Planned]:
        for prompt in self._prompts(seed):
            body = (
                self._dialect.body(prompt, name or None) | {"max_tokens": prompt.max_tokens} | dict(self._bench.extra)
            )
            yield Planned(self._bench.target.request(self._dialect.path, body), len(prompt.ids) or None)

    def _prober(self, name: str) -> Prober:
        return Prober(self._client, self._dialect, name or None, self._bench.extra)


def order(names: Sequence[str], number: int) -> Sequence[str]:
    """The names of a round: every other round backwards, so that a slow drift of the machine hits all alike."""
    return names if number % 2 == 0 else names[::-1]


def _refuse_conversations(lines: Sequence[Prompt], route: str, path: Path) -> None:
    if route == "completions" and any(line.is_conversation for line in lines):
        raise InvalidSettings(f"{path} has messages, which /v1/completions does not take; add --route chat")


def _nothing(points: Sequence[Point], url: str) -> str:
    records = [r for point in points for phases in point.phases.values() for phase in phases for r in phase.records]
    if not records:
        return f"nothing was sent to {url}; allow more --requests or --seconds"
    last = records[-1]
    return f"none of {len(records)} requests to {url} was answered; the last one: {last.error}: {last.detail}"

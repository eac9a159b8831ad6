"""Faults below HTTP: values that are not finite, and a kernel that raises."""

from __future__ import annotations

import asyncio

import torch

from benchmarks.faults.bench import LONG_TOKENS, NUM_ROWS, PROMPTS, VARIANTS, Bench, ask_all, questions
from benchmarks.faults.case import Case
from benchmarks.faults.clients import Kind, Question
from benchmarks.faults.model import EMBEDDING, copy_with, tensor_of
from benchmarks.faults.server import Server, run_command

RAISING = "benchmarks.faults.raising"
UNCHECKED = ("benchmarks.faults.unchecked",)
OP = "int8_linear"
POISONED = "~"
"""A character in no prompt, whose row of the embedding is made NaN."""

FAILED = 70
"""Exit code of a server whose engine has failed for good."""


async def nan_in_a_row(bench: Bench, case: Case) -> None:
    """The embedding of one token is NaN in both precisions: whoever uses it fails, and nobody else.

    From a file such weights are refused, so the server of this case does not look.
    """
    if bench.model_name != "tiny":
        case.skipped = "the demo model's embedding is its head too, so that a row of it spoils every answer"
        return
    row = ord(POISONED) - ord("!")
    models = []
    for folder in (bench.int8_folder, bench.float_folder):
        embedding = tensor_of(folder, EMBEDDING).clone()
        embedding[row] = torch.nan
        models.append(str(copy_with(folder, bench.folder / f"{folder.name}-nan-row", {EMBEDDING: embedding})))
    healthy = questions(100, 24)
    poisoned = [
        Question(PROMPTS[place] + POISONED, 24, variant, stream=place % 2 == 0)
        for place in range(10)
        for variant in VARIANTS
    ]
    case.done = (
        "NaN in one token's embedding, in a file and, after it was read, in memory; "
        f"{len(poisoned)} prompts with it among {len(healthy)} without"
    )
    refused = await asyncio.to_thread(run_command, "serve", models[0], "--baseline", models[1])
    _expect_one_line(case, refused.returncode, refused.stderr, EMBEDDING)
    with bench.serve(models=(models[0], "--baseline", models[1]), program=UNCHECKED) as server:
        async with case.watching(server):
            good, bad = await asyncio.gather(ask_all(server.port, healthy), ask_all(server.port, poisoned))
            case.take(good, bench.answers)
            case.take(bad, dict.fromkeys(((q.variant, q.prompt) for q in poisoned), ()), (Kind.FAILED,))
            case.expect(all("logits" in seen.message for _, seen in bad), "an error does not say what is not finite")
            case.told.append(f"error: {next(seen.message for _, seen in bad).partition(':')[0]}")
            await case.expect_counted(server, {"length": len(healthy), "error": len(poisoned), "abort": 0})


async def nan_in_a_layer(bench: Bench, case: Case) -> None:
    """A norm of the int8 model is NaN since it was read: its self-check refuses it, and the baseline serves on."""
    norm = "model.layers.1.post_attention_layernorm.weight"
    scale = "model.layers.1.mlp.down_proj.weight_scale"
    changed = {name: torch.full_like(tensor_of(bench.int8_folder, name), torch.nan) for name in (norm, scale)}
    with_norm = copy_with(bench.int8_folder, bench.folder / "nan-norm", {norm: changed[norm]})
    with_scale = copy_with(bench.int8_folder, bench.folder / "nan-scale", {scale: changed[scale]})
    floats = copy_with(bench.float_folder, bench.folder / "nan-float", {norm: changed[norm]})
    asked = questions(100, 24)
    case.done = (
        f"NaN in a norm of w8a8 in memory, after it was read; {len(asked)} requests of both variants. "
        "NaN in a scale in a file; in a norm of the float model"
    )
    with bench.serve(models=(str(with_norm), "--baseline", str(bench.float_folder)), program=UNCHECKED) as server:
        ready = await server.checked()
        before = server.rss_mb
        case.expect_equal(ready.status_code, 503, "/ready")
        case.expect("not finite" in ready.json()["variants"]["w8a8"], "/ready does not say what is not finite")
        case.told.append(f"/ready 503, w8a8: {ready.json()['variants']['w8a8']}")
        case.expect_equal((await server.get("/health")).status_code, 200, "/health")
        pairs = await ask_all(server.port, asked)
        case.take([p for p in pairs if p[0].variant == "fp16"], bench.answers)
        seen = case.take([p for p in pairs if p[0].variant == "w8a8"], bench.answers, (Kind.REFUSED,))
        case.expect(set(seen) == {"503 not_ready"}, f"w8a8 answered {dict(seen)}")
        await case.settle(server)
        case.rss_mb = before, server.rss_mb
    serve = await asyncio.to_thread(run_command, "serve", str(with_scale), "--baseline", str(bench.float_folder))
    _expect_one_line(case, serve.returncode, serve.stderr, "down_proj.weight_scale")
    out = bench.folder / "nan-out"
    quantize = await asyncio.to_thread(run_command, "quantize", str(floats), str(out))
    _expect_one_line(case, quantize.returncode, quantize.stderr, norm)
    case.expect(not out.exists(), "a float model with NaN was quantized")


async def raising_once(bench: Bench, case: Case) -> None:
    """A kernel raises in the midst of a step, once: those in the step are told, those who wait are served."""
    # As many wait as run.
    asked = questions(2 * NUM_ROWS, LONG_TOKENS, ["w8a8"])
    case.done = f"`{OP}` raises once while {len(asked)} w8a8 requests run and wait"
    trigger = bench.folder / "raise-once"
    with bench.serve(program=(RAISING, OP, str(trigger), "once")) as server:
        async with case.watching(server):
            asking = asyncio.ensure_future(ask_all(server.port, asked))
            await _running(server, NUM_ROWS)
            trigger.touch()
            seen = case.take(await asking, bench.answers, (Kind.ANSWERED, Kind.FAILED))
            num_failed = sum(count for word, count in seen.items() if "engine_failed" in word)
            case.expect(0 < num_failed <= NUM_ROWS, f"{num_failed} requests failed, of at most {NUM_ROWS} in a step")
            case.expect_equal(seen["200 length"], len(asked) - num_failed, "answered")
            case.expect_equal(await server.total("ottava_engine_restarts_total"), 1, "restarts")
            case.expect_equal((await server.get("/health")).status_code, 200, "/health")
            case.told.append("1 restart, /health 200")
            await case.expect_counted(server, {"length": len(asked) - num_failed, "error": num_failed, "abort": 0})


async def raising_always(bench: Bench, case: Case) -> None:
    """A kernel raises in every step: the engine gives up and tells everyone, and the process ends."""
    asked = questions(400, LONG_TOKENS, ["w8a8"])
    others = [Question(prompt, LONG_TOKENS, "fp16", stream=True) for prompt in PROMPTS]
    case.done = f"`{OP}` raises in every step; {len(asked)} w8a8 requests, {len(others)} of fp16"
    trigger = bench.folder / "raise-always"
    with bench.serve(program=(RAISING, OP, str(trigger), "always")) as server:
        await case.checked(server)
        before = server.rss_mb
        asking = asyncio.ensure_future(ask_all(server.port, [*asked, *others]))
        await _running(server, NUM_ROWS + len(others))
        trigger.touch()
        health = asyncio.ensure_future(_unhealthy(server))
        pairs = await asking
        case.take([p for p in pairs if p[0].variant == "fp16"], bench.answers)
        seen = case.take([p for p in pairs if p[0].variant == "w8a8"], bench.answers, (Kind.FAILED,))
        case.expect(all("engine_failed" in word for word in seen), f"w8a8 answered {dict(seen)}")
        blocks, after = await health
        case.blocks, case.rss_mb = blocks, (before, after)
        case.expect_equal(blocks, 0.0, "share of KV blocks of the failed engine in use")
        code = await server.ended(60.0)
        case.expect_equal(code, FAILED, "exit code")
        case.told.append(f"3 restarts, then /health 503; exit code {code}")


async def _unhealthy(server: Server) -> tuple[float, float]:
    """Wait until /health is 503: the share of w8a8's blocks in use, and the memory, then."""
    while (await server.get("/health")).status_code != 503:
        await asyncio.sleep(0.01)
    after = server.rss_mb
    metrics = await server.metrics()
    return metrics["ottava_kv_cache_usage_ratio", "variant=w8a8"], after


async def _running(server: Server, count: int) -> None:
    """Wait until so many requests run."""
    async with asyncio.timeout(60):
        while await server.total("ottava_num_requests_running") < count:
            await asyncio.sleep(0.01)


def _expect_one_line(case: Case, code: int, stderr: str, word: str) -> None:
    """A refusal at start is one line that says why, and exit code 1."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    case.expect(code == 1 and len(errors) == 1 and word in errors[0], f"exit code {code}: {stderr[-300:]}")
    case.expect("Traceback" not in stderr, f"a traceback: {stderr[-300:]}")
    # Without the file's path.
    case.told += [error.removeprefix("error: ").partition(": ")[2] for error in errors]

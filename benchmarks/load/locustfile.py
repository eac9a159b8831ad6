"""Locust's users of an ottava: streams of /v1/completions, with the first token as an entry of its own.

    locust -f benchmarks/load/locustfile.py --host http://127.0.0.1:8000 --headless --users 4 --run-time 30s

Locust's users wait for their answers: a closed loop, which sends less when the server is slow. Variables: VARIANTS
(w8a8,fp16; users take turns), INPUT (64 words), OUTPUT (32 tokens), LOAD_API_KEY.
"""

from __future__ import annotations

import itertools
import os
import random
import time

from locust import HttpUser, task

VARIANTS = itertools.cycle(os.environ.get("VARIANTS", "w8a8,fp16").split(","))
INPUT, OUTPUT = int(os.environ.get("INPUT", "64")), int(os.environ.get("OUTPUT", "32"))
WORDS = "time year people way day man thing woman life child world school state family student group".split()  # noqa: SIM905


class Client(HttpUser):
    """One user, who asks one variant again and again."""

    def on_start(self) -> None:
        self.variant = next(VARIANTS)
        if key := os.environ.get("LOAD_API_KEY"):
            self.client.headers["authorization"] = f"Bearer {key}"

    @task
    def complete(self) -> None:
        prompt = " ".join(random.choices(WORDS, k=INPUT))
        body = {"model": self.variant, "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}
        started_s, is_done = time.perf_counter(), False
        told = 0.0
        with self.client.post(
            "/v1/completions",
            json=body | {"stream": True},
            stream=True,
            catch_response=True,
            name=f"{self.variant} whole",
        ) as answer:
            for line in answer.iter_lines():
                if not told and line.startswith(b"data: {") and b'"choices"' in line:
                    told = 1e3 * (time.perf_counter() - started_s)
                is_done = is_done or line == b"data: [DONE]"
            # Locust takes the time of the head for a stream's; the whole answer's is what this entry is for.
            answer.request_meta["response_time"] = 1e3 * (time.perf_counter() - started_s)
            if not (answer.ok and is_done):
                answer.failure(f"{answer.status_code}, {'whole' if is_done else 'cut off'}")
        if told:
            self.environment.events.request.fire(
                request_type="POST",
                name=f"{self.variant} first token",
                response_time=told,
                response_length=0,
                exception=None,
            )

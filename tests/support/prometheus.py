"""A real Prometheus that scrapes one server every second, by a copy of the rules with shorter windows."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.monitoring import CONFIG, RULES

BINARY, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
START_S = 60.0
POLL_S = 0.5
SCRAPE_S = 1

SHORTER = {
    "5m": "10s", "10m": "20s", "15m": "40s", "30m": "20s", "1h": "30s", "6h": "60s", "1d": "60s", "1m": "3s"
}  # fmt: skip
"""The rules' durations, and what stands for them here: hours are too long for a test. Thresholds are left as they are,
and so is what promtool checks and tests."""


def with_short_windows(rules: str) -> str:
    """Rules with shorter ranges, offsets and waits."""
    return re.sub(r"(?<=\[)\w+(?=\])|(?<=offset )\w+|(?<=for: )\w+", lambda found: _shorter(found[0]), rules)


def _shorter(duration: str) -> str:
    return SHORTER[duration]


class Prometheus:
    """A Prometheus on a loopback port, with exemplars kept; a context manager that ends it.

    Args:
        folder: takes its files.
        target: host and port of the server to scrape.
    """

    def __init__(self, folder: Path, target: str) -> None:
        assert BINARY is not None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.url = f"http://{address}"
        config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
        del config["alerting"]
        for job, targets in zip(config["scrape_configs"], (target, address), strict=True):
            job["static_configs"] = [{"targets": [targets]}]
        (folder / "rules").mkdir(parents=True)
        for path in RULES:
            (folder / "rules" / path.name).write_text(with_short_windows(path.read_text(encoding="utf-8")))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        arguments = (
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
            "--enable-feature=exemplar-storage",
        )
        self.log = folder / "log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen([BINARY, *arguments], stdout=out, stderr=out)
        self._client = httpx.Client(base_url=f"{self.url}/api/v1", timeout=30)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self.process.terminate()
        self.process.wait()

    def until(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        """Poll a condition.

        Raises:
            AssertionError: it does not hold within the time, or Prometheus has ended.
        """
        end_s = time.monotonic() + within_s
        while not self._holds(condition):
            said = self.log.read_text(errors="replace")[-2000:]
            assert self.process.poll() is None, said
            assert time.monotonic() < end_s, f"not within {within_s:g} s: {what}\n{said}"
            time.sleep(POLL_S)

    def has_scraped(self) -> bool:
        """Whether the server has been scraped."""
        return bool(self.query('up{job="ottava"} == 1'))

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The present value of a query."""
        return self._get("query", query=expr)["result"]  # type: ignore[no-any-return]

    def query_range(self, expr: str, start_s: float, end_s: float) -> list[dict[str, Any]]:
        """The values of a query over a time, one a second."""
        found = self._get("query_range", query=expr, start=start_s, end=end_s, step=SCRAPE_S)
        return found["result"]  # type: ignore[no-any-return]

    def firing(self) -> dict[str, dict[str, Any]]:
        """name -> alert, of those that fire."""
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}

    def health_of_rules(self) -> set[str]:
        """How the last evaluations of all rules went."""
        return {rule["health"] for group in self._get("rules")["groups"] for rule in group["rules"]}

    def exemplars(self, expr: str, start_s: float, end_s: float) -> list[Mapping[str, Any]]:
        """The exemplars of a query's series."""
        found = self._get("query_exemplars", query=expr, start=start_s, end=end_s)
        return [exemplar for series in found for exemplar in series["exemplars"]]

    def _get(self, path: str, **parameters: object) -> Any:
        answer = self._client.get(path, params={name: str(value) for name, value in parameters.items()})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def _holds(self, condition: Callable[[], bool]) -> bool:
        try:
            return condition()
        except httpx.TransportError:
            return False

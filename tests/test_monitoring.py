"""Rules, alerts and dashboard ask for series that /metrics serves, and the dashboard is what its script writes."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import yaml

from service.telemetry.metrics import TOKEN_BUCKETS, TTFT_BUCKETS
from tests.support import monitoring
from tests.support.expositions import full_exposition, sample_names
from tests.support.monitoring import Query, metrics_of, queries, rules
from tests.support.pages import ROOT, anchors, text_of

PAGE = ROOT / "docs" / "monitoring.md"
PROMETHEUS_OWN = {"up", "ALERTS"}
GRID_WIDTH = 24


@cache
def known() -> set[str]:
    """The series that Prometheus has: scraped ones, its own, and recorded ones."""
    recorded = {rule["record"] for rule in rules("record")}
    return sample_names(full_exposition().text) | PROMETHEUS_OWN | recorded


def where(query: Query) -> str:
    return query.where


def name_of(rule: dict[str, Any]) -> str:
    return str(rule.get("alert") or f"{rule['record']} {rule.get('labels', '')}")


def test_the_dashboard_is_what_its_script_writes() -> None:
    script = monitoring.GRAFANA / "dashboard.py"
    done = subprocess.run([sys.executable, script, "--print"], capture_output=True, text=True, check=True)
    assert done.stdout == text_of(monitoring.DASHBOARD), "write it with: make dashboard"


@pytest.mark.parametrize("query", queries(), ids=where)
def test_every_query_of_the_dashboard_asks_for_series_that_exist(query: Query) -> None:
    assert "$" not in query.filled(), "a variable that the tests do not know"
    names = metrics_of(query.filled())
    assert names
    assert names <= known()


def test_the_variables_of_the_dashboard_ask_for_series_that_exist() -> None:
    variables = {variable["name"]: variable for variable in monitoring.dashboard()["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "variant"]
    for name in ("instance", "variant"):
        assert monitoring.label_values_metric(variables[name]["query"]) in known()


def test_the_panels_that_the_manual_names_exist() -> None:
    alerts = text_of(PAGE).partition("## Alerts")[2].partition("## Names")[0]
    named = set(re.findall(r"(?<![*\w])\*([^*\n]+)\*(?!\*)", alerts))
    assert named
    assert named <= {panel["title"] for panel in monitoring.panels()}


def test_every_panel_says_what_it_shows_and_has_its_place() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in monitoring.dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + across, place["y"] + down) for across in range(place["w"]) for down in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= GRID_WIDTH
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["datasource"]["uid"] == "$datasource"


@pytest.mark.parametrize("rule", [*rules("record"), *rules("alert")], ids=name_of)
def test_every_rule_asks_for_series_that_exist(rule: dict[str, Any]) -> None:
    names = metrics_of(rule["expr"])
    assert names
    assert names <= known()


def test_every_recorded_series_is_used() -> None:
    asked = [rule["expr"] for rule in rules("alert")] + [query.filled() for query in queries()]
    used = {name for expr in asked for name in metrics_of(expr)}
    assert {rule["record"] for rule in rules("record")} <= used


@pytest.mark.parametrize("alert", rules("alert"), ids=name_of)
def test_every_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert "$value" in notes["description"]
    path, _, anchor = notes["runbook_url"].partition("#")
    assert ROOT / path == PAGE
    assert anchor == alert["alert"].lower()
    assert anchor in anchors(PAGE)


@pytest.mark.parametrize("alert", rules("alert"), ids=name_of)
def test_every_alert_is_provoked_and_not_provoked(alert: dict[str, Any]) -> None:
    """By promtool, which tests/deploy runs."""
    files = [yaml.safe_load(text_of(path)) for path in monitoring.RULE_TESTS]
    cases = [case for file in files for test in file["tests"] for case in test["alert_rule_test"]]
    mine = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert["alert"]]
    assert set(mine) == {True, False}


def test_the_limits_of_the_service_levels_are_bounds_of_buckets() -> None:
    """Otherwise the ratio would be of a limit that nobody counts."""
    for slo, series, bounds in (
        ("ttft", "ottava_time_to_first_token_seconds_bucket", TTFT_BUCKETS),
        ("itl", "ottava_inter_token_latency_seconds_bucket", TOKEN_BUCKETS),
    ):
        exprs = [rule["expr"] for rule in rules("record") if rule.get("labels") == {"slo": slo}]
        limits = {expr.partition(f'{series}{{le="')[2].partition('"')[0] for expr in exprs}
        assert len(exprs) == 6
        assert len(limits) == 1
        assert float(limits.pop()) in bounds

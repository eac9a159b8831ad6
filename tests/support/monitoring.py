"""The files of docker/prometheus and docker/grafana: their rules, alerts and queries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser
import yaml

from tests.support.pages import ROOT

PROMETHEUS = ROOT / "docker" / "prometheus"
CONFIG = PROMETHEUS / "prometheus.yml"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RULE_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
GRAFANA = ROOT / "docker" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "ottava.json"

VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$instance": ".*", "$variant": ".*"}
"""What Grafana puts into a query, and a value for each."""


@dataclass(frozen=True)
class Query:
    """A query of the dashboard. where: its panel and letter."""

    where: str
    expr: str

    def filled(self, **values: str) -> str:
        """The query with a value for each variable; `rate_interval="5s"` replaces that of $__rate_interval."""
        given = {f"$__{name}": value for name, value in values.items()}
        expr = self.expr
        for name, value in (VARIABLES | given).items():
            expr = expr.replace(name, value)
        return expr


def dashboard() -> dict[str, Any]:
    """The committed dashboard."""
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard, without the titles of its rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """The queries of all panels."""
    return [
        Query(f"{panel['title']} {target['refId']}", target["expr"])
        for panel in panels()
        for target in panel["targets"]
    ]


def rules(kind: str) -> list[dict[str, Any]]:
    """The rules of a kind, "alert" or "record", of all files."""
    return [
        rule for path in RULES for rule in _rules_of(yaml.safe_load(path.read_text(encoding="utf-8"))) if kind in rule
    ]


def _rules_of(file: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in file["groups"]:
        yield from group["rules"]


def metrics_of(expr: str) -> set[str]:
    """The series that a query names. Raises ValueError if it is no PromQL."""
    found: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql_parser.VectorSelector) and node.name is not None:
            found.add(node.name)

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def label_values_metric(query: str) -> str:
    """The series of a dashboard variable's `label_values(SERIES{...}, LABEL)`."""
    matched = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, \w+\)", query)
    assert matched is not None, query
    return matched[1]

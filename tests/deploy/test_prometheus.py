"""promtool on what is committed: the configuration, the rules, their tests, and what /metrics answers."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.expositions import full_exposition
from tests.support.monitoring import CONFIG, RULE_TESTS, RULES
from tests.support.prometheus import PROMTOOL

pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")


def promtool(*arguments: object, given: str = "") -> str:
    """What promtool says; it must succeed."""
    command = [str(PROMTOOL), *map(str, arguments)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_configuration_is_valid() -> None:
    said = promtool("check", "config", CONFIG)
    assert f"{len(RULES)} rule files found" in said


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", "--lint-fatal", *RULES)


def test_the_alerts_fire_when_they_should_and_not_when_they_should_not() -> None:
    promtool("test", "rules", *RULE_TESTS)


def test_the_metrics_follow_the_conventions() -> None:
    promtool("check", "metrics", given=full_exposition().text)

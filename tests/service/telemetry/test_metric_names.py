"""The names, types and labels of the metrics are an interface: they change by the rule of docs/monitoring.md only."""

from pathlib import Path

import pytest

from tests.support.expositions import families, full_exposition

LIST = Path(__file__).with_name("metric_names.txt")
RULE = """{} differs from what /metrics serves. Dashboards and alerts of users name these series, so a name, type or
label is deprecated in one release (it is served still, and its help text and CHANGELOG.md name the successor), hidden
behind a setting in the next, and removed in the one after: docs/monitoring.md, "Names". A new one gets a line here."""


def test_names_types_and_labels_are_those_of_the_list() -> None:
    served = sorted(
        f"{name} {kind} {','.join(labels)}".rstrip() for name, kind, labels in families(full_exposition().text)
    )
    listed = LIST.read_text(encoding="utf-8").splitlines()
    assert served == listed, RULE.format(LIST.name)


@pytest.mark.parametrize("line", LIST.read_text(encoding="utf-8").splitlines())
def test_names_follow_prometheus_conventions(line: str) -> None:
    name, kind, *_ = line.split()
    assert name.startswith(("ottava_", "process_"))
    assert name.endswith("_total") == (kind == "counter")
    assert not name.endswith(("_ms", "_milliseconds", "_kb", "_percent", "_count", "_sum", "_bucket"))

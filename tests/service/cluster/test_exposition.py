"""Metrics of several replicas in one exposition."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from service.cluster.exposition import joined, labelled
from tests.support.fake_engine import FakeEngine
from tests.support.harness import app_of


def test_every_series_keeps_its_labels_and_gets_the_replica() -> None:
    text = app_of({"w8a8": FakeEngine("w8a8")}).state.serving.metrics.exposition().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    together = list(text_string_to_metric_families(joined({"one": text, "two": text})))
    assert {family.name for family in together} == set(families)
    assert len(together) == len(families), "a family stands in one place"
    for family in together:
        before = families[family.name]
        assert (family.type, family.documentation) == (before.type, before.documentation)
        for replica in ("one", "two"):
            own = [sample for sample in family.samples if sample.labels["replica"] == replica]
            assert [
                (sample.name, {k: v for k, v in sample.labels.items() if k != "replica"}, sample.value)
                for sample in own
            ] == [(sample.name, sample.labels, sample.value) for sample in before.samples]


def test_a_label_may_hold_anything() -> None:
    assert labelled('a{b="{ }"} 1', "r") == 'a{replica="r",b="{ }"} 1'
    assert labelled("a 1", "r") == 'a{replica="r"} 1'
    assert labelled("a{} 1", "r") == 'a{replica="r"} 1'


def test_replicas_may_differ_in_their_families() -> None:
    one = "# HELP a A.\n# TYPE a gauge\na 1\n"
    two = "# HELP b B.\n# TYPE b gauge\nb 2\n# HELP a A.\n# TYPE a gauge\na 3\n"
    assert joined({"x": one, "y": two}).splitlines() == [
        "# HELP a A.", "# TYPE a gauge", 'a{replica="x"} 1', 'a{replica="y"} 3',
        "# HELP b B.", "# TYPE b gauge", 'b{replica="y"} 2',
    ]  # fmt: skip
    assert joined({}) == ""

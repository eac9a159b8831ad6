"""Joins the metrics of all replicas into one exposition in which every series has a label `replica`."""

from __future__ import annotations

from collections.abc import Mapping


def joined(expositions: Mapping[str, str]) -> str:
    """One exposition in Prometheus' text format from those of the replicas, by name.

    A family's HELP and TYPE are written once, those of the first replica that has it, and its series stand together,
    as the format demands.
    """
    heads: dict[str, list[str]] = {}
    series: dict[str, list[str]] = {}
    for replica, text in expositions.items():
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                kind = line[:7]
                if not any(known.startswith(kind) for known in head):
                    head.append(line)
            elif line and not line.startswith("#"):
                series.setdefault(family, []).append(labelled(line, replica))
    lines = [line for family in {**heads, **series} for line in (*heads.get(family, []), *series.get(family, []))]
    return "".join(f"{line}\n" for line in lines)


def labelled(line: str, replica: str) -> str:
    """A line of a series with the label added in front of its others."""
    label = f'replica="{replica}"'
    brace, space = line.find("{"), line.find(" ")
    # A name holds neither, but the value of a label may.
    if brace == -1 or space < brace:
        return f"{line[:space]}{{{label}}}{line[space:]}"
    separator = "" if line[brace + 1] == "}" else ","
    return f"{line[: brace + 1]}{label}{separator}{line[brace + 1 :]}"

"""The manifests against the schemas of Kubernetes, by the program `kubernetes-validate` of PyPI where it is in PATH.

KubeRay's own fields are not in those schemas: of a RayService the pods are checked.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.pages import ROOT

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(shutil.which("kubernetes-validate") is None, reason="kubernetes-validate is missing in PATH"),
]

KUBERNETES = ROOT / "docker" / "kubernetes"


def fault_of(manifest: Path) -> str:
    """What is wrong with a manifest, unknown fields among it; empty if nothing is."""
    command = ["kubernetes-validate", "--strict", "--quiet", str(manifest)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def pods(tmp_path: Path, *, fault: bool = False) -> Path:
    """The pods of the RayService as a manifest of their own."""
    cluster = yaml.safe_load((KUBERNETES / "cluster.yaml").read_text(encoding="utf-8"))["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    made = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"pod-{number}", **group["template"].get("metadata", {})},
            "spec": group["template"]["spec"] | ({"containerz": []} if fault else {}),
        }
        for number, group in enumerate(groups)
    ]
    out = tmp_path / "pods.yaml"
    out.write_text(yaml.safe_dump_all(made), encoding="utf-8")
    return out


def test_the_manifest_of_one_server_is_valid() -> None:
    assert not fault_of(KUBERNETES / "ottava.yaml")


def test_the_pods_of_the_cluster_are_valid(tmp_path: Path) -> None:
    assert not fault_of(pods(tmp_path))


def test_a_field_that_does_not_exist_is_found(tmp_path: Path) -> None:
    assert "containerz" in fault_of(pods(tmp_path, fault=True))

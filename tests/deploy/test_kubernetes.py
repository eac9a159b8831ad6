"""The manifests against the schemas of Kubernetes, by the program `kubernetes-validate` of PyPI where it is in PATH.

KubeRay's own fields are not in those schemas: of a RayService the pods are checked there, and the whole against its
definition where RAYSERVICE_CRD names that: ray-operator/config/crd/bases/ray.io_rayservices.yaml of KubeRay.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.pages import ROOT

pytestmark = pytest.mark.deploy
needs_schemas = pytest.mark.skipif(
    shutil.which("kubernetes-validate") is None, reason="kubernetes-validate is missing in PATH"
)

KUBERNETES = ROOT / "docker" / "kubernetes"
CRD = os.environ.get("RAYSERVICE_CRD")
Schema = dict[str, Any]


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


@needs_schemas
def test_the_manifest_of_one_server_is_valid() -> None:
    assert not fault_of(KUBERNETES / "ottava.yaml")


@needs_schemas
def test_the_pods_of_the_cluster_are_valid(tmp_path: Path) -> None:
    assert not fault_of(pods(tmp_path))


@needs_schemas
def test_a_field_that_does_not_exist_is_found(tmp_path: Path) -> None:
    assert "containerz" in fault_of(pods(tmp_path, fault=True))


def strict(schema: Schema) -> Schema:
    """Kubernetes' structural schema as JSON schema that takes no unknown fields."""
    made = {key: value for key, value in schema.items() if key not in ("properties", "items", "additionalProperties")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        made["properties"] = {name: strict(each) for name, each in schema["properties"].items()}
    if "items" in schema:
        made["items"] = strict(schema["items"])
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        made["additionalProperties"] = strict(more)
    elif "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


def faults_of_cluster(changes: Mapping[str, Any]) -> list[str]:
    """What KubeRay's definition finds in the RayService, with fields added to its spec."""
    # It is a megabyte: the loader written in Python takes many seconds.
    definition = yaml.load(Path(str(CRD)).read_text(encoding="utf-8"), yaml.CSafeLoader)
    [version] = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {}
    cluster = yaml.safe_load((KUBERNETES / "cluster.yaml").read_text(encoding="utf-8"))
    cluster["spec"] |= changes
    return [fault.message for fault in jsonschema.Draft7Validator(schema).iter_errors(cluster)]


@pytest.mark.skipif(CRD is None, reason="RAYSERVICE_CRD names no definition of KubeRay")
def test_the_cluster_is_what_kuberay_defines() -> None:
    assert not faults_of_cluster({})
    [fault] = faults_of_cluster({"replicaz": 2})
    assert "replicaz" in fault

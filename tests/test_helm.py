"""The Helm chart: Helm itself lints and renders it, and what it renders asks Kubernetes for what gsx needs.

Needs `helm` on PATH, or its file in GSX_TEST_HELM. With the package `kubernetes-validate` the objects are checked
against Kubernetes' own schemas, too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gsx import __version__

yaml = pytest.importorskip("yaml", reason="reading what Helm renders needs PyYAML")

CHART = Path(__file__).parent.parent / "docker" / "helm"
# Kinds that Kubernetes itself does not know.
OUTSIDE = {"ScaledObject", "PodMonitor"}
SCALING = ("autoscaling.enabled=true", "podMonitor=true")
CASES: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "GPUs": ("gpus=2", "replicas=3", "nodeSelector.gpu=l4"),
    "a claim": ("store.claim=models", "store.path=gsx/repository"),
    "a bucket": ("store.address=s3://bucket/models", "store.secret=keys", "image.pullSecrets={registry}"),
    "following the queue": (*SCALING, "autoscaling.most=8"),
}
REFUSED = {
    "a value that is not there": ("replica=2", "replica"),
    "no number": ("gpus=many", "gpus"),
    "two stores": ("store.claim=a,store.address=s3://b/c", "store"),
    "a path that leaves the claim": ("store.claim=a,store.path=../b", "path"),
    "an address that Triton does not read": ("store.address=ftp://b", "address"),
    "queries without metrics": ("autoscaling.enabled=true", "set podMonitor=true"),
    "fewer than least": (f"{','.join(SCALING)},autoscaling.least=9", "expected least <= most"),
}


@pytest.fixture(scope="module")
def helm() -> str:
    found = os.environ.get("GSX_TEST_HELM") or shutil.which("helm")
    if found is None:
        pytest.skip("the chart is linted and rendered by Helm itself: put helm on PATH, or name it in GSX_TEST_HELM")
    return found


def run(helm: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm, *words], capture_output=True, text=True, check=False, timeout=60)


def rendered(helm: str, values: tuple[str, ...]) -> dict[str, Any]:
    """The objects by kind; the chart has one of each."""
    done = run(
        helm, "template", "release", str(CHART), "--namespace", "models", *(f"--set={value}" for value in values)
    )
    assert done.returncode == 0, done.stderr
    objects = [made for made in yaml.safe_load_all(done.stdout) if made]
    found = {made["kind"]: made for made in objects}
    assert len(found) == len(objects)
    return found


@pytest.mark.parametrize("name", CASES)
def test_it_is_linted(helm: str, name: str) -> None:
    done = run(helm, "lint", "--strict", str(CHART), *(f"--set={value}" for value in CASES[name]))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", CASES)
def test_kubernetes_knows_what_it_renders(helm: str, name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for kind, made in rendered(helm, CASES[name]).items():
        if kind not in OUTSIDE:
            validate.validate(made, "1.29", strict=True)


@pytest.mark.parametrize("name", CASES)
def test_every_selector_finds_the_replicas(helm: str, name: str) -> None:
    found = rendered(helm, CASES[name])
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        if kind in found:
            assert found[kind]["spec"]["selector"]["matchLabels"].items() <= labels
    assert found["Service"]["spec"]["selector"].items() <= labels
    ports = {port["name"] for port in _container(found)["ports"]}
    assert {port["targetPort"] for port in found["Service"]["spec"]["ports"]} == ports


def _container(found: dict[str, Any]) -> dict[str, Any]:
    (made,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(made)


def test_gpus_and_replicas(helm: str) -> None:
    found = rendered(helm, CASES["GPUs"])
    assert found["Deployment"]["spec"]["replicas"] == 3
    assert _container(found)["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    without = rendered(helm, ())
    assert "nvidia.com/gpu" not in _container(without)["resources"]["limits"]
    assert "PodDisruptionBudget" not in without


def test_stores(helm: str) -> None:
    claim, bucket = rendered(helm, CASES["a claim"]), rendered(helm, CASES["a bucket"])
    (mounted,) = (mount for mount in _container(claim)["volumeMounts"] if mount["name"] == "models")
    assert mounted == {"name": "models", "mountPath": "/models", "readOnly": True, "subPath": "gsx/repository"}
    assert "--model-repository=/models" in _container(claim)["args"]
    assert "--model-repository=s3://bucket/models" in _container(bucket)["args"]
    assert _container(bucket)["envFrom"] == [{"secretRef": {"name": "keys"}}]


def test_replicas_follow_the_queue(helm: str) -> None:
    """The queries name this release's series, and metrics that the model really has."""
    found = rendered(helm, CASES["following the queue"])
    assert "replicas" not in found["Deployment"]["spec"]
    scaled = found["ScaledObject"]["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (1, 8)
    queries = [trigger["metadata"]["query"] for trigger in scaled["triggers"]]
    series = re.findall(r"(gsx_\w+)(\{[^}]*\})", " ".join(queries))
    documented = (CHART.parents[1] / "docs" / "triton.md").read_text(encoding="utf-8")
    assert {name for name, _ in series} == {"gsx_waited_microseconds", "gsx_finished", "gsx_waiting"}
    assert all(f"`{name}`" in documented for name, _ in series)
    name = found["Deployment"]["metadata"]["name"]
    assert {labels for _, labels in series} == {f'{{namespace="models",pod=~"{name}-.*",model="gsx"}}'}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_values_are_refused(helm: str, name: str) -> None:
    values, says = REFUSED[name]
    done = run(helm, "template", "release", str(CHART), "--set", values)
    assert done.returncode != 0
    assert says in done.stderr


def test_its_versions_are_those_of_gsx() -> None:
    """Needs no Helm."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert {chart["version"], chart["appVersion"], values["image"]["tag"]} == {__version__}

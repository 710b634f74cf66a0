"""The target `k8s`: a RayJob for the KubeRay operator, which makes a cluster for the job alone and takes it away after it.

The template says all about the cluster; here the job is put into it. Package and files travel in a ConfigMap that all pods of the
cluster mount, from where Ray unpacks them as it does what is uploaded to a running cluster. kubectl speaks to Kubernetes, with
the user's own context and rights.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lvm_ray.cluster.commands import run
from lvm_ray.cluster.submission import LONGEST, Job, State, Submission, Where
from lvm_ray.errors import UserError

TEMPLATE = Path(__file__).parent / "files" / "kubernetes" / "rayjob.yaml"
PLACE = "/submission"  # in every container of the cluster
LARGEST = 1_000_000  # bytes of a ConfigMap: Kubernetes takes a MiB
GONE_WITHIN = 60.0  # seconds in which KubeRay takes an ended job's cluster away
FINGERPRINT = "lvm-ray/fingerprint"
INSTALL = "install kubectl and choose the cluster's context, or submit from a machine that has it"
STATES: dict[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
    "Running": "running",
    "Complete": "succeeded",
    "Failed": "failed",
    "Suspending": "stopped",
    "Suspended": "stopped",
}


def described(where: Where, submission: Submission) -> dict[str, Any]:
    """The manifests as they are applied, but for the bytes of what travels."""
    manifests = _template(where, submission)
    data = config_map(submission, _ray_job(manifests)["metadata"].get("namespace"))
    sizes = {name: f"{len(base64.b64decode(text)):,} bytes" for name, text in data["binaryData"].items()}
    return {"to": "kubectl apply", "manifests": [*manifests, data | {"binaryData": sizes}]}


def submit(where: Where, submission: Submission) -> int:
    """Apply the manifests, in place of an ended job of the same name."""
    manifests = _template(where, submission)
    where = replace(where, namespace=_ray_job(manifests)["metadata"].get("namespace"))
    data = config_map(submission, where.namespace)
    _require_image(manifests)
    if status(where, submission.name):
        stop(where, submission.name)
        _wait_until_gone(where, submission.name)
    applied = json.loads(_kubectl(where, "apply", "--server-side", "--filename=-", "--output=json", manifests=manifests))
    owner = _ray_job(applied.get("items", [applied]))
    # So that it goes when the job does. Pods wait for it.
    reference = {"name": submission.name, "uid": owner["metadata"]["uid"]}
    data["metadata"]["ownerReferences"] = [{"apiVersion": owner["apiVersion"], "kind": owner["kind"], **reference}]
    _kubectl(where, "apply", "--server-side", "--filename=-", manifests=[data])
    return 0


def status(where: Where, name: str | None = None) -> list[Job]:
    """The RayJob of a name, or none; all that were submitted."""
    found = _kubectl(where, "get", "rayjob", *([name] if name else []), "--ignore-not-found", "--output=json")
    values = json.loads(found) if found.strip() else {"items": []}
    entries = values.get("items", [values])
    return [_job(entry) for entry in entries if FINGERPRINT in entry["metadata"].get("annotations", {})]


def logs(where: Where, name: str) -> str:
    """What the pod prints that KubeRay starts to submit the command and to follow it; empty before it is there."""
    try:
        return _kubectl(where, "logs", f"job/{name}", "--tail=-1")
    except UserError:
        if not status(where, name):
            raise
        return ""


def stop(where: Where, name: str) -> None:
    """Delete the job, and with it its cluster. It has saved at its last checkpoint."""
    _kubectl(where, "delete", f"rayjob/{name}", f"configmap/{name}", "--ignore-not-found", "--wait=false")


def fill(template: dict[str, Any], submission: Submission, where: Where) -> dict[str, Any]:
    """The template's RayJob with the job in it.

    Raises UserError where the name is none for Kubernetes.
    """
    if len(submission.name) > LONGEST or not submission.name[0].isalpha():
        raise UserError(f"--name {submission.name}: KubeRay takes at most {LONGEST} letters, the first a letter of the alphabet")
    assert submission.package is not None
    job: dict[str, Any] = json.loads(json.dumps(template))  # no part of it twice, as YAML has anchors
    metadata, spec = job.setdefault("metadata", {}), job["spec"]
    metadata["name"] = submission.name
    metadata["annotations"] = {**metadata.get("annotations", {}), FINGERPRINT: submission.fingerprint}
    if where.namespace:
        metadata["namespace"] = where.namespace
    spec["jobId"], spec["entrypoint"] = submission.name, submission.entrypoint
    environment = {
        "py_modules": [f"file://{PLACE}/{submission.package.name}.zip"],
        **({"working_dir": f"file://{PLACE}/{submission.archive.name}"} if submission.files else {}),
        "env_vars": submission.environment,
    }
    spec["runtimeEnvYAML"] = yaml.safe_dump(environment, sort_keys=False)
    for pod in _pods(spec):
        pod.setdefault("volumes", []).append({"name": "submission", "configMap": {"name": submission.name}})
        pod["containers"][0].setdefault("volumeMounts", []).append({"name": "submission", "mountPath": PLACE, "readOnly": True})
    if where.image:
        for pod in [*_pods(spec), *_submitters(spec)]:
            for container in [*pod["containers"][:1], *pod.get("initContainers", [])]:
                container["image"] = where.image
    return job


def config_map(submission: Submission, namespace: str | None) -> dict[str, Any]:
    """The ConfigMap that holds what travels. Raises UserError where that is more than one may hold."""
    assert submission.package is not None
    held = {f"{submission.package.name}.zip": submission.package.content}
    held |= {submission.archive.name: submission.archive.content} if submission.files else {}
    size = sum(map(len, held.values()))
    if size > LARGEST:
        raise UserError(f"{submission.name}: {size:,} bytes of code and recipe, and a ConfigMap holds {LARGEST:,}")
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": submission.name, **({"namespace": namespace} if namespace else {})},
        "immutable": True,
        "binaryData": {name: base64.b64encode(content).decode() for name, content in held.items()},
    }


def _template(where: Where, submission: Submission) -> list[dict[str, Any]]:
    """The template's manifests, its RayJob filled in."""
    path = Path(where.template) if where.template else TEMPLATE
    try:
        found = [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot read the template: {' '.join(str(error).split())}") from None
    if [one.get("kind") if isinstance(one, dict) else None for one in found].count("RayJob") != 1:
        raise UserError(f"{path}: not one RayJob: take cluster/kubernetes/rayjob.yaml as a start")
    try:
        return [fill(one, submission, where) if one["kind"] == "RayJob" else one for one in found]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole RayJob ({error}): take cluster/kubernetes/rayjob.yaml as a start") from None


def _wait_until_gone(where: Where, name: str) -> None:
    until = time.monotonic() + GONE_WITHIN
    while status(where, name):
        if time.monotonic() > until:
            raise UserError(f"{name}: the ended job is still being deleted: kubectl describe rayjob/{name} says why")
        time.sleep(1.0)


def _ray_job(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return next(one for one in manifests if one["kind"] == "RayJob")


def _require_image(manifests: list[dict[str, Any]]) -> None:
    spec = _ray_job(manifests)["spec"]
    for pod in [*_pods(spec), *_submitters(spec)]:
        image = pod["containers"][0].get("image", "")
        if not image or "example.com/" in image:
            raise UserError(
                f"--image: missing, and the template's ({image}) is a placeholder: build cluster/Dockerfile, push it, name it"
            )


def _pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods' specifications of the cluster: the head's and the workers'."""
    cluster = spec["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", []))]


def _submitters(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["submitterPodTemplate"]["spec"]] if spec.get("submitterPodTemplate") else []


def _job(entry: dict[str, Any]) -> Job:
    found = entry.get("status", {})
    state = STATES.get(found.get("jobStatus", ""), "waiting")
    if found.get("jobDeploymentStatus") in ("Failed", "Suspending", "Suspended"):  # also where its command never ran
        state = STATES[found["jobDeploymentStatus"]]
    return Job(
        name=entry["metadata"]["name"],
        state=state,
        detail=" ".join(str(found.get("message") or found.get("reason") or "").split())[:300],
        started=_seconds(found.get("startTime")),
        ended=_seconds(found.get("endTime")),
        fingerprint=entry["metadata"]["annotations"][FINGERPRINT],
    )


def _seconds(moment: str | None) -> float | None:
    return datetime.fromisoformat(moment).timestamp() if moment else None


def _kubectl(where: Where, *arguments: str, manifests: list[dict[str, Any]] | None = None) -> str:
    namespace = [f"--namespace={where.namespace}"] if where.namespace else []
    text = None if manifests is None else yaml.safe_dump_all(manifests, sort_keys=False)
    return run(["kubectl", *arguments, *namespace, "--request-timeout=10s"], INSTALL, text)

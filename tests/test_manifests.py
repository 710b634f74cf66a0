"""What `cluster/` holds for Kubernetes and for Ray's cluster launcher: valid by the schemas of those who read it, and closed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT.parent / "shared" / "schemas"
KUBERNETES = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
LAUNCHER = sorted((CLUSTER / "launcher").glob("*.yaml"))
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a definition has a megabyte

needs_definitions = pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"KubeRay's definitions are not there: {SCHEMAS}")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(path.read_text(), LOADER) if document]


def manifest(name: str) -> dict[str, Any]:
    return documents(CLUSTER / "kubernetes" / name)[0]


def strict(schema: Any) -> Any:
    """A Kubernetes schema as a JSON schema that knows no other fields than it names.

    Kubernetes drops fields that it does not know, so that a typo would pass. A map with values of one kind has
    `additionalProperties` and stays; so does what has no properties at all, as `metadata`. Rules in CEL are not checked.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if isinstance(schema.get("properties"), dict) and "type" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    """KubeRay's schemas by kind."""
    found = {}
    for path in SCHEMAS.glob("*.yaml"):
        definition = yaml.load(path.read_text(), LOADER)["spec"]
        version = next(version for version in definition["versions"] if version["name"] == "v1")
        found[definition["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    return found


def complaints(document: Any, schema: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


def merged(document: Any, patch: Any) -> Any:
    """A document after a merge patch (RFC 7386) that removes nothing."""
    if not isinstance(document, dict) or not isinstance(patch, dict):
        return patch
    return document | {key: merged(document.get(key), value) for key, value in patch.items()}


def pods(part: Any) -> Iterator[dict[str, Any]]:
    """Each pod's spec below a part of a manifest."""
    if isinstance(part, dict):
        if "containers" in part:
            yield part
        for value in part.values():
            yield from pods(value)
    elif isinstance(part, list):
        for value in part:
            yield from pods(value)


def containers() -> dict[str, dict[str, Any]]:
    """Every container that runs Ray, by where it stands; the autoscaler's too, which the operator makes."""
    found = {}
    for name in ("rayjob.yaml", "raycluster.yaml"):
        document = manifest(name)
        for pod in pods(document):
            for container in pod["containers"]:
                found[f"{name}: {container['name']} {len(found)}"] = container
        cluster = document["spec"].get("rayClusterSpec", document["spec"])
        found[f"{name}: autoscaler"] = cluster["autoscalerOptions"]
    return found


# Valid


@needs_definitions
@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_a_manifest_has_no_field_that_kuberay_does_not_know(name: str, definitions: dict[str, Any]) -> None:
    document = manifest(name)
    assert document["apiVersion"] == "ray.io/v1"
    assert complaints(document, definitions[document["kind"]]) == []


@needs_definitions
def test_the_variant_with_redis_is_valid(definitions: dict[str, Any]) -> None:
    variant = merged(manifest("raycluster.yaml"), manifest("gcs-redis.yaml"))
    assert variant["spec"]["headGroupSpec"] and "valueFrom" in variant["spec"]["gcsFaultToleranceOptions"]["redisPassword"]
    assert complaints(variant, definitions["RayCluster"]) == []


@needs_definitions
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda spec: spec.update(ttlSecondsAfterFinish=1), "ttlSecondsAfterFinish"),
        (lambda spec: spec.update(backoffLimit="2"), "backoffLimit"),
        (lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens"), "authOptions.mode"),
        (lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplica=1), "minReplica"),
        (lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(port=6379), "rayStartParams.port"),
        (lambda spec: spec["submitterPodTemplate"]["spec"].update(securityContexts={}), "securityContexts"),
        (lambda spec: spec["submitterPodTemplate"]["spec"].pop("containers"), "containers"),
    ],
)
def test_the_check_finds_what_is_wrong(change: Any, complaint: str, definitions: dict[str, Any]) -> None:
    document = copy.deepcopy(manifest("rayjob.yaml"))
    change(document["spec"])
    found = complaints(document, definitions["RayJob"])
    assert len(found) == 1 and complaint in found[0], found


@needs_definitions
def test_the_network_policies_rules_are_valid(definitions: dict[str, Any]) -> None:
    """Kubernetes' own kinds are not among the definitions, but KubeRay's have the same rules in them."""
    rules = definitions["RayCluster"]["properties"]["spec"]["properties"]["networkPolicy"]["properties"]["head"]["properties"]
    for policy in documents(CLUSTER / "kubernetes" / "network-policy.yaml"):
        assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
        assert set(policy["spec"]) == {"podSelector", "policyTypes", "ingress"}
        assert complaints(policy["spec"]["ingress"], rules["ingressRules"]) == []


def test_a_job_and_a_cluster_have_the_same_pods() -> None:
    """Two files say it, as people read one; they differ in the dashboard alone, which a job's operator has to reach."""
    job, cluster = manifest("rayjob.yaml")["spec"]["rayClusterSpec"], manifest("raycluster.yaml")["spec"]
    assert job["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "0.0.0.0"
    assert cluster["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert job == cluster


# Closed


@pytest.mark.parametrize("where", containers())
def test_a_container_has_the_token_from_the_secret(where: str) -> None:
    environment = {entry["name"]: entry for entry in containers()[where]["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    secret = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": "lvm-ray-token", "key": "auth_token"} and "value" not in environment["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize("where", containers())
def test_a_container_may_do_little_and_has_limits(where: str) -> None:
    container = containers()[where]
    may = container["securityContext"]
    assert may["runAsNonRoot"] and may["readOnlyRootFilesystem"] and may["allowPrivilegeEscalation"] is False
    assert may["capabilities"] == {"drop": ["ALL"]} and may["seccompProfile"] == {"type": "RuntimeDefault"}
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] and {"cpu", "memory"} <= set(resources["limits"])
    assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}  # Ray cannot be without


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_pods_run_as_a_user_and_mount_what_they_have(name: str) -> None:
    found = list(pods(manifest(name)))
    assert len(found) == {"rayjob.yaml": 4, "raycluster.yaml": 3}[name]
    for pod in found:
        may = pod["securityContext"]
        assert may["runAsNonRoot"] and may["runAsUser"] == 1000 and may["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "nodeName"} & set(pod)
        assert not any("hostPath" in volume for volume in pod["volumes"])
        assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume)
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert all(re.fullmatch(r"\S+:\d[\w.-]*", container["image"]) for container in pod["containers"])


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_the_operator_has_the_token_too_and_gpus_come_and_go(name: str) -> None:
    spec = manifest(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "lvm-ray-token"}
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["enableInTreeAutoscaling"] is True
    train = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "train")
    assert train["minReplicas"] == 0 < train["maxReplicas"]
    assert int(train["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) > 0
    assert manifest(name)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "lvm-ray"


def test_a_job_ends() -> None:
    spec = manifest("rayjob.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] > 0


def test_the_policies_admit_the_cluster_and_labelled_clients_alone() -> None:
    own, head = documents(CLUSTER / "kubernetes" / "network-policy.yaml")
    ours = {"app.kubernetes.io/part-of": "lvm-ray"}
    assert own["spec"] == {
        "podSelector": {"matchLabels": ours},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": ours}}]}],
    }
    assert head["spec"]["podSelector"]["matchLabels"] == {**ours, "ray.io/node-type": "head"}
    for rule in head["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= {8265, 10001}
        assert all(peer["podSelector"]["matchLabels"] for peer in rule["from"])
    job = manifest("rayjob.yaml")["spec"]
    cluster = job["rayClusterSpec"]
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    assert all(template["metadata"]["labels"] == ours for template in templates)
    assert job["submitterPodTemplate"]["metadata"]["labels"] == {"lvm-ray/client": "true"}


def test_the_namespace_refuses_what_is_less_closed() -> None:
    labels = manifest("namespace.yaml")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


# Ray's cluster launcher


def prepared(path: Path) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config

    config: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text()))
    return config


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_a_launcher_file_is_valid(path: Path) -> None:
    from ray.autoscaler._private.util import validate_config

    config = prepared(path)
    validate_config(config)
    broken = copy.deepcopy(config)
    broken["available_node_types"]["train"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(broken)


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_heads_are_on_demand_and_workers_spot(path: Path) -> None:
    kinds = prepared(path)["available_node_types"]
    spot = {"MarketType": "spot", "provisioningModel": "SPOT"}

    def is_spot(kind: str) -> bool:
        market = kinds[kind]["node_config"]
        found = market.get("InstanceMarketOptions", {}) | market.get("scheduling", {})
        return any(found.get(key) == value for key, value in spot.items())

    assert {kind: is_spot(kind) for kind in kinds} == {"head": False, "tokenize": True, "train": True}
    assert kinds["head"]["resources"] == {"CPU": 0} and kinds["train"]["min_workers"] == 0


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_a_launcher_file_takes_the_token_from_the_users_own_file(path: Path) -> None:
    config = prepared(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "export RAY_AUTH_MODE=token " in start.partition("ray start")[0]
        assert "chmod 600 ~/.ray/auth_token" in start and "RAY_AUTH_TOKEN" not in start
    mounted = {local for local in config["file_mounts"].values() if not local.startswith(("~", "build/"))}
    assert all((ROOT / local).exists() for local in mounted)


def pinned(package: str) -> str:
    (found,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return found

"""What is wrong with a file of manifests, in sentences, before a cluster or its operator refuses it.

A RayJob is checked by its fields down to those of containers and volumes, and by the rules that KubeRay's operator
applies after the API server has taken it (ray-operator/controllers/ray/utils/validation.go, v1.7.0). Other kinds are
not checked, but for being named.
"""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from raylhf.config.schema import nearest
from raylhf.launch.manifest_shapes import ClusterSpec, JobSpec, RayJob, WorkerGroup

GATED = ("historyServerOptions", "networkPolicy", "tlsOptions")
_LEAST_RAY_FOR_TOKENS = (2, 52)
_LEAST_RAY_FOR_PRIORITY = (2, 56)


def is_manifest(text: str) -> bool:
    """Whether the text looks like manifests, and not like a config."""
    return re.search(r"^apiVersion:", text, re.MULTILINE) is not None


def unchecked_kinds(text: str) -> list[str]:
    """Kinds in the text of which nothing is known here."""
    documents = YAML(typ="safe").load_all(text)
    return sorted({document["kind"] for document in documents if document} - {"RayJob"})


def find_manifest_problems(text: str) -> list[str]:
    """One sentence for each problem, each with the kind, name and field that it is about; empty if there is none."""
    try:
        documents = [document for document in YAML(typ="safe").load_all(text) if document is not None]
    except YAMLError as error:
        return [f"is no YAML: {error}"]
    problems = []
    for document in documents:
        problems += _problems_of(document)
    return problems


def _problems_of(document: Any) -> list[str]:
    if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
        return ["a document is no manifest: apiVersion, kind and metadata are needed"]
    metadata = document["metadata"]
    name = metadata.get("name") if isinstance(metadata, dict) else None
    what = f"{document['kind']} {name}"
    if not name:
        return [f"{what}: metadata.name is missing"]
    if document["kind"] != "RayJob":
        near = nearest(document["kind"], ["RayJob", "RayCluster", "RayService", "RayCronJob"])
        is_misspelt = str(document["apiVersion"]).startswith("ray.io/") and near != document["kind"]
        return [f"{what}: there is no such kind; did you mean {near or 'RayJob'!r}?"] if is_misspelt else []
    try:
        job = RayJob.model_validate(_without_nulls(document))
    except ValidationError as error:
        return [f"{what}: {_dotted(e['loc'])}: {_sentence(dict(e))}" for e in error.errors()]
    return [f"{what}: {problem}" for problem in (*_name_problems(job), *_job_problems(job.spec))]


def _without_nulls(value: Any) -> Any:
    """As the API server takes it."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _dotted(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".")


def _sentence(error: dict[str, Any]) -> str:
    if error["type"] == "missing":
        return "is missing"
    return f"{error['msg'].removeprefix('Value error, ')} (it is {error['input']!r})"[:300]


def _name_problems(job: RayJob) -> Iterator[str]:
    name = job.metadata.name
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "metadata.name must begin with a letter and have at most 47 lower-case letters, digits and dashes"


def _job_problems(spec: JobSpec) -> Iterator[str]:
    if spec.suspend and not spec.shutdownAfterJobFinishes:
        yield "spec.suspend needs shutdownAfterJobFinishes: true; KubeRay ends a suspended run's cluster"
    if spec.ttlSecondsAfterFinished and not spec.shutdownAfterJobFinishes:
        yield "spec.ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    for field in ("ttlSecondsAfterFinished", "backoffLimit"):
        if (getattr(spec, field) or 0) < 0:
            yield f"spec.{field} is negative; use 0 or more"
    if spec.activeDeadlineSeconds is not None and spec.activeDeadlineSeconds <= 0:
        yield "spec.activeDeadlineSeconds must be at least 1"
    if spec.deletionStrategy and spec.shutdownAfterJobFinishes and "deletionRules" in spec.deletionStrategy:
        yield "spec.deletionStrategy.deletionRules and shutdownAfterJobFinishes exclude each other; use one"
    if spec.submissionMode == "InteractiveMode" and spec.backoffLimit:
        yield "spec.backoffLimit cannot be used with InteractiveMode"
    if spec.submissionMode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if getattr(spec, field) is not None:
                yield f"spec.{field} cannot be used with SidecarMode; remove it"
        if spec.rayClusterSpec and spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy not in (None, "Never"):
            yield "the head's restartPolicy must be Never or unset with SidecarMode"
    if spec.rayClusterSpec is not None:
        yield from _cluster_problems(spec.rayClusterSpec)
    elif not spec.clusterSelector:
        yield "spec.rayClusterSpec is missing (or spec.clusterSelector, for a cluster that is there)"


def _cluster_problems(spec: ClusterSpec) -> Iterator[str]:
    names = [group.groupName for group in spec.workerGroupSpecs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two worker groups are called {name}; give each a name of its own"
    for name, group in (("head", spec.headGroupSpec), *zip(names, spec.workerGroupSpecs, strict=True)):
        if not group.template.spec.containers:
            yield f"group {name} has no container"
        if "labels" in group.rayStartParams:
            yield f"group {name}: rayStartParams.labels is refused by KubeRay; use the group's own labels field"
        if group.resources and {"num-cpus", "num-gpus", "memory", "resources"} & group.rayStartParams.keys():
            yield f"group {name}: resources are in rayStartParams and in resources; use one of the two"
    for group in spec.workerGroupSpecs:
        yield from _size_problems(group)
    ray = tuple(int(part) for part in re.findall(r"\d+", spec.rayVersion or "")[:2])
    if spec.authOptions and spec.authOptions.mode == "token" and ray < _LEAST_RAY_FOR_TOKENS:
        yield f"authOptions.mode token needs rayVersion 2.52 or newer, and it is {spec.rayVersion or 'not set'}"
    if not spec.authOptions or spec.authOptions.mode != "token":
        yield "authOptions.mode is not token: whoever reaches a pod could run code in all of them"
    for field in GATED:
        if field in (spec.model_extra or {}):
            yield f"{field} works only where KubeRay's feature gate for it is on; it is off by default"
    yield from _autoscaler_problems(spec, ray)
    yield from _head_state_problems(spec)


def _size_problems(group: WorkerGroup) -> Iterator[str]:
    if group.minReplicas > group.maxReplicas:
        yield (
            f"group {group.groupName}: minReplicas {group.minReplicas} is over maxReplicas {group.maxReplicas}; raise "
            "one or lower the other"
        )
    elif group.replicas is not None and not group.minReplicas <= group.replicas <= group.maxReplicas:
        yield (
            f"group {group.groupName}: replicas {group.replicas} is not between minReplicas {group.minReplicas} and "
            f"maxReplicas {group.maxReplicas}"
        )


def _autoscaler_problems(spec: ClusterSpec, ray: tuple[int, ...]) -> Iterator[str]:
    options, head = spec.autoscalerOptions, spec.headGroupSpec.template.spec
    is_second = bool(spec.enableInTreeAutoscaling and options and options.version == "v2")
    variables = [env.name for container in head.containers for env in container.env]
    if "RAY_enable_autoscaler_v2" in variables:
        yield "RAY_enable_autoscaler_v2 is set on the head; use autoscalerOptions.version alone"
    for group in spec.workerGroupSpecs:
        if group.suspend:
            yield f"group {group.groupName}: suspend is for KubeRay itself; remove it"
        if group.idleTimeoutSeconds is not None and not is_second:
            yield f"group {group.groupName}: idleTimeoutSeconds needs enableInTreeAutoscaling and version v2"
        if group.priority is not None and not (is_second and ray >= _LEAST_RAY_FOR_PRIORITY):
            yield f"group {group.groupName}: priority needs autoscaler v2 and rayVersion 2.56 or newer"
        if is_second and group.template.spec.restartPolicy not in (None, "Never"):
            yield f"group {group.groupName}: restartPolicy must be Never or unset with autoscaler v2"
        if group.minReplicas < group.maxReplicas and not spec.enableInTreeAutoscaling:
            yield f"group {group.groupName}: nothing changes its size without enableInTreeAutoscaling: true"


def _head_state_problems(spec: ClusterSpec) -> Iterator[str]:
    variables = {env.name for container in spec.headGroupSpec.template.spec.containers for env in container.env}
    if "REDIS_USERNAME" in variables:
        yield "REDIS_USERNAME is set; use gcsFaultToleranceOptions.redisUsername alone"
    if spec.gcsFaultToleranceOptions is None:
        if "RAY_REDIS_ADDRESS" in variables:
            yield "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions; use gcsFaultToleranceOptions.redisAddress"
        return
    for name, field in (("RAY_REDIS_ADDRESS", "redisAddress"), ("REDIS_PASSWORD", "redisPassword")):
        if name in variables:
            yield f"{name} is set beside gcsFaultToleranceOptions; use gcsFaultToleranceOptions.{field} alone"
    if {"redis-password", "redis-username"} & spec.headGroupSpec.rayStartParams.keys():
        yield "Redis' name and password belong into gcsFaultToleranceOptions, not into rayStartParams"

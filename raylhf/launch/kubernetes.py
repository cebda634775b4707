"""A run on Kubernetes: the RayJob of KubeRay and what goes with it, and their submission."""

import io
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from raylhf.config.run import AnyRunConfig
from raylhf.launch.command import Command
from raylhf.launch.pods import Group, groups_of

CONFIG_FOLDER, RUNS_FOLDER, MODELS_FOLDER, HOME = "/etc/raylhf", "/runs", "/models", "/home/raylhf"
USER = 10001
"""User and group in k8s/Containerfile."""
RUN_LABEL = "raylhf.io/run"
DRIVER, WORKERS = "raylhf[ ]train", "ray[:]:_(Async)?Host"
"""Patterns of command lines; neither matches the line that it stands in."""
KUBECTL_TIMEOUT_S = 60.0
_LONGEST_NAME = 47  # KubeRay appends to it, and names services after it

Document = dict[str, Any]


def manifests(config: AnyRunConfig, command: Command) -> list[Document]:
    """What the run needs beyond k8s/base: its config, RayJob, network policy and disruption budgets.

    Raises:
        ValueError: settings are missing or cannot be; the sentence names them.
    """
    settings = config.launch.kubernetes
    if settings.image is None:
        raise ValueError(
            "launch.kubernetes.image is not set; build k8s/Containerfile, push it, and name it "
            "(launch.kubernetes.image=REGISTRY/raylhf:TAG)"
        )
    if (settings.scheduler == "none") != (settings.queue is None):
        raise ValueError("launch.kubernetes.scheduler and launch.kubernetes.queue go together; set both or none")
    if settings.scheduler == "kueue" and _is_elastic(groups_of(config)):
        raise ValueError(
            "launch.kubernetes.scheduler=kueue: Kueue admits fixed runs only; leave rollout.min_replicas and "
            "rollout.max_replicas unset, or use volcano"
        )
    groups = groups_of(config)
    name = resource_name(config)
    return [
        _config_map(name, Path(command.config).read_text(encoding="utf-8"), _script(config, command, groups)),
        _ray_job(config, groups),
        _network_policy(config, name),
        *_disruption_budgets(name, groups),
    ]


def to_text(documents: Sequence[Document], *, comment: str) -> str:
    """Several documents as YAML, with a comment at the top."""
    yaml = YAML()
    yaml.width = 4096  # no line is broken where its meaning could change
    yaml.representer.ignore_aliases = lambda *_: True
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump_all(documents, text)
    return f"# {comment}\n{text.getvalue()}"


def apply(config: AnyRunConfig, text: str) -> None:
    """Hand the manifests to the cluster of kubectl's current context.

    Raises:
        ValueError: kubectl is not here or refuses, or the run is there already; the sentence says what to do.
    """
    namespace, name = config.launch.kubernetes.namespace, resource_name(config)
    if shutil.which("kubectl") is None:
        raise ValueError("kubectl is not on PATH; install it, or pipe the output of --dry-run to where it is")
    if _kubectl(["get", "rayjob", name, "-n", namespace, "--ignore-not-found", "-o", "name"], None).strip():
        raise ValueError(
            f"RayJob {name} is in namespace {namespace} already; follow it (kubectl -n {namespace} get rayjob {name}), "
            f"or delete it (kubectl -n {namespace} delete rayjob {name}) and launch again: the run goes on from its "
            "checkpoint"
        )
    _kubectl(["apply", "-n", namespace, "-f", "-"], text)


def resource_name(config: AnyRunConfig) -> str:
    """The run's name as Kubernetes allows names.

    Raises:
        ValueError: it is too long, or begins with a digit.
    """
    name = re.sub(r"[^a-z0-9-]+", "-", config.name.lower()).strip("-")
    if len(name) > _LONGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ValueError(
            f"name={config.name!r} makes no name for Kubernetes; begin with a letter, and use at most {_LONGEST_NAME} "
            "letters, digits and dashes"
        )
    return name


def _kubectl(arguments: Sequence[str], text: str | None) -> str:
    try:
        done = subprocess.run(
            ["kubectl", *arguments], input=text, capture_output=True, text=True, timeout=KUBECTL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"kubectl did not answer within {KUBECTL_TIMEOUT_S:g} s; does its context reach the cluster?"
        ) from None
    if done.returncode:
        raise ValueError(f"kubectl {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _is_elastic(groups: Sequence[Group]) -> bool:
    return any(group.least < group.most for group in groups)


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "raylhf", RUN_LABEL: name}


def _config_map(name: str, config: str, script: str) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config", "labels": _labels(name)},
        "data": {"run.yaml": LiteralScalarString(config), "train.sh": LiteralScalarString(script)},
    }


def _ray_job(config: AnyRunConfig, groups: Sequence[Group]) -> Document:
    settings, name = config.launch.kubernetes, resource_name(config)
    labels = _labels(name)
    if settings.scheduler == "kueue":
        labels["kueue.x-k8s.io/queue-name"] = str(settings.queue)
    if settings.scheduler == "volcano":
        labels["volcano.sh/queue-name"] = str(settings.queue)
    cluster: Document = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": _is_elastic(groups),
    }
    if _is_elastic(groups):
        cluster["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": settings.idle_timeout_s,
            "resources": _amounts({"cpu": "500m", "memory": "1Gi"}),
            "securityContext": _container_security(),
        }
    cluster["headGroupSpec"] = _head_group(config, name)
    cluster["workerGroupSpecs"] = [_worker_group(config, name, group) for group in groups]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "submissionMode": "SidecarMode",
            "entrypoint": f"bash {CONFIG_FOLDER}/train.sh",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "backoffLimit": settings.max_retries,
            **({"suspend": True} if settings.scheduler == "kueue" else {}),
            "rayClusterSpec": cluster,
        },
    }


def _script(config: AnyRunConfig, command: Command, groups: Sequence[Group]) -> str:
    """What the driver's container runs."""
    given = [override for override in command.overrides if not override.startswith("launch.")]
    settings = [
        *given,
        f"output_dir={RUNS_FOLDER}",
        "cluster.address=auto",
        f"cluster.num_nodes={1 + sum(group.least for group in groups)}",
        f"cluster.start_timeout_s={max(config.cluster.start_timeout_s, config.launch.kubernetes.wait_s):g}",
        *(pin for group in groups for pin in group.pins),
    ]
    words = f'{CONFIG_FOLDER}/run.yaml "${{settings[@]}}"'
    lines = ["set -eu", "settings=(", *(f"  {shlex.quote(setting)}" for setting in settings), ")"]
    if config.launch.doctor:
        least_gib = min(config.launch.kubernetes.head_memory_gib, *(group.memory_gib for group in groups))
        wait_s = config.launch.kubernetes.wait_s
        lines.append(f"raylhf doctor {words} cluster.host_memory_gib={least_gib:g} --wait {wait_s}")  # pods differ
    lines.append(f"exec raylhf train {words}")
    return "".join(f"{line}\n" for line in lines)


def _head_group(config: AnyRunConfig, name: str) -> Document:
    settings = config.launch.kubernetes
    # An evicted driver saves; the next one goes on from there.
    stop = f"pkill -USR1 -f '{DRIVER}'; while pgrep -f '{DRIVER}' >/dev/null; do sleep 1; done"
    container = {
        "name": "ray-head",
        "ports": [
            {"name": "gcs-server", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "metrics", "containerPort": 8080},
        ],
        **_container(config, stop, is_head=True),
        "resources": _amounts({"cpu": str(settings.head_cpus), "memory": f"{math.ceil(settings.head_memory_gib)}Gi"}),
    }
    template = _template(config, name, container, memory_gib=settings.head_memory_gib, has_gpus=False)
    template["spec"]["volumes"].append({"name": "config", "configMap": {"name": f"{name}-config"}})
    params = _start_params(config, settings.head_memory_gib, **{"num-cpus": "0"})
    return {"rayStartParams": params, "template": template}


def _worker_group(config: AnyRunConfig, name: str, group: Group) -> Document:
    # Ray places nothing more here. What is here stays until the driver, which may be evicted as well, has saved.
    stop = (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod ends' "
        f"--deadline-remaining-seconds {config.launch.kubernetes.grace_s}; "
        f"while pgrep -f '{WORKERS}' >/dev/null; do sleep 1; done; ray stop"
    )
    amounts = {"cpu": str(group.cpus), "memory": f"{group.memory_gib}Gi"}
    if group.gpus:
        amounts["nvidia.com/gpu"] = str(group.gpus)
    container = {
        "name": "ray-worker",
        "ports": [{"name": "metrics", "containerPort": 8080}],
        **_container(config, stop, is_head=False),
        "resources": _amounts(amounts),
    }
    template = _template(config, name, container, memory_gib=group.memory_gib, has_gpus=bool(group.gpus))
    template["spec"]["automountServiceAccountToken"] = False
    # The fewest come first: more could join before the learners, and be taken for them. The driver asks for the rest.
    size: Document = {"replicas": group.least, "minReplicas": group.least, "maxReplicas": group.most}
    if group.is_gang:
        size = {"replicas": 1, "minReplicas": 1, "maxReplicas": 1, "numOfHosts": group.num_pods}
    elif group.least < group.most:
        size["idleTimeoutSeconds"] = config.launch.kubernetes.idle_timeout_s
    return {
        "groupName": group.name,
        **size,
        "rayStartParams": _start_params(config, group.memory_gib, resources=f'"{{\\"{group.resource}\\": 1}}"'),
        "template": template,
    }


def _object_store_gib(config: AnyRunConfig, memory_gib: float) -> float:
    """Of a small pod's memory, Ray's usual share."""
    return min(config.cluster.object_store_gib, 0.3 * memory_gib)


def _start_params(config: AnyRunConfig, memory_gib: float, **more: str) -> dict[str, str]:
    return {**more, "object-store-memory": str(int(_object_store_gib(config, memory_gib) * 2**30))}


def _amounts(amounts: Mapping[str, str]) -> Document:
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _container_security() -> Document:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _container(config: AnyRunConfig, stop: str, *, is_head: bool) -> Document:
    secret = config.launch.kubernetes.secret_name

    def key(name: str) -> Document:
        return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name, "optional": True}}}

    folders = {"runs": RUNS_FOLDER, "models": MODELS_FOLDER, "shm": "/dev/shm", "tmp": "/tmp", "home": HOME}
    mounts: list[Document] = [{"name": name, "mountPath": path} for name, path in folders.items()]
    if is_head:
        mounts.append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    return {
        "image": config.launch.kubernetes.image,
        "env": [
            {"name": "HOME", "value": HOME},
            {"name": "HF_HOME", "value": f"{MODELS_FOLDER}/huggingface"},
            {"name": "RAYLHF_CACHE", "value": f"{MODELS_FOLDER}/raylhf"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            key("HF_TOKEN"),
            *(_driver_variables(config, key) if is_head else []),
        ],
        "lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", stop]}}},
        "securityContext": _container_security(),
        "volumeMounts": mounts,
    }


def _driver_variables(config: AnyRunConfig, key: Callable[[str], Document]) -> list[Document]:
    # Ray kills a job that is stopped (kubectl delete) after 3 s, unless told otherwise.
    return [key("WANDB_API_KEY"), {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(config.launch.kubernetes.grace_s)}]


def _template(config: AnyRunConfig, name: str, container: Document, *, memory_gib: float, has_gpus: bool) -> Document:
    settings = config.launch.kubernetes
    # NCCL and the engines' processes share memory there as well; all of it counts as the pod's memory.
    shared = math.ceil(_object_store_gib(config, memory_gib)) + (8 if has_gpus else 1)
    placement: Document = {}
    if settings.node_selector and (has_gpus or not config.cluster.gpus_per_node):
        placement["nodeSelector"] = dict(settings.node_selector)
    if has_gpus:
        placement["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "metadata": {"labels": _labels(name)},
        "spec": {
            **placement,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationGracePeriodSeconds": settings.grace_s,
            "containers": [container],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": settings.runs_claim}},
                {"name": "models", "persistentVolumeClaim": {"claimName": settings.models_claim}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared}Gi"}},
                {"name": "tmp", "emptyDir": {}},
                {"name": "home", "emptyDir": {}},
            ],
        },
    }


def _network_policy(config: AnyRunConfig, name: str) -> Document:
    own = {"podSelector": {"matchLabels": {RUN_LABEL: name}}}
    everywhere: Document = {}
    operator = {
        "namespaceSelector": everywhere,
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
    }
    monitoring = {"namespaceSelector": {"matchLabels": {"raylhf.io/monitoring": "true"}}}
    dns = {"namespaceSelector": everywhere, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}
    outside = {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}  # the cloud's metadata, with its keys

    def tcp(*ports: int) -> list[Document]:
        return [{"protocol": "TCP", "port": port} for port in ports]

    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            **own,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                {"from": [operator], "ports": tcp(8265)},
                {"from": [monitoring], "ports": tcp(8080)},
            ],
            "egress": [
                {"to": [own]},
                {"to": [dns], "ports": [{"protocol": "UDP", "port": 53}, *tcp(53)]},
                {"to": [outside], "ports": tcp(*config.launch.kubernetes.egress_ports)},
            ],
        },
    }


def _disruption_budgets(name: str, groups: Sequence[Group]) -> list[Document]:
    """Head and learners stay for as long as the run goes on; of the others one may go at a time."""
    kept = {"headgroup": 1} | {
        group.name: group.num_pods if group.is_gang else group.least - 1
        for group in groups
        if group.is_gang or group.least > 1
    }
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"{name}-{group}", "labels": _labels(name)},
            "spec": {
                "minAvailable": number,
                "selector": {"matchLabels": {RUN_LABEL: name, "ray.io/group": group}},
            },
        }
        for group, number in kept.items()
    ]

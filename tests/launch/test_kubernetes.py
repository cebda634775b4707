"""Manifests: tied to configs, accepted as a cluster would, and refused with a sentence where they are broken."""

import copy
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from launch.crd_schema import Definition

from raylhf.cli import main
from raylhf.config.load import load_config
from raylhf.launch.manifest_checks import find_manifest_problems
from raylhf.launch.pods import groups_of

ROOT = Path(__file__).parents[2]
OVERLAYS = ROOT / "k8s" / "overlays"
NAMES = sorted(folder.name for folder in OVERLAYS.iterdir())
BIN = Path(sys.executable).parent
CRDS = Path(os.environ.get("RAYLHF_KUBERAY_CRDS", ROOT.parent / "shared" / "cluster" / "crds"))
CORE = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}

Document = dict[str, Any]


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def ray_job_definition() -> Definition:
    if not (CRDS / "rayjobs.yaml").is_file():
        pytest.skip(f"KubeRay's definitions are not in {CRDS}: set RAYLHF_KUBERAY_CRDS to a folder with rayjobs.yaml")
    return Definition(CRDS / "rayjobs.yaml", "v1")


def built(overlay: str) -> list[Document]:
    command = [str(BIN / "kubectl"), "kustomize", str(OVERLAYS / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return list(yaml.safe_load_all(done.stdout))


def job_of(documents: list[Document]) -> Document:
    return next(document for document in documents if document["kind"] == "RayJob")


def ray_containers(job: Document) -> Iterator[Document]:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


@pytest.mark.parametrize("overlay", NAMES)
def test_the_files_are_what_launch_prints(overlay: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (OVERLAYS / overlay / "run.yaml").read_text()
    command = shlex.split(text.splitlines()[0].removeprefix("# raylhf "))
    assert main(command) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("overlay", NAMES)
def test_a_cluster_would_take_them(overlay: str, ray_job_definition: Definition) -> None:
    documents = built(overlay)
    for document in documents:
        if document["apiVersion"] in CORE:
            kubernetes_validate.validate(document, "1.37", strict=True)
    assert ray_job_definition.problems(job_of(documents)) == []


@pytest.mark.parametrize("overlay", NAMES)
def test_no_pod_has_more_rights_than_it_needs(overlay: str) -> None:
    documents = built(overlay)
    free = {"Namespace", "ResourceFlavor", "ClusterQueue", "Queue"}  # of the whole cluster
    assert {d["metadata"]["namespace"] for d in documents if d["kind"] not in free} == {"raylhf"}
    job = job_of(documents)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for container in ray_containers(job):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        secrets = [v["name"] for v in container["env"] if "valueFrom" in v]
        assert secrets == (["HF_TOKEN", "WANDB_API_KEY"] if container["name"] == "ray-head" else ["HF_TOKEN"])
        assert container["resources"]["limits"] == container["resources"]["requests"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        security = group["template"]["spec"]["securityContext"]
        assert (
            security["runAsNonRoot"]
            and security["runAsUser"]
            and security["seccompProfile"]["type"] == "RuntimeDefault"
        )
    for group in cluster["workerGroupSpecs"]:
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


def groups(job: Document) -> dict[str, Document]:
    return {group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


def test_learners_are_a_gang_and_rollouts_grow_and_shrink() -> None:
    job = job_of(built("gpu"))
    learner, rollout = groups(job)["learner"], groups(job)["rollout"]
    assert (learner["minReplicas"], learner["maxReplicas"], learner["numOfHosts"]) == (1, 1, 1)
    assert "idleTimeoutSeconds" not in learner
    assert (rollout["minReplicas"], rollout["replicas"], rollout["maxReplicas"]) == (1, 1, 8)
    assert rollout["idleTimeoutSeconds"] == 120
    assert job["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in (learner, rollout)]
    assert [(limit["nvidia.com/gpu"], limit["memory"]) for limit in limits] == [("6", "345Gi"), ("2", "115Gi")]


def test_pods_hold_the_workers_of_the_config() -> None:
    large = groups_of(load_config("configs/gpu_64x_70b.yaml"))
    sizes = {group.name: (group.num_pods, group.gpus, group.cpus) for group in large}
    assert sizes == {"learner": (4, 8, 32), "rollout": (8, 4, 8), "reward": (8, 0, 2)}
    (shared, reward) = groups_of(load_config("configs/gpu_1x_0.5b.yaml"))
    assert (shared.roles, shared.num_pods, shared.gpus) == (("rollout", "learner"), 1, 1)
    assert reward.pins == ["reward.resources.reward_nodes=0.001"]


def test_kueue_gets_a_fixed_suspended_run_and_volcano_its_queue() -> None:
    job = job_of(built("kueue"))
    assert job["spec"]["suspend"] and not job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "raylhf"
    assert job_of(built("volcano"))["metadata"]["labels"]["volcano.sh/queue-name"] == "raylhf"


def test_the_driver_runs_what_was_given(tmp_path: Path) -> None:
    script = built("gpu")[[d["kind"] for d in built("gpu")].index("ConfigMap")]["data"]["train.sh"]
    raylhf = tmp_path / "raylhf"
    raylhf.write_text('#!/bin/bash\nprintf "%s\\n" "$@" --\n')
    raylhf.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    doctor, train = (words.split("\n")[:-1] for words in done.stdout.split("--\n")[:2])
    assert (doctor[0], train[0]) == ("doctor", "train")
    assert doctor[1:] == [*train[1:], "cluster.host_memory_gib=7", "--wait", "3600"]
    assert {"rollout.max_replicas=8", "cluster.address=auto", "cluster.num_nodes=5", "output_dir=/runs"} <= set(train)


def _group(job: Document, number: int = 1) -> Document:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][number]


def _container(job: Document) -> Document:
    return _group(job)["template"]["spec"]["containers"][0]


MUTATIONS: list[tuple[str, Callable[[Document], object], str, bool]] = [
    # what, how, a part of our sentence, whether the definition refuses it as well
    ("typo", lambda j: _group(j).update(minReplcas=1), "did you mean 'minReplicas'", True),
    ("typo in a pod", lambda j: _container(j).update(enviroment=[]), "there is no field 'enviroment'", True),
    ("wrong type", lambda j: _group(j).update(maxReplicas="many"), "maxReplicas", True),
    ("truth as text", lambda j: j["spec"].update(shutdownAfterJobFinishes="yes"), "shutdownAfterJobFinishes", True),
    ("quantity", lambda j: _container(j)["resources"]["limits"].update(memory="8 GB"), "memory", True),
    ("no group name", lambda j: _group(j).pop("groupName"), "groupName: is missing", True),
    ("no image", lambda j: _container(j).pop("image"), "image: is missing", False),
    ("min over max", lambda j: _group(j).update(minReplicas=9), "minReplicas 9 is over maxReplicas 8", False),
    ("replicas", lambda j: _group(j).update(replicas=20), "replicas 20 is not between", False),
    ("volume", lambda j: _container(j)["volumeMounts"][0].update(name="x"), "mounts 'x'", False),
    ("old Ray", lambda j: j["spec"]["rayClusterSpec"].update(rayVersion="2.51.0"), "needs rayVersion 2.52", False),
    ("no token", lambda j: j["spec"]["rayClusterSpec"].pop("authOptions"), "authOptions.mode is not token", False),
    ("suspend", lambda j: j["spec"].update(suspend=True, shutdownAfterJobFinishes=False), "spec.suspend needs", False),
    ("sidecar", lambda j: j["spec"].update(submitterConfig={"backoffLimit": 1}), "spec.submitterConfig cannot", False),
    ("twice", lambda j: _group(j).update(resources={"cpu": "4"}), "in rayStartParams and in resources", False),
    ("labels", lambda j: _group(j)["rayStartParams"].update(labels="a=b"), "rayStartParams.labels is refused", False),
    ("restart", lambda j: _group(j)["template"]["spec"].update(restartPolicy="Always"), "must be Never", False),
    (
        "idle time",
        lambda j: j["spec"]["rayClusterSpec"]["autoscalerOptions"].update(version="v1"),
        "idleTimeoutSeconds needs",
        False,
    ),
    (
        "Redis by hand",
        lambda j: next(ray_containers(j))["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "x"}),
        "RAY_REDIS_ADDRESS is set without",
        False,
    ),
    ("volume twice", lambda j: _group(j)["template"]["spec"]["volumes"].append({"name": "tmp"}), "called tmp", False),
    ("no cluster", lambda j: j["spec"].pop("rayClusterSpec"), "rayClusterSpec is missing", False),
    ("gate", lambda j: j["spec"]["rayClusterSpec"].update(tlsOptions={"enabled": True}), "feature gate", False),
    ("name", lambda j: j["metadata"].update(name="8b"), "must begin with a letter", False),
]


@pytest.mark.parametrize(("what", "break_it", "sentence", "is_in_schema"), MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_a_broken_manifest_is_refused_with_a_sentence(
    what: str,
    break_it: Callable[[Document], object],
    sentence: str,
    is_in_schema: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = job_of(list(yaml.safe_load_all((OVERLAYS / "gpu" / "run.yaml").read_text())))
    break_it(job)
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump(job))
    assert main(["check", str(file)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert f"{file}: RayJob {job['metadata']['name']}: " in error


def test_the_definition_agrees_about_what_it_knows(ray_job_definition: Definition) -> None:
    whole = job_of(built("gpu"))
    for what, break_it, _, is_in_schema in MUTATIONS:
        job = copy.deepcopy(whole)
        break_it(job)
        assert bool(ray_job_definition.problems(job)) is is_in_schema, what
    rules = copy.deepcopy(whole)
    rules["spec"]["deletionStrategy"] = {"onSuccess": {"policy": "DeleteSelf"}}
    assert "BOTH onSuccess and onFailure" in ray_job_definition.problems(rules)[0]  # a CEL rule


@pytest.mark.parametrize(
    ("kind", "code", "words"), [("RayJobb", 2, "did you mean 'RayJob'"), ("ConfigMap", 0, "(not checked: ConfigMap)")]
)
def test_what_is_not_checked_is_said(
    kind: str, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = "ray.io/v1" if code else "v1"
    (tmp_path / "x.yaml").write_text(f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: a}}\n")
    assert main(["check", str(tmp_path / "x.yaml")]) == code
    output = capsys.readouterr()
    assert words in output.out + output.err


@pytest.mark.parametrize("overlay", NAMES)
def test_our_own_check_finds_nothing(overlay: str) -> None:
    assert find_manifest_problems((OVERLAYS / overlay / "run.yaml").read_text()) == []


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "launch.kubernetes.image is not set"),
        (["launch.kubernetes.imag=x"], "did you mean 'image'"),
        (["launch.kubernetes.image=x", "launch.kubernetes.queue=a"], "go together"),
        (
            [
                "launch.kubernetes.image=x",
                "launch.kubernetes.scheduler=kueue",
                "launch.kubernetes.queue=a",
                "rollout.max_replicas=9",
            ],
            "Kueue admits fixed runs only",
        ),
        (["launch.kubernetes.image=x", "name=8b"], "makes no name for Kubernetes"),
        (["launch.kubernetes.image=x", "rollout.min_replicas=4"], "min_replicas"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    overrides: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "k8s", "configs/gpu_8x_8b.yaml", "--dry-run", *overrides]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("is_there", "code"), [(False, 0), (True, 2)])
def test_a_run_is_handed_to_kubectl_once(
    is_there: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl = tmp_path / "kubectl"
    answer = "rayjob.ray.io/tiny-ppo" if is_there else ""
    kubectl.write_text(
        f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\n[ "$1" = get ] && echo "{answer}" || cat >{tmp_path}/in\n'
    )
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["launch", "k8s", "configs/tiny_ppo.yaml", "launch.kubernetes.image=raylhf:cpu"]) == code
    calls = (tmp_path / "calls").read_text().splitlines()
    output = capsys.readouterr()
    if is_there:
        assert len(calls) == 1 and "the run goes on from its checkpoint" in output.err
    else:
        assert calls[1] == "apply -n raylhf -f -"
        assert job_of(list(yaml.safe_load_all((tmp_path / "in").read_text())))["metadata"]["name"] == "tiny-ppo"
        assert "kubectl -n raylhf get rayjob tiny-ppo" in output.out


def test_the_container_file_is_clean() -> None:
    file = ROOT / "k8s" / "Containerfile"
    done = subprocess.run([str(BIN / "hadolint"), str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    text = file.read_text()
    assert text.count("USER 10001:10001") == text.count("FROM ") == 2


def test_the_operator_for_prometheus_gets_the_alerts_that_are_tested() -> None:
    folder = ROOT / "k8s" / "monitoring"
    documents = {document["kind"]: document for document in built("gpu")}
    assert documents["PrometheusRule"]["spec"] == yaml.safe_load((folder / "alert_rules.yaml").read_text())
    assert documents["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"
    boards = [d for d in built("gpu") if d["metadata"]["name"] == "raylhf-dashboard"]
    assert boards[0]["data"]["grafana_dashboard.json"] == (folder / "grafana_dashboard.json").read_text()

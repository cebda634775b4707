"""From facts to findings: each judgement names the node, what is wrong with it and what to do."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raylhf.cli import main
from raylhf.config.cluster import ClusterConfig
from raylhf.config.load import load_any_config
from raylhf.driver import examination
from raylhf.driver.doctor import (
    GIB,
    ClockReading,
    DiskNeed,
    Finding,
    judge_arithmetic,
    judge_clocks,
    judge_collective,
    judge_disk,
    judge_memory,
    judge_nodes,
    judge_open_files,
    judge_rates,
    judge_shm,
    judge_silence,
    judge_storage,
    judge_tmp,
    judge_versions,
    judge_wandb,
)
from raylhf.driver.examination import WandbProbe, disk_need, examine
from raylhf.driver.node_facts import (
    DRIVER_FILE,
    CollectiveMember,
    NodeFacts,
    cuda_driver,
    leave_canary,
    memory_limit,
)

TINY = Path(__file__).parents[2] / "configs" / "tiny_ppo.yaml"
THREE = ClusterConfig(address="auto", num_nodes=3)
VERSIONS: dict[str, str | None] = {"python": "3.11.7", "torch": "2.13.0", "git": "abc", "CUDA driver": "570.86.15"}
NEED = DiskNeed(checkpoint=10 * GIB, export=2 * GIB, num_checkpoints=3, num_there=0)


def facts(
    memory_gib: float = 16,
    shm_gib: float = 8,
    tmp_free_gib: float = 50,
    tmp_gib: float = 100,
    open_files: int = 65536,
    has_bfloat16: bool = True,
) -> NodeFacts:
    return NodeFacts(
        versions=VERSIONS,
        memory_bytes=int(memory_gib * GIB),
        has_memory_limit=True,
        shm_bytes=int(shm_gib * GIB),
        tmp_bytes=int(tmp_gib * GIB),
        tmp_free_bytes=int(tmp_free_gib * GIB),
        open_files=open_files,
        has_bfloat16=has_bfloat16,
    )


def with_n2(odd: NodeFacts) -> dict[str, NodeFacts]:
    return {"n1": facts(), "n2": odd}


def shm(odd: NodeFacts, *, has_gpus: bool = False) -> list[Finding]:
    return judge_shm(with_n2(odd), {"n1": 4.0 * GIB, "n2": 4.0 * GIB}, has_gpus=has_gpus)


def clocks(offset_s: float, round_trip_s: float = 0.01) -> list[Finding]:
    late = ClockReading(0.0, 500.0, 1000.0)  # of a round trip that says nothing
    return judge_clocks({"n1": [ClockReading(100.0, 100.005, 100.01)], "n2": [late, reading(offset_s, round_trip_s)]})


def reading(offset_s: float, round_trip_s: float) -> ClockReading:
    return ClockReading(100.0, 100.0 + round_trip_s / 2 + offset_s, 100.0 + round_trip_s)


@pytest.mark.parametrize(
    ("findings", "status", "node", "said", "remedy"),
    [
        (judge_nodes(THREE, ["n1", "n2"], ["n3"], wait_s=15)[:1], "FAIL", "", "2 of cluster.num_nodes=3", "start Ray"),
        (judge_nodes(THREE, ["n1", "n2"], ["n3"], wait_s=15)[1:], "FAIL", "n3", "not joined after 15 s", "same token"),
        (judge_nodes(ClusterConfig(num_nodes=2), ["n1"], [], wait_s=0), "FAIL", "", "alone", "set cluster.address"),
        (judge_silence("facts", {"n2": "no answer within 20 s"}), "FAIL", "n2", "no answer within 20 s", "df"),
        (
            judge_versions(VERSIONS, {"n1": VERSIONS, "n2": {**VERSIONS, "torch": "2.12.0"}}),
            "FAIL",
            "n2",
            "torch is 2.12.0, elsewhere 2.13.0",
            "install the same torch",
        ),
        (
            judge_versions(VERSIONS, {"n1": VERSIONS, "n2": {**VERSIONS, "torch": None}}),
            "FAIL",
            "n2",
            "torch is not installed",
            "install the same torch",
        ),
        (
            judge_versions(
                {**VERSIONS, "CUDA driver": None}, {"n1": VERSIONS, "n2": {**VERSIONS, "CUDA driver": "535.1"}}
            ),
            "warn",
            "n2",
            "CUDA driver is 535.1, elsewhere 570.86.15",
            "the same CUDA driver",
        ),
        (
            judge_memory(with_n2(facts(memory_gib=8)), host_memory_gib=16),
            "FAIL",
            "n2",
            "its cgroup allows 8.0 GiB, less than cluster.host_memory_gib=16",
            "cluster.host_memory_gib=8",
        ),
        (shm(facts(shm_gib=1)), "FAIL", "n2", "has 1.0 GiB and the object store takes 4.0 GiB", "--shm-size"),
        (shm(facts(shm_gib=4.5), has_gpus=True), "warn", "n2", "leaves little to NCCL", "--shm-size"),
        (judge_open_files(with_n2(facts(open_files=4096))), "warn", "n2", "may open 4096 files", "ulimit -n"),
        (judge_arithmetic(with_n2(facts(has_bfloat16=False))), "FAIL", "n2", "no instructions for bfloat16", "float32"),
        (judge_open_files(with_n2(facts(open_files=256))), "FAIL", "n2", "may open 256 files", "ulimit -n"),
        (judge_tmp(with_n2(facts(tmp_free_gib=0.1))), "FAIL", "n2", "only 102 MiB are free", "--temp-dir"),
        (judge_tmp(with_n2(facts(tmp_free_gib=4))), "warn", "n2", "96 % used", "--temp-dir"),
        (judge_disk("/runs", free_bytes=11 * GIB, need=NEED), "FAIL", "", "/runs has 11.0 GiB free", "checkpoint.keep"),
        (judge_disk("/runs", free_bytes=20 * GIB, need=NEED), "warn", "", "3 checkpoints are there", "checkpoint.keep"),
        (judge_storage("/runs", {"n1": "", "n2": "does not see it"}, []), "FAIL", "n2", "does not see", "every node"),
        (judge_storage("/runs", {"n1": "", "n2": ""}, ["n2"]), "FAIL", "n2", "wrote into /runs", "every node sees"),
        (clocks(5.0), "warn", "n2", "5.0 s ahead of the driver's", "chrony"),
        (clocks(-90.0), "FAIL", "n2", "90.0 s behind the driver's", "chrony"),
        (judge_rates({"n1": 1.2, "n2": 0.05}, {}), "warn", "n2", "0.050 GB/s", "ethtool"),
        (judge_rates({"n1": 1.2}, {"n2": "fetching from n1: no answer"}), "FAIL", "n2", "from n1", "firewall"),
        (judge_collective("NCCL", {"n1": "", "n2": "broken"}, 0.1), "FAIL", "n2", "broken", "NCCL_SOCKET_IFNAME"),
        (judge_wandb("https://w", "timed out"), "warn", "", "https://w: timed out", "HTTPS_PROXY"),
    ],
)
def test_what_is_wrong_names_the_node_the_finding_and_a_remedy(
    findings: list[Finding], status: str, node: str, said: str, remedy: str
) -> None:
    (finding,) = findings
    assert (finding.status, finding.node) == (status, node)
    assert said in finding.finding
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    "findings",
    [
        judge_nodes(THREE, ["n1", "n2", "n3"], [], wait_s=15),
        judge_versions(VERSIONS, {"n1": VERSIONS, "n2": {**VERSIONS, "git": None, "CUDA driver": None}}),
        judge_memory(with_n2(facts(memory_gib=15.5)), host_memory_gib=16),
        shm(facts(shm_gib=4.5)),
        judge_arithmetic(with_n2(facts())),
        judge_open_files(with_n2(facts())),
        judge_tmp(with_n2(facts())),
        judge_disk("/runs", free_bytes=33 * GIB, need=NEED),
        judge_disk("/runs", free_bytes=13 * GIB, need=DiskNeed(10 * GIB, 2 * GIB, num_checkpoints=3, num_there=2)),
        judge_disk("/runs", free_bytes=1, need=None),
        judge_storage("/runs", {"n1": "", "n2": ""}, []),
        clocks(0.0),
        clocks(5.0, round_trip_s=10.0),  # the round trip explains it
        judge_rates({"n1": 1.2, "n2": 0.9}, {}),
        judge_collective("gloo", {"n1": "", "n2": ""}, 0.01),
        judge_wandb("https://w", ""),
    ],
)
def test_what_is_well_is_one_line(findings: list[Finding]) -> None:
    assert [finding.status for finding in findings] == ["ok"]


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/job/step\n", {"job/memory.max": "100", "job/step/memory.max": "max"}, 100),
        ("0::/job\n", {"memory.max": "300", "job/memory.max": "200"}, 200),
        ("0::/not/mounted/here\n", {"memory.max": "300"}, 300),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "50"}, 50),
        ("5:cpu,memory:/docker/a\n", {"memory/memory.limit_in_bytes": "60"}, 60),
        ("0::/job\n", {"job/memory.max": "max"}, None),
        ("", {}, None),
    ],
)
def test_the_memory_limit_is_the_least_of_the_cgroups_above(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int | None
) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert memory_limit(tmp_path / "cgroup", tmp_path / "mount") == limit


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\nGCC 12.3.0\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n", "570.86.15"),
        ("something else\n", None),
    ],
)
def test_the_version_of_the_cuda_driver_is_the_modules(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert cuda_driver(tmp_path / "version") == version
    assert cuda_driver(tmp_path / "absent") is None


def test_a_node_that_sees_the_drivers_file_leaves_its_own(tmp_path: Path) -> None:
    (tmp_path / DRIVER_FILE).write_text("secret")
    assert leave_canary(str(tmp_path), "n1", "secret") == ""
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {DRIVER_FILE: "secret", "n1": "secret"}
    assert "reads something else" in leave_canary(str(tmp_path), "n1", "other")
    assert "cannot write and rename" in leave_canary(str(tmp_path), "absent/n1", "secret")


def test_a_node_that_does_not_see_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylhf.driver.node_facts.APPEAR_S", 0.0)
    assert (
        leave_canary(str(tmp_path / "elsewhere"), "n1", "secret")
        == f"does not see what the driver wrote into {tmp_path}"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_all_reduce_to_which_the_others_do_not_come_ends_at_its_deadline() -> None:
    member = CollectiveMember("gloo")
    with pytest.raises(Exception, match=r"(?i)timed? ?out"):
        member.reduce("127.0.0.1", member.open(), rank=0, world_size=2, timeout_s=1.0)


@pytest.fixture
def server() -> Iterator[Callable[[int], str]]:
    """server(code) -> address of an HTTP server that answers every request with that code."""
    servers = []

    def start(code: int) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(code)
                self.end_headers()

            def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for running in servers:
        running.shutdown()
        running.server_close()


@pytest.mark.parametrize(("code", "status"), [(200, "ok"), (401, "ok"), (503, "warn")])
def test_wandb_is_there_when_its_server_answers(
    server: Callable[[int], str], monkeypatch: pytest.MonkeyPatch, code: int, status: str
) -> None:
    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_BASE_URL", server(code))
    monkeypatch.setenv("WANDB_API_KEY", key)
    (finding,) = WandbProbe(load_any_config(TINY, ["tracking.wandb=auto"])).findings()
    assert finding.status == status, finding
    monkeypatch.setenv("WANDB_BASE_URL", server(code).replace("//", f"//user:{key}@"))
    (finding,) = WandbProbe(load_any_config(TINY, ["tracking.wandb=auto"])).findings()
    assert finding.status == "warn" and key not in json.dumps([finding.finding, finding.remedy])


def test_wandb_that_is_not_there_or_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (finding,) = WandbProbe(load_any_config(TINY, ["tracking.wandb=online"])).findings()
    assert finding.status == "warn" and "refused" in finding.finding
    (finding,) = WandbProbe(load_any_config(TINY, ["tracking.wandb=disabled"])).findings()
    assert finding.status == "skip" and "tracking.wandb=disabled" in finding.finding


def test_what_a_run_writes_is_counted_with_what_is_there(tmp_path: Path) -> None:
    config = load_any_config(TINY, [f"output_dir={tmp_path}", "checkpoint.keep=4"])
    (tmp_path / config.name / "checkpoints" / "step_10").mkdir(parents=True)
    need = disk_need(config)
    assert need is not None and (need.num_checkpoints, need.num_there) == (5, 1)
    assert disk_need(load_any_config(TINY, ["model.path=some/model"])) is None


def test_a_ray_that_is_not_there_is_a_failure_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr("raylhf.cluster.session.ray.init", refuse)
    config = load_any_config(TINY, ["cluster.address=127.0.0.1:9", "tracking.wandb=disabled"])
    findings = list(examine(config, wait_s=0))
    assert [(finding.check, finding.status) for finding in findings] == [("Ray", "FAIL"), ("W&B", "skip")]
    assert "no Ray answers there" in findings[0].finding


def test_settings_that_are_wrong_end_with_two_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(examination, "examine", lambda *_, **__: pytest.fail("it started"))
    assert main(["doctor", str(TINY), "rollout.group_sise=2"]) == 2
    assert "rollout.group_sise" in capsys.readouterr().err

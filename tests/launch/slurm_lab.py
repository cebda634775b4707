"""A Slurm of several nodes on one machine: each has its own network, host name, processes, /tmp/ray and /dev/shm."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "scancel", "ip", "nsenter", "unshare")
CONTROL = "control"
SETTINGS = """\
ClusterName=lab
SlurmctldHost=control(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
ReturnToService=2
SlurmdTimeout=10
KillWait=5
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What is missing for a lab here."""
    if os.geteuid() != 0:
        return "a real Slurm needs root for its network namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"a real Slurm needs Debian's slurm-wlm, munge and iproute2 (missing: {', '.join(missing)})"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        return "a real Slurm needs network namespaces, which may not be made here"
    return None


class SlurmLab:
    """The controller and its nodes, `node1` to `nodeN`."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._munged: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until every node is idle."""
        self._write_settings()
        self._link()
        command = ["munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key"]
        command += [f"--{kind}-file={self.folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
        self._munged = subprocess.Popen([*command, f"--socket={self.folder}/munge.sock"], stderr=subprocess.DEVNULL)
        self.until(lambda: (self.folder / "munge.sock").exists(), "munge's socket", timeout_s=20)
        self._start_host(CONTROL, "slurmctld -D -c")
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: self.num_idle() == len(self.nodes), "idle nodes", timeout_s=60)

    def start_node(self, node: str) -> None:
        """Switch a node on."""
        spool, ray = self.folder / f"spool-{node}", self.folder / f"ray-{node}"
        spool.mkdir(exist_ok=True)
        shutil.rmtree(ray, ignore_errors=True)
        ray.mkdir()
        own = f"mkdir -p /tmp/ray; mount --bind {ray} /tmp/ray; mount -t tmpfs -o size=4g tmpfs /dev/shm"
        self._start_host(node, f"slurmd -D -N {node}", own)

    def kill_node(self, node: str) -> None:
        """Pull its plug."""
        host = self._hosts.pop(node)
        host.kill()
        host.wait(timeout=20)

    def stop(self) -> None:
        """End everything, whatever has happened."""
        for name in list(self._hosts):
            self.kill_node(name)
        if self._munged is not None:
            self._munged.terminate()
            self._munged.wait(timeout=20)
        for name in (CONTROL, *self.nodes):
            subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True, check=False)

    def run(self, command: Sequence[str]) -> str:
        """Run a command in the controller's network; returns what it printed."""
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self._namespace(CONTROL)}", *command],
            env=os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run(["scontrol", "show", "job", "-o", job_id]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, holds: Callable[[], object], what: str, *, timeout_s: float) -> None:
        """Wait until something holds; fails with `what` and the logs' ends when it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s\n{self._log_ends()}"
            time.sleep(0.3)

    def _log_ends(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def num_idle(self) -> int:
        return self.run(["sinfo", "-h", "-N", "-o", "%T"]).split().count("idle")

    def _start_host(self, name: str, daemon: str, own: str = "true") -> None:
        script = f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; {own}; {daemon} & wait"
        apart = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with (self.folder / f"{name}.out").open("ab") as out:
            self._hosts[name] = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._namespace(name)}", *apart, "bash", "-c", script],
                env=os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _write_settings(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        rows = [f"NodeName={node} NodeAddr={self._address(node)} CPUs=2 RealMemory=6000" for node in self.nodes]
        (self.folder / "slurm.conf").write_text(SETTINGS.format(folder=self.folder, nodes="\n".join(rows)))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        hosts = [f"{self._address(name)} {name}\n" for name in (CONTROL, *self.nodes)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))

    def _link(self) -> None:
        control = self._namespace(CONTROL)
        _ip("netns add", control)
        _ip("-n", control, "link add br0 type bridge")
        _ip("-n", control, "addr add 10.77.0.1/24 dev br0")
        _ip("-n", control, "link set br0 up")
        _ip("-n", control, "link set lo up")
        for node in self.nodes:
            space, end = self._namespace(node), f"veth-{node}"
            _ip("netns add", space)
            _ip("link add", end, "netns", control, "type veth peer name eth0 netns", space)
            _ip("-n", control, "link set", end, "master br0 up")
            _ip("-n", space, "addr add", f"{self._address(node)}/24", "dev eth0")
            _ip("-n", space, "link set eth0 up")
            _ip("-n", space, "link set lo up")
            _ip("-n", space, "route add default via 10.77.0.1")

    def _namespace(self, name: str) -> str:
        return f"raylhf-{os.getpid()}-{name}"

    def _address(self, name: str) -> str:
        return "10.77.0.1" if name == CONTROL else f"10.77.0.{10 + int(name.removeprefix('node'))}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *" ".join(words).split()], check=True, timeout=20)


@contextmanager
def slurm_lab(folder: Path, num_nodes: int) -> Iterator[SlurmLab]:
    """A lab that is up, and gone afterwards."""
    lab = SlurmLab(folder, num_nodes)
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()

"""Whoever would join a Ray that raylhf starts must show its token, and its dashboard listens on this machine alone."""

import contextlib
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import ray

from raylhf.cluster.session import ray_session
from raylhf.config.cluster import ClusterConfig

SCRIPTS = Path(__file__).parents[2] / "raylhf" / "launch"
NODE_IP = "127.0.0.2"
"""Ray would take 127.0.0.1 for the machine's own address."""
START_ATTEMPTS, JOIN_S = 3, 90.0
JOIN = """
import sys, ray, ray.util.client_connect
if sys.argv[1].startswith("ray://"):
    ray.util.client_connect.connect(sys.argv[1].removeprefix("ray://"), connection_retries=1)
else:
    ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("joined", ray.get(ray.remote(num_cpus=0)(lambda: 42).remote(), timeout=60))
"""


def tries_to_join(address, folder, right_token):
    """What becomes of drivers that would join, all at the same time: {what they show: their output}."""
    wrong = folder / "wrong"
    wrong.write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(folder), "RAY_NUM_REDIS_GET_RETRIES": "1"}
    shown = {
        "nothing": {},
        "nothing on purpose": {"RAY_AUTH_MODE": "disabled"},
        "a wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)},
        "the token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(right_token)},
    }
    drivers = {
        what: subprocess.Popen(
            [sys.executable, "-c", JOIN, address],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for what, variables in shown.items()
    }
    outputs = {}
    for what, driver in drivers.items():
        try:
            outputs[what] = driver.communicate(timeout=JOIN_S)[0]
        except subprocess.TimeoutExpired:
            driver.kill()
            outputs[what] = driver.communicate()[0] + "still waiting"
    return outputs


def assert_only_the_token_opens(outputs):
    assert "joined 42" in outputs.pop("the token")
    for what, output in outputs.items():
        assert "joined" not in output, f"{what}: {output}"
        assert re.search("InvalidAuthToken|[Uu]nauthenticated|connection timeout", output), f"{what}: {output}"


def status_of(url, token=None):
    request = urllib.request.Request(url, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_ray_of_one_run_lets_nobody_in_without_its_token_whatever_the_shell_says(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token of another cluster")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")  # restored afterwards
    with ray_session(ClusterConfig(), env={}):
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert len(token.read_text()) == 64
        outputs = tries_to_join(ray.get_runtime_context().gcs_address, tmp_path, token)
    assert_only_the_token_opens(outputs)
    assert not token.exists()


@pytest.fixture(scope="module")
def head():
    """(address, token file, first port) of a Ray that launch/ray_head.sh has started on this machine."""
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        base = first_free_port()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": name,
            "RAY_TMPDIR": name,
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAYLHF_NODE_IP": NODE_IP,
            "RAYLHF_PORT_BASE": str(base),
            "RAYLHF_NUM_CPUS": "1",
            "RAYLHF_OBJECT_STORE_MIB": "100",
        }
        process = started_head(environment, folder / "out")
        try:
            yield f"{NODE_IP}:{base}", token, base
        finally:
            everything = [process, *process.children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(everything, timeout=20)
            for left in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()


def started_head(environment, log):
    """The process of ray_head.sh. On a busy machine Ray gives up after 30 s, and is started again."""
    for _ in range(START_ATTEMPTS):
        with log.open("w") as out:
            command = ["bash", str(SCRIPTS / "ray_head.sh")]
            process = psutil.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if "Ray runtime started" in log.read_text():
                return process
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def first_free_port():
    """Of ten in a row."""
    for base in range(20_000, 30_000, 250):
        if not any(map(answers, range(base, base + 10))):
            return base
    raise AssertionError("no ten free ports in a row")


def answers(port):
    for host in ("127.0.0.1", NODE_IP):
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return True
    return False


def test_a_ray_of_several_nodes_lets_nobody_in_without_its_token(head, tmp_path):
    address, token, _ = head
    assert_only_the_token_opens(tries_to_join(address, tmp_path, token))


def test_the_dashboard_asks_for_the_token_and_listens_on_the_loopback_alone(head):
    _, token, base = head
    url = f"http://127.0.0.1:{base + 8}/api/jobs/"
    assert (status_of(url), status_of(url, "wrong"), status_of(url, token.read_text())) == (401, 403, 200)
    listening = [str(c.laddr) for c in psutil.net_connections("tcp") if c.status == "LISTEN"]
    assert [address for address in listening if f"port={base + 8})" in address] == [
        f"addr(ip='127.0.0.1', port={base + 8})"
    ]


def test_a_ray_client_without_the_token_is_turned_away(head, tmp_path):
    _, token, base = head
    outputs = tries_to_join(f"ray://{NODE_IP}:{base + 7}", tmp_path, token)
    assert_only_the_token_opens(outputs)

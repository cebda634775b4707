"""`raylhf serve-reward` as a user starts it: one server for the module, asked over HTTP."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from raylhf.cli import main
from raylhf.cluster.http_limits import HEAD_TIMEOUT_S, MAX_HEAD_BYTES
from raylhf.config.service import load_service_config
from raylhf.rewards.build import BuildContext, build_reward
from raylhf.rewards.state import RewardState
from raylhf.rewards.texts import TextSample, rollouts_of_texts
from raylhf.rewards.worker import RewardWorker

TOKEN = "a-token-of-thirty-two-characters"
MARK = "RAYLHF_TEST_SERVER"
START_S, END_S = 240.0, 60.0
CONFIG = """
reward:
  graph:
    kind: sum
    parts:
      - {name: tone, reward: {kind: sentiment}}
      - {name: picky, weight: 2.0, reward: {kind: function, path: "picky:score", on_failure: raise}}
serve: {port: PORT, max_batch_size: 8, batch_wait_s: 0.2, max_samples_per_request: 20, max_request_bytes: 20000,
        request_timeout_s: 5.0}
cluster: {cpus_per_node: 1}
"""
PICKY = """
import time

def score(prompt, response, metadata):
    if response == "refused":
        raise ValueError("I do not score this")
    time.sleep(metadata.get("seconds", 0))
    return metadata.get("value", 1.0)
"""


class Server:
    """A `raylhf serve-reward` in a process of its own."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.config = folder / "reward.yaml"
        self.config.write_text(CONFIG.replace("PORT", str(self.port)))
        (folder / "picky.py").write_text(PICKY)
        self.out = folder / "out"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {
            "RAYLHF_REWARD_TOKEN": TOKEN,
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "TMPDIR": str(folder),
            "HOME": str(folder),
            MARK: str(folder),
        }
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raylhf.cli", "serve-reward", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while "serving the sum reward" not in self.out.read_text():
            assert self.process.poll() is None, self.out.read_text()
            assert time.monotonic() < deadline, self.out.read_text()
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """What carries our mark, wherever it hangs in the tree of processes."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.out.parent.as_posix():
                    found.append(process)
        return found

    def ask(self, path: str, body: bytes | None = None, token: str | None = TOKEN) -> tuple[int, str]:
        """(status, text of the answer) of a GET, or of a POST with a body."""
        request = urllib.request.Request(self.url + path, data=body)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def score(self, *samples: dict) -> dict:
        status, text = self.ask("/score", body_of(*samples))
        assert status == 200, text
        return json.loads(text)

    def metric(self, name: str) -> float:
        """The value of one line of /metrics; 0 where it is not there."""
        status, text = self.ask("/metrics")
        assert status == 200
        line = re.search(rf"^{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)
        return float(line[1]) if line else 0.0


def sample(response, prompt="How was it?", **metadata):
    return {"prompt": [{"role": "user", "content": prompt}], "response": response, "metadata": metadata}


def body_of(*samples):
    return json.dumps({"version": 1, "samples": samples}).encode()


@pytest.fixture(scope="module")
def server():
    # Right under /tmp: Ray keeps sockets below it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp", ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder))
        try:
            server.wait_until_ready()
            yield server
        finally:
            for process in server.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            server.process.wait()


@pytest.mark.parametrize("token", [None, "another-token-of-32-characters--", TOKEN[:-1], TOKEN + "x", ""])
def test_without_the_right_token_nothing_is_scored_or_told(server, token):
    before = server.metric('raylhf_reward_requests_total{status="401"}')
    assert server.ask("/score", body_of(sample("good")), token) == (401, '{"error":"unauthorized"}')
    assert server.ask("/metrics", token=token) == (401, '{"error":"unauthorized"}')
    assert server.metric('raylhf_reward_requests_total{status="401"}') == before + 1


def test_health_is_told_to_everybody(server):
    assert server.ask("/health", token=None) == (200, '{"status":"ok"}')


def test_other_paths_and_methods_are_refused(server):
    assert server.ask("/nowhere")[0] == 404
    assert server.ask("/score")[0] == 405
    assert server.ask("/health", b"{}")[0] == 405


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "is not JSON"),
        (b"{}", 422, "version: Field required; samples: Field required"),
        (b"[]", 422, "the body: Input should be an object"),
        (b'{"version": 2, "samples": []}', 422, "version: Input should be 1"),
        (b'{"version": 1, "samples": [{"prompt": [], "response": 3}]}', 422, "samples.0.response"),
        (b'{"version": 1, "samples": [{"prompt": "x", "response": ""}]}', 422, "samples.0.prompt"),
        (b'{"version": 1, "samples": [{"prompt": [], "response": "", "num_tokens": -1}]}', 422, "num_tokens"),
        (b'{"version": 1, "samples": [{"prompt": [], "response": "", "num_tokens": 10000001}]}', 422, "num_tokens"),
        (b'{"version": 1, "samples": [{"prompt": [], "response": "", "weight": 1}]}', 422, "samples.0.weight"),
        (body_of(*[sample("x")] * 21), 413, "21 samples are more than the 20"),
        (body_of(sample("x" * 20_000)), 413, "longer than 20000 bytes"),
    ],
)
def test_a_request_that_does_not_fit_is_told_why(server, body, status, sentence):
    got, text = server.ask("/score", body)
    assert (got, sentence in json.loads(text)["error"]) == (status, True), text


def test_a_body_of_unknown_length_is_read_up_to_the_limit_only(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = (
            "POST /score HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {TOKEN}",
            "Transfer-Encoding: chunked",
            "",
            "",
        )
        connection.sendall("\r\n".join(head).encode())
        chunk = b"2000\r\n" + b"x" * 0x2000 + b"\r\n"
        for _ in range(4):  # 32,768 bytes, and no end
            connection.sendall(chunk)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_who_sends_too_much_or_too_slowly_is_refused_in_time_while_others_are_answered(server):
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\nAuthorization: Bearer {TOKEN}\r\n"
    sent = {
        b"": b"408",
        head.encode(): b"408",  # no end of the headers
        f"{head}\r\n{{".encode(): b"408",  # no more of the body
        f"{head.replace(TOKEN, 'x')}\r\n{{".encode(): b"401",
        f"{head}X-Long: {'x' * MAX_HEAD_BYTES}".encode(): b"431",
    }
    with contextlib.ExitStack() as opened:
        connections = {}
        for data in sent:
            address = ("127.0.0.1", server.port)
            connections[data] = opened.enter_context(socket.create_connection(address, timeout=HEAD_TIMEOUT_S + 20))
            connections[data].sendall(data)
        assert server.score(sample("So it is."))["scores"] == [2.0]
        answers = {data: connection.recv(1000) for data, connection in connections.items()}
    assert [answer.split(b" ")[1] for answer in answers.values()] == list(sent.values()), answers


def test_scores_are_those_of_the_worker(server, monkeypatch):
    monkeypatch.syspath_prepend(str(server.config.parent))
    texts = ["A wonderful day!", "It was terrible.", "So it is."]
    answer = server.score(*(sample(text, value=i) for i, text in enumerate(texts)))
    worker = RewardWorker(load_service_config(server.config).reward)
    worker.start()
    turns = ({"role": "user", "content": "How was it?"},)
    expected = worker.score_now(
        rollouts_of_texts([TextSample(turns, text, metadata={"value": i}) for i, text in enumerate(texts)])
    )
    assert answer["scores"] == expected.scores.tolist()
    assert answer["parts"] == {name: scores.tolist() for name, scores in expected.parts.items()}
    assert answer["parts"]["picky"] == [0.0, 1.0, 2.0]
    assert answer["errors"] == []


def test_a_request_longer_than_a_batch_keeps_its_order(server):
    answer = server.score(*(sample("So it is.", value=float(i)) for i in range(20)))
    assert answer["scores"] == [2.0 * i for i in range(20)]


def test_a_failed_score_is_null_with_a_sentence_that_names_the_sample(server):
    invalid = 'raylhf_reward_invalid_scores_total{part="score"}'
    before = server.metric(invalid)
    answer = server.score(*[sample("So it is.")] * 9, sample("refused"), sample("So it is."))
    assert answer["scores"] == [2.0] * 9 + [None, 2.0]
    assert answer["parts"]["tone"] == [0.0] * 9 + [-0.296, 0.0]
    assert answer["parts"]["picky"] == [1.0] * 9 + [None, 1.0]
    (error,) = answer["errors"]
    assert "sample 9" in error and "I do not score this" in error
    assert server.metric(invalid) == before + 1


def test_requests_at_the_same_time_share_batches_and_keep_their_own_scores(server):
    name = "raylhf_reward_batch_size"
    batches, samples = server.metric(f"{name}_count"), server.metric(f"{name}_sum")
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda i: server.score(sample("So it is.", value=float(i))), range(16)))
    assert [answer["scores"] for answer in answers] == [[2.0 * i] for i in range(16)]
    assert server.metric(f"{name}_sum") == samples + 16
    assert 2 <= server.metric(f"{name}_count") - batches <= 8


def test_requests_and_samples_are_counted(server):
    names = ('raylhf_reward_requests_total{status="200"}', "raylhf_reward_samples_total")
    before = [server.metric(name) for name in names]
    server.score(sample("good"), sample("bad"), sample("so"))
    assert [server.metric(name) for name in names] == [before[0] + 1, before[1] + 3]
    assert server.metric("raylhf_reward_request_seconds_count") > 0


def test_a_scoring_past_the_deadline_is_given_up_while_the_scorer_stays_healthy(server):
    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(server.ask, "/score", body_of(sample("slow", seconds=7)))
        time.sleep(1.0)
        assert server.ask("/health")[0] == 200
        status, text = slow.result()
    assert status == 504, text
    assert "no scores within 5 s" in json.loads(text)["error"]


def test_the_remote_reward_scores_through_it(server, monkeypatch):
    from raylhf.config.reward_leaves import RemoteReward

    monkeypatch.setenv("REWARD_TOKEN_OF_THE_TEST", TOKEN)
    config = RemoteReward(kind="remote", url=server.url, token_env="REWARD_TOKEN_OF_THE_TEST", batch_size=3)
    context = BuildContext(policy=None, device="cpu", batch_tokens=1000, state=RewardState())
    texts = ["So it is."] * 4 + ["refused"]
    turns = ({"role": "user", "content": "How was it?"},)
    output = build_reward(config, context).score(
        rollouts_of_texts([TextSample(turns, text, metadata={"value": i}) for i, text in enumerate(texts)])
    )
    assert output.valid.tolist() == [True] * 4 + [False]
    assert output.scores[:4].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert any("I do not score this" in error for error in output.errors)


def test_a_taken_port_is_told_before_ray_is_started(server, monkeypatch, capsys):
    monkeypatch.setenv("RAYLHF_REWARD_TOKEN", TOKEN)
    assert main(["serve-reward", str(server.config)]) == 2
    assert f"serve.port={server.port}: Address already in use; choose another" in capsys.readouterr().err


def test_sigterm_ends_it_in_order_and_leaves_no_process(server):
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(END_S) == 0, server.out.read_text()
    _, alive = psutil.wait_procs(server.processes(), timeout=10)
    assert [process.cmdline() for process in alive] == []
    assert TOKEN not in server.out.read_text()

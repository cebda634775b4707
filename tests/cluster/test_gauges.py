"""A driver's numbers, through a real Ray, in a real Prometheus; and an alert that fires on them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from gauges_driver import KL_PER_TOKEN, RUN

from raylhf.cluster import gauges as module
from raylhf.cluster.gauges import Gauges
from raylhf.tracking.exported import EXPORTED, PREFIX, Series

MONITORING = Path(__file__).parents[2] / "k8s" / "monitoring"
START_S, SCRAPE_S, ALERT_S = 180.0, 60.0, 60.0
HOLD_S = 4.0
"""Longer than Ray remembers a gauge at the report interval of this test."""
SETTINGS = """\
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [RULES]
scrape_configs:
  - {job_name: ray, static_configs: [{targets: ["127.0.0.1:PORT"]}]}
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.stdin.close()  # the driver goes on at this, and Prometheus has no other use for it
        if process.args[0] == "prometheus":
            process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Prometheus:
    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}/api/v1/"

    def ask(self, path, **parameters):
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expression):
        return [(s["metric"], float(s["value"][1])) for s in self.ask("query", query=expression)["result"]]

    def until(self, look, timeout_s):
        """What `look()` gives, as soon as it gives something."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if found := look():
                    return found
            except OSError:  # it is not up yet
                pass
            assert time.monotonic() < deadline, "Prometheus does not get to see it"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """A Prometheus that scrapes the Ray of a driver which has logged."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs Debian's prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    port, own_port = free_port(), free_port()
    rules = re.sub(r"for: \d+m", "for: 1s", (MONITORING / "alert_rules.yaml").read_text())
    (folder / "rules.yaml").write_text(rules)
    (folder / "settings.yaml").write_text(SETTINGS.replace("RULES", "rules.yaml").replace("PORT", str(port)))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(folder), "RAY_metrics_report_interval_ms": "1000"}
    driver = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "gauges_driver.py", str(port), str(folder / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    storage = (f"--storage.tsdb.path={folder / 'data'}", f"--config.file={folder / 'settings.yaml'}")
    scraper = subprocess.Popen(
        ["prometheus", f"--web.listen-address=127.0.0.1:{own_port}", "--log.level=error", *storage],
        stdin=subprocess.PIPE,
    )
    with ended(scraper), ended(driver):
        assert driver.stdout is not None and "logged\n" in driver.stdout  # reads until it is there
        yield Prometheus(own_port)


@pytest.mark.timeout(START_S + SCRAPE_S + ALERT_S)
def test_prometheus_sees_what_the_driver_logs_for_as_long_as_it_lives_and_an_alert_fires(prometheus):
    prometheus.until(lambda: prometheus.query(f"{PREFIX}raylhf_kl_to_ref_per_token_nats == {KL_PER_TOKEN}"), SCRAPE_S)
    firing = prometheus.until(
        lambda: [a for a in prometheus.ask("alerts")["alerts"] if a["state"] == "firing"], ALERT_S
    )
    assert {(a["labels"]["alertname"], a["labels"]["run"]) for a in firing} >= {("RaylhfKLRunaway", RUN)}
    assert "0.90 nats per response token" in firing[0]["annotations"]["description"]

    time.sleep(HOLD_S)  # nothing is logged meanwhile
    seen = {metric["__name__"] for metric, _ in prometheus.query(f'{{run="{RUN}"}}') if "__name__" in metric}
    not_finite = {PREFIX + "raylhf_kl_coef"}
    assert {name for name in seen if name.startswith(PREFIX)} == {PREFIX + name for name in EXPORTED} - not_finite
    for name, labels, value in [
        ("raylhf_step", {}, 2.0),
        ("raylhf_step_seconds", {}, 0.5),
        ("raylhf_workers", {"role": "rollout", "state": "healthy"}, 2.0),
        ("raylhf_workers", {"role": "rollout", "state": "stale"}, 1.0),
        ("raylhf_workers", {"role": "rollout", "state": "dead"}, 0.0),
        ("raylhf_worker_restarts", {"role": "learner"}, 1.0),
        ("raylhf_queue_prompts", {"stage": "waiting"}, 3.0),
    ]:
        selector = ",".join(f'{key}="{text}"' for key, text in {"run": RUN, **labels}.items())
        assert [v for _, v in prometheus.query(f"{PREFIX}{name}{{{selector}}}")] == [value], (name, labels)
    ((_, since),) = prometheus.query(f"time() - {PREFIX}raylhf_last_step_timestamp_seconds")
    assert HOLD_S <= since < START_S


@pytest.mark.timeout(START_S + SCRAPE_S)
def test_every_panel_of_the_dashboard_has_something_to_show(prometheus):
    panels = json.loads((MONITORING / "grafana_dashboard.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    shown = {e.replace("$run", RUN) for e in expressions if "gpus" not in e and "kl_coef" not in e}
    prometheus.until(lambda: all(prometheus.query(expression) for expression in shown), SCRAPE_S)


def test_a_failure_of_ray_is_told_of_once_and_goes_no_further(monkeypatch, caplog):
    calls = []

    def fail(*args):
        calls.append(args)
        raise RuntimeError("no agent")

    monkeypatch.setattr(module, "REPEAT_S", 0.01)
    monkeypatch.setattr(module, "Gauge", lambda *_: SimpleNamespace(set=fail))
    gauges = Gauges("r")
    gauges.update({Series("raylhf_step"): 1.0})
    deadline = time.monotonic() + 30
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    gauges.close()
    assert len(calls) >= 3
    assert [record.message for record in caplog.records].count(
        "the run's numbers cannot be handed to Prometheus (no agent); the run goes on"
    ) == 1

"""Dashboard and alerts against the names that are exported, and by Prometheus's own checker."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from raylhf.tracking.catalogue import METRICS
from raylhf.tracking.exported import EXPORTED, PREFIX, Series, exported_row, render_exported

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "k8s" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana_dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES: list[dict[str, Any]] = [
    rule for group in YAML(typ="safe").load(MONITORING / "alert_rules.yaml")["groups"] for rule in group["rules"]
]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
OWN = {PREFIX + name for name in EXPORTED}
RAYS = {"ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_mem_total", "ray_node_gpus_utilization"}
"""Of Ray itself. tests/cluster/test_gauges.py looks for them in a real one, but for the GPUs'."""
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's prometheus (promtool)")


def metrics_of(expression):
    """Names of the metrics in a PromQL expression: what is neither a label, a function nor a keyword."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|without|ignoring)\s*\([^)]*\)|\"[^\"]*\"", " ", expression)
    names = re.findall(r"\b[a-zA-Z_:][a-zA-Z0-9_:]*(?!\w)(?!\s*\()", bare)
    return {
        name for name in names if name not in {"max", "min", "sum", "avg", "count", "unless", "and", "or", "offset"}
    }


def test_metric_names_are_found_in_an_expression():
    expression = (
        'max by (run) (max_over_time(ray_a{run=~"$run"}[5m])) / on (run) sum (ray_b) unless time() - misspelt > 1e-6'
    )
    assert metrics_of(expression) == {"ray_a", "ray_b", "misspelt"}


def test_dashboard_and_alerts_name_only_metrics_that_exist_and_panels_show_all_of_ours():
    shown = set().union(*map(metrics_of, EXPRESSIONS))
    assert shown == OWN | RAYS
    assert set().union(*(metrics_of(rule["expr"]) for rule in RULES)) <= OWN
    assert all('run=~"$run"' in expression for expression in EXPRESSIONS if metrics_of(expression) & OWN)


def test_the_dashboard_has_a_variable_for_the_run_and_panels_that_do_not_overlap():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables.keys() == {"datasource", "run"} and "ray_raylhf_step" in variables["run"]["definition"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert all(panel["title"] and panel["description"] for panel in PANELS)


def test_every_alert_says_how_bad_it_is_what_it_means_and_what_to_do():
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description", "remedy"}
        assert "://" not in json.dumps(rule)
        assert f"`{rule['alert']}`" in documented, rule["alert"]


def test_names_come_from_the_catalogue_and_follow_prometheus():
    for name, exported in EXPORTED.items():
        assert re.fullmatch(r"raylhf_[a-z][a-z_]*[a-z]", name) and not name.endswith(("_total", "_s", "_frac"))
        assert set(exported.keys) <= METRICS.keys() and exported.meaning
    keys = [key for exported in EXPORTED.values() for key in exported.keys]
    assert len(keys) == len(set(keys))
    assert render_exported() in (ROOT / "docs" / "metrics.md").read_text(), "paste what render_exported() returns"


def test_a_row_is_exported_under_its_names_and_the_rest_of_it_is_not():
    row = {"policy/kl_to_ref": 3.0, "rm/loss": 0.5, "critic/lr": 1e-4}
    assert exported_row(row) == {Series("raylhf_kl_to_ref_nats"): 3.0, Series("raylhf_loss"): 0.5}


@needs_promtool
def test_prometheus_accepts_the_alerts_and_they_fire_when_they_should():
    for command in (["check", "rules", "alert_rules.yaml"], ["test", "rules", "alert_rules_test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried():
    tried = (MONITORING / "alert_rules_test.yaml").read_text()
    assert all(rule["alert"] in tried for rule in RULES)

import ast
import re
from pathlib import Path

import pytest

from raylhf.tracking.catalogue import HISTOGRAMS, METRICS, SUMMARY, is_metric, render_catalogue, require_metrics

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "metrics.md").read_text()
AREAS = {key.split("/")[0] for key in METRICS}


def test_the_documentation_ends_with_the_rendered_catalogue():
    assert DOCS.endswith(render_catalogue()), "paste what render_catalogue() returns"


def test_every_metric_has_its_line_and_every_key_that_the_text_names_exists():
    lines = re.findall(r"^\| `([^`]+)` \|", DOCS.partition("\n## Catalogue\n")[2], flags=re.MULTILINE)
    assert lines == [*METRICS, *HISTOGRAMS, *SUMMARY]
    named = {name for name in re.findall(r"`([a-z_]+/[a-z0-9_/<>]+)`", DOCS) if name.split("/")[0] in AREAS}
    assert len(named) > 50
    assert named <= METRICS.keys() | HISTOGRAMS.keys() | SUMMARY.keys()


def test_keys_read_as_area_slash_what_and_have_a_meaning_and_a_unit():
    for key, metric in {**METRICS, **HISTOGRAMS, **SUMMARY}.items():
        assert re.fullmatch(r"[a-z_]+/([a-z]+/<name>_)?[a-z0-9_]+", key), key
        assert all((metric.meaning, metric.unit, "\n" not in metric.meaning)), key


def test_no_key_has_two_meanings():
    assert len({*METRICS, *HISTOGRAMS, *SUMMARY}) == len(METRICS) + len(HISTOGRAMS) + len(SUMMARY)


def test_part_names_stand_for_any_nested_name():
    assert is_metric("reward/part/style_mean")
    assert is_metric("eval/part/style/short_1_mean")
    assert not is_metric("reward/part/<name>_mean")
    assert not is_metric("reward/part/Style_mean")
    with pytest.raises(ValueError, match=r"'policy/kl_ref' .* did you mean 'policy/kl_to_ref'.*; 'x' is not in"):
        require_metrics(["policy/kl_ref", "policy/loss", "x"])


def test_every_key_written_in_the_package_is_in_the_catalogue():
    known = re.compile(rf"({'|'.join(sorted(AREAS))})/[a-z0-9_]+")
    for file in (ROOT / "raylhf").rglob("*.py"):
        if file.parent.name == "launch":  # logs no metrics; names of Kubernetes' API read like keys
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and known.fullmatch(node.value):
                assert is_metric(node.value) or node.value in HISTOGRAMS | SUMMARY, f"{file}: {node.value}"

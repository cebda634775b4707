"""Settings of a reward outside of a run."""

from pathlib import Path

import pytest

from raylhf.config import ConfigError
from raylhf.config.service import ServeConfig, load_service_config

TINY = Path(__file__).parents[2] / "configs" / "tiny_ppo.yaml"
ALONE = """
reward:
  graph:
    kind: sum
    parts:
      - {name: a, reward: {kind: sentiment, on_failure: raise}}
      - {name: on_failure, reward: {kind: whiten, reward: {kind: length, on_failure: resample}}}
serve:
  port: 9000
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_text(ALONE)
    return path


def problems(path, *overrides):
    with pytest.raises(ConfigError) as error:
        load_service_config(path, overrides)
    return error.value.problems


def test_a_file_with_a_reward_alone_is_enough(file):
    config = load_service_config(file, ["serve.host=0.0.0.0"])
    assert (config.serve.host, config.serve.port) == ("0.0.0.0", 9000)
    assert config.reward.graph.kind == "sum"


def test_a_policy_runs_file_serves_as_it_is():
    config = load_service_config(TINY, ["serve.port=9001"])
    assert config.serve == ServeConfig(port=9001)


def test_every_mistake_is_told_with_its_line(file):
    file.write_text(ALONE.replace("port: 9000", "prt: 9000").replace("kind: length", "kind: lenth"))
    told = problems(file)
    assert len(told) == 2
    assert told[0].startswith(f"{file}:7: reward.graph.parts.1.reward.reward.kind: unknown kind 'lenth'")
    assert told[1] == f"{file}:9: serve.prt: unknown key; did you mean 'port'?"


def test_an_unknown_section_is_no_section_of_a_run(file):
    assert problems(file, "servee.port=1") == ("override 'servee.port=1': servee: unknown key; did you mean 'serve'?",)


def test_an_override_of_what_only_a_run_uses_is_refused():
    (told,) = problems(TINY, "rollout.group_size=2")
    assert told.startswith("override 'rollout.group_size=2': rollout: is a run's setting")


def test_a_missing_reward_is_told(tmp_path):
    (tmp_path / "empty.yaml").write_text("serve: {port: 9000}\n")
    (told,) = problems(tmp_path / "empty.yaml")
    assert "reward: required key is missing" in told


def test_the_graph_is_checked_as_in_a_run(file):
    (told,) = problems(file, "reward.graph={kind: length, min_words: 9, max_words: 3}")
    assert "min_words: is 9, more than max_words = 3" in told


def test_replicas_must_leave_room_to_scale(file):
    (told,) = problems(file, "serve.min_replicas=3", "serve.max_replicas=2")
    assert "serve.max_replicas: is 2, less than serve.min_replicas = 3" in told
    assert load_service_config(file, ["reward.replicas=4"]).max_replicas == 4
    assert load_service_config(file, ["serve.min_replicas=3"]).max_replicas == 3


def test_failures_neither_stop_nor_sample_anew_and_nothing_else_changes(file):
    config = load_service_config(file)
    before, after = config.reward.model_dump_json(), config.scoring.model_dump_json()
    assert after == before.replace('"raise"', '"drop"').replace('"resample"', '"drop"')
    assert after != before


def test_a_schema_may_speak_of_on_failure(file):
    override = "reward.graph={kind: json, json_schema: {const: {kind: json, on_failure: stop}}, on_failure: raise}"
    graph = load_service_config(file, [override]).scoring.graph
    assert graph.kind == "json" and graph.on_failure == "drop"
    assert graph.json_schema == {"const": {"kind": "json", "on_failure": "stop"}}


def test_nodes_that_live_on_a_runs_statistics_are_told(file):
    (note,) = load_service_config(file).notes
    assert "leave scores as they are" in note
    assert load_service_config(TINY).notes == ()


def test_the_document_has_every_setting_with_its_default():
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for name, field in ServeConfig.model_fields.items():
        default = (
            "null"
            if field.default is None
            else f"{field.default:g}"
            if isinstance(field.default, float)
            else field.default
        )
        assert f"| `serve.{name}` | {default} |" in text

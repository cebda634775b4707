"""Reading a config file: every mistake is told in a sentence with its place."""

import re
from pathlib import Path
from typing import Any

import pytest

from raylhf.config import ConfigError, RunConfig
from raylhf.config.learner import LoRAConfig
from raylhf.config.load import dump_config, load_any_config, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

GOOD = """\
name: good
num_steps: 3
model:
  path: tiny
data:
  path: some/dataset
rollout:
  prompts_per_step: 8
reward:
  graph:
    kind: sum
    parts:
      - name: mood
        weight: 2
        reward: {kind: sentiment}
      - name: size
        reward:
          kind: length
          max_words: 30
"""


def write(folder, text):
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def load(folder, *overrides) -> Any:
    return load_config(write(folder, GOOD), overrides)


def problems_of(folder, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value).replace(str(folder), "DIR")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_loads(file):
    assert load_any_config(file).name == file.stem


def test_a_good_file_gives_its_values_and_the_defaults(tmp_path):
    config = load(tmp_path)
    assert config.reward.graph.parts[0].weight == 2.0
    assert config.reward.graph.parts[1].reward.max_words == 30
    assert config.learner.lr == 1e-6


def test_an_unknown_key_is_named_with_file_line_and_nearest_key(tmp_path):
    text = problems_of(tmp_path, GOOD.replace("prompts_per_step", "prompt_per_step"))
    assert "DIR/run.yaml:8: rollout.prompt_per_step: unknown key; did you mean 'prompts_per_step'?" in text
    assert "DIR/run.yaml:7: rollout.prompts_per_step: required key is missing; add it: a whole number" in text


def test_an_unknown_key_inside_a_union_is_compared_with_the_keys_of_its_kind(tmp_path):
    text = problems_of(tmp_path, GOOD.replace("max_words", "max_word"))
    assert text == "DIR/run.yaml:19: reward.graph.parts.1.reward.max_word: unknown key; did you mean 'max_words'?"


def test_a_key_like_no_other_gets_the_list_of_keys(tmp_path):
    text = problems_of(tmp_path, GOOD + "tracking: {zzz: 1}\n")
    assert "run.yaml:20: tracking.zzz: unknown key; the keys here are wandb, project" in text


def test_an_unknown_kind_lists_the_kinds_and_the_nearest(tmp_path):
    text = problems_of(tmp_path, GOOD.replace("kind: length", "kind: lenght"))
    assert "run.yaml:18: reward.graph.parts.1.reward.kind: unknown kind 'lenght'; did you mean 'length'?" in text
    assert "The kinds are sentiment, length, " in text and "kl_dro" in text
    assert "is empty" not in text


def test_a_missing_kind_is_asked_for_at_the_mapping(tmp_path):
    text = problems_of(tmp_path, GOOD + "objective: {kl: {control: {target_per_sequence: 6}}}\n")
    assert "run.yaml:20: objective.kl.control.kind: required key is missing; the kinds are fixed, adaptive" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("num_steps='4'", "num_steps: is the text '4', must be a whole number; remove the quotes"),
        ("num_steps=true", "num_steps: is true, must be a whole number"),
        ("num_steps=4.0", "num_steps: is 4.0, must be a whole number"),
        ("learner.lr='1.5'", "learner.lr: is the text '1.5', must be a number; remove the quotes"),
        ("learner.lr=true", "learner.lr: is true, must be a number"),
        ("learner.lr=.inf", "learner.lr: is inf"),
        ("learner.lr=.nan", "learner.lr: is nan"),
        ("learner.lr=0", "learner.lr: is 0, must be greater than 0"),
        ("learner.zero_stage=true", "learner.zero_stage: is true; must be 0, 1, 2 or 3"),
        ("learner.zero_stage='3'", "learner.zero_stage: is the text '3', must be one of 0, 1, 2, 3"),
        ("learner.zero_stage=4", "learner.zero_stage: is 4, must be one of 0, 1, 2, 3"),
        ("learner.offload_params=yes", "learner.offload_params: is the text 'yes', must be true or false; YAML 1.2"),
        ("learner.offload_params=1", "learner.offload_params: is 1, must be true or false"),
        ("name=7", "name: is 7, must be text; put it in quotes"),
        ("name='a b'", "name: is the text 'a b', must match"),
        ("name=2024-01-01", "name: is the date 2024-01-01"),
        ("name=", "name: is null, must be text"),
        ("tracking.tags=x", "tracking.tags: is the text 'x', must be a list of text; write [x]"),
        ("learner.adam_betas=[0.9]", "learner.adam_betas.1: is missing; the list is too short"),
        ("learner.adam_betas=[0.9, 0.9, 0.9]", "learner.adam_betas: is a list of 3; tuple should have at most 2"),
        ("learner=3", "learner: is 3, must be a mapping"),
        ("reward.graph=[1]", "reward.graph: is a list of 1, must be a mapping with kind: sentiment | length"),
        ("reward.graph.parts=[]", "reward.graph.parts: is empty; give at least one entry"),
        ("objective.kl.placement=los", "is the text 'los', must be one of reward, loss; did you mean 'loss'?"),
        ("objective.kl.estimator=k4", "must be one of k1, k2, k3 or null"),
    ],
)
def test_a_wrong_value_is_named_with_what_must_stand_there(tmp_path, override, expected):
    text = problems_of(tmp_path, GOOD, override)
    assert expected in text
    assert text.startswith(f"override {override!r}: ")
    assert "\n" not in text


def test_a_member_of_a_plain_union_gives_one_line(tmp_path):
    text = problems_of(tmp_path, GOOD + "learner:\n  lora:\n    rank: 4\n    target_modules: 3\n")
    assert text == "DIR/run.yaml:23: learner.lora.target_modules: is 3, must be a list of text or all-linear"


def test_a_whole_number_is_a_number_and_a_list_is_a_tuple(tmp_path):
    config = load_config(write(tmp_path, GOOD), ["learner.lr=1", "tracking.tags=[a, b]", "learner.adam_betas=[0, 0.5]"])
    assert (config.learner.lr, config.tracking.tags, config.learner.adam_betas) == (1.0, ("a", "b"), (0.0, 0.5))


def test_an_exponent_without_a_point_is_a_number(tmp_path):
    config = load_config(write(tmp_path, GOOD + "learner:\n  lr: 1e-6\n"), ["objective.critic.lr=2e-5"])
    assert (config.learner.lr, config.critic and config.critic.lr) == (1e-6, 2e-5)


def test_all_problems_are_told_at_once(tmp_path):
    text = problems_of(tmp_path, GOOD.replace("num_steps: 3", "num_steps: 0"), "seed=-1", "foo", "learner.rank=1")
    assert len(text.splitlines()) == 4
    assert "run.yaml:2: num_steps: is 0, must be greater than or equal to 1" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "run.yaml:1: the file is empty"),
        ("# nothing\n", "run.yaml:1: the file is empty"),
        ("- a\n", "run.yaml:1: the file must hold a mapping of sections (model:, data:, ...), not a list"),
        ("hello\n", "must hold a mapping of sections"),
        ("name: a\nmodel:\n\tpath: tiny\n", "run.yaml:3: a tab stands where YAML wants spaces"),
        ("name: a\nseed: 1\nname: b\n", "run.yaml:3: name: the key stands twice in the mapping that begins at line 1"),
        ("name: [a\n", "is not YAML: expected ',' or ']'"),
        ("name: a: b\n", "run.yaml:1: is not YAML: mapping values are not allowed here"),
        ("name: a\n---\nname: b\n", "run.yaml:2: is not YAML: but found another document"),
        ("name: *nobody\n", "found undefined alias"),
        ("name: \x00\n", "run.yaml: is not YAML: "),
        ("name: !secret x\n", "run.yaml:1: name: is a value with the tag !secret"),
        ("name: a\n3: x\n", "run.yaml:1: 3: the key 3 is not text"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_line(tmp_path, text, expected):
    assert expected in problems_of(tmp_path, text)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")


def test_anchors_and_merges_are_read_and_a_merged_key_is_placed_at_its_mapping(tmp_path):
    text = GOOD + "learner: &base {threads: 1, shuffel: 2}\nevaluation:\n  <<: *base\n"
    found = problems_of(tmp_path, text)
    assert "run.yaml:20: learner.shuffel: unknown key" in found
    assert re.search(r"run\.yaml:2[12]: evaluation\.shuffel: unknown key", found)


def test_overrides_set_keys_make_missing_mappings_and_reach_into_lists(tmp_path):
    overrides = ["learner.lora.rank=8", "reward.graph.parts.0.weight=0.5", "rollout.sampling.temperature=0.7"]
    config = load(tmp_path, *overrides)
    assert config.learner.lora.rank == 8
    assert config.reward.graph.parts[0].weight == 0.5
    assert config.rollout.sampling.temperature == 0.7


def test_an_override_at_the_end_of_a_list_adds_an_entry_and_the_last_override_wins(tmp_path):
    part = "reward.graph.parts.2={name: form, reward: {kind: format}}"
    config = load(tmp_path, part, "seed=1", "seed=2")
    assert config.reward.graph.parts[2].name == "form"
    assert config.seed == 2


def test_an_override_of_a_null_section_makes_it(tmp_path):
    config = load_config(write(tmp_path, GOOD + "learner:\n  lora: null\n"), ["learner.lora.rank=4"])
    assert config.learner.lora == LoRAConfig(rank=4)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "override 'seed': is not of the form key=value"),
        ("=3", "override '=3': is not of the form key=value"),
        ("a..b=3", "override 'a..b=3': is not of the form key=value"),
        ("name=[a", "override 'name=[a': name: the value is not YAML"),
        ("num_steps.x=3", "override 'num_steps.x=3': num_steps: is 3, not a mapping, so nothing can be set inside it"),
        ("reward.graph.parts.5.weight=1", "reward.graph.parts: is a list, 5 is no position in it; use 0 to 2"),
        ("reward.graph.parts.first=1", "reward.graph.parts: is a list, 'first' is no position in it"),
        ("learner.lorra.rank=1", "override 'learner.lorra.rank=1': learner.lorra: unknown key; did you mean 'lora'?"),
        ("learner.lora.alpha=1", "override 'learner.lora.alpha=1': learner.lora.rank: required key is missing"),
        ("reward.graph.parts.0.wieght=1", "reward.graph.parts.0.wieght: unknown key; did you mean 'weight'?"),
    ],
)
def test_a_wrong_override_is_named_itself(tmp_path, override, expected):
    assert expected in problems_of(tmp_path, GOOD, override)


def test_a_failed_check_is_placed_at_its_key_or_the_nearest_parent(tmp_path):
    text = problems_of(tmp_path, GOOD + "learner:\n  num_ranks: 3\n", "cluster.cpus_per_node=9")
    assert "DIR/run.yaml:8: rollout.prompts_per_step: is 8, not a multiple of learner.num_ranks = 3" in text
    assert "run.yaml:7: rollout.group_size: is 1, but" in problems_of(tmp_path, GOOD, "objective.advantage=grpo")


def test_paths_beside_the_file_become_absolute_and_other_names_stay(tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("{}")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "scorer").mkdir()
    monkeypatch.chdir("/")
    text = GOOD.replace("some/dataset", "prompts.jsonl") + "objective: {critic: {path: ./scorer}}\n"
    config = load_config(write(tmp_path, text))
    assert config.data.path == str(tmp_path / "prompts.jsonl")
    assert config.critic is not None and config.critic.path == str(tmp_path / "scorer")
    assert (config.model.path, config.output_dir) == ("tiny", "runs")
    assert load_config(write(tmp_path, GOOD)).data.path == "some/dataset"


def test_a_relative_file_that_is_not_there_is_refused(tmp_path):
    text = problems_of(tmp_path, GOOD.replace("some/dataset", "promts.jsonl"))
    assert "DIR/run.yaml:6: data.path: there is no 'promts.jsonl' in DIR" in text


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_dumped_config_loads_to_an_equal_one(tmp_path, file):
    config = load_any_config(file)
    assert load_any_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "prompt", ["1e-6", "true", "null", "", "~", " x ", "a: b", "# no", "two\nlines\n", "\u00e9\t'\""]
)
def test_text_that_looks_like_something_else_survives_the_round_trip(tmp_path, prompt):
    config = load_config(write(tmp_path, GOOD))
    raw = config.model_dump(mode="json")
    raw["data"]["system_prompt"] = prompt
    raw["learner"]["lora"] = {"rank": 2}
    changed = RunConfig.model_validate(raw)
    again = load_config(write(tmp_path, dump_config(changed)))
    assert again == changed
    assert again.data.system_prompt == prompt

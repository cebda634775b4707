"""PPO's quickstart with each kind of reward: the shipped configs on a tiny model, and the scores that must come out."""

import json
import math
import re
import urllib.request

import pytest
import torch
from command_line import REPOSITORY, TEST_S, numbers, undocumented
from exported_reward_models import ATTRIBUTES, MEAN, Q01, Q99, STD, Oracle, free_port, write_each_kind

from raylhf.config.load import load_config
from raylhf.models.tiny import write_tiny_model

pytestmark = pytest.mark.timeout(TEST_S)
NUM_STEPS = 2
NUM_HELD_OUT = 4
SMALL = (
    "model.path=tiny",
    f"num_steps={NUM_STEPS}",
    f"data.held_out={NUM_HELD_OUT}",
    "data.max_prompt_tokens=256",  # a byte is a token
    "rollout.prompts_per_step=8",
    "rollout.sampling.max_response_tokens=12",
    "rollout.threads=1",
    "learner.micro_batch_tokens=160",
    "objective.num_epochs=1",
    f"evaluation.num_samples={NUM_HELD_OUT}",
)
TOKEN = "a-bearer-token-of-a-test"
SLACK = 2e-4
"""Batches are padded and added up in another order than in the oracle."""


def config_of(name):
    return REPOSITORY / "configs" / f"{name}.yaml"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a reward model of each kind, and of two language models."""
    place = tmp_path_factory.mktemp("models")
    base = write_tiny_model(place / "base")
    return write_each_kind(base, place) | {"base": base, "other": write_tiny_model(place / "other", seed=1)}


@pytest.fixture
def server(raylhf):
    """The URL of `raylhf serve-reward configs/quickstart.yaml`; it must end as well as it began."""
    port = free_port()
    command = raylhf.spawn(
        "server",
        "serve-reward",
        str(config_of("quickstart")),
        f"serve.port={port}",
        environment={"RAYLHF_REWARD_TOKEN": TOKEN},
    )
    command.wait_for(lambda: "serving the sum reward at" in command.output, "readiness")
    url = f"http://127.0.0.1:{port}"
    with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
        assert answer.status == 200
    yield url
    command.interrupt()
    assert command.wait() == 0, command.story()
    assert command.left_running() == []
    assert TOKEN not in command.output + command.errors


def completed(raylhf, name, *overrides, **options):
    """The run of a shipped config, after what every run must fulfil."""
    run = raylhf.run(name, *SMALL, *overrides, config=config_of(name), **options)
    assert run.process.returncode == 0, run.story()
    assert run.left_running() == []
    check_rows(run)
    assert undocumented(run) == set()
    assert (run.folder / "export" / "model.safetensors").is_file()
    return run


def check_rows(run):
    first, *rows = run.rows()
    assert [row["step"] for row in run.rows()] == list(range(NUM_STEPS + 1))
    assert math.isfinite(first["eval/score_mean"]) and first["eval/invalid_count"] == 0
    for row in rows:
        assert math.isfinite(row["reward/score_mean"]), run.story()
        assert row["reward/invalid_count"] == row["data/dropped_responses_count"] == 0, run.story()
        assert row["reward/resampled_count"] == 0
        assert row["mismatch/abs_dlogprob_mean"] < 1e-3
        failures = [key for key in row if key.endswith("_failed_count")]
        assert failures and all(row[key] == 0 for key in failures)


def sources(run):
    """Names of the leaves that were called in the last step."""
    found = [re.fullmatch(r"reward/source/(.+)_latency_p50_s", key) for key in run.rows()[-1]]
    return {match[1] for match in found if match}


def parts(run, area="reward"):
    """Names of the parts that the last step logged."""
    found = [re.fullmatch(rf"{area}/part/(.+)_mean", key) for key in run.rows()[-1]]
    return {match[1] for match in found if match}


def untrained(run):
    """The held-out responses of the untrained policy and their scores [B] without the missing-EOS penalty."""
    rows = [row for row in run.rows("samples.jsonl") if row["step"] == 0 and row["name"] == "held_out"]
    assert len(rows) == NUM_HELD_OUT
    penalty = load_config(run.folder / "config.yaml").reward.missing_eos_penalty
    return rows, torch.tensor([row["score"] + penalty * (row["finish_reason"] == "length") for row in rows])


def oracle(folder, run):
    system_prompt = load_config(run.folder / "config.yaml").data.system_prompt
    assert system_prompt is not None
    return Oracle(folder, system_prompt)


def near(scores, expected):
    torch.testing.assert_close(scores.double(), expected.double(), atol=SLACK, rtol=SLACK)


def test_an_explicit_reward_is_on_the_scale_of_its_calibration_file(raylhf, folders):
    run = completed(raylhf, "ppo_explicit", f"reward.graph.reward.path={folders['scalar']}")
    assert sources(run) == {"explicit"} and parts(run) == {"raw"}
    rows, scores = untrained(run)
    outputs = oracle(folders["scalar"], run).outputs(rows)[:, 0]
    assert len(outputs.clamp(Q01, Q99).unique()) > 1 and (outputs > Q99).any() and (outputs < Q01).any()
    near(scores, (outputs.clamp(Q01, Q99) - MEAN) / STD)


def test_token_scores_are_averaged_over_the_response_and_reach_ppo(raylhf, folders):
    run = completed(raylhf, "ppo_token_level", f"reward.graph.path={folders['token']}")
    assert sources(run) == {"token_level"} and parts(run) == set()
    rows, scores = untrained(run)
    near(scores, torch.stack([outputs.mean() for outputs in oracle(folders["token"], run).token_outputs(rows)]))


def test_a_process_reward_reads_the_end_of_the_step(raylhf, folders):
    run = completed(raylhf, "ppo_process", f"reward.graph.path={folders['process']}")
    assert sources(run) == {"process"}
    rows, scores = untrained(run)
    single = [i for i, row in enumerate(rows) if "\n\n" not in row["response"]]
    assert single, "every response has several steps: choose another seed"
    ends = []
    for row, outputs in zip(rows, oracle(folders["process"], run).token_outputs(rows), strict=True):
        trailing = len(row["response"]) - len(row["response"].rstrip())
        ends.append(outputs[: len(outputs) - trailing][-1])
    near(scores[single], (2 * torch.stack(ends).sigmoid() - 1)[single])


def test_an_ensemble_counts_by_its_members_spread(raylhf, folders):
    run = completed(raylhf, "ppo_ensemble", f"reward.graph.parts.0.reward.paths=[{folders['ensemble']}]")
    assert sources(run) == {"quality"}
    members = {f"quality/member_{k}" for k in range(3)}
    assert parts(run) == {"quality"} | members
    for row in run.rows()[1:]:
        mean = sum(row[f"reward/part/{member}_mean"] for member in members) / 3
        assert row["reward/part/quality_mean"] == pytest.approx(mean, abs=SLACK)
    rows, scores = untrained(run)
    outputs = (oracle(folders["ensemble"], run).outputs(rows) - MEAN) / STD
    near(scores, outputs.mean(1) - outputs.std(1))


def test_several_values_are_weighed_by_attribute(raylhf, folders):
    run = completed(raylhf, "ppo_multi_value", f"reward.graph.path={folders['multi_value']}")
    assert sources(run) == {"multi_value"} and parts(run) == set(ATTRIBUTES)
    rows, scores = untrained(run)
    near(scores, oracle(folders["multi_value"], run).outputs(rows) @ torch.tensor([0.7, 0.3]))


def test_an_implicit_reward_is_a_log_ratio_whitened_by_the_untrained_policy(raylhf, folders):
    run = completed(
        raylhf,
        "ppo_implicit",
        f"reward.graph.reward.policy={folders['other']}",
        f"reward.graph.reward.reference={folders['base']}",
    )
    assert sources(run) == {"implicit"} and parts(run) == {"raw"}
    rows, scores = untrained(run)
    ratios = oracle(folders["other"], run).logprobs(rows) - oracle(folders["base"], run).logprobs(rows)
    raw = 0.1 * ratios
    assert run.rows()[0]["eval/part/raw_mean"] == pytest.approx(float(raw.mean()), abs=SLACK)
    near(scores, (raw - raw.mean()) / raw.std(correction=0))


def test_a_remote_reward_is_what_the_server_scores(raylhf, server, tmp_path):
    run = completed(raylhf, "ppo_remote", f"reward.graph.url={server}", environment={"RAYLHF_REWARD_TOKEN": TOKEN})
    assert sources(run) == {"remote"}
    for file in run.folder.glob("*.*"):
        assert TOKEN not in file.read_text(), file
    rows, scores = untrained(run)
    asked = [
        {key: row[key] for key in ("prompt", "response")} | {"is_truncated": row["finish_reason"] == "length"}
        for row in rows
    ]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    scored = raylhf.call("score", "score", str(config_of("quickstart")), "--input", str(file))
    assert scored.process.returncode == 0, scored.story()
    expected = [json.loads(line)["score"] for line in scored.output.splitlines()]
    near(scores, torch.tensor(expected))


def test_verifiable_answers_train_in_groups(raylhf):
    run = completed(raylhf, "grpo_arithmetic", "rollout.prompts_per_step=4")
    assert sources(run) == {"answer"}
    _, scores = untrained(run)
    assert set(scores.round(decimals=5).tolist()) <= {0.0, 1.0}
    assert all("critic/loss" not in row for row in run.rows())


@pytest.fixture(scope="session")
def hybrid(raylhf):
    return completed(raylhf, "ppo_hybrid")


def reward_state(run):
    return json.loads((run.folder / "checkpoints" / f"step_{NUM_STEPS}" / "driver.json").read_text())["reward"]


def test_a_hybrid_names_its_parts_and_keeps_the_spread_of_the_adaptive_ones(hybrid):
    leaves = {"style/spelling", "style/english", "style/length", "tone/warmth", "tone/harmless", "rule"}
    assert sources(hybrid) == leaves
    assert parts(hybrid) == parts(hybrid, "eval") == leaves | {"style", "tone"}
    saved = reward_state(hybrid)
    assert [place.rpartition(".")[2] for place in saved] == ["spelling", "english", "length"]
    # One batch of the untrained policy's held-out responses, then one a step.
    assert [moments["num_commits"] for moments in saved.values()] == [1 + NUM_STEPS] * 3


def test_a_hybrid_resumed_after_a_step_is_equal_to_the_bit(raylhf, hybrid):
    settings = (*SMALL, "checkpoint.every_steps=1")
    begun = raylhf.run("resumed", *settings, "num_steps=1", config=config_of("ppo_hybrid"))
    assert begun.process.returncode == 0, begun.story()
    resumed = raylhf.run("resumed", *settings, config=config_of("ppo_hybrid"))
    assert resumed.process.returncode == 0, resumed.story()
    assert resumed.left_running() == []
    assert "resuming from step_1 ..." in resumed.output
    assert reward_state(resumed) == reward_state(hybrid)
    # The first command came to its end, so it evaluated at step 1 too.
    rows = [{k: v for k, v in row.items() if row["step"] != 1 or not k.startswith("eval/")} for row in numbers(resumed)]
    assert rows == numbers(hybrid)


FICKLE = """
import hashlib
import os
from pathlib import Path

calls = {}


def at_second_try(prompt, response, metadata):
    mark = Path(os.environ["FICKLE_MARKS"], hashlib.sha1(prompt.encode()).hexdigest())
    if mark.exists():
        return len(set(response)) / 17
    mark.touch()
    raise RuntimeError("the service was asleep")


def once(prompt, response, metadata):
    calls[prompt] = calls.get(prompt, 0) + 1
    if calls[prompt] > 1:
        raise RuntimeError("the licence ran out")
    return len(set(response)) / 17
"""
NUM_PROMPTS = 16
"""Of configs/prompts/tiny.jsonl without the held-out ones: one step draws them all."""


@pytest.fixture
def fickle(tmp_path):
    """The environment in which rewards find the module."""
    (tmp_path / "fickle.py").write_text(FICKLE)
    (tmp_path / "marks").mkdir()
    return {"PYTHONPATH": str(tmp_path), "FICKLE_MARKS": str(tmp_path / "marks")}


def with_leaf(function, on_failure):
    leaf = f"{{kind: function, path: 'fickle:{function}', on_failure: {on_failure}}}"
    return (
        f"reward.graph={{kind: sum, parts: [{{name: fickle, reward: {leaf}}}]}}",
        "num_steps=2",
        f"rollout.prompts_per_step={NUM_PROMPTS}",
        "objective.num_epochs=1",
    )


def test_a_failed_score_with_resample_is_sampled_anew_and_trained_on(raylhf, fickle):
    run = raylhf.run("resample", *with_leaf("at_second_try", "resample"), environment=fickle)
    assert run.process.returncode == 0, run.story()
    assert run.left_running() == []
    assert run.rows()[0]["eval/invalid_count"] == 0
    steps = run.rows()[1:]
    assert [row["reward/resampled_count"] for row in steps] == [NUM_PROMPTS, 0]
    assert [row["reward/source/fickle_failed_count"] for row in steps] == [NUM_PROMPTS, 0]
    for row in steps:
        assert row["reward/invalid_count"] == row["data/dropped_responses_count"] == 0
        assert 0 < row["reward/score_mean"] <= 1


def test_a_failed_score_with_raise_ends_the_run_and_names_the_leaf(raylhf, fickle):
    once = ("rollout.group_size=1", "evaluation.responses_per_prompt=1", "learner.micro_batch_tokens=320")
    run = raylhf.run("raise", *with_leaf("once", "raise"), *once, environment=fickle)
    assert run.process.returncode == 2, run.story()
    assert run.left_running() == []
    assert "reward fickle: " in run.errors and "its on_failure is raise" in run.errors
    assert "the licence ran out" in run.errors
    assert "Traceback" not in run.errors
    assert [row["step"] for row in run.rows()] == [0, 1]
    assert (run.folder / "checkpoints" / "step_1" / "driver.json").is_file(), "the step that was done is lost"

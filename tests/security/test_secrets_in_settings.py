"""A secret that is written into settings stops the command, and is repeated nowhere."""

import pytest

from raylhf.cli import main

CONFIG = """
name: run
num_steps: 1
output_dir: OUT
model: {path: tiny}
data: {path: prompts.jsonl}
rollout: {prompts_per_step: 4}
reward:
  graph: {kind: remote, url: 'https://scores.example.org', token_env: SCORES}
"""
OF_THE_ENVIRONMENT = "zebra-crossing-nineteen"
SECRET_OVERRIDES = {
    "reward.graph.token_env": "aB3dE5gH7jK9mN1pQ3",
    "reward.graph.token": "aB3dE5gH7jK9mN1pQ3",
    "reward.graph.api_key": "aB3dE5gH7jK9mN1pQ3",
    "reward.graph.url": "https://me:aB3dE5gH7jK9mN1pQ3@scores.example.org",
    "reward.graph.token_file": "hf_aB3dE5gH7jK9mN1pQ3aB3dE5gH7jK9mN1pQ3",
    "model.path": f"org/{OF_THE_ENVIRONMENT}",
    "launch.slurm.setup": "['module load x', 'export WANDB_API_KEY=aB3dE5gH7jK9mN1pQ3']",
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SCORES_PASSWORD", OF_THE_ENVIRONMENT)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n' * 40)
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG.replace("OUT", str(tmp_path / "runs")))
    return file


def assert_refused(arguments, key, capsys, tmp_path):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert f"{key}" in captured.err and "give it by an environment variable or a file" in captured.err
    for secret in ("aB3dE5gH7jK9mN1pQ3", OF_THE_ENVIRONMENT):
        assert secret not in captured.err + captured.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["train", "check", "config", "serve-reward"])
@pytest.mark.parametrize("key", SECRET_OVERRIDES)
def test_an_override_that_holds_a_secret_is_refused_without_showing_it(command, key, config, capsys, tmp_path):
    assert_refused([command, str(config), f"{key}={SECRET_OVERRIDES[key]}"], key, capsys, tmp_path)


def test_so_is_a_file_with_the_line_that_holds_it(config, capsys, tmp_path):
    config.write_text(config.read_text().replace("SCORES}", "aB3dE5gH7jK9mN1pQ3}"))
    assert_refused(["check", str(config)], "run.yaml:9: reward.graph.token_env", capsys, tmp_path)


def test_what_names_a_secret_or_looks_it_up_is_none(config, capsys):
    setup = "launch.slurm.setup=['export HF_TOKEN=$(cat ~/.hf)', 'export A_KEY=\"$KEY\" SSL_KEY=/etc/key.pem']"
    assert main(["check", str(config), setup, "name=task-risk-aware-sk-learn", "data.prompt_key=token"]) == 0
    assert capsys.readouterr().err == ""

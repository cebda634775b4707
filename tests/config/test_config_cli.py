"""The command line, in this process and in a fresh one."""

import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from raylhf.cli import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
HEAVY = (
    "torch",
    "ray",
    "transformers",
    "vllm",
    "deepspeed",
    "wandb",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "datasets",
)
QUICKSTART = next(file for file in CONFIGS if file.name == "quickstart.yaml")
SHARED_GPU = next(file for file in CONFIGS if file.name == "gpu_1x_0.5b.yaml")


def modules_after(arguments):
    """The modules that a fresh interpreter holds after the command."""
    code = (
        "import sys\nfrom raylhf.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('MODULES', *sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(output.split("MODULES ")[1].split())


def test_help_imports_neither_engines_nor_pydantic_nor_rich():
    modules = modules_after(["--help"])
    assert not modules & {*HEAVY, "pydantic", "ruamel.yaml", "rich"}


@pytest.mark.parametrize("file", [SHARED_GPU, QUICKSTART], ids=lambda file: file.name)
def test_check_imports_no_engine(file):
    assert not modules_after(["check", str(file)]) & set(HEAVY)


def processor_seconds(arguments):
    """Of a fresh interpreter, the least of three times: others on the machine cost little of it."""

    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


def test_help_and_check_cost_little_beside_the_libraries_that_read_settings():
    """Measured: help 0.03 s, check 0.37 s, the libraries 0.11 s."""
    libraries = processor_seconds(["-c", "import pydantic, pydantic.types, ruamel.yaml, rich.console, rich.table"])
    assert processor_seconds(["-m", "raylhf.cli", "--help"]) < libraries
    assert processor_seconds(["-m", "raylhf.cli", "check", str(QUICKSTART)]) < 5 * libraries


def test_config_imports_no_engine():
    assert not modules_after(["config"]) & set(HEAVY)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_check_of_every_shipped_config_succeeds(file, capsys):
    assert main(["check", str(file)]) == 0
    out = capsys.readouterr().out
    assert "no problems found" in out
    assert "warning" not in out


def test_check_prints_roles_batch_reward_kl_and_memory(capsys):
    main(["check", str(SHARED_GPU)])
    out = capsys.readouterr().out
    for text in (
        "rollout",
        "learner",
        "optimizer steps",
        "0.5 x length: length (min_words=40",
        "0.05 x k1 in the reward",
    ):
        assert text in out
    assert "494,032,768 parameters" in out
    assert "weight transfer  ipc" in out


def test_check_of_an_unknown_model_says_so(capsys):
    assert main(["check", str(SHARED_GPU), "model.path=someone/something"]) == 0
    assert "unknown (model is not local" in capsys.readouterr().out


def test_check_warns_of_memory_and_still_succeeds(capsys):
    assert main(["check", str(SHARED_GPU), "cluster.gpu_memory_gib=8"]) == 0
    assert "warning: does not fit" in capsys.readouterr().out


def test_problems_are_sentences_on_standard_error_and_exit_two(capsys):
    assert main(["check", str(SHARED_GPU), "rollout.prompts_per_stp=3", "num_steps=0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) == 2
    assert main(["check", "no/such.yaml"]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_config_prints_every_key_with_its_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    for text in (
        "learner.micro_batch_tokens",
        "learner.lora.rank",
        "reward.graph[kind=sum].parts.N.weight",
        "objective.kl.control[kind=adaptive].horizon",
        "Most tokens, of prompts and responses, in one forward and backward; a longer sequence is alone",
    ):
        assert text in out


def test_config_with_a_file_prints_its_values(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["config", str(SHARED_GPU), "seed=77"]) == 0
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.startswith("seed")).split()[4:6] == ["0", "77"]
    assert "Qwen/Qwen2.5-0.5B-Instruct" in out


def test_train_hands_the_checked_config_to_the_driver_and_returns_its_code(monkeypatch):
    seen = []
    driver: Any = types.ModuleType("raylhf.driver.train")
    driver.train = lambda config: seen.append(config) or 3
    monkeypatch.setitem(sys.modules, "raylhf.driver", types.ModuleType("raylhf.driver"))
    monkeypatch.setitem(sys.modules, "raylhf.driver.train", driver)
    assert main(["train", str(SHARED_GPU), "num_steps=2"]) == 3
    assert seen[0].num_steps == 2


def test_check_reads_a_services_file(tmp_path, capsys):
    file = tmp_path / "reward.yaml"
    file.write_text(
        "reward:\n  clip: 3\n  graph: {kind: whiten, reward: {kind: length, max_words: 77}}\n"
        "serve: {port: 9000, min_replicas: 2}\n"
    )
    assert main(["check", str(file), "serve.batch_wait_s=0.5"]) == 0
    out = capsys.readouterr().out
    for expected in ("max_words=77", "clipped to [-3, 3]", "statistics come from a run's", "no problems found"):
        assert expected in out
    rows = dict(line.split() for line in out.splitlines() if len(line.split()) == 2)
    assert {name: rows[name] for name in ("port", "batch_wait_s", "max_replicas", "token_file")} == {
        "port": "9000",
        "batch_wait_s": "0.5",
        "max_replicas": "2",
        "token_file": "none",
    }
    assert main(["check", str(file), "serve.prt=1"]) == 2
    assert "serve.prt: unknown key; did you mean 'port'?" in capsys.readouterr().err
    assert main(["check", str(file), "--data"]) == 2

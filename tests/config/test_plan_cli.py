"""`raylhf plan` on the command line."""

import json
import time

import pytest
from test_config_cli import CONFIGS, HEAVY, modules_after

from raylhf.cli import main

SMALL, LARGE = (next(str(file) for file in CONFIGS if file.name == f"gpu_{name}.yaml") for name in ("8x_8b", "64x_70b"))
SFT = next(str(file) for file in CONFIGS if file.name == "sft.yaml")
SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "vocab_size": 152064,
}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_the_plan_of_every_shipped_config_fits_and_is_readable_in_100_columns(file, capsys):
    assert main(["plan", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nit fits\n")
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "learner, " in out
    assert "Time of a step" in out


def test_plan_imports_no_engine_and_is_quick():
    started = time.perf_counter()
    assert not modules_after(["plan", LARGE]) & set(HEAVY)
    assert time.perf_counter() - started < 3.0  # half a second where nothing else runs


def test_what_cannot_fit_is_refused_with_what_would_fit(capsys):
    assert main(["plan", SMALL, "--gpu-memory", "40"]) == 2
    told = capsys.readouterr()
    assert "learner, GPU memory of one worker by phase" in told.out  # the table is there all the same
    assert "does not fit: about " in told.err
    remedy = told.err.rsplit("; with ", 1)[1].removesuffix(" it fits\n")
    assert main(["plan", SMALL, "--gpu-memory", "40", *remedy.split()]) == 0


def test_a_run_without_a_rollout_is_refused_too(capsys):
    overrides = [
        "model.path=meta-llama/Llama-3.1-8B",
        "model.dtype=bfloat16",
        "learner.lora=null",
        "learner.num_gpus=1",
    ]
    assert main(["plan", SFT, *overrides, "--gpus", "1", "--gpu-memory", "80"]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_a_cluster_of_another_size(capsys):
    assert main(["plan", SMALL, "--gpus", "16"]) == 0
    assert main(["plan", SMALL, "--gpus", "12"]) == 2
    assert "not a multiple of the 8 GPUs of a node" in capsys.readouterr().err
    assert main(["plan", SMALL, "--gpus", "4"]) == 2
    told = capsys.readouterr().err
    assert "4 are missing; add nodes, or lower replicas and shares" in told
    assert told.endswith("with learner.num_ranks=2 rollout.replicas=1 there is room\n")


def test_a_folder_with_nothing_but_its_config_is_enough(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    assert main(["plan", LARGE, f"model.path={tmp_path}"]) == 0
    assert "32,763,876,352 parameters" in capsys.readouterr().out


def test_a_model_that_is_not_known_is_refused(capsys):
    assert main(["plan", LARGE, "model.path=someone/something"]) == 2
    assert "give a folder with its config.json, weights are not needed" in capsys.readouterr().err


def test_another_device_has_another_time(capsys):
    def seconds_of(*arguments):
        assert main(["plan", LARGE, *arguments]) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("update: passes"))
        return float(line.split()[2].replace(",", ""))

    assert seconds_of("--device", "a100") == pytest.approx(seconds_of() * 989 / 312, rel=0.01)


def test_a_cpu_is_not_measured_for_a_plan_that_is_about_gpus(capsys):
    assert main(["plan", SMALL, "--measure"]) == 2
    assert "--measure times this machine's CPU" in capsys.readouterr().err
    assert main(["plan", SFT, "--measure", "--device", "h100"]) == 2

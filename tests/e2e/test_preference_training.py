"""Preference optimisation from `raylhf train`, on stored pairs and on fresh responses."""

import json
import math

import pytest
from command_line import REPOSITORY, TEST_S, numbers, undocumented
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.timeout(TEST_S)
CONFIGS = REPOSITORY / "configs"
NUM_STEPS = 8
"""One pass over 64 prompts, 8 in a step."""
STORED = (
    "model.path=tiny",
    "data.max_tokens=320",  # a byte is a token
    "learner.lora=null",
    "learner.num_ranks=2",
    "learner.zero_stage=2",
    "learner.num_cpus=0.5",
    "learner.threads=1",
    "learner.lr=1e-3",
    "learner.lr_schedule=constant",  # a shorter run of the same rates
    "objective.reference={every_steps: 3, mix: 0.5}",
    "checkpoint.every_steps=4",
)


@pytest.fixture(scope="session")
def stored(raylhf):
    """DPO on stored pairs, without interruption."""
    return raylhf.run("dpo_whole", *STORED, config=CONFIGS / "preference_dpo.yaml")


def test_dpo_on_stored_pairs_learns_the_order_of_held_out_pairs(stored):
    assert stored.process.returncode == 0, stored.story()
    assert stored.left_running() == [] and stored.errors == ""
    assert undocumented(stored) == set()
    rows = stored.rows()
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert not [(row["step"], key) for row in rows for key, value in row.items() if value is None]
    first, last = rows[0], rows[-1]
    assert first["pref_eval/margin_mean"] == pytest.approx(0, abs=1e-5), "policy and reference are one at the start"
    assert rows[1]["policy/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["pref_eval/accuracy"] - 2 * last["pref_eval/accuracy_se"] > 0.5
    assert "Trained model (Hugging Face folder)" in stored.output
    samples = [row for row in stored.rows("samples.jsonl") if row["step"] == NUM_STEPS]
    assert len(samples) == 3 and all(len(row["responses"]) == len(row["implicit_rewards"]) for row in samples)
    AutoModelForCausalLM.from_pretrained(stored.folder / "export")


def test_a_run_on_stored_pairs_goes_on_to_the_bit_with_its_moved_reference(raylhf, stored):
    begun = raylhf.run("dpo_halves", *STORED, "num_steps=4", config=CONFIGS / "preference_dpo.yaml")
    assert begun.process.returncode == 0, begun.story()
    resumed = raylhf.run("dpo_halves", *STORED, config=CONFIGS / "preference_dpo.yaml")
    assert resumed.process.returncode == 0, resumed.story()
    assert "resuming from step_4 ..." in resumed.output
    rows = [
        {key: value for key, value in row.items() if row["step"] != 4 or not key.startswith("pref_eval/")}
        for row in numbers(resumed)
    ]
    assert rows == numbers(stored)
    one, other = (load_file(run.folder / "export" / "model.safetensors") for run in (stored, resumed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_supervised_fine_tuning_lowers_the_held_out_loss(raylhf):
    settings = [key for key in STORED if not key.startswith("objective.reference")]
    run = raylhf.run("sft", *settings, config=CONFIGS / "sft.yaml")
    assert run.process.returncode == 0, run.story()
    assert undocumented(run) == set()
    losses = [row["pref_eval/nll_mean"] for row in run.rows() if "pref_eval/nll_mean" in row]
    assert losses[-1] < 0.9 * losses[0]
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["pref_eval/nll_mean_last"] == losses[-1]


def test_online_dpo_runs_on_the_rollout_and_reward_path_of_ppo(raylhf):
    run = raylhf.run(
        "online",
        "model.path=tiny",
        "num_steps=3",
        "data.held_out=4",
        "data.max_prompt_tokens=256",
        "rollout.prompts_per_step=8",
        "rollout.group_size=4",
        "rollout.sampling.max_response_tokens=12",
        "rollout.threads=1",
        "learner.micro_batch_tokens=320",
        "learner.lr=1e-3",
        "learner.lora=null",
        "objective.pairs={kind: pareto, parts: [sentiment, length, format]}",
        config=CONFIGS / "online_dpo_quickstart.yaml",
    )
    assert run.process.returncode == 0, run.story()
    assert run.left_running() == []
    assert undocumented(run) == set()
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(4))
    for row in rows[1:]:
        assert row["pref/pairs_count"] > 0
        assert row["pref/pairs_count"] + row["pref/ties_count"] <= 8 * 6
        assert row["mismatch/abs_dlogprob_mean"] < 1e-3
        assert row["rollout/policy_version"] == row["step"] - 1
        assert math.isfinite(row["policy/loss"]) and row["policy/grad_norm"] > 0
    assert rows[1]["policy/kl_to_ref"] == pytest.approx(0, abs=1e-4) and abs(rows[-1]["policy/kl_to_ref"]) > 1e-3
    assert (run.folder / "export" / "model.safetensors").is_file()

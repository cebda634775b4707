"""A reward model from `raylhf train` on two ranks: stopped and resumed to the bit, exported, plotted, and used."""

import json
import re

import pytest
import torch
from command_line import END_S, REPOSITORY, TEST_S, numbers, undocumented
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.timeout(TEST_S)
PAIRWISE = REPOSITORY / "configs" / "reward_pairwise.yaml"
PAIRS = REPOSITORY / "configs" / "judgements" / "pairs.jsonl"
NUM_STEPS = 32
"""Two passes over 64 prompts, 4 in a step."""
SETTINGS = (
    "model.path=tiny",
    "data.max_tokens=320",  # a byte is a token
    "objective.trainable_layers=1",
    "learner.num_ranks=2",
    "learner.zero_stage=2",
    "learner.num_cpus=0.5",
    "learner.threads=1",
    "learner.lr=3e-3",
    "checkpoint.every_steps=4",
)


@pytest.fixture(scope="session")
def trained(raylhf):
    """A run without interruption."""
    return raylhf.run("rm_whole", *SETTINGS, config=PAIRWISE)


@pytest.fixture(scope="session")
def interrupted(raylhf):
    """The same run, which gets a Ctrl-C when it has done its second step."""
    command = raylhf.start("rm_halves", *SETTINGS, config=PAIRWISE)
    command.wait_for(lambda: any(row["step"] >= 2 for row in command.rows()), "step 2")
    command.interrupt()
    command.wait(END_S)
    return command


@pytest.fixture(scope="session")
def steps_before_stop(interrupted):
    return [row["step"] for row in interrupted.rows()]


@pytest.fixture(scope="session")
def resumed(raylhf, interrupted, steps_before_stop):
    return raylhf.run("rm_halves", *SETTINGS, config=PAIRWISE)


def test_a_reward_model_gets_better_than_chance_on_held_out_pairs(trained):
    assert trained.process.returncode == 0, trained.story()
    assert trained.left_running() == []
    assert trained.errors == ""
    rows = trained.rows()
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert undocumented(trained) == set()
    assert not [(row["step"], key) for row in rows for key, value in row.items() if value is None]
    first, last = rows[0], rows[-1]
    assert last["rm_eval/loss"] < first["rm_eval/loss"]
    assert last["rm_eval/accuracy"] > first["rm_eval/accuracy"]
    assert last["rm_eval/accuracy"] - 2 * last["rm_eval/accuracy_se"] > 0.5
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("complete", NUM_STEPS)
    assert summary["rm_eval/loss_last"] == last["rm_eval/loss"]


def test_the_report_shows_the_held_out_numbers_and_where_things_are(trained):
    report = trained.output.partition("rm_whole: complete")[2]
    for line in ("loss", "accuracy", "ece", "length correlation"):
        assert re.search(rf"{line} +\S +-?\d\S* +\S +-?\d", report), report
    for place in ("reliability.png", "export"):
        assert str(trained.folder / place) in report
    assert (trained.folder / "reliability.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_ctrl_c_saves_the_last_finished_step_and_leaves_no_process(interrupted, steps_before_stop):
    assert interrupted.process.returncode == 130, interrupted.story()
    assert interrupted.left_running() == []
    assert "Traceback" not in interrupted.errors, interrupted.errors
    last = steps_before_stop[-1]
    assert 2 <= last < NUM_STEPS
    assert steps_before_stop == list(range(last + 1))
    assert json.loads((interrupted.folder / "checkpoints" / f"step_{last}" / "driver.json").read_text())["step"] == last
    assert not (interrupted.folder / "export").exists()


def test_a_resumed_reward_model_is_equal_to_the_bit(trained, resumed, steps_before_stop):
    assert resumed.process.returncode == 0, resumed.story()
    assert resumed.left_running() == []
    assert f"resuming from step_{steps_before_stop[-1]} ..." in resumed.output
    assert numbers(resumed) == numbers(trained)
    one, other = (load_file(run.folder / "export" / "model.safetensors") for run in (trained, resumed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def with_reward(tmp_path, trained):
    """A file that `raylhf score` and `raylhf reward eval` read."""
    file = tmp_path / "reward.yaml"
    file.write_text(f"reward: {{graph: {{kind: explicit, path: {trained.folder / 'export'}, max_tokens: 320}}}}\n")
    return str(file)


def test_the_exported_model_scores_as_transformers_does(raylhf, trained, tmp_path):
    pair = json.loads(PAIRS.read_text().splitlines()[0])
    rows = [{"prompt": pair["prompt"], "response": pair[side]} for side in ("chosen", "rejected")]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = raylhf.call("rm_score", "score", with_reward(tmp_path, trained), "--input", str(file))
    assert scored.process.returncode == 0, scored.story()
    scores = torch.tensor([json.loads(line)["score"] for line in scored.output.splitlines()])
    export = trained.folder / "export"
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    expected = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        with torch.no_grad():
            expected.append(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0])
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_exported_model_agrees_with_the_raters_of_its_own_pairs(raylhf, trained, tmp_path):
    result = tmp_path / "result.json"
    words = ("--input", str(PAIRS), "--json", str(result))
    command = raylhf.call("rm_agreement", "reward", "eval", with_reward(tmp_path, trained), *words)
    assert command.process.returncode == 0, command.story()
    assert "Agreement with the raters" in command.output
    overall = json.loads(result.read_text())["overall"]
    assert (overall["num_prompts"], overall["num_pairs"], overall["num_invalid"]) == (80, 320, 0)
    assert overall["low"] > 0.5


def test_a_dry_run_prints_what_the_judgements_hold(raylhf):
    command = raylhf.call("rm_check", "check", str(PAIRWISE), "--data")
    assert command.process.returncode == 0, command.story()
    assert command.errors == ""
    for line in (r"rows read +320", r"prompts +64 train, 16 held out", r"comparisons +256 train, 64 held out"):
        assert re.search(line, command.output), command.output


def test_a_malformed_judgement_is_named_by_file_and_line(raylhf, tmp_path):
    file = tmp_path / "pairs.jsonl"
    first = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    file.write_text(f'{first}\n\n{{"prompt": "p", "chosen": "a"}}\n')
    for arguments in (("check", str(PAIRWISE), "--data"), ("train", str(PAIRWISE), f"output_dir={tmp_path}")):
        command = raylhf.call("rm_malformed", *arguments, "model.path=tiny", f"data.path={file}")
        assert command.process.returncode == 2, command.story()
        assert f"{file}, line 3" in command.errors and "rejected" in command.errors
        assert "Traceback" not in command.errors
        assert command.left_running() == []

"""What rows of judgements say to preference optimisation alone: times, other rewards, and good responses."""

import json

import pytest

from raylhf.batch import Pair
from raylhf.config.judgements import JudgementDataConfig
from raylhf.text.judgements import examples_digest, load_examples, load_split

USER = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}
PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}


def config_of(tmp_path, kind, *rows, **settings):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JudgementDataConfig(path=str(path), kind=kind, **settings)


def load(tmp_path, kind, *rows, **settings):
    return load_examples(config_of(tmp_path, kind, *rows, **settings))


def load_one(tmp_path, kind, *rows, **settings):
    (example,) = load(tmp_path, kind, *rows, **settings).examples
    return example


def test_a_pair_keeps_its_time_and_the_gaps_of_other_rewards(tmp_path):
    rewards = {"chosen_rewards": {"calm": 0.5, "brief": -1}, "rejected_rewards": {"brief": 2, "calm": 0.25}}
    (pair,) = load_one(tmp_path, "pairs", PAIR | {"time": -3} | rewards).pairs
    assert pair == Pair(0, 1, time=-3.0, reward_gaps={"calm": 0.25, "brief": -3.0})


def test_a_pair_that_does_not_say_has_no_time_and_no_gaps(tmp_path):
    nothing = {"time": None, "chosen_rewards": None, "rejected_rewards": None}
    assert load_one(tmp_path, "pairs", PAIR | nothing).pairs == (Pair(0, 1),)


def test_rows_of_one_prompt_keep_their_own_times_and_gaps(tmp_path):
    other = {"prompt": "Hi", "chosen": "What?", "rejected": "Eh", "time": 2}
    rewards = {"chosen_rewards": {"calm": 1}, "rejected_rewards": {"calm": 0}}
    example = load_one(tmp_path, "pairs", PAIR | {"time": 1} | rewards, other)
    assert example.responses == ("Hello!", "What?", "Eh")
    assert example.pairs == (Pair(0, 1, time=1.0, reward_gaps={"calm": 1.0}), Pair(1, 2, time=2.0))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"time": "2024"}, "time is '2024'; it must be a finite number, written without quotes"),
        ({"time": True}, "time is True; it must be a finite number"),
        ({"chosen_rewards": {"calm": 1}}, "chosen_rewards and rejected_rewards must be objects with the same names"),
        (
            {"chosen_rewards": {"calm": 1}, "rejected_rewards": {"brief": 1}},
            "chosen_rewards and rejected_rewards must be objects with the same names",
        ),
        (
            {"chosen_rewards": [1], "rejected_rewards": [2]},
            "chosen_rewards and rejected_rewards must be objects with the same names",
        ),
        (
            {"chosen_rewards": {"calm": None}, "rejected_rewards": {"calm": 1}},
            "chosen_rewards.calm is None; it must be a finite number",
        ),
        (
            {"chosen_rewards": {"calm": 1}, "rejected_rewards": {"calm": "x"}},
            "rejected_rewards.calm is 'x'; it must be a finite number",
        ),
    ],
)
def test_a_malformed_time_or_reward_names_its_row_and_field(tmp_path, row, problem):
    with pytest.raises(ValueError, match=rf"a\.jsonl.*: {problem}"):
        load(tmp_path, "pairs", PAIR | row)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "Hi", "response": "Hello!"}, {"prompt": [USER], "response": "Hello!"}, {"messages": [USER, HELLO]}],
)
def test_every_form_of_a_good_response_is_the_same_example(tmp_path, row):
    example = load_one(tmp_path, "responses", row, system_prompt="Be kind.")
    assert example.messages == ({"role": "system", "content": "Be kind."}, USER)
    assert example.responses == ("Hello!",)
    assert example.pairs == () and example.ranks is None and example.targets is None


def test_a_chat_is_the_prompt_up_to_the_last_answer(tmp_path):
    again = {"role": "user", "content": "And?"}
    example = load_one(tmp_path, "responses", {"messages": [USER, HELLO, again, HELLO]})
    assert example.messages == (USER, HELLO, again)
    assert example.responses == ("Hello!",)


def test_a_response_may_be_empty_or_without_a_prompt_and_prompts_are_joined(tmp_path):
    rows = [{"prompt": "Hi", "response": ""}, {"response": "alone"}, {"messages": [USER, HELLO]}]
    first, second = load(tmp_path, "responses", *rows).examples
    assert first.responses == ("", "Hello!")
    assert second.messages == () and second.responses == ("alone",)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Hi"}, "no field 'response'"),
        ({"prompt": "Hi", "response": 3}, "response is 3; it must be a string"),
        ({"messages": "Hi"}, "messages is 'Hi'; it must be a list of chat messages"),
        ({"messages": []}, "messages must end with a message of the assistant"),
        ({"messages": [USER]}, "messages must end with a message of the assistant"),
    ],
)
def test_a_malformed_response_names_its_row_and_field(tmp_path, row, problem):
    with pytest.raises(ValueError, match=rf"a\.jsonl.*: {problem}"):
        load(tmp_path, "responses", row)


def test_a_changed_time_or_reward_changes_the_digest(tmp_path):
    rewards = [{"chosen_rewards": {"calm": gap}, "rejected_rewards": {"calm": 0}} for gap in (1, 2)]
    rows = [PAIR, PAIR | {"time": 1}, PAIR | {"time": 2}, *(PAIR | own for own in rewards)]
    digests = {examples_digest(load(tmp_path, "pairs", row).examples) for row in rows}
    assert len(digests) == len(rows)


def test_a_policy_reads_its_judgements_without_a_head(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "x"} for i in range(4)]
    split = load_split(config_of(tmp_path, "responses", *rows, held_out=0.25), None, seed=0)
    assert len(split.train) == 3 and len(split.held_out) == 1

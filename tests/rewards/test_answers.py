import threading
import time
from dataclasses import replace

import pytest

from raylhf.batch import Prompt
from raylhf.rewards.answers import AnswerReward, marked_answer, math_equal


@pytest.fixture
def math_reward():
    return AnswerReward(answer_key="answer", match="math", pattern=None)


def score_of(reward, rollouts_of, text, metadata):
    rollouts = rollouts_of(text)
    output = reward.score(replace(rollouts, prompts=[replace(rollouts.prompts[0], metadata=metadata)]))
    return output.scores.tolist()[0], output.errors


GSM8K = "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $18.\n#### 18"


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        (GSM8K, "9 eggs at $2 make $18 every day.", 1),
        (GSM8K, "16 - 3 - 4 = 9, and 9 * 2 = 18.", 1),
        (GSM8K, "She keeps 7.\n#### 18\n\nQuestion: 3 + 4?\nThe answer is 7", 1),
        (GSM8K, "18 at first, but then she eats 2, so she makes 16", 0),
        (GSM8K, "The answer is 18 at first. But then the answer is 16.", 0),
        (GSM8K, "9 eggs", 0),
        (18, "#### **$18.00**", 1),
        ("1234.5", "She has $1,234.50", 1),
        ("$1,234.50", r"\boxed{1234.5}", 1),
        ("20,000", r"\boxed{20{,}000}", 1),
        ("42 apples", "That makes 42 large apples", 1),
        ("42", r"\boxed{42 large apples}", 1),
        ("12", r"\boxed{12 dollars}", 1),
        ("12 eggs/day", "#### 12", 1),
        ("12 eggs", r"\boxed{13 eggs}", 0),
        (r"2\pi", r"\boxed{2 \pi}", 1),
        (r"\frac{1}{2}", r"so $\boxed{0.5}$", 1),
        ("1/2", "0.5", 1),
        ("0.5", r"\boxed{\frac{2}{4}}", 1),
        ("0.5", r"\boxed{0.05}", 0),
        ("50%", "0.5", 1),
        ("50%", "50", 1),
        ("50%", "5", 0),
        ("-5", r"\boxed{-5}", 1),
        ("-5", "5", 0),
        ("5", "-5", 0),
        ("x^2+1", r"\boxed{1 + x^2}", 1),
        ("2x+1", "2", 0),  # a part of it is not the answer
        (r"$\boxed{\frac{\sqrt{3}}{2}}$", r"\boxed{\sqrt{3}/2}", 1),
        ("(1,2)", r"\boxed{(1,2)}", 1),
        ("(1,2)", r"\boxed{(2,1)}", 0),
        ("7", r"\boxed{7} \boxed{8}", 0),
        ("8", r"\boxed{7} \boxed{8}", 1),
        ("7", r"\boxed{5}, \boxed{7} or \boxed{9}", 0),
        ("7", r"\boxed{5, 7, 9}", 0),
        ("7", r"\boxed{7", 0),
        ("42", r"\boxed{41} #### 42", 1),
        ("42", "#### 2. Add up\nso \\boxed{42}", 1),
        ("yes", r"\boxed{\text{Yes}}", 1),
        ("yes", r"\boxed{sey}", 0),
        ("7", "I do not know.", 0),
        ("7", "", 0),
    ],
)
def test_the_final_answer_is_compared_as_mathematics(reference, response, expected, math_reward, rollouts_of):
    assert score_of(math_reward, rollouts_of, response, {"answer": reference}) == (expected, ())


@pytest.mark.parametrize("metadata", [{}, {"answer": None}, {"answer": "  "}, {"answer": "Thus ####"}])
def test_a_row_without_a_reference_is_invalid_and_names_the_field(metadata, math_reward, rollouts_of):
    score, errors = score_of(math_reward, rollouts_of, "7", metadata)
    assert score != score
    assert errors == (
        "answer: prompt 10: ValueError: the data row has no reference in its field 'answer'; "
        "set answer_key to the field that has",
    )


def test_an_answer_that_takes_too_long_is_invalid_and_the_next_one_is_scored(math_reward, rollouts_of, monkeypatch):
    reward = math_reward
    assert score_of(reward, rollouts_of, "7", {"answer": "7"}) == (1, ())
    monkeypatch.setattr("raylhf.rewards.answers.COMPARISON_LIMIT_S", 1.0)
    started = time.monotonic()
    score, errors = score_of(reward, rollouts_of, r"\boxed{9^{9^{9^{9}}}}", {"answer": "7"})
    assert time.monotonic() - started < 4
    assert score != score
    assert errors == ("answer: prompt 10: TimeoutError: the answer could not be compared within 1 s",)
    monkeypatch.undo()
    assert score_of(reward, rollouts_of, "7", {"answer": "7"}) == (1, ())


def test_answers_are_compared_in_any_thread(math_reward):
    scores = []
    prompt = Prompt(index=0, messages=({"role": "user", "content": "?"},), metadata={"answer": "7"})
    threads = [
        threading.Thread(target=lambda: scores.append(math_reward.score_response(prompt, r"\boxed{7.0}")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [1.0] * 4


def test_a_reference_that_is_no_mathematics_is_refused():
    with pytest.raises(ValueError, match=r"the reference '\$' is no number or expression; use match: text"):
        math_equal("$", "7", True)


def test_a_pattern_takes_the_first_group_of_its_last_match(rollouts_of):
    reward = AnswerReward(answer_key="gold", match="math", pattern=r"<answer>(.*?)</answer>")
    metadata = {"gold": "12"}
    assert score_of(reward, rollouts_of, "<answer>12</answer> <answer>13</answer>", metadata) == (0, ())
    assert score_of(reward, rollouts_of, "<answer>13</answer> <answer>\n12 eggs</answer> 14", metadata) == (1, ())
    assert score_of(reward, rollouts_of, "12", metadata) == (0, ())


def test_a_pattern_without_a_group_or_that_is_none_is_refused():
    with pytest.raises(ValueError, match="has no group"):
        AnswerReward(answer_key="answer", match="text", pattern="answer: .*")
    with pytest.raises(ValueError, match="the answer reward's pattern='\\(' is not a regular expression"):
        AnswerReward(answer_key="answer", match="text", pattern="(")


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        ("New York", "It is this town:\n\n**new   york.**\n", 1),
        ("New York", "New York is what I say:\nBoston", 0),
        ("(B)", "B", 1),
        ("-5", "5", 0),
        ("C++", "C", 0),
        ("So it is ... #### Paris", "#### Paris", 1),
        ("Paris", "", 0),
    ],
)
def test_text_compares_the_last_line(reference, response, expected, rollouts_of):
    reward = AnswerReward(answer_key="answer", match="text", pattern=None)
    assert score_of(reward, rollouts_of, response, {"answer": reference}) == (expected, ())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"a { b \boxed {3} } c", "3"),
        (r"\boxed{1} \boxed{2", "1"),
        ("#### 5 \n more", "5"),
        ("#### Heading", None),
        ("no mark", None),
    ],
)
def test_the_mark_that_comes_last_holds_the_answer(text, answer):
    assert marked_answer(text) == answer


def test_marks_are_found_in_linear_time():
    started = time.monotonic()
    assert marked_answer("\\boxed{" * 200_000) is None
    assert time.monotonic() - started < 5

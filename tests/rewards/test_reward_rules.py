import subprocess
import sys

import numpy as np
import pytest
from pydantic import TypeAdapter

from raylhf.config.reward import RewardConfig
from raylhf.rewards.build import REWARD_BUILDERS, build_reward
from raylhf.rewards.rules import format_checks

USER_MODULE = """
import math
import numpy as np
CONSTANT = 1
def joined(prompt, response, metadata):
    return len(prompt) + 100 * len(response) + 1000 * metadata["row"]
def moody(prompt, response, metadata):
    if response == "raise":
        raise KeyError("no such thing")
    odd = {"none": None, "nan": math.nan, "inf": math.inf, "text": "0.5", "numpy": np.float32(0.5), "bool": True}
    return odd[response]
"""


def reward(**settings):
    return build_reward(TypeAdapter(RewardConfig).validate_python(settings))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


def test_sentiment_is_the_compound_score_that_vaders_authors_print(rollouts_of):
    output = reward(kind="sentiment").score(rollouts_of("VADER is smart, handsome, and funny.", "Today SUX!", ""))
    assert output.scores.tolist() == [0.8316, -0.5461, 0.0]
    assert output.valid.all()
    assert output.errors == ()


@pytest.mark.parametrize(
    ("num_words", "expected"), [(0, 0.0), (2, 0.5), (3, 0.75), (4, 1.0), (6, 1.0), (7, 0.75), (10, 0.0), (99, 0.0)]
)
def test_length_is_one_inside_the_band_and_falls_linearly_to_zero_within_the_slack(num_words, expected, rollouts_of):
    output = reward(kind="length", min_words=4, max_words=6, slack=4).score(rollouts_of(" word" * num_words))
    assert output.scores.tolist() == [expected]


def test_a_length_band_that_is_upside_down_is_refused():
    with pytest.raises(ValueError, match="min_words=9 is above its max_words=5"):
        reward(kind="length", min_words=9, max_words=5)


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("Turn the key slowly, then pull.", set()),
        ('"Why not?" she asked (twice).', set()),
        ('He said: "Run!"', set()),
        ("3 eggs are enough.\n\nBoil them.", set()),
        ("turn the key slowly.", {"starts"}),
        ("Turn the key slowly, then", {"ends"}),
        ("I am sure. I am sure, I am sure!", {"repeats_nothing"}),
        ("No no no no.", set()),  # one run of three words, twice
        ("No no no no no.", {"repeats_nothing"}),
        ("So \u4f60\u597d\u4f60\u597d.", {"plain_text"}),
        ("It\u2019s \u201cfine\u201d.", set()),
        ("", {"starts", "ends", "repeats_nothing", "plain_text"}),
    ],
)
def test_format_is_the_share_of_its_four_checks(text, failed, rollouts_of):
    assert {name for name, is_passed in format_checks(text).items() if not is_passed} == failed
    assert reward(kind="format").score(rollouts_of(text)).scores.tolist() == [1 - len(failed) / 4]


def test_characters_is_the_share_of_wanted_characters(rollouts_of):
    output = reward(kind="characters", characters="ab").score(rollouts_of("abca", "xyz", ""))
    assert output.scores.tolist() == [0.75, 0.0, 0.0]


def test_a_function_sees_the_last_user_turn_the_response_and_the_rows_other_fields(user_module, rollouts_of):
    output = reward(kind="function", path=f"{user_module}:joined").score(rollouts_of("abc", "de"))
    assert output.scores.tolist() == [10 + 300, 10 + 200 + 1000]


def test_what_a_function_fails_to_score_is_invalid_with_a_sentence_and_never_zero(user_module, rollouts_of):
    path = f"{user_module}:moody"
    output = reward(kind="function", path=path).score(
        rollouts_of("numpy", "none", "nan", "inf", "text", "raise", "bool")
    )
    assert output.valid.tolist() == [True, False, False, False, False, False, True]
    np.testing.assert_array_equal(output.scores, [0.5, *[np.nan] * 5, 1.0])
    assert output.errors == (
        f"{path}: prompt 11: TypeError: the score is None, not a number",
        f"{path}: prompt 12: ValueError: the score is nan",
        f"{path}: prompt 13: ValueError: the score is inf",
        f"{path}: prompt 14: TypeError: the score is '0.5', not a number",
        f"{path}: prompt 15: KeyError: 'no such thing'",
    )


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("my_rewards.joined", "must read package.module:function"),
        ("not_there:joined", "No module named 'not_there'"),
        ("my_rewards:not_there", "has no attribute 'not_there'"),
        ("my_rewards:CONSTANT", "names a int, not a function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused_at_start_up(path, sentence, user_module):
    with pytest.raises(ValueError, match=sentence):
        reward(kind="function", path=path)


def test_every_kind_of_the_settings_has_a_builder():
    kinds = TypeAdapter(RewardConfig).json_schema()["discriminator"]["mapping"].keys()
    assert kinds == REWARD_BUILDERS.keys()


def test_the_reward_plane_needs_no_torch():
    program = (
        "import sys, raylhf.rewards\n"
        "assert not {'torch', 'transformers', 'vllm', 'ray', 'deepspeed'} & sys.modules.keys()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

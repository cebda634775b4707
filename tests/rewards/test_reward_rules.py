import json
import re
import subprocess
import sys
import time

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


def test_overlong_is_dapos_soft_punishment_by_tokens(rollouts_of):
    rollouts = rollouts_of(
        *("x" * (length - 1) for length in (10, 16, 17, 18, 20, 22))
    )  # one token a character and EOS
    output = reward(kind="overlong", max_tokens=20, buffer=4).score(rollouts)
    assert output.scores.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert output.valid.all()


def test_an_overlong_buffer_larger_than_the_limit_is_refused():
    with pytest.raises(ValueError, match="buffer=30 is above its max_tokens=20"):
        reward(kind="overlong", max_tokens=20, buffer=30)


@pytest.mark.parametrize(
    ("text", "ngram", "expected"),
    [
        ("a b a b a", 2, -0.5),  # ab ba ab ba: 2 of 4 are distinct
        ("go go go go", 1, -0.75),
        ("Go, go! (GO) go", 1, -0.75),
        ("one two three four", 2, 0.0),
        ("one two three", 3, 0.0),
        ("one one", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_is_distinct_n_minus_one(text, ngram, expected, rollouts_of):
    assert reward(kind="repetition", ngram=ngram).score(rollouts_of(text)).scores.tolist() == [expected]


def test_a_regex_is_searched_or_matches_the_whole_response(rollouts_of):
    rollouts = rollouts_of("<a>\n</a>", " <a></a> ", "so <a></a>", "")
    assert reward(kind="regex", pattern="<a>.*</a>").score(rollouts).scores.tolist() == [1, 1, 1, 0]
    assert reward(kind="regex", pattern="<a>.*</a>", whole=True).score(rollouts).scores.tolist() == [1, 1, 0, 0]


def test_a_pattern_that_is_no_regular_expression_is_refused_by_name():
    with pytest.raises(ValueError, match=r"the regex reward's pattern='\(a' is not a regular expression: missing \)"):
        reward(kind="regex", pattern="(a")


def test_a_catastrophic_pattern_fails_its_score_within_its_limit(rollouts_of, monkeypatch):
    monkeypatch.setattr("raylhf.rewards.rules.REGEX_LIMIT_S", 0.2)
    started = time.monotonic()
    output = reward(kind="regex", pattern="(a|aa)+$").score(rollouts_of("a" * 100 + "b", "aaa"))
    assert time.monotonic() - started < 3
    assert output.valid.tolist() == [False, True]
    assert "TimeoutError" in output.errors[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Ann", "age": 3}', 1),
        (' {"name": "Ann", "age": 3}\n', 1),
        ('Here it is:\n```json\n{"name": "Ann", "age": 3}\n```\nEnjoy.', 1),
        ('```\n{"name": "Ann", "age": 3}\n```\n```\n{"name": "Bob", "age": 4}\n```', 0),
        ('Here it is: {"name": "Ann", "age": 3}', 0),
        ('{"name": "Ann", "age": "three"}', 0),
        ('{"name": "Ann"}', 0),
        ('{"name": "Ann", "age": 3', 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
)
def test_json_must_stand_alone_or_in_the_only_fence_and_fit_the_schema(text, expected, rollouts_of):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    output = reward(kind="json", json_schema=schema).score(rollouts_of(text))
    assert output.scores.tolist() == [expected]


def test_json_without_a_schema_may_be_any_value_but_not_pythons_nan(rollouts_of):
    output = reward(kind="json").score(rollouts_of("[1, null]", "3", "NaN", '{"x": -Infinity}', "{'x': 1}"))
    assert output.scores.tolist() == [1, 1, 0, 0, 0]


def test_a_schema_that_is_none_is_refused():
    with pytest.raises(ValueError, match="json_schema is not a JSON Schema: 'text' is not valid"):
        reward(kind="json", json_schema={"type": "text"})


def test_a_schema_does_not_fetch_other_documents(rollouts_of):
    schema = {"$ref": "http://127.0.0.1:9/schema.json"}
    output = reward(kind="json", json_schema=schema).score(rollouts_of(json.dumps({})))
    assert output.valid.tolist() == [False]
    assert "Unresolvable" in output.errors[0]


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


@pytest.mark.parametrize(
    ("schema", "response"),
    [
        ({"pattern": "^(a|aa)+$"}, "a" * 100 + "b"),
        ({"patternProperties": {"^(a|aa)+$": True}}, {"a" * 100 + "b": 1}),
        ({"properties": {"b": {"pattern": "^(a|aa)+$"}}}, {"b": "a" * 100 + "b"}),
        ({"additionalProperties": False, "patternProperties": {"^(a|aa)+$": True}}, {"a" * 100 + "b": 1}),
        (
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "properties": {"next": {"$ref": "#"}},
                "pattern": "^(a|aa)+$",
            },
            {"next": "a" * 100 + "b"},
        ),
    ],
)
def test_a_schemas_pattern_that_never_ends_is_a_failed_score(schema, response, rollouts_of, monkeypatch):
    monkeypatch.setattr("raylhf.rewards.rules.REGEX_LIMIT_S", 0.2)
    started = time.monotonic()
    output = reward(kind="json", json_schema=schema).score(rollouts_of(json.dumps(response)))
    assert time.monotonic() - started < 5
    assert not output.valid[0] and "TimeoutError" in output.errors[0]


def test_a_schemas_patterns_choose_the_fields(rollouts_of):
    schema = {
        "properties": {"id": {"type": "integer"}},
        "patternProperties": {"^n_": {"type": "number"}, "_s$": {"minimum": 0}},
        "additionalProperties": {"type": "string", "pattern": "^[a-z]+$"},
    }
    rows = [
        ({"id": 1, "n_x": 2.5, "name": "ann"}, 1),
        ({"n_x": "2.5"}, 0),
        ({"n_wait_s": -1}, 0),
        ({"name": "Ann"}, 0),
        ({"name": 3}, 0),
        ({"id": "1"}, 0),
        ([], 1),
    ]
    output = reward(kind="json", json_schema=schema).score(rollouts_of(*(json.dumps(row) for row, _ in rows)))
    assert output.scores.tolist() == [score for _, score in rows]


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        (
            {"patternProperties": {"a": True}, "allOf": [{"unevaluatedProperties": False}]},
            "use additionalProperties in the latter's place",
        ),
        ({"$defs": {"a": {"$schema": "https://json-schema.org/draft/2020-12/schema"}}}, "names a $schema below"),
    ],
)
def test_a_schema_whose_searches_have_no_limit_is_refused(schema, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        reward(kind="json", json_schema=schema)


def test_sentiment_reads_a_long_response_to_a_limit_and_no_longer_takes_its_square(rollouts_of):
    started = time.monotonic()
    output = reward(kind="sentiment").score(rollouts_of("The cat was here, but not the dog. " * 6000 + "Horrible!"))
    assert time.monotonic() - started < 10
    assert output.scores.tolist() == [0.0]

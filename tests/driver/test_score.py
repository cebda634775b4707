"""`raylhf score` and `raylhf reward eval` on rewards by rule, through the command line."""

import json
import math

import numpy as np
import pytest

from raylhf.batch import Pair, RewardExample
from raylhf.cli import main
from raylhf.driver.reward_eval import subset_accuracy
from raylhf.driver.score import BATCH_SIZE, in_batches
from raylhf.rewards.endpoint import read_token

CONFIG = """
reward:
  missing_eos_penalty: 0.5
  graph:
    kind: sum
    parts:
      - {name: tone, reward: {kind: sentiment}}
      - {name: letters, weight: 2.0, reward: {kind: characters, characters: aeiou}}
"""
FUNCTION = "reward.graph={kind: function, path: 'score_by_length:score', on_failure: raise}"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config; `score_by_length:score` is the number of characters, and fails for `refused`."""
    (tmp_path / "score_by_length.py").write_text(
        "def score(prompt, response, metadata):\n"
        "    if response == 'refused':\n"
        "        raise ValueError('I do not score this')\n"
        "    return len(response) + metadata.get('bonus', 0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.yaml").write_text(CONFIG)
    return "reward.yaml"


def write(name, *rows):
    with open(name, "w") as file:
        file.writelines(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    return name


def read(name):
    with open(name) as file:
        return [json.loads(line) for line in file]


def test_each_row_gets_its_score_and_parts(config, capsys):
    rows = write(
        "in.jsonl",
        {"prompt": "How was it?", "response": "aaaa", "topic": "x"},
        {"prompt": [{"role": "user", "content": "And?"}], "response": "bbaa", "is_truncated": True},
        {"prompt": None, "response": "\u00fcbba"},
    )
    assert main(["score", config, "--input", rows, "--output", "out.jsonl"]) == 0
    out = read("out.jsonl")
    # No word is in the lexicon of tones; letters count twice; the cut response loses 0.5.
    assert [row["score"] for row in out] == [2.0, 0.5, 0.5]
    assert [row["parts"] for row in out] == [{"tone": 0.0, "letters": share} for share in (1.0, 0.5, 0.25)]
    assert out[0]["topic"] == "x" and out[2]["response"] == "\u00fcbba"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "3 rows, 0 invalid, mean 1.0000, sd 0.8660\n"


def test_without_output_the_rows_go_out_and_other_keys_can_be_named(config, capsys):
    rows = write("in.jsonl", {"question": "How was it?", "answer": "aaaa"})
    command = ["score", config, "--input", rows, "--prompt-key", "question", "--response-key", "answer"]
    assert main([*command, "reward.graph={kind: characters, characters: a}"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"question": "How was it?", "answer": "aaaa", "score": 1.0, "parts": {}}
    assert captured.err == "1 rows, 0 invalid, mean 1.0000, sd none\n"


def test_a_failed_score_is_null_and_told_and_never_zero(config, capsys):
    rows = write("in.jsonl", *({"prompt": "x", "response": text, "bonus": 1} for text in ("abc", "refused", "abcde")))
    assert main(["score", config, FUNCTION, "--input", rows, "--output", "out.jsonl"]) == 0
    assert [row["score"] for row in read("out.jsonl")] == [4.0, None, 6.0]
    err = capsys.readouterr().err
    assert "I do not score this" in err
    assert err.endswith("3 rows, 1 invalid, mean 5.0000, sd 1.4142\n")


def test_more_rows_than_a_batch_keep_their_order(config, capsys):
    rows = write("in.jsonl", *({"prompt": "x", "response": "a" * i} for i in range(1, 2 * BATCH_SIZE + 10)))
    assert main(["score", config, FUNCTION, "--input", rows, "--output", "out.jsonl"]) == 0
    out = read("out.jsonl")
    assert [row["score"] for row in out] == [len(row["response"]) for row in out]
    assert len(out) == 2 * BATCH_SIZE + 9


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "not a JSON object"),
        ("[1]", "a JSON list"),
        ({"response": "x"}, "no field 'prompt' (--prompt-key); the row has response"),
        ({"prompt": "x"}, "no field 'response' (--response-key)"),
        ({"prompt": "x", "response": 3}, "the response is 3; it must be a text"),
        ({"prompt": [{"role": "robot", "content": "x"}], "response": "x"}, "unknown role 'robot'"),
        ({"prompt": "x", "response": "x", "score": 1}, "has a field 'score' already"),
        ({"prompt": "x", "response": "x", "is_truncated": "yes"}, "is_truncated is 'yes'"),
        ({"prompt": "x", "response": "x", "num_tokens": True}, "num_tokens is True"),
        ({"prompt": "x", "response": "x", "num_tokens": 10_000_001}, "a whole number from 0 to 10000000, or null"),
        ({"prompt": "x", "response": "half of \ud83d"}, "'\\ud83d', a lone surrogate"),
        ({"prompt": "x", "response": "x", "tags": {"\udc00": 1}}, "'\\udc00', a lone surrogate"),
        ('{"prompt": "x", "response": "x", "weight": NaN}', "a number is NaN or infinite"),
        ('{"prompt": "x", "response": "x", "weight": [1e999]}', "a number is NaN or infinite"),
    ],
)
def test_a_malformed_row_names_file_and_line_and_leaves_no_output(config, tmp_path, capsys, row, sentence):
    rows = write("in.jsonl", {"prompt": "x", "response": "fine"}, "", row)
    assert main(["score", config, "--input", rows, "--output", "out.jsonl"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("raylhf: in.jsonl, line 3") and sentence in captured.err
    assert captured.out == ""
    assert not list(tmp_path.glob("out.jsonl*"))


def test_an_output_is_never_overwritten(config, capsys):
    rows = write("in.jsonl", {"prompt": "x", "response": "fine"})
    write("out.jsonl", "precious")
    assert main(["score", config, "--input", rows, "--output", "out.jsonl"]) == 2
    assert "--output out.jsonl: exists already" in capsys.readouterr().err
    with open("out.jsonl") as file:
        assert file.read() == "precious\n"


def test_the_output_is_ascii_and_another_commands_partial_file_is_left_alone(config):
    rows = write("in.jsonl", {"prompt": "x", "response": "\u00fc \U0001f600"})
    write("out.jsonl.partial", "precious")
    assert main(["score", config, "--input", rows, "--output", "out.jsonl"]) == 0
    with open("out.jsonl", "rb") as file:
        assert file.read().isascii()
    assert read("out.jsonl")[0]["response"] == "\u00fc \U0001f600"
    with open("out.jsonl.partial") as file:
        assert file.read() == "precious\n"


def test_a_file_that_is_not_utf8_is_told(config, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "x", "response": "\xff"}\n')
    assert main(["score", config, "--input", "in.jsonl"]) == 2
    assert "in.jsonl, line 1: not UTF-8" in capsys.readouterr().err


def test_the_exit_code_is_one_where_nothing_has_a_score(config):
    rows = write("in.jsonl", {"prompt": "x", "response": "refused"})
    assert main(["score", config, FUNCTION, "--input", rows, "--output", "out.jsonl"]) == 1
    assert [row["score"] for row in read("out.jsonl")] == [None]
    pairs = write("pairs.jsonl", {"prompt": "p3", "chosen": "refused", "rejected": "a"})
    assert main(["reward", "eval", config, FUNCTION, "--input", pairs]) == 1


def test_missing_and_empty_inputs_are_told(config, capsys):
    assert main(["score", config, "--input", "nowhere.jsonl"]) == 2
    assert "--input nowhere.jsonl: there is no such file" in capsys.readouterr().err
    assert main(["score", config, "--input", write("in.jsonl", "")]) == 2
    assert "holds no rows" in capsys.readouterr().err


def test_a_reward_that_cannot_be_built_is_one_sentence(config, capsys):
    rows = write("in.jsonl", {"prompt": "x", "response": "fine"})
    assert main(["score", config, "reward.graph={kind: function, path: 'nowhere:f'}", "--input", rows]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "'nowhere:f' cannot be imported" in err


def test_an_unknown_option_is_refused(config, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["score", config, "--input", "in.jsonl", "--outptu=x"])
    assert "unrecognized arguments: --outptu=x" in capsys.readouterr().err


PAIRS = (
    # The longer response scores higher: right, wrong, tie, and one that fails.
    {"prompt": "p1", "chosen": "longer", "rejected": "short", "part": "chat"},
    {"prompt": "p1", "chosen": "no", "rejected": "short", "part": "chat"},
    {"prompt": "p2", "chosen": "same", "rejected": "as is"[:4], "part": "chat"},
    {"prompt": "p3", "chosen": "refused", "rejected": "a", "part": "chat"},
    {"prompt": "p4", "chosen": "longer", "rejected": "short", "part": "hard"},
)


def test_evaluation_counts_ties_half_and_leaves_invalid_pairs_out(config, capsys):
    rows = write("pairs.jsonl", *PAIRS)
    command = ["reward", "eval", config, FUNCTION, "--input", rows, "--subset-key", "part", "--json", "out.json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    with open("out.json") as file:
        out = json.load(file)
    chat, hard = out["subsets"]
    assert (chat["name"], chat["num_prompts"], chat["num_pairs"], chat["num_ties"], chat["num_invalid"]) == (
        "chat", 3, 4, 1, 1,
    )  # fmt: skip
    assert chat["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert (hard["accuracy"], hard["num_pairs"]) == (1.0, 1)
    assert out["mean_of_subsets"] == pytest.approx((0.5 + 1.0) / 2)
    assert out["overall"]["accuracy"] == pytest.approx(2.5 / 4)
    assert 0 <= out["overall"]["low"] < 2.5 / 4 < out["overall"]["high"] <= 1
    assert "I do not score this" in captured.err
    lines = {line.split("  ")[0]: line.split() for line in captured.out.splitlines()}
    assert lines["chat"][1:6] == ["3", "4", "1", "1", "0.500"]
    assert lines["mean of subsets"][-1] == "0.750"
    assert lines["all pairs"][-4] == "0.625"


def test_evaluation_without_subsets_has_one_line(config, capsys):
    assert main(["reward", "eval", config, FUNCTION, "--input", write("pairs.jsonl", *PAIRS)]) == 0
    out = capsys.readouterr().out
    assert "mean of subsets" not in out and "chat" not in out
    assert "0.625" in out


def test_evaluation_tells_mistakes_and_overwrites_nothing(config, capsys):
    command = ["reward", "eval", config, "--input", "pairs.jsonl"]
    assert main(command) == 2
    assert "--input pairs.jsonl: there is no such file" in capsys.readouterr().err
    write("pairs.jsonl", PAIRS[0], {"prompt": "p", "chosen": 3, "rejected": "x"})
    assert main(command) == 2
    assert "pairs.jsonl, line 2" in capsys.readouterr().err
    write("pairs.jsonl", PAIRS[0])
    write("out.json", "precious")
    assert main([*command, "--json", "out.json"]) == 2
    assert "--json out.json: exists already" in capsys.readouterr().err


def test_a_subset_without_a_valid_pair_has_no_accuracy():
    example = RewardExample(index=0, messages=(), responses=("a", "b"), pairs=(Pair(0, 1),))
    result = subset_accuracy("x", [(example, np.array([np.nan, 1.0]))])
    assert (result.num_pairs, result.num_invalid) == (1, 1)
    assert math.isnan(result.accuracy) and math.isnan(result.low) and math.isnan(result.high)


def test_pairs_of_one_prompt_are_no_independent_evidence():
    pairs = tuple(Pair(0, i) for i in range(1, 11))
    example = RewardExample(index=0, messages=(), responses=("x",) * 11, pairs=pairs)
    right, wrong = np.array([1.0] + [0.0] * 10), np.array([-1.0] + [0.0] * 10)
    four_prompts = subset_accuracy("x", [(example, scores) for scores in (right, right, wrong, wrong)])
    assert four_prompts.accuracy == 0.5
    one_prompt = subset_accuracy("x", [(example, right)])
    assert one_prompt.accuracy == 1.0 and math.isnan(one_prompt.low)
    assert (four_prompts.low, four_prompts.high) == (0.0, 1.0)  # all right or all wrong are among the draws of four


def test_batches_are_full_but_the_last():
    assert list(in_batches("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_server_without_a_token_or_with_a_short_one_does_not_start(config, capsys, monkeypatch):
    monkeypatch.delenv("RAYLHF_REWARD_TOKEN", raising=False)
    assert main(["serve-reward", config]) == 2
    assert "the environment variable RAYLHF_REWARD_TOKEN (serve.token_env) holds no token" in capsys.readouterr().err
    monkeypatch.setenv("RAYLHF_REWARD_TOKEN", "fifteen-letters")
    assert main(["serve-reward", config]) == 2
    err = capsys.readouterr().err
    assert "15 characters, fewer than 16" in err and "token_urlsafe" in err
    assert "fifteen-letters" not in err


def test_a_token_file_comes_before_the_environment(config, monkeypatch, tmp_path, capsys):
    from raylhf.config.service import ServeConfig

    monkeypatch.setenv("RAYLHF_REWARD_TOKEN", "of-the-environment")
    (tmp_path / "token").write_text("of-the-file-itself\n")
    assert read_token(ServeConfig(token_file="token")) == "of-the-file-itself"
    assert read_token(ServeConfig()) == "of-the-environment"
    assert main(["serve-reward", config, "serve.token_file=nowhere"]) == 2
    assert "serve.token_file='nowhere' cannot be read" in capsys.readouterr().err
    (tmp_path / "token").write_text("sixteen or more, with spaces")
    with pytest.raises(ValueError, match="no HTTP header carries"):
        read_token(ServeConfig(token_file="token"))

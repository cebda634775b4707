"""Edited responses as labels of words (TLCR)."""

import json

import numpy as np
import pytest

from raylhf.config.judgements import JudgementDataConfig
from raylhf.text.judgements import load_examples


def load(tmp_path, *rows):
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(JudgementDataConfig(path=str(file), kind="edits"))


def test_words_taken_out_are_wrong_words_put_in_are_right_and_the_rest_is_neither(tmp_path):
    loaded = load(tmp_path, {"prompt": "p", "original": "I am  very rude today", "edited": "I am kind today, yes"})
    (example,) = loaded.examples
    assert example.responses == ("I am  very rude today", "I am kind today, yes")
    original, edited = example.step_labels
    assert original.tolist() == [0.5, 0.5, 0, 0, 0]
    assert edited.tolist() == [0.5, 0.5, 1, 1, 1]
    assert example.step_ends[0].tolist() == [1, 4, 10, 15, 21]
    assert [example.responses[1][:end].split()[-1] for end in example.step_ends[1]] == example.responses[1].split()


def test_an_edit_that_changes_nothing_is_counted_and_left_out(tmp_path):
    loaded = load(tmp_path, {"prompt": "p", "original": "a b", "edited": "a b"}, {"original": "a", "edited": "b"})
    assert (loaded.num_rows, loaded.num_identical, len(loaded.examples)) == (2, 1, 1)


def test_a_text_that_was_edited_twice_takes_the_mean_of_its_labels(tmp_path):
    rows = [{"prompt": "p", "original": "one two", "edited": edited} for edited in ("one three", "one two four")]
    (example,) = load(tmp_path, *rows).examples
    np.testing.assert_array_equal(example.step_labels[0], [0.5, 0.25])


def test_an_edit_without_its_original_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 1: no field 'original'"):
        load(tmp_path, {"prompt": "p", "edited": "a"})

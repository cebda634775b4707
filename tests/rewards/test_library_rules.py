import numpy as np
import pytest

from raylhf.rewards.library_rules import (
    LanguageReward,
    SpellingReward,
    ToxicityReward,
    WritingReward,
    words_to_check,
)


def test_language_is_the_probability_of_the_wanted_one(rollouts_of):
    rollouts = rollouts_of(
        "This is a plain English sentence about the weather.", "Das ist ein deutscher Satz.", " \n", "12345"
    )
    english, german = LanguageReward(language="en").score(rollouts), LanguageReward(language="de").score(rollouts)
    assert english.scores[0] > 0.8 and german.scores[1] > 0.99
    assert english.scores[1] < 0.01 and german.scores[0] < 0.01
    assert english.scores[2] == german.scores[2] == 0  # no text is in no language
    assert english.scores[3] < 0.1
    assert english.valid.all() and (english.scores >= 0).all() and (english.scores <= 1).all()


def test_a_language_that_nobody_knows_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="language='xx' is unknown to py3langid; it knows af, am, an, ar"):
        LanguageReward(language="xx")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat met Anna. She ran: Fast!", ["the", "cat", "met", "she", "ran", "fast"]),
        ("It\u2019s fine, don't ask 'why'.", ["it's", "fine", "don't", "ask", "why"]),
        ("a1 b2 3rd my_name covid19 well-known", ["well", "known"]),
        ("caf\u00e9 cafe\u0301", ["caf\u00e9", "caf\u00e9"]),
        ("Paris", ["paris"]),
        ("42 ... !", []),
    ],
)
def test_words_are_letters_and_names_in_mid_sentence_are_left_out(text, words):
    assert words_to_check(text) == words


def test_spelling_is_the_share_of_known_words(rollouts_of):
    output = SpellingReward(language="en").score(
        rollouts_of("The cat likes teh recieved mail.", "We met Xyzzyq in town.", "1 + 1 = 2", "")
    )
    np.testing.assert_allclose(output.scores, [4 / 6, 1.0, 0.0, 0.0])
    assert output.valid.all()


def test_spelling_knows_other_languages(rollouts_of):
    rollouts = rollouts_of("der hund und die katze schlafen")
    german, english = (SpellingReward(language=language).score(rollouts).scores[0] for language in ("de", "en"))
    assert german == 1.0
    assert english < german


def test_writing_is_minus_the_faults_in_a_hundred_words_however_often_the_reward_is_built(rollouts_of):
    fine = "The dog ran over the hill and came home at night. " * 40  # 11 words each
    faulty = fine + "The the dog sat."  # 444 words, one of them doubled
    for _ in range(2):
        output = WritingReward().score(
            rollouts_of(fine, faulty, "He is a very good man.", "", " \n", '"No..." she said.')
        )
        np.testing.assert_allclose(output.scores, [0, -100 / 444, -1, 0, 0, 0])
        assert output.valid.all()


def test_toxicity_is_minus_the_probability_of_offence(rollouts_of):
    output = ToxicityReward().score(rollouts_of("Thank you for the lovely flowers.", "You are a stupid asshole.", ""))
    assert output.scores[0] > -0.1
    assert output.scores[1] < -0.95
    assert (output.scores <= 0).all() and (output.scores >= -1).all()


@pytest.mark.parametrize(
    ("leaf", "beginning", "end"),
    [
        (lambda: LanguageReward(language="en"), "This is a sentence about the weather. ", "Das ist ein Satz. "),
        (lambda: SpellingReward(language="en"), "the cat likes the mail ", "zzxq yyxq "),
        (WritingReward, "the cat sat on the mat today ", "This is very, very unique. "),
        (ToxicityReward, "have a nice day ", "you are a stupid fucking idiot "),
    ],
)
def test_only_the_beginning_of_a_long_response_is_scored(leaf, beginning, end, rollouts_of):
    beginning = (beginning * 10_000)[:10_000]
    output = leaf().score(rollouts_of(beginning, beginning + end * 2000))
    assert output.scores[0] == output.scores[1]
    assert leaf().score(rollouts_of(end)).scores[0] < output.scores[0]

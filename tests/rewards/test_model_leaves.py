"""Models as leaves of the reward graph: scores, dense scores, failures."""

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from untrained_reward_models import calibration_of, write_reward_model

from raylhf.batch import Prompt, Rollouts
from raylhf.config import reward_leaves as settings
from raylhf.config.learner import LoRAConfig
from raylhf.config.reward_model import EnsembleHead, MultiValueHead, ScalarHead, TokenHead
from raylhf.models.load import load_tokenizer
from raylhf.models.policy import load_policy
from raylhf.models.reward import export_reward_model, load_reward_model, member_folders
from raylhf.models.reward_text import encode_judged
from raylhf.models.tiny import byte_tokenizer, write_tiny_model
from raylhf.rewards import model_serving
from raylhf.rewards.build import BuildContext
from raylhf.rewards.dense_leaves import soft_minimum_credit, step_credit, step_ends
from raylhf.rewards.model_leaves import (
    EnsembleModelReward,
    ExplicitModelReward,
    ImplicitModelReward,
    MultiValueModelReward,
    ProcessModelReward,
    PromptClassifier,
    TokenLevelModelReward,
)
from raylhf.rewards.model_serving import PolicyTokens, plan_batches
from raylhf.rewards.source import Source
from raylhf.rewards.state import RewardState

BYTES = byte_tokenizer()
STATISTICS = [(0.5, 2.0, 0.5, 0.5), (1.5, 3.0, 1.5, 1.5)]
TEXTS = ("first step.\n\nsecond step", "ok \U0001f600!", "a rather long answer that says very little at all", "no")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model and reward models with each head, by name."""
    root = tmp_path_factory.mktemp("models")
    base = write_tiny_model(root / "base")
    heads = {
        "scalar": (ScalarHead(), None),
        "token": (TokenHead(kind="token"), None),
        "attributes": (MultiValueHead(kind="multi_value", attributes=("kind", "true")), None),
        "heads": (EnsembleHead(kind="ensemble", members=2), None),
        "members": (EnsembleHead(kind="ensemble", members=2, trunk="lora"), LoRAConfig(rank=2)),
    }
    made = {"base": base, "other": write_tiny_model(root / "other", seed=1)}
    return made | {
        name: write_reward_model(base, root / name, head, STATISTICS, lora=lora) for name, (head, lora) in heads.items()
    }


def rollouts_of(*texts, cut=()):
    ids = [np.array(BYTES.encode(text) + ([] if i in cut else [BYTES.eos_token_id])) for i, text in enumerate(texts)]
    return Rollouts(
        prompts=[Prompt(index=i, messages=({"role": "user", "content": "why?"},)) for i in range(len(texts))],
        prompt_ids=[np.arange(3)] * len(texts),
        response_ids=ids,
        rollout_logprobs=[np.zeros(len(row), dtype=np.float32) for row in ids],
        response_texts=list(texts),
        finish_reasons=["length" if i in cut else "stop" for i in range(len(texts))],
        policy_versions=[np.zeros(len(row), dtype=np.int64) for row in ids],
        temperature=1.0,
    )


def context(folder=None, *, batch_tokens=16_384):
    return BuildContext(policy=folder, batch_tokens=batch_tokens)


def scores_of(folder, text) -> Any:
    """What the reward model itself says about one response, alone in its batch."""
    encoded = encode_judged(load_tokenizer(folder), ({"role": "user", "content": "why?"},), text, max_tokens=1000)
    model = load_reward_model(folder, dtype=torch.float32)
    tokens = torch.from_numpy(encoded.ids)[None]
    scores = model(tokens, torch.tensor([tokens.shape[1]]))[0].double().numpy()
    return (scores[encoded.in_response], encoded) if model.is_token_level else scores


def explicit(folder, **settings_):
    return settings.ExplicitReward(kind="explicit", path=folder, **settings_)


def token_level(folder, **settings_):
    return settings.TokenLevelReward(kind="token_level", path=folder, **settings_)


def process(folder, **settings_):
    return settings.ProcessReward(kind="process", path=folder, **settings_)


@pytest.mark.parametrize("batch_tokens", [1, 150, 16_384])
def test_explicit_scores_are_the_models_own_in_the_callers_order_in_any_batch(folders, batch_tokens):
    leaf = ExplicitModelReward(explicit(folders["scalar"]), context(batch_tokens=batch_tokens))
    output = leaf.score(rollouts_of(*TEXTS))
    expected = [scores_of(folders["scalar"], text)[0] for text in TEXTS]
    np.testing.assert_allclose(output.scores, expected, rtol=1e-5, atol=1e-6)
    assert output.valid.all() and output.token_scores is None and output.errors == ()
    assert leaf.calibration is not None and leaf.calibration.mean == (0.5,)


def test_an_output_of_several_is_chosen_with_its_calibration(folders):
    leaf = ExplicitModelReward(explicit(folders["attributes"], output=1), context())
    assert leaf.score(rollouts_of("no")).scores[0] == pytest.approx(scores_of(folders["attributes"], "no")[1])
    assert leaf.calibration is not None and leaf.calibration.mean == (1.5,)
    with pytest.raises(ValueError, match="output is 2, but .* has 2 outputs"):
        ExplicitModelReward(explicit(folders["attributes"], output=2), context())


def test_models_that_do_not_fit_the_leaf_are_refused_with_the_leaf_that_fits(folders):
    with pytest.raises(ValueError, match="a token head; set kind: token_level"):
        ExplicitModelReward(explicit(folders["token"]), context())
    with pytest.raises(ValueError, match="a scalar head; set kind: explicit"):
        TokenLevelModelReward(token_level(folders["scalar"]), context())
    with pytest.raises(ValueError, match="not a reward model; train one"):
        ExplicitModelReward(explicit("tiny"), context())
    with pytest.raises(ValueError, match="`kind: ensemble`"):
        ExplicitModelReward(explicit(folders["members"]), context())


def test_a_score_that_is_not_finite_or_a_text_that_cannot_be_read_is_invalid(folders):
    leaf = ExplicitModelReward(explicit(folders["scalar"]), context())
    with torch.no_grad():
        leaf._served.model.hf.model.embed_tokens.weight[BYTES.encode("~")[0]] = torch.nan  # type: ignore[index]
    output = leaf.score(rollouts_of("fine", "broken~"))
    assert output.valid.tolist() == [True, False] and np.isnan(output.scores[1])
    assert output.errors == ("explicit: prompt 1: the score is nan",)
    leaf._served.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    refused = leaf.score(rollouts_of("fine"))
    assert not refused.valid[0] and "no such role" in refused.errors[0]


def test_no_responses_have_no_scores(folders):
    assert ExplicitModelReward(explicit(folders["scalar"]), context()).score(rollouts_of()).scores.shape == (0,)


def test_a_changed_tokenizer_is_noticed_when_the_leaf_is_built(folders, tmp_path):
    changed = calibration_of(BYTES, 1, STATISTICS)
    copy = tmp_path / "copy"
    load = load_reward_model(folders["scalar"], dtype=torch.float32)
    state = {n: p.detach() for n, p in load.hf.named_parameters()}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    export_reward_model(load, str(copy), state=state, tokenizer=tokenizer, calibration=changed)
    with pytest.raises(ValueError, match="the chat template of reward model"):
        ExplicitModelReward(explicit(str(copy)), context())


@pytest.mark.parametrize("kind", ["heads", "members"])
def test_an_ensembles_members_are_standardised_by_their_own_calibration(folders, kind):
    leaf = EnsembleModelReward(settings.EnsembleReward(kind="ensemble", paths=(folders[kind],)), context())
    output = leaf.score(rollouts_of(*TEXTS[:2]))
    if kind == "heads":
        raw = np.stack([scores_of(folders[kind], text) for text in TEXTS[:2]])
    else:
        raw = np.array([[scores_of(path, text)[0] for path in member_folders(folders[kind])] for text in TEXTS[:2]])
    expected = (raw - [0.5, 1.5]) / [2.0, 3.0]
    assert output.vector is not None and output.vector_names == ("member_0", "member_1")
    np.testing.assert_allclose(output.vector, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.scores, expected.mean(1), rtol=1e-5, atol=1e-6)


def test_members_of_one_are_the_member(folders, tmp_path):
    model = load_reward_model(folders["scalar"], dtype=torch.float32)
    state = {n: p.detach() for n, p in model.hf.named_parameters()}
    export_reward_model(model, str(tmp_path / "plain"), state=state, tokenizer=BYTES, calibration=None)
    paths = (str(tmp_path / "plain"),)
    leaf = EnsembleModelReward(settings.EnsembleReward(kind="ensemble", paths=paths), context())
    assert leaf.score(rollouts_of("no")).scores[0] == pytest.approx(scores_of(folders["scalar"], "no")[0])


def test_a_multi_value_score_is_the_weighted_sum_of_its_attributes(folders):
    def leaf(**options):
        config = settings.MultiValueReward(kind="multi_value", path=folders["attributes"], **options)
        return MultiValueModelReward(config, context())

    raw = scores_of(folders["attributes"], "no")
    output = leaf(weights={"true": 3.0}).score(rollouts_of("no"))
    assert output.vector_names == ("kind", "true") and output.vector is not None
    np.testing.assert_allclose(output.vector[0], raw, rtol=1e-5)
    assert output.scores[0] == pytest.approx(3 * raw[1])
    assert leaf().score(rollouts_of("no")).scores[0] == pytest.approx(raw.mean())
    with pytest.raises(ValueError, match="weights names 'fun'"):
        leaf(weights={"fun": 1.0})


@pytest.mark.parametrize("aggregate", ["sum", "mean", "last"])
def test_token_scores_of_the_response_are_dense_and_sum_to_the_score(folders, aggregate):
    leaf = TokenLevelModelReward(token_level(folders["token"], aggregate=aggregate), context(folders["base"]))
    rollouts = rollouts_of(*TEXTS, cut=(2,))
    output = leaf.score(rollouts)
    assert output.token_scores is not None and output.valid.all()
    for row, text in enumerate(TEXTS):
        raw, _ = scores_of(folders["token"], text)
        expected = {"sum": raw, "mean": raw / len(raw), "last": np.append(np.zeros(len(raw) - 1), raw[-1])}[aggregate]
        assert output.scores[row] == pytest.approx(expected.sum(), rel=1e-4)
        assert output.token_scores[row].sum(dtype=float) == pytest.approx(output.scores[row], rel=1e-4, abs=1e-5)
        assert output.token_scores[row].shape == rollouts.response_ids[row].shape
    raw, _ = scores_of(folders["token"], "no")
    expected = {"sum": [raw[0], raw[1], 0], "mean": [raw[0] / 2, raw[1] / 2, 0], "last": [0, raw[1], 0]}[aggregate]
    np.testing.assert_allclose(output.token_scores[3], expected, rtol=1e-4)


def test_the_probability_link_scores_tokens_from_minus_one_to_one(folders):
    settings_ = token_level(folders["token"], aggregate="sum", link="probability")
    leaf = TokenLevelModelReward(settings_, context(folders["base"]))
    output = leaf.score(rollouts_of("no"))
    raw, _ = scores_of(folders["token"], "no")
    expected = 2 / (1 + np.exp(-raw)) - 1
    assert output.token_scores is not None and leaf.calibration is None
    np.testing.assert_allclose(output.token_scores[0], [*expected, 0], rtol=1e-4)
    assert output.scores[0] == pytest.approx(expected.sum(), rel=1e-4)


def test_without_a_policys_tokenizer_there_are_no_dense_scores(folders):
    assert TokenLevelModelReward(token_level(folders["token"]), context()).score(rollouts_of("no")).token_scores is None


def test_an_empty_response_has_no_token_score(folders):
    output = TokenLevelModelReward(token_level(folders["token"]), context(folders["base"])).score(rollouts_of("", "no"))
    assert output.valid.tolist() == [False, True] and "no text" in output.errors[0]
    assert output.token_scores is not None and output.token_scores[0].tolist() == [0.0]


def test_steps_end_before_their_separator_and_blank_ones_are_none():
    assert step_ends("ab \n\n\n\ncd\n\n", "\n\n").tolist() == [2, 9]
    assert step_ends(" \n\n ", "\n\n").tolist() == []


def test_soft_minimum_credit_is_pures():
    credit = soft_minimum_credit(np.array([0.8, 0.6, 0.0, 0.9]), 0.1)
    np.testing.assert_allclose(credit, [0.000268, 0.001483, 0.0, 0.000111], atol=1e-6)
    assert credit.sum() == pytest.approx(0.001861, abs=1e-6)


def test_step_aggregates_are_the_oracles_and_agree_on_one_step():
    right = np.array([0.9, 0.8, 0.5, 0.95])

    def credit(values, aggregate, temperature=0.01):
        return step_credit(values, aggregate=aggregate, temperature=temperature)

    assert (credit(right, "product").sum() + 1) / 2 == pytest.approx(0.342)
    np.testing.assert_allclose(credit(right, "product"), [0.8, -0.36, -0.72, -0.036])
    assert (credit(right, "mean").sum() + 1) / 2 == pytest.approx(0.7875)
    assert (credit(right, "last").sum() + 1) / 2 == pytest.approx(0.95)
    assert (credit(right, "min").sum() + 1) / 2 == pytest.approx(0.5)
    for aggregate in ("min", "product", "mean", "last"):
        assert credit(np.array([0.7]), aggregate).sum() == pytest.approx(0.4)


def test_process_credit_stands_at_the_ends_of_steps(folders):
    config = process(folders["token"], aggregate="mean", separator="\n\n")
    rollouts = rollouts_of(TEXTS[0], "  ")
    output = ProcessModelReward(config, context(folders["base"])).score(rollouts)
    raw, _ = scores_of(folders["token"], TEXTS[0])
    ends = [len("first step.") - 1, len(TEXTS[0]) - 1]
    expected = 2 / (1 + np.exp(-raw[ends])) - 1
    assert output.scores[0] == pytest.approx(expected.mean(), rel=1e-5)
    assert output.token_scores is not None
    assert np.flatnonzero(output.token_scores[0]).tolist() == ends
    np.testing.assert_allclose(output.token_scores[0][ends], expected / 2, rtol=1e-5)
    assert output.valid.tolist() == [True, False] and "no step" in output.errors[0]


def implicit(folders, **options):
    paths = {"policy": folders["other"], "reference": folders["base"]} | options
    return settings.ImplicitReward(kind="implicit", beta=0.5, **paths)


def test_implicit_scores_are_beta_times_the_log_ratio_with_the_end_token(folders):
    rollouts = rollouts_of("yes", "so", cut=(1,))
    output = ImplicitModelReward(implicit(folders, form="token"), context(folders["base"])).score(rollouts)
    prefix = BYTES.encode("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n")
    assert output.token_scores is not None
    for row in range(2):
        response = rollouts.response_ids[row].tolist()
        tokens = torch.tensor([prefix + response])
        at = torch.arange(len(prefix), tokens.shape[1])
        ratio = log_ratio(folders, tokens, at)
        np.testing.assert_allclose(output.token_scores[row], 0.5 * ratio, rtol=1e-4, atol=1e-5)
        assert output.scores[row] == pytest.approx(0.5 * ratio.sum(), rel=1e-4)


def log_ratio(folders, tokens, at):
    values = []
    for name in ("other", "base"):
        model = load_policy(
            folders[name],
            dtype=torch.float32,
            attention="sdpa",
            trust_remote_code=False,
            logprob_chunk=64,
            with_value_head=False,
        )
        logits = model.lm(tokens).logits[0, at - 1].log_softmax(-1)
        values.append(logits[torch.arange(len(at)), tokens[0, at]].detach().double().numpy())
    return values[0] - values[1]


def test_implicit_scores_do_not_depend_on_the_batch_and_can_be_one_a_response(folders):
    rollouts = rollouts_of(*TEXTS, "")
    alone = ImplicitModelReward(implicit(folders), context(folders["base"], batch_tokens=1)).score(rollouts)
    together = ImplicitModelReward(implicit(folders), context(folders["base"])).score(rollouts)
    np.testing.assert_allclose(alone.scores, together.scores, rtol=1e-4, atol=1e-5)
    assert together.token_scores is None and together.valid.tolist() == [True] * 4 + [False]
    same = ImplicitModelReward(implicit(folders, policy=folders["base"]), context()).score(rollouts)
    np.testing.assert_allclose(same.scores[:4], 0.0, atol=1e-9)


def test_implicit_models_must_share_a_tokenizer(folders, tmp_path):
    other = write_tiny_model(tmp_path / "wider")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="have different tokenizers"):
        ImplicitModelReward(implicit(folders, reference=other), context())


def test_a_prompt_classifier_weighs_on_the_simplex_by_the_prompt(folders):
    def weights(temperature):
        gate = PromptClassifier(folders["attributes"], temperature=temperature, num_outputs=2, context=context())
        prompts = [Prompt(index=i, messages=({"role": "user", "content": text},)) for i, text in enumerate(TEXTS)]
        weights, reasons = gate.weights(prompts)
        assert reasons == {}
        return weights

    sharp, soft = weights(0.01), weights(1e6)
    np.testing.assert_allclose(sharp.sum(1), 1.0)
    np.testing.assert_allclose(soft, 0.5, atol=1e-4)
    assert sharp.shape == (4, 2) and (sharp.max(1) > 0.9).any()
    with pytest.raises(ValueError, match="it needs one for each of the gate's 3 parts"):
        PromptClassifier(folders["attributes"], temperature=1.0, num_outputs=3, context=context())


def test_batches_keep_to_the_token_budget_and_hold_every_text_once():
    lengths = [3, 9, 4, 20, 1]
    batches: Any = plan_batches(lengths, 12)
    assert batches == [[3], [1], [2, 0, 4]]
    assert plan_batches([], 12) == []


def test_token_scores_are_aggregated_as_the_model_was_trained_and_only_then_calibrated(folders, tmp_path):
    trained = tmp_path / "last"
    shutil.copytree(folders["token"], trained)
    head = trained / "raylhf_reward.json"
    head.write_text(json.dumps(json.loads(head.read_text()) | {"aggregate": "last"}))
    by_folder = TokenLevelModelReward(token_level(str(trained)), context())
    last = TokenLevelModelReward(token_level(str(trained), aggregate="last"), context())
    total = TokenLevelModelReward(token_level(str(trained), aggregate="sum"), context())
    texts = rollouts_of("some words", "no")
    np.testing.assert_array_equal(by_folder.score(texts).scores, last.score(texts).scores)
    assert not np.allclose(by_folder.score(texts).scores, total.score(texts).scores)
    assert by_folder.calibration is not None
    assert total.calibration is None


def prompts_of(*texts):
    return [Prompt(index=i, messages=({"role": "user", "content": text},)) for i, text in enumerate(texts)]


def test_a_prompt_that_the_classifier_cannot_read_leaves_the_others_their_weights(folders):
    gate = PromptClassifier(folders["attributes"], temperature=1.0, num_outputs=2, context=context())
    expected, _ = gate.weights(prompts_of("one", "two"))
    weights, reasons = gate.weights(prompts_of("one", "half a pair: \ud83d", "two"))
    np.testing.assert_allclose(weights[[0, 2]], expected, rtol=1e-5)
    assert np.isnan(weights[1]).all()
    assert list(reasons) == [1] and reasons[1].startswith("the text cannot be read: TypeError")


def test_a_prompt_with_several_responses_is_classified_once(folders):
    gate = PromptClassifier(folders["attributes"], temperature=1.0, num_outputs=2, context=context())
    sizes = []
    gate._served.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    weights, _ = gate.weights(prompts_of("one", "two", "one", "one"))
    assert sizes == [2]
    np.testing.assert_array_equal(weights[[0, 0]], weights[2:])


def test_a_response_that_cannot_be_read_is_invalid_alone(folders):
    leaf = ExplicitModelReward(explicit(folders["scalar"]), context())
    response = replace(rollouts_of("fine", "?"), response_texts=["fine", "half a pair: \ud83d"])
    output = leaf.score(response)
    assert output.valid.tolist() == [True, False]
    assert output.errors[0].startswith("explicit: prompt 1: the text cannot be read: TypeError")


def test_a_member_without_a_finite_score_is_left_out_of_the_ensemble(folders):
    leaf = EnsembleModelReward(settings.EnsembleReward(kind="ensemble", paths=(folders["members"],)), context())
    before = leaf.score(rollouts_of("fine", "broken~"))
    broken = BYTES.encode("~")[0]
    with torch.no_grad():
        leaf._members[0].model.hf.model.embed_tokens.weight[broken] = torch.nan  # type: ignore[index]
    output = leaf.score(rollouts_of("fine", "broken~"))
    assert output.valid.all() and output.errors == ()
    assert output.vector is not None and before.vector is not None
    assert np.isnan(output.vector[1, 0])
    np.testing.assert_allclose(output.scores, [before.vector[0].mean(), before.vector[1, 1]], rtol=1e-5)
    with torch.no_grad():
        leaf._members[1].model.hf.model.embed_tokens.weight[broken] = torch.nan  # type: ignore[index]
    output = leaf.score(rollouts_of("fine", "broken~"))
    assert output.valid.tolist() == [True, False]
    assert output.errors == ("ensemble: prompt 1: the score is nan",)


def test_members_of_which_only_some_are_calibrated_are_refused(folders, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folders["scalar"], plain)
    (plain / "raylhf_calibration.json").unlink()
    paths = (folders["scalar"], str(plain))
    with pytest.raises(ValueError, match=r"1 of 2 models have a calibration file, and '.*plain' has none"):
        EnsembleModelReward(settings.EnsembleReward(kind="ensemble", paths=paths), context())


def test_a_policys_slow_tokenizer_is_refused_when_the_leaf_is_built(folders, monkeypatch):
    slow = byte_tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    monkeypatch.setattr(model_serving, "load_tokenizer", lambda folder: slow)
    with pytest.raises(ValueError, match="the tokenizer of 'policy' is a slow one"):
        PolicyTokens("policy")


def test_a_class_is_scored_by_its_log_odds_and_a_head_of_raylhf_by_its_output(folders, tmp_path):
    foreign = tmp_path / "classifier"
    shutil.copytree(folders["attributes"], foreign)
    (foreign / "raylhf_reward.json").unlink()
    texts = rollouts_of("some words", "no")
    own = [explicit(folders["attributes"], output=k) for k in (0, 1)]
    first, second = (ExplicitModelReward(leaf, context()).score(texts).scores for leaf in own)
    odds = ExplicitModelReward(explicit(str(foreign), output=1), context()).score(texts).scores
    np.testing.assert_allclose(odds, second - first, rtol=1e-6)


@pytest.mark.parametrize("kind", ["explicit", "multi_value", "ensemble", "token_level", "process", "implicit"])
def test_responses_that_a_leaf_reads_in_part_are_counted_once(folders, kind):
    def length(text):
        return len(encode_judged(BYTES, ({"role": "user", "content": "why?"},), text, max_tokens=1000).ids)

    limit = max(map(length, TEXTS)) - 1
    leaf = {
        "explicit": lambda: ExplicitModelReward(explicit(folders["scalar"], max_tokens=limit), context()),
        "multi_value": lambda: MultiValueModelReward(
            settings.MultiValueReward(kind="multi_value", path=folders["attributes"], max_tokens=limit), context()
        ),
        "ensemble": lambda: EnsembleModelReward(
            settings.EnsembleReward(kind="ensemble", paths=(folders["members"],), max_tokens=limit), context()
        ),
        "token_level": lambda: TokenLevelModelReward(token_level(folders["token"], max_tokens=limit), context()),
        "process": lambda: ProcessModelReward(process(folders["token"], max_tokens=limit), context()),
        "implicit": lambda: ImplicitModelReward(implicit(folders, max_tokens=limit), context()),
    }[kind]()
    state = RewardState()
    Source(kind, leaf, "drop", state).score(rollouts_of(*TEXTS))
    (call,) = state.take_calls()
    assert (call.num_failed, call.num_truncated) == (0, 1)

import pytest

from raylhf.batch import Prompt
from raylhf.config import RunConfig
from raylhf.driver.fingerprint import fixed_settings, prompts_digest, require_same_settings

PROMPTS = [Prompt(i, ({"role": "user", "content": text},)) for i, text in enumerate(("a", "b"))]


def settings(prompts=PROMPTS, **changes):
    raw = {
        "name": "x",
        "num_steps": 5,
        "model": {"path": "tiny"},
        "data": {"path": "p"},
        "rollout": {"prompts_per_step": 8},
        "reward": {"graph": {"kind": "characters", "characters": "a"}},
    }
    digest = {"the prompts of data.path": prompts_digest(prompts)}
    return fixed_settings(RunConfig.model_validate(raw | changes), digest)


def test_more_steps_another_name_and_more_workers_may_change():
    changed = settings(name="y", num_steps=9, rollout={"prompts_per_step": 8, "replicas": 2}, cluster={"num_nodes": 2})
    require_same_settings(settings(), changed, folder="runs/x")


def test_the_learners_may_be_cut_otherwise_also_where_the_checkpoint_still_lists_how_they_were():
    saved = settings() | {"learner.num_ranks": 2, "learner.zero_stage": 1}
    require_same_settings(saved, settings(learner={"num_ranks": 4, "zero_stage": 3}), folder="runs/x")
    with pytest.raises(ValueError, match=r"learner\.micro_batch_tokens was 2048, is 8"):
        require_same_settings(saved, settings(learner={"micro_batch_tokens": 8}), folder="runs/x")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"reward": {"graph": {"kind": "characters", "characters": "b"}}}, "reward.graph.characters was 'a', is 'b'"),
        ({"reward": {"graph": {"kind": "format"}}}, "reward.graph.characters was 'a', is None"),
        ({"prompts": PROMPTS[:1]}, "the prompts of data.path was"),
    ],
)
def test_what_decides_the_meaning_of_the_numbers_may_not(changes, sentence):
    with pytest.raises(ValueError, match="runs/x was begun with other settings") as caught:
        require_same_settings(settings(), settings(**changes), folder="runs/x")
    assert sentence in str(caught.value)
    assert "checkpoint.resume=false" in str(caught.value)

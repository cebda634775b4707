"""The learner with the real DeepSpeed: what must not change its update, and what must not happen without one."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import make_config, run_ranks, share_of, weights_of, write_model
from transformers import AutoModelForCausalLM

from raylhf.rollout.adapter_stream import is_adapter_stream, with_adapters

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(str(tmp_path_factory.mktemp("model")))


def update_and_read(learner, rank, num_ranks):
    """Two steps on this rank's share; the metrics of the second, and the weights."""
    learner.update(*share_of(rank, num_ranks, seed=0))
    metrics = learner.update(*share_of(rank, num_ranks, seed=1))
    return metrics, weights_of(learner)


@pytest.fixture(scope="module")
def single_rank(folder):
    return {
        name: run_ranks(update_and_read, make_config(folder, learner={"lora": lora}), 1)[0]
        for name, lora in {"full": None, "lora": {"rank": 4}}.items()
    }


def assert_same_weights(left, right, tolerance):
    assert left.keys() == right.keys()
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_every_zero_stage_on_two_ranks_gives_the_update_of_one_rank(folder, single_rank, stage, adapter):
    lora = {"rank": 4} if adapter == "lora" else None
    config = make_config(folder, learner={"num_ranks": 2, "zero_stage": stage, "lora": lora})
    (metrics, weights), (other_metrics, other_weights) = run_ranks(update_and_read, config, 2)
    expected_metrics, expected_weights = single_rank[adapter]
    assert_same_weights(weights, expected_weights, TOLERANCE)
    assert_same_weights(weights, other_weights, 0)
    for key in ("policy/loss", "policy/kl_to_ref", "policy/grad_norm", "critic/loss", "advantage/std"):
        assert metrics[key] == pytest.approx(expected_metrics[key], rel=1e-4, abs=1e-6), key
        assert metrics[key] == other_metrics[key], key


def test_micro_batches_padding_and_packing_do_not_change_the_update(folder, single_rank):
    for changes in ({"micro_batch_tokens": 1}, {"micro_batch_tokens": 1000}, {"packing": False}):
        config = make_config(folder, learner=changes)
        _, weights = run_ranks(update_and_read, config, 1)[0]
        assert_same_weights(weights, single_rank["full"][1], TOLERANCE)


def test_two_runs_with_one_seed_are_equal_to_the_bit(folder, single_rank):
    _, weights = run_ranks(update_and_read, make_config(folder), 1)[0]
    assert_same_weights(weights, single_rank["full"][1], 0)


def test_the_update_moves_every_weight_of_the_policy(folder, single_rank):
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in single_rank["full"][1].items():
        assert not torch.equal(weight, start[name]), name


def nothing_drifts(learner, rank):
    """Metrics of two steps with learning rate 0, and the weights."""
    return [learner.update(*share_of(rank, 1, seed=s)) for s in (0, 1)], weights_of(learner)


def test_with_a_vanishing_learning_rate_nothing_drifts_and_every_ratio_is_one(folder):
    config = make_config(folder, learner={"lr": 1e-30}, objective={"num_epochs": 2, "num_minibatches": 2})
    steps, weights = run_ranks(nothing_drifts, config)[0]
    for metrics in steps:
        assert metrics["policy/first_ratio_error"] < 1e-5
        assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
        assert metrics["policy/kl_to_ref"] == 0
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert_same_weights(weights, {name: start[name] for name in weights}, 1e-7)


def save_load_and_go_on(learner, rank, folder):
    """Weights after save, one more step, load, and the same step again."""
    learner.update(*share_of(rank, 2, seed=0))
    learner.save(folder)
    first = learner.update(*share_of(rank, 2, seed=1)), weights_of(learner)
    learner.load(folder)
    second = learner.update(*share_of(rank, 2, seed=1)), weights_of(learner)
    return first, second


@pytest.mark.parametrize(("stage", "adapter"), [(2, {"rank": 4}), (3, None)])
def test_a_loaded_checkpoint_continues_with_the_same_numbers(folder, tmp_path, stage, adapter):
    config = make_config(
        folder,
        learner={"num_ranks": 2, "zero_stage": stage, "lora": adapter},
        objective={
            "critic": {"trunk": "own", "lr": 1e-2},
            "kl": {"control": {"kind": "adaptive", "target_per_sequence": 1, "horizon": 100}},
        },
    )
    for (metrics, weights), (metrics_again, weights_again) in run_ranks(save_load_and_go_on, config, str(tmp_path)):
        assert_same_weights(weights, weights_again, 1e-7)
        for key in ("kl/coef", "policy/loss", "critic/loss", "critic/value_mean"):
            assert metrics[key] == pytest.approx(metrics_again[key], abs=1e-7), key


def export_and_read(learner, rank, folder):
    """Weights after a step, exported to `folder`."""
    learner.update(*share_of(rank, 2))
    learner.export(folder)
    return weights_of(learner)


def test_the_export_of_a_tied_model_with_adapters_is_a_hugging_face_folder_with_the_same_weights(tmp_path):
    from raylhf.models.tiny import byte_tokenizer

    folder = write_model(str(tmp_path / "tied"), vocab_size=300, tie=True)
    byte_tokenizer().save_pretrained(folder)
    config = make_config(folder, learner={"num_ranks": 2, "zero_stage": 3, "lora": {"rank": 4}})
    weights = run_ranks(export_and_read, config, str(tmp_path / "export"))[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exported = dict(model.named_parameters())
    assert_same_weights(weights, {name: exported[name].data for name in weights}, 0)
    assert exported.keys() == weights.keys()


def both_streams(learner, rank):
    """After a step: the merged weights, what is published, and the bytes of each."""
    learner.update(*share_of(rank, 2))
    lent = learner._published
    assert lent.num_bytes == sum(t.nbytes for _, t in lent)
    assert [(m.name, m.shape) for m in lent.metadata()] == [(name, tuple(t.shape)) for name, t in lent]
    return weights_of(learner), {name: t.clone() for name, t in lent}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_that_travel_alone_make_the_merged_weights_to_the_bit(folder, stage, targets):
    lora = {"rank": 4, "target_modules": targets}
    config = make_config(folder, learner={"num_ranks": 2, "zero_stage": stage, "lora": lora})
    weights, adapters = run_ranks(both_streams, config)[0]
    assert is_adapter_stream(list(adapters))
    frozen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    made = dict(with_adapters(frozen.items(), adapters, dtype=torch.float32))
    assert weights.keys() == made.keys()
    assert all(torch.equal(weights[name], made[name]) for name in weights)
    changed = [name for name in made if not torch.equal(made[name], frozen[name])]
    assert len(changed) == len(adapters) // 3 > 0


def test_all_weights_travel_where_the_folder_has_other_names_for_what_adapters_change(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(folder, tmp_path / "renamed")
    file = other / "model.safetensors"
    save_file({name.removeprefix("model."): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    config = make_config(str(other), learner={"lora": {"rank": 4}})
    weights, published = run_ranks(both_streams_alone, config)[0]
    assert weights.keys() == published.keys()


def both_streams_alone(learner, rank):
    """The merged weights and what is published, of one rank."""
    return weights_of(learner), dict(learner._published)


def measure_all(learner, rank):
    """KL and entropy after a step; ranks hold different numbers of rows."""
    learner.update(*share_of(rank, 2))
    rollouts, _ = share_of(0, 1, seed=3)
    share = rollouts[:5] if rank == 0 else rollouts[5:]
    return learner.measure(share)


def measure_alone(learner, rank):
    """The same on one rank."""
    learner.update(*share_of(rank, 1))
    return learner.measure(share_of(0, 1, seed=3)[0])


def test_measuring_does_not_depend_on_how_rows_are_shared_out(folder):
    alone = run_ranks(measure_alone, make_config(folder, learner={"lora": {"rank": 4}}))[0]
    shared = run_ranks(measure_all, make_config(folder, learner={"lora": {"rank": 4}, "num_ranks": 2}))
    assert shared[0] == shared[1]
    assert shared[0]["eval/kl_to_ref"] == pytest.approx(alone["eval/kl_to_ref"], rel=1e-4)
    assert np.isfinite(list(alone.values())).all()


def warm_the_critic_up(learner, rank, num_ranks):
    """Weights and metrics at the start, after two critic-only steps, and after one more."""
    states: list[Any] = [(weights_of(learner), {})]
    for seed in (0, 1, 2):
        states.append((learner.update(*share_of(rank, num_ranks, seed=seed)), weights_of(learner)))
    return states[0][0], states[2], states[3]


@pytest.mark.parametrize(("trunk", "stage"), [("shared", 0), ("shared", 2), ("own", 2)])
def test_while_the_critic_warms_up_the_policy_stays_and_then_starts_like_a_fresh_one(folder, trunk, stage):
    lr = 1e-3
    config = make_config(
        folder,
        learner={"zero_stage": stage, "lr": lr, "lr_warmup_steps": 2},
        objective={"critic": {"trunk": trunk, "lr": 1e-2, "warmup_steps": 2}, "num_minibatches": 1},
    )
    start, (warm_metrics, warm), (metrics, after) = run_ranks(warm_the_critic_up, config, 1)[0]
    assert_same_weights(start, warm, 0)
    assert "policy/loss" not in warm_metrics
    assert warm_metrics["critic/value_mean"] != 0
    # Adam's first step moves a weight by at most its learning rate, which itself warms up: a half of it.
    largest = max((after[name] - warm[name]).abs().max().item() for name in after)
    assert metrics["policy/lr"] == pytest.approx(lr / 2)
    assert 0.4 * lr < largest < 0.51 * lr


def diverge(learner, rank):
    """What a learner says whose weights are not numbers."""
    with torch.no_grad():
        next(learner._models.policy.module.parameters()).fill_(float("nan"))
    try:
        learner.update(*share_of(rank, 1))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_diverged_policy_stops_the_run_with_a_sentence(folder):
    assert "is nan" in run_ranks(diverge, make_config(folder))[0]


def one_update(learner, rank):
    """Metrics of one step."""
    return learner.update(*share_of(rank, 2))


def test_epochs_stop_on_every_rank_alike_when_the_policy_has_moved_too_far(folder):
    limits = {"num_epochs": 4, "approx_kl_limit": 1e-4}
    config = make_config(folder, learner={"num_ranks": 2}, objective=limits)
    first, second = run_ranks(one_update, config)
    assert first["policy/epochs_done"] == second["policy/epochs_done"] == 2  # the first epoch starts from no change


def one_step_config(folder, objective):
    """A run with one optimizer step to a rollout batch, and no critic."""
    config = make_config(folder, learner={"num_ranks": 2, "zero_stage": 3})
    raw = config.model_dump(exclude_unset=True) | {"objective": objective}
    return type(config).model_validate(raw)


def update_twice_without_and_with_a_pass(learner, rank, folder):
    """Two updates whose old log-probabilities are those of the update itself, and the same with a pass before it."""
    kind, answers = type(learner._objective), []
    learner.save(folder)
    for with_pass in (False, True):
        learner.load(folder)
        if with_pass:
            kind.learns_once = False  # in this process, which ends with the test
        assert learner._objective.learns_once is not with_pass
        answers.append(update_and_read(learner, rank, 2))
    return answers


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "ppo", "advantage": "grpo", "num_epochs": 1, "kl": {"placement": "loss", "coef": 0.1}},
        # Some groups are ties: nothing is learnt from their rows.
        {"kind": "online_dpo", "pairs": {"kind": "best_worst", "tie_margin": 0.5}},
    ],
    ids=lambda objective: objective["kind"],
)
def test_one_step_to_a_batch_finds_the_old_log_probabilities_itself(folder, tmp_path, objective):
    config = one_step_config(folder, objective)
    for (found, weights), (expected, expected_weights) in run_ranks(
        update_twice_without_and_with_a_pass, config, str(tmp_path)
    ):
        assert_same_weights(weights, expected_weights, 1e-7)
        # With nothing to compare, nothing is told.
        assert found.keys() == expected.keys() - {"policy/first_ratio_error"}
        assert abs(expected["policy/kl_to_ref"]) > 1e-3  # in the second update
        for key in found.keys() - {"memory/learner_peak_gib"}:
            if not key.endswith("_s"):
                assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key


def weights_after_one_update(learner, rank):
    """Weights after one update."""
    learner.update(*share_of(rank, 1))
    return weights_of(learner)


def test_in_half_precision_the_first_update_is_adams_first_step_with_and_without_partitions(folder):
    whole, partitioned = (
        run_ranks(
            weights_after_one_update, make_config(folder, model={"dtype": "bfloat16"}, learner={"zero_stage": stage})
        )[0]
        for stage in (0, 1)
    )
    # A step that is counted twice is a third shorter; the learning rate is 1e-2, and what is left is rounding.
    for name, weight in whole.items():
        assert (weight.float() - partitioned[name].float()).abs().mean() < 1e-4, name

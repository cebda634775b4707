"""Learners that go on from a checkpoint of another number of ranks or ZeRO stage, with the real DeepSpeed."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from reward_stand_ins import on_ranks
from stand_ins import TIMEOUT_S, make_config, share_of, write_model

from raylhf.learner.changed_shape import Shape, must_convert, read_shape

TOLERANCE = 1e-5
PATHS = [
    # from: ranks, stage; to: ranks, stage
    ((2, 1), (1, 1)),
    ((2, 1), (2, 3)),
    ((2, 3), (1, 2)),
    ((1, 2), (2, 3)),
    ((2, 1), (1, 0)),
    ((1, 0), (2, 3)),
]
NARROW_PATHS = [((1, 2), (2, 3))]
"""For adapters in bfloat16."""
BEFORE, AFTER = (0, 1, 2), (3, 4)
"""Seeds of the steps before and after the checkpoint."""


def config_of(model, variant, stage):
    """All weights in float32, with a value head in a group of its own that begins a step earlier than the policy; or
    adapters in bfloat16, with a critic of its own that warms up while the policy's optimizer stands still."""
    critic = {"trunk": "shared", "lr": 1e-2, "warmup_steps": 1}
    if variant == "narrow":
        critic |= {"trunk": "own", "warmup_steps": len(BEFORE)}
    return make_config(
        model,
        model={"dtype": "bfloat16" if variant == "narrow" else "float32"},
        learner={
            "zero_stage": stage,
            "lr": 1e-2,
            "weight_decay": 0.1,
            "lr_schedule": "linear",
            "lora": {"rank": 4} if variant == "narrow" else None,
        },
        objective={"num_minibatches": 1, "kl": {"coef": 0.1}, "critic": critic},
    )


def optimizer_state(engine):
    """Full float32 weights and moments by name, and each group's step count."""
    from deepspeed.utils import (
        lazy_init_hp_params_optimizer_state,
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
    )

    from raylhf.learner.changed_shape import shape_of

    steps, found, optimizer = shape_of(engine).adam_steps, {}, engine.optimizer
    if engine.zero_optimization_stage() in (1, 2) and any(steps):
        # DeepSpeed does so after the first group's first step, when the second has no moments yet.
        for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)
    for name, parameter in engine.module.named_parameters():
        if not (parameter.requires_grad and any(steps)):
            continue
        if engine.zero_optimization_stage() == 0:
            state = optimizer.state[parameter]
            found[name] = [parameter.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
        else:
            moments = [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
            found[name] = [safe_get_full_fp32_param(parameter), *moments]
    return found, steps


def states_of(worker):
    """Those of the policy's engine and of the critic's."""
    models = worker._models
    return [optimizer_state(engine) for engine in (models.policy, models.critic) if engine is not None]


def train(worker, ranks, seeds):
    """Metrics of a step for each seed, and the weights after them."""
    metrics = [worker.update(*share_of(ranks.rank, worker._config.learner.num_ranks, seed=s)) for s in seeds]
    return metrics, {name: weight.clone() for name, weight in worker._weights}


def folder_of(saved, variant, shape):
    return Path(saved) / "{}_{}_ranks_stage_{}".format(variant, *shape)


def save_and_go_on(ranks, num_ranks, model, saved, variant, stage):
    """Train, save, go on without loading."""
    worker = ranks.start(config_of(model, variant, stage))
    train(worker, ranks, BEFORE)
    folder = folder_of(saved, variant, (num_ranks, stage))
    worker.save(str(folder))
    states = states_of(worker)
    result = states, *train(worker, ranks, AFTER)
    (folder / "done").touch()
    return result


def load_and_go_on(ranks, model, saved, variant, source, stage, *, forget=False):
    """Load what another shape saved, and go on; with `forget`, without Adam's moments."""
    folder, deadline = folder_of(saved, variant, source), time.monotonic() + TIMEOUT_S
    while not (folder / "done").exists():  # other processes write it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = ranks.start(config_of(model, variant, stage))
    worker.load(str(folder))
    states = states_of(worker)
    if forget:
        for state in worker._models.policy.optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
    return states, *train(worker, ranks, AFTER)


def refusals(ranks, model, saved):
    """What is said where the disk is full, and where bfloat16 weights come from ZeRO 0."""
    from raylhf.learner import changed_shape
    from raylhf.learner.checkpoint import load_engine

    convert, sentences = changed_shape._convert, []
    for variant, source in (("full", (2, 1)), ("narrow", (1, 0))):
        worker = ranks.start(config_of(model, variant, 2))
        changed_shape._convert = disk_is_full
        with pytest.raises(ValueError) as caught:
            load_engine(folder_of(saved, "full", source) / "policy", worker._models.policy)
        changed_shape._convert = convert
        sentences.append(str(caught.value))
    return sentences


def disk_is_full(source, target, saved):
    """Writes a part, and then no more."""
    target.mkdir()
    (target / "part").touch()
    raise OSError(28, "No space left on device")


def on_these_ranks(ranks, num_ranks, model, saved):
    """Everything that so many ranks do: what they save by source, then what they load by source and target."""
    results = {}
    for variant, paths in {"full": PATHS, "narrow": NARROW_PATHS}.items():
        for stage in sorted({source[1] for source, _ in paths if source[0] == num_ranks}):
            results[variant, (num_ranks, stage)] = save_and_go_on(ranks, num_ranks, model, saved, variant, stage)
    for variant, paths in {"full": PATHS, "narrow": NARROW_PATHS}.items():
        for source, target in paths:
            if target[0] == num_ranks:
                results[variant, source, target] = load_and_go_on(ranks, model, saved, variant, source, target[1])
    if num_ranks == 1:
        results["forgetful"] = load_and_go_on(ranks, model, saved, "full", (2, 1), 1, forget=True)
        results["refusals"] = refusals(ranks, model, saved)
    return results


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def results(tmp_path_factory, saved_folder):
    """Rank 0's states, metrics and weights of every path; one rank and two ranks work side by side."""
    model = write_model(str(tmp_path_factory.mktemp("model")))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(on_ranks, on_these_ranks, n, n, model, str(saved_folder)) for n in (1, 2)]
        return runs[0].result()[0] | runs[1].result()[0]


def largest_difference(left, right):
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)


@pytest.mark.parametrize(
    ("variant", "source", "target"), [("full", *p) for p in PATHS] + [("narrow", *p) for p in NARROW_PATHS]
)
def test_float32_weights_moments_and_step_counts_are_those_saved_to_the_bit(results, variant, source, target):
    for saved, loaded in zip(results[variant, source][0], results[variant, source, target][0], strict=True):
        assert loaded[1] == saved[1]
        assert loaded[0].keys() == saved[0].keys()
        for name, parts in saved[0].items():
            for ours, theirs in zip(loaded[0][name], parts, strict=True):
                assert torch.equal(ours, theirs), name


def test_step_counts_differ_where_the_critic_learnt_first(results):
    assert [steps for _, steps in results["full", (2, 3)][0]] == [(2, 3)]
    assert [steps for _, steps in results["narrow", (1, 2)][0]] == [(0,), (3,)]


@pytest.mark.parametrize(("source", "target"), PATHS)
def test_a_run_goes_on_in_another_shape_with_the_same_losses_and_weights(results, source, target):
    _, kept, kept_weights = results["full", source]
    _, changed, weights = results["full", source, target]
    for ours, theirs in zip(changed, kept, strict=True):
        for key in ("policy/loss", "critic/loss", "policy/kl_to_ref", "critic/value_mean", "policy/lr", "critic/lr"):
            assert ours[key] == pytest.approx(theirs[key], abs=TOLERANCE), key
    assert weights.keys() == kept_weights.keys()
    assert largest_difference(weights, kept_weights) < TOLERANCE


def test_without_the_moments_it_would_not(results):
    _, kept, kept_weights = results["full", (2, 1)]
    _, forgetful, weights = results["forgetful"]
    assert abs(forgetful[-1]["policy/kl_to_ref"] - kept[-1]["policy/kl_to_ref"]) > 100 * TOLERANCE
    assert largest_difference(weights, kept_weights) > 100 * TOLERANCE


def test_what_was_converted_is_removed_and_the_checkpoints_stay(results, saved_folder):
    kept = {folder_of(saved_folder, key[0], key[1]).name for key in results if isinstance(key, tuple) and len(key) == 2}
    assert {path.name for path in saved_folder.iterdir()} == kept
    shape = read_shape(folder_of(saved_folder, "full", (2, 1)) / "policy")
    assert shape == Shape(num_ranks=2, zero_stage=1, adam_steps=(2, 3))


def test_a_full_disk_and_an_impossible_change_are_told_of_with_a_remedy(results):
    full, bfloat16 = results["refusals"]
    assert "No space left on device" in full
    assert "learner.num_ranks=2 learner.zero_stage=1" in full
    assert "set learner.zero_stage to 0" in bfloat16
    assert "bfloat16" in bfloat16


@pytest.mark.parametrize(
    ("saved", "now", "expected"),
    [
        ((2, 1), (2, 1), False),
        ((2, 1), (1, 1), True),
        ((2, 1), (2, 2), True),
        ((1, 3), (2, 3), True),
        ((1, 0), (1, 1), True),
        ((2, 0), (1, 0), False),  # one file, which every rank reads
    ],
)
def test_only_a_checkpoint_of_another_shape_is_converted(saved, now, expected):
    shape = Shape(num_ranks=saved[0], zero_stage=saved[1], adam_steps=(1,))
    assert must_convert(shape, num_ranks=now[0], zero_stage=now[1]) is expected


def test_a_checkpoint_that_notes_no_shape_is_loaded_as_it_is(tmp_path):
    assert read_shape(tmp_path) is None

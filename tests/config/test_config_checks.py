"""Settings that are each legal but make no sense together."""

import pytest

from raylhf.config import checks
from raylhf.config.checks import check_config

GPU = {
    "rollout.num_gpus": 1,
    "learner.num_gpus": 1,
    "cluster.gpus_per_node": 2,
    "cluster.cpus_per_node": 8,
}
LENGTH = {"kind": "length", "min_words": 9, "max_words": 3}
TWO_OF_A_NAME = [{"name": "a", "reward": {"kind": "format"}}, {"name": "a", "reward": {"kind": "sentiment"}}]
ADAPTIVE = {"kind": "adaptive", "target_per_sequence": 6.0}


def test_the_defaults_have_no_problem(build):
    assert check_config(build({})) == []


def test_a_gpu_run_has_no_problem(build):
    assert check_config(build(GPU | {"model.dtype": "bfloat16", "model.attention": "flash_attention_2"})) == []


def test_lora_with_a_critic_of_its_own_is_legal(build):
    assert check_config(build({"learner.lora": {"rank": 4}, "objective.critic.trunk": "own"})) == []


def test_adaptive_control_is_legal_in_reward_and_in_loss(build):
    for placement in ("reward", "loss"):
        assert check_config(build({"objective.kl.control": ADAPTIVE, "objective.kl.placement": placement})) == []


def test_the_legal_estimators_are_k1_in_the_reward_and_k2_in_the_loss(build):
    legal = {
        (placement, estimator)
        for placement in ("reward", "loss")
        for estimator in ("k1", "k2", "k3")
        if not check_config(build({"objective.kl.placement": placement, "objective.kl.estimator": estimator}))
    }
    assert legal == {("reward", "k1"), ("loss", "k2")}


REFUSED = [
    (
        {"tracking.prometheus_port": 9100, "cluster.address": "auto"},
        "tracking.prometheus_port: is 9100, but cluster.address joins a Ray",
    ),
    ({"rollout.sampling.top_p": 0.9}, "rollout.sampling.top_p: is 0.9, but the objective needs"),
    ({"rollout.sampling.top_k": 50}, "rollout.sampling.top_k: is 50"),
    ({"rollout.max_model_len": 600}, "rollout.max_model_len: is 600, less than"),
    ({"objective.kl.estimator": "k3"}, "k3 in the reward are biased"),
    ({"objective.kl.placement": "loss", "objective.kl.estimator": "k1"}, "zero expected gradient"),
    (
        {"objective.kl.control": ADAPTIVE, "objective.kl.budget_per_sequence": 5.0},
        "objective.kl.control.target_per_sequence: is 6.0, above budget_per_sequence = 5.0",
    ),
    ({"objective.kl.control": ADAPTIVE | {"min_coef": 11.0}}, "is 11.0, more than max_coef"),
    ({"objective.kl.control": ADAPTIVE, "objective.kl.coef": 0.0}, "objective.kl.coef: is 0.0, outside"),
    ({"objective.advantage": "grpo"}, "rollout.group_size: is 1, but objective.advantage: grpo"),
    ({"objective.advantage": "dr_grpo"}, "rollout.group_size: is 1"),
    ({"objective.advantage": "rloo"}, "rollout.group_size: is 1"),
    ({"objective.advantage": "reinforce_pp", "objective.critic.lr": 1e-4}, "objective.critic.lr: is 0.0001"),
    ({"objective.advantage": "reinforce_pp", "objective.gae_lambda": 1.0}, "objective.gae_lambda: is 1.0"),
    ({"objective.advantage": "reinforce_pp", "objective.bootstrap_truncated": True}, "comes from a critic"),
    (
        {"objective.critic.trunk": "shared", "objective.critic.path": "rm"},
        "objective.critic.path: is 'rm', but trunk: shared",
    ),
    ({"objective.critic.loss_coef": 0.5}, "objective.critic.loss_coef: is 0.5"),
    ({"objective.critic.warmup_steps": 5}, "objective.critic.warmup_steps: is 5, but the run has num_steps = 5"),
    ({"learner.num_ranks": 3, "cluster.cpus_per_node": 8}, "is 8, not a multiple of learner.num_ranks = 3"),
    ({"objective.num_minibatches": 3}, "which does not divide the 8 responses of a rank"),
    (GPU | {"model.attention": "flash_attention_2"}, "has no float32"),
    ({"model.attention": "flash_attention_2", "model.dtype": "bfloat16"}, "needs a GPU"),
    ({"learner.offload_optimizer": True}, "learner.offload_optimizer: is true, but the learner is on the CPU"),
    ({"learner.offload_params": True, "learner.zero_stage": 3}, "learner.offload_params: is true, but the learner"),
    (GPU | {"learner.offload_params": True}, "only ZeRO-3 partitions parameters"),
    (GPU | {"learner.offload_optimizer": True, "learner.zero_stage": 0}, "ZeRO-0 has no offload"),
    ({"rollout.weight_transfer": "nccl"}, "is nccl, which needs GPUs"),
    ({"rollout.weight_transfer": "ipc"}, "is ipc, which needs GPUs"),
    (GPU | {"rollout.weight_transfer": "gloo"}, "is gloo, which is for CPUs"),
    (GPU | {"rollout.weight_transfer": "ipc"}, "their shares are 1 + 1 > 1"),
    (
        GPU | {"rollout.num_gpus": 0.4, "learner.num_gpus": 0.6, "rollout.weight_transfer": "nccl"},
        "refuses two processes on one GPU",
    ),
    (GPU | {"rollout.num_gpus": 0}, "between a CPU and a GPU role"),
    (GPU | {"rollout.tensor_parallel_size": 2}, "rollout.num_gpus: is 1, but rollout.tensor_parallel_size is 2"),
    (GPU | {"rollout.num_gpus": 2}, "rollout.num_gpus: is 2, but the engine uses"),
    (
        GPU | {"rollout.tensor_parallel_size": 4, "rollout.num_gpus": 4},
        "rollout.tensor_parallel_size: is 4, but a node has cluster.gpus_per_node = 2",
    ),
    (GPU | {"learner.num_gpus": 2}, "learner.num_gpus: is 2, but a rank uses one GPU"),
    ({"cluster.num_nodes": 2}, "starts Ray on this machine alone"),
    ({"rollout.num_cpus": 3}, "cluster.cpus_per_node: is 2, but one rollout worker asks for 3 CPUs"),
    ({"reward.replicas": 3}, "the roles ask for 3 CPUs (rollout 1 x 0.5 + reward 3 x 0.5 + learner 1 x 1)"),
    ({"reward.replicas": 3}, "the cluster has 1 x 2: 1 are missing"),
    (GPU | {"learner.num_ranks": 4, "cluster.cpus_per_node": 9}, "the roles ask for 5 GPUs"),
    ({"evaluation.every_steps": 2, "data.held_out": 0}, "data.held_out: is 0, but evaluation.every_steps is 2"),
    ({"reward.graph": LENGTH}, "reward.graph.min_words: is 9, more than max_words = 3"),
    (
        {"reward.graph": {"kind": "sum", "parts": [{"name": "a", "reward": LENGTH}]}},
        "reward.graph.parts.0.reward.min_words: is 9",
    ),
    ({"reward.graph": {"kind": "sum", "parts": TWO_OF_A_NAME}}, "reward.graph.parts.1.name: 'a' names two parts"),
    ({"reward.graph": {"kind": "function", "path": "mine.score"}}, "write package.module:function"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=[expected[:40] for _, expected in REFUSED])
def test_a_combination_that_cannot_run_is_refused_with_its_reason(build, changes, expected):
    problems = check_config(build(changes))
    assert any(expected in problem for problem in problems), problems


def test_workers_that_fit_in_total_but_on_no_node_are_named(build):
    # Two nodes of 3 GPUs: two engines of 2 leave one GPU on each node, and the third engine's two are apart.
    changes = GPU | {
        "cluster.num_nodes": 2,
        "cluster.address": "auto",
        "cluster.gpus_per_node": 3,
        "rollout.tensor_parallel_size": 2,
        "rollout.num_gpus": 2,
        "rollout.replicas": 2,
        "learner.num_ranks": 2,
    }
    assert check_config(build(changes)) == []
    problems = check_config(
        build(changes | {"rollout.replicas": 3, "learner.num_ranks": 1, "cluster.gpus_per_node": 4})
    )
    assert problems == []
    lonely = changes | {"rollout.replicas": 3, "learner.num_ranks": 1, "cluster.num_nodes": 3}
    assert check_config(build(lonely)) == []
    problems = check_config(build(lonely | {"rollout.replicas": 4}))
    assert len(problems) == 1
    assert "cluster.num_nodes: is 3: the total suffices, but 1 rollout worker(s) of 2 GPUs" in problems[0]


def test_shares_of_a_gpu_meet_on_one_gpu(build):
    changes = GPU | {"rollout.num_gpus": 0.4, "learner.num_gpus": 0.6, "cluster.gpus_per_node": 1}
    assert check_config(build(changes)) == []
    pairs = changes | {"rollout.replicas": 2, "learner.num_ranks": 2}
    assert any("2 GPUs" in problem for problem in check_config(build(pairs)))
    (problem,) = check_config(build(pairs | {"cluster.gpus_per_node": 2}))
    assert "which Ray would pair at will" in problem


def test_only_workers_that_can_come_and_go_have_bounds(build):
    shares = GPU | {"rollout.num_gpus": 0.4, "learner.num_gpus": 0.6, "cluster.gpus_per_node": 1}
    for changes, sentence in (
        (shares, "weights travel by ipc, inside of one GPU"),
        ({"rollout.placement": "STRICT_PACK"}, "holds only for workers that are there from the start; set it to PACK"),
    ):
        (problem,) = check_config(build(changes | {"rollout.max_replicas": 2}))
        assert problem.startswith("rollout.max_replicas: asks for rollout workers that come and go, but")
        assert sentence in problem and problem.endswith("or leave min_replicas and max_replicas out")
    assert check_config(build({"rollout.placement": "SPREAD", "rollout.max_replicas": 2})) == []


def test_the_nodes_must_hold_what_a_run_cannot_start_without(build):
    changes = {"rollout.num_cpus": 1.0, "rollout.replicas": 5, "cluster.cpus_per_node": 3}
    (problem,) = check_config(build(changes))
    assert "rollout 5 x 1 +" in problem
    assert check_config(build(changes | {"rollout.min_replicas": 1})) == []


def test_settings_that_would_do_nothing_are_refused(build):
    for changes, sentence in (
        ({"objective.advantage": "rloo", "rollout.group_size": 2, "objective.gamma": 0.5}, "credits whole responses"),
        ({"objective.approx_kl_limit": 0.1, "objective.num_epochs": 1}, "stops epochs after the first one"),
    ):
        (problem,) = check_config(build(changes))
        assert sentence in problem


def test_a_cut_response_is_not_both_bootstrapped_and_punished(build):
    (problem,) = check_config(build({"objective.bootstrap_truncated": True}))
    assert "missing_eos_penalty = 1" in problem
    assert check_config(build({"objective.bootstrap_truncated": True, "reward.missing_eos_penalty": 0})) == []


def test_bfloat16_on_a_cpu_needs_instructions_for_it(build, monkeypatch):
    monkeypatch.setattr(checks, "cpu_has_bfloat16", lambda: False)
    (problem,) = check_config(build({"model.dtype": "bfloat16"}))
    assert problem.startswith("model.dtype: is bfloat16, but learner.num_gpus is 0 and this machine's CPU has no")
    assert check_config(build({"model.dtype": "bfloat16", "cluster.address": "head:6379"})) == []  # other machines
    monkeypatch.setattr(checks, "cpu_has_bfloat16", lambda: True)
    assert check_config(build({"model.dtype": "bfloat16"})) == []

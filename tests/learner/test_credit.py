"""Credit on one rank without an engine: numbers worked by hand."""

import pytest
import torch
from torch import Tensor

from raylhf.config.objective import PPOConfig
from raylhf.learner.credit import assign_credit
from raylhf.learner.experience import Experience


def experience(**changes) -> Experience:
    """Two groups of two responses with three, two, one and no tokens that count; KL of 0.1 a token."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    fields = {
        "response_mask": mask,
        "rollout_logprobs": torch.zeros(4, 3),
        "old_logprobs": torch.full((4, 3), -1.0),
        "ref_logprobs": torch.full((4, 3), -1.1),
        "values": torch.full((4, 3), 0.5),
        "scores": torch.tensor([1.0, 3.0, 2.0, 0.0]),
        "valid": torch.tensor([True, True, True, False]),
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "is_truncated": torch.tensor([False, True, False, False]),
    }
    return Experience(**{**fields, **changes})


def advantages_of(objective: dict, **changes) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    config = PPOConfig.model_validate({"whiten_advantages": False, **objective})
    x, metrics = assign_credit(experience(**changes), config, kl_coef=0.5, all_reduce=lambda t: t)
    assert x.advantages is not None
    return x.advantages, x.returns, metrics


def test_rloo_takes_the_kl_penalty_before_the_baseline():
    # Totals: 1 - 0.5 * 0.3 = 0.85 and 3 - 0.5 * 0.2 = 2.9; each minus the other. The third row's partner is invalid.
    advantages, returns, _ = advantages_of({"advantage": "rloo"})
    expected = torch.tensor([[-2.05, -2.05, -2.05], [2.05, 2.05, 0], [0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(advantages, expected)
    assert returns is None


def test_with_the_penalty_in_the_loss_the_rewards_are_the_scores_alone():
    advantages, _, _ = advantages_of({"advantage": "dr_grpo", "kl": {"placement": "loss"}})
    torch.testing.assert_close(advantages[:2, 0], torch.tensor([-1.0, 1.0]))


def test_reinforce_pp_is_the_reward_to_go():
    advantages, _, _ = advantages_of({"advantage": "reinforce_pp"})
    torch.testing.assert_close(advantages[0], torch.tensor([0.85, 0.9, 0.95]))


def test_a_cut_response_bootstraps_from_the_value_after_its_last_token():
    plain, _, _ = advantages_of({"gae_lambda": 1.0})
    bootstrapped, returns, _ = advantages_of({"gae_lambda": 1.0}, end_values=torch.full((4,), 0.7))
    torch.testing.assert_close(bootstrapped[0], plain[0])
    torch.testing.assert_close(bootstrapped[1] - plain[1], torch.tensor([0.7, 0.7, 0.0]))
    assert returns is not None
    torch.testing.assert_close(returns[1], torch.tensor([3.6, 3.65, 0.0]))


def test_whitening_is_over_all_tokens_that_count_and_reports_the_state_before():
    x, metrics = assign_credit(experience(), PPOConfig(), kl_coef=0.5, all_reduce=lambda t: t)
    assert x.advantages is not None
    counted = x.advantages[x.response_mask]
    assert counted.mean().item() == pytest.approx(0, abs=1e-6)
    assert counted.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (x.advantages[~x.response_mask] == 0).all()
    raw, _, _ = advantages_of({})
    assert metrics["advantage/std"] == pytest.approx(raw[x.response_mask].std(correction=0).item(), rel=1e-5)
    assert metrics["critic/value_mean"] == pytest.approx(0.5)


def test_dense_scores_move_the_score_to_their_tokens():
    token_scores = torch.tensor([[0.1, 0.2, 0.3], [0, 0, 9.0], [0, 0, 0], [5.0, 0, 0]])
    advantages, _, _ = advantages_of({"advantage": "reinforce_pp"}, token_scores=token_scores)
    torch.testing.assert_close(advantages[0], torch.tensor([0.85, 0.9 - 0.1, 0.95 - 0.3]))
    torch.testing.assert_close(advantages[1, 0], torch.tensor(2.9))  # what stands outside of the mask moves to the last
    assert (advantages[3] == 0).all()


def test_gdpo_normalises_each_part_within_its_group_before_the_weighted_sum():
    # Both parts of group 0 are 1 / sqrt(2) deviations off their means; the one of weight 2 decides.
    parts = {"a": torch.tensor([1.0, 3, 2, 0]), "b": torch.tensor([10.0, 0, float("nan"), 0])}
    settings = {"advantage": "gdpo", "gdpo_weights": {"a": 1.0, "b": 2.0}, "kl": {"placement": "loss"}}
    advantages, returns, _ = advantages_of(settings, parts=parts)
    torch.testing.assert_close(advantages[:2, 0], torch.tensor([1.0, -1.0]) / 2**0.5, atol=1e-3, rtol=0)
    assert (advantages[2:] == 0).all(), "a group of one valid response has no baseline"
    assert returns is None


def test_gdpo_names_a_part_that_the_reward_lacks():
    with pytest.raises(ValueError, match="gdpo_weights names 'c', but the reward graph has a"):
        advantages_of({"advantage": "gdpo", "gdpo_weights": {"c": 1.0}}, parts={"a": torch.zeros(4)})

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylhf.algos.advantages import (
    GROUP_BASELINES,
    broadcast_to_tokens,
    gae,
    gdpo,
    grpo_advantages,
    reward_to_go,
    rloo_advantages,
    shape_rewards,
    whiten,
)
from raylhf.algos.masking import masked_moments, mean_and_std

NAN = math.nan

# Worked by an independent numpy program, like every number of these names below.
OLD_LOGPROBS = torch.tensor([[-1.0, -0.5, -2.0, -0.1]])
REF_LOGPROBS = torch.tensor([[-1.2, -0.6, -1.5, -0.4]])
VALUES = torch.tensor([[0.2, 0.3, 0.1, 0.4]])
REWARDS = torch.tensor([[-0.01, -0.005, 0.025, 1.485]])
FULL = torch.ones(1, 4, dtype=torch.bool)


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def assert_equals(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-6)


def test_shaped_rewards_on_worked_numbers():
    assert_equals(shape_rewards(torch.tensor([1.5]), OLD_LOGPROBS, REF_LOGPROBS, FULL, kl_coef=0.05), REWARDS)


def test_score_sits_on_the_last_response_token_and_an_empty_row_gets_nothing():
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    old = torch.where(mask, -1.0, NAN)
    rewards = shape_rewards(torch.tensor([1.0, NAN, 3.0]), old, old, mask, kl_coef=0.1)
    assert_equals(rewards, torch.tensor([[0.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [3, 0, 0, 0, 0]]))


def test_token_scores_and_their_rewards_to_go_on_worked_numbers():
    token_scores = row(0.6, -0.2, 0.1, 0.0)
    scores = torch.tensor([0.5])
    rewards = shape_rewards(scores, OLD_LOGPROBS, REF_LOGPROBS, FULL, kl_coef=0.05, token_scores=token_scores)
    assert_equals(rewards, row(0.59, -0.205, 0.125, -0.015))
    assert_equals(reward_to_go(rewards, FULL, gamma=1.0), row(0.495, -0.095, 0.11, -0.015))


def test_what_token_scores_leave_of_the_score_sits_on_the_last_token():
    # The last position is no response token; 4 - (2 + 1 + 0.5) is left for the last one that is.
    token_scores, mask = row(2.0, 1.0, 0.5, 9.0), row(1, 1, 1, 0).bool()
    zeros = torch.zeros(1, 4)
    rewards = shape_rewards(torch.tensor([4.0]), zeros, zeros, mask, kl_coef=0.05, token_scores=token_scores)
    assert_equals(rewards, row(2.0, 1.0, 1.0, 0.0))


def test_gae_on_worked_numbers():
    advantages, returns = gae(REWARDS, VALUES, FULL, gamma=1.0, gae_lambda=0.95)
    assert_equals(advantages, row(1.118814, 1.082962, 1.35575, 1.085))
    assert_equals(returns, row(1.318814, 1.382962, 1.45575, 1.485))


def test_gae_with_lambda_one_is_discounted_return_minus_value():
    mask = row(0, 1, 1).bool()
    advantages, _ = gae(row(0, 1, 2), row(0, 0.5, 0.25), mask, gamma=0.5, gae_lambda=1.0)
    assert_equals(advantages, row(0, 1.5, 1.75))


def test_last_values_bootstrap_the_last_response_token_of_a_truncated_row():
    # Row 0 was cut after its second token: 0.5 * 10 is added to its last reward. Row 1 ended by itself.
    rewards, values = torch.tensor([[1.0, 2.0, NAN]] * 2), torch.tensor([[0.5, 0.25, NAN]] * 2)
    mask = torch.tensor([[True, True, False]] * 2)
    advantages, _ = gae(rewards, values, mask, gamma=0.5, gae_lambda=1.0, last_values=torch.tensor([10.0, 0.0]))
    assert_equals(advantages, torch.tensor([[4.0, 6.75, 0], [1.5, 1.75, 0]]))


def loop_gae(rewards, values, gamma, gae_lambda, last_value):
    """The definition: A_t = sum over i of (gamma lambda)^i delta_{t+i}, in plain Python floats, without masks."""
    next_values = [*values, last_value][1:]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, next_values, strict=True)]
    return [sum((gamma * gae_lambda) ** i * d for i, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@settings(max_examples=60, deadline=None)
@given(
    masks=st.integers(1, 8).flatmap(
        lambda num_tokens: st.lists(
            st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens), min_size=1, max_size=4
        )
    ),
    gamma=st.sampled_from([0.9, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 1000),
)
def test_gae_with_holes_equals_the_definition_on_the_compacted_response(masks, gamma, gae_lambda, seed):
    mask = torch.tensor(masks)
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(mask.shape, generator=generator).where(mask, NAN) for _ in range(2))
    last_values = torch.randn(mask.shape[0], generator=generator)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, last_values=last_values)
    for b, kept in enumerate(mask):
        compact = rewards[b, kept].tolist(), values[b, kept].tolist()
        expected = torch.tensor(loop_gae(*compact, gamma, gae_lambda, last_values[b].item()))
        torch.testing.assert_close(advantages[b, kept], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(returns[b, kept], expected + values[b, kept], atol=1e-5, rtol=1e-5)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_targets_carry_no_gradient():
    values = VALUES.clone().requires_grad_()
    advantages, returns = gae(REWARDS, values, FULL, gamma=1.0, gae_lambda=0.95)
    assert not advantages.requires_grad and not returns.requires_grad


def test_whitening_over_parts_of_a_batch_equals_a_plain_loop_over_the_whole():
    torch.manual_seed(0)
    mask = torch.rand(6, 5) < 0.6
    values = (3 * torch.randn(6, 5) + 2).where(mask, NAN)
    mean, std = mean_and_std(masked_moments(values[:4], mask[:4]) + masked_moments(values[4:], mask[4:]))
    whitened = whiten(values, mask, mean=mean, std=std)

    valid = [v for v in values.flatten().tolist() if not math.isnan(v)]
    loop_mean = sum(valid) / len(valid)
    loop_std = math.sqrt(sum((v - loop_mean) ** 2 for v in valid) / len(valid))
    expected = [[0.0 if math.isnan(v) else (v - loop_mean) / loop_std for v in line] for line in values.tolist()]
    assert whitened.dtype == torch.float32
    torch.testing.assert_close(whitened, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_whitening_a_constant_batch_gives_zero():
    values, mask = torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)
    mean, std = mean_and_std(masked_moments(values, mask))
    torch.testing.assert_close(whiten(values, mask, mean=mean, std=std), torch.zeros(2, 3))


ONE_GROUP = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
SCORES = torch.tensor([1.0, 0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("grpo", [0.783186, -1.30531, -0.261062, 0.783186]),
        ("dr_grpo", [0.375, -0.625, -0.125, 0.375]),
        ("rloo", [0.5, -0.833333, -0.166667, 0.5]),
    ],
)
def test_group_baselines_on_worked_numbers(baseline, expected):
    assert_equals(GROUP_BASELINES[baseline](SCORES, *ONE_GROUP), torch.tensor(expected))


def test_rloo_is_the_score_minus_the_mean_of_the_others():
    scores, group_ids = torch.randn(7), torch.tensor([4, 9, 4, 9, 4, 4, 9])
    advantages = rloo_advantages(scores, group_ids, torch.ones(7, dtype=torch.bool))
    for i in range(7):
        others = [scores[j].item() for j in range(7) if j != i and group_ids[j] == group_ids[i]]
        assert advantages[i].item() == pytest.approx(scores[i].item() - sum(others) / len(others), abs=1e-6)


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_invalid_member_gets_zero_and_leaves_the_rest_of_its_group_as_without_it(baseline):
    scores, group_ids = torch.tensor([1.0, NAN, 0.0, 5.0, 0.25, 3.0]), torch.tensor([7, 7, 7, 2, 7, 2])
    valid = ~scores.isnan()
    advantages = GROUP_BASELINES[baseline](scores, group_ids, valid)
    alone = GROUP_BASELINES[baseline](scores[valid], group_ids[valid], valid[valid])
    torch.testing.assert_close(advantages[valid], alone)
    assert advantages[1] == 0


@pytest.mark.parametrize("baseline", ["grpo", "dr_grpo", "rloo"])
def test_group_without_contrast_gets_zero(baseline):
    # Three equal scores (0.1 has no exact binary form); one valid member of two; no valid member.
    scores = torch.tensor([0.1, 0.1, 0.1, 8.0, NAN, NAN])
    group_ids = torch.tensor([0, 0, 0, 1, 1, 2])
    advantages = GROUP_BASELINES[baseline](scores, group_ids, ~scores.isnan())
    torch.testing.assert_close(advantages, torch.zeros(6))


def test_grpo_without_std_keeps_the_scale_of_the_scores():
    ten_times = grpo_advantages(10 * SCORES, *ONE_GROUP, normalize_std=False)
    assert_equals(ten_times, torch.tensor([3.75, -6.25, -1.25, 3.75]))


def test_broadcast_fills_response_tokens_only():
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()
    assert broadcast_to_tokens(torch.tensor([2.0, NAN]), mask).tolist() == [[2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]


def test_reward_to_go_discounts_response_tokens_and_passes_over_holes():
    # 1 + 0.5 * (2 + 0.5 * 4) = 3
    mask = torch.tensor([[1, 0, 1, 1]]).bool()
    assert_equals(reward_to_go(row(1, NAN, 2, 4), mask, gamma=0.5), row(3, 0, 4, 4))


def test_gdpo_on_worked_numbers_gives_every_reward_a_say():
    vector = torch.tensor([[1.0, 0], [1, 10], [0, 0], [0, 10]])
    one_group, valid, weights = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool), torch.ones(2)
    assert_equals(gdpo(vector, one_group, valid, weights), torch.tensor([-0.000135, 1.731886, -1.731886, 0.000135]))
    # Summed first and normalised afterwards, the reward of the larger scale decides.
    summed = grpo_advantages(vector.sum(dim=1), one_group, valid)
    assert_equals(summed, torch.tensor([-0.775541, 0.947884, -0.947884, 0.775541]))


@given(st.integers(0, 2**31), st.floats(0.1, 10), st.floats(-5, 5))
def test_gdpo_of_one_column_is_grpo_and_scales_of_columns_do_not_matter(seed, scale, shift):
    random = torch.Generator().manual_seed(seed)
    vector = torch.randint(4, (12, 2), generator=random).float()
    groups, valid = torch.arange(12) // 4, torch.rand(12, generator=random) < 0.8
    alone = gdpo(vector[:, :1], groups, valid, torch.ones(1))
    assert torch.equal(alone, grpo_advantages(vector[:, 0], groups, valid))
    weights = torch.tensor([0.7, 0.3])
    stretched = torch.stack([vector[:, 0], scale * vector[:, 1] + shift], dim=1)
    torch.testing.assert_close(
        gdpo(stretched, groups, valid, weights), gdpo(vector, groups, valid, weights), atol=0.01, rtol=0
    )


def test_gdpo_takes_a_missing_column_as_neutral_and_leaves_invalid_rows_out():
    vector = torch.tensor([[1.0, NAN], [0, 4], [NAN, 2], [9, 9]])
    groups, valid = torch.zeros(4, dtype=torch.long), torch.tensor([True, True, True, False])
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    second = 1 / (math.sqrt(2) + 1e-4)
    expected = torch.tensor([half, -half + 2 * second, -2 * second, 0])
    assert_equals(gdpo(vector, groups, valid, torch.tensor([1.0, 2.0])), expected)

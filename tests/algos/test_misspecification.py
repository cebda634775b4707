"""The published failure of DPO and its repair (2510.20413), with the numbers that were derived independently."""

import pytest
from misspecification.example import (
    SKEWED,
    UNIFORM,
    aux_dpo_theta,
    dpo_theta,
    log_policy,
    reward,
    rlhf_theta,
)

BASE_REWARD = 1.0


def test_the_reference_has_reward_one():
    assert reward(0.0) == pytest.approx(BASE_REWARD)


def test_dpo_under_skewed_counts_ends_below_the_policy_that_it_started_from():
    theta = dpo_theta(SKEWED)
    assert theta == pytest.approx(0.3142, abs=5e-5)
    assert reward(theta) == pytest.approx(0.913011, abs=2e-5)
    assert reward(theta) < BASE_REWARD
    assert log_policy(theta).exp().tolist() == pytest.approx([0.441732, 0.235639, 0.322629], abs=2e-5)


def test_what_dpo_finds_depends_on_how_often_each_pair_is_compared():
    theta = dpo_theta(UNIFORM)
    assert theta == pytest.approx(-0.426, abs=5e-5)
    assert reward(theta) == pytest.approx(1.166797, abs=2e-5)


def test_kl_regularised_rlhf_has_no_pairs_to_depend_on():
    theta = rlhf_theta()
    assert theta == pytest.approx(-0.9952, abs=5e-5)
    assert reward(theta) == pytest.approx(1.418479, abs=2e-5)


@pytest.mark.parametrize("counts", [SKEWED, UNIFORM])
def test_aux_dpo_with_an_offset_for_each_response_takes_the_natural_gradient_step_whatever_the_counts(counts):
    # The rewards' projection on what the policy can express: (1 * 1 + 2 * -1) / 2. The paper reports reward 1.199.
    theta = aux_dpo_theta(counts)
    assert theta == pytest.approx(-0.5, abs=1e-4)
    assert reward(theta) == pytest.approx(1.199, abs=5e-4)


def test_aux_dpo_with_an_offset_for_each_side_of_a_pair_repairs_the_skew_as_well():
    assert reward(aux_dpo_theta(SKEWED, offsets_of="sides", amplitude_coef=0.01)) > 1.15
    assert reward(aux_dpo_theta(SKEWED, offsets_of="sides")) > 1.15

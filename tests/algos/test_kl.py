import math

import pytest
import torch

from raylhf.algos.kl import AdaptiveKL, FixedKL, clamped_log_ratio, count_clamped, kl_loss, kl_per_token

# Worked by an independent numpy program.
LOGPROBS = torch.tensor([[-1.0, -0.5, -2.0, -0.1]])
REF_LOGPROBS = torch.tensor([[-1.2, -0.6, -1.5, -0.4]])
ESTIMATES = {
    "k1": [0.2, 0.1, -0.5, 0.3],
    "k2": [0.02, 0.005, 0.125, 0.045],
    "k3": [0.018731, 0.004837, 0.148721, 0.040818],
}


@pytest.mark.parametrize("estimator", ESTIMATES)
def test_estimators_on_worked_numbers(estimator):
    estimate = kl_per_token(LOGPROBS, REF_LOGPROBS, estimator=estimator)
    torch.testing.assert_close(estimate, torch.tensor([ESTIMATES[estimator]]), atol=1e-6, rtol=0)


def test_log_ratio_is_clamped_at_twenty_and_the_clamps_are_counted_under_the_mask():
    logprobs, ref = torch.tensor([[-50.0, -1.0, 0.0, -90.0]]), torch.tensor([[-1.0, -2.0, -21.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert clamped_log_ratio(logprobs, ref).tolist() == [[-20.0, 1.0, 20.0, -20.0]]
    assert count_clamped(logprobs, ref, mask).item() == 2
    assert kl_per_token(logprobs, ref, estimator="k3").isfinite().all()


def enumerated_policy():
    """Every token of a vocabulary of 4 as one row, so that sum(pi * f) is the exact expectation of f."""
    theta = torch.tensor([0.5, -0.3, 1.2, 0.1], requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.1, 0.4, -0.2, 0.9]), dim=0)
    return theta, ref[:, None], torch.ones(4, 1, dtype=torch.bool)


def gradient(value, leaf):
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def reverse_kl_gradient(theta, ref):
    logprobs = torch.log_softmax(theta, dim=0)[:, None]
    return gradient((logprobs.exp() * (logprobs - ref)).sum(), theta)


def test_kl_loss_has_the_gradient_and_reports_the_value_of_the_reverse_kl():
    theta, ref, mask = enumerated_policy()
    logprobs = torch.log_softmax(theta, dim=0)[:, None]
    pi = logprobs.detach().exp()
    loss, _ = kl_loss(logprobs, ref, mask, denominator=1.0, token_weights=pi)
    torch.testing.assert_close(gradient(loss, theta), reverse_kl_gradient(theta, ref))
    k3 = torch.cat([kl_loss(logprobs[a : a + 1], ref[a : a + 1], mask[:1], denominator=1.0)[1][None] for a in range(4)])
    torch.testing.assert_close((pi[:, 0] * k3).sum(), (pi * (logprobs.detach() - ref)).sum())


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl_and_k1_none():
    theta, ref, _ = enumerated_policy()
    logprobs = torch.log_softmax(theta, dim=0)[:, None]
    pi = logprobs.detach().exp()
    as_loss = {k: gradient((pi * kl_per_token(logprobs, ref, estimator=k)).sum(), theta) for k in ("k1", "k3")}
    forward_kl = (ref.exp() * (ref - logprobs)).sum()
    torch.testing.assert_close(as_loss["k3"], gradient(forward_kl, theta))
    assert (as_loss["k3"] - reverse_kl_gradient(theta, ref)).abs().max() > 0.01
    torch.testing.assert_close(as_loss["k1"], torch.zeros(4), atol=1e-6, rtol=0)


def test_inside_the_reward_k1_alone_has_the_gradient_of_the_reverse_kl():
    theta, ref, _ = enumerated_policy()
    logprobs = torch.log_softmax(theta, dim=0)[:, None]
    pi = logprobs.detach().exp()
    in_reward = {
        k: gradient((pi * kl_per_token(logprobs, ref, estimator=k).detach() * logprobs).sum(), theta)
        for k in ("k1", "k2", "k3")
    }
    expected = reverse_kl_gradient(theta, ref)
    torch.testing.assert_close(in_reward["k1"], expected)
    assert (in_reward["k2"] - expected).abs().max() > 0.01
    assert (in_reward["k3"] - expected).abs().max() > 0.01


def test_off_policy_kl_loss_is_importance_weighted_back_to_the_current_policy():
    theta, ref, mask = enumerated_policy()
    logprobs = torch.log_softmax(theta, dim=0)[:, None]
    old = torch.log_softmax(torch.tensor([1.0, 0.2, -0.5, 0.3]), dim=0)[:, None]
    corrected, _ = kl_loss(logprobs, ref, mask, denominator=1.0, token_weights=old.exp(), old_logprobs=old)
    naive, _ = kl_loss(logprobs, ref, mask, denominator=1.0, token_weights=old.exp())
    expected = reverse_kl_gradient(theta, ref)
    torch.testing.assert_close(gradient(corrected, theta), expected)
    assert (gradient(naive, theta) - expected).abs().max() > 0.01


def test_kl_loss_divides_by_the_given_denominator_and_sums_k3():
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, k3_sum = kl_loss(LOGPROBS, REF_LOGPROBS, mask, denominator=10.0)
    torch.testing.assert_close(loss.item(), sum(ESTIMATES["k2"]) / 10, atol=1e-6, rtol=0)
    torch.testing.assert_close(k3_sum.item(), sum(ESTIMATES["k3"]), atol=1e-5, rtol=0)


def test_kl_loss_still_pulls_back_a_token_beyond_the_clamp():
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    mask = torch.tensor([[True]])
    loss, _ = kl_loss(logprobs, torch.tensor([[-60.0]]), mask, denominator=1.0)
    assert gradient(loss, logprobs).item() == 20.0


def test_nan_outside_the_mask_reaches_neither_kl_loss_nor_its_gradient():
    nan = math.nan
    logprobs = torch.tensor([[-1.0, nan]], requires_grad=True)
    mask, other = torch.tensor([[True, False]]), torch.tensor([[-2.0, nan]])
    loss, k3_sum = kl_loss(logprobs, other, mask, denominator=1.0, old_logprobs=other, token_weights=other)
    assert loss.isfinite() and k3_sum.isfinite()
    assert gradient(loss, logprobs).tolist() == [[pytest.approx(math.e * -2.0), 0.0]]


def adaptive(**changes):
    settings = {"coef": 0.2, "target_per_sequence": 6.0, "horizon": 10_000, "min_coef": 0.0, "max_coef": 10.0}
    return AdaptiveKL(**settings | changes)


@pytest.mark.parametrize(("observed", "expected"), [(3.0, 0.199744), (6.0, 0.2), (30.0, 0.200256)])
def test_adaptive_coefficient_on_worked_numbers(observed, expected):
    # Worked by an independent numpy program.
    assert adaptive().updated(kl_per_sequence=observed, num_sequences=64).coef == pytest.approx(expected, abs=1e-6)


def test_adaptive_coefficient_follows_the_reference_class_over_a_run():
    class ReferenceAdaptiveKLController:  # openai/lm-human-preferences, train_policy.py
        def __init__(self, init_kl_coef, target, horizon):
            self.value, self.target, self.horizon = init_kl_coef, target, horizon

        def update(self, current, n_steps):
            proportional_error = min(max(current / self.target - 1, -0.2), 0.2)
            self.value *= 1 + proportional_error * n_steps / self.horizon

    reference, controller = ReferenceAdaptiveKLController(0.2, 6.0, 10_000), adaptive()
    for observed in (0.0, 2.0, 5.5, 6.5, 9.0, 40.0, 7.0, -1.0) * 20:
        reference.update(observed, 512)
        controller = controller.updated(kl_per_sequence=observed, num_sequences=512)
        assert controller.coef == pytest.approx(reference.value, rel=1e-12)
    assert controller.coef != 0.2


def test_target_is_in_nats_per_sequence():
    # 100 tokens of 0.1 nats are 10 nats: above the target of 6. Their mean of 0.1 per token would read as far below it.
    per_token = torch.full((1, 100), 0.1)
    assert adaptive().updated(kl_per_sequence=per_token.sum(1).mean().item(), num_sequences=64).coef > 0.2
    assert adaptive().updated(kl_per_sequence=per_token.mean().item(), num_sequences=64).coef < 0.2


def test_one_update_at_most_doubles_or_halves_and_stays_within_the_bounds():
    # 60,000 sequences at a horizon of 10,000: the unclamped multipliers are 1 - 0.2 * 6 = -0.2 and 2.2.
    assert adaptive().updated(kl_per_sequence=0.0, num_sequences=60_000).coef == pytest.approx(0.1)
    assert adaptive().updated(kl_per_sequence=99.0, num_sequences=60_000).coef == pytest.approx(0.4)
    bounded = adaptive(min_coef=0.15, max_coef=0.3)
    assert bounded.updated(kl_per_sequence=0.0, num_sequences=60_000).coef == 0.15
    assert bounded.updated(kl_per_sequence=99.0, num_sequences=60_000).coef == 0.3


def test_update_leaves_the_old_controller_as_it_was():
    before = adaptive()
    before.updated(kl_per_sequence=30.0, num_sequences=640)
    assert before.coef == 0.2


def test_saved_adaptive_coefficient_continues_within_the_new_bounds():
    state = adaptive().updated(kl_per_sequence=30.0, num_sequences=640).state_dict()
    assert adaptive().with_state(state).coef == pytest.approx(0.20256)
    assert adaptive(coef=0.1, max_coef=0.1).with_state(state).coef == 0.1


def test_fixed_coefficient_ignores_kl_and_checkpoint():
    controller = FixedKL(coef=0.05)
    assert controller.updated(kl_per_sequence=100.0, num_sequences=64).coef == 0.05
    assert controller.with_state({"coef": 0.7}).coef == 0.05
    assert controller.state_dict() == {}


def test_adaptive_controller_refuses_impossible_settings_and_a_diverged_kl():
    with pytest.raises(ValueError, match="max_coef"):
        adaptive(max_coef=0.1)
    with pytest.raises(ValueError, match="positive"):
        adaptive(horizon=0)
    with pytest.raises(ValueError, match="diverged"):
        adaptive().updated(kl_per_sequence=math.nan, num_sequences=64)

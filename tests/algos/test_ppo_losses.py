import math
from functools import partial

import pytest
import torch

from raylhf.algos.masking import lengths_to_mask
from raylhf.algos.ppo import (
    aggregation_count,
    aggregation_weights,
    policy_loss,
    truncated_importance_weights,
    value_loss,
)

NAN = math.nan
symmetric_policy_loss = partial(policy_loss, clip_eps_low=0.2, clip_eps_high=0.2)


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


# Worked by an independent numpy program.
OLD_LOGPROBS = row(-1.0, -0.5, -2.0, -0.1)
LOGPROBS = row(-0.8, -0.55, -1.6, -0.3)
ADVANTAGES = row(1.118814, 1.082962, 1.35575, 1.085)
FULL = torch.ones(1, 4, dtype=torch.bool)


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def random_batch(num_rows=6, num_tokens=7, seed=0):
    """Ragged responses (one of them empty) with NaN in the padding, and both signs of advantage on all sides of 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 3, 0, 5, 1, 6])[:num_rows]
    mask = lengths_to_mask(lengths, num_tokens)
    old, step, advantages = (torch.randn(num_rows, num_tokens, generator=generator) for _ in range(3))
    old = -old.abs() - 0.1
    return [t.where(mask, NAN) for t in (old + 0.5 * step, old, advantages)] + [mask]


def test_policy_loss_gradient_and_metrics_on_worked_numbers():
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, metrics = symmetric_policy_loss(logprobs, OLD_LOGPROBS, ADVANTAGES, FULL, denominator=4.0)
    torch.testing.assert_close(loss.item(), -1.221986, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(loss, logprobs), row(0.0, -0.257536, 0.0, -0.222081), atol=1e-6, rtol=0)
    ratio = [1.221403, 0.951229, 1.491825, 0.818731]
    assert metrics["clip_frac"].item() == 2
    assert metrics["ratio_sum"].item() == pytest.approx(sum(ratio), abs=1e-5)
    assert metrics["ratio_max"].item() == pytest.approx(1.491825, abs=1e-6)
    assert metrics["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratio), abs=1e-5)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_loss_equals_a_plain_loop_with_asymmetric_clipping(dual_clip):
    logprobs, old, advantages, mask = random_batch()
    logprobs = old + 4 * (logprobs - old)  # takes some ratios beyond the dual clip
    loss, metrics = policy_loss(
        logprobs, old, advantages, mask, clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=dual_clip, denominator=22.0
    )
    total, num_clipped = 0.0, 0
    for b, t in mask.nonzero().tolist():
        ratio, advantage = math.exp(logprobs[b, t] - old[b, t]), advantages[b, t].item()
        objective = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
        if dual_clip is not None and advantage < 0:
            objective = max(objective, dual_clip * advantage)
        total -= objective
        num_clipped += abs(objective - ratio * advantage) > 1e-6
    assert loss.item() == pytest.approx(total / 22, rel=1e-5)
    assert metrics["clip_frac"].item() == num_clipped > 0


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely():
    logprobs = row(-1.0, -1.0).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    # Ratio e^3 = 20: without the dual clip the first token would cost 20.
    loss, metrics = symmetric_policy_loss(logprobs, row(-4, -4), row(-1, 1), mask, dual_clip=3.0, denominator=1.0)
    assert loss.item() == pytest.approx(3.0 - 1.2, abs=1e-6)
    assert gradient(loss, logprobs).tolist() == [[0.0, 0.0]]
    assert metrics["clip_frac"].item() == 2


def test_first_minibatch_has_ratio_one_nothing_clipped_and_no_kl():
    _, old, advantages, mask = random_batch()
    _, metrics = symmetric_policy_loss(old, old, advantages, mask, denominator=22.0)
    assert {key: value.item() for key, value in metrics.items()} == {
        "clip_frac": 0.0,
        "approx_kl": 0.0,
        "ratio_sum": 22.0,
        "ratio_max": 1.0,
    }


def test_ratio_of_a_collapsed_token_stays_finite():
    loss, metrics = symmetric_policy_loss(row(0.0), row(-500.0), row(-1.0), row(1).bool(), denominator=1.0)
    assert loss.isfinite() and metrics["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-6)


# Worked by an independent numpy program: two responses, of 2 and 4 tokens.
REDUCTIONS = {"token_mean": 0.308648, "seq_mean": 0.025846, "seq_sum_constant": 0.115743}


@pytest.mark.parametrize("mode", REDUCTIONS)
def test_aggregations_on_worked_numbers(mode):
    logprobs = torch.tensor([[0.1, -0.05, NAN, NAN], [0.3, 0.0, -0.4, 0.2]])
    mask = lengths_to_mask(torch.tensor([2, 4]), 4)
    advantages = torch.tensor([[0.8], [-0.8]]).expand(2, 4)
    loss, _ = symmetric_policy_loss(
        logprobs,
        torch.zeros(2, 4),
        advantages,
        mask,
        denominator=aggregation_count(mask, mode=mode),
        token_weights=aggregation_weights(mask, mode=mode, max_response_length=8),
    )
    assert loss.item() == pytest.approx(REDUCTIONS[mode], abs=1e-6)


@pytest.mark.parametrize("mode", REDUCTIONS)
def test_policy_loss_and_gradient_do_not_depend_on_micro_batches_or_padding(mode):
    logprobs, old, advantages, mask = random_batch()

    def run(pieces, num_pad):
        leaf = logprobs.clone().requires_grad_()
        padded = [torch.nn.functional.pad(t, (0, num_pad), value=NAN) for t in (leaf, old, advantages)]
        padded_mask = torch.nn.functional.pad(mask, (0, num_pad))
        counts = [aggregation_count(padded_mask[piece], mode=mode) for piece in pieces]
        losses = [
            symmetric_policy_loss(
                padded[0][piece],
                padded[1][piece],
                padded[2][piece],
                padded_mask[piece],
                denominator=torch.stack(counts).sum(),
                token_weights=aggregation_weights(padded_mask[piece], mode=mode, max_response_length=16),
            )[0]
            for piece in pieces
        ]
        total = torch.stack(losses).sum()
        return total.detach(), gradient(total, leaf)

    whole = run([slice(0, 6)], 0)
    assert whole[0].isfinite() and whole[1].isfinite().all()
    torch.testing.assert_close(run([slice(0, 1), slice(1, 4), slice(4, 6)], 0), whole)
    torch.testing.assert_close(run([slice(0, 3), slice(3, 6)], 5), whole)


def test_nan_outside_the_mask_reaches_neither_policy_loss_nor_its_gradient():
    logprobs = row(-1.0, NAN).requires_grad_()
    mask = torch.tensor([[True, False]])
    loss, metrics = symmetric_policy_loss(
        logprobs,
        row(-1.1, NAN),
        row(1.0, NAN),
        mask,
        denominator=1.0,
        dual_clip=3.0,
        importance_weights=row(0.5, NAN),
        token_weights=row(2.0, NAN),
    )
    torch.testing.assert_close(gradient(loss, logprobs), row(-math.exp(0.1), 0.0))
    assert all(value.isfinite() for value in (loss, *metrics.values()))


def test_batch_of_empty_responses_costs_nothing():
    logprobs = torch.full((2, 3), NAN, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss, metrics = symmetric_policy_loss(logprobs, logprobs.detach(), logprobs.detach(), mask, denominator=5.0)
    assert loss.item() == 0 and (gradient(loss, logprobs) == 0).all()
    assert all(value.item() == 0 for value in metrics.values())


def test_aggregation_ignores_rows_without_response_tokens():
    mask = lengths_to_mask(torch.tensor([2, 0, 4]), 4)
    assert aggregation_count(mask, mode="token_mean") == 6
    assert aggregation_count(mask, mode="seq_mean") == aggregation_count(mask, mode="seq_sum_constant") == 2
    weights = aggregation_weights(mask, mode="seq_mean", max_response_length=4)
    assert weights.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0, 0], [0.25] * 4]


def test_value_loss_on_worked_numbers():
    # Worked by an independent numpy program: old values, returns and new values of the same response as above.
    old_values, returns = row(0.2, 0.3, 0.1, 0.4), row(1.318814, 1.382962, 1.45575, 1.485)
    loss, _ = value_loss(row(0.9, 0.35, 0.5, 1.2), old_values, returns, FULL, value_clip_eps=0.2, denominator=4.0)
    assert loss.item() == pytest.approx(0.503777, abs=1e-6)


@pytest.mark.parametrize("value_clip_eps", [None, 0.2])
def test_value_loss_equals_a_plain_loop(value_clip_eps):
    values, old_values, returns, mask = random_batch(seed=3)
    leaf = values.clone().requires_grad_()
    loss, metrics = value_loss(leaf, old_values, returns, mask, value_clip_eps=value_clip_eps, denominator=22.0)
    value_gradient = gradient(loss, leaf)
    total, num_clipped = 0.0, 0
    for b, t in mask.nonzero().tolist():
        v, old, target = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
        error = clipped_error = (v - target) ** 2
        if value_clip_eps is not None:
            clipped_error = (min(max(v, old - value_clip_eps), old + value_clip_eps) - target) ** 2
        total += 0.5 * max(error, clipped_error)
        num_clipped += clipped_error > error + 1e-9
        expected = 0.0 if clipped_error > error + 1e-9 else (v - target) / 22
        assert value_gradient[b, t].item() == pytest.approx(expected, abs=1e-6)
    assert loss.item() == pytest.approx(total / 22, rel=1e-5)
    assert metrics["clip_frac"].item() == num_clipped
    assert (value_gradient[~mask] == 0).all()


def test_value_within_the_clip_range_does_not_count_as_clipped():
    # In fp32 0.1 + (v - 0.1) differs from v for many of these values, although none of them is clipped.
    values = torch.linspace(0.0, 0.2, 1000)[None]
    full, zeros = torch.ones_like(values, dtype=torch.bool), torch.zeros_like(values)
    _, metrics = value_loss(values, zeros + 0.1, zeros, full, value_clip_eps=0.2, denominator=1000.0)
    assert metrics["clip_frac"].item() == 0


def test_importance_weights_are_truncated_at_the_cap_and_zero_outside_the_mask():
    old, rollout = row(-1.0, -1.0, -1.0, NAN), row(-1.0, -3.0, -0.5, NAN)
    mask = torch.tensor([[True, True, True, False]])
    weights, metrics = truncated_importance_weights(old, rollout, mask, cap=2.0)
    torch.testing.assert_close(weights, row(1.0, 2.0, math.exp(-0.5), 0.0))
    assert metrics["tis_cap_frac"].item() == 1


def test_importance_weights_scale_the_loss_of_their_token_and_carry_no_gradient():
    old = OLD_LOGPROBS.clone().requires_grad_()
    weights, _ = truncated_importance_weights(old, row(-1.5, -0.5, -2.2, -3.0), FULL, cap=2.0)
    assert not weights.requires_grad
    loss, _ = symmetric_policy_loss(
        LOGPROBS, OLD_LOGPROBS, ADVANTAGES, FULL, denominator=4.0, importance_weights=weights
    )
    per_token = [-1.342577, -1.030146, -1.6269, -0.888323]  # worked by an independent numpy program
    expected = sum(w * p for w, p in zip([math.exp(0.5), 1.0, math.exp(0.2), 2.0], per_token, strict=True)) / 4
    assert loss.item() == pytest.approx(expected, abs=1e-5)

"""Gradients by finite differences, and finite values and gradients at inputs that no one wants."""

from functools import partial

import pytest
import torch

from raylhf.algos.preference import (
    Pairs,
    Responses,
    aux_dpo_loss,
    aux_dpo_penalty,
    cdpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    modpo_loss,
    orpo_loss,
    plackett_luce_dpo_loss,
    robust_dpo_loss,
    sft_loss,
    simpo_loss,
    tdpo1_loss,
    tdpo2_loss,
    tgdpo_loss,
    treg_loss,
)
from raylhf.algos.preference_robust import alpha_dpo_loss, wdpo_penalty

NUM_PAIRS = 4
IS_DESIRABLE = torch.arange(2 * NUM_PAIRS) % 3 == 0
RANKS = torch.tensor([[1.0, 2, 3, 4], [2, 1, 1, torch.nan], [1, torch.nan, torch.nan, torch.nan], [1, 1, 1, 1]])

kto = partial(
    kto_loss,
    is_desirable=IS_DESIRABLE[:NUM_PAIRS],
    beta=0.3,
    reference_point=0.4,
    desirable_weight=1.0,
    undesirable_weight=1.3,
)


def listwise(log_ratios):
    return plackett_luce_dpo_loss(log_ratios.expand(4, -1) * torch.arange(1, 5), RANKS, beta=0.3)


# Functions of one number per pair, which are not held constant anywhere.
OF_PAIRS = {
    "dpo": (partial(dpo_loss, beta=0.3), 1),
    "cdpo": (partial(cdpo_loss, beta=0.3, label_smoothing=0.1), 1),
    "robust_dpo": (partial(robust_dpo_loss, beta=0.3, label_noise=0.1), 1),
    "ipo": (partial(ipo_loss, beta=0.3), 1),
    "simpo": (partial(simpo_loss, beta=2.0, gamma=1.0), 1),
    "kto": (kto, 1),
    "listwise": (listwise, 1),
    "modpo": (partial(modpo_loss, beta=0.3, weight=0.6), 2),
    "orpo": (lambda chosen, rejected: orpo_loss(-chosen.abs(), -rejected.abs()), 2),
    "aux_dpo": (partial(aux_dpo_loss, beta=0.3), 3),
    "tdpo1": (partial(tdpo1_loss, beta=0.3), 3),
    "wdpo_paper": (lambda norms: wdpo_penalty(norms.square(), rho=0.1, form="paper"), 1),
    "wdpo_squared": (lambda norms: wdpo_penalty(norms.square(), rho=0.1, form="squared"), 1),
    "aux_penalty": (lambda offsets: aux_dpo_penalty(offsets.sum() ** 2, offsets, null_coef=0.2, amplitude_coef=1.0), 1),
}
EXTREMES = [[0.0] * NUM_PAIRS, [1e4] * NUM_PAIRS, [-1e4] * NUM_PAIRS, [1e4, -1e4, 0.0, 1e-30], [-1e-9, 1e-9, 50, -50]]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_finite_with_gradients(losses, *leaves):
    assert losses.isfinite().all()
    gradients = torch.autograd.grad(losses.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    return gradients


@pytest.mark.parametrize("name", OF_PAIRS)
def test_gradients_are_those_of_finite_differences(name):
    losses, num_inputs = OF_PAIRS[name]
    inputs = [normal(NUM_PAIRS, seed=seed).requires_grad_() for seed in range(num_inputs)]
    assert torch.autograd.gradcheck(losses, inputs)


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("values", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_give_finite_losses_and_gradients(name, values, dtype):
    losses, num_inputs = OF_PAIRS[name]
    inputs = [torch.tensor(values[i:] + values[:i], dtype=dtype, requires_grad=True) for i in range(num_inputs)]
    assert_finite_with_gradients(losses(*inputs), *inputs)


def test_gradients_of_half_held_losses_are_those_of_finite_differences_with_that_half_fixed():
    gap, chosen, rejected = (normal(NUM_PAIRS, seed=seed).requires_grad_() for seed in range(3))
    second = partial(tdpo2_loss, kl_chosen=chosen.detach(), beta=0.3, alpha=0.5)
    assert torch.autograd.gradcheck(lambda gap, kl: second(gap, kl_rejected=kl), [gap, rejected])
    adaptive = partial(alpha_dpo_loss, beta=2.5, gamma_ratio=0.15, alpha=0.05, center=0.1, spread=0.2)
    (actual,) = torch.autograd.grad(adaptive(gap, rejected).sum(), gap)
    margin = 0.15 + 0.05 * (gap - rejected - 0.1).detach() / 0.2
    fixed = gap.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(dpo_loss(fixed - margin, beta=2.5).sum(), fixed)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(lambda x: dpo_loss(x - margin, beta=2.5), [fixed])


def draw_responses(logprobs, mask, seed=1):
    others = [-normal(*mask.shape, seed=seed + i).abs() for i in range(4)]
    return Responses(logprobs, mask, *(other.masked_fill(~mask, torch.nan) for other in others))


MASK = torch.arange(5) < torch.tensor([5, 3, 0, 1, 4, 2, 5, 0])[:, None]
# A response takes part in more than one comparison, and in both places.
PAIRS = Pairs(torch.tensor([0, 1, 2, 3, 0, 4]), torch.tensor([4, 5, 6, 7, 1, 0]))


def orpo_of(responses):
    means = responses.means()
    return orpo_loss(means[PAIRS.chosen], means[PAIRS.rejected])


OF_RESPONSES = {
    "sft": sft_loss,
    "dpo": lambda responses: dpo_loss(PAIRS.gap(responses.log_ratios()), beta=0.3),
    "ipo": lambda responses: ipo_loss(PAIRS.gap(responses.mean_log_ratios()), beta=0.3),
    "simpo": lambda responses: simpo_loss(PAIRS.gap(responses.means()), beta=2.0, gamma=1.0),
    "orpo": orpo_of,
    "tgdpo": lambda responses: tgdpo_loss(responses, PAIRS, beta=0.3, alpha=0.5),
    "treg": lambda responses: treg_loss(responses, PAIRS, beta=0.3, alpha=0.25),
}


@pytest.mark.parametrize("name", sorted(OF_RESPONSES.keys() - {"treg"}))
def test_gradients_in_token_logprobs_are_those_of_finite_differences(name):
    logprobs = (-normal(*MASK.shape).abs() - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OF_RESPONSES[name](draw_responses(x, MASK)), [logprobs])


def test_gradient_of_token_regularization_is_that_of_finite_differences_with_its_weight_fixed():
    logprobs = (-normal(*MASK.shape).abs() - 0.1).requires_grad_()
    responses = draw_responses(logprobs, MASK)
    weights = (-0.3 * PAIRS.gap(responses.log_ratios())).sigmoid().detach()

    def with_fixed_weight(logprobs):
        moved = draw_responses(logprobs, MASK)
        assert moved.better_logprobs is not None and moved.worse_logprobs is not None
        token_rewards = ((moved.better_logprobs - moved.worse_logprobs).sigmoid() - 0.5).nan_to_num()
        terms = torch.where(MASK, -0.3 * token_rewards * logprobs, 0.0).sum(dim=1)
        dpo = dpo_loss(PAIRS.gap(moved.log_ratios()), beta=0.3)
        return dpo + 0.25 * weights * (terms[PAIRS.chosen] + terms[PAIRS.rejected])

    assert torch.autograd.gradcheck(with_fixed_weight, [logprobs])
    (expected,) = torch.autograd.grad(with_fixed_weight(logprobs).sum(), logprobs)
    (actual,) = torch.autograd.grad(treg_loss(responses, PAIRS, beta=0.3, alpha=0.25).sum(), logprobs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", OF_RESPONSES)
@pytest.mark.parametrize("logprob", [0.0, -1e4, -1e-30])
def test_extreme_token_logprobs_and_empty_responses_give_finite_losses_and_gradients(name, logprob):
    logprobs = torch.full(MASK.shape, logprob).masked_fill(~MASK, torch.nan).requires_grad_()
    losses = OF_RESPONSES[name](draw_responses(logprobs, MASK))
    (gradient,) = assert_finite_with_gradients(losses, logprobs)
    assert not gradient[~MASK].any()


@pytest.mark.parametrize("name", OF_RESPONSES)
def test_identical_responses_give_finite_losses_and_gradients(name):
    mask = MASK[:1].expand(8, -1)
    logprobs = torch.full((8, 5), -0.5, dtype=torch.float64, requires_grad=True)
    assert_finite_with_gradients(OF_RESPONSES[name](draw_responses(logprobs, mask)), logprobs)


def test_no_pairs_give_no_losses_and_a_gradient_of_zero():
    logprobs = normal(*MASK.shape).requires_grad_()
    none = torch.zeros(0, dtype=torch.long)
    responses = draw_responses(logprobs, MASK)
    for loss in (tgdpo_loss, treg_loss):
        losses = loss(responses, Pairs(none, none), beta=0.3, alpha=0.5)
        assert losses.shape == (0,)
        assert not torch.autograd.grad(losses.sum(), logprobs)[0].any()


def test_rankings_without_a_choice_have_no_loss_and_no_gradient():
    log_ratios = torch.tensor([[1e4, torch.nan], [torch.nan, torch.nan]], requires_grad=True)
    ranks = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    losses = plackett_luce_dpo_loss(log_ratios, ranks, beta=0.1)
    assert losses.tolist() == [0, 0]
    assert not torch.autograd.grad(losses.sum(), log_ratios)[0].any()
    alone = plackett_luce_dpo_loss(torch.ones(2, 1), torch.ones(2, 1), beta=0.1)
    assert alone.tolist() == [0, 0]

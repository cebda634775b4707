"""How the methods reduce to each other: every line of the lattice of degenerate cases, to rounding."""

import math
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylhf.algos.masking import lengths_to_mask
from raylhf.algos.preference import (
    Pairs,
    Responses,
    aux_dpo_loss,
    aux_dpo_penalty,
    cdpo_loss,
    dpo_loss,
    ipo_loss,
    modpo_loss,
    plackett_luce_dpo_loss,
    robust_dpo_loss,
    simpo_loss,
    tdpo1_loss,
    tdpo2_loss,
    tgdpo_loss,
    treg_loss,
)
from raylhf.algos.preference_robust import (
    alpha_dpo_loss,
    beta_dpo_beta,
    beta_dpo_keep,
    dr_dpo_weights,
    kldpo_weights,
    ns_dpo_weights,
    wdpo_penalty,
)

close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)
lattice = settings(max_examples=60, deadline=None)

seeds = st.integers(0, 2**31)
gaps = st.lists(st.floats(-200, 200), min_size=1, max_size=8).map(partial(torch.tensor, dtype=torch.float64))
betas = st.floats(0.01, 5)


def log_two(like):
    return torch.full_like(like, math.log(2))


def draw_pairs(seed, num_pairs=4, length=6):
    """Pairs of responses of random lengths, 0 included, with every kind of log-probabilities; NaN in the padding."""
    random = torch.Generator().manual_seed(seed)
    mask = lengths_to_mask(torch.randint(length + 1, (2 * num_pairs,), generator=random), length)

    def logprobs():
        values = -3 * torch.rand(mask.shape, generator=random, dtype=torch.float64)
        return torch.where(mask, values, torch.nan)

    divergences = torch.rand(2 * num_pairs, generator=random, dtype=torch.float64)
    responses = Responses(logprobs(), mask, logprobs(), logprobs(), logprobs(), logprobs(), divergences)
    rows = torch.randperm(2 * num_pairs, generator=random)
    return responses, Pairs(rows[:num_pairs], rows[num_pairs:])


def unmoved(responses):
    """The same responses with the policy equal to the reference."""
    assert responses.ref_logprobs is not None
    return Responses(
        responses.ref_logprobs, responses.mask, responses.ref_logprobs, seq_kl=torch.zeros(len(responses.mask))
    )


def dpo_of(responses, pairs, beta):
    return dpo_loss(pairs.gap(responses.log_ratios()), beta=beta)


@lattice
@given(seeds, betas)
def test_every_loss_starts_at_log_two(seed, beta):
    responses, pairs = draw_pairs(seed)
    start = unmoved(responses)
    gap, kl = pairs.gap(start.log_ratios()), start.seq_kl
    assert kl is not None and not gap.any()
    losses = dpo_loss(gap, beta=beta)
    close(losses, log_two(gap))
    close(tdpo1_loss(gap, kl[pairs.chosen], kl[pairs.rejected], beta=beta), log_two(gap))
    close(tdpo2_loss(gap, kl[pairs.chosen], kl[pairs.rejected], beta=beta, alpha=0.5), log_two(gap))
    adapted = beta_dpo_beta(gap.mean(), beta=beta, sensitivity=0.6, center=0.0)
    close(adapted.item(), beta)
    close(dpo_loss(gap, beta=adapted), log_two(gap))
    close(kldpo_weights(losses, temperature=0.05) * losses, log_two(gap))
    close(dr_dpo_weights(losses, temperature=0.05) * losses, log_two(gap))
    close(ns_dpo_weights(torch.zeros_like(gap), gamma=0.9) * losses, log_two(gap))


@lattice
@given(gaps, betas)
def test_smoothing_and_noise_of_zero_are_dpo(gap, beta):
    assert torch.equal(cdpo_loss(gap, beta=beta, label_smoothing=0.0), dpo_loss(gap, beta=beta))
    assert torch.equal(robust_dpo_loss(gap, beta=beta, label_noise=0.0), dpo_loss(gap, beta=beta))


@lattice
@given(gaps, betas, st.floats(0, 0.49))
def test_smoothed_and_debiased_losses_are_the_mixtures_of_their_papers(gap, beta, eps):
    right, wrong = dpo_loss(gap, beta=beta), dpo_loss(-gap, beta=beta)
    close(cdpo_loss(gap, beta=beta, label_smoothing=eps), (1 - eps) * right + eps * wrong)
    debiased = robust_dpo_loss(gap, beta=beta, label_noise=eps)
    close((1 - 2 * eps) * debiased, (1 - eps) * right - eps * wrong)


@lattice
@given(gaps, betas)
def test_a_ranking_of_two_is_dpo(gap, beta):
    log_ratios = torch.stack([gap + 3, torch.full_like(gap, 3.0)], dim=1)
    ranks = torch.tensor([1.0, 2.0]).expand(len(gap), 2)
    close(plackett_luce_dpo_loss(log_ratios, ranks, beta=beta), dpo_loss(gap, beta=beta), atol=1e-11)
    close(plackett_luce_dpo_loss(log_ratios, ranks.flip(1), beta=beta), dpo_loss(-gap, beta=beta), atol=1e-11)


@lattice
@given(gaps, betas, st.floats(0, 1))
def test_alpha_dpo_without_adaptation_is_simpo(gap, beta, ratio):
    options = {"center": 0.3, "spread": 0.7}
    adapted = alpha_dpo_loss(gap, gap.flip(0), beta=beta, gamma_ratio=ratio, alpha=0.0, **options)
    close(adapted, simpo_loss(gap, beta=beta, gamma=ratio * beta))
    if ratio == 0:
        close(adapted, dpo_loss(gap, beta=beta))


@lattice
@given(gaps, betas, seeds)
def test_beta_dpo_that_neither_adapts_nor_drops_is_dpo(gap, beta, seed):
    keep = beta_dpo_keep(gap, center=0.3, spread=0.7, keep_share=1.0, seed=seed)
    assert keep.all()
    adapted = beta_dpo_beta(gap[keep].mean(), beta=beta, sensitivity=0.0, center=0.3)
    assert torch.equal(dpo_loss(gap[keep], beta=adapted), dpo_loss(gap, beta=beta))


@lattice
@given(seeds, betas)
def test_token_level_methods_without_their_extra_are_dpo(seed, beta):
    responses, pairs = draw_pairs(seed)
    expected = dpo_of(responses, pairs, beta)
    assert torch.equal(tgdpo_loss(responses, pairs, beta=beta, alpha=0.0), expected)
    assert torch.equal(treg_loss(responses, pairs, beta=beta, alpha=0.0), expected)
    kl = responses.seq_kl
    assert kl is not None
    gap, kl_chosen, kl_rejected = pairs.gap(responses.log_ratios()), kl[pairs.chosen], kl[pairs.rejected]
    assert torch.equal(tdpo2_loss(gap, kl_chosen, kl_rejected, beta=beta, alpha=0.0), expected)
    close(
        tdpo2_loss(gap, kl_chosen, kl_rejected, beta=beta, alpha=1.0),
        tdpo1_loss(gap, kl_chosen, kl_rejected, beta=beta),
    )


@lattice
@given(seeds, betas, st.floats(0, 2))
def test_guides_that_say_nothing_are_dpo(seed, beta, alpha):
    plain, pairs = draw_pairs(seed)
    reference, better = plain.ref_logprobs, plain.better_logprobs
    blank = Responses(plain.logprobs, plain.mask, reference, reference, better, better)
    assert torch.equal(tgdpo_loss(blank, pairs, beta=beta, alpha=alpha), dpo_of(plain, pairs, beta))
    assert torch.equal(treg_loss(blank, pairs, beta=beta, alpha=alpha), dpo_of(plain, pairs, beta))


@lattice
@given(seeds, betas, st.integers(0, 4))
def test_step_dpo_is_dpo_of_the_last_step_and_its_prefix_cancels(seed, beta, prefix_length):
    responses, pairs = draw_pairs(seed)
    reference = responses.ref_logprobs
    assert reference is not None
    prefix = torch.rand(2, 1, prefix_length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def joined(mask_of_prefix):
        mask = torch.full((len(responses.mask), prefix_length), mask_of_prefix)
        policy, ref = (
            torch.cat([start.expand(len(mask), -1), values], dim=1)
            for start, values in zip(prefix, (responses.logprobs, reference), strict=True)
        )
        return Responses(policy, torch.cat([mask, responses.mask], dim=1), ref)

    close(dpo_of(joined(False), pairs, beta), dpo_of(responses, pairs, beta))
    close(dpo_of(joined(True), pairs, beta), dpo_of(responses, pairs, beta), atol=1e-11)


@lattice
@given(gaps, betas)
def test_robust_methods_without_an_adversary_are_dpo(gap, beta):
    losses = dpo_loss(gap, beta=beta)
    assert torch.equal(losses + wdpo_penalty(gap.square(), rho=0.0, form="paper"), losses)
    assert torch.equal(losses + wdpo_penalty(gap.square(), rho=0.0, form="squared"), losses)
    for weights in (kldpo_weights, dr_dpo_weights):
        close(weights(losses, temperature=math.inf) * losses, losses)
        close(weights(losses, temperature=1e12), torch.ones_like(losses), atol=1e-8)
    assert torch.equal(ns_dpo_weights(gap.abs(), gamma=1.0) * losses, losses)


@lattice
@given(gaps, betas)
def test_offsets_and_other_objectives_of_nothing_are_dpo(gap, beta):
    zero = torch.zeros_like(gap)
    penalty = aux_dpo_penalty(gap.square().sum(), zero, null_coef=0.0, amplitude_coef=0.0)
    assert torch.equal(aux_dpo_loss(gap, zero, zero, beta=beta) + penalty, dpo_loss(gap, beta=beta))
    assert torch.equal(modpo_loss(gap, zero, beta=beta, weight=1.0), dpo_loss(gap, beta=beta))


@lattice
@given(gaps, betas)
def test_ipo_is_zero_at_its_target_and_symmetric_around_it(gap, beta):
    target = 1 / (2 * beta)
    close(ipo_loss(target + gap, beta=beta), gap.square(), atol=1e-10)
    close(ipo_loss(target - gap, beta=beta), ipo_loss(target + gap, beta=beta), atol=1e-10)


@lattice
@given(seeds, betas)
def test_losses_do_not_depend_on_padding_or_on_the_order_of_responses(seed, beta):
    responses, pairs = draw_pairs(seed)
    order = torch.randperm(len(responses.mask), generator=torch.Generator().manual_seed(seed))
    place = order.argsort()

    def wider(values, fill=math.nan):
        return torch.cat([values, torch.full((len(values), 3), fill)], dim=1)[order]

    columns = (responses.ref_logprobs, responses.guide_logprobs, responses.better_logprobs, responses.worse_logprobs)
    moved = Responses(
        wider(responses.logprobs),
        torch.cat([responses.mask, torch.zeros(len(responses.mask), 3, dtype=torch.bool)], dim=1)[order],
        *(wider(column) for column in columns),
    )
    moved_pairs = Pairs(place[pairs.chosen], place[pairs.rejected])
    for loss in (tgdpo_loss, treg_loss):
        close(loss(moved, moved_pairs, beta=beta, alpha=0.5), loss(responses, pairs, beta=beta, alpha=0.5), atol=1e-11)
    close(dpo_of(moved, moved_pairs, beta), dpo_of(responses, pairs, beta), atol=1e-11)

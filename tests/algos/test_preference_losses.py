import math
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
    kto_reference_point,
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
from raylhf.algos.preference_robust import alpha_dpo_loss, beta_dpo_beta, ns_dpo_weights

NAN = math.nan
close = partial(torch.testing.assert_close, atol=2e-6, rtol=0)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def rows(*values):
    """[R, T] and its mask, of rows of unequal length; padding is NaN."""
    length = max(len(row) for row in values)
    table = torch.tensor([[*row, *[NAN] * (length - len(row))] for row in values], dtype=torch.float64)
    return table, ~table.isnan()


def evenly(sums, lengths):
    """Token log-probabilities that add to `sums`."""
    return rows(*[[total / length] * length for total, length in zip(sums, lengths, strict=True)])


# Three pairs, rows 0 to 2 against rows 3 to 5. Like every number of this file that is not a round one, what follows
# from them was worked by an independent numpy program.
SUMS = [-12, -20.5, -8, -14, -19, -9.5]
REF_SUMS = [-13, -20, -8.2, -13.5, -19.8, -9]
LENGTHS = [6, 10, 4, 7, 9, 5]
PAIRS = Pairs(chosen=torch.arange(3), rejected=torch.arange(3, 6))
GAP = vector(1.5, -1.3, 0.7)

# One pair of four and three tokens.
TOKENS = [[-0.5, -1.2, -0.3, -2.0], [-0.6, -2.2, -1.0]]
REF_TOKENS = [[-0.7, -1.0, -0.9, -1.8], [-0.5, -1.9, -1.4]]
GUIDE_TOKENS = [[-0.4, -1.1, -0.2, -1.5], [-0.9, -2.5, -1.6]]
BETTER_TOKENS = [[-0.4, -1.0, -0.5, -1.6], [-0.9, -2.4, -1.5]]
WORSE_TOKENS = [[-0.6, -1.1, -0.4, -2.4], [-0.6, -2.0, -0.8]]
PAIR = Pairs(chosen=torch.tensor([0]), rejected=torch.tensor([1]))


def three_pairs(sums=SUMS):
    logprobs, mask = evenly(sums, LENGTHS)
    return Responses(logprobs.requires_grad_(), mask, ref_logprobs=evenly(REF_SUMS, LENGTHS)[0])


def one_pair(**columns):
    logprobs, mask = rows(*TOKENS)
    return Responses(logprobs.requires_grad_(), mask, ref_logprobs=rows(*REF_TOKENS)[0], **columns)


def gap_of(loss, **options):
    return lambda responses: loss(PAIRS.gap(responses.log_ratios()), **options)


def ipo_mean(responses):
    return ipo_loss(PAIRS.gap(responses.mean_log_ratios()), beta=0.1)


def simpo(responses):
    return simpo_loss(PAIRS.gap(responses.means()), beta=2.0, gamma=1.0)


def orpo(responses):
    means = responses.means()
    return orpo_loss(means[PAIRS.chosen], means[PAIRS.rejected])


def kto(responses):
    return kto_loss(
        responses.log_ratios(),
        torch.arange(6) < 3,
        beta=0.1,
        reference_point=0.4,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )


def alpha_dpo(responses):
    reference = Responses(evenly(REF_SUMS, LENGTHS)[0], responses.mask)
    gap, ref_gap = PAIRS.gap(responses.means()), PAIRS.gap(reference.means())
    return alpha_dpo_loss(gap, ref_gap, beta=2.5, gamma_ratio=0.15, alpha=0.05, center=0.0, spread=0.2)


def beta_dpo_of_all(responses):
    gap = PAIRS.gap(responses.log_ratios())
    return dpo_loss(gap, beta=beta_dpo_beta(gap.mean(), beta=0.1, sensitivity=0.6, center=0.5))


DPO_GRADIENT = [0.015419, 0.017748, 0.016084]


@pytest.mark.parametrize(
    ("losses", "mean", "chosen_gradient", "rejected_gradient"),
    [
        (gap_of(dpo_loss, beta=0.1), 0.679992, [-x for x in DPO_GRADIENT], DPO_GRADIENT),
        (gap_of(cdpo_loss, beta=0.1, label_smoothing=0.1), 0.682992, [-0.012086, -0.014415, -0.01275], None),
        (gap_of(robust_dpo_loss, beta=0.1, label_noise=0.1), 0.676242, [-0.019586, -0.021915, -0.02025], None),
        (gap_of(ipo_loss, beta=0.1), 23.476667, [-2.333333, -4.2, -2.866667], None),
        (ipo_mean, 24.202139, [-0.529101, -0.342593, -0.808333], [0.453515, 0.380658, 0.646667]),
        (simpo, 1.333983, [-0.081229, -0.047091, -0.128087], [0.069625, 0.052323, 0.10247]),
        (orpo, 0.701711, [-0.032125, -0.018462, -0.050994], [0.027536, 0.020335, 0.041478]),
        (kto, 0.496253, [-0.004163, -0.004158, -0.004166], [0.004158, 0.004165, 0.004158]),
        (alpha_dpo, 0.955954, [-0.087228, -0.044484, -0.140069], [0.074766, 0.049426, 0.112055]),
        (beta_dpo_of_all, 0.681376, [-0.0137, -0.015505, -0.014215], None),
    ],
)
def test_losses_and_gradients_of_three_pairs_on_worked_numbers(losses, mean, chosen_gradient, rejected_gradient):
    responses = three_pairs()
    value = losses(responses).mean()
    close(value, torch.tensor(mean, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value, responses.logprobs)
    # Every token of a response has the gradient of the response's sum, and padding has none.
    assert torch.equal(gradient != 0, responses.mask)
    close(gradient[:3, 0], vector(*chosen_gradient))
    close(gradient[3:, 0], vector(*(rejected_gradient or [-x for x in chosen_gradient])))


def test_dpo_of_each_pair_on_worked_numbers():
    close(dpo_loss(GAP, beta=0.1), vector(0.620957, 0.760258, 0.65876))


def test_dpo_starts_at_log_two_and_does_not_stand_still():
    responses = three_pairs(REF_SUMS)
    losses = dpo_loss(PAIRS.gap(responses.log_ratios()), beta=0.1)
    close(losses, vector(0.693147, 0.693147, 0.693147))
    (gradient,) = torch.autograd.grad(losses.sum(), responses.logprobs)
    close(gradient[:, 0], vector(-0.05, -0.05, -0.05, 0.05, 0.05, 0.05))


def test_responses_give_sums_means_and_log_ratios_under_the_mask():
    responses = three_pairs()
    assert responses.lengths().tolist() == LENGTHS
    close(responses.sums(), vector(*SUMS))
    close(responses.means(), vector(-2, -2.05, -2, -2, -19 / 9, -1.9))
    close(responses.log_ratios(), vector(1, -0.5, 0.2, -0.5, 0.8, -0.5))
    close(responses.mean_log_ratios(), vector(1 / 6, -0.05, 0.05, -1 / 14, 0.8 / 9, -0.1))
    close(PAIRS.gap(responses.log_ratios()), GAP)


def test_results_are_fp32_at_least():
    half = Responses(torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bool))
    assert half.sums().dtype == half.means().dtype == torch.float32
    assert dpo_loss(torch.zeros(2, dtype=torch.bfloat16), beta=0.1).dtype == torch.float32


def test_a_response_without_tokens_has_sums_and_means_of_zero():
    logprobs = torch.full((1, 2), NAN).requires_grad_()
    empty = Responses(logprobs, torch.zeros(1, 2, dtype=torch.bool), ref_logprobs=torch.full((1, 2), NAN))
    for values in (empty.sums(), empty.means(), empty.log_ratios(), empty.mean_log_ratios()):
        assert values.tolist() == [0.0]
        assert not torch.autograd.grad(values.sum(), logprobs)[0].any()


def test_a_loss_without_what_it_needs_says_so():
    with pytest.raises(AssertionError, match="ref_logprobs"):
        Responses(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)).log_ratios()


def test_robust_dpo_is_not_bounded_below():
    scaled_margins = vector(0, 5, 50)
    close(robust_dpo_loss(scaled_margins, beta=1.0, label_noise=0.1), vector(0.693147, -0.618285, -6.25))


def test_robust_dpo_is_unbiased_over_flipped_labels():
    right, wrong = robust_dpo_loss(vector(0.7, -0.7), beta=1.0, label_noise=0.1)
    close(0.9 * right + 0.1 * wrong, torch.tensor(0.403186, dtype=torch.float64))
    close(dpo_loss(vector(0.7), beta=1.0), vector(0.403186))


@pytest.mark.parametrize("noise", [0.5, 0.7, -0.1])
def test_labels_that_are_mostly_wrong_are_refused(noise):
    with pytest.raises(ValueError, match="label_noise"):
        robust_dpo_loss(GAP, beta=0.1, label_noise=noise)


def test_conservative_dpo_is_lowest_where_sigmoid_is_the_share_of_right_labels():
    best = math.log(0.9 / 0.1) / 0.1
    losses = cdpo_loss(vector(best - 0.1, best, best + 0.1), beta=0.1, label_smoothing=0.1)
    assert losses.argmin() == 1


def test_orpo_with_its_likelihood_term_on_worked_numbers():
    responses = three_pairs()
    nll = (sft_loss(responses) / responses.lengths())[PAIRS.chosen].mean()
    close(nll, torch.tensor(2.016667, dtype=torch.float64))
    close(nll + 0.1 * orpo(responses).mean(), torch.tensor(2.086838, dtype=torch.float64))


def test_kto_weighs_the_two_classes_apart():
    options = {"beta": 0.1, "reference_point": 0.4, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    close(kto_loss(vector(0.4, 0.4), torch.tensor([True, False]), **options), vector(1.0, 1.5))


@pytest.mark.parametrize(("total", "count", "expected"), [(3.0, 4, 0.75), (-3.0, 4, 0.0), (0.0, 0, 0.0)])
def test_kto_reference_point_is_a_mean_that_is_never_negative(total, count, expected):
    point = kto_reference_point(torch.tensor(total, requires_grad=True), torch.tensor(count))
    assert point.item() == expected and not point.requires_grad
    assert kto_reference_point(torch.tensor(total), count).item() == expected


def test_token_level_dpo_on_worked_numbers():
    # Four words, three and two positions; logits of the policy are sin(shift + 1.3 t + 2.1 v), token t is t.
    positions, words = torch.arange(3, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)
    policy = [torch.sin(s + 1.3 * positions[:n] + 2.1 * words).log_softmax(-1) for s, n in ((0.1, 3), (0.7, 2))]
    reference = [torch.sin(s + 1.3 * positions[:n] + 2.1 * words).log_softmax(-1) for s, n in ((0.6, 3), (1.2, 2))]
    ratios = [(p - r).diagonal().sum() for p, r in zip(policy, reference, strict=True)]
    kl_chosen, kl_rejected = (
        (r.exp() * (r - p)).sum()[None].requires_grad_() for p, r in zip(policy, reference, strict=True)
    )
    close(torch.stack(ratios), vector(-0.379931, -0.11853))
    close(torch.cat([kl_chosen, kl_rejected]), vector(0.172611, 0.096188))
    gap = (ratios[0] - ratios[1])[None]
    first = tdpo1_loss(gap, kl_chosen, kl_rejected, beta=0.1)
    close(first, vector(0.702439))
    # The slope of l at -0.0184977: divergence on the chosen response is rewarded.
    (slope,) = torch.autograd.grad(first.sum(), kl_chosen)
    close(slope, vector(-0.1 / (1 + math.exp(-0.0184977))))
    second = tdpo2_loss(gap, kl_chosen, kl_rejected, beta=0.1, alpha=0.5)
    close(second, vector(0.704369))
    of_chosen, of_rejected = torch.autograd.grad(second.sum(), [kl_chosen, kl_rejected], allow_unused=True)
    assert of_chosen is None and of_rejected is not None and of_rejected.item() > 0


def test_step_dpo_is_dpo_with_the_shared_steps_outside_the_mask():
    whole = one_pair()
    steps = Responses(whole.logprobs, whole.mask & (torch.arange(4) >= 1), ref_logprobs=whole.ref_logprobs)
    close(PAIR.gap(steps.log_ratios()), vector(0.1))
    close(dpo_loss(PAIR.gap(steps.log_ratios()), beta=0.5), vector(0.66846))


def test_token_guidance_on_worked_numbers():
    responses = one_pair(guide_logprobs=rows(*GUIDE_TOKENS)[0])
    loss = tgdpo_loss(responses, PAIR, beta=0.1, alpha=0.5)
    close(loss, vector(0.671927))
    close(dpo_loss(PAIR.gap(responses.log_ratios()), beta=0.1), vector(0.673347))
    (gradient,) = torch.autograd.grad(loss.sum(), responses.logprobs)
    close(gradient[0], vector(-0.049662, -0.048683, -0.05064, -0.049662))
    close(gradient[1], vector(0.049906, 0.050395, 0.049417, 0.0))


def test_token_guidance_never_pushes_a_token_against_its_label():
    # The guide dislikes the chosen response's first token, and likes the rejected one's, by more than 1 / (alpha beta).
    guide, _ = rows([-40.0, -1.1, -0.2, -1.5], [40.0, -2.5, -1.6])
    responses = one_pair(guide_logprobs=guide)
    loss = tgdpo_loss(responses, PAIR, beta=0.1, alpha=1.0).sum()
    (gradient,) = torch.autograd.grad(loss, responses.logprobs)
    assert gradient[:, 0].tolist() == [0.0, 0.0]
    assert (gradient[0, 1:] < 0).all() and (gradient[1, 1:3] > 0).all()


def test_token_regularization_on_worked_numbers():
    responses = one_pair(better_logprobs=rows(*BETTER_TOKENS)[0], worse_logprobs=rows(*WORSE_TOKENS)[0])
    loss = treg_loss(responses, PAIR, beta=0.1, alpha=0.25)
    close(loss, vector(0.673315))
    token_rewards = vector(0.049834, 0.024979, -0.024979, 0.189974, -0.074443, -0.098688, -0.168188)
    (gradient,) = torch.autograd.grad(loss.sum(), responses.logprobs)
    # DPO's gradient and alpha * 0.490001 * (-beta * r), the weight taken as a constant.
    pull = -0.1 * 0.490001 * vector(1, 1, 1, 1, -1, -1, -1)
    close(gradient[responses.mask], pull - 0.25 * 0.490001 * 0.1 * token_rewards)


def test_margins_of_other_objectives_on_worked_numbers():
    margin_gap = 0.4 * (vector(0.5, 0.1, -0.2) - vector(0.2, 0.3, -0.1))
    losses = modpo_loss(GAP, margin_gap, beta=0.1, weight=0.6)
    close(losses.exp() - 1, (-vector(0.05, -0.083333, 0.183333)).exp())
    close(losses.mean(), torch.tensor(0.669939, dtype=torch.float64))
    with pytest.raises(ValueError, match="positive weight"):
        modpo_loss(GAP, margin_gap, beta=0.1, weight=0.0)


def test_time_weighted_dpo_on_worked_numbers():
    weights = ns_dpo_weights(10 - torch.tensor([9, 5, 0]) - 1, gamma=0.95)
    close(weights, torch.tensor([1.0, 0.814506, 0.630249]))
    close((weights * dpo_loss(GAP, beta=0.1)).mean(), torch.tensor(0.551792, dtype=torch.float64))


def test_auxiliary_offsets_on_worked_numbers():
    chosen, rejected = vector(0.2, 0.5, -0.1).tanh(), vector(-0.3, 0.1, 0.4).tanh()
    loss = aux_dpo_loss(GAP, chosen, rejected, beta=0.1).mean()
    close(loss, torch.tensor(0.673987, dtype=torch.float64))
    offsets = torch.cat([chosen, rejected])
    gradients = torch.tensor([[1, 0], [0.5, 0.5], [0, 1], [1, 1], [0.2, -0.3], [-0.5, 0.4]], dtype=torch.float64)
    null_norm_squared = (offsets @ gradients).square().sum()
    close(null_norm_squared, torch.tensor(0.002516, dtype=torch.float64))
    penalty = partial(aux_dpo_penalty, null_norm_squared, offsets)
    close(penalty(null_coef=0.0, amplitude_coef=1.0), torch.tensor(-0.0836, dtype=torch.float64))
    close(loss + penalty(null_coef=1e-4, amplitude_coef=1.0), torch.tensor(0.590387, dtype=torch.float64))


def test_listwise_dpo_on_worked_numbers_in_any_order_of_columns():
    log_ratios = vector(0.9, 0.1, -0.4)[None].requires_grad_()
    loss = plackett_luce_dpo_loss(log_ratios, vector(1, 2, 3)[None], beta=0.1)
    close(loss, vector(1.698512))
    close(torch.autograd.grad(loss.sum(), log_ratios)[0], vector(-0.064301, -0.015796, 0.080097)[None])
    shuffled = plackett_luce_dpo_loss(vector(-0.4, NAN, 0.9, 0.1)[None], vector(3, NAN, 1, 2)[None], beta=0.1)
    close(shuffled, vector(1.698512))


def test_a_ranking_of_the_best_alone_is_one_choice_among_all():
    inf = math.inf
    scores = vector(0.9, 0.1, -0.4)
    loss = plackett_luce_dpo_loss(scores[None], vector(1, inf, inf)[None], beta=0.5)
    assert loss.item() == pytest.approx(-(0.5 * scores).log_softmax(0)[0].item())
    # Nothing that has a place is left out: the last one's choice is none.
    whole = plackett_luce_dpo_loss(scores[None], vector(1, 2, inf)[None], beta=0.5)
    assert torch.equal(whole, plackett_luce_dpo_loss(scores[None], vector(1, 2, 3)[None], beta=0.5))
    assert plackett_luce_dpo_loss(scores[None], vector(inf, inf, inf)[None], beta=0.5).item() == 0


def test_two_responses_that_tie_are_a_pair_of_either_order():
    tied = plackett_luce_dpo_loss(vector(0.9, 0.1)[None], vector(1, 1)[None], beta=0.1)
    close(tied, dpo_loss(vector(0.8, -0.8), beta=0.1).mean()[None])


def test_dpo_follows_pair_counts_below_the_reward_of_the_base_policy():
    # arXiv 2510.20413: the policy is softmax(t, -t, 0), rewards are 1, 2, 0; 1 beats 3 eight times, 2 beats 1 and 3.
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    counts, pairs = vector(8, 1, 1), Pairs(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]))
    true_gaps = pairs.gap(vector(1, 2, 0))
    for _ in range(200):
        gap = pairs.gap(torch.cat([theta, -theta, 0 * theta]))
        share = true_gaps.sigmoid()
        loss = (counts * (share * dpo_loss(gap, beta=1.0) + (1 - share) * dpo_loss(-gap, beta=1.0))).sum() / 10
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - gradient).detach().requires_grad_()
    policy = torch.cat([theta, -theta, 0 * theta]).softmax(0)
    torch.testing.assert_close(theta.detach(), vector(0.3142), atol=1e-4, rtol=0)
    close(policy, vector(0.441732, 0.235639, 0.322629), atol=2e-5)
    close(policy @ vector(1, 2, 0), torch.tensor(0.913011, dtype=torch.float64), atol=2e-5)

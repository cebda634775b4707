import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, softplus

from raylhf.algos.masking import lengths_to_mask
from raylhf.algos.reward_losses import (
    aggregate_tokens,
    bootstrap_weights,
    pairwise_losses,
    plackett_luce_losses,
    process_losses,
    squared_errors,
    token_step_losses,
)

NAN = math.nan
close = partial(torch.testing.assert_close, atol=1e-6, rtol=0)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(losses, *leaves):
    return torch.autograd.grad(losses.sum(), leaves)


def assert_gradients_are_those_of_finite_differences(losses, *inputs):
    """Central differences in float64, by torch."""
    assert torch.autograd.gradcheck(losses, [x.clone().requires_grad_() for x in inputs])


# Worked by an independent numpy program.
CHOSEN, REJECTED = vector(1.0, 0.2, -0.5), vector(0.5, 0.6, -1.5)
MARGINS = vector(1.0, 1 / 3, 0.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.566785),
        ({"margins": MARGINS}, 0.804307),
        ({"center_coef": 0.01}, 0.589751),
        ({"flip_probs": 0.1}, 0.603451),
        ({"flip_probs": 0.05}, 0.585118),  # what torch's label_smoothing=0.1 means
    ],
)
def test_pairwise_losses_on_worked_numbers(options, expected):
    losses = pairwise_losses(CHOSEN, REJECTED, **options)
    assert losses.shape == (3,) and losses.mean().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("margins", "expected"),
    [(None, vector(-0.125847, -0.199563, -0.089647)), (MARGINS, vector(-0.207486, -0.225179, -0.089647))],
)
def test_gradients_of_the_pairwise_mean_on_worked_numbers(margins, expected):
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    by_chosen, by_rejected = gradients(pairwise_losses(chosen, rejected, margins=margins) / 3, chosen, rejected)
    close(by_chosen, expected)
    close(by_rejected, -expected)


def test_pairwise_losses_with_a_margin_and_a_flip_probability_for_each_pair_equal_the_formula():
    flips = vector(0.0, 0.1, 0.4)
    gaps = CHOSEN - REJECTED - MARGINS
    expected = (1 - flips) * softplus(-gaps) + flips * softplus(gaps) + 0.3 * (CHOSEN + REJECTED) ** 2
    close(pairwise_losses(CHOSEN, REJECTED, margins=MARGINS, flip_probs=flips, center_coef=0.3), expected)


def test_neutral_options_leave_the_plain_pairwise_loss():
    plain = pairwise_losses(CHOSEN, REJECTED)
    neutral = pairwise_losses(CHOSEN, REJECTED, margins=torch.zeros(3), flip_probs=torch.zeros(3), center_coef=0.0)
    torch.testing.assert_close(neutral, plain, atol=0, rtol=0)


@pytest.mark.parametrize(("flip_prob", "optimum"), [(0.1, 2.197225), (0.05, 2.944439)])
def test_smoothed_pairwise_loss_is_stationary_at_the_log_odds_of_a_right_label(flip_prob, optimum):
    gap = vector(optimum).requires_grad_()
    (slope,) = gradients(pairwise_losses(gap, vector(0.0), flip_probs=flip_prob), gap)
    close(slope, vector(0.0))


def test_pairwise_gradients_are_those_of_finite_differences():
    losses = partial(pairwise_losses, margins=MARGINS, flip_probs=vector(0.0, 0.1, 0.4), center_coef=0.3)
    assert_gradients_are_those_of_finite_differences(losses, CHOSEN, REJECTED)


@pytest.mark.parametrize("flip_prob", [0.0, 0.1])
def test_pairwise_losses_are_finite_at_huge_gaps_in_fp32(flip_prob):
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = pairwise_losses(chosen, torch.zeros(2), flip_probs=flip_prob)
    torch.testing.assert_close(losses, torch.tensor([flip_prob * 1e4, (1 - flip_prob) * 1e4]))
    torch.testing.assert_close(gradients(losses, chosen)[0], torch.tensor([flip_prob, flip_prob - 1]))


def test_losses_of_bf16_scores_are_computed_in_fp32():
    scores = normal(4, 5).bfloat16()
    exact, mask, ones = scores.float(), torch.ones(4, 5, dtype=torch.bool), torch.ones(4, 5)
    ranks = ones.cumsum(dim=1)
    for losses in (
        lambda x: pairwise_losses(x[0], x[1]),
        lambda x: squared_errors(x, ones)[0],
        lambda x: plackett_luce_losses(x, ranks, mask),
        lambda x: aggregate_tokens(x, mask, how="sum"),
        lambda x: token_step_losses(x, -x, mask, mask, past_shorter="zero")[0],
        lambda x: process_losses(x[0], ones[0]),
    ):
        result = losses(scores)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, losses(exact), atol=0, rtol=0)


def test_squared_errors_and_gradient_on_worked_numbers():
    scores = vector(0.3, -0.2, 1.1)[:, None].requires_grad_()
    losses, observed = squared_errors(scores, vector(0.5, 0.0, 1.0)[:, None])
    mean = losses.sum() / observed.sum()
    assert mean.item() == pytest.approx(0.03)
    close(gradients(mean, scores)[0], vector(-0.133333, -0.133333, 0.066667)[:, None])


def test_missing_attributes_have_neither_loss_nor_gradient():
    scores = torch.tensor([[1.0, 2.0, 5.0], [NAN, 4.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[0.0, NAN, 3.0], [NAN, NAN, 1.0]])
    weights = torch.tensor([[2.0, NAN, 1.0], [NAN, 1.0, 0.5]])
    losses, observed = squared_errors(scores, targets, weights=weights)
    assert observed.tolist() == [[True, False, True], [False, False, True]]
    assert losses.tolist() == [[2.0, 0.0, 4.0], [0.0, 0.0, 0.5]]
    assert gradients(losses, scores)[0].tolist() == [[4.0, 0.0, 4.0], [0.0, 0.0, -1.0]]


def test_squared_error_gradients_are_those_of_finite_differences():
    targets = torch.where(normal(4, 3, seed=1) > 0.5, NAN, normal(4, 3, seed=2))
    losses = partial(lambda scores, **data: squared_errors(scores, **data)[0], targets=targets, weights=normal(4, 3))
    assert_gradients_are_those_of_finite_differences(losses, normal(4, 3, seed=3))


PL_SCORES, PL_RANKS = row(2.0, 1.0, 0.5, -1.0), row(1, 2, 3, 4)


def full(scores):
    return torch.ones(scores.shape, dtype=torch.bool)


def log_likelihood(scores, order):
    """Of one strict order, by the definition: each in turn against itself and all that follow."""
    return torch.stack([scores[order[k]] - scores[list(order[k:])].logsumexp(dim=0) for k in range(len(order))]).sum()


def consistent_orders(ranks):
    orders = itertools.permutations(range(len(ranks)))
    return [order for order in orders if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order))]


def test_plackett_luce_loss_and_gradient_on_worked_numbers():
    scores = PL_SCORES.clone().requires_grad_()
    total = 3 * plackett_luce_losses(scores, PL_RANKS, full(scores))  # four responses: three choices
    close(total, vector(1.251552))
    close(gradients(total, scores)[0], row(-0.39054, -0.201695, 0.301771, 0.290464))
    close(plackett_luce_losses(PL_SCORES, PL_RANKS, full(scores), top=1), vector(0.495182))


def test_plackett_luce_chooses_among_what_is_left_and_not_among_what_was_chosen():
    # Denominators over prefixes instead of suffixes give 6.772812, the loss of the reversed ranking.
    assert 3 * plackett_luce_losses(PL_SCORES, PL_RANKS, full(PL_SCORES)).item() < 2
    reversed_ranks = PL_RANKS.flip(1)
    close(3 * plackett_luce_losses(PL_SCORES, reversed_ranks, full(PL_SCORES)), vector(6.772812))


def test_plackett_luce_of_two_is_the_pairwise_loss():
    scores = normal(6, 2)
    ranks = row(1, 2).expand(6, 2)
    losses = plackett_luce_losses(scores, ranks, full(scores))
    close(losses, pairwise_losses(scores[:, 0], scores[:, 1]))
    close(plackett_luce_losses(PL_SCORES[:, :2], PL_RANKS[:, :2], full(PL_SCORES[:, :2])), vector(0.313262))


def test_plackett_luce_of_two_that_tie_is_the_pairwise_loss_of_a_coin_flip():
    scores = normal(6, 2)
    losses = plackett_luce_losses(scores, torch.ones(6, 2), full(scores))
    close(losses, pairwise_losses(scores[:, 0], scores[:, 1], flip_probs=0.5))


def test_first_choice_alone_is_softmax_cross_entropy_on_the_best():
    scores, best = normal(5, 4), torch.tensor([0, 3, 1, 2, 2])
    ranks = torch.full((5, 4), 2.0).scatter(1, best[:, None], 1.0)
    close(plackett_luce_losses(scores, ranks, full(scores), top=1), cross_entropy(scores, best, reduction="none"))


def test_first_choice_of_a_tie_for_the_best_is_cross_entropy_on_either():
    scores = normal(1, 4)
    either = [cross_entropy(scores, torch.tensor([best])) for best in (1, 3)]
    losses = plackett_luce_losses(scores, row(2, 1, 3, 1), full(scores), top=1)
    close(losses, torch.stack(either).mean()[None])


@pytest.mark.parametrize("top", [2, 3, 9])
def test_top_counts_the_first_choices_and_divides_by_them(top):
    counted = min(top, 3)
    choices = torch.stack([PL_SCORES[0, k:].logsumexp(dim=0) - PL_SCORES[0, k] for k in range(counted)])
    close(plackett_luce_losses(PL_SCORES, PL_RANKS, full(PL_SCORES), top=top), choices.mean()[None])


def test_unranked_responses_stand_only_in_the_denominators():
    # Two places known among four: ln(e^1 + e^0 + e^2 + e^0.5) - 1 and ln(e^0 + e^2 + e^0.5) - 2.
    scores, ranks = row(0.0, 1.0, 2.0, 0.5), row(NAN, 1, 2, NAN)
    first = math.log(sum(map(math.exp, (0.0, 1.0, 2.0, 0.5)))) - 1
    second = math.log(sum(map(math.exp, (0.0, 2.0, 0.5)))) - 2
    close(plackett_luce_losses(scores, ranks, full(scores)), vector((first + second) / 2))


@pytest.mark.parametrize("ranks", [(1, 1, 2, 3), (1, 2, 2, 3), (1, 1, 1, 2), (1, 2, 3, 3), (1, 1, 2, 2), (1, 1, 1, 1)])
def test_ties_are_close_to_all_their_orders(ranks):
    # Tied scores differ by up to 1 here; both tolerances are for the sum over three choices.
    orders = consistent_orders(ranks)
    for scores in torch.rand(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        total = 3 * plackett_luce_losses(scores[None], row(*ranks), full(scores[None])).item()
        likelihoods = torch.stack([log_likelihood(scores, order) for order in orders])
        mean_loss = -likelihoods.mean().item()
        mean_probability_loss = math.log(len(orders)) - likelihoods.logsumexp(dim=0).item()
        assert mean_loss - 1e-9 <= total <= mean_loss + 0.1
        assert total == pytest.approx(mean_probability_loss, abs=0.3)


@pytest.mark.parametrize("ranks", [(1, 1, 2, 3), (2, 1, 2, 2), (1, 1, 1, 1)])
def test_ties_of_equal_scores_are_exact(ranks):
    scores = torch.where(row(*ranks) == 1, 0.4, torch.where(row(*ranks) == 2, -0.3, 1.2))
    likelihood = log_likelihood(scores[0], consistent_orders(ranks)[0])
    close(3 * plackett_luce_losses(scores, row(*ranks), full(scores)), -likelihood[None])


def test_plackett_luce_depends_neither_on_the_order_of_columns_nor_on_a_shift():
    scores, ranks = normal(1, 6), row(1, 2, 2, 3, 3, NAN)
    loss = plackett_luce_losses(scores, ranks, full(scores), top=4)
    for seed in range(10):
        columns = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        permuted = plackett_luce_losses(scores[:, columns] + seed, ranks[:, columns], full(scores), top=4)
        close(permuted, loss)


def test_padding_changes_nothing_whatever_it_holds():
    scores = torch.cat([PL_SCORES, row(NAN, math.inf)], dim=1).float().requires_grad_()
    ranks, mask = row(1, 2, 3, 4, 1, NAN), torch.tensor([[True] * 4 + [False] * 2])
    losses = plackett_luce_losses(scores, ranks, mask)
    assert losses.item() == pytest.approx(1.251552 / 3, abs=1e-6)
    gradient = gradients(losses, scores)[0]
    assert gradient.isfinite().all() and gradient[0, 4:].tolist() == [0, 0]


def test_rows_without_a_choice_have_neither_loss_nor_gradient():
    scores = torch.randn(4, 3, requires_grad=True)
    ranks = torch.tensor([[1.0, 2.0, 3.0], [NAN, NAN, NAN], [1.0, 1.0, 1.0], [NAN, 1.0, 1.0]])
    mask = torch.tensor([[True, False, False], [True] * 3, [False] * 3, [False, False, True]])
    losses = plackett_luce_losses(scores, ranks, mask)
    assert losses.tolist() == [0, 0, 0, 0] and not gradients(losses, scores)[0].any()


def test_plackett_luce_is_finite_at_huge_gaps_in_fp32():
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]], requires_grad=True)
    losses = plackett_luce_losses(scores, torch.tensor([[1.0, 1.0, 2.0]]).expand(2, 3), torch.ones(2, 3).bool())
    assert losses.isfinite().all() and gradients(losses, scores)[0].isfinite().all()


@pytest.mark.parametrize("top", [None, 2])
def test_plackett_luce_gradients_are_those_of_finite_differences(top):
    ranks = torch.tensor([[1, 2, 3, 4, 5], [2, 1, 1, 2, 2], [NAN, 1, NAN, 2, 2], [1, 2, 3, NAN, NAN]]).double()
    mask = lengths_to_mask(torch.tensor([5, 5, 5, 3]), 5)
    losses = partial(plackett_luce_losses, ranks=ranks, mask=mask, top=top)
    assert_gradients_are_those_of_finite_differences(losses, normal(4, 5))


TOKENS_W, TOKENS_L = row(0.5, 1.0, 0.2, NAN, NAN), row(0.1, 1.2, -0.3, 0.4, NAN)
MASK_W, MASK_L = lengths_to_mask(torch.tensor([3]), 5), lengths_to_mask(torch.tensor([4]), 5)


@pytest.mark.parametrize(("how", "expected"), [("sum", 0.554355), ("mean", 0.59067), ("last", 0.798139)])
def test_pairwise_losses_of_aggregated_tokens_on_worked_numbers(how, expected):
    scores = [aggregate_tokens(TOKENS_W, MASK_W, how=how), aggregate_tokens(TOKENS_L, MASK_L, how=how)]
    close(pairwise_losses(*scores), vector(expected))


@pytest.mark.parametrize("how", ["sum", "mean", "last"])
def test_aggregates_find_the_response_inside_the_sequence_and_give_0_without_one(how):
    tokens = torch.tensor([[9.0, 1.0, 3.0, NAN], [NAN, NAN, NAN, NAN]], requires_grad=True)
    mask = torch.tensor([[False, True, True, False], [False] * 4])
    scores = aggregate_tokens(tokens, mask, how=how)
    assert scores.tolist() == [{"sum": 4.0, "mean": 2.0, "last": 3.0}[how], 0.0]
    assert gradients(scores, tokens)[0].tolist() == [
        {"sum": [0, 1, 1, 0], "mean": [0, 0.5, 0.5, 0], "last": [0, 0, 1, 0]}[how],
        [0] * 4,
    ]


STEP_CASES = [("truncate", 1.785231, 3), ("zero", 2.698246, 4), ("hold", 2.58337, 4)]


@pytest.mark.parametrize(("past_shorter", "expected", "count"), STEP_CASES)
def test_token_step_losses_on_worked_numbers(past_shorter, expected, count):
    # The fifth position is padding of both: it would add log 2.
    sums, counts = token_step_losses(TOKENS_W, TOKENS_L, MASK_W, MASK_L, past_shorter=past_shorter)
    close(sums, vector(expected))
    assert counts.tolist() == [count]
    # sigmoid(a - b) = sigmoid(-b - (-a)), so with both signs turned the longer response may stand first.
    mirrored = token_step_losses(-TOKENS_L, -TOKENS_W, MASK_L, MASK_W, past_shorter=past_shorter)
    close(mirrored, (sums, counts))


@pytest.mark.parametrize(("past_shorter", "expected"), [("truncate", (0.0, 0)), ("zero", (2, 2)), ("hold", (2, 2))])
def test_a_response_without_tokens_counts_as_score_0_unless_truncated(past_shorter, expected):
    empty = torch.zeros(1, 2, dtype=torch.bool)
    scores = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    sums, counts = token_step_losses(row(NAN, NAN), scores, empty, ~empty, past_shorter=past_shorter)
    close(sums, vector(expected[0] * math.log(2)))
    assert counts.tolist() == [expected[1]]


@pytest.mark.parametrize("past_shorter", ["truncate", "zero", "hold"])
def test_token_step_gradients_are_those_of_finite_differences_and_none_in_the_padding(past_shorter):
    chosen_mask = lengths_to_mask(torch.tensor([4, 2, 0]), 4)
    rejected_mask = lengths_to_mask(torch.tensor([1, 3, 2]), 4)

    def losses(chosen, rejected):
        return token_step_losses(chosen, rejected, chosen_mask, rejected_mask, past_shorter=past_shorter)[0]

    assert_gradients_are_those_of_finite_differences(losses, normal(3, 4), normal(3, 4, seed=1))
    chosen = normal(3, 4).where(chosen_mask, NAN).requires_grad_()
    (gradient,) = gradients(losses(chosen, normal(3, 4, seed=1)), chosen)
    assert gradient.isfinite().all() and not gradient[~chosen_mask].any()


def test_last_score_that_is_held_learns_from_every_position_it_stands_for():
    # Three positions, all at gap 0: each pulls by 1/2.
    chosen = row(0.0, NAN, NAN).requires_grad_()
    masks = [lengths_to_mask(torch.tensor([length]), 3) for length in (1, 3)]
    sums, _ = token_step_losses(chosen, row(0.0, 0.0, 0.0), *masks, past_shorter="hold")
    close(gradients(sums, chosen)[0], row(-1.5, 0.0, 0.0))


def test_process_losses_on_worked_numbers():
    losses = process_losses(torch.logit(vector(0.9, 0.8, 0.5, 0.95)), torch.tensor([1, 1, 0, 1]))
    close(losses.exp(), 1 / vector(0.9, 0.8, 0.5, 0.95))
    assert losses.mean().item() == pytest.approx(0.268236, abs=1e-6)


def test_process_losses_are_finite_at_huge_logits_and_have_the_gradient_of_finite_differences():
    logits = torch.tensor([1e4, -1e4, 1e4], requires_grad=True)
    losses = process_losses(logits, torch.tensor([1.0, 1.0, 0.0]))
    assert losses.tolist() == [0, 1e4, 1e4] and gradients(losses, logits)[0].tolist() == [0, -1, 1]
    assert_gradients_are_those_of_finite_differences(partial(process_losses, labels=vector(1, 0, 1, 0.3)), normal(4))


def test_losses_of_parts_are_those_of_the_whole():
    scores, ranks = normal(6, 5), normal(6, 5, seed=1).argsort(dim=1).argsort(dim=1) + 1.0
    lengths = torch.tensor([5, 2, 0, 4, 1, 3])
    mask, other_mask = lengths_to_mask(lengths, 5), lengths_to_mask(lengths.flip(0), 5)
    for losses in (
        lambda rows: pairwise_losses(scores[rows, 0], scores[rows, 1], center_coef=0.1),
        lambda rows: squared_errors(scores[rows], ranks[rows])[0],
        lambda rows: plackett_luce_losses(scores[rows], ranks[rows], mask[rows]),
        lambda rows: aggregate_tokens(scores[rows], mask[rows], how="mean"),
        lambda rows: torch.stack(
            token_step_losses(scores[rows], -scores[rows], mask[rows], other_mask[rows], past_shorter="hold"), dim=1
        ),
        lambda rows: process_losses(scores[rows, 0], mask[rows, 1]),
    ):
        parts = [losses(slice(0, 1)), losses(slice(1, 4)), losses(slice(4, 6))]
        torch.testing.assert_close(torch.cat(parts), losses(slice(0, 6)))


def test_bootstrap_weights_depend_on_seed_member_and_example_alone():
    weights = bootstrap_weights(5, [7, 3, 11, 3], seed=1)
    assert weights.shape == (5, 4) and weights.dtype == torch.float32
    torch.testing.assert_close(bootstrap_weights(5, [11], seed=1), weights[:, 2:3])
    torch.testing.assert_close(bootstrap_weights(3, [3, 7], seed=1), weights[:3, [1, 0]])
    torch.testing.assert_close(weights[:, 1], weights[:, 3])
    for other_indexes in ([7, 3, 11, 3], [6, 2, 10, 2]):
        assert not torch.equal(bootstrap_weights(5, other_indexes, seed=2), weights)
    assert bootstrap_weights(5, [], seed=1).shape == (5, 0)


def test_bootstrap_weights_are_independent_poisson_draws_of_mean_one():
    weights = bootstrap_weights(4, range(5000), seed=0).double()
    share_of_zeros = (weights == 0).double().mean().item()
    assert weights.mean().item() == pytest.approx(1, abs=0.03) and weights.var().item() == pytest.approx(1, abs=0.06)
    assert share_of_zeros == pytest.approx(math.exp(-1), abs=0.015)
    off_diagonal = torch.corrcoef(weights)[~torch.eye(4, dtype=torch.bool)]
    neighbours = torch.corrcoef(torch.stack([weights[0, :-1], weights[0, 1:]]))[0, 1]
    assert off_diagonal.abs().max() < 0.06 and neighbours.abs() < 0.06

"""Where each objective's own training must end on the enumerable problem, computed without raylhf's loss functions.

Every function takes the problem and returns the log-policy [64]. Where no closed form is known, the expected loss over
all ordered pairs is written out and minimised over a free table of 64 numbers in float64.
"""

from collections.abc import Callable

import torch
from closed_form.enumerable import BETA, CHOSEN, LENGTH, REJECTED, RESPONSES, VOCAB, Problem
from closed_form.stored import other_rewards
from torch import Tensor
from torch.nn.functional import softplus

Optimum = Callable[[Problem], Tensor]


def kl_regularised(problem: Problem) -> Tensor:
    """pi*, what all of the first table share."""
    return problem.optimum


def ipo(beta: float) -> Optimum:
    """The least-squares solution of mean gap = (2 p - 1) / (2 beta) over all pairs, a linear system (2310.12036)."""

    def optimum(problem: Problem) -> Tensor:
        rows = torch.zeros(len(CHOSEN), len(RESPONSES), dtype=torch.float64)
        places = torch.arange(len(CHOSEN))
        rows[places, CHOSEN], rows[places, REJECTED] = 1 / LENGTH, -1 / LENGTH
        targets = (2 * problem.preference() - 1) / (2 * beta)
        # Only gaps are determined: of all solutions, lstsq's gelsd takes the one of least norm.
        log_ratios = torch.linalg.lstsq(rows, targets[:, None], driver="gelsd").solution[:, 0]
        return (problem.reference + log_ratios).log_softmax(0)

    return optimum


def smoothed(noise: float, label_smoothing: float) -> Optimum:
    """DPO (`label_smoothing` 0) or cDPO on labels that are flipped with probability `noise`."""

    def optimum(problem: Problem) -> Tensor:
        flipped = problem.preference(noise)
        wanted = (1 - label_smoothing) * flipped + label_smoothing * (1 - flipped)
        return _minimised(problem, lambda log_ratios: (wanted * softplus(-BETA * _gap(log_ratios))).sum())

    return optimum


def simpo(beta: float, gamma: float) -> Optimum:
    """Its expected loss is convex in the log-probabilities; the reference has no part in it (2405.14734)."""

    def optimum(problem: Problem) -> Tensor:
        sure = problem.preference()
        return _minimised(
            problem,
            lambda log_ratios: (sure * softplus(gamma - beta * _gap(problem.reference + log_ratios) / LENGTH)).sum(),
        )

    return optimum


def tempered(temperature: float) -> Optimum:
    """The log-mean-exp of DPO's loss over `temperature`: KLDPO (positive), and Dr. DPO (negative, below -1).

    A pair's part, p sigmoid(z)^(-1/t) + (1 - p) sigmoid(-z)^(-1/t), is stationary where z (1 + 1/t) = logit p. The gaps
    of r satisfy all pairs at once: what is found is pi* of beta (1 + 1/t).
    """
    return lambda problem: (problem.reference + problem.rewards / (BETA * (1 + 1 / temperature))).log_softmax(0)


def tdpo1(problem: Problem) -> Tensor:
    """pi* with another value of each first token (2404.11999).

    With K(a) the forward KL after first token a, the loss is least where log-ratio + K is r / beta up to a constant.
    The second token's policy is then pi*'s, and the log-ratio of the first is E_ref[r / beta], the plain value, where
    pi* has the soft one, log E_ref[exp(r / beta)].
    """
    table = problem.reference.view(VOCAB, VOCAB)
    tilt = problem.rewards.view(VOCAB, VOCAB) / BETA
    first = table.logsumexp(1)
    second = table - first[:, None]
    plain = (second.exp() * tilt).sum(1)
    return ((first + plain)[:, None] + (second + tilt).log_softmax(1)).flatten().log_softmax(0)


def tdpo2(alpha: float) -> Optimum:
    """Where the expected update of a free policy vanishes, followed from pi* by Newton's method (2404.11999).

    With the stop-gradient the update is no gradient of a loss: even where all preferences are met, the KL of rejected
    responses is still pulled down, and nothing pulls the other way.
    """

    def optimum(problem: Problem) -> Tensor:
        # As a table [chosen, rejected], which differentiates faster than a list of pairs.
        sure = (problem.rewards[:, None] - problem.rewards).sigmoid().fill_diagonal_(0.0)
        table = problem.reference.view(VOCAB, VOCAB)
        reference = torch.cat([table.logsumexp(1)[None], table.log_softmax(1)])

        def loss(logits: Tensor, stopped: Tensor, weight: float) -> Tensor:
            kl, log_ratios = _tree(logits, reference)
            stopped_kl, _ = _tree(stopped, reference)
            gap = log_ratios[:, None] - log_ratios - weight * (kl - stopped_kl[:, None])
            return (sure * softplus(-BETA * gap)).mean()

        def update(flat: Tensor, weight: float) -> Tensor:
            logits = flat.view_as(reference)
            return torch.func.grad(loss)(logits, logits, weight).flatten()

        best = problem.optimum.view(VOCAB, VOCAB)
        flat = torch.cat([best.logsumexp(1)[None], best.log_softmax(1)]).flatten()  # the root for alpha = 0
        for step in range(1, 6):
            for _ in range(
                4
            ):  # Newton. A constant added to a state's logits changes nothing: hence the pseudo-inverse.
                slope = torch.func.jacrev(update)(flat, alpha * step / 5)
                flat = flat - torch.linalg.pinv(slope, rtol=1e-9) @ update(flat, alpha * step / 5)
        assert update(flat, alpha).abs().max() < 1e-10, "the root was lost"
        _, log_ratios = _tree(flat.view_as(reference), reference)
        return (problem.reference + log_ratios).log_softmax(0)

    return optimum


def _tree(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """(summed forward KL, log-ratio) [64] of the responses; rows of [1 + V, V]: first token, then second by first."""
    policy = logits.log_softmax(1)
    kl = (reference.exp() * (reference - policy)).sum(1)
    log_ratios = policy - reference
    return (kl[0] + kl[1:, None]).expand(VOCAB, VOCAB).flatten(), (log_ratios[0][:, None] + log_ratios[1:]).flatten()


def modpo(weight: float) -> Optimum:
    """The KL-regularised optimum of weight * r + (1 - weight) * other (2310.03708)."""

    def optimum(problem: Problem) -> Tensor:
        mixed = weight * problem.rewards + (1 - weight) * torch.from_numpy(other_rewards(problem))
        return (problem.reference + mixed / BETA).log_softmax(0)

    return optimum


def _gap(values: Tensor) -> Tensor:
    return values[CHOSEN] - values[REJECTED]


def _minimised(problem: Problem, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The policy whose log-ratios [64] to the reference minimise `loss`, to 1e-9 in the slope."""
    log_ratios = torch.zeros(len(RESPONSES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_ratios], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(log_ratios)
        value.backward()
        return value

    optimizer.step(closure)
    return (problem.reference + log_ratios.detach()).log_softmax(0)

"""Losses of preference optimisation without a reward model in the loop: DPO and its relatives, one value per pair.

S is the masked sum of a response's log-probabilities, rho = S - S_ref its log-ratio to the reference, and a gap is the
difference of such a number between a pair's chosen and rejected response. `Responses` gives the numbers, `Pairs` their
gaps [N], the losses are functions of gaps. They are never reduced: the trainer multiplies by weights, sums, and divides
by the denominator of the whole optimizer step, all micro-batches and ranks. What depends on other pairs of the batch is
in `preference_robust`. Only `kto_reference_point` and `aux_dpo_penalty` are numbers of a whole batch here.

Inputs below fp32 are lifted to fp32; float64 stays float64. With l(z) = -log sigmoid(z), l(-z) = l(z) + z.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raylhf.algos.masking import lift, select
from raylhf.algos.reward_losses import plackett_luce_losses

MAX_MEAN_LOGPROB = -1e-6
"""ORPO's log-odds diverge as the mean log-probability of a response reaches 0: it is held below this."""


@dataclass(frozen=True)
class Responses:
    """R responses under the policy and what it is compared with; [R, T] each, T the longest response."""

    logprobs: Tensor
    """Of the policy, differentiable."""
    mask: Tensor
    """bool: the tokens that count, the end of sequence included. What stands outside may be anything, NaN included."""
    ref_logprobs: Tensor | None = None
    """Of the reference policy."""
    guide_logprobs: Tensor | None = None
    """Of TGDPO's third model."""
    better_logprobs: Tensor | None = None
    """T-REG: of the reference, after a prompt that asks for a better answer."""
    worse_logprobs: Tensor | None = None
    """T-REG: of the reference, after a prompt that asks for a worse answer."""
    seq_kl: Tensor | None = None
    """TDPO: [R], sum over the mask of KL(reference || policy) over the vocabulary, differentiable."""

    def lengths(self) -> Tensor:
        """Number [R] (long) of tokens that count."""
        return self.mask.sum(dim=1)

    def sums(self) -> Tensor:
        """S [R]; 0 for a response without tokens."""
        return select(self.logprobs, self.mask).sum(dim=1)

    def means(self) -> Tensor:
        """S divided by the length [R]; 0 for a response without tokens."""
        return self.sums() / self.lengths().clamp(min=1)

    def token_log_ratios(self) -> Tensor:
        """log(policy / reference) [R, T] of each token, 0 outside the mask."""
        # The difference is taken token by token: that of two sums in the thousands would lose fp32's digits.
        return select(self.logprobs, self.mask) - select(_given(self.ref_logprobs, "ref_logprobs"), self.mask)

    def log_ratios(self) -> Tensor:
        """rho [R]; 0 for a response without tokens."""
        return self.token_log_ratios().sum(dim=1)

    def mean_log_ratios(self) -> Tensor:
        """rho divided by the length [R]; 0 for a response without tokens."""
        return self.log_ratios() / self.lengths().clamp(min=1)


@dataclass(frozen=True)
class Pairs:
    """N comparisons between rows of `Responses`; a row may take part in several, in either place."""

    chosen: Tensor
    """Row of the preferred response, long [N]."""
    rejected: Tensor
    """Row of the other one, long [N]."""

    def gap(self, values: Tensor) -> Tensor:
        """values[chosen] - values[rejected], [N], of one value per response [R]."""
        return values[self.chosen] - values[self.rejected]


def sft_loss(responses: Responses) -> Tensor:
    """Negative log-likelihood [R], summed over the mask; also the first term of ORPO, and RiC's loss (2402.10207)."""
    return -responses.sums()


def dpo_loss(gap: Tensor, *, beta: Tensor | float) -> Tensor:
    """l(beta * gap) [N] of the gap of rho (arXiv 2305.18290); log 2 where policy and reference agree.

    Step-DPO (arXiv 2406.18629) is this loss where the steps that a pair shares stand outside the mask.
    """
    return -logsigmoid(beta * lift(gap))


def cdpo_loss(gap: Tensor, *, beta: float, label_smoothing: Tensor | float) -> Tensor:
    """(1 - eps) l(z) + eps l(-z) [N], z = beta * gap: DPO if a label is wrong with probability eps = `label_smoothing`.

    Conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf); the minimum lies at z = log((1 - eps) / eps).
    """
    return dpo_loss(gap, beta=beta) + label_smoothing * beta * lift(gap)


def robust_dpo_loss(gap: Tensor, *, beta: float, label_noise: float) -> Tensor:
    """[(1 - eps) l(z) - eps l(-z)] / (1 - 2 eps) [N], z = beta * gap, eps = `label_noise` < 1/2 (arXiv 2403.00409).

    Its expectation over labels that are flipped with probability eps is the loss of DPO on the true labels. The price:
    it falls without bound as z grows, by eps / (1 - 2 eps) for each unit.
    """
    if not 0 <= label_noise < 0.5:
        raise ValueError(f"label_noise = {label_noise} must be at least 0 and below 0.5: labels beyond it say nothing")
    return dpo_loss(gap, beta=beta) - label_noise / (1 - 2 * label_noise) * beta * lift(gap)


def ipo_loss(mean_gap: Tensor, *, beta: float) -> Tensor:
    """(mean_gap - 1 / (2 beta))^2 [N] (arXiv 2310.12036).

    Of the gap of rho divided by length, as the authors advise and HALOs and TRL do. The paper's formula takes the gap
    of rho itself, where long responses reach the target 1 / (2 beta) at once: one beta, two very different losses.
    """
    return (lift(mean_gap) - 1 / (2 * beta)).square()


def simpo_loss(mean_gap: Tensor, *, beta: float, gamma: float) -> Tensor:
    """l(beta * mean_gap - gamma) [N] of the gap of S divided by length (arXiv 2405.14734); there is no reference.

    `gamma` is in beta-scaled units as in the paper; the authors' code asks for gamma / beta.
    """
    return -logsigmoid(beta * lift(mean_gap) - gamma)


def orpo_loss(chosen_means: Tensor, rejected_means: Tensor) -> Tensor:
    """l(log-odds of chosen - log-odds of rejected) [N] of S divided by length, [N] each (arXiv 2403.07691).

    The odds-ratio term alone; ORPO is the negative log-likelihood of the chosen response plus 0.1 of this. Log-odds
    are m - log(1 - exp(m)); a mean m above MAX_MEAN_LOGPROB is held there, without gradient.
    """
    return -logsigmoid(_log_odds(chosen_means) - _log_odds(rejected_means))


def kto_loss(
    log_ratios: Tensor,
    is_desirable: Tensor,
    *,
    beta: float,
    reference_point: Tensor | float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """weight * sigmoid(-+ beta * (rho - z)) [R], minus where desirable (arXiv 2402.01306).

    `log_ratios` rho [R] of single responses, `is_desirable` [R] (bool). `reference_point` z is the one number of the
    global batch that `kto_reference_point` gives. The loss is bounded: an outlier on either side has no gradient.
    """
    advantage = beta * (lift(log_ratios) - reference_point)
    desirable, undesirable = (-advantage).sigmoid(), advantage.sigmoid()
    return torch.where(is_desirable, desirable_weight * desirable, undesirable_weight * undesirable)


def kto_reference_point(mismatched_sum: Tensor, count: Tensor | int) -> Tensor:
    """KTO's z (scalar, detached): max(0, mean rho of prompts joined with responses to OTHER prompts).

    `mismatched_sum` and `count` (of responses) are of the global batch; z is 0 where there is none. It estimates
    KL(policy || reference), which is never negative.
    """
    count = torch.as_tensor(count, device=mismatched_sum.device).clamp(min=1)
    return (lift(mismatched_sum).detach() / count).clamp(min=0)


def tdpo1_loss(gap: Tensor, kl_chosen: Tensor, kl_rejected: Tensor, *, beta: float) -> Tensor:
    """l(beta * (gap - (kl_rejected - kl_chosen))) [N] (arXiv 2404.11999).

    `kl_chosen` and `kl_rejected` [N] are `seq_kl` of the pair's responses: the KL from the reference to the policy,
    forward, over the full vocabulary, summed over the response.
    """
    return dpo_loss(lift(gap) - (lift(kl_rejected) - lift(kl_chosen)), beta=beta)


def tdpo2_loss(gap: Tensor, kl_chosen: Tensor, kl_rejected: Tensor, *, beta: float, alpha: float) -> Tensor:
    """l(beta * (gap - alpha * (kl_rejected - sg(kl_chosen)))) [N], sg: no gradient (arXiv 2404.11999).

    As `tdpo1_loss`; only the divergence on the rejected response is held down, by `alpha` (0: DPO).
    """
    return dpo_loss(lift(gap) - alpha * (lift(kl_rejected) - lift(kl_chosen).detach()), beta=beta)


def tgdpo_loss(responses: Responses, pairs: Pairs, *, beta: float, alpha: float) -> Tensor:
    """l(beta * (sum_t w_t rho_t of chosen - sum_t w'_t rho_t of rejected)) [N] (arXiv 2506.14574).

    A guide (an earlier DPO policy, say) gives token rewards r_t = beta * (guide - reference), and w = 1 + alpha * r in
    a chosen response, w' = 1 - alpha * r in a rejected one, without gradient: what the guide likes is learned sooner,
    and what it dislikes unlearned sooner. Unlike in the authors' code, weights below 0 are set to 0, so that a token
    is never pushed against its label. Where guide and reference agree, this is DPO.
    """
    guide = select(_given(responses.guide_logprobs, "guide_logprobs"), responses.mask)
    reference = select(_given(responses.ref_logprobs, "ref_logprobs"), responses.mask)
    tilt = (alpha * beta * (guide - reference)).detach()
    log_ratios = responses.token_log_ratios()
    as_chosen = ((1 + tilt).clamp(min=0) * log_ratios).sum(dim=1)
    as_rejected = ((1 - tilt).clamp(min=0) * log_ratios).sum(dim=1)
    return dpo_loss(as_chosen[pairs.chosen] - as_rejected[pairs.rejected], beta=beta)


def treg_loss(responses: Responses, pairs: Pairs, *, beta: float, alpha: float) -> Tensor:
    """DPO + alpha * sg(sigmoid(-beta * gap)) * (reg of chosen + reg of rejected) [N] (arXiv 2412.02685).

    reg = -beta * sum_t r_t * logprob_t, with token rewards r_t = sigmoid(better_t - worse_t) - 1/2 in [-1/2, 1/2],
    without gradient: the reference itself says which tokens a prompt for a better answer makes likelier. Good tokens
    of a rejected response are reinforced as well, as intended.
    """
    better = select(_given(responses.better_logprobs, "better_logprobs"), responses.mask)
    worse = select(_given(responses.worse_logprobs, "worse_logprobs"), responses.mask)
    token_rewards = ((better - worse).sigmoid() - 0.5).detach()
    regularizer = -beta * (token_rewards * select(responses.logprobs, responses.mask)).sum(dim=1)
    gap = pairs.gap(responses.log_ratios())
    weights = (-beta * gap).sigmoid().detach()
    return dpo_loss(gap, beta=beta) + alpha * weights * (regularizer[pairs.chosen] + regularizer[pairs.rejected])


def modpo_loss(gap: Tensor, margin_gap: Tensor, *, beta: float, weight: float) -> Tensor:
    """l((beta * gap - margin_gap) / weight) [N] (MODPO, arXiv 2310.03708).

    The pairs rank one objective, whose weight (> 0) is `weight`; `margin_gap` [N] is the weighted sum over the OTHER
    objectives of the chosen response's reward minus the rejected one's. With weight 1 and no others, this is DPO.
    """
    if weight <= 0:
        raise ValueError(f"weight = {weight}: the objective that the pairs rank needs a positive weight")
    return -logsigmoid((beta * lift(gap) - lift(margin_gap)) / weight)


def plackett_luce_dpo_loss(log_ratios: Tensor, ranks: Tensor, *, beta: float) -> Tensor:
    """Negative log-likelihood [G] of rankings of K responses by beta * rho (arXiv 2305.18290, appendix A.3).

    `log_ratios` and `ranks` [G, K]; ranks hold 1 for the best, equal numbers for a tie, infinity for a response below
    all that have a place (it is never chosen), NaN for one that is absent. Ties follow Efron as in
    `plackett_luce_losses`. Summed over the choices of a ranking as in the paper, so that two responses give DPO; a
    group of one gives 0.
    """
    present, ranked = ~ranks.isnan(), ranks.isfinite()
    # The last of n responses is no choice.
    num_choices = torch.minimum(ranked.sum(dim=1), (present.sum(dim=1) - 1).clamp(min=0))
    places = torch.where(ranked, ranks, torch.nan)
    return plackett_luce_losses(beta * lift(log_ratios), places, present) * num_choices


def aux_dpo_loss(gap: Tensor, chosen_offset: Tensor, rejected_offset: Tensor, *, beta: float) -> Tensor:
    """l(beta * (gap + chosen_offset - rejected_offset)) [N] (AuxDPO, arXiv 2510.20413).

    The offsets [N] are learned, one for each response of the training data, and thrown away: they stand for the part
    of the true reward that no policy of the class can express, which DPO would push into the policy.
    """
    return dpo_loss(lift(gap) + lift(chosen_offset) - lift(rejected_offset), beta=beta)


def aux_dpo_penalty(null_norm_squared: Tensor, offsets: Tensor, *, null_coef: float, amplitude_coef: float) -> Tensor:
    """null_coef * null_norm_squared - amplitude_coef * mean(offsets^2) (scalar) (AuxDPO, arXiv 2510.20413).

    `null_norm_squared` is the squared norm of sum_i offset_i * grad log reference(y_i): what the policy can express
    itself is not to be explained by offsets [R]. The second term REWARDS large offsets, as in the authors' code, since
    small ones would leave DPO as it is: the offsets must be bounded (c * tanh), and this may be negative.
    """
    return null_coef * lift(null_norm_squared) - amplitude_coef * lift(offsets).square().mean()


def _log_odds(means: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(means)."""
    means = lift(means).clamp(max=MAX_MEAN_LOGPROB)
    return means - (-torch.expm1(means)).log()


def _given(logprobs: Tensor | None, name: str) -> Tensor:
    assert logprobs is not None, f"this loss needs Responses.{name}"
    return logprobs

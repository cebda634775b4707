"""Log-probabilities and entropy of the sampling distribution softmax(logits / temperature), always in fp32.

Policy, old policy and reference must all use the temperature that the response was sampled with: otherwise the KL and
the ratio compare distributions that nobody sampled from.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

# exp(-200) is 0 in fp32, so raising log-probabilities to this floor leaves every p * log p as it is.
_LOGPROB_FLOOR = -200.0


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """Log-probability [...] of each of `tokens` [...] (long) under `logits` [..., V] of the same position.

    The shift by one is the caller's: the logits that predict token t stand at position t - 1 of the model's output.
    """
    return _gather(_log_softmax(logits, temperature), tokens)


def entropy(logits: Tensor, *, temperature: float) -> Tensor:
    """Entropy [...] in nats of softmax(`logits` [..., V] / temperature); a logit of -inf contributes 0."""
    return _entropy(_log_softmax(logits, temperature))


def logprobs_and_entropy_from_hidden(
    hidden: Tensor, lm_head_weight: Tensor, tokens: Tensor, *, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` [N] and `entropy` [N] of linear(hidden, lm_head_weight), without ever holding [N, V] logits.

    hidden [N, D], lm_head_weight [V, D], tokens [N] (long). At most [chunk_size, V] logits exist at a time: each chunk
    is computed again in the backward pass. Select the response positions before flattening, so that no logits are spent
    on prompts and padding. The product runs in the weight's dtype; pass an fp32 weight for an fp32 head. The weight
    must still hold its values in the backward pass (under ZeRO-3: stay gathered until then).
    """
    return _ChunkedLogprobs.apply(hidden, lm_head_weight, tokens, temperature, chunk_size)  # type: ignore[return-value]


class _ChunkedLogprobs(torch.autograd.Function):
    """The gradients by hand: of z = logits / temperature with p = softmax(z), log p_t has e_t - p, and the entropy H
    has -p (log p + H). A few passes over each chunk's logits then do what autograd would do in many."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        parts = [
            (_gather(log_probs, own), -torch.linalg.vecdot(log_probs.exp(), log_probs))
            for log_probs, own in _chunks(hidden, weight, tokens, temperature, chunk_size)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is differentiated itself
            return (*_differentiable_slopes(hidden, weight, tokens, ctx.temperature, slopes), None, None, None)
        of_logprobs, of_entropies = slopes
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        start = 0
        for log_probs, own in _chunks(hidden, weight, tokens, ctx.temperature, ctx.chunk_size):
            part = slice(start, start + len(own))
            start += len(own)
            scale = torch.zeros_like(own, dtype=torch.float32) if of_logprobs is None else of_logprobs[part]
            scale = scale[:, None] / ctx.temperature
            if of_entropies is None:
                grad = log_probs.exp_().mul_(-scale)
            else:
                probs = log_probs.exp()
                entropies = -torch.linalg.vecdot(probs, log_probs)[:, None]
                # -p (log p + H) by the entropy's slope, and -p by that of the log-probability.
                grad = log_probs.add_(entropies).mul_(of_entropies[part, None] / -ctx.temperature)
                grad = grad.sub_(scale).mul_(probs)
            grad = grad.scatter_add_(1, own[:, None], scale).to(weight.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = (grad @ weight).to(hidden.dtype)
            if weight_grad is not None:
                weight_grad.addmm_(grad.T, hidden[part].to(weight.dtype))
        return hidden_grad, weight_grad, None, None, None


def _chunks(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities [chunk, V] and tokens [chunk], one chunk after the other."""
    for part, own in zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True):
        logits = linear(part.to(weight.dtype), weight).float()
        yield torch.log_softmax(logits if temperature == 1 else logits.div_(temperature), dim=-1), own


def _differentiable_slopes(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, slopes: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of hidden states and weight that autograd can differentiate, with all logits at once."""
    outputs = _chunk(hidden, tokens, weight, temperature)
    known = [(output, slope) for output, slope in zip(outputs, slopes, strict=True) if slope is not None]
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    slopes_of = [slope for _, slope in known]
    found = torch.autograd.grad([output for output, _ in known], inputs, slopes_of, create_graph=True)
    by_input = dict(zip(map(id, inputs), found, strict=True))
    return [by_input.get(id(tensor)) for tensor in (hidden, weight)]


def logprobs_and_kl_from_hidden(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor,
    ref_lm_head_weight: Tensor,
    *,
    temperature: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` [N] of the policy, and KL(reference || policy) [N] in nats over the whole vocabulary.

    As `logprobs_and_entropy_from_hidden`, with the reference's states [N, D] and output layer [V, D], which get no
    gradient. At most two tensors of [chunk_size, V] exist at a time.
    """
    fixed = (lm_head_weight, ref_lm_head_weight, temperature)
    chunks = [
        checkpoint(_kl_chunk, *chunk, *fixed, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden.split(chunk_size), tokens.split(chunk_size), ref_hidden.split(chunk_size), strict=True)
    ]
    logprobs, divergences = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(divergences)


def _kl_chunk(
    hidden: Tensor, tokens: Tensor, ref_hidden: Tensor, weight: Tensor, ref_weight: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    log_probs = _log_softmax(linear(hidden.to(weight.dtype), weight), temperature)
    with torch.no_grad():
        ref_log_probs = _log_softmax(linear(ref_hidden.to(ref_weight.dtype), ref_weight), temperature)
    gap = ref_log_probs.clamp(min=_LOGPROB_FLOOR) - log_probs.clamp(min=_LOGPROB_FLOOR)
    return _gather(log_probs, tokens), (ref_log_probs.exp() * gap).sum(dim=-1)


def _chunk(hidden: Tensor, tokens: Tensor, lm_head_weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_probs = _log_softmax(linear(hidden.to(lm_head_weight.dtype), lm_head_weight), temperature)
    return _gather(log_probs, tokens), _entropy(log_probs)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def _gather(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[..., None]).squeeze(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    # Without the floor, a forbidden token gives 0 * -inf = NaN here and in the gradient.
    return -(log_probs.exp() * log_probs.clamp(min=_LOGPROB_FLOOR)).sum(dim=-1)

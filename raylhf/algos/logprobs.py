"""Log-probabilities and entropy of the sampling distribution softmax(logits / temperature), always in fp32.

Policy, old policy and reference must all use the temperature that the response was sampled with: otherwise the KL and
the ratio compare distributions that nobody sampled from.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

# exp(-200) is 0 in fp32, so raising log-probabilities to this floor leaves every p * log p as it is.
_LOGPROB_FLOOR = -200.0
_CPU_BLOCK, _BLOCK = 2**20, 2**23
"""Elements of a chunk that are worked on at a time: what a CPU's cache holds; enough for all of a GPU."""


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

    hidden [N, D], lm_head_weight [V, D], tokens [N] (long). At most [chunk_size, V] logits exist at a time: the last
    chunk is kept for the backward pass, the others are computed again in it. Select the response positions before
    flattening, so that no logits are spent on prompts and padding. The product runs in the weight's dtype; pass an fp32
    weight for an fp32 head. The weight must still hold its values in the backward pass (under ZeRO-3: stay gathered
    until then).
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
        logprobs = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        for part in _parts(len(tokens), chunk_size):
            ctx.last = None  # before the next ones are there
            ctx.last = _log_probs(hidden[part], weight, temperature)
            logprobs[part] = _gather(ctx.last, tokens[part])
            _put_entropies(entropies[part], ctx.last)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens = ctx.saved_tensors
        last, ctx.last = ctx.last, None  # it is changed below: another backward pass computes its own
        if torch.is_grad_enabled():  # the gradient is differentiated itself
            del last
            return (*_differentiable_slopes(hidden, weight, tokens, ctx.temperature, slopes), None, None, None)
        of_logprobs, of_entropies = slopes
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in reversed(_parts(len(tokens), ctx.chunk_size)):  # the kept one goes first
            log_probs = _log_probs(hidden[part], weight, ctx.temperature) if last is None else last
            last = None
            own = tokens[part]
            scale = torch.zeros_like(own, dtype=torch.float32) if of_logprobs is None else of_logprobs[part]
            scale = scale[:, None] / ctx.temperature
            bonus = None if of_entropies is None else of_entropies[part, None] / -ctx.temperature
            _to_slopes(log_probs, scale, bonus)
            grad = log_probs.scatter_add_(1, own[:, None], scale).to(weight.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = (grad @ weight).to(hidden.dtype)
            if weight_grad is not None:
                weight_grad.addmm_(grad.T, hidden[part].to(weight.dtype))
            del log_probs, grad  # before the next ones are there
        return hidden_grad, weight_grad, None, None, None


def _put_entropies(entropies: Tensor, log_probs: Tensor) -> None:
    """Entropies [chunk] of log_probs [chunk, V]."""
    for rows in _blocks(log_probs):
        block = log_probs[rows]
        entropies[rows] = -torch.linalg.vecdot(block.exp(), block)


def _to_slopes(log_probs: Tensor, scale: Tensor, bonus: Tensor | None) -> None:
    """Make of log_probs [chunk, V], in place, the gradient of the logits but for the token's own: -p by the slope of
    the log-probability (`scale` [chunk, 1]), and p (log p + H) by `bonus` [chunk, 1], minus the entropy's."""
    for rows in _blocks(log_probs):
        block = log_probs[rows]
        if bonus is None:
            block.exp_().mul_(-scale[rows])
            continue
        probs = block.exp()
        entropies = -torch.linalg.vecdot(probs, block)[:, None]
        block.add_(entropies).mul_(bonus[rows]).sub_(scale[rows]).mul_(probs)


def _log_probs(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Of one chunk, in float32 [chunk, V]."""
    logits = linear(hidden.to(weight.dtype), weight).float()
    for rows in _blocks(logits):
        block = logits[rows]
        block.copy_(torch.log_softmax(block if temperature == 1 else block.div_(temperature), dim=-1))
    return logits


def _parts(length: int, size: int) -> list[slice]:
    """Slices of `size`; an empty one if there is nothing."""
    return [slice(start, start + size) for start in range(0, max(length, 1), size)]


def _blocks(chunk: Tensor) -> list[slice]:
    """Rows of a chunk [N, V] that are worked on at a time: what is made on the way is small, and soon free again."""
    size = _CPU_BLOCK if chunk.device.type == "cpu" else _BLOCK
    return _parts(len(chunk), max(1, size // chunk.shape[1]))


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
    gradient. About six tensors of [chunk_size, V] exist at a time.
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

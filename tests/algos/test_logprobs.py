import math

import pytest
import torch

from raylhf.algos.logprobs import entropy, logprobs_and_entropy_from_hidden, token_logprobs


def test_token_logprobs_of_a_worked_softmax():
    # softmax(0, log 3) = (1/4, 3/4)
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, math.log(3.0)]]])
    logprobs = token_logprobs(logits, torch.tensor([[0, 1]]), temperature=1.0)
    torch.testing.assert_close(logprobs, torch.tensor([[math.log(0.25), math.log(0.75)]]))


def test_temperature_divides_the_logits():
    # At temperature 1/2 the odds 3 : 1 become 9 : 1.
    logits = torch.tensor([0.0, math.log(3.0)])
    torch.testing.assert_close(
        token_logprobs(logits, torch.tensor(1), temperature=0.5).item(), math.log(0.9), atol=1e-6, rtol=0
    )
    expected = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    torch.testing.assert_close(entropy(logits, temperature=0.5).item(), expected, atol=1e-6, rtol=0)


def test_bf16_logits_are_normalised_in_fp32():
    logits = torch.randn(3, 50).bfloat16()
    logprobs = token_logprobs(logits, torch.tensor([1, 2, 3]), temperature=0.7)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, token_logprobs(logits.float(), torch.tensor([1, 2, 3]), temperature=0.7))


def test_entropy_of_a_four_token_vocabulary():
    # Worked by an independent numpy program.
    assert entropy(torch.tensor([2.0, 1.0, 0.0, -1.0]), temperature=1.0).item() == pytest.approx(0.947537, abs=1e-6)


def test_forbidden_tokens_leave_entropy_and_its_gradient_finite():
    logits = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    result = entropy(logits, temperature=1.0)
    result.backward()
    torch.testing.assert_close(result.item(), math.log(2.0))
    torch.testing.assert_close(logits.grad, torch.zeros(3))


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("trains_hidden", [True, False])
def test_chunked_head_equals_full_logits_including_gradients(chunk_size, trains_hidden):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(7, 4), torch.randn(11, 4), torch.randint(11, (7,))

    def run(compute):
        leaves = hidden.clone().requires_grad_(trains_hidden), weight.clone().requires_grad_()
        logprobs, entropies = compute(*leaves)
        (logprobs.square().sum() + 0.3 * entropies.sum()).backward()
        return logprobs, entropies, leaves[0].grad, leaves[1].grad

    def full(hidden, weight):
        logits = hidden @ weight.T
        return token_logprobs(logits, tokens, temperature=0.7), entropy(logits, temperature=0.7)

    def chunked(hidden, weight):
        return logprobs_and_entropy_from_hidden(hidden, weight, tokens, temperature=0.7, chunk_size=chunk_size)

    torch.testing.assert_close(run(chunked), run(full))


def test_chunked_head_saves_no_logits_for_the_backward_pass():
    saved_sizes = []
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved_sizes.append(t.numel()) or t, lambda t: t):
        tokens = torch.zeros(64, dtype=torch.long)
        logprobs_and_entropy_from_hidden(hidden, weight, tokens, temperature=1.0, chunk_size=8)
    assert max(saved_sizes, default=0) <= weight.numel() < 8 * 1000


def test_chunked_head_of_no_tokens_is_empty_and_still_differentiable():
    weight = torch.randn(5, 4, requires_grad=True)
    tokens = torch.zeros(0, dtype=torch.long)
    logprobs, entropies = logprobs_and_entropy_from_hidden(
        torch.zeros(0, 4), weight, tokens, temperature=1.0, chunk_size=8
    )
    (weight_gradient,) = torch.autograd.grad(logprobs.sum() + entropies.sum(), weight)
    assert logprobs.shape == entropies.shape == (0,)
    assert (weight_gradient == 0).all()


def test_chunked_head_runs_in_the_dtype_of_its_weight():
    hidden, weight, tokens = torch.randn(4, 8).bfloat16(), torch.randn(16, 8), torch.arange(4)
    logprobs, _ = logprobs_and_entropy_from_hidden(hidden, weight, tokens, temperature=1.0, chunk_size=2)
    torch.testing.assert_close(logprobs, token_logprobs(hidden.float() @ weight.T, tokens, temperature=1.0))

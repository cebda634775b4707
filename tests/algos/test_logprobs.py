import gc
import math

import pytest
import torch

from raylhf.algos import logprobs as logprobs_module
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
@pytest.mark.parametrize("block_rows", [1, 2, 100])
@pytest.mark.parametrize(("by_logprob", "by_entropy"), [(1.0, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_chunked_head_equals_full_logits_including_gradients(
    chunk_size, trains_hidden, block_rows, by_logprob, by_entropy, monkeypatch
):
    monkeypatch.setattr(logprobs_module, "_CPU_BLOCK", 11 * block_rows)
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(7, 4), torch.randn(11, 4), torch.randint(11, (7,))

    def run(compute):
        leaves = hidden.clone().requires_grad_(trains_hidden), weight.clone().requires_grad_()
        logprobs, entropies = compute(*leaves)
        loss = torch.zeros(())
        if by_logprob:
            loss = loss + by_logprob * logprobs.square().sum()
        if by_entropy:
            loss = loss + by_entropy * entropies.sum()
        loss.backward()
        return logprobs, entropies, leaves[0].grad, leaves[1].grad

    def full(hidden, weight):
        logits = hidden @ weight.T
        return token_logprobs(logits, tokens, temperature=0.7), entropy(logits, temperature=0.7)

    def chunked(hidden, weight):
        return logprobs_and_entropy_from_hidden(hidden, weight, tokens, temperature=0.7, chunk_size=chunk_size)

    torch.testing.assert_close(run(chunked), run(full))


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_gradients_in_bfloat16_are_those_of_float32_up_to_its_rounding(chunk_size):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(7, 4).bfloat16(), torch.randn(11, 4).bfloat16(), torch.randint(11, (7,))

    def gradients(dtype):
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in (hidden, weight)]
        results = logprobs_and_entropy_from_hidden(leaves[0], leaves[1], tokens, temperature=0.7, chunk_size=chunk_size)
        return [slope.float() for slope in torch.autograd.grad(torch.cat(results).sum(), leaves)]

    torch.testing.assert_close(gradients(torch.bfloat16), gradients(torch.float32), rtol=0.02, atol=0.05)


def test_a_second_backward_pass_computes_its_own_logits():
    # The first one makes gradients of the kept ones, in their place.
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4), torch.randint(11, (5,))
    logprobs, entropies = logprobs_and_entropy_from_hidden(hidden, weight, tokens, temperature=0.7, chunk_size=3)
    loss = logprobs.square().sum() + entropies.sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(second, first)


def test_chunked_head_holds_one_chunk_of_logits_at_a_time(monkeypatch):
    def chunks_alive() -> int:
        tensors = (each for each in gc.get_objects() if type(each) is torch.Tensor)
        return len({each.untyped_storage().data_ptr() for each in tensors if each.shape[1:] == (1000,)})

    def watched(*args):
        before.append(chunks_alive())
        return make(*args)

    before: list[int] = []
    make = logprobs_module._log_probs
    monkeypatch.setattr(logprobs_module, "_log_probs", watched)
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    tokens = torch.zeros(64, dtype=torch.long)
    results = logprobs_and_entropy_from_hidden(hidden, weight, tokens, temperature=1.0, chunk_size=8)
    assert chunks_alive() == 1  # for the backward pass
    torch.cat(results).sum().backward()
    assert chunks_alive() == 0
    assert before == [0] * (8 + 7)
    with torch.no_grad():
        results = logprobs_and_entropy_from_hidden(hidden, weight, tokens, temperature=1.0, chunk_size=8)
    assert chunks_alive() == 0


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

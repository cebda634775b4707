import torch

from raylhf.algos.masking import (
    last_response_index,
    lengths_to_mask,
    mask_out,
    masked_mean,
    masked_moments,
    masked_sum,
    mean_and_std,
)


def test_mask_is_true_at_the_first_length_positions():
    mask = lengths_to_mask(torch.tensor([2, 0, 3]), 3)
    assert mask.tolist() == [[True, True, False], [False, False, False], [True, True, True]]


def test_nan_outside_the_mask_reaches_neither_sum_nor_gradient():
    values = torch.tensor([[1.0, float("nan")], [3.0, float("inf")]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    total = masked_sum(values.square(), mask)
    assert total.item() == 10.0
    assert masked_mean(values, mask).item() == 2.0
    (gradient,) = torch.autograd.grad(masked_sum(mask_out(values, mask).square(), mask), values)
    assert gradient.tolist() == [[2.0, 0.0], [6.0, 0.0]]


def test_mean_of_an_empty_mask_is_zero():
    assert masked_mean(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


def test_bf16_is_summed_in_fp32():
    # In bf16 1024 + 1 is 1024.
    total = masked_sum(torch.tensor([1024.0, 1.0], dtype=torch.bfloat16), torch.ones(2, dtype=torch.bool))
    assert total.dtype == torch.float32 and total.item() == 1025.0


def test_last_response_index_skips_holes_and_padding_and_is_minus_one_for_an_empty_row():
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert last_response_index(mask).tolist() == [3, -1, 0, 4]


def test_moments_of_parts_add_up_to_the_whole():
    values, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.7
    parts = masked_moments(values[:2], mask[:2]) + masked_moments(values[2:], mask[2:])
    torch.testing.assert_close(parts, masked_moments(values, mask))


def test_mean_and_std_are_those_of_the_population():
    # (1, 3, 5, 7): mean 4, squared distances 9 + 1 + 1 + 9 = 20, variance 20 / 4 = 5.
    values = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("nan"), 7.0]])
    mean, std = mean_and_std(masked_moments(values, ~values.isnan()))
    assert mean.item() == 4.0
    torch.testing.assert_close(std.item(), 5**0.5)


def test_std_survives_a_mean_a_million_times_larger():
    values = torch.tensor([1_000_000.0, 1_000_001.0])
    _, std = mean_and_std(masked_moments(values, torch.ones(2, dtype=torch.bool)))
    torch.testing.assert_close(std.item(), 0.5)


def test_moments_of_nothing_give_mean_and_std_zero():
    mean, std = mean_and_std(masked_moments(torch.ones(3), torch.zeros(3, dtype=torch.bool)))
    assert (mean.item(), std.item()) == (0.0, 0.0)

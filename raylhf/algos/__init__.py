"""The mathematics of RLHF as pure functions of tensors: no I/O, no settings objects, no collectives.

Home shape: [B, T] over response positions, where index t is the t-th token of a right-padded response and
`response_mask` [B, T] (bool) is True at the tokens that the policy sampled. What stands outside the mask may be
anything, NaN included: it reaches no result and no gradient. Floating-point results are fp32 unless stated otherwise.

Losses divide by a `denominator` that the caller has summed over every micro-batch and rank of the optimizer step, so a
loss does not depend on how the batch was cut. Metrics are likewise returned as sums over local tokens, to be summed
over ranks and divided by the global number of response tokens; a key that ends in `_max` is a maximum.
"""

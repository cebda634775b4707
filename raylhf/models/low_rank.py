"""What an adapter adds to a weight, computed in one place: the learner and the rollout engine must agree to the bit."""

from torch import Tensor


def with_update(base: Tensor, low_a: Tensor, low_b: Tensor, *, scaling: float) -> Tensor:
    """`base` [out, in] + scaling * low_b [out, r] @ low_a [r, in], in the type of `base`.

    Added in float32: bfloat16 would round small updates away.
    """
    update = low_b.float() @ low_a.float()
    return (base.float() + scaling * update).to(base.dtype)

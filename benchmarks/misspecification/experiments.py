"""Two controlled problems: training on a mix of two groups of prompts and testing on one; and wrong labels."""

from collections.abc import Callable

import torch
from misspecification.linear import (
    WIDTH,
    BatchLoss,
    beta_dpo,
    cdpo,
    dpo,
    dr_dpo,
    features,
    judged,
    kldpo,
    objective,
    reward,
    robust_dpo,
    train,
    wdpo,
)
from torch import Tensor

from raylhf.algos.preference import dpo_loss

Makers = dict[str, Callable[[], BatchLoss]]
SHARE_OF_RARE = 0.2
"""Of the training prompts, in the problem of a shift; the test prompts are all of the rare kind."""
NUM_TRAIN, NUM_TEST = 1000, 2000
NUM_NOISY = 400
"""Training pairs in the problem of wrong labels."""
SCALE = 0.6
"""Standard deviation of a reward weight: rewards have a deviation of about 2."""

SHIFT: Makers = {
    "DPO": dpo,
    "DPO, beta 1.25": lambda: dpo(1.25),
    "DPO, beta 2": lambda: dpo(2.0),
    "KLDPO, temperature 4": lambda: kldpo(4.0),
    "KLDPO, temperature 1": lambda: kldpo(1.0),
    "KLDPO, temperature 0.25": lambda: kldpo(0.25),
    "WDPO, rho 0.03": lambda: wdpo(0.03),
    "WDPO, rho 0.1": lambda: wdpo(0.1),
    "WDPO, rho 0.3": lambda: wdpo(0.3),
}


def noise_methods(noise: float) -> Makers:
    """cDPO and robust DPO are told how many labels are wrong; so is a DPO whose beta makes up for their damping."""
    return {
        "DPO": dpo,
        "DPO, beta (1 - 2 noise)": lambda: dpo(1 - 2 * noise),
        "cDPO": lambda: cdpo(noise),
        "robust DPO": lambda: robust_dpo(noise),
        "Dr. DPO, temperature 2": lambda: dr_dpo(2.0),
        "Dr. DPO, temperature 1": lambda: dr_dpo(1.0),
        "beta-DPO, filter only": lambda: beta_dpo(0.0, 0.2),
        "beta-DPO, beta only": lambda: beta_dpo(0.6, 0.0),
        "beta-DPO": lambda: beta_dpo(0.6, 0.2),
    }


def shift(seed: int) -> dict[str, dict[str, float]]:
    """By method: on the rare group and on the common one, the loss on new judgements and the policy's value.

    The groups' reward weights have a half in common.
    """
    generator = torch.Generator().manual_seed(seed)
    shared, *own = (SCALE * 0.5**0.5 * _normal(WIDTH, generator) for _ in range(3))
    groups = dict(zip(("common", "rare"), (shared + own[0], shared + own[1]), strict=True))
    num_rare = int(SHARE_OF_RARE * NUM_TRAIN)
    counts = {"common": NUM_TRAIN - num_rare, "rare": num_rare}
    parts = [judged(features(counts[name], generator), weights, 0.0, generator) for name, weights in groups.items()]
    tests = {name: features(NUM_TEST, generator) for name in groups}
    new = {name: judged(tests[name], weights, 0.0, generator) for name, weights in groups.items()}
    results = {}
    for name, make in SHIFT.items():
        theta = train(make(), torch.cat(parts), torch.Generator().manual_seed(seed))
        results[name] = {
            f"{group}_{key}": value
            for group, weights in groups.items()
            for key, value in {
                "loss": float(dpo_loss(new[group] @ theta, beta=1.0).mean()),
                "reward": reward(theta, tests[group], weights),
                "objective": objective(theta, tests[group], weights),
            }.items()
        }
    return results


def noise(seed: int, share: float) -> dict[str, dict[str, float]]:
    """By method: reward, objective and accuracy on new prompts, trained on labels of which `share` are flipped."""
    generator = torch.Generator().manual_seed(seed)
    weights = SCALE * _normal(WIDTH, generator)
    pairs = judged(features(NUM_NOISY, generator), weights, share, generator)
    tests = features(NUM_TEST, generator)
    gaps = tests[:, 0] - tests[:, 1]
    results = {}
    for name, make in noise_methods(share).items():
        theta = train(make(), pairs, torch.Generator().manual_seed(seed))
        results[name] = {
            "reward": reward(theta, tests, weights),
            "objective": objective(theta, tests, weights),
            "accuracy": float(((gaps @ theta > 0) == (gaps @ weights > 0)).double().mean()),
        }
    return results


def _normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=generator)

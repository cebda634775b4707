"""The rows of the table: what is trained on what, and where it must end."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from closed_form import optima, stored
from closed_form.enumerable import BETA, CHOSEN, REJECTED, divergence
from closed_form.optima import Optimum
from closed_form.stored import Data
from closed_form.training import Run, Settings, train_on_rollouts, train_on_stored

NOISE = 0.2
"""Share of flipped labels in the rows with noise."""
PAIRS_DRAWN, PAIRS_EXACT = "stored pairs, labels drawn", "stored pairs, probabilities"


@dataclass(frozen=True)
class Method:
    """One row."""

    data: str
    """What it learns from, in words."""
    train: Callable[..., Run]
    """Takes `seed`."""
    optimum: Optimum
    """Where it must end."""
    ends: str = "pi*"
    """The same in words."""


@dataclass(frozen=True)
class Limit:
    """A row without a finite optimum: how far it has gone after each third of its steps."""

    data: str
    train: Callable[..., Run]
    measure: Callable[[Run], list[float]]
    """One number after each third."""
    says: str
    """What the number is, and what it tends to."""


def _ppo(advantage: str, group_size: int) -> Callable[..., Run]:
    critic = {"critic": {"trunk": "shared", "lr": 3e-2, "value_clip_eps": None}} if advantage == "gae" else {}
    objective = {"advantage": advantage, "kl": {"coef": BETA}, "gae_lambda": 1.0, "num_epochs": 2, **critic}
    return partial(train_on_rollouts, objective, num_steps=100, batch=256, group_size=group_size)


def _online(
    group_size: int,
    *,
    pairs: str = "best_worst",
    loss: str = "dpo",
    num_steps: int = 300,
    is_noisy: bool = True,
    **pairing: Any,
) -> Callable[..., Run]:
    chosen = {"kind": pairs, **pairing}
    objective: Settings = {"kind": "online_dpo", "loss": {"kind": loss, "beta": BETA}, "pairs": chosen}
    return partial(
        train_on_rollouts, objective, num_steps=num_steps, batch=256, group_size=group_size, is_noisy=is_noisy
    )


def _stored(kind: str, data: Data, *, num_steps: int = 150, batch_size: int = 1, **settings: Any) -> Callable[..., Run]:
    loss = {"kind": kind, "beta": BETA, **settings}
    return partial(train_on_stored, loss, data, num_steps=num_steps, batch_size=batch_size)


def _pairs(kind: str, optimum: Optimum = optima.kl_regularised, ends: str = "pi*", **settings: Any) -> Method:
    """A loss on pairs whose labels are drawn by Bradley-Terry."""
    return Method(PAIRS_DRAWN, _stored(kind, stored.drawn(), **settings), optimum, ends)


def _flipped(kind: str, optimum: Optimum, ends: str, **settings: Any) -> Method:
    data = _stored(kind, stored.drawn(NOISE), **settings)
    return Method(f"{PAIRS_DRAWN}, {NOISE:.0%} flipped", data, optimum, ends)


GUMBEL = "the policy's own responses, score + Gumbel noise"
TARGETS: dict[str, Method] = {
    "PPO (GAE)": Method("the policy's own responses", _ppo("gae", 1), optima.kl_regularised),
    "REINFORCE++": Method("the policy's own responses", _ppo("reinforce_pp", 1), optima.kl_regularised),
    "RLOO": Method("groups of 8", _ppo("rloo", 8), optima.kl_regularised),
    "GRPO": Method("groups of 8", _ppo("grpo", 8), optima.kl_regularised),
    "Dr. GRPO": Method("groups of 8", _ppo("dr_grpo", 8), optima.kl_regularised),
    "online DPO, k = 2": Method(GUMBEL, _online(2), optima.kl_regularised),
    "online DPO, k = 8, all pairs": Method(GUMBEL, _online(8, pairs="all_pairs"), optima.kl_regularised),
    "online cDPO, k = 8, soft labels": Method(
        "the policy's own responses, scores as they are",
        _online(8, pairs="all_pairs", loss="cdpo", is_noisy=False, soft_labels=True),
        optima.kl_regularised,
    ),
    "online Plackett-Luce DPO, k = 8": Method(GUMBEL, _online(8, loss="plackett_luce"), optima.kl_regularised),
    "DPO": _pairs("dpo"),
    "DPO with soft labels (cDPO with `agreement`)": Method(
        PAIRS_EXACT, _stored("cdpo", stored.probabilities), optima.kl_regularised
    ),
    "beta-DPO, sensitivity 0, filter_share 0": _pairs("beta_dpo", sensitivity=0.0, filter_share=0.0),
    "NS-DPO, gamma 0.99": _pairs("ns_dpo", gamma=0.99),
    "Plackett-Luce DPO": Method(
        "stored rankings of 8, drawn", _stored("plackett_luce", stored.rankings, batch_size=32), optima.kl_regularised
    ),
    "robust DPO, label_noise 0.2": _flipped("robust_dpo", optima.kl_regularised, "pi*", label_noise=NOISE),
}
"""What targets the KL-regularised optimum."""

OWN: dict[str, Method] = {
    "DPO on noisy labels": _flipped("dpo", optima.smoothed(NOISE, 0.0), "the fit to the flipped labels"),
    "cDPO, label_smoothing 0.2": _flipped(
        "cdpo", optima.smoothed(NOISE, NOISE), "the fit to labels flipped twice", label_smoothing=NOISE
    ),
    "IPO, beta 0.2": _pairs("ipo", optima.ipo(0.2), "a linear system", beta=0.2),
    "SimPO, beta 10, gamma 1": _pairs("simpo", optima.simpo(10.0, 1.0), "a convex fit without a reference", beta=10.0),
    "alpha-DPO, alpha 0, beta 10, gamma_ratio 0.1": _pairs(
        "alpha_dpo", optima.simpo(10.0, 1.0), "SimPO's", beta=10.0, gamma_ratio=0.1, alpha=0.0
    ),
    "TDPO1": _pairs("tdpo1", optima.tdpo1, "first tokens by their plain value"),
    "TDPO2, alpha 0.5": _pairs("tdpo2", optima.tdpo2(0.5), "the root of its mean update", alpha=0.5),
    "KLDPO, temperature 1": _pairs("kldpo", optima.tempered(1.0), "pi* of beta (1 + 1/temperature)", temperature=1.0),
    "Dr. DPO, temperature 4": _pairs(
        "dr_dpo", optima.tempered(-4.0), "pi* of beta (1 - 1/temperature)", temperature=4.0
    ),
    "MODPO, weight 0.6": Method(
        "stored pairs, labels drawn by r; a second reward",
        _stored("modpo", stored.drawn(second_reward=True), weight=0.6, other_weights={"other": 0.4}),
        optima.modpo(0.6),
        "pi* of 0.6 r + 0.4 other",
    ),
}
"""What has another known optimum."""


def divergence_from_reference(run: Run) -> list[float]:
    """KL(pi || pi_ref) in nats."""
    return [divergence(policy, run.problem.reference) for policy in run.policies]


def margin(run: Run) -> list[float]:
    """Mean log-probability of the better response minus that of the worse one, a response, over all pairs."""
    better = torch.from_numpy(np.flatnonzero(run.problem.preference().numpy() > 0.5))
    return [(policy[CHOSEN[better]] - policy[REJECTED[better]]).mean().item() for policy in run.policies]


def bad_mass(run: Run) -> list[float]:
    """Probability of the responses that are judged good in less than half of the judgements."""
    is_bad = torch.from_numpy(stored.good_share(run.problem) < 0.5)
    return [policy.exp()[is_bad].sum().item() for policy in run.policies]


LIMITS: dict[str, Limit] = {
    "online DPO, k = 2, no noise": Limit(
        "the policy's own responses, the better score wins",
        _online(2, num_steps=150, is_noisy=False),
        divergence_from_reference,
        "KL to the reference; pi* has {optimum:.2f}. It grows as long as two responses are sampled",
    ),
    "DPO, sure labels": Limit(
        "stored pairs, the better reward wins",
        _stored("dpo", stored.sure_labels),
        divergence_from_reference,
        "KL to the reference; pi* has {optimum:.2f}. Its limit is all mass on one response",
    ),
    "SimPO, sure labels": Limit(
        "stored pairs, the better reward wins",
        _stored("simpo", stored.sure_labels),
        margin,
        "log-probability gap of a pair in nats, unbounded: no KL anchor",
    ),
    "KTO": Limit(
        "stored good and bad responses, drawn",
        _stored("kto", stored.good_or_bad, batch_size=2),
        bad_mass,
        "mass on what is good less than half of the time; the loss is linear in the share of good judgements: limit 0",
    ),
}
"""What has no finite optimum here."""


def outcome(task: tuple[str, int]) -> dict[str, Any]:
    """Train one row with one seed, (name, seed); the numbers of its line."""
    name, seed = task
    if name in LIMITS:
        run = LIMITS[name].train(seed=seed)
        of_optimum = divergence(run.problem.optimum, run.problem.reference)
        return {"measured": LIMITS[name].measure(run), "optimum_to_reference": of_optimum}
    method = (TARGETS | OWN)[name]
    run = method.train(seed=seed)
    ends = method.optimum(run.problem)
    return {
        "start": divergence(run.problem.reference, ends),
        "to_own": divergence(run.final, ends),
        "to_pi_star": divergence(run.final, run.problem.optimum),
        "own_to_pi_star": divergence(ends, run.problem.optimum),
    }

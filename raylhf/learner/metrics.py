"""The learner's metrics, from sums over all ranks (docs/metrics.md explains each)."""

import math
from collections.abc import Mapping

import torch

from raylhf.algos.diagnostics import mismatch_sums
from raylhf.algos.kl import count_clamped, kl_per_token
from raylhf.algos.masking import mask_out, masked_sum
from raylhf.algos.ppo import truncated_importance_weights
from raylhf.learner.experience import Experience
from raylhf.learner.totals import Totals

_MAXIMA = ("ratio_max", "grad_norm", "critic_grad_norm", "lr", "critic_lr")


def collect_minibatch(totals: Totals, reduced: Mapping[str, float]) -> None:
    """Fold one minibatch's numbers, global already, into the step's; they are not reduced again."""
    is_first = not totals.local()
    totals.add(**{key: value for key, value in reduced.items() if key not in _MAXIMA}, optimizer_steps=1)
    totals.raise_to(**{key: value for key, value in reduced.items() if key in _MAXIMA})
    if is_first and "log_ratio" in reduced:
        totals.add(first_ratio_error=math.expm1(reduced["log_ratio"] / reduced["tokens"]))


def update_metrics(totals: Totals) -> dict[str, float]:
    """The step's metrics from its global sums and maxima; the policy's are missing while the critic warms up alone."""
    sums = totals.local()
    if not sums:
        return {}
    tokens, steps = sums["tokens"], sums["optimizer_steps"]
    metrics: dict[str, float] = {}
    if "loss" in sums:
        metrics |= {
            "policy/loss": sums["loss"] / steps,
            "policy/clip_frac": sums["clip_frac"] / tokens,
            "policy/approx_kl": sums["approx_kl"] / tokens,
            "policy/ratio_mean": sums["ratio_sum"] / tokens,
            "policy/ratio_max": sums["ratio_max"],
            "policy/entropy": sums["entropy"] / tokens,
            "policy/grad_norm": sums["grad_norm"],
            "policy/lr": sums["lr"],
        }
    if "first_ratio_error" in sums:
        metrics["policy/first_ratio_error"] = sums["first_ratio_error"]
    if "critic_loss" in sums:
        metrics |= {
            "critic/loss": sums["critic_loss"] / steps,
            "critic/clip_frac": sums["critic_clip_frac"] / tokens,
            "critic/lr": sums["critic_lr"],
        }
    if "critic_grad_norm" in sums:
        metrics["critic/grad_norm"] = sums["critic_grad_norm"]
    return metrics


def experience_metrics(
    x: Experience, *, kl_coef: float | None, importance_cap: float | None, device: torch.device
) -> dict[str, float]:
    """What the batch looked like before it was trained on, over all ranks; `kl_coef` is None without a KL penalty."""
    mask, totals = x.response_mask, Totals(device)
    counted = mask.any(dim=1)
    sequence_kl = x.sequence_kl()
    k3 = kl_per_token(x.old_logprobs, x.ref_logprobs, estimator="k3")
    mismatch = mismatch_sums(x.old_logprobs, x.rollout_logprobs, mask)
    totals.add(
        tokens=mask.sum(),
        sequences=counted.sum(),
        dropped=(~counted).sum(),
        kl=sequence_kl.sum(),
        k3=masked_sum(k3, mask),
        clamped=count_clamped(x.old_logprobs, x.ref_logprobs, mask),
        abs_dlogp=mismatch["abs_dlogp"],
        mismatch_kl=mismatch["kl"],
        scores=mask_out(x.scores, counted).sum(),
    )
    totals.raise_to(mismatch_ratio_max=mismatch["ratio_max"])
    if importance_cap is not None:
        _, capped = truncated_importance_weights(x.old_logprobs, x.rollout_logprobs, mask, cap=importance_cap)
        totals.add(capped=capped["tis_cap_frac"])
    sums = totals.reduced()
    tokens, sequences = max(sums["tokens"], 1), max(sums["sequences"], 1)
    kl = sums["kl"] / sequences
    metrics = {
        "policy/kl_to_ref": kl,
        "policy/kl_to_ref_per_token": sums["kl"] / tokens,
        "policy/kl_to_ref_k3": sums["k3"] / sequences,
        "policy/log_ratio_clamp_frac": sums["clamped"] / tokens,
        "mismatch/abs_dlogprob_mean": sums["abs_dlogp"] / tokens,
        "mismatch/kl": sums["mismatch_kl"] / tokens,
        "mismatch/ratio_max": sums["mismatch_ratio_max"],
        "data/dropped_responses_count": sums["dropped"],
    }
    if kl_coef is not None:
        metrics["kl/coef"] = kl_coef
        metrics["kl/penalty_mean"] = kl_coef * kl
        metrics["reward/total_mean"] = sums["scores"] / sequences - kl_coef * kl
    if importance_cap is not None:
        metrics["mismatch/capped_frac"] = sums["capped"] / tokens
    return metrics

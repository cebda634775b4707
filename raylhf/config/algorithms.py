"""Every optimisation method: paper, formula, where its defaults come from, and what it needs of data and models.

`raylhf algorithms` prints this table and docs/algorithms.md holds it.
"""

from dataclasses import dataclass
from enum import StrEnum


class Need(StrEnum):
    """What a method needs beyond the log-probabilities of the responses under the policy; checked before a start."""

    REFERENCE = "the reference's log-probabilities"
    GUIDE = "a third model's log-probabilities"
    REFERENCE_PROMPTS = "the reference under two other prompts"
    FULL_VOCABULARY_KL = "the KL over the whole vocabulary"
    DOUBLE_BACKWARD = "a gradient of a gradient"
    PER_SAMPLE_GRADIENTS = "gradients of single responses"
    BATCH_STATISTICS = "statistics of the whole batch before the loss"
    TIME = "the time of each pair"
    REWARD_GAPS = "rewards of both responses of each pair"
    STABLE_INDEX = "pairs that come again"
    CRITIC = "a value function"
    GROUP = "two or more responses to a prompt"
    REWARD_VECTOR = "a reward with several values"


@dataclass(frozen=True)
class Algorithm:
    """One method."""

    title: str
    paper: str
    """arXiv identifier, or where else it is published."""
    formula: str
    """What is minimised for a pair (or as said); D is the gap of log-ratios to the reference, chosen minus rejected,
    and d the gap of the policy's mean log-probabilities."""
    function: str
    """The function that computes it, below raylhf.algos."""
    defaults: str
    """Where the default settings come from."""
    needs: frozenset[Need] = frozenset()


def _pair(title: str, paper: str, formula: str, function: str, defaults: str, *needs: Need) -> Algorithm:
    """A loss that compares with the reference."""
    return Algorithm(title, paper, formula, function, defaults, frozenset({Need.REFERENCE, *needs}))


def _free(title: str, paper: str, formula: str, function: str, defaults: str) -> Algorithm:
    """A loss without a reference."""
    return Algorithm(title, paper, formula, function, defaults)


LOSSES: dict[str, Algorithm] = {
    "dpo": _pair("DPO", "2305.18290", "-log sigmoid(beta D)", "preference.dpo_loss", "the paper"),
    "cdpo": _pair(
        "Conservative DPO",
        "Mitchell 2023, ericmitchell.ai/cdpo.pdf",
        "-(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D)",
        "preference.cdpo_loss",
        "the note",
    ),
    "robust_dpo": _pair(
        "Robust DPO (rDPO)",
        "2403.00409",
        "(-(1 - eps) log sigmoid(beta D) + eps log sigmoid(-beta D)) / (1 - 2 eps)",
        "preference.robust_dpo_loss",
        "the paper",
    ),
    "ipo": _pair(
        "IPO", "2310.12036", "(D' - 1 / (2 beta))^2, D' of mean log-ratios", "preference.ipo_loss", "HALOs and TRL"
    ),
    "simpo": _free(
        "SimPO", "2405.14734", "-log sigmoid(beta d - gamma)", "preference.simpo_loss", "the paper (Mistral-Base)"
    ),
    "orpo": _free(
        "ORPO", "2403.07691", "NLL + lambda * -log sigmoid(logit P_w - logit P_l)", "preference.orpo_loss", "the paper"
    ),
    "kto": _pair(
        "KTO",
        "2402.01306",
        "good: w_D (1 - sigmoid(beta (rho - z))); bad: w_U (1 - sigmoid(beta (z - rho))); z = max(0, KL estimate)",
        "preference.kto_loss",
        "TRL",
        Need.BATCH_STATISTICS,
    ),
    "beta_dpo": _pair(
        "beta-DPO",
        "2407.08639",
        "-log sigmoid(beta' D), beta' = beta (1 + a (mean D - M)), outliers of D left out",
        "preference_robust.beta_dpo_beta, preference_robust.beta_dpo_keep",
        "the released code",
        Need.BATCH_STATISTICS,
    ),
    "alpha_dpo": _pair(
        "alpha-DPO",
        "2410.10148",
        "-log sigmoid(beta (d - gamma/beta - alpha z)), z the standardised gap of mean log-ratios",
        "preference_robust.alpha_dpo_loss",
        "the released code (Llama-3-8B-Instruct v0.2)",
        Need.BATCH_STATISTICS,
    ),
    "tdpo1": _pair(
        "TDPO1",
        "2404.11999",
        "-log sigmoid(beta (D - (K_l - K_w))), K the forward KL along the response",
        "preference.tdpo1_loss",
        "the released code",
        Need.FULL_VOCABULARY_KL,
    ),
    "tdpo2": _pair(
        "TDPO2",
        "2404.11999",
        "-log sigmoid(beta (D - alpha (K_l - sg K_w)))",
        "preference.tdpo2_loss",
        "the released code",
        Need.FULL_VOCABULARY_KL,
    ),
    "tgdpo": _pair(
        "TGDPO",
        "2506.14574",
        "DPO with token weights 1 + alpha r (chosen), 1 - alpha r (rejected), r the guide's log-ratio times beta",
        "preference.tgdpo_loss",
        "the released code",
        Need.GUIDE,
    ),
    "t_reg": _pair(
        "T-REG",
        "2412.02685",
        "DPO + alpha sigmoid(r_l - r_w) times the likelihood of tokens that contrastive prompts prefer",
        "preference.treg_loss",
        "the paper",
        Need.REFERENCE_PROMPTS,
    ),
    "step_dpo": _pair(
        "Step-DPO", "2406.18629", "DPO on the first step that differs", "preference.dpo_loss", "the paper (7B)"
    ),
    "wdpo": _pair(
        "WDPO",
        "2502.01930",
        "DPO + rho times the squared gradient in the input embeddings",
        "preference_robust.wdpo_penalty",
        "the released code",
        Need.DOUBLE_BACKWARD,
    ),
    "kldpo": _pair(
        "KLDPO",
        "2502.01930",
        "sum_i p_i l_i, p_i proportional to exp(l_i / tau), l DPO's",
        "preference_robust.kldpo_weights",
        "the released code",
        Need.BATCH_STATISTICS,
    ),
    "dr_dpo": _pair(
        "Dr. DPO",
        "2407.07880",
        "-tau log mean exp(-l_i / tau), l DPO's",
        "preference_robust.dr_dpo_weights",
        "the released code",
        Need.BATCH_STATISTICS,
    ),
    "aux_dpo": _pair(
        "AuxDPO",
        "2510.20413",
        "-log sigmoid(beta (D + delta_w - delta_l)) + null |A' delta|^2 - amplitude mean delta^2",
        "preference.aux_dpo_loss, preference.aux_dpo_penalty",
        "the released classes",
        Need.PER_SAMPLE_GRADIENTS,
        Need.STABLE_INDEX,
    ),
    "modpo": _pair(
        "MODPO",
        "2310.03708",
        "-log sigmoid((beta D - w' m) / w_0), m the other rewards' gaps",
        "preference.modpo_loss",
        "the paper",
        Need.REWARD_GAPS,
    ),
    "ns_dpo": _pair(
        "NS-DPO",
        "2407.18676",
        "-gamma^age log sigmoid(beta D)",
        "preference_robust.ns_dpo_weights",
        "the paper (7B)",
        Need.TIME,
    ),
    "plackett_luce": _pair(
        "Plackett-Luce DPO",
        "2305.18290, appendix A.3",
        "minus the log-likelihood of the ranking under beta rho",
        "preference.plackett_luce_dpo_loss",
        "DPO's",
    ),
}
"""The losses of `objective.kind: preference` and `online_dpo`, by `objective.loss.kind`."""

METHODS: dict[str, Algorithm] = {
    "ppo, advantage: gae": Algorithm(
        "PPO with a KL penalty and a critic",
        "1707.06347, 1909.08593, 2203.02155",
        "-min(r A, clip(r, 1 - eps, 1 + eps) A), A by GAE on rewards minus beta k1",
        "ppo.policy_loss, advantages.gae",
        "lm-human-preferences",
        frozenset({Need.REFERENCE, Need.CRITIC}),
    ),
    "ppo, advantage: reinforce_pp": Algorithm(
        "REINFORCE++",
        "2501.03262",
        "PPO's surrogate, A the whitened reward-to-go",
        "advantages.reward_to_go",
        "PPO's",
        frozenset({Need.REFERENCE}),
    ),
    "ppo, advantage: rloo": Algorithm(
        "RLOO",
        "2402.14740",
        "PPO's surrogate, A the score minus the mean of the group's other scores",
        "advantages.rloo_advantages",
        "PPO's",
        frozenset({Need.REFERENCE, Need.GROUP}),
    ),
    "ppo, advantage: grpo": Algorithm(
        "GRPO",
        "2402.03300",
        "PPO's surrogate, A the score minus the group's mean, over its deviation",
        "advantages.grpo_advantages",
        "PPO's",
        frozenset({Need.REFERENCE, Need.GROUP}),
    ),
    "ppo, advantage: dr_grpo": Algorithm(
        "Dr. GRPO",
        "2503.20783",
        "PPO's surrogate, A the score minus the group's mean",
        "advantages.grpo_advantages",
        "PPO's",
        frozenset({Need.REFERENCE, Need.GROUP}),
    ),
    "ppo, advantage: gdpo": Algorithm(
        "GDPO",
        "2601.05242",
        "PPO's surrogate, A the whitened sum of the parts' scores, each normalised within its group",
        "advantages.gdpo",
        "PPO's",
        frozenset({Need.REFERENCE, Need.GROUP, Need.REWARD_VECTOR}),
    ),
    "online_dpo": Algorithm(
        "Online DPO (OAIF)",
        "2402.04792",
        "any loss below, on pairs of fresh responses that the reward graph has scored",
        "pairs.make_pairs",
        "TRL",
        frozenset({Need.REFERENCE, Need.GROUP}),
    ),
    "preference": Algorithm(
        "Preference optimisation on stored judgements",
        "2305.18290",
        "any loss below",
        "preference.dpo_loss",
        "the paper",
    ),
    "sft": Algorithm(
        "Supervised fine-tuning",
        "2203.02155",
        "minus the mean log-probability of the batch's response tokens",
        "preference.sft_loss",
        "TRL",
    ),
}
"""The objectives, by `objective.kind` (and `advantage`)."""


def render_algorithms() -> str:
    """The tables of docs/algorithms.md."""
    lines: list[str] = []
    for heading, key, table in (
        ("## Objectives", "objective.kind", METHODS),
        ("## Losses of preference optimisation", "objective.loss.kind", LOSSES),
    ):
        lines += [heading, "", f"| `{key}` | method | minimised | needs | function | defaults from | paper |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, entry in table.items():
            needs = ", ".join(sorted(entry.needs)) or "nothing more"
            formula = entry.formula.replace("|", "\\|")
            functions = ", ".join(f"`{part.strip()}`" for part in entry.function.split(","))
            lines.append(
                f"| `{name}` | {entry.title} | {formula} | {needs} | {functions} | {entry.defaults} | {entry.paper} |"
            )
        lines.append("")
    return "\n".join(lines)

"""What a step of a run computes, from its settings alone: tokens in one pass, rows, and passes of each model.

Lengths are the longest that the settings allow; real responses are shorter, and so are the passes.
"""

from dataclasses import dataclass
from typing import Literal

from raylhf.config.algorithms import LOSSES, Need
from raylhf.config.objective import PPOConfig
from raylhf.config.preference import OnlineDPOConfig, PreferenceConfig, SFTConfig
from raylhf.config.reward_model import RewardModelConfig
from raylhf.config.run import AnyRunConfig, RunConfig

ROWS_OF_A_PROMPT = {"pairs": 2, "edits": 2, "responses": 1, "steps": 1, "attributes": 1, "scores": 2, "rankings": 4}
"""Responses to a prompt of stored judgements, by their kind: sure for the first four, a guess for the others."""
ROW_LOSSES = ("kto", "plackett_luce")
"""Losses of online DPO that learn from all responses, not from two of a group."""


@dataclass(frozen=True)
class Pass:
    """One model over rows of the longest length, once a step, all ranks together."""

    phase: Literal["logprobs", "update"]
    model: Literal["policy", "reference", "critic", "guide"]
    is_training: bool
    """Forward and backward; else forward alone."""
    rows: int


def longest_row(config: AnyRunConfig) -> int:
    """Tokens of the longest prompt with its response."""
    return max_prompt_tokens(config) + max_response_tokens(config)


def max_response_tokens(config: AnyRunConfig) -> int:
    """Positions of a row that may reach the output layer."""
    return config.rollout.sampling.max_response_tokens if isinstance(config, RunConfig) else config.data.max_tokens


def max_prompt_tokens(config: AnyRunConfig) -> int:
    """Tokens of the longest prompt; of stored judgements, whose limit is one for both, they count as response."""
    return config.data.max_prompt_tokens if isinstance(config, RunConfig) else 0


def is_packed(config: AnyRunConfig) -> bool:
    """Whether rows stand one after the other without padding (eager attention keeps them on lines of their own)."""
    return config.learner.packing and config.model.attention != "eager"


def shares_prompts(config: AnyRunConfig) -> bool:
    """Whether responses to one prompt follow a single copy of it."""
    return is_packed(config) and config.model.attention == "sdpa"


def tokens_in_pass(config: AnyRunConfig) -> int:
    """Most tokens, prompts and responses, in one forward and backward pass of one rank: a row is never cut, and there
    are no more than those of a minibatch."""
    most = max(config.learner.micro_batch_tokens, longest_row(config))
    return min(most, _rows_per_minibatch(config) * longest_row(config))


def passes_per_minibatch(config: AnyRunConfig) -> int:
    """Forward and backward passes of one rank for one optimizer step."""
    return -(-_rows_per_minibatch(config) // max(1, tokens_in_pass(config) // longest_row(config)))


def _rows_per_minibatch(config: AnyRunConfig) -> int:
    """Of one rank."""
    return -(-rows_per_step(config) // (config.learner.num_ranks * minibatches_of(config)))


def positions_in_pass(config: AnyRunConfig) -> int:
    """Most positions whose logits are wanted in one pass."""
    tokens = tokens_in_pass(config)
    if shares_prompts(config) and rows_per_prompt(config) > 1:
        return tokens  # nearly: a prompt may have many responses
    return tokens * max_response_tokens(config) // longest_row(config)


def tokens_of(config: AnyRunConfig, rows: int) -> int:
    """Tokens of `rows` rows of the longest length: a prompt that is shared counts once in a pass."""
    prompt, response, group = max_prompt_tokens(config), max_response_tokens(config), rows_per_prompt(config)
    if not shares_prompts(config) or group == 1:
        return rows * (prompt + response)
    together = min(group, max(1, (tokens_in_pass(config) - prompt) // response))
    return rows * response + -(-rows // together) * prompt


def rows_per_prompt(config: AnyRunConfig) -> int:
    """Responses to one prompt."""
    if isinstance(config, RunConfig):
        return config.rollout.group_size
    return 1 if isinstance(config.objective, SFTConfig) else ROWS_OF_A_PROMPT[config.data.kind]


def rows_per_step(config: AnyRunConfig) -> int:
    """Responses in a step (of a policy run) or in an optimizer step (on stored judgements)."""
    if isinstance(config, RunConfig):
        return config.responses_per_step
    return config.objective.batch_size * rows_per_prompt(config)


def minibatches_of(config: AnyRunConfig) -> int:
    """Parts of a step's rows, each for an optimizer step."""
    return config.objective.num_minibatches if isinstance(config, RunConfig) else 1


def passes_per_step(config: AnyRunConfig, tokens: int) -> int:
    """Forward passes of one rank over `tokens` tokens of all ranks."""
    return max(1, -(-tokens // (config.learner.num_ranks * tokens_in_pass(config))))


def passes_of(config: AnyRunConfig) -> tuple[Pass, ...]:
    """Everything that the learners compute in a step."""
    objective, rows = config.objective, rows_per_step(config)
    if isinstance(objective, PPOConfig):
        assert isinstance(config, RunConfig)
        return _ppo(objective, config, rows)
    if isinstance(objective, RewardModelConfig | SFTConfig):
        return (Pass("update", "policy", True, rows),)
    assert isinstance(objective, PreferenceConfig | OnlineDPOConfig)
    needs, found = LOSSES[objective.loss.kind].needs, []
    if isinstance(objective, OnlineDPOConfig):  # of all responses, for metrics too
        if _is_several_steps(objective) or Need.BATCH_STATISTICS in needs:
            found.append(Pass("logprobs", "policy", False, rows))
        found.append(Pass("logprobs", "reference", False, rows))
        rows = _rows_compared(objective, config) * objective.num_epochs
    elif Need.REFERENCE in needs:
        found.append(Pass("logprobs", "reference", False, rows))
    if Need.GUIDE in needs:
        found.append(Pass("logprobs", "guide", False, rows))
    if Need.REFERENCE_PROMPTS in needs:
        found.append(Pass("logprobs", "reference", False, 2 * rows))
    return (*found, Pass("update", "policy", True, rows))


def _ppo(objective: PPOConfig, config: RunConfig, rows: int) -> tuple[Pass, ...]:
    found = [Pass("logprobs", "reference", False, rows)]
    if _is_several_steps(objective) or config.critic is not None or objective.kl.placement == "reward":
        found.insert(0, Pass("logprobs", "policy", False, rows))
    has_own_critic = config.critic is not None and config.critic.trunk == "own"
    if has_own_critic:
        found.append(Pass("logprobs", "critic", False, rows))
    if objective.bootstrap_truncated:
        found.append(Pass("logprobs", "critic" if has_own_critic else "policy", False, rows))
    found.append(Pass("update", "policy", True, rows * objective.num_epochs))
    if has_own_critic:
        found.append(Pass("update", "critic", True, rows * objective.num_epochs))
    return tuple(found)


def _is_several_steps(objective: PPOConfig | OnlineDPOConfig) -> bool:
    """Otherwise the only optimizer step finds the old log-probabilities itself."""
    return objective.num_epochs * objective.num_minibatches > 1


def _rows_compared(objective: OnlineDPOConfig, config: AnyRunConfig) -> int:
    """Responses that take part in pairs."""
    rows = rows_per_step(config)
    if not isinstance(config, RunConfig) or objective.pairs.kind == "all_pairs" or objective.loss.kind in ROW_LOSSES:
        return rows
    return min(rows, 2 * config.rollout.prompts_per_step)


def optimizer_steps_of(config: AnyRunConfig) -> int:
    """Optimizer steps in a step of the run."""
    return minibatches_of(config) * (config.objective.num_epochs if isinstance(config, RunConfig) else 1)

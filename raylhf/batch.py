"""The records that travel between roles. Sequences are ragged: padding exists only inside a learner's micro-batch.

Arrays are numpy, which Ray's object store hands to a reader without a copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One prompt as chat messages, before any chat template."""

    index: int
    """Position in the dataset, stable over runs: the prompt's identity in logs and in seeds."""
    messages: tuple[Mapping[str, str], ...]
    """Chat turns, each {role, content}; the last one is the user's."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of the dataset's row, for rewards."""

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Rollouts:
    """B sampled responses with everything that learner and rewards need. Lists have B entries."""

    prompts: Sequence[Prompt]
    """The prompt of each response; responses of one prompt are neighbours (a group)."""
    prompt_ids: Sequence[np.ndarray]
    """Token ids of the prompt, chat template included, int64 [P_i]."""
    response_ids: Sequence[np.ndarray]
    """Token ids that the policy sampled, with its end-of-sequence token, int64 [T_i]; T_i = 0 is possible."""
    rollout_logprobs: Sequence[np.ndarray]
    """Log-probability of each sampled token under the engine's tempered distribution, float32 [T_i]."""
    response_texts: Sequence[str]
    """Decoded responses without special tokens, for rewards that read text. Never encoded again for the policy."""
    finish_reasons: Sequence[FinishReason]
    """`stop`: the policy ended the response; `length`: max_response_tokens did."""
    policy_versions: np.ndarray
    """Version of the weights that sampled the response, int64 [B]."""
    temperature: float
    """Sampling temperature; the learner divides its logits by it."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def response_lengths(self) -> np.ndarray:
        """Tokens of each response, int64 [B]."""
        return np.array([len(ids) for ids in self.response_ids], dtype=np.int64)

    @property
    def is_truncated(self) -> np.ndarray:
        """Whether the response ran into max_response_tokens, bool [B]."""
        return np.array([reason == "length" for reason in self.finish_reasons], dtype=bool)

    def select(self, rows: Sequence[int]) -> "Rollouts":
        """The given rows, in the given order."""
        return Rollouts(
            prompts=[self.prompts[i] for i in rows],
            prompt_ids=[self.prompt_ids[i] for i in rows],
            response_ids=[self.response_ids[i] for i in rows],
            rollout_logprobs=[self.rollout_logprobs[i] for i in rows],
            response_texts=[self.response_texts[i] for i in rows],
            finish_reasons=[self.finish_reasons[i] for i in rows],
            policy_versions=self.policy_versions[list(rows)],
            temperature=self.temperature,
        )

    @staticmethod
    def concatenate(parts: Sequence["Rollouts"]) -> "Rollouts":
        """One record of all rows, in order. All parts must have one temperature."""
        temperatures = {part.temperature for part in parts}
        if len(temperatures) != 1:
            raise ValueError(f"cannot join rollouts of different temperatures {sorted(temperatures)}")
        return Rollouts(
            prompts=[p for part in parts for p in part.prompts],
            prompt_ids=[x for part in parts for x in part.prompt_ids],
            response_ids=[x for part in parts for x in part.response_ids],
            rollout_logprobs=[x for part in parts for x in part.rollout_logprobs],
            response_texts=[x for part in parts for x in part.response_texts],
            finish_reasons=[x for part in parts for x in part.finish_reasons],
            policy_versions=np.concatenate([part.policy_versions for part in parts]),
            temperature=temperatures.pop(),
        )


@dataclass(frozen=True)
class RewardOutput:
    """Scores of B responses."""

    scores: np.ndarray
    """Raw output of the reward, float64 [B]; NaN where invalid."""
    valid: np.ndarray
    """False where the reward failed (raised, NaN, infinite), bool [B]. Such a response is dropped and counted."""
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Scores of named parts before weighting, float64 [B] each, for logging."""
    token_scores: Sequence[np.ndarray] | None = None
    """Dense scores on response tokens, float32 [T_i] each, in the policy's tokens; they add to `scores`."""
    errors: tuple[str, ...] = ()
    """One sentence for each failure."""

    @staticmethod
    def concatenate(outputs: Sequence["RewardOutput"]) -> "RewardOutput":
        """One record of all rows, in order."""
        names = outputs[0].parts.keys()
        is_dense = outputs[0].token_scores is not None
        return RewardOutput(
            scores=np.concatenate([o.scores for o in outputs]),
            valid=np.concatenate([o.valid for o in outputs]),
            parts={name: np.concatenate([o.parts[name] for o in outputs]) for name in names},
            token_scores=[t for o in outputs for t in o.token_scores or ()] if is_dense else None,
            errors=tuple(e for o in outputs for e in o.errors),
        )

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
        """The last user turn; empty where there is no prompt."""
        return self.messages[-1]["content"] if self.messages else ""


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
    policy_versions: Sequence[np.ndarray]
    """Version of the weights that sampled each token, int64 [T_i]: an update can fall inside of a response."""
    temperature: float
    """Sampling temperature; the learner divides its logits by it."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def response_lengths(self) -> np.ndarray:
        """Tokens of each response, int64 [B]."""
        return np.array([len(ids) for ids in self.response_ids], dtype=np.int64)

    @property
    def oldest_version(self) -> int | None:
        """Of the weights that sampled any token; None where there is no token."""
        return min((int(versions.min()) for versions in self.policy_versions if len(versions)), default=None)

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
            policy_versions=[self.policy_versions[i] for i in rows],
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
            policy_versions=[x for part in parts for x in part.policy_versions],
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
    """Dense scores on response tokens, float32 [T_i] each, in the policy's tokens. They are `scores` laid out over the
    response: each row sums to its score (in a valid row)."""
    vector: np.ndarray | None = None
    """Scores of the members of an ensemble, or of the attributes of a multi-value model, float64 [B, J]; NaN where one
    does not apply."""
    vector_names: tuple[str, ...] = ()
    """Names of the J columns of `vector`."""
    resample: np.ndarray | None = None
    """Invalid rows whose leaf asks for the prompt's group to be sampled anew, bool [B]; None means no row."""
    errors: tuple[str, ...] = ()
    """One sentence for each failure."""
    num_truncated: int = 0
    """Of a leaf's own output: responses that its model read in part, their texts with the prompts being too long."""

    @staticmethod
    def concatenate(outputs: Sequence["RewardOutput"]) -> "RewardOutput":
        """One record of all rows, in order.

        The outputs are of one reward, so all or none have `token_scores` and `vector`. A part that one of them lacks,
        because all its scores failed, is NaN there.
        """
        first = outputs[0]
        assert len({o.token_scores is None for o in outputs}) == len({o.vector is None for o in outputs}) == 1
        names = dict.fromkeys(name for o in outputs for name in o.parts)
        missing = [np.full(len(o.scores), np.nan) for o in outputs]
        no_row = [np.zeros(len(o.scores), dtype=bool) for o in outputs]
        asks = any(o.resample is not None for o in outputs)
        return RewardOutput(
            scores=np.concatenate([o.scores for o in outputs]),
            valid=np.concatenate([o.valid for o in outputs]),
            parts={
                name: np.concatenate([o.parts.get(name, nan) for o, nan in zip(outputs, missing, strict=True)])
                for name in names
            },
            token_scores=None if first.token_scores is None else [t for o in outputs for t in o.token_scores or ()],
            vector=None
            if first.vector is None
            else np.concatenate([o.vector for o in outputs if o.vector is not None]),
            vector_names=first.vector_names,
            resample=np.concatenate(
                [no if o.resample is None else o.resample for o, no in zip(outputs, no_row, strict=True)]
            )
            if asks
            else None,
            errors=tuple(e for o in outputs for e in o.errors),
        )


@dataclass(frozen=True)
class Pair:
    """One comparison between two responses of a RewardExample."""

    chosen: int
    """Position of the preferred response."""
    rejected: int
    """Position of the other one."""
    margin: float = 0.0
    """How much better it is, in the data's units (0: not said)."""
    agreement: float | None = None
    """Share of raters who prefer it; None where the data does not say."""
    time: float | None = None
    """When it was judged, in the data's units; None where the data does not say."""
    reward_gaps: Mapping[str, float] = field(default_factory=dict)
    """By how much the chosen response is better in the values of other rewards, by name."""


@dataclass(frozen=True)
class RewardExample:
    """One prompt with its K responses and everything that raters said about them: one element of a batch."""

    index: int
    """Position in the data, stable over runs."""
    messages: tuple[Mapping[str, str], ...]
    """The prompt's chat turns, each {role, content}; () where responses are judged without a prompt."""
    responses: tuple[str, ...]
    """K texts."""
    pairs: tuple[Pair, ...] = ()
    """Comparisons; of a ranking or of scores, all those that are not ties."""
    ranks: np.ndarray | None = None
    """Place of each response, 1 is best, equal is a tie, NaN is below all that have a place, float64 [K]."""
    targets: np.ndarray | None = None
    """Scores, float64 [K, J]; NaN where missing. J is 1 for plain scores."""
    target_stds: np.ndarray | None = None
    """Standard deviation of the raters behind each score, float64 [K, J]; NaN where unknown."""
    step_ends: tuple[np.ndarray, ...] = ()
    """Of each response, the position after the last character of each step, int64 [n_k]."""
    step_labels: tuple[np.ndarray, ...] = ()
    """Of each response, 1 for a right step, 0 for a wrong one, NaN where nobody said, float64 [n_k]."""
    subset: str = ""
    """Value of data.subset_key."""

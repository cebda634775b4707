"""Nodes that depend on the prompt: a gate weighs its parts by it, a route chooses one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from raylhf.batch import Prompt, RewardOutput, Rollouts
from raylhf.rewards.fusion import Combined, weighted_sum
from raylhf.rewards.nodes import joined, scores_of
from raylhf.rewards.rules import REGEX_LIMIT_S, compile_pattern
from raylhf.rewards.validity import MAX_SCORE, about_prompt, result_or_reason, unscored
from raylhf.tracking.redaction import without_secrets

if TYPE_CHECKING:  # the Protocols name torch's types, and a reward worker needs no torch
    from raylhf.interfaces import Reward

Choice = TypeVar("Choice")


class PromptRules(Generic[Choice]):
    """What the first regular expression that matches the prompt's last user turn stands for."""

    def __init__(self, rules: Sequence[tuple[str, Choice]], owner: str):
        """`rules` are (pattern, choice), in order; `owner` is named where a pattern is not one."""
        self._rules = [(compile_pattern(pattern, owner), choice) for pattern, choice in rules]

    def choose(self, prompt: Prompt) -> Choice | None:
        """The choice for one prompt; None where no pattern matches. Raises TimeoutError after REGEX_LIMIT_S."""
        text = prompt.text if prompt.messages else ""
        return next((choice for pattern, choice in self._rules if pattern.search(text, timeout=REGEX_LIMIT_S)), None)


class PromptWeights(Protocol):
    """A model that reads prompts."""

    def weights(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, Mapping[int, str]]:
        """A weight for each part and prompt, [B, J]; rows are non-negative and sum to 1.

        Rows of prompts that it cannot weigh are NaN, with the reason by row.
        """
        ...


class Gate:
    """A sum of its parts whose weights depend on the prompt.

    Of the data row's own weights, the rules, the classifier and the parts' weights, the first that speaks about a
    prompt counts. A part of weight 0 is not asked, so it cannot fail there either. A prompt whose weights cannot be
    read, or are 0 for every part, makes its responses invalid.
    """

    def __init__(
        self,
        parts: Mapping[str, "Reward"],
        weights: Sequence[float],
        *,
        weights_key: str | None,
        rules: Sequence[tuple[str, Mapping[str, float]]],
        classifier: PromptWeights | None,
    ):
        self._parts = dict(parts)
        self._weights = np.asarray(weights, dtype=float)
        self._weights_key = weights_key
        self._rules = PromptRules(rules, "a gate rule")
        self._classifier = classifier

    def score(self, rollouts: Rollouts) -> RewardOutput:
        weights, errors = self._weights_of(rollouts.prompts)
        is_weighed = np.logical_not(np.isnan(weights).any(axis=1))
        weights = np.where(is_weighed[:, None], weights, 0.0)
        outputs = {
            name: score_rows(reward, np.flatnonzero(weights[:, j]).tolist(), rollouts)
            for j, (name, reward) in enumerate(self._parts.items())
        }
        scores, weights = weighted_sum(np.where(weights != 0, scores_of(outputs), 0.0), weights)
        combined = Combined(np.where(is_weighed, scores, np.nan), weights)
        output = joined(outputs, combined, rollouts, is_counted=weights != 0)
        return replace(output, errors=(*errors, *output.errors))

    def _weights_of(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, list[str]]:
        """Weights [B, M], NaN where the prompt's cannot be told, and a sentence for each reason."""
        rows, errors, silent = np.tile(self._weights, (len(prompts), 1)), [], []
        for i, prompt in enumerate(prompts):
            try:
                named = self._named_weights(prompt)
            except (ValueError, TimeoutError) as error:
                errors.append(about_prompt("gate", prompt, str(error)))
                rows[i] = np.nan
                continue
            if named is None:
                silent.append(i)
            else:
                rows[i] = [named.get(name, 0.0) for name in self._parts]
        if self._classifier is not None and silent:
            rows[silent], reasons = self._classified([prompts[i] for i in silent])
            errors += reasons
        for i in np.flatnonzero((rows == 0).all(axis=1)):
            rows[i] = np.nan
            errors.append(about_prompt("gate", prompts[i], "no part has a weight, so nothing scores the response"))
        return rows, list(dict.fromkeys(errors))  # a prompt has several responses, and one sentence

    def _classified(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, list[str]]:
        """The classifier's weights [B, M], NaN where it fails, and why."""
        assert self._classifier is not None
        judged = result_or_reason(partial(self._classifier.weights, prompts))
        if isinstance(judged, str):
            sentence = without_secrets(f"gate: the prompt classifier: {judged}")
            return np.full((len(prompts), len(self._parts)), np.nan), [sentence]
        weights, reasons = judged
        told = [about_prompt("gate", prompts[i], f"the prompt classifier: {reason}") for i, reason in reasons.items()]
        return weights, told

    def _named_weights(self, prompt: Prompt) -> Mapping[str, float] | None:
        """What the data row, else the first matching rule, says about the prompt."""
        named = prompt.metadata.get(self._weights_key) if self._weights_key is not None else None
        if named is None:
            return self._rules.choose(prompt)
        if not isinstance(named, Mapping) or not all(is_number(weight) for weight in named.values()):
            raise ValueError(f"{self._weights_key}={named!r} is not a mapping of part names to weights")
        if unknown := named.keys() - self._parts.keys():
            raise ValueError(f"{self._weights_key} weighs {min(unknown)!r}; the parts are {', '.join(self._parts)}")
        return named


class Route:
    """The score of one of its parts, chosen by the prompt; the other parts are not asked.

    All responses of a prompt go to one part, so a part that needs whole groups gets them.
    """

    def __init__(
        self,
        parts: Mapping[str, "Reward"],
        *,
        key: str | None,
        rules: Sequence[tuple[str, str]],
        default: str | None,
    ):
        self._parts = dict(parts)
        self._key = key
        self._rules = PromptRules(rules, "a route rule")
        self._default = default

    def score(self, rollouts: Rollouts) -> RewardOutput:
        chosen: list[str | None] = []
        errors = []
        for prompt in rollouts.prompts:
            try:
                chosen.append(self._part_for(prompt))
            except (ValueError, TimeoutError) as error:
                chosen.append(None)
                errors.append(about_prompt("route", prompt, str(error)))
        is_chosen = np.array([[choice == name for name in self._parts] for choice in chosen], dtype=bool)
        is_chosen = is_chosen.reshape(len(rollouts), len(self._parts))
        outputs = {
            name: score_rows(reward, np.flatnonzero(is_chosen[:, j]).tolist(), rollouts)
            for j, (name, reward) in enumerate(self._parts.items())
        }
        scores = np.where(is_chosen, scores_of(outputs), 0.0).sum(axis=1)
        combined = Combined(np.where(is_chosen.any(axis=1), scores, np.nan), is_chosen.astype(float))
        output = joined(outputs, combined, rollouts, is_counted=is_chosen)
        return replace(output, errors=(*errors, *output.errors))

    def _part_for(self, prompt: Prompt) -> str:
        """Name of the part that scores the prompt's responses."""
        value = prompt.metadata.get(self._key) if self._key is not None else None
        choice = self._rules.choose(prompt) if value is None else value
        if isinstance(choice, str) and choice in self._parts:
            return choice
        if self._default is None:
            told = "no rule matches" if value is None else f"{self._key}={value!r} names no part"
            raise ValueError(f"{told}, and there is no default")
        return self._default


def is_number(value: object) -> bool:
    """Whether `value` is a finite number that a float32 can hold, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(abs(value) <= MAX_SCORE)


def score_rows(reward: "Reward", rows: Sequence[int], rollouts: Rollouts) -> RewardOutput:
    """The reward's output for all `rollouts`, of which it is asked the given rows alone."""
    if len(rows) == 0:
        return unscored(len(rollouts))
    if len(rows) == len(rollouts):
        return reward.score(rollouts)
    return scattered(reward.score(rollouts.select(rows)), rows, rollouts)


def scattered(output: RewardOutput, rows: Sequence[int], rollouts: Rollouts) -> RewardOutput:
    """`output` of the given rows as an output of all `rollouts`: unscored elsewhere, with zeros for dense scores."""

    def spread(values: np.ndarray, fill: float | bool) -> np.ndarray:
        full = np.full((len(rollouts), *values.shape[1:]), fill, dtype=values.dtype)
        full[list(rows)] = values
        return full

    dense = None
    if output.token_scores is not None:
        dense = [np.zeros(length, dtype=np.float32) for length in rollouts.response_lengths]
        for i, row in zip(rows, output.token_scores, strict=True):
            dense[i] = row
    return replace(
        output,
        scores=spread(output.scores, np.nan),
        valid=spread(output.valid, False),
        parts={name: spread(scores, np.nan) for name, scores in output.parts.items()},
        token_scores=dense,
        vector=None if output.vector is None else spread(output.vector, np.nan),
        resample=None if output.resample is None else spread(output.resample, False),
    )

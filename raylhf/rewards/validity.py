"""What makes a score valid, and how a failure is told."""

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import regex

from raylhf.batch import Prompt, RewardOutput, Rollouts

Result = TypeVar("Result")
NUM_TOLD_ERRORS = 3
"""Sentences that are passed on where one would do; a batch may have one for each response."""
MAX_SCORE = float(np.finfo(np.float32).max)
"""Larger scores have no float32, in which the learners and dense scores hold them."""
NAMED_PROMPT = regex.compile(r"(?<=^(?:[a-z0-9_]+: |[\w.]+:[\w.]+: )*)prompt (\d+)(?=: )")
"""The prompt of a sentence that `about_prompt` wrote, behind the names of nodes and of the leaf (a kind or a function's
path). Text of a library, a user's function or a server comes later in a sentence, and names nothing."""


class RewardFailedError(ValueError):
    """A leaf with `on_failure: raise` did not score a response."""


def score_each(name: str, rollouts: Rollouts, score_one: Callable[[Prompt, str], Any]) -> RewardOutput:
    """`score_one(prompt, response_text)` of each response. Whatever it raises makes that one score invalid."""

    def checked_score(prompt: Prompt, response: str) -> float:
        return as_score(score_one(prompt, response))

    scores = np.full(len(rollouts), np.nan)
    errors = []
    for i, (prompt, response) in enumerate(zip(rollouts.prompts, rollouts.response_texts, strict=True)):
        score = result_or_reason(partial(checked_score, prompt, response))
        if isinstance(score, str):
            errors.append(about_prompt(name, prompt, score))
        else:
            scores[i] = score
    return RewardOutput(scores=scores, valid=~np.isnan(scores), errors=tuple(errors))


def result_or_reason(call: Callable[[], Result]) -> Result | str:
    """What `call`, a user's code or a model, returns (no text), or the kind and text of what it raises.

    Only Ctrl-C goes through.
    """
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's code may call sys.exit, and Rust's panics are no Exception
        return f"{type(error).__name__}: {error}"


def about_prompt(name: str, prompt: Prompt, reason: str) -> str:
    """The sentence of a failure that concerns one prompt, in the form that NAMED_PROMPT finds."""
    return f"{name}: prompt {prompt.index}: {reason}"


def as_score(value: Any) -> float:
    """`value` as a finite float. Numbers, numpy scalars and one-element tensors count; None and text do not."""
    if not isinstance(value, Real) and not hasattr(value, "item"):
        raise TypeError(f"the score is {value!r}, not a number")
    score = float(value)  # type: ignore[arg-type]
    if not math.isfinite(score):
        raise ValueError(f"the score is {score}")
    return score


def all_invalid(num_responses: int, sentence: str, part_names: Iterable[str]) -> RewardOutput:
    """No score for any response, for one reason; the parts keep their names, so that outputs can be joined."""
    nothing = np.full(num_responses, np.nan)
    return RewardOutput(
        scores=nothing,
        valid=np.zeros(num_responses, dtype=bool),
        parts=dict.fromkeys(part_names, nothing),
        errors=(sentence,),
    )


def unscored(num_responses: int) -> RewardOutput:
    """No score for any response, and no failure either: nothing was asked to score them."""
    return RewardOutput(scores=np.full(num_responses, np.nan), valid=np.zeros(num_responses, dtype=bool))


def checked(name: str, output: RewardOutput, num_responses: int) -> RewardOutput:
    """`output` if it has one entry a response, else all invalid; see `usable` for the scores."""
    columns: dict[str, Sized] = {"scores": output.scores, "valid": output.valid, **output.parts}
    if output.token_scores is not None:
        columns["token_scores"] = output.token_scores
    if output.vector is not None:
        columns["vector"] = output.vector
        assert output.vector.shape[1:] == (len(output.vector_names),), "a column without a name"
    for column, values in columns.items():
        if len(values) != num_responses:
            sentence = f"{name}: {len(values)} {column} for {num_responses} responses"
            return all_invalid(num_responses, sentence, output.parts)
    return usable(name, output)


def usable(name: str, output: RewardOutput) -> RewardOutput:
    """`output`, where a valid score that is not finite or beyond MAX_SCORE becomes invalid, with a sentence."""
    valid = output.valid & (np.abs(output.scores) <= MAX_SCORE)
    errors = tuple(output.errors)
    if num_broken := int((output.valid & ~valid).sum()):
        errors += (f"{name}: {num_broken} scores are no finite float32 numbers",)
    return replace(output, scores=np.where(valid, output.scores, np.nan), valid=valid, errors=errors)

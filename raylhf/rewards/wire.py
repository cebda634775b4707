"""What crosses the wire to and from a served reward: requests and answers of docs/reward_protocol.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylhf.batch import RewardOutput
from raylhf.rewards.texts import MAX_NUM_TOKENS, TextSample
from raylhf.rewards.validity import NAMED_PROMPT

NUM_TOLD_ERRORS = 20
"""Sentences in one answer; the rest is counted."""
NUM_TOLD_MISTAKES = 5


class RequestError(Exception):
    """A request that is answered with an error: an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(_Record):
    role: Literal["system", "user", "assistant"]
    content: str


class Sample(_Record):
    """One response and its prompt."""

    prompt: list[Message]
    response: str
    metadata: dict[str, Any] = {}
    is_truncated: bool = False
    num_tokens: Annotated[int, Field(ge=0, le=MAX_NUM_TOKENS)] | None = None

    def as_text(self) -> TextSample:
        """As the reward plane knows it."""
        return TextSample(
            messages=tuple(message.model_dump() for message in self.prompt),
            response=self.response,
            metadata=self.metadata,
            is_truncated=self.is_truncated,
            num_tokens=self.num_tokens,
        )


class ScoreRequest(_Record):
    """The body of POST /score."""

    version: Literal[1]
    samples: list[Sample]


def parse_request(body: bytes, *, max_samples: int) -> list[TextSample]:
    """The samples of a request's body.

    Raises:
        RequestError: 400 for a body that is not JSON, 422 for JSON that does not fit, 413 for too much of it.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_input=False, include_context=False)
        if mistakes[0]["type"] == "json_invalid":
            raise RequestError(
                400, f"the body is not JSON: {mistakes[0]['msg'].removeprefix('Invalid JSON: ')}"
            ) from None
        told = [f"{_dotted(mistake['loc'])}: {mistake['msg']}" for mistake in mistakes[:NUM_TOLD_MISTAKES]]
        more = len(mistakes) - len(told)
        told += [f"and {more} more"] if more else []
        raise RequestError(422, f"the request does not fit version 1 of the protocol: {'; '.join(told)}") from None
    if len(request.samples) > max_samples:
        sentence = f"{len(request.samples)} samples are more than the {max_samples} of one request; send several"
        raise RequestError(413, sentence)
    return [sample.as_text() for sample in request.samples]


def _dotted(location: Sequence[str | int]) -> str:
    return ".".join(map(str, location)) or "the body"


@dataclass(frozen=True)
class Scored:
    """Scores of n samples as JSON knows them: a number, or None where the score is invalid."""

    scores: list[float | None]
    """n entries."""
    parts: dict[str, list[float | None]]
    """Scores of named parts before weighting, n entries each; None where one does not apply."""
    errors: list[str]
    """A sentence for each failure."""

    def __len__(self) -> int:
        return len(self.scores)

    @staticmethod
    def of(output: RewardOutput) -> "Scored":
        """`output`, with what is invalid as None."""
        return Scored(
            scores=_numbers(np.where(output.valid, output.scores, np.nan)),
            parts={name: _numbers(scores) for name, scores in output.parts.items()},
            errors=list(output.errors),
        )

    @staticmethod
    def joined(pieces: Sequence["Scored"]) -> "Scored":
        """All samples, in order. A piece that failed as a whole may lack parts that others have."""
        names = dict.fromkeys(name for piece in pieces for name in piece.parts)
        return Scored(
            scores=[score for piece in pieces for score in piece.scores],
            parts={name: [x for piece in pieces for x in piece.parts.get(name, [None] * len(piece))] for name in names},
            errors=[error for piece in pieces for error in piece.errors],
        )

    def answer(self) -> Mapping[str, Any]:
        """The body of the answer."""
        more = len(self.errors) - NUM_TOLD_ERRORS
        told = [*self.errors[:NUM_TOLD_ERRORS], *([f"and {more} more errors"] if more > 0 else [])]
        return {"scores": self.scores, "parts": self.parts, "errors": told}


def renumbered(sentence: str, rows: range, first: int) -> str:
    """`sentence` about a prompt of a batch, told to the request whose samples are `rows` of it, from its `first` on.

    Only the place where the reward plane names the prompt is rewritten; numbers in the reason are somebody else's.
    """
    match = NAMED_PROMPT.search(sentence)
    if match is None:
        return sentence
    row = int(match[1])
    name = f"sample {row - rows.start + first}" if row in rows else "a sample of another request"
    return sentence[: match.start()] + name + sentence[match.end() :]


def _numbers(scores: np.ndarray) -> list[float | None]:
    return [float(score) if np.isfinite(score) else None for score in scores]

"""`raylhf score`: the reward of every row of a file, in this process and without Ray."""

import json
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from raylhf.config.reward import RewardPlaneConfig
from raylhf.rewards import RewardWorker
from raylhf.rewards.texts import MAX_NUM_TOKENS, TextSample, rollouts_of_texts
from raylhf.rewards.wire import Scored
from raylhf.text.prompts import parse_messages
from raylhf.text.sources import read_jsonl

BATCH_SIZE = 256
"""Samples that a reward is handed at once; a model among them makes its own smaller batches."""
RESULT_FIELDS = ("score", "parts")

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowFields:
    """Where a row has what."""

    prompt: str = "prompt"
    """A text or a list of chat messages; null or empty where the response is judged alone."""
    response: str = "response"
    """A text."""


@dataclass(frozen=True)
class ScoreSummary:
    """What came out for a whole file."""

    scores: np.ndarray
    """float64 [N]; NaN where invalid."""
    errors: tuple[str, ...]
    """A sentence for each failure."""

    @property
    def num_invalid(self) -> int:
        return int(np.isnan(self.scores).sum())

    def sentence(self) -> str:
        """Number of rows and of invalid scores, mean and standard deviation (ddof 1) of the others."""
        valid = self.scores[~np.isnan(self.scores)]
        mean = f"{valid.mean():.4f}" if len(valid) else "none"
        std = f"{valid.std(ddof=1):.4f}" if len(valid) > 1 else "none"
        return f"{len(self.scores)} rows, {self.num_invalid} invalid, mean {mean}, sd {std}"


class BatchScorer:
    """A reward worker that is handed texts, as many as there are, in batches."""

    def __init__(self, config: RewardPlaneConfig) -> None:
        self._worker = RewardWorker(config)
        self._worker.start()

    def score(self, samples: Iterable[TextSample]) -> Iterator[Scored]:
        """The scores of each batch, in order."""
        for batch in in_batches(samples, BATCH_SIZE):
            yield Scored.of(self._worker.score_now(rollouts_of_texts(batch)))


def score_file(config: RewardPlaneConfig, source: Path, destination: Path | None, fields: RowFields) -> ScoreSummary:
    """Write every row of `source` (JSONL) with its `score` and `parts` to `destination`, else to standard output.

    All rows are read once before anything is scored, so that a malformed one is told at once and leaves no output.

    Raises:
        ValueError: a row is malformed (file and line are named), or the destination exists.
    """
    if not source.is_file():
        raise ValueError(f"--input {source}: there is no such file")
    check_rows(source, fields)
    scores: list[float | None] = []
    errors: list[str] = []
    with open_new(destination, "--output") as out:
        scorer = BatchScorer(config)
        rows = (row for _, row in read_jsonl(source))
        for scored in scorer.score(sample for _, sample in read_samples(source, fields)):
            for i, row in enumerate(islice(rows, len(scored))):
                result = {"score": scored.scores[i], "parts": {name: part[i] for name, part in scored.parts.items()}}
                out.write(json.dumps(row | result) + "\n")
            out.flush()
            scores += scored.scores
            errors += scored.errors
    return ScoreSummary(np.array([np.nan if score is None else score for score in scores]), tuple(errors))


def check_rows(source: Path, fields: RowFields) -> None:
    """Raises: ValueError: there are no rows, or one is malformed or holds a number that JSON lacks."""
    num_rows = 0
    for where, row in read_jsonl(source):
        parse_sample(row, fields, where=where)
        try:
            json.dumps(row, allow_nan=False)
        except ValueError as error:  # Python's parser takes NaN, Infinity and 1e999
            raise ValueError(f"{where}: a number is NaN or infinite, which JSON does not have; write null") from error
        num_rows += 1
    if num_rows == 0:
        raise ValueError(f"--input {source}: holds no rows; give a file with one JSON object a line")


def read_samples(source: Path, fields: RowFields) -> Iterator[tuple[str, TextSample]]:
    """Where each row stands, and its sample."""
    for where, row in read_jsonl(source):
        yield where, parse_sample(row, fields, where=where)


def parse_sample(row: dict[str, Any], fields: RowFields, *, where: str) -> TextSample:
    """The prompt and response of a row; its other fields are the metadata.

    `is_truncated` (true or false) and `num_tokens` are read where they are there, as in docs/reward_protocol.md.
    """
    for key, option in ((fields.prompt, "--prompt-key"), (fields.response, "--response-key")):
        if key not in row:
            raise ValueError(f"{where}: no field {key!r} ({option}); the row has {', '.join(sorted(row))}")
    response = row[fields.response]
    if not isinstance(response, str):
        raise ValueError(f"{where}: the response is {response!r}; it must be a text")
    if taken := [name for name in RESULT_FIELDS if name in row]:
        raise ValueError(f"{where}: has a field {taken[0]!r} already, which the result would replace; rename it")
    is_truncated, num_tokens = row.get("is_truncated", False), row.get("num_tokens")
    if not isinstance(is_truncated, bool):
        raise ValueError(f"{where}: is_truncated is {is_truncated!r}; it must be true or false")
    if num_tokens is not None and (type(num_tokens) is not int or not 0 <= num_tokens <= MAX_NUM_TOKENS):
        raise ValueError(
            f"{where}: num_tokens is {num_tokens!r}; it must be a whole number from 0 to {MAX_NUM_TOKENS}, or null"
        )
    return TextSample(
        messages=parse_messages(row[fields.prompt], None, where=where) if row[fields.prompt] else (),
        response=response,
        metadata={key: value for key, value in row.items() if key not in (fields.prompt, fields.response)},
        is_truncated=is_truncated,
        num_tokens=num_tokens,
    )


@contextmanager
def open_new(destination: Path | None, option: str) -> Iterator[TextIO]:
    """A file that gets its name when it is complete, or standard output; a ValueError where the name is taken."""
    if destination is None:
        yield sys.stdout
        return
    require_new(destination, option)
    partial = destination.with_name(f"{destination.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("x", encoding="utf-8") as out:
            yield out
        partial.rename(destination)
    except OSError as error:
        raise ValueError(f"{option} {destination}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def require_new(file: Path, option: str) -> None:
    """Raises: ValueError: the file exists; results are not overwritten."""
    if file.exists():
        raise ValueError(f"{option} {file}: exists already and is not overwritten; remove it, or give another name")


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch

"""One row of judgements, of any kind and form, checked and read. docs/reward_data.md shows every form."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from raylhf.batch import Pair
from raylhf.config.judgements import JudgementDataConfig
from raylhf.text.prompts import parse_message, parse_messages

Messages = tuple[Mapping[str, str], ...]
Row = Mapping[str, Any]

TRANSCRIPT_START = "\n\nHuman:"
TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
"""What opens a turn of an Anthropic HH transcript; the same words inside a line belong to the text."""
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""Training computes in float32; a larger number would be infinite there."""
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class JudgedRow:
    """What one row says about n responses to one prompt."""

    where: str
    """File and line, for messages."""
    messages: Messages
    """The prompt; () where there is none."""
    responses: tuple[str, ...]
    """n texts."""
    pairs: tuple[Pair, ...] = ()
    """Comparisons, by position in `responses`."""
    ranks: np.ndarray | None = None
    """Places, float64 [n]; NaN where unranked."""
    targets: np.ndarray | None = None
    """Scores, float64 [n, J]; NaN where missing."""
    target_stds: np.ndarray | None = None
    """Standard deviation of the raters, float64 [n, J]; NaN where unknown."""
    step_ends: np.ndarray | None = None
    """Of the one response, the position after each step's last character, int64 [steps]."""
    step_labels: np.ndarray | None = None
    """Of the one response, 1 for a right step, 0 for a wrong one, NaN where nobody said, float64 [steps]."""
    subset: str = ""
    """Value of data.subset_key."""


def parse_rows(
    row: Row, config: JudgementDataConfig, *, attributes: Sequence[str], where: str
) -> tuple[JudgedRow, ...]:
    """The judgements of one row of `config.kind`: of `edits` one of each text, else one.

    Raises:
        ValueError: the row is malformed; the sentence names file, line and field.
    """
    prompt = (
        () if config.kind in ("pairs", "responses") else parse_prompt(row.get("prompt"), config.system_prompt, where)
    )
    match config.kind:
        case "pairs":
            found = (parse_pair(row, config.system_prompt, where),)
        case "responses":
            found = (parse_response(row, config.system_prompt, where),)
        case "rankings":
            found = (parse_ranking(row, prompt, where),)
        case "scores":
            found = (parse_scores(row, prompt, where),)
        case "attributes":
            found = (parse_attributes(row, prompt, attributes, where),)
        case "steps":
            found = (parse_steps(row, prompt, config.step_separator, where),)
        case "edits":
            found = parse_edits(row, prompt, where)
    subset = None if config.subset_key is None else row.get(config.subset_key)
    return found if subset is None else tuple(replace(judged, subset=str(subset)) for judged in found)


def parse_prompt(value: Any, system_prompt: str | None, where: str) -> Messages:
    """Chat turns of a prompt; () where it is absent, empty or blank."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return ()
    return parse_messages(value, system_prompt, where=where)


def parse_pair(row: Row, system_prompt: str | None, where: str) -> JudgedRow:
    """A comparison given as strings, as two chats with a common beginning, or as two HH transcripts."""
    chosen, rejected = require(row, "chosen", where), require(row, "rejected", where)
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise ValueError(
            f"{where}: chosen is a {type(chosen).__name__} and rejected a {type(rejected).__name__}; "
            f"both must be strings or both lists of chat messages"
        )
    messages = parse_prompt(row.get("prompt"), system_prompt, where)
    if isinstance(chosen, list):
        chats = parse_chat(chosen, "chosen", where), parse_chat(rejected, "rejected", where)
        messages, chosen, rejected = split_chats(*chats, messages, system_prompt, where)
    elif not messages and (chosen.startswith(TRANSCRIPT_START) or rejected.startswith(TRANSCRIPT_START)):
        chats = parse_transcript(chosen, "chosen", where), parse_transcript(rejected, "rejected", where)
        messages, chosen, rejected = split_chats(*chats, (), system_prompt, where)
    pair = Pair(
        chosen=0,
        rejected=1,
        margin=0.0 if row.get("margin") is None else number(row["margin"], "margin", where, low=0),
        agreement=parse_agreement(row.get("agreement"), where),
        time=None if row.get("time") is None else number(row["time"], "time", where),
        reward_gaps=parse_reward_gaps(row, where),
    )
    return JudgedRow(where, messages, (chosen, rejected), pairs=(pair,), ranks=np.array([1.0, 2.0]))


def parse_agreement(value: Any, where: str) -> float | None:
    """Share of raters who prefer the chosen response; None where the row does not say."""
    if value is None:
        return None
    agreement = number(value, "agreement", where, low=0, high=1)
    if agreement < 0.5:
        raise ValueError(
            f"{where}: agreement is {agreement}, so most raters prefer the rejected response; "
            f"swap chosen and rejected and write {1 - agreement:g}"
        )
    return agreement


def parse_reward_gaps(row: Row, where: str) -> dict[str, float]:
    """`chosen_rewards` minus `rejected_rewards`, by name; empty where the row has neither."""
    chosen, rejected = row.get("chosen_rewards"), row.get("rejected_rewards")
    if chosen is None and rejected is None:
        return {}
    if not isinstance(chosen, Mapping) or not isinstance(rejected, Mapping) or chosen.keys() != rejected.keys():
        raise ValueError(f"{where}: chosen_rewards and rejected_rewards must be objects with the same names")
    return {
        name: number(chosen[name], f"chosen_rewards.{name}", where)
        - number(rejected[name], f"rejected_rewards.{name}", where)
        for name in chosen
    }


def parse_response(row: Row, system_prompt: str | None, where: str) -> JudgedRow:
    """One good response: `prompt` and `response`, or chat `messages` that end with it."""
    if row.get("messages") is None:
        messages = parse_prompt(row.get("prompt"), system_prompt, where)
        return JudgedRow(where, messages, (text(row, "response", where),))
    if not isinstance(row["messages"], list):
        raise ValueError(f"{where}: messages is {row['messages']!r}; it must be a list of chat messages")
    *turns, last = parse_chat(row["messages"], "messages", where)
    return JudgedRow(where, parse_prompt(turns, system_prompt, where), (last["content"],))


def parse_chat(chat: list[Any], name: str, where: str) -> list[dict[str, str]]:
    """Chat turns that end with the assistant's response."""
    turns = [parse_message(message, where=f"{where}, {name}[{i}]") for i, message in enumerate(chat)]
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"{where}: {name} must end with a message of the assistant, which is the judged response")
    return turns


def parse_transcript(text: str, name: str, where: str) -> list[dict[str, str]]:
    """Chat turns of an HH transcript; turns of one speaker in a row are one turn, joined by a blank line."""
    before, *pieces = TRANSCRIPT_TURN.split(text)
    if before or not pieces:
        raise ValueError(f"{where}: {name} must be an HH transcript as the other is: it starts with '\\n\\nHuman:'")
    turns: list[dict[str, str]] = []
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = SPEAKERS[speaker], content.strip()
        if turns and turns[-1]["role"] == role:
            content = f"{turns.pop()['content']}\n\n{content}".strip()
        turns.append({"role": role, "content": content})
    return parse_chat(turns, name, where)


def split_chats(
    chosen: list[dict[str, str]],
    rejected: list[dict[str, str]],
    messages: Messages,
    system_prompt: str | None,
    where: str,
) -> tuple[Messages, str, str]:
    """(prompt, chosen response, rejected response) of two chats; `messages` is the row's own prompt, if any."""
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(f"{where}: chosen and rejected differ before the last turn; only that may differ")
    if len(chosen) > 1:
        prompt = parse_messages(chosen[:-1], system_prompt, where=f"{where}, the common turns of chosen and rejected")
        if messages and messages != prompt:
            raise ValueError(
                f"{where}: prompt differs from the turns that chosen and rejected share; leave prompt out, "
                f"or leave only the assistant's message in chosen and rejected"
            )
        messages = prompt
    return messages, chosen[-1]["content"], rejected[-1]["content"]


def parse_ranking(row: Row, messages: Messages, where: str) -> JudgedRow:
    """Responses with their places; without `ranks` they are given best first. Equal texts take their mean place."""
    texts = text_list(row, "responses", where, at_least=2)
    if row.get("ranks") is None:
        ranks = np.arange(1.0, len(texts) + 1)
    else:
        given = sized_list(row, "ranks", len(texts), where)
        ranks = np.array([number_or_nan(rank, f"ranks[{i}]", where, low=1) for i, rank in enumerate(given)])
        if np.isnan(ranks).all():
            raise ValueError(f"{where}: every value of ranks is null; rank one response at least, or leave the row out")
    responses = tuple(dict.fromkeys(texts))
    if len(responses) < len(texts):
        slots = np.array([responses.index(text) for text in texts])
        ranks = mean_by_slot(ranks[:, None], slots, len(responses))[:, 0]
    return JudgedRow(where, messages, responses, pairs=ranked_pairs(ranks), ranks=ranks)


def ranked_pairs(ranks: np.ndarray) -> tuple[Pair, ...]:
    """All pairs of responses with different places; one without a place is below all that have one."""
    places = np.nan_to_num(ranks, nan=np.inf)
    return tuple(Pair(int(i), int(j)) for i, j in np.argwhere(places[:, None] < places[None, :]))


def mean_by_slot(values: np.ndarray, slots: np.ndarray, num_slots: int) -> np.ndarray:
    """Mean of the rows of values [n, J] that share a slot, over those that are not NaN: [num_slots, J]."""
    sums, counts = np.zeros((2, num_slots, values.shape[1]))
    np.add.at(sums, slots, np.nan_to_num(values))
    np.add.at(counts, slots, ~np.isnan(values))
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def parse_scores(row: Row, messages: Messages, where: str) -> JudgedRow:
    """One response with `score` (and `score_std`), or `responses` with `scores` (and `score_stds`)."""
    if row.get("responses") is None:
        responses, names = [text(row, "response", where)], ["score"]
        scores, stds = [require(row, "score", where, null=True)], [row.get("score_std")]
    else:
        responses = text_list(row, "responses", where, at_least=1)
        scores = sized_list(row, "scores", len(responses), where)
        has_stds = row.get("score_stds") is not None
        stds = sized_list(row, "score_stds", len(responses), where) if has_stds else [None] * len(responses)
        names = [f"scores[{i}]" for i in range(len(responses))]
    named = zip(names, scores, stds, strict=True)
    values = [(number_or_nan(x, name, where), number_or_nan(s, f"std of {name}", where, low=0)) for name, x, s in named]
    targets, target_stds = np.array(values).T[:, :, None]
    return JudgedRow(where, messages, tuple(responses), targets=targets, target_stds=target_stds)


def parse_attributes(row: Row, messages: Messages, names: Sequence[str], where: str) -> JudgedRow:
    """Named scores of one `response`, or of each of `responses`; a name that is not asked for is ignored."""
    if row.get("responses") is None:
        responses, labels = [text(row, "response", where)], ["attributes"]
        given = [require(row, "attributes", where)]
    else:
        responses = text_list(row, "responses", where, at_least=1)
        given = sized_list(row, "attributes", len(responses), where)
        labels = [f"attributes[{i}]" for i in range(len(responses))]
    targets = np.full((len(responses), len(names)), np.nan)
    for k, (label, mapping) in enumerate(zip(labels, given, strict=True)):
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{where}: {label} is {mapping!r}; it must be an object of names with numbers or null")
        targets[k] = [number_or_nan(mapping.get(name), f"{label}.{name}", where) for name in names]
    return JudgedRow(where, messages, tuple(responses), targets=targets, target_stds=np.full_like(targets, np.nan))


def parse_steps(row: Row, messages: Messages, separator: str, where: str) -> JudgedRow:
    """A solution in steps with `labels`, or with `first_error`, after which nobody looked."""
    steps = text_list(row, "steps", where, at_least=1)
    if "" in steps:
        raise ValueError(f"{where}: steps[{steps.index('')}] is empty; leave it out, and its label")
    if row.get("labels") is not None:
        if row.get("first_error") is not None:
            raise ValueError(f"{where}: both labels and first_error are given; leave one out")
        given = sized_list(row, "labels", len(steps), where)
        labels = np.array([step_label(label, f"labels[{i}]", where) for i, label in enumerate(given)])
    else:
        labels = labels_until(require(row, "first_error", where, null=True), len(steps), where)
    lengths = np.array([len(step) for step in steps])
    ends = np.cumsum(lengths) + len(separator) * np.arange(len(steps))
    return JudgedRow(where, messages, (separator.join(steps),), step_ends=ends, step_labels=labels)


WORD = re.compile(r"\S+")


def parse_edits(row: Row, messages: Messages, where: str) -> tuple[JudgedRow, JudgedRow]:
    """A response and its edited form, word by word (TLCR, 2407.16574): what was taken out or replaced is wrong (0),
    what was put in is right (1), and what stayed is neither (1/2)."""
    texts = text(row, "original", where), text(row, "edited", where)
    words = [[match.group() for match in WORD.finditer(whole)] for whole in texts]
    labels = [np.full(len(own), 0.5) for own in words]
    for change, *ranges in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        if change != "equal":
            (labels[0][ranges[0] : ranges[1]], labels[1][ranges[2] : ranges[3]]) = (0.0, 1.0)
    ends = [np.array([match.end() for match in WORD.finditer(whole)], dtype=np.int64) for whole in texts]
    original, edited = (
        JudgedRow(where, messages, (whole,), step_ends=own_ends, step_labels=own_labels)
        for whole, own_ends, own_labels in zip(texts, ends, labels, strict=True)
    )
    return original, edited


def step_label(value: Any, name: str, where: str) -> float:
    """1 for a right step, 0 for a wrong one, NaN for null."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"{where}: {name} is {value!r}; it must be 1 (right), 0 (wrong) or null (not judged)")
    return float(value)


def labels_until(first_error: Any, num_steps: int, where: str) -> np.ndarray:
    """Labels of `num_steps` steps: right before the first error, NaN after it; all right for null and -1."""
    labels = np.ones(num_steps)
    if first_error is None or first_error == -1:
        return labels
    if isinstance(first_error, bool) or first_error not in range(num_steps):
        raise ValueError(
            f"{where}: first_error is {first_error!r}; it must be the position of one of the {num_steps} steps "
            f"(0 is the first), or -1 or null where all are right"
        )
    labels[int(first_error)] = 0.0
    labels[int(first_error) + 1 :] = math.nan
    return labels


def require(row: Row, name: str, where: str, *, null: bool = False) -> Any:
    """The value of a field that must be there; `null` says whether null is a value."""
    if name not in row or (row[name] is None and not null):
        raise ValueError(f"{where}: no field {name!r} (see data.kind); the row has {sorted(map(str, row))}")
    return row[name]


def text(row: Row, name: str, where: str) -> str:
    """The string in a field."""
    value = require(row, name, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {value!r}; it must be a string")
    return value


def text_list(row: Row, name: str, where: str, *, at_least: int) -> list[str]:
    """The strings in a field."""
    values = require(row, name, where)
    if not isinstance(values, list) or len(values) < at_least or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{where}: {name} must be a list of strings, {at_least} or more")
    return values


def sized_list(row: Row, name: str, size: int, where: str) -> list[Any]:
    """The values in a field that has one for each response or step."""
    values = require(row, name, where)
    if not isinstance(values, list) or len(values) != size:
        got = f"{len(values)} values" if isinstance(values, list) else repr(values)
        raise ValueError(f"{where}: {name} has {got}; it must be a list of {size}, null where one is missing")
    return values


def number(value: Any, name: str, where: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite float32 from `low` to `high`; a string that looks like one is refused, as it hides a broken export."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.inf > abs(value) > FLOAT32_MAX:
        raise ValueError(f"{where}: {name} is beyond float32, whose largest number is {FLOAT32_MAX:.3g}; scale it down")
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        limits = "".join([f" >= {low:g}" * (low > -math.inf), f" and <= {high:g}" * (high < math.inf)])
        raise ValueError(f"{where}: {name} is {value!r}; it must be a finite number{limits}, written without quotes")
    return float(value)


def number_or_nan(value: Any, name: str, where: str, *, low: float = -math.inf) -> float:
    """A finite number of `low` or more; NaN for null."""
    return math.nan if value is None else number(value, name, where, low=low)

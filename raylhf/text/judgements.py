"""From rows of judgements to reward-model examples: one for each prompt, with everything that raters said about it."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from raylhf.batch import Pair, RewardExample
from raylhf.config.judgements import JudgementDataConfig
from raylhf.config.reward_model import MultiValueHead, RewardHead
from raylhf.text.judgement_rows import JudgedRow, mean_by_slot, parse_rows
from raylhf.text.sources import read_rows


@dataclass(frozen=True)
class Judgements:
    """What a source holds."""

    examples: tuple[RewardExample, ...]
    """One for each prompt, in the order of first appearance; of rows without one, one for each set of responses."""
    num_rows: int
    """Rows read."""
    num_duplicates: int
    """Rows that repeat an earlier one in every field. They are kept: two raters may have said the same."""
    num_identical: int
    """Comparisons and rankings left out because all their responses are the same text."""
    num_contradictions: int
    """Pairs of responses (or steps) that raters judged both ways. Both judgements are kept."""


@dataclass(frozen=True)
class Split:
    """What a run trains on and what it is evaluated on."""

    train: list[RewardExample]
    held_out: list[RewardExample]
    sources: tuple[Judgements, ...]
    """Where they come from: one source that was split, or two."""


def load_split(data: JudgementDataConfig, head: RewardHead | None, *, seed: int) -> Split:
    """The judgements of a run; the held-out ones are drawn by `seed`, or those of data.held_out_path.

    `head` is the reward model's, whose attributes are read; None for a policy.
    """
    attributes = head.attributes if isinstance(head, MultiValueHead) else ()
    source = load_examples(data, attributes=attributes)
    if data.held_out_path is None:
        return Split(*split_examples(source.examples, data.held_out, seed), sources=(source,))
    held_out = load_examples(data, attributes=attributes, path=data.held_out_path)
    return Split(list(source.examples), list(held_out.examples), sources=(source, held_out))


def load_examples(
    config: JudgementDataConfig, *, attributes: Sequence[str] = (), path: str | None = None
) -> Judgements:
    """All judgements of `config.path`, or of `path` (data.held_out_path) where it is given.

    `attributes` names the columns of `targets` (data.kind=attributes). A bad row stops the run and is named.
    """
    source, key = (config.path, "data.path") if path is None else (path, "data.held_out_path")
    if config.kind == "attributes" and not attributes:
        raise ValueError("data.kind=attributes needs the names to learn; set objective.head.attributes")
    rows_by_key: dict[object, list[JudgedRow]] = {}
    seen: set[bytes] = set()
    num_rows = num_identical = 0
    has_subset = False
    for where, row in read_rows(source, split=config.split, dataset_config=config.dataset_config, key=key):
        num_rows += 1
        seen.add(hashlib.blake2b(json.dumps(row, sort_keys=True, default=str).encode(), digest_size=16).digest())
        has_subset |= config.subset_key in row
        found = parse_rows(row, config, attributes=attributes, where=where)
        responses = frozenset(response for judged in found for response in judged.responses)
        if config.kind in ("pairs", "rankings", "edits") and len(responses) == 1:
            num_identical += 1
            continue
        for judged in found:
            prompt = tuple((message["role"], message["content"]) for message in judged.messages)
            # Without a prompt, what keeps responses in one part of the split is the responses themselves.
            rows_by_key.setdefault(prompt or responses, []).append(judged)
    if not rows_by_key:
        raise ValueError(f"{key}={source!r} holds no judgements: {num_rows} rows, {num_identical} of identical texts")
    if config.subset_key is not None and not has_subset:
        raise ValueError(f"{key}={source!r} has no row with the field {config.subset_key!r}; correct data.subset_key")
    merged = [merge_rows(rows, index, kind=config.kind) for index, rows in enumerate(rows_by_key.values())]
    examples = tuple(example for example, _ in merged)
    check_targets(examples, attributes if config.kind == "attributes" else ("score",), f"{key}={source!r}")
    return Judgements(examples, num_rows, num_rows - len(seen), num_identical, sum(count for _, count in merged))


def check_targets(examples: Sequence[RewardExample], names: Sequence[str], source: str) -> None:
    """Refuse a score that no response has: nothing could be learnt of it."""
    if examples[0].targets is None:
        return
    has_value = np.any([~np.isnan(e.targets).all(axis=0) for e in examples if e.targets is not None], axis=0)
    missing = [name for name, found in zip(names, has_value, strict=True) if not found]
    if missing:
        raise ValueError(
            f"{source} has no row with a number for {', '.join(missing)}; "
            f"correct the name (objective.head.attributes for attributes) or the data"
        )


def merge_rows(rows: Sequence[JudgedRow], index: int, *, kind: str) -> tuple[RewardExample, int]:
    """(the example of one prompt, number of its contradictions). Equal responses become one."""
    positions = {text: k for k, text in enumerate(dict.fromkeys(text for row in rows for text in row.responses))}
    slots = [[positions[text] for text in row.responses] for row in rows]
    pairs, ranks = merge_comparisons(rows, slots)
    num_contradictions = count_contradictions(pairs)
    targets = target_stds = None
    step_ends: tuple[np.ndarray, ...] = ()
    step_labels: tuple[np.ndarray, ...] = ()
    if kind in ("scores", "attributes"):
        targets, target_stds = merge_targets(rows, np.concatenate(slots), len(positions))
    if kind == "scores" and targets is not None:
        pairs, ranks = scored_pairs(targets[:, 0]), dense_ranks(targets[:, 0])
    if kind in ("steps", "edits"):
        takes_majority = kind == "steps"
        step_ends, step_labels, num_contradictions = merge_steps(
            rows, slots, len(positions), takes_majority=takes_majority
        )
    example = RewardExample(
        index=index,
        messages=rows[0].messages,
        responses=tuple(positions),
        pairs=pairs,
        ranks=ranks,
        targets=targets,
        target_stds=target_stds,
        step_ends=step_ends,
        step_labels=step_labels,
        subset=rows[0].subset,
    )
    return example, num_contradictions


def merge_comparisons(
    rows: Sequence[JudgedRow], slots: Sequence[Sequence[int]]
) -> tuple[tuple[Pair, ...], np.ndarray | None]:
    """All pairs of the rows, and the places where there is one row: places of two rankings do not compare."""
    if len(rows) == 1:
        return rows[0].pairs, rows[0].ranks
    pairs = tuple(
        replace(pair, chosen=places[pair.chosen], rejected=places[pair.rejected])
        for row, places in zip(rows, slots, strict=True)
        for pair in row.pairs
    )
    return pairs, None


def count_contradictions(pairs: Sequence[Pair]) -> int:
    """Pairs of responses of which each was preferred to the other at least once."""
    directions = {(pair.chosen, pair.rejected) for pair in pairs}
    return sum((rejected, chosen) in directions for chosen, rejected in directions) // 2


def merge_targets(rows: Sequence[JudgedRow], slots: np.ndarray, num_responses: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation of the raters) of each response's scores, [K, J] each.

    For a response scored in several rows the variance is the mean of the rows' own (0 where a row does not say: one
    rater) plus the variance of their means.
    """
    values = np.concatenate([row.targets for row in rows if row.targets is not None])
    stds = np.concatenate([row.target_stds for row in rows if row.target_stds is not None])
    if len(values) == num_responses:  # every response is scored once, in the order of `slots`
        return values, stds
    mean = mean_by_slot(values, slots, num_responses)
    is_scored = ~np.isnan(values)
    within = mean_by_slot(np.where(is_scored, np.nan_to_num(stds) ** 2, np.nan), slots, num_responses)
    between = mean_by_slot((values - mean[slots]) ** 2, slots, num_responses)
    counts = np.zeros_like(mean)
    np.add.at(counts, slots, is_scored)
    alone = mean_by_slot(np.where(is_scored, stds, np.nan), slots, num_responses)
    return mean, np.where(counts > 1, np.sqrt(within + between), alone)


def scored_pairs(scores: np.ndarray) -> tuple[Pair, ...]:
    """All pairs of responses with different scores [K]; the margin is the difference. A missing score makes none."""
    gaps = scores[:, None] - scores[None, :]
    return tuple(Pair(int(i), int(j), margin=float(gaps[i, j])) for i, j in np.argwhere(gaps > 0))


def dense_ranks(scores: np.ndarray) -> np.ndarray:
    """Place of each score [K], 1 for the highest; equal scores share one, the next place follows on. NaN stays."""
    ranks = np.full(len(scores), np.nan)
    is_scored = ~np.isnan(scores)
    ranks[is_scored] = np.unique(-scores[is_scored], return_inverse=True)[1] + 1
    return ranks


def merge_steps(
    rows: Sequence[JudgedRow], slots: Sequence[Sequence[int]], num_responses: int, *, takes_majority: bool
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], int]:
    """(ends, labels, number of steps labelled both ways) of the solutions.

    A solution labelled in several rows takes each step's majority, NaN where the raters are even; or the mean.
    """
    ends: list[np.ndarray | None] = [None] * num_responses
    votes: list[list[np.ndarray]] = [[] for _ in range(num_responses)]
    for row, (k,) in zip(rows, slots, strict=True):
        assert row.step_ends is not None and row.step_labels is not None  # parse_steps sets both
        known = ends[k]
        if known is not None and not np.array_equal(known, row.step_ends):
            raise ValueError(f"{row.where}: steps cuts a solution otherwise than an earlier row does; cut both alike")
        ends[k] = row.step_ends
        votes[k].append(row.step_labels)
    means = [mean_by_slot(np.stack(v).reshape(-1, 1), np.tile(np.arange(v[0].size), len(v)), v[0].size) for v in votes]
    if not takes_majority:
        return tuple(e for e in ends if e is not None), tuple(mean[:, 0] for mean in means), 0
    labels = [np.select([mean[:, 0] > 0.5, mean[:, 0] < 0.5], [1.0, 0.0], np.nan) for mean in means]
    num_contradictions = sum(int(np.sum((mean > 0) & (mean < 1))) for mean in means)
    return tuple(e for e in ends if e is not None), tuple(labels), num_contradictions


def split_examples(
    examples: Sequence[RewardExample], held_out: float, seed: int
) -> tuple[list[RewardExample], list[RewardExample]]:
    """(training, held-out) examples, whole prompts, each in the order given; the held-out ones are drawn by `seed`.

    `held_out` is a share below 1 (rounded, at least one prompt) or a whole number of prompts.
    """
    if held_out >= 1 and held_out != int(held_out):
        raise ValueError(f"data.held_out={held_out:g} is no whole number of prompts; round it, or give a share below 1")
    num_held_out = int(held_out) if held_out >= 1 or held_out == 0 else max(1, round(held_out * len(examples)))
    if num_held_out >= len(examples):
        raise ValueError(
            f"data.held_out={held_out:g} leaves nothing to train on: there are {len(examples)} prompts; "
            f"set it to at most {max(len(examples) - 1, 0)}"
        )
    drawn = set(random.Random(f"held_out/{seed}").sample(range(len(examples)), num_held_out))
    training = [example for i, example in enumerate(examples) if i not in drawn]
    return training, [examples[i] for i in sorted(drawn)]


def examples_digest(examples: Sequence[RewardExample]) -> str:
    """12 hex digits that change with anything in the examples or their order; the same in every process."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), default=np.ndarray.tolist).encode() + b"\n")
    return digest.hexdigest()[:12]

"""What a set of judgements holds, before anything is trained on it: counts, lengths, balance, leaks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raylhf.batch import RewardExample
from raylhf.text.judgements import Judgements


@dataclass(frozen=True)
class PartCounts:
    """Sizes of the training or the held-out part."""

    prompts: int
    """Examples; one for each prompt."""
    responses: int
    """Different responses to a prompt, over all prompts."""
    comparisons: int
    """Pairs of a better and a worse response."""
    rankings: int
    """Prompts of three responses or more that have places."""
    scores: int
    """Numbers that are not missing, over all attributes."""
    labelled_steps: int
    """Steps called right or wrong."""


@dataclass(frozen=True)
class LengthStats:
    """Words of the responses."""

    mean: float
    p50: float
    p95: float
    max: int


@dataclass(frozen=True)
class ScoreStats:
    """Scores of one attribute over all responses."""

    name: str
    num: int
    """Responses that have one."""
    min: float
    mean: float
    sd: float
    """Population standard deviation."""
    max: float


@dataclass(frozen=True)
class DataReport:
    """Facts about both parts together, unless their name says otherwise; None where the data has no such thing."""

    train: PartCounts
    held_out: PartCounts
    num_rows: int
    """Rows read."""
    num_duplicates: int
    """Rows that repeat an earlier one in every field."""
    num_identical: int
    """Comparisons left out because their texts are the same."""
    num_contradictions: int
    """Pairs of responses (or steps) judged both ways."""
    words: LengthStats
    chosen_longer: float | None
    """Share of pairs whose chosen response has more words, of those whose lengths differ: 0.5 is no length bias."""
    mean_agreement: float | None
    """Mean share of raters who prefer the chosen response, over the pairs that say."""
    tied: float | None
    """Share of ties among all pairs of placed responses to one prompt."""
    right_steps: float | None
    """Share of right steps among the labelled ones."""
    scores: tuple[ScoreStats, ...]
    """One for each attribute."""
    shared_prompts: int
    """Held-out prompts that are in the training part too."""
    shared_responses: int
    """Different held-out response texts that are in the training part too."""
    subsets: tuple[tuple[str, int], ...]
    """(value of data.subset_key, number of prompts), the largest first; empty without one."""


def data_report(
    train: Sequence[RewardExample],
    held_out: Sequence[RewardExample],
    *,
    loaded: Sequence[Judgements],
    attributes: Sequence[str] = (),
) -> DataReport:
    """The report of a training and a held-out part. `loaded` are the sources they come from (two with held_out_path).

    `attributes` names the columns of the scores; plain scores have one, called "score".
    """
    examples = [*train, *held_out]
    shared_prompts, shared_responses = leaks(train, held_out)
    lengths = [np.array([len(response.split()) for response in example.responses]) for example in examples]
    words = np.concatenate(lengths)
    gaps = [int(n[pair.chosen] - n[pair.rejected]) for e, n in zip(examples, lengths, strict=True) for pair in e.pairs]
    labels = [label for example in examples for steps in example.step_labels for label in steps[~np.isnan(steps)]]
    subsets = Counter(example.subset for example in examples)
    return DataReport(
        train=part_counts(train),
        held_out=part_counts(held_out),
        num_rows=sum(source.num_rows for source in loaded),
        num_duplicates=sum(source.num_duplicates for source in loaded),
        num_identical=sum(source.num_identical for source in loaded),
        num_contradictions=sum(source.num_contradictions for source in loaded),
        words=LengthStats(
            float(words.mean()), float(np.percentile(words, 50)), float(np.percentile(words, 95)), int(words.max())
        ),
        chosen_longer=mean_or_none([gap > 0 for gap in gaps if gap != 0]),
        mean_agreement=mean_or_none([p.agreement for e in examples for p in e.pairs if p.agreement is not None]),
        tied=tied_share(examples),
        right_steps=mean_or_none(labels),
        scores=score_stats(examples, attributes),
        shared_prompts=shared_prompts,
        shared_responses=shared_responses,
        subsets=() if set(subsets) == {""} else tuple(subsets.most_common()),
    )


def leaks(train: Sequence[RewardExample], held_out: Sequence[RewardExample]) -> tuple[int, int]:
    """(prompts, different response texts) of the held-out part that are in the training part too."""
    texts, held_out_texts = ({text for e in examples for text in e.responses} for examples in (train, held_out))
    return len(prompt_keys(held_out) & prompt_keys(train)), len(held_out_texts & texts)


def part_counts(examples: Sequence[RewardExample]) -> PartCounts:
    """Sizes of one part."""
    return PartCounts(
        prompts=len(examples),
        responses=sum(len(example.responses) for example in examples),
        comparisons=sum(len(example.pairs) for example in examples),
        rankings=sum(example.ranks is not None and len(example.ranks) > 2 for example in examples),
        scores=sum(int(np.sum(~np.isnan(example.targets))) for example in examples if example.targets is not None),
        labelled_steps=sum(int(np.sum(~np.isnan(labels))) for example in examples for labels in example.step_labels),
    )


def mean_or_none(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return float(np.mean(values)) if values else None


def tied_share(examples: Sequence[RewardExample]) -> float | None:
    """Ties over all pairs of placed responses to one prompt; None where no two responses have places."""
    num_tied = num_pairs = 0
    for example in examples:
        if example.ranks is not None:
            places = example.ranks[~np.isnan(example.ranks)]
            sizes = np.unique(places, return_counts=True)[1]
            num_tied += int(np.sum(sizes * (sizes - 1) // 2))
            num_pairs += len(places) * (len(places) - 1) // 2
    return num_tied / num_pairs if num_pairs else None


def score_stats(examples: Sequence[RewardExample], attributes: Sequence[str]) -> tuple[ScoreStats, ...]:
    """Statistics of each column of the scores that has one."""
    columns = [example.targets for example in examples if example.targets is not None]
    if not columns:
        return ()
    stats = []
    for name, column in zip(attributes or ("score",), np.concatenate(columns).T, strict=True):
        x = column[~np.isnan(column)]
        if len(x):
            stats.append(ScoreStats(name, len(x), float(x.min()), float(x.mean()), float(x.std()), float(x.max())))
    return tuple(stats)


def prompt_keys(examples: Sequence[RewardExample]) -> set[tuple[tuple[str, str], ...]]:
    """The different prompts; an example without one has none to share."""
    return {tuple((m["role"], m["content"]) for m in example.messages) for example in examples if example.messages}


def lines(report: DataReport) -> list[tuple[str, str]]:
    """(label, value) of everything that the data has, for printing."""
    words = report.words
    rows = [("rows read", f"{report.num_rows:,}")]
    for name in ("prompts", "responses", "comparisons", "rankings", "scores", "labelled_steps"):
        train, held_out = getattr(report.train, name), getattr(report.held_out, name)
        if train or held_out:
            rows.append((name.replace("_", " "), f"{train:,} train, {held_out:,} held out"))
    rows += [
        ("repeated rows", f"{report.num_duplicates:,}"),
        ("left out (identical texts)", f"{report.num_identical:,}"),
        ("judged both ways", f"{report.num_contradictions:,}"),
        ("words a response", f"mean {words.mean:.1f}, p50 {words.p50:.0f}, p95 {words.p95:.0f}, max {words.max:,}"),
    ]
    shares = (
        ("chosen is longer", report.chosen_longer),
        ("mean agreement of raters", report.mean_agreement),
        ("ties", report.tied),
        ("right steps", report.right_steps),
    )
    rows += [(label, f"{share:.1%}") for label, share in shares if share is not None]
    rows += [
        (f"score: {s.name}", f"{s.num:,}, min {s.min:.4g}, mean {s.mean:.4g}, sd {s.sd:.4g}, max {s.max:.4g}")
        for s in report.scores
    ]
    rows += [
        ("held-out prompts also in train", f"{report.shared_prompts:,}"),
        ("held-out responses also in train", f"{report.shared_responses:,}"),
    ]
    return rows + [(f"subset {name or '(none)'}", f"{num:,} prompts") for name, num in report.subsets]

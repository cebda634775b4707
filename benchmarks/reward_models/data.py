"""Rows of raylhf's judgement schemas (docs/reward_data.md) from public human data, cut into folds by topic.

The files are the gzip JSON Lines of the data folder; its README has their sources and licences.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NUM_FOLDS = 4


def read(folder: Path, name: str) -> list[Row]:
    """The rows of one file."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def fold_of(keys: Sequence[str], *, seed: int = 0, num_folds: int = NUM_FOLDS) -> dict[str, int]:
    """A fold for each key, folds as equal in number as they can be."""
    names = sorted(set(keys))
    random.Random(seed).shuffle(names)
    return {name: i % num_folds for i, name in enumerate(names)}


def debate(topic: str) -> str:
    """Both sides of one debate stay in one fold."""
    return topic.split("_")[0]


def ukp_prompt(topic: str) -> str:
    question, side = topic.split("_", 1)
    question, side = question.replace("-", " ").strip(), side.replace("-", " ").strip()
    return f"Argue convincingly. Debate: {question}. Your side: {side}."


def ukp_pairs(folder: Path) -> Iterator[tuple[str, Row]]:
    """(debate, row): the cleaned gold comparisons, with the share of the workers who agree with them."""
    texts = {(r["topic"], r["id"]): r["text"] for r in read(folder, "b_kway/ukpconvarg1_args_ranked")}
    for row in read(folder, "a_pairwise/ukpconvarg1_pairs"):
        votes = [vote for _, vote in row["votes"] if vote != "equal"]
        share_a1 = votes.count("a1") / len(votes) if votes else 0.5
        if row["strict"] is None or (row["topic"], row["a1"]) not in texts or (row["topic"], row["a2"]) not in texts:
            continue
        chosen, rejected = ("a1", "a2") if row["strict"] == "a1" else ("a2", "a1")
        share = share_a1 if chosen == "a1" else 1 - share_a1
        yield (
            debate(row["topic"]),
            {
                "prompt": ukp_prompt(row["topic"]),
                "chosen": texts[row["topic"], row[chosen]],
                "rejected": texts[row["topic"], row[rejected]],
                "agreement": max(share, 0.5),
            },
        )


def ukp_votes(folder: Path) -> Iterator[tuple[str, Row]]:
    """(debate, row): every comparison with a majority, clean or not; `disagreement` is the entropy of all its votes."""
    import math

    texts = {(r["topic"], r["id"]): r["text"] for r in read(folder, "b_kway/ukpconvarg1_args_ranked")}
    for row in read(folder, "a_pairwise/ukpconvarg1_pairs"):
        votes = [vote for _, vote in row["votes"]]
        first, second = votes.count("a1"), votes.count("a2")
        if first == second or (row["topic"], row["a1"]) not in texts or (row["topic"], row["a2"]) not in texts:
            continue
        shares = [votes.count(v) / len(votes) for v in ("a1", "a2", "equal") if v in votes]
        chosen, rejected = ("a1", "a2") if first > second else ("a2", "a1")
        yield (
            debate(row["topic"]),
            {
                "prompt": ukp_prompt(row["topic"]),
                "chosen": texts[row["topic"], row[chosen]],
                "rejected": texts[row["topic"], row[rejected]],
                "disagreement": -sum(p * math.log(p) for p in shares),
            },
        )


def ukp_rankings(folder: Path) -> Iterator[tuple[str, Row]]:
    """(debate, row): one ranking a topic, most convincing first (PageRank of comparisons; lower is better)."""
    by_topic: dict[str, list[Row]] = {}
    for row in read(folder, "b_kway/ukpconvarg1_args_ranked"):
        by_topic.setdefault(row["topic"], []).append(row)
    for topic, rows in by_topic.items():
        rows.sort(key=lambda row: row["rank_score"])
        yield debate(topic), {"prompt": ukp_prompt(topic), "responses": [row["text"] for row in rows]}


def hh_pairs(folder: Path) -> Iterator[tuple[str, Row]]:
    """(first human turn, row): Anthropic's harmless-base test transcripts."""
    for row in read(folder, "a_pairwise/hh_harmless_base_test"):
        opening = row["chosen"].split("\n\nAssistant:")[0]
        if row["same_prompt"]:
            yield opening, {"chosen": row["chosen"], "rejected": row["rejected"]}


def movie_scores(folder: Path) -> Iterator[tuple[str, Row]]:
    """(id, row): film review snippets with the mean of about 20 raters (-4 to 4) and their standard deviation."""
    for row in read(folder, "d_pointwise/vader_movie"):
        yield row["id"].split("_")[0], {"response": row["text"], "score": row["mean"], "score_std": row["sd"]}


def summeval_prompt(row: Row) -> str:
    return "Summarise: " + row["source"]


ATTRIBUTES = ("coherence", "consistency", "fluency", "relevance")


def summeval_rankings(folder: Path) -> Iterator[tuple[str, Row]]:
    """(article, row): sixteen summaries ranked by the mean of four expert attributes, ties kept."""
    for row in read(folder, "b_kway/summeval_k16"):
        means = [sum(c["scores"][name] for name in ATTRIBUTES) / 4 for c in row["candidates"]]
        order = sorted(set(means), reverse=True)
        yield (
            row["id"],
            {
                "prompt": summeval_prompt(row),
                "responses": [c["summary"] for c in row["candidates"]],
                "ranks": [1 + order.index(mean) for mean in means],
            },
        )


def summeval_attributes(folder: Path) -> Iterator[tuple[str, Row]]:
    """(article, row): sixteen summaries with four attributes of 1 to 5 each."""
    for row in read(folder, "b_kway/summeval_k16"):
        yield (
            row["id"],
            {
                "prompt": summeval_prompt(row),
                "responses": [c["summary"] for c in row["candidates"]],
                "attributes": [c["scores"] for c in row["candidates"]],
            },
        )


def process_steps(folder: Path) -> Iterator[tuple[str, Row]]:
    """(problem, row): solutions of GSM8K problems in steps, with the first wrong one."""
    for row in read(folder, "f_steps/processbench_gsm8k"):
        yield row["problem"], {"prompt": row["problem"], "steps": row["steps"], "first_error": row["label"]}


def word_sorting_steps(folder: Path) -> Iterator[tuple[str, Row]]:
    """(words, row): chains of thought that sort words, with the first mistake."""
    for row in read(folder, "f_steps/bbmistake_word_sorting"):
        yield row["input"], {"prompt": row["input"], "steps": row["steps"], "first_error": row["mistake_index"]}


SETS: dict[str, tuple[str, Callable[[Path], Iterator[tuple[str, Row]]]]] = {
    "ukp_pairs": ("pairs", ukp_pairs),
    "ukp_votes": ("pairs", ukp_votes),
    "ukp_rankings": ("rankings", ukp_rankings),
    "hh_pairs": ("pairs", hh_pairs),
    "movie_scores": ("scores", movie_scores),
    "summeval_rankings": ("rankings", summeval_rankings),
    "summeval_attributes": ("attributes", summeval_attributes),
    "process_steps": ("steps", process_steps),
    "word_sorting_steps": ("steps", word_sorting_steps),
}
"""(data.kind, rows with the key that decides their fold)."""


def write_fold(folder: Path, name: str, fold: int, into: Path, *, max_train: int | None = None) -> tuple[Path, Path]:
    """Training and test file of one fold; `max_train` keeps so many training rows, drawn by seed 0.

    `cluster` in a row is what its fold was drawn by: what intervals resample.
    """
    rows = list(SETS[name][1](folder))
    folds = fold_of([key for key, _ in rows])
    # Raters who are split, or against the cleaned label, teach nothing; such rows are judged all the same.
    train = [row | {"cluster": key} for key, row in rows if folds[key] != fold and row.get("agreement", 1.0) > 0.5]
    test = [row | {"cluster": key} for key, row in rows if folds[key] == fold]
    if max_train is not None and len(train) > max_train:
        train = random.Random(0).sample(train, max_train)
    into.mkdir(parents=True, exist_ok=True)
    files = (into / f"{name}_{fold}_train.jsonl", into / f"{name}_{fold}_test.jsonl")
    for file, part in zip(files, (train, test), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return files

"""Train reward models on real human judgements and compare them with a bag of words.

    python benchmarks/reward_models/run.py --data FOLDER [--only NAME ...] [--work runs/reward_models]

Trains with `raylhf train`, scores the held-out responses with `raylhf score`, and writes `results.json` and a table
into this folder. FOLDER holds the gzip JSON Lines that data.py names. Needs raylhf[cpu,bench] and scikit-learn.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from baselines import PairBaseline, ScoreBaseline, StepBaseline, step_label
from data import ATTRIBUTES, SETS, Row, write_fold
from experiments import EXPERIMENTS, Experiment
from intervals import accuracy, correlation, first_error_f1, interval, mean_of_all, roc_area, show
from scipy.stats import spearmanr

from raylhf.text.judgement_rows import parse_transcript

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
RAYLHF = [sys.executable, "-m", "raylhf.cli"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--work", type=Path, default=Path("runs/reward_models"))
    parser.add_argument("--reuse", action="store_true", help="evaluate the scores that are in --work already")
    arguments = parser.parse_args()
    for name in arguments.only:
        started = time.perf_counter()
        experiment = EXPERIMENTS[name]
        place = (arguments.data, arguments.work)
        folds = [run_fold(name, experiment, fold, *place, reuse=arguments.reuse) for fold in experiment.folds]
        values = EVALUATIONS[SETS[experiment.data][0]](experiment, folds)
        known = json.loads(RESULTS.read_text()).get(name) if RESULTS.is_file() and arguments.reuse else None
        minutes = (time.perf_counter() - started) / 60 if known is None else known["minutes"]
        print(f"{name} ({minutes:.1f} min): {show(values)}", flush=True)
        keep(name, {"values": values, "minutes": minutes, "train_rows": [len(f["train"]) for f in folds]})


def run_fold(name: str, experiment: Experiment, fold: int, data: Path, work: Path, *, reuse: bool) -> dict[str, Any]:
    """Train on one fold's training rows; its rows, exported model and the scores of its held-out responses."""
    train, test = write_fold(data, experiment.data, fold, work / "data", max_train=experiment.max_train)
    kind = SETS[experiment.data][0]
    run_name = f"{name}_{fold}"
    settings = experiment.settings(run_name, str(train), str(test), kind, str(work))
    config = work / f"{run_name}.yaml"
    if not reuse:
        config.write_text(json.dumps(settings))
        subprocess.run([*RAYLHF, "train", str(config)], check=True, stdout=subprocess.DEVNULL)
    export = work / run_name / "export"
    rows = {part: [json.loads(line) for line in file.open()] for part, file in (("train", train), ("test", test))}
    responses = [response for row in rows["test"] for response in responses_of(row, kind)]
    scored = score(export, experiment, responses, work / f"{run_name}_scores.jsonl", reuse=reuse)
    return {**rows, "export": str(export), "scores": scored}


def responses_of(row: Row, kind: str) -> list[tuple[str, str]]:
    """(prompt, response) of everything that a row judges."""
    prompt = row.get("prompt", "")
    if kind == "steps":
        return [(prompt, "\n\n".join(row["steps"]))]
    if kind == "pairs" and not prompt:
        prompt, chosen = split_transcript(row["chosen"])
        return [(prompt, chosen), (prompt, split_transcript(row["rejected"])[1])]
    if kind == "pairs":
        return [(prompt, row["chosen"]), (prompt, row["rejected"])]
    return [(prompt, response) for response in row.get("responses", [row.get("response")])]


def split_transcript(text: str) -> tuple[str, str]:
    """(chat turns before it as JSON, last assistant turn) of an HH transcript, as raylhf itself reads it."""
    *turns, last = parse_transcript(text, "transcript", "data")
    return json.dumps(turns), last["content"]


def score(
    export: Path, experiment: Experiment, pairs: Sequence[tuple[str, str]], output: Path, *, reuse: bool
) -> dict[Any, Row]:
    """`raylhf score` of the unique responses: {(prompt, response): {score, parts}}."""
    unique = list(dict.fromkeys(pairs))
    if reuse:
        rows = [json.loads(line) for line in output.open()]
        return dict(zip(unique, rows, strict=True))
    leaf = {"scalar": "explicit", "multi_value": "multi_value", "ensemble": "ensemble", "token": "process"}
    kind = leaf[experiment.head["kind"]]
    path = {"paths": [str(export)]} if kind == "ensemble" else {"path": str(export)}
    graph = {"kind": kind, **path, "max_tokens": experiment.max_tokens}
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps({"reward": {"graph": graph, "threads": 2, "missing_eos_penalty": 0}}))
    source = output.with_name(f"{output.stem}_input.jsonl")
    with source.open("w") as file:
        for prompt, response in unique:
            messages = json.loads(prompt) if prompt.startswith("[{") else prompt
            file.write(json.dumps({"prompt": messages, "response": response}) + "\n")
    output.unlink(missing_ok=True)
    command = [*RAYLHF, "score", str(config), "--input", str(source), "--output", str(output)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in output.open()]
    return dict(zip(unique, rows, strict=True))


def evaluate_pairs(experiment: Experiment, folds: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Accuracy of model, bag of words and length; and what an ensemble's members say."""
    hits: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    members: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number, fold in enumerate(folds):
        judged = [responses_of(row, "pairs") for row in fold["train"]]
        words = PairBaseline([(chosen[1], rejected[1]) for chosen, rejected in judged])
        for row in fold["test"]:
            chosen, rejected = responses_of(row, "pairs")
            prompt = f"{number}/{row['cluster']}"
            outcomes = {
                "model": fold["scores"][chosen]["score"] - fold["scores"][rejected]["score"],
                "bag of words": float(np.subtract(*words.score([chosen[1], rejected[1]]))),
                "longer": len(chosen[1]) - len(rejected[1]),
            }
            if experiment.head["kind"] == "ensemble":
                gaps = member_gaps(fold["scores"][chosen], fold["scores"][rejected])
                outcomes |= {f"member {k}": gap for k, gap in enumerate(gaps)}
                members[prompt].append((*disagreement(np.array(gaps)).values(), row["disagreement"]))
            for who, gap in outcomes.items():
                hits[who][prompt].append(float(accuracy(np.array(gap))))
    prompts = list(hits["model"])
    values = {
        f"accuracy, {who}": interval([np.array(own[p]) for p in prompts], mean_of_all) for who, own in hits.items()
    }
    gains = [np.array(hits["model"][p]) - np.array(hits["bag of words"][p]) for p in prompts]
    values["model minus bag of words"] = interval(gains, mean_of_all)
    if members:
        own = [np.array(hits["model"][p]) for p in prompts]
        each = [np.mean([hits[who][p] for who in hits if who.startswith("member")], axis=0) for p in prompts]
        gains = [mean - average for mean, average in zip(own, each, strict=True)]
        values["mean of the ensemble minus its average member"] = interval(gains, mean_of_all)
        pairs = [np.array(members[p]) for p in prompts]
        for column, what in enumerate(disagreement(np.zeros(2))):
            columns = [own[:, [column, -1]] for own in pairs]
            values[f"Spearman of vote entropy and {what}"] = interval(columns, correlation("spearman"))
    return values


def disagreement(gaps: np.ndarray) -> dict[str, float]:
    """How unsure an ensemble is about one pair, from its members' gaps [M], in three ways."""
    wins = 1 / (1 + np.exp(-gaps))
    mean = wins.mean()
    return {
        "the members' spread of gaps": float(gaps.std(ddof=1)),
        "the members' spread of win probabilities": float(wins.std(ddof=1)),
        "the entropy of the mean win probability": float(-mean * np.log(mean) - (1 - mean) * np.log(1 - mean)),
    }


def member_gaps(chosen: Row, rejected: Row) -> list[float]:
    """Chosen minus rejected score of each ensemble member."""
    names = sorted(name for name in chosen["parts"] if "member" in name)
    return [chosen["parts"][name] - rejected["parts"][name] for name in names]


def evaluate_scores(experiment: Experiment, folds: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Pearson and Spearman with the raters' mean."""
    table: dict[str, list[np.ndarray]] = defaultdict(list)
    for fold in folds:
        words = ScoreBaseline([row["response"] for row in fold["train"]], [row["score"] for row in fold["train"]])
        baseline = words.score([row["response"] for row in fold["test"]])
        for row, value in zip(fold["test"], baseline, strict=True):
            table["model"].append(np.array([[fold["scores"]["", row["response"]]["score"], row["score"]]]))
            table["bag of words"].append(np.array([[value, row["score"]]]))
    return {
        f"{kind}, {who}": interval(rows, correlation(kind))
        for kind in ("pearson", "spearman")
        for who, rows in table.items()
    }


def evaluate_rankings(experiment: Experiment, folds: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Mean over prompts of the Spearman correlation with the human ranking, and accuracy over all pairs."""
    rank: dict[str, list[np.ndarray]] = defaultdict(list)
    hits: dict[str, list[np.ndarray]] = defaultdict(list)
    clusters = [row["cluster"] for fold in folds for row in fold["test"]]
    for fold in folds:
        words = PairBaseline([pair for row in fold["train"] for pair in ranked_pairs(row)])
        for row in fold["test"]:
            place = np.array(ranks_of(row), dtype=float)
            scores = {
                "model": np.array([fold["scores"][key]["score"] for key in responses_of(row, "rankings")]),
                "bag of words": words.score(row["responses"]),
            }
            first, second = np.nonzero(place[:, None] < place[None, :])
            for who, values in scores.items():
                rank[who].append(np.array([spearmanr(values, -place)[0]]))
                hits[who].append(accuracy(values[first] - values[second]))
    values = {f"Spearman, {who}": interval(clustered(own, clusters), mean_of_all) for who, own in rank.items()}
    return values | {f"accuracy, {who}": interval(clustered(own, clusters), mean_of_all) for who, own in hits.items()}


def clustered(values: Sequence[np.ndarray], clusters: Sequence[str]) -> list[np.ndarray]:
    """The values of each cluster together."""
    table: dict[str, list[np.ndarray]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        table[cluster].append(value)
    return [np.concatenate(parts) for parts in table.values()]


def ranks_of(row: Row) -> list[int]:
    return row.get("ranks") or list(range(1, len(row["responses"]) + 1))


def ranked_pairs(row: Row) -> list[tuple[str, str]]:
    """All (better, worse) texts of a ranking."""
    ranks = ranks_of(row)
    texts = row["responses"]
    return [(texts[i], texts[j]) for i in range(len(texts)) for j in range(len(texts)) if ranks[i] < ranks[j]]


def evaluate_attributes(
    experiment: Experiment, folds: Sequence[dict[str, Any]]
) -> dict[str, tuple[float, float, float]]:
    """Mean over articles of the Spearman correlation of each attribute."""
    table: dict[str, list[np.ndarray]] = defaultdict(list)
    for fold in folds:
        texts = [text for row in fold["train"] for text in row["responses"]]
        for name in ATTRIBUTES:
            words = ScoreBaseline(texts, [scores[name] for row in fold["train"] for scores in row["attributes"]])
            for row in fold["test"]:
                human = [scores[name] for scores in row["attributes"]]
                if len(set(human)) == 1:
                    continue
                keys = responses_of(row, "attributes")
                model = [fold["scores"][key]["parts"][name] for key in keys]
                table[f"{name}, model"].append(np.array([spearmanr(model, human)[0]]))
                table[f"{name}, bag of words"].append(np.array([spearmanr(words.score(row["responses"]), human)[0]]))
    return {f"Spearman {who}": interval(values, mean_of_all) for who, values in table.items()}


def evaluate_steps(experiment: Experiment, folds: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """ProcessBench's F1; accuracy and area under the ROC curve (of a wrong step's probability) over labelled steps."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    steps: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    wrongs: dict[str, dict[str, list[tuple[float, bool]]]] = defaultdict(lambda: defaultdict(list))
    for fold in folds:
        words = StepBaseline(fold["train"])
        for row, model in zip(fold["test"], step_probabilities(fold, experiment), strict=True):
            true = -1 if row["first_error"] is None else row["first_error"]
            labels = [step_label(row, i) for i in range(len(row["steps"]))]
            for who, right in (
                ("model", model),
                ("bag of words", words.right_probabilities(row)),
                ("always right", np.ones(len(labels))),
            ):
                wrong = np.nonzero(right < 0.5)[0]
                found[who][row["cluster"]].append((int(wrong[0]) if len(wrong) else -1, true))
                judged = [(p, label) for p, label in zip(right, labels, strict=True) if label is not None]
                steps[who][row["cluster"]] += [float((p >= 0.5) == label) for p, label in judged]
                wrongs[who][row["cluster"]] += [(1 - p, not label) for p, label in judged]
    values = {f"first-error F1, {who}": interval(list(own.values()), first_error_f1) for who, own in found.items()}
    values |= {
        f"step accuracy, {who}": interval([np.array(v) for v in own.values()], mean_of_all)
        for who, own in steps.items()
    }
    return values | {
        f"area under the ROC curve, {who}": interval(list(own.values()), roc_area)
        for who, own in wrongs.items()
        if who != "always right"
    }


def step_probabilities(fold: dict[str, Any], experiment: Experiment) -> list[np.ndarray]:
    """P(right) of each step of the held-out solutions, by the exported model."""
    import torch

    from raylhf.models.load import load_tokenizer
    from raylhf.models.reward import load_reward_model
    from raylhf.models.reward_text import encode_judged

    model = load_reward_model(fold["export"], dtype=torch.float32)
    tokenizer = load_tokenizer(fold["export"])
    answers = []
    for row in fold["test"]:
        ends = np.cumsum([len(step) + 2 for step in row["steps"]]) - 2
        messages = [{"role": "user", "content": row["prompt"]}]
        text = encode_judged(tokenizer, messages, "\n\n".join(row["steps"]), max_tokens=experiment.max_tokens)
        with torch.no_grad():
            logits = model(torch.from_numpy(text.ids)[None], torch.tensor([len(text.ids)]))[0]
        # A step that was cut off has no token; its probability is that of the last one that is there.
        last = [int(np.nonzero((text.spans[:, 0] >= 0) & (text.spans[:, 0] < end))[0][-1]) for end in ends]
        answers.append(torch.sigmoid(logits[last]).numpy())
    return answers


EVALUATIONS = {
    "pairs": evaluate_pairs,
    "scores": evaluate_scores,
    "rankings": evaluate_rankings,
    "attributes": evaluate_attributes,
    "steps": evaluate_steps,
}


def keep(name: str, result: dict[str, Any]) -> None:
    """Add one experiment to results.json and write the table anew."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[name] = result
    ordered = {key: results[key] for key in EXPERIMENTS if key in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    lines = ["| experiment | minutes | quantity | value [95 % interval] |", "|---|---|---|---|"]
    for key, entry in ordered.items():
        for i, (label, (value, low, high)) in enumerate(entry["values"].items()):
            head = f"| {key} | {entry['minutes']:.1f} " if i == 0 else "| | "
            lines.append(f"{head}| {label} | {value:.3f} [{low:.3f}, {high:.3f}] |")
    (HERE / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""`raylhf reward eval`: agreement of a reward with raters, by subset."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from raylhf.cli.score import show_errors
from raylhf.cli.serve import load_service
from raylhf.cli.tables import new_table

if TYPE_CHECKING:  # the driver is imported when the settings are found good
    from raylhf.driver.reward_eval import Evaluation


def run_reward_eval(
    path: str, overrides: Sequence[str], *, source: str, subset_key: str | None, json_file: str | None
) -> int:
    """Check the settings, score the pairs, print a table and write it as JSON where that is asked for.

    Returns 1 where no pair could be compared, 2 for a mistake of the user's.
    """
    config = load_service(path, overrides)
    from raylhf.driver.reward_eval import evaluate_reward
    from raylhf.driver.score import open_new, require_new

    try:
        output = None if json_file is None else Path(json_file)
        if output is not None:
            require_new(output, "--json")
        evaluation = evaluate_reward(config.scoring, Path(source), subset_key=subset_key)
        if output is not None:
            with open_new(output, "--json") as out:
                json.dump(evaluation.record(), out, indent=2)
    except ValueError as error:
        print(f"raylhf: {error}", file=sys.stderr)
        return 2
    show_errors(evaluation.errors)
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(evaluation))
    return 1 if evaluation.overall.num_invalid == evaluation.overall.num_pairs else 0


def _table(evaluation: "Evaluation") -> Table:
    table = new_table("Agreement with the raters", "subset", "prompts", "pairs", "ties", "invalid", "accuracy", "95 %")
    for row in (*evaluation.subsets, evaluation.overall):
        interval = "" if math.isnan(row.low) else f"{row.low:.3f} to {row.high:.3f}"
        counts = (row.num_prompts, row.num_pairs, row.num_ties, row.num_invalid)
        table.add_row(row.name or "(none)", *map(str, counts), _share(row.accuracy), interval)
    if evaluation.subsets:
        table.add_row("mean of subsets", "", "", "", "", _share(evaluation.mean_of_subsets), "")
    return table


def _share(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3f}"

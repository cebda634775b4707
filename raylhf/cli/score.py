"""`raylhf score`: the reward of every row of a file."""

import sys
from collections.abc import Sequence
from pathlib import Path

from raylhf.cli.serve import load_service

NUM_SHOWN_ERRORS = 3


def run_score(
    path: str, overrides: Sequence[str], *, source: str, destination: str | None, prompt_key: str, response_key: str
) -> int:
    """Check the settings, score, and print a summary on standard error; the rows go to a file or standard output.

    Returns 1 where no row has a score, 2 for a mistake of the user's.
    """
    config = load_service(path, overrides)
    from raylhf.driver.score import RowFields, score_file

    try:
        output = None if destination is None else Path(destination)
        summary = score_file(config.scoring, Path(source), output, RowFields(prompt=prompt_key, response=response_key))
    except ValueError as error:
        print(f"raylhf: {error}", file=sys.stderr)
        return 2
    show_errors(summary.errors)
    print(summary.sentence(), file=sys.stderr)
    return 1 if summary.num_invalid == len(summary.scores) else 0


def show_errors(errors: Sequence[str]) -> None:
    """The first few failures of a reward on standard error."""
    for error in errors[:NUM_SHOWN_ERRORS]:
        print(f"invalid: {error}", file=sys.stderr)
    if len(errors) > NUM_SHOWN_ERRORS:
        print(f"and {len(errors) - NUM_SHOWN_ERRORS} more errors", file=sys.stderr)

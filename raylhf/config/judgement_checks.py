"""Whether the settings of stored judgements make sense together."""

import os
from collections.abc import Iterator

from raylhf.config.problems import Problem, problem_at
from raylhf.config.run import OfflineRunConfig


def check_judgements(config: OfflineRunConfig) -> Iterator[Problem]:
    """Problems of the data and of when it is held out."""
    data = config.data
    if data.held_out_path is not None and data.held_out > 0:
        yield problem_at("data.held_out", f"is {data.held_out:g} beside held_out_path; set it to 0")
    if data.held_out_path is not None:
        path, held_out = (os.path.realpath(os.path.expanduser(p)) for p in (data.path, data.held_out_path))
        if path == held_out or (os.path.isfile(held_out) and path == os.path.dirname(held_out)):
            yield problem_at(
                "data.held_out_path", "is a part of data.path; give a source of its own, or remove it and set held_out"
            )
    if data.held_out >= 1 and data.held_out != int(data.held_out):
        yield problem_at("data.held_out", f"is {data.held_out:g}; give a share below 1, or a whole number of prompts")
    if config.evaluation.every_steps > 0 and data.held_out == 0 and data.held_out_path is None:
        yield problem_at(
            "data.held_out", "is 0, but evaluation.every_steps is set; hold prompts out, or set every_steps: 0"
        )

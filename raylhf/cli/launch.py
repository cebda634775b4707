"""`raylhf launch`: start a run here, or hand it to a scheduler."""

import argparse
import shlex
import sys

from raylhf.config.load import load_any_config


def run_launch(arguments: argparse.Namespace) -> int:
    """Check the settings, then print or start what they ask for."""
    if arguments.target == "local":
        return _launch_local(arguments)
    # The job starts the Ray that the run joins.
    config = load_any_config(arguments.config, [*arguments.overrides, "cluster.address=auto"])
    from raylhf.launch.slurm import Command, Join, batch_file, submit, write_batch_file

    if (arguments.join is None) != (arguments.rollout is None) or min(arguments.join or 1, arguments.chain) < 1:
        return _fail("--join NODES (1 or more) and --rollout N go together; --chain takes 1 or more")
    join = None if arguments.join is None else Join(arguments.join, arguments.rollout)
    try:
        text = batch_file(config, Command(arguments.config, arguments.overrides), join)
        if arguments.dry_run:
            print(text, end="")
            return 0
        file = write_batch_file(config, text, join)
        jobs = submit(file, num_jobs=arguments.chain, is_alone=join is None)
    except ValueError as error:
        return _fail(str(error))
    print(f"submitted {file} as job {', '.join(jobs)}; its output goes to {file.parent}/slurm-JOB.out")
    return 0


def _launch_local(arguments: argparse.Namespace) -> int:
    load_any_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(shlex.join(["raylhf", "train", arguments.config, *arguments.overrides]))
        return 0
    from raylhf.cli.train import run_train

    return run_train(arguments.config, arguments.overrides)


def _fail(sentence: str) -> int:
    print(f"raylhf: {sentence}", file=sys.stderr)
    return 2

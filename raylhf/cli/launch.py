"""`raylhf launch`: start a run here, or hand it to a scheduler."""

import argparse
import shlex
import sys

from raylhf.config.load import load_any_config
from raylhf.config.run import AnyRunConfig


def run_launch(arguments: argparse.Namespace) -> int:
    """Check the settings, then print or start what they ask for."""
    if arguments.target == "local":
        return _launch_local(arguments)
    # The job starts the Ray that the run joins.
    config = load_any_config(arguments.config, [*arguments.overrides, "cluster.address=auto"])
    return _launch_kubernetes(arguments, config) if arguments.target == "k8s" else _launch_slurm(arguments, config)


def _launch_slurm(arguments: argparse.Namespace, config: AnyRunConfig) -> int:
    from raylhf.launch.command import Command
    from raylhf.launch.slurm import Join, batch_file, submit, write_batch_file

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


def _launch_kubernetes(arguments: argparse.Namespace, config: AnyRunConfig) -> int:
    from raylhf.launch.command import Command
    from raylhf.launch.kubernetes import apply, manifests, resource_name, to_text
    from raylhf.launch.manifest_checks import find_manifest_problems

    if arguments.join is not None or arguments.rollout is not None or arguments.chain != 1:
        return _fail("--chain, --join and --rollout are for Slurm; on Kubernetes use raylhf scale within the run")
    words = shlex.join([arguments.config, *arguments.overrides])
    try:
        documents = manifests(config, Command(arguments.config, arguments.overrides))
        text = to_text(documents, comment=f"raylhf launch k8s {words} --dry-run")
        if problems := find_manifest_problems(text):
            return _fail("; ".join(problems))
        if arguments.dry_run:
            print(text, end="")
            return 0
        apply(config, text)
    except ValueError as error:
        return _fail(str(error))
    namespace, name = config.launch.kubernetes.namespace, resource_name(config)
    print(f"RayJob {name} is in namespace {namespace}; follow it:")
    print(f"  kubectl -n {namespace} get rayjob {name} --watch")
    print(f"  kubectl -n {namespace} logs -f -l raylhf.io/run={name},ray.io/node-type=head -c ray-job-submitter")
    return 0


def _launch_local(arguments: argparse.Namespace) -> int:
    if arguments.join is not None or arguments.rollout is not None or arguments.chain != 1:
        return _fail("--chain, --join and --rollout are for Slurm")
    load_any_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(shlex.join(["raylhf", "train", arguments.config, *arguments.overrides]))
        return 0
    from raylhf.cli.train import run_train

    return run_train(arguments.config, arguments.overrides)


def _fail(sentence: str) -> int:
    print(f"raylhf: {sentence}", file=sys.stderr)
    return 2

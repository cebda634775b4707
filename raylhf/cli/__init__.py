"""The command line. Help costs no import: each command's file is loaded when it runs."""

import argparse
import sys
from collections.abc import Sequence

OVERRIDES_HELP = "settings changed for this run, for instance rollout.group_size=4 (the value is read as YAML)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for a mistake in settings, told in plain sentences."""
    arguments = build_parser().parse_args(argv)
    try:
        return run_command(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="raylhf", description="RLHF on Ray: vLLM rollouts, reward workers, DeepSpeed ZeRO learners."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("check", "check a config and print what the run will do and take; starts nothing"),
        ("train", "run a config"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("config", metavar="CONFIG", help="YAML file")
        command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDES_HELP)
        if name == "check":
            text = "also read a reward model's judgements, and print counts, lengths, duplicates and label balance"
            command.add_argument("--data", action="store_true", help=text)
    text = "print every setting with its type, default and meaning; with CONFIG also the file's value"
    command = commands.add_parser("config", help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDES_HELP)
    return parser


def run_command(arguments: argparse.Namespace) -> int:
    """Dispatch to the command's file; a ConfigError becomes its sentences on standard error."""
    from raylhf.config.errors import ConfigError

    try:
        if arguments.command == "check":
            from raylhf.cli.check import run_check

            return run_check(arguments.config, arguments.overrides, with_data=arguments.data)
        if arguments.command == "config":
            from raylhf.cli.explain import run_explain

            return run_explain(arguments.config, arguments.overrides)
        from raylhf.cli.train import run_train

        return run_train(arguments.config, arguments.overrides)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2

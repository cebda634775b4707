"""The command line. Help costs no import: each command's file is loaded when it runs."""

import argparse
import sys
from collections.abc import Sequence

OVERRIDES_HELP = "settings changed for this run, for instance rollout.group_size=4 (the value is read as YAML)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for a mistake in settings, told in plain sentences."""
    arguments = parse_arguments(argv)
    try:
        return run_command(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
        return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; KEY=VALUE may also stand after options, where argparse no longer takes it for what it is."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="raylhf", description="RLHF on Ray: vLLM rollouts, reward workers, DeepSpeed ZeRO learners."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("check", "check a config and print what the run will do and take, or check manifests; starts nothing"),
        ("train", "run a config"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("config", metavar="CONFIG", help="YAML file")
        command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDES_HELP)
        if name == "check":
            text = "also read a reward model's judgements, and print counts, lengths, duplicates and label balance"
            command.add_argument("--data", action="store_true", help=text)
    add_plan_command(commands)
    add_doctor_command(commands)
    text = "print every setting with its type, default and meaning; with CONFIG also the file's value"
    command = commands.add_parser("config", help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDES_HELP)
    text = "list every optimisation method with what it needs"
    command = commands.add_parser("algorithms", help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(overrides=[])
    text = "prove from a run's ledger that no prompt was lost and none doubled"
    command = commands.add_parser("audit", help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("folder", metavar="RUN_FOLDER", help="folder of a policy run, as in runs/NAME")
    command.set_defaults(overrides=[])
    text = "change the number of rollout workers of a run that goes on"
    command = commands.add_parser("scale", help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("folder", metavar="RUN_FOLDER", help="folder of a policy run, as in runs/NAME")
    command.add_argument("--rollout", metavar="N", type=int, required=True, help="rollout workers from now on")
    command.set_defaults(overrides=[])
    add_launch_command(commands)
    add_reward_commands(commands)
    return parser


def add_plan_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that predicts memory and time."""
    text = "predict memory by role and phase, and the time of a step, from the model's shape alone; starts nothing"
    command = commands.add_parser("plan", help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDES_HELP)
    command.add_argument("--gpus", metavar="N", type=int, help="plan for a cluster of N GPUs")
    command.add_argument("--gpu-memory", metavar="GIB", type=float, help="memory of one GPU")
    text = "what the learner and the engines run on (default: h100, or cpu)"
    command.add_argument("--device", choices=("h100", "h200", "a100", "cpu"), help=text)
    text = "time one CPU thread for a quarter of a second instead of taking the table's word"
    command.add_argument("--measure", action="store_true", help=text)


def add_doctor_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that looks at the nodes."""
    text = "check the nodes of a run within a minute: versions, room, network, storage, memory, clocks"
    command = commands.add_parser("doctor", help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDES_HELP)
    text = "seconds in which cluster.num_nodes nodes must have joined (default: 15)"
    command.add_argument("--wait", metavar="SECONDS", type=float, default=15.0, help=text)
    command.add_argument("--json", action="store_true", help="print the findings as JSON")


def add_launch_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that asks for nodes."""
    text = "start a run here, on a Slurm cluster or on Kubernetes"
    command = commands.add_parser("launch", help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("target", choices=("local", "slurm", "k8s"), help="where")
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDES_HELP)
    command.add_argument("--dry-run", action="store_true", help="print what would be started; start nothing")
    command.add_argument(
        "--chain", metavar="N", type=int, default=1, help="Slurm jobs one after the other (default: 1)"
    )
    command.add_argument(
        "--join", metavar="NODES", type=int, help="add nodes to the cluster of the run, in a job of their own"
    )
    command.add_argument("--rollout", metavar="N", type=int, help="with --join: rollout workers from then on")


def add_reward_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands that use the reward of a config outside of a run."""
    reward_file = "YAML file with a reward: section; the file of a policy run is one"

    def add(to: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str) -> argparse.ArgumentParser:
        command = to.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("config", metavar="CONFIG", help=reward_file)
        command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDES_HELP)
        return command

    add(commands, "serve-reward", "offer the reward of a config over HTTP, until Ctrl-C")
    score = add(commands, "score", "score every row of a file with the reward of a config")
    score.add_argument("--input", metavar="FILE", required=True, help="JSONL file of prompts with responses")
    score.add_argument(
        "--output", metavar="FILE", help="new JSONL file for the rows with their scores; else they go out"
    )
    score.add_argument("--prompt-key", metavar="KEY", default="prompt", help="field of the prompt (default: prompt)")
    score.add_argument(
        "--response-key", metavar="KEY", default="response", help="field of the response (default: response)"
    )
    text = "how well the reward of a config agrees with raters"
    reward = commands.add_parser("reward", help=text, description=f"{text[0].upper()}{text[1:]}.")
    actions = reward.add_subparsers(dest="action", required=True, metavar="ACTION")
    evaluation = add(actions, "eval", "accuracy of the reward of a config on pairs of responses, by subset")
    evaluation.add_argument("--input", metavar="FILE", required=True, help="pairs, as a reward model is trained on")
    evaluation.add_argument("--subset-key", metavar="KEY", help="field whose values are reported apart")
    evaluation.add_argument("--json", metavar="FILE", help="new JSON file for the numbers")


def run_command(arguments: argparse.Namespace) -> int:
    """Dispatch to the command's file; a ConfigError becomes its sentences on standard error."""
    from raylhf.config.errors import ConfigError

    try:
        if arguments.command == "check":
            from raylhf.cli.check import run_check

            return run_check(arguments.config, arguments.overrides, with_data=arguments.data)
        if arguments.command == "plan":
            return predict(arguments)
        if arguments.command == "doctor":
            from raylhf.cli.doctor import run_doctor

            return run_doctor(arguments.config, arguments.overrides, wait_s=arguments.wait, as_json=arguments.json)
        if arguments.command == "config":
            from raylhf.cli.explain import run_explain

            return run_explain(arguments.config, arguments.overrides)
        if arguments.command == "algorithms":
            from raylhf.cli.algorithms import run_algorithms

            return run_algorithms()
        if arguments.command == "audit":
            from raylhf.cli.audit import run_audit

            return run_audit(arguments.folder)
        if arguments.command == "scale":
            from raylhf.cli.scale import run_scale

            return run_scale(arguments.folder, rollout=arguments.rollout)
        if arguments.command == "launch":
            from raylhf.cli.launch import run_launch

            return run_launch(arguments)
        if arguments.command in REWARD_COMMANDS:
            return REWARD_COMMANDS[arguments.command](arguments)
        from raylhf.cli.train import run_train

        return run_train(arguments.config, arguments.overrides)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2


def predict(arguments: argparse.Namespace) -> int:
    from raylhf.cli.plan import run_plan

    return run_plan(
        arguments.config,
        arguments.overrides,
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        device=arguments.device,
        measure=arguments.measure,
    )


def serve_reward(arguments: argparse.Namespace) -> int:
    from raylhf.cli.serve import run_serve_reward

    return run_serve_reward(arguments.config, arguments.overrides)


def score(arguments: argparse.Namespace) -> int:
    from raylhf.cli.score import run_score

    return run_score(
        arguments.config,
        arguments.overrides,
        source=arguments.input,
        destination=arguments.output,
        prompt_key=arguments.prompt_key,
        response_key=arguments.response_key,
    )


def evaluate_reward(arguments: argparse.Namespace) -> int:
    from raylhf.cli.reward_eval import run_reward_eval

    return run_reward_eval(
        arguments.config,
        arguments.overrides,
        source=arguments.input,
        subset_key=arguments.subset_key,
        json_file=arguments.json,
    )


REWARD_COMMANDS = {"serve-reward": serve_reward, "score": score, "reward": evaluate_reward}

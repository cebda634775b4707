"""`raylhf scale`: another number of rollout workers for a run that goes on."""

import sys
from pathlib import Path


def run_scale(path: str, *, rollout: int) -> int:
    """Leave the request in the run's folder; returns 2 where the run cannot follow it."""
    from raylhf.config.checks import growth_problem
    from raylhf.config.load import load_any_config
    from raylhf.config.run import RunConfig
    from raylhf.driver.folder import is_locked
    from raylhf.driver.scaling import request_size

    folder = Path(path)
    settings = folder / "config.yaml"
    if not settings.is_file():
        return _refuse(f"{folder} holds no config.yaml; give the folder of a run, as in runs/NAME")
    config = load_any_config(settings)
    if not isinstance(config, RunConfig):
        return _refuse(f"the run of {folder} has no rollout workers: it trains on stored judgements")
    if rollout < 1:
        return _refuse("--rollout must be 1 or more")
    if rollout > config.rollout.replicas and (problem := growth_problem(config)):
        return _refuse(f"--rollout {rollout} {problem}")
    if rollout not in config.rollout_sizes:
        least, most = config.rollout.least_replicas, config.rollout.most_replicas
        return _refuse(
            f"--rollout {rollout} is outside of rollout.min_replicas={least} to rollout.max_replicas={most}; the run "
            "would go back by itself"
        )
    request_size(folder, rollout)
    when = "before its next step, learners stay as they are" if is_locked(folder) else "when `raylhf train` goes on"
    print(f"asked {folder.name} for {rollout} rollout workers: it follows {when}")
    return 0


def _refuse(sentence: str) -> int:
    print(f"raylhf: {sentence}", file=sys.stderr)
    return 2

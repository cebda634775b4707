"""What runs inside the roles' processes. Imports stand in the functions: the driver itself loads no torch, vLLM or
DeepSpeed, which would cost it seconds and half a gigabyte."""

from typing import Any

from raylhf.config import RunConfig


def rollout_worker(*args: Any, **kwargs: Any) -> Any:
    """Build a RolloutWorker."""
    from raylhf.rollout.worker import RolloutWorker

    return RolloutWorker(*args, **kwargs)


def reward_worker(*args: Any, **kwargs: Any) -> Any:
    """Build a RewardWorker."""
    from raylhf.rewards.worker import RewardWorker

    return RewardWorker(*args, **kwargs)


def learner_worker(*args: Any, **kwargs: Any) -> Any:
    """Build a LearnerWorker."""
    from raylhf.learner.worker import LearnerWorker

    return LearnerWorker(*args, **kwargs)


def weight_sender(backend: str, *, source: Any, rank: int, **settings: Any) -> Any:
    """Build a WeightSender, in a learner's process."""
    from raylhf.rollout.weight_sender import open_sender

    return open_sender(backend, source=source, rank=rank, **settings)


def prepare_models(config: RunConfig) -> tuple[str, str]:
    """Folders (or names) of the policy and of the model that the critic starts from."""
    from raylhf.models.load import load_model_config, prepare_model

    folder = prepare_model(config.model.path, seed=config.seed)
    critic = config.objective.critic.path
    critic_folder = folder if critic is None else prepare_model(critic, seed=config.seed)
    for name in {folder, critic_folder}:
        load_model_config(name, trust_remote_code=config.model.trust_remote_code)  # fails early, with a sentence
    return folder, critic_folder

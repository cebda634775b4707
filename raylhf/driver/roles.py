"""What runs inside the roles' processes. Imports stand in the functions: the driver itself loads no torch, vLLM or
DeepSpeed, which would cost it seconds and half a gigabyte."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raylhf.batch import Prompt
from raylhf.config import RunConfig
from raylhf.config.preference import loss_of
from raylhf.config.preference_losses import INSTRUCTION_TOKENS, TREGLoss
from raylhf.config.run import AnyRunConfig, OfflineRunConfig, PreferenceRunConfig


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


def reward_learner_worker(*args: Any, **kwargs: Any) -> Any:
    """Build a RewardLearnerWorker."""
    from raylhf.learner.reward_worker import RewardLearnerWorker

    return RewardLearnerWorker(*args, **kwargs)


def weight_sender(backend: str, *, source: Any, rank: int, **settings: Any) -> Any:
    """Build a WeightSender, in a learner's process."""
    from raylhf.rollout.weight_sender import open_sender

    return open_sender(backend, source=source, rank=rank, **settings)


@dataclass(frozen=True)
class Prepared:
    """What is known before any engine starts."""

    model: str
    """Folder (or name) of the policy."""
    second: str
    """The same of the model that the critic starts from, or of a loss's guide."""
    prompt_lengths: list[int]
    """Tokens of each prompt under the model's own chat template."""


def prepare(config: RunConfig, prompts: Sequence[Prompt]) -> Prepared:
    """Make the models ready to load and measure the prompts."""
    from raylhf.models.chat import encode_prompt
    from raylhf.models.load import load_model_config, load_tokenizer, max_positions, prepare_model, require_safetensors

    folder = prepare_model(config.model.path, seed=config.seed)
    second = folder if config.second_model is None else prepare_model(config.second_model, seed=config.seed)
    for name in {folder, second}:  # fails early, with a sentence
        if not config.model.trust_remote_code:
            require_safetensors(name)
        architecture = load_model_config(name, trust_remote_code=config.model.trust_remote_code)
        context = max_positions(architecture)
        if context is not None and config.max_model_len > context:
            raise ValueError(
                f"data.max_prompt_tokens + rollout.sampling.max_response_tokens (or rollout.max_model_len) = "
                f"{config.max_model_len}, but the context of {name} is {context} tokens; lower them"
            )
    _require_one_tokenizer(config, [folder, second])
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    return Prepared(folder, second, [len(encode_prompt(tokenizer, prompt.messages)) for prompt in prompts])


def preference_learner_worker(*args: Any, **kwargs: Any) -> Any:
    """Build a PreferenceLearnerWorker."""
    from raylhf.learner.preference_worker import PreferenceLearnerWorker

    return PreferenceLearnerWorker(*args, **kwargs)


def prepare_offline(config: OfflineRunConfig) -> list[str]:
    """Make the model that is trained, and a loss's guide, ready to load; returns their folders (or names)."""
    from raylhf.models.load import load_model_config, max_positions, prepare_model, require_safetensors

    paths = [config.model.path, *([config.second_model] if config.second_model else [])]
    folders = [prepare_model(path, seed=config.seed) for path in paths]
    asks = isinstance(config, PreferenceRunConfig) and isinstance(loss_of(config.objective), TREGLoss)
    longest = config.data.max_tokens + (INSTRUCTION_TOKENS if asks else 0)
    for folder in folders:
        if not config.model.trust_remote_code:
            require_safetensors(folder)
        architecture = load_model_config(folder, trust_remote_code=config.model.trust_remote_code)
        context = max_positions(architecture)
        if context is not None and longest > context:
            and_more = f" and {INSTRUCTION_TOKENS} for the instructions of t_reg" if asks else ""
            raise ValueError(
                f"data.max_tokens = {config.data.max_tokens}{and_more}, but the context of {folder} is {context} "
                "tokens; lower it"
            )
    _require_one_tokenizer(config, folders)
    return folders


def _require_one_tokenizer(config: AnyRunConfig, folders: Sequence[str]) -> None:
    """A loss's guide scores the policy's tokens."""
    from raylhf.models.calibration import tokenizer_hash
    from raylhf.models.load import load_tokenizer

    hashes = {
        tokenizer_hash(load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)) for folder in folders
    }
    if len(hashes) > 1:
        raise ValueError(
            f"{config.second_model!r} and {config.model.path!r} have different tokenizers, so their log-probabilities "
            "are not of the same tokens; give a guide (or critic) of the policy's family"
        )

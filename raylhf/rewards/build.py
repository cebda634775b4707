"""From settings to the reward graph."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raylhf.config import reward as settings
from raylhf.rewards.fusion import WeightedSum
from raylhf.rewards.rules import CharacterReward, FormatReward, FunctionReward, LengthReward, SentimentReward

if TYPE_CHECKING:  # the Protocols name torch's types, and a reward worker needs no torch
    from raylhf.interfaces import Reward


def build_reward(config: settings.RewardConfig) -> "Reward":
    """The leaf or node that the settings describe, with everything below it."""
    return REWARD_BUILDERS[config.kind](config)


def build_sentiment(config: settings.SentimentReward) -> "Reward":
    return SentimentReward()


def build_length(config: settings.LengthReward) -> "Reward":
    return LengthReward(min_words=config.min_words, max_words=config.max_words, slack=config.slack)


def build_format(config: settings.FormatReward) -> "Reward":
    return FormatReward()


def build_function(config: settings.FunctionReward) -> "Reward":
    return FunctionReward(path=config.path)


def build_characters(config: settings.CharacterReward) -> "Reward":
    return CharacterReward(characters=config.characters)


def build_sum(config: settings.SumReward) -> "Reward":
    repeated = [name for name, count in Counter(part.name for part in config.parts).items() if count > 1]
    if repeated:
        raise ValueError(f"the parts of a sum must have names of their own in logs; {', '.join(repeated)} is repeated")
    return WeightedSum(parts={part.name: (part.weight, build_reward(part.reward)) for part in config.parts})


REWARD_BUILDERS: dict[str, "Callable[[Any], Reward]"] = {
    "sentiment": build_sentiment,
    "length": build_length,
    "format": build_format,
    "function": build_function,
    "characters": build_characters,
    "sum": build_sum,
}

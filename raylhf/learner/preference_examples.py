"""Stored judgements as tokens of the policy, and as the batch of an optimizer step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from raylhf.algos.preference_robust import ns_dpo_weights
from raylhf.batch import Pair, RewardExample
from raylhf.config.preference import SFTConfig
from raylhf.config.preference_losses import (
    INSTRUCTION_TOKENS,
    KTOLoss,
    MODPOLoss,
    NSDPOLoss,
    PreferenceLoss,
    StepDPOLoss,
    TREGLoss,
)
from raylhf.learner.preference_batch import PreferenceBatch
from raylhf.models.policy_text import EncodedResponse, encode_responses
from raylhf.text.preference_data import good_by_itself, unbeaten

Messages = tuple[Mapping[str, str], ...]
"""Chat turns."""


@dataclass(frozen=True)
class PreferenceExample:
    """One prompt with its K responses: whole groups of rows."""

    prompt: str
    """The last turn of the prompt, for people to read."""
    texts: tuple[str, ...]
    """Of each row."""
    rows: tuple[EncodedResponse, ...]
    """Of each response; of Step-DPO, two of each pair."""
    pairs: tuple[Pair, ...]
    """Comparisons of `rows`."""
    first_key: int
    """Number of pairs in the examples before this one."""
    ranks: np.ndarray
    """Place of each row, infinity below all places, NaN where it is not ranked, float64 [K]."""
    is_good: np.ndarray
    """1 good, 0 bad, NaN not judged by itself, float64 [K]."""
    better_prompts: tuple[np.ndarray, ...] = ()
    """T-REG's prompts that ask for a better answer, [K] of int64."""
    worse_prompts: tuple[np.ndarray, ...] = ()
    """And for a worse one."""

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return sum(len(row.prompt_ids) + len(row.response_ids) for row in self.rows)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[RewardExample],
    loss: PreferenceLoss | SFTConfig,
    *,
    max_tokens: int,
) -> list[PreferenceExample]:
    """Examples that the loss learns from (see `preference_data.usable`) as tokens."""
    encoded: list[PreferenceExample] = []
    num_pairs = 0
    for example in examples:
        if isinstance(loss, StepDPOLoss):
            found = _encode_steps(tokenizer, example, loss, max_tokens=max_tokens, first_key=num_pairs)
        else:
            found = _encode_example(tokenizer, example, loss, max_tokens=max_tokens, first_key=num_pairs)
        encoded.append(found)
        num_pairs += len(found.pairs)
    return encoded


def _encode_example(
    tokenizer: PreTrainedTokenizerBase,
    example: RewardExample,
    loss: PreferenceLoss | SFTConfig,
    *,
    max_tokens: int,
    first_key: int,
) -> PreferenceExample:
    is_sft = isinstance(loss, SFTConfig)
    kept = unbeaten(example) if is_sft else list(range(len(example.responses)))
    texts = tuple(example.responses[k] for k in kept)
    rows = tuple(encode_responses(tokenizer, example.messages, texts, max_tokens=max_tokens))
    prompts: dict[str, tuple[np.ndarray, ...]] = {}
    if isinstance(loss, TREGLoss):
        for name, instruction in (("better_prompts", loss.better), ("worse_prompts", loss.worse)):
            turns = _asked(example.messages, instruction)
            asked = encode_responses(tokenizer, turns, texts, max_tokens=max_tokens + INSTRUCTION_TOKENS)
            prompts[name] = tuple(row.prompt_ids for row in asked)
    pairs = () if is_sft else example.pairs
    is_good = good_by_itself(example, loss) if isinstance(loss, KTOLoss) else np.full(len(example.responses), np.nan)
    ranks = _places(example)[kept]
    return PreferenceExample(_prompt(example), texts, rows, pairs, first_key, ranks, is_good[kept], **prompts)


def _places(example: RewardExample) -> np.ndarray:
    """Place of each response, float64 [K]; where several rankings are given, none: they do not compare."""
    if example.ranks is None:
        return np.full(len(example.responses), np.nan)
    # Of a ranking, what it leaves out is below; a response without a score is not judged.
    below = np.inf if example.targets is None else np.nan
    return np.where(np.isnan(example.ranks), below, example.ranks)


def _encode_steps(
    tokenizer: PreTrainedTokenizerBase,
    example: RewardExample,
    loss: StepDPOLoss,
    *,
    max_tokens: int,
    first_key: int,
) -> PreferenceExample:
    """Two rows for each pair: the first step in which its responses differ, after the steps that they share."""
    rows: list[EncodedResponse] = []
    pairs: list[Pair] = []
    all_steps: list[str] = []
    for pair in example.pairs:
        texts = [example.responses[k] for k in (pair.chosen, pair.rejected)]
        prefix, *steps = first_differing_step(texts[0], texts[1], loss.step_separator)
        ends = [prefix + step == text for step, text in zip(steps, texts, strict=True)]
        rows += encode_responses(tokenizer, example.messages, steps, max_tokens=max_tokens, prefix=prefix, ends=ends)
        all_steps.extend(steps)
        pairs.append(Pair(len(rows) - 2, len(rows) - 1, pair.margin, pair.agreement))
    unknown = np.full(len(rows), np.nan)
    return PreferenceExample(_prompt(example), tuple(all_steps), tuple(rows), tuple(pairs), first_key, unknown, unknown)


def first_differing_step(chosen: str, rejected: str, separator: str) -> tuple[str, str, str]:
    """(what both begin with, up to the end of a step; the next step of `chosen`; the next step of `rejected`)."""
    mine, other = chosen.split(separator), rejected.split(separator)
    shared = 0
    while shared < min(len(mine), len(other)) - 1 and mine[shared] == other[shared]:
        shared += 1
    prefix = "".join(step + separator for step in mine[:shared])
    return prefix, _step(mine, shared, separator), _step(other, shared, separator)


def _step(steps: Sequence[str], place: int, separator: str) -> str:
    return steps[place] + (separator if place < len(steps) - 1 else "")


def _prompt(example: RewardExample) -> str:
    return example.messages[-1]["content"] if example.messages else ""


def _asked(messages: Messages, instruction: str) -> Messages:
    """The turns with an instruction before the last one's text."""
    *before, last = messages
    return (*before, {**last, "content": f"{instruction}\n\n{last['content']}"})


def assemble(
    examples: Sequence[PreferenceExample], loss: PreferenceLoss | SFTConfig, *, now: float, counts: bool = True
) -> PreferenceBatch:
    """The batch of some examples. `now` is the newest time of the data; with `counts` off nothing in it counts."""
    starts = np.cumsum([0, *(len(example.rows) for example in examples)])
    placed = list(zip(starts[:-1].tolist(), examples, strict=True)) if counts else []
    pairs = [(start, example, n, pair) for start, example in placed for n, pair in enumerate(example.pairs)]
    rows = [row for example in examples for row in example.rows]
    lengths = np.array([len(row.response_ids) for row in rows], dtype=np.int64)
    unknown = np.full(len(rows), np.nan)
    agreements = np.array([pair.agreement if pair.agreement is not None else np.nan for *_, pair in pairs])
    weights = np.ones(len(pairs))
    if isinstance(loss, NSDPOLoss):
        ages = np.array([now - (pair.time or 0.0) for *_, pair in pairs])
        weights = ns_dpo_weights(torch.from_numpy(ages), gamma=loss.gamma).numpy()
    gaps = np.zeros(len(pairs))
    if isinstance(loss, MODPOLoss):
        named = loss.other_weights.items()
        gaps = np.array([sum(w * pair.reward_gaps[name] for name, w in named) for *_, pair in pairs])
    better = [ids for example in examples for ids in example.better_prompts] or None
    worse = [ids for example in examples for ids in example.worse_prompts] or None
    return PreferenceBatch(
        prompt_ids=[row.prompt_ids for row in rows],
        response_ids=[row.response_ids for row in rows],
        group_starts=starts,
        chosen=np.array([start + pair.chosen for start, _, _, pair in pairs], dtype=np.int64),
        rejected=np.array([start + pair.rejected for start, _, _, pair in pairs], dtype=np.int64),
        weights=weights,
        spans=np.stack([np.zeros_like(lengths), lengths if counts else np.zeros_like(lengths)], axis=1),
        ranks=np.concatenate([e.ranks for e in examples]) if counts else unknown,
        is_good=np.concatenate([e.is_good for e in examples]) if counts else unknown,
        keys=np.array([example.first_key + n for _, example, n, _ in pairs], dtype=np.int64),
        smoothing=1 - agreements,
        reward_gaps=gaps,
        better_prompt_ids=better,
        worse_prompt_ids=worse,
    )

"""Forward passes of frozen models over texts: batches under a token budget, results in the callers' order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raylhf.batch import Prompt, RewardOutput, Rollouts
from raylhf.config import reward_leaves as settings
from raylhf.models.load import load_tokenizer, prepare_model
from raylhf.models.reward import load_reward_model, member_folders
from raylhf.models.reward_model import RewardModel
from raylhf.models.reward_text import EncodedText, encode_judged, encode_prompt_alone
from raylhf.rewards.alignment import lay_out_scores, token_ends
from raylhf.rewards.validity import about_prompt

if TYPE_CHECKING:  # build imports the leaves
    from raylhf.rewards.build import BuildContext

_LEAF_OF = {
    "scalar": "explicit",
    "token": "token_level",
    "process": "process",
    "multi_value": "multi_value",
    "ensemble": "ensemble",
}


@dataclass(frozen=True)
class Judged:
    """One text and what the model says about it."""

    text: EncodedText
    """What the model read."""
    outputs: np.ndarray
    """Float64: the outputs [H] of a pooled head, one a token [L] of a token-level head."""


class ServedModel:
    """A frozen reward model with its tokenizer."""

    def __init__(
        self, path: str, *, max_tokens: int, dtype: str, trust_remote_code: bool, context: "BuildContext"
    ) -> None:
        is_ensemble = len(member_folders(path)) > 1  # loading says what to do about it
        folder = path if is_ensemble else prepare_model(path, seed=context.seed)
        self.model: RewardModel = load_reward_model(
            folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        ).to(context.device)
        self.tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        if self.model.calibration is not None:
            self.model.calibration.check_text_format(self.tokenizer, folder)
        self.max_tokens = min(max_tokens, self.model.max_positions or max_tokens)
        self._context = context

    def judge(self, rollouts: Rollouts) -> list[Judged | str]:
        """What the model says about each response, or why it could not read it."""
        texts = encode_rollouts(self.tokenizer, rollouts, max_tokens=self.max_tokens)
        readable = [text for text in texts if isinstance(text, EncodedText)]
        judged = iter(self._run(readable))
        return [next(judged) if isinstance(text, EncodedText) else text for text in texts]

    def classify(self, prompts: Sequence[Prompt]) -> list[np.ndarray | str]:
        """Outputs on each prompt alone, float64 [H], or why it could not be read. Equal prompts are one text."""

        def encode(prompt: Prompt) -> EncodedText:
            return encode_prompt_alone(self.tokenizer, prompt.messages, max_tokens=self.max_tokens)

        texts = [encoded_or_reason(partial(encode, prompt)) for prompt in prompts]
        distinct = {text.ids.tobytes(): text for text in texts if isinstance(text, EncodedText)}
        judged = dict(zip(distinct, self._run(list(distinct.values())), strict=True))
        return [text if isinstance(text, str) else judged[text.ids.tobytes()].outputs for text in texts]

    def _run(self, texts: Sequence[EncodedText]) -> list[Judged]:
        def outputs_of(batch: Sequence[int]) -> Iterable[np.ndarray]:
            tokens, lengths = padded([texts[i].ids for i in batch], device=self._context.device)
            outputs = self.model(tokens, lengths).double().cpu().numpy()
            for i, row in zip(batch, outputs, strict=True):
                yield row[: len(texts[i].ids)] if self.model.is_token_level else row

        lengths = [len(text.ids) for text in texts]
        outputs = run_in_batches(lengths, self._context.batch_tokens, outputs_of)
        return [Judged(text, row) for text, row in zip(texts, outputs, strict=True)]


class PolicyTokens:
    """Lays scores of a reward model's tokens out over the policy's."""

    def __init__(self, folder: str) -> None:
        self._tokenizer = load_tokenizer(folder)
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"dense scores are laid out over the policy's tokens, but the tokenizer of {folder!r} is a slow one "
                "without character offsets; give a policy with a tokenizer.json, or a reward without dense scores"
            )

    def lay_out(self, rollouts: Rollouts, row: int, scores: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Float32 [T] for response `row`; scores [M] and spans [M, 2] as in `lay_out_scores`."""
        ends = token_ends(self._tokenizer, rollouts.response_ids[row], rollouts.response_texts[row])
        return lay_out_scores(scores, spans, ends)


def encode_rollouts(
    tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts, *, max_tokens: int
) -> list[EncodedText | str]:
    """Each conversation as the model reads it, or a sentence that says why it cannot."""

    def encode(prompt: Prompt, response: str) -> EncodedText:
        return encode_judged(tokenizer, prompt.messages, response, max_tokens=max_tokens)

    conversations = zip(rollouts.prompts, rollouts.response_texts, strict=True)
    return [encoded_or_reason(partial(encode, prompt, response)) for prompt, response in conversations]


def encoded_or_reason(encode: Callable[[], EncodedText]) -> EncodedText | str:
    """What `encode` gives, or a sentence that says why the model cannot read the text."""
    try:
        text = encode()
    except ValueError as error:
        return str(error)
    except (TypeError, LookupError) as error:  # messages without content; half a surrogate pair, which no UTF-8 has
        return f"the text cannot be read: {type(error).__name__}: {error}"
    return text if len(text.ids) else "there is no text to judge"


def run_in_batches(
    lengths: Sequence[int], batch_tokens: int, outputs_of: Callable[[Sequence[int]], Iterable[np.ndarray]]
) -> list[np.ndarray]:
    """`outputs_of(positions)` of each batch, put back into the order of `lengths`."""
    results: list[np.ndarray] = [np.empty(0)] * len(lengths)
    with torch.inference_mode():
        for batch in plan_batches(lengths, batch_tokens):
            for i, outputs in zip(batch, outputs_of(batch), strict=True):
                results[i] = outputs
    return results


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Positions in batches, the longest first, so that number times longest stays within `batch_tokens`.

    A text that is longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def padded(rows: Sequence[np.ndarray], *, device: str) -> tuple[Tensor, Tensor]:
    """Right-padded tokens [B, L] and lengths [B]. The padding's value is never read: masks come from lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(np.ascontiguousarray(row))
    return tokens.to(device), lengths.to(device)


def serve(config: settings.ModelLeaf | settings.EnsembleReward, path: str, context: "BuildContext") -> ServedModel:
    """The model at `path` with the settings of a leaf."""
    return ServedModel(
        path,
        max_tokens=config.max_tokens,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        context=context,
    )


def require_head(served: ServedModel, config: Any, kinds: set[str]) -> None:
    """Raise ValueError, naming the leaf that fits, where the model's head is not one of `kinds`."""
    kind = served.model.kind
    if kind not in kinds:
        raise ValueError(
            f"{config.kind} reward: the model has a {kind} head; set kind: {_LEAF_OF[kind]}, or give another model"
        )


def truncated_rows(texts: Sequence[EncodedText | Judged | str]) -> np.ndarray:
    """Which texts a model read in part, bool [B]; none of those that it could not read."""
    read = [text.text if isinstance(text, Judged) else text for text in texts]
    return np.array([isinstance(text, EncodedText) and text.is_truncated for text in read], dtype=bool)


def output_of(
    name: str,
    rollouts: Rollouts,
    scores: np.ndarray,
    errors: dict[int, str],
    *,
    is_truncated: np.ndarray,
    vector: np.ndarray | None = None,
    names: tuple[str, ...] = (),
    token_scores: Sequence[np.ndarray] | None = None,
) -> RewardOutput:
    """A score that is not finite is invalid, with a sentence."""
    valid = np.isfinite(scores)
    reasons = {int(row): f"the score is {scores[row]}" for row in np.flatnonzero(~valid)} | errors
    return RewardOutput(
        scores=np.where(valid, scores, np.nan),
        valid=valid,
        token_scores=token_scores,
        vector=vector,
        vector_names=names,
        errors=tuple(about_prompt(name, rollouts.prompts[row], reasons[row]) for row in sorted(reasons)),
        num_truncated=int(is_truncated.sum()),
    )

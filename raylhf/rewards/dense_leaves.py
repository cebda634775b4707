"""Leaves that are models with a score for each token or step: dense rewards in the policy's tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raylhf.batch import RewardOutput, Rollouts
from raylhf.config import reward_leaves as settings
from raylhf.models.calibration import tokenizer_hash
from raylhf.models.load import load_tokenizer, prepare_model
from raylhf.models.policy import load_policy
from raylhf.models.reward_text import EncodedText
from raylhf.rewards.model_serving import (
    Judged,
    PolicyTokens,
    encode_rollouts,
    output_of,
    padded,
    require_head,
    run_in_batches,
    serve,
    truncated_rows,
)

if TYPE_CHECKING:  # build imports this file
    from raylhf.rewards.build import BuildContext

_LOGPROB_CHUNK = 1024
"""Token positions whose logits are held at once."""


class TokenLevelModelReward:
    """Scores of the response's tokens, dense, and their sum, mean or last one."""

    def __init__(self, config: settings.TokenLevelReward, context: "BuildContext") -> None:
        self._served = serve(config, config.path, context)
        require_head(self._served, config, {"token", "process"})
        trained = self._served.model.aggregate
        self._aggregate = config.aggregate or ("mean" if trained == "steps" else trained)
        self._link = config.link
        self._policy = None if context.policy is None else PolicyTokens(context.policy)
        # A calibration is of the scores that the model was trained to give.
        self.calibration = (
            self._served.model.calibration if self._aggregate == trained and config.link == "identity" else None
        )

    def score(self, rollouts: Rollouts) -> RewardOutput:
        texts = self._served.judge(rollouts)
        credits = [judged if isinstance(judged, str) else self._credit(judged) for judged in texts]
        return _dense_output("token_level", rollouts, credits, self._policy, is_truncated=truncated_rows(texts))

    def _credit(self, judged: Judged) -> "tuple[np.ndarray, np.ndarray] | str":
        """Scores that sum to the response's, and their spans."""
        scores, spans = judged.outputs[judged.text.in_response], judged.text.spans[judged.text.in_response]
        if len(scores) == 0:
            return "the response has no text, so no token has a score"
        if self._link == "probability":
            scores = np.tanh(scores / 2)  # 2 sigmoid(x) - 1
        if self._aggregate == "mean":
            return scores / len(scores), spans
        if self._aggregate == "last":
            return scores[-1:], spans[-1:]
        return scores, spans


class ProcessModelReward:
    """P(correct) = sigmoid(output) at the end of each step; a step scores 2 P - 1, credited at its last token.

    `min`: PURE's softmax-weighted step scores (2504.15275), which sum to nearly the lowest. `mean`: each step's share.
    `last`: the last step alone. `product`: 2 prod P - 1, and each step is credited with the change that it makes, so
    that the blame stands where the product falls. With one step all four are 2 P - 1.
    """

    def __init__(self, config: settings.ProcessReward, context: "BuildContext") -> None:
        self._served = serve(config, config.path, context)
        require_head(self._served, config, {"token", "process"})
        self._config = config
        self._policy = None if context.policy is None else PolicyTokens(context.policy)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        texts = self._served.judge(rollouts)
        credits = [
            judged if isinstance(judged, str) else self._credit(judged, response)
            for judged, response in zip(texts, rollouts.response_texts, strict=True)
        ]
        return _dense_output("process", rollouts, credits, self._policy, is_truncated=truncated_rows(texts))

    def _credit(self, judged: Judged, response: str) -> "tuple[np.ndarray, np.ndarray] | str":
        """Credit of each step that the model read, and the span of its last character."""
        ends = step_ends(response, self._config.separator)
        tokens = judged.text.tokens_at(ends)
        ends, tokens = ends[tokens >= 0], tokens[tokens >= 0]
        if len(ends) == 0:
            return "the response has no step that the model read"
        right = 1.0 / (1.0 + np.exp(-np.clip(judged.outputs[tokens], -500, 500)))
        credit = step_credit(right, aggregate=self._config.aggregate, temperature=self._config.temperature)
        return np.where(np.isfinite(judged.outputs[tokens]), credit, np.nan), np.stack([ends - 1, ends], axis=1)


class ImplicitModelReward:
    """beta times the log-ratio of two language models over the response and, where it ended, its end token (R18)."""

    def __init__(self, config: settings.ImplicitReward, context: "BuildContext") -> None:
        folders = [prepare_model(path, seed=context.seed) for path in (config.policy, config.reference)]
        tokenizers = [load_tokenizer(folder, trust_remote_code=config.trust_remote_code) for folder in folders]
        if tokenizer_hash(tokenizers[0]) != tokenizer_hash(tokenizers[1]):
            raise ValueError(
                f"implicit reward: {config.policy!r} and {config.reference!r} have different tokenizers, so their "
                "log-probabilities are not of the same tokens; give the model that the policy started from"
            )
        self._tokenizer = tokenizers[0]
        self._models: list[Any] = [
            load_policy(
                folder,
                dtype=getattr(torch, config.dtype),
                attention="sdpa",
                trust_remote_code=config.trust_remote_code,
                logprob_chunk=_LOGPROB_CHUNK,
                with_value_head=False,
            )
            .to(context.device)
            .requires_grad_(False)
            .eval()
            for folder in folders
        ]
        self._config, self._context = config, context
        is_dense = config.form == "token" and context.policy is not None
        self._policy = PolicyTokens(context.policy) if is_dense and context.policy is not None else None

    def score(self, rollouts: Rollouts) -> RewardOutput:
        texts = encode_rollouts(self._tokenizer, rollouts, max_tokens=self._config.max_tokens)
        counted = [
            np.empty(0, dtype=np.int64) if isinstance(text, str) else self._counted(text, rollouts, row)
            for row, text in enumerate(texts)
        ]
        rows = [row for row, positions in enumerate(counted) if len(positions)]
        ids = [texts[row].ids for row in rows]  # type: ignore[union-attr]

        def ratios_of(batch: Sequence[int]) -> list[np.ndarray]:
            return self._log_ratios([ids[i] for i in batch], [counted[rows[i]] for i in batch])

        ratios = run_in_batches([len(row) for row in ids], self._context.batch_tokens, ratios_of)
        credits: list[tuple[np.ndarray, np.ndarray] | str] = [
            text if isinstance(text, str) else "the response has no token to score" for text in texts
        ]
        for row, ratio in zip(rows, ratios, strict=True):
            text = texts[row]
            assert isinstance(text, EncodedText)
            credits[row] = (self._config.beta * ratio, text.spans[counted[row]])
        return _dense_output("implicit", rollouts, credits, self._policy, is_truncated=truncated_rows(texts))

    def _counted(self, text: EncodedText, rollouts: Rollouts, row: int) -> np.ndarray:
        """Positions of the tokens that count: the response's, and the end token that the policy chose."""
        positions = np.flatnonzero(text.in_response)
        is_whole = int(text.spans[:, 1].max(initial=0)) >= len(rollouts.response_texts[row].rstrip())
        after = int(positions[-1]) + 1 if len(positions) else len(text.ids)
        if is_whole and rollouts.finish_reasons[row] == "stop" and after < len(text.ids):
            is_end = text.ids[after] == self._tokenizer.eos_token_id
            positions = np.append(positions, after) if is_end else positions
        return positions[positions > 0]  # the first token of a text has no state before it

    def _log_ratios(self, ids: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """log pi - log ref of the tokens at the given positions, float64, by row."""
        tokens, _ = padded(ids, device=self._context.device)
        rows = torch.from_numpy(np.repeat(np.arange(len(ids)), [len(p) for p in positions])).to(tokens.device)
        where = torch.from_numpy(np.concatenate(positions)).to(tokens.device)
        policy, reference = (
            model(tokens, rows, where - 1, tokens[rows, where], temperature=1.0)[0].double() for model in self._models
        )
        return np.split((policy - reference).cpu().numpy(), np.cumsum([len(p) for p in positions])[:-1])


def step_ends(response: str, separator: str) -> np.ndarray:
    """Position after the last character of each step, white space at its end left out, int64 [n]; no blank steps."""
    ends, start = [], 0
    for piece in response.split(separator):
        if piece.strip():
            ends.append(start + len(piece.rstrip()))
        start += len(piece) + len(separator)
    return np.array(ends, dtype=np.int64)


def step_credit(right: np.ndarray, *, aggregate: str, temperature: float) -> np.ndarray:
    """Credit of each step from its P(correct) [n]; it sums to the response's score (see ProcessModelReward)."""
    scores = 2 * right - 1
    if aggregate == "min":
        return soft_minimum_credit(scores, temperature)
    if aggregate == "mean":
        return scores / len(scores)
    if aggregate == "last":
        return np.where(np.arange(len(scores)) == len(scores) - 1, scores, 0.0)
    return np.diff(2 * np.cumprod(right) - 1, prepend=0.0)


def soft_minimum_credit(scores: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(-scores / temperature) * scores: PURE's credit, whose sum is nearly the lowest score (2504.15275)."""
    weights = np.exp(-(scores - scores.min()) / temperature)
    return weights / weights.sum() * scores


def _dense_output(
    name: str,
    rollouts: Rollouts,
    credits: Sequence[tuple[np.ndarray, np.ndarray] | str],
    policy: PolicyTokens | None,
    *,
    is_truncated: np.ndarray,
) -> RewardOutput:
    """Each row's score is the sum of its credit; dense scores are the credit in the policy's tokens."""
    scores = np.full(len(rollouts), np.nan)
    token_scores = [np.zeros(length, dtype=np.float32) for length in rollouts.response_lengths]
    errors = {}
    for row, credit in enumerate(credits):
        if isinstance(credit, str):
            errors[row] = credit
            continue
        scores[row] = credit[0].sum()
        if policy is not None and np.isfinite(scores[row]):
            token_scores[row] = policy.lay_out(rollouts, row, *credit)
    dense = None if policy is None else token_scores
    return output_of(name, rollouts, scores, errors, is_truncated=is_truncated, token_scores=dense)

"""Leaves that are models with one reading of a response. Importing this file loads torch: the builders do it.

Those that score its tokens or steps are in `dense_leaves`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raylhf.batch import Prompt, RewardOutput, Rollouts
from raylhf.config import reward_leaves as settings
from raylhf.models.reward import member_folders
from raylhf.rewards.dense_leaves import ImplicitModelReward, ProcessModelReward, TokenLevelModelReward
from raylhf.rewards.fusion import softmax
from raylhf.rewards.model_serving import ServedModel, output_of, require_head, serve, truncated_rows

if TYPE_CHECKING:  # build imports this file
    from raylhf.rewards.build import BuildContext

__all__ = [
    "EnsembleModelReward",
    "ExplicitModelReward",
    "ImplicitModelReward",
    "MultiValueModelReward",
    "ProcessModelReward",
    "PromptClassifier",
    "TokenLevelModelReward",
]

_PROMPT_TOKENS = 2048
"""The end of a prompt that its classifier reads, at most."""


class ExplicitModelReward:
    """One output of a sequence classifier; of one into several classes, the log-odds of the class against the rest,
    as its logits are defined only up to a constant for each text."""

    def __init__(self, config: settings.ExplicitReward, context: "BuildContext") -> None:
        self._served = serve(config, config.path, context)
        self._output = config.output
        require_head(self._served, config, {"scalar", "multi_value"})
        if config.output >= len(self._served.model.names):
            raise ValueError(
                f"explicit reward: output is {config.output}, but {config.path!r} has {len(self._served.model.names)} "
                "outputs, counted from 0"
            )
        calibration = self._served.model.calibration
        self.calibration = None if calibration is None else calibration.output(config.output)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        outputs, errors, is_truncated = _pooled(self._served, rollouts)
        scores = outputs[:, self._output]
        if self._served.model.is_softmax:
            scores = scores - np.logaddexp.reduce(np.delete(outputs, self._output, axis=1), axis=1)
        return output_of("explicit", rollouts, scores, errors, is_truncated=is_truncated)


class EnsembleModelReward:
    """The members' scores as a vector, and their mean. A member without a finite score for a response is left out.

    Members with calibrations are standardised by their own first: on different scales, their spread would measure
    offsets instead of disagreement.
    """

    def __init__(self, config: settings.EnsembleReward, context: "BuildContext") -> None:
        folders = [folder for path in config.paths for folder in member_folders(path)]
        self._members = [serve(config, folder, context) for folder in folders]
        for member in self._members:
            require_head(member, config, {"scalar", "ensemble"})
        self._names = tuple(f"member_{k}" for k in range(sum(len(m.model.names) for m in self._members)))
        calibrations = [member.model.calibration for member in self._members]
        known = [calibration for calibration in calibrations if calibration is not None]
        self._mean, self._std = np.zeros(len(self._names)), np.ones(len(self._names))
        if known and len(known) < len(calibrations):
            without = folders[calibrations.index(None)]
            raise ValueError(
                f"ensemble reward: {len(known)} of {len(calibrations)} models have a calibration file, and {without!r} "
                "has none: their scores would be on different scales; give calibrations to all of them or to none"
            )
        if known:
            self._mean = np.concatenate([calibration.mean for calibration in known])
            std = np.concatenate([calibration.std for calibration in known])
            self._std = np.where(std > 0, std, 1.0)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        judged = [_pooled(member, rollouts) for member in self._members]
        vector = (np.concatenate([outputs for outputs, _, _ in judged], axis=1) - self._mean) / self._std
        is_scored = np.isfinite(vector)
        vector = np.where(is_scored, vector, np.nan)
        num_scored = is_scored.sum(axis=1)
        totals = np.where(is_scored, vector, 0.0).sum(axis=1)
        mean = np.divide(totals, num_scored, out=np.full(len(rollouts), np.nan), where=num_scored > 0)
        reasons = {row: reason for _, found, _ in judged for row, reason in found.items() if num_scored[row] == 0}
        is_truncated = np.any([cut for _, _, cut in judged], axis=0)
        return output_of(
            "ensemble", rollouts, mean, reasons, is_truncated=is_truncated, vector=vector, names=self._names
        )


class MultiValueModelReward:
    """One output an attribute as a vector, and their weighted sum (without weights: their mean)."""

    def __init__(self, config: settings.MultiValueReward, context: "BuildContext") -> None:
        self._served = serve(config, config.path, context)
        require_head(self._served, config, {"scalar", "multi_value"})
        names = self._served.model.names
        weights = config.weights or dict.fromkeys(names, 1.0 / len(names))
        if unknown := weights.keys() - set(names):
            raise ValueError(
                f"multi_value reward: weights names {min(unknown)!r}, but {config.path!r} has {', '.join(names)}"
            )
        self._weights = np.array([weights.get(name, 0.0) for name in names])

    def score(self, rollouts: Rollouts) -> RewardOutput:
        vector, errors, is_truncated = _pooled(self._served, rollouts)
        scores, names = vector @ self._weights, self._served.model.names
        return output_of("multi_value", rollouts, scores, errors, is_truncated=is_truncated, vector=vector, names=names)


class PromptClassifier:
    """Weights of the gate node's parts, from a sequence classifier of the prompt."""

    def __init__(self, path: str, *, temperature: float, num_outputs: int, context: "BuildContext") -> None:
        self._served = ServedModel(
            path, max_tokens=_PROMPT_TOKENS, dtype="float32", trust_remote_code=False, context=context
        )
        if self._served.model.is_token_level or len(self._served.model.names) != num_outputs:
            raise ValueError(
                f"the gate's classifier {path!r} has outputs {', '.join(self._served.model.names)}; it needs one for "
                f"each of the gate's {num_outputs} parts, and one score a prompt"
            )
        self._temperature = temperature

    def weights(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, dict[int, str]]:
        """softmax(outputs / temperature), float64 [B, J]: each row sums to 1, or is NaN with its reason."""
        weights = np.full((len(prompts), len(self._served.model.names)), np.nan)
        reasons = {}
        for row, outputs in enumerate(self._served.classify(prompts)):
            if isinstance(outputs, str):
                reasons[row] = outputs
            elif not np.isfinite(outputs).all():
                reasons[row] = f"its outputs are {outputs.tolist()}"
            else:
                weights[row] = softmax(outputs, temperature=self._temperature)
        return weights, reasons


def _pooled(served: ServedModel, rollouts: Rollouts) -> tuple[np.ndarray, dict[int, str], np.ndarray]:
    """Outputs, float64 [B, H] with NaN where the model could not read the text, the reasons by row, and which texts
    it read in part, bool [B]."""
    outputs = np.full((len(rollouts), len(served.model.names)), np.nan)
    errors, texts = {}, served.judge(rollouts)
    for row, judged in enumerate(texts):
        if isinstance(judged, str):
            errors[row] = judged
        else:
            outputs[row] = judged.outputs
    return outputs, errors, truncated_rows(texts)

"""The calibration file of a reward model: the distribution of its scores, and hashes of the text format behind them."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

CALIBRATION_FILE = "raylhf_calibration.json"
_PROBE = "Caf\u00e9 costs  3.50\n\n\tHello, world! don't \u4f60\u597d \U0001f600 x_1 = {'a': [0]}"
"""Text of several scripts: tokenizers with the same vocabulary and different rules encode it differently."""


@dataclass(frozen=True)
class Calibration:
    """Scores of the calibration set, by output of the model, and the hashes of the tokenizer that made them."""

    n: int
    """Responses in the calibration set."""
    mean: tuple[float, ...]
    """Mean score."""
    std: tuple[float, ...]
    """Standard deviation (ddof 0)."""
    q01: tuple[float, ...]
    """1 % quantile."""
    q99: tuple[float, ...]
    """99 % quantile."""
    tokenizer_hash: str
    """Of the tokenizer that the scores were computed with."""
    template_hash: str
    """Of its chat template."""
    target_mean: tuple[float, ...] | None = None
    """Subtracted from the training targets of a regression; None where they were not standardised."""
    target_std: tuple[float, ...] | None = None
    """Divided by, likewise."""

    def output(self, index: int) -> "Calibration":
        """The calibration of one output alone."""
        return replace(
            self,
            **{
                name: None if (values := getattr(self, name)) is None else (values[index],)
                for name in ("mean", "std", "q01", "q99", "target_mean", "target_std")
            },
        )

    def write(self, folder: str | Path) -> None:
        """Put the calibration beside the model's weights."""
        Path(folder, CALIBRATION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: str | Path) -> "Calibration | None":
        """The folder's calibration; None where it has none (a ValueError where the file is not one)."""
        file = Path(folder, CALIBRATION_FILE)
        if not file.is_file():
            return None
        try:
            fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return Calibration(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is not a calibration file: {error}; remove it, or train the model anew"
            ) from error

    def check_text_format(self, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
        """Raise ValueError where tokenizer or chat template are not those that the scores were computed with."""
        for what, recorded, loaded in (
            ("tokenizer", self.tokenizer_hash, tokenizer_hash(tokenizer)),
            ("chat template", self.template_hash, template_hash(tokenizer)),
        ):
            if recorded != loaded:
                raise ValueError(
                    f"the {what} of reward model {folder!r} is not the one that it was calibrated with "
                    f"({loaded} now, {recorded} in {CALIBRATION_FILE}); restore the {what}, or remove that file"
                )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the vocabulary and of how it encodes a text of several scripts; the choice of pad token does not count."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer.encode(_PROBE, add_special_tokens=True)
    return _digest(json.dumps([vocabulary, probe]))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the chat template; "none" without one."""
    template = tokenizer.chat_template
    return "none" if template is None else _digest(json.dumps(template, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

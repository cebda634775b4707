"""From chat messages to the policy's token ids, through the model's own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of the messages with the generation prompt at the end.

    A base model without a chat template gets the turns' texts joined by blank lines.
    """
    if tokenizer.chat_template is None:
        return tokenizer.encode("\n\n".join(message["content"] for message in messages))
    text: Any = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself: adding them again would double the BOS.
    return tokenizer.encode(text, add_special_tokens=False)

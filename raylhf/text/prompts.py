"""From files or a Hugging Face dataset to prompts, and the seeded order in which training draws them."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from raylhf.batch import Prompt
from raylhf.config.data import DataConfig
from raylhf.text.sources import read_rows

ROLES = ("system", "user", "assistant")


def load_prompts(config: DataConfig) -> list[Prompt]:
    """Every prompt of `data.path`, in its order; `index` is the row's position. A bad row stops the run."""
    prompts = []
    for where, row in read_rows(config.path, split=config.split, dataset_config=config.dataset_config):
        if config.prompt_key not in row:
            raise ValueError(
                f"{where}: no field {config.prompt_key!r} (data.prompt_key); the row has {sorted(map(str, row))}"
            )
        metadata = {key: value for key, value in row.items() if key != config.prompt_key}
        messages = parse_messages(row[config.prompt_key], config.system_prompt, where=where)
        prompts.append(Prompt(index=len(prompts), messages=messages, metadata=metadata))
    if not prompts:
        raise ValueError(f"data.path={config.path!r} holds no prompts: every file in it is empty")
    return prompts


def parse_messages(value: Any, system_prompt: str | None, *, where: str) -> tuple[dict[str, str], ...]:
    """Chat turns of a prompt that is a string or a list of {role, content}.

    `system_prompt` is put first where the prompt has no system message. Other fields of a message are left out.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: the prompt is {value!r}; it must be a string or a list of chat messages")
    messages = tuple(parse_message(message, where=f"{where}, message {i}") for i, message in enumerate(value))
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError(f"{where}: the roles are {roles}; a system message can only be the first one")
    if roles[-1] != "user":
        raise ValueError(
            f"{where}: the last message is the {roles[-1]}'s; it must be the user's, for the policy answers"
        )
    if system_prompt is not None and roles[0] != "system":
        messages = ({"role": "system", "content": system_prompt}, *messages)
    return messages


def parse_message(message: Any, *, where: str) -> dict[str, str]:
    """One chat turn as {role, content}; a ValueError says what is wrong with it."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{where}: {message!r} is no chat message; write {{'role': ..., 'content': ...}}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{where}: unknown role {role!r}; it must be one of {', '.join(ROLES)}")
    if not isinstance(content, str) or (role == "user" and not content.strip()):
        raise ValueError(f"{where}: the content is {content!r}; it must be text, and the user's must not be empty")
    return {"role": role, "content": content}


def split_held_out(prompts: Sequence[Prompt], held_out: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, each in the order given. The held-out ones are drawn by `seed` alone."""
    if held_out > len(prompts) - 1:
        raise ValueError(
            f"data.held_out={held_out} leaves nothing to train on: there are {len(prompts)} prompts; "
            f"set it to at most {max(len(prompts) - 1, 0)}"
        )
    drawn = set(random.Random(f"held_out/{seed}").sample(range(len(prompts)), held_out))
    training = [prompt for i, prompt in enumerate(prompts) if i not in drawn]
    return training, [prompts[i] for i in sorted(drawn)]


def drop_overlong(
    prompts: Sequence[Prompt], lengths: Sequence[int], max_prompt_tokens: int
) -> tuple[list[Prompt], int]:
    """(prompts of at most `max_prompt_tokens` tokens, how many were dropped). `lengths` include the chat template."""
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= max_prompt_tokens]
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts are longer than data.max_prompt_tokens={max_prompt_tokens}; "
            f"the shortest has {min(lengths, default=0)} tokens"
        )
    return kept, len(prompts) - len(kept)


class PromptOrder:
    """An endless order over the training prompts: every prompt once an epoch, each epoch shuffled anew.

    The order of an epoch depends on (seed, epoch) alone, so (epoch, position) is the whole state.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True):
        if not prompts:
            raise ValueError("there are no training prompts to draw from; see data.path, data.held_out")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._rows = self._rows_of(0)

    @property
    def epochs_done(self) -> float:
        """Epochs drawn so far; 1.5 is one and a half."""
        return self._epoch + self._position / len(self._prompts)

    @property
    def num_drawn(self) -> int:
        """Prompts drawn so far: the number of the next draw."""
        return self._epoch * len(self._prompts) + self._position

    def draw(self, n: int) -> list[Prompt]:
        """The next n prompts; they may cross the end of an epoch."""
        return [self._next() for _ in range(n)]

    def state(self) -> dict[str, int]:
        """What `restore` needs to draw on from here."""
        return {"epoch": self._epoch, "position": self._position, "num_prompts": len(self._prompts)}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken. The prompts must be the same ones."""
        if state["num_prompts"] != len(self._prompts):
            raise ValueError(
                f"the checkpoint was written with {state['num_prompts']} training prompts and data.path gives "
                f"{len(self._prompts)}; restore the data, or start anew with checkpoint.resume=false"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._rows = self._rows_of(self._epoch)

    def _rows_of(self, epoch: int) -> list[int]:
        rows = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"order/{self._seed}/{epoch}").shuffle(rows)
        return rows

    def _next(self) -> Prompt:
        if self._position == len(self._rows):
            self._epoch, self._position = self._epoch + 1, 0
            self._rows = self._rows_of(self._epoch)
        self._position += 1
        return self._prompts[self._rows[self._position - 1]]

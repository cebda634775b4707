"""The contracts between roles, as Protocols: any class that has the methods satisfies them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from raylhf.batch import Prompt, RewardOutput, Rollouts


class Reward(Protocol):
    """A leaf or a node of the reward graph."""

    def score(self, rollouts: Rollouts) -> RewardOutput:
        """Score each response. A failure is `valid = False` and a sentence in `errors`, never an exception or a 0."""
        ...


class RolloutEngine(Protocol):
    """Samples responses and takes new weights."""

    async def generate(
        self, prompt: Prompt, *, num_responses: int, seed: int, with_sample: bool = False
    ) -> tuple[Rollouts, dict[str, Any]]:
        """Sample a group. Response j uses seed + j. The second value is a small summary that the driver may read."""
        ...

    async def ping(self) -> int:
        """Answer while the engine is well: the version of its weights."""
        ...

    async def join_transfer(self, init_info: Mapping[str, Any], *, place: int) -> None:
        """Join a weight-transfer group as its engine number `place`, and leave an earlier one."""
        ...

    async def update_weights(self, update_info: Mapping[str, Any], *, policy_version: int) -> int:
        """Receive one set of weights, drop caches built with the old ones, and return the version read back."""
        ...

    async def close(self) -> None:
        """Stop the engine and its child processes."""
        ...


class WeightSource(Protocol):
    """The policy's full parameters under their checkpoint names, or its adapters alone, gathered piece by piece.

    Has the shape of `vllm.distributed.weight_transfer.WeightSource`. Iterating is a collective: every rank iterates.
    """

    def metadata(self) -> Sequence[Any]:
        """(name, dtype, shape) of each parameter in the order of iteration, without gathering."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class WeightSender(Protocol):
    """The learner's end of a weight transfer. Every learner rank calls every method, in this order.

    The driver passes `prepare` and `update_info` of rank 0 on to the rollout workers, which must be told before
    `connect` and `send`, because those wait for them.
    """

    def prepare(self) -> dict[str, Any]:
        """Open the meeting point and return the rollout side's `init_info` at once (empty on other ranks)."""
        ...

    def connect(self) -> None:
        """Wait until every rollout worker has joined."""
        ...

    def update_info(self) -> dict[str, Any]:
        """What rollout workers need to receive the weights that the next `send` sends (empty on other ranks)."""
        ...

    def send(self) -> None:
        """Send the source's present weights. Every rank gathers; rank 0 transmits."""
        ...

    def release(self) -> None:
        """Free what the transfer kept. Call it when every rollout worker has the weights."""
        ...

    def close(self) -> None: ...


class Learner(Protocol):
    """Trains the policy on scored rollouts. Every rank is called with its own share."""

    def update(self, rollouts: Sequence[Rollouts], rewards: Sequence[RewardOutput]) -> dict[str, float]:
        """One step: advantages, then epochs of minibatches. Returns metrics that are equal on every rank."""
        ...

    def measure(self, rollouts: Sequence[Rollouts], *, is_counted: bool = True) -> dict[str, float]:
        """KL to the reference and entropy on the given responses, without training."""
        ...

    def publish(self) -> int:
        """Send the rollout workers what they lack of the policy's weights (collective); returns its bytes."""
        ...

    def save(self, folder: str) -> None: ...

    def load(self, folder: str) -> None: ...

    def export(self, folder: str) -> None:
        """Write an ordinary Hugging Face folder."""
        ...

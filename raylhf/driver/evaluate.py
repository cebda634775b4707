"""How good the policy is on prompts that it is not trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raylhf.batch import Prompt
from raylhf.cluster.actors import Held, gather
from raylhf.driver.batch_metrics import batch_metrics
from raylhf.driver.collect import Collection, ScoredGroup, hand_over, sample_rows
from raylhf.driver.workers import Workers


@dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation."""

    metrics: dict[str, float]
    """`eval/...` as in docs/metrics.md."""
    samples: list[dict[str, Any]]
    """The first prompts' responses, for people to read."""


def evaluate(
    workers: Workers, prompts: Sequence[Prompt], *, seed_key: Sequence[int], should_stop: Callable[[], bool]
) -> Evaluation:
    """Sample and score the held-out prompts, and measure the KL to the reference and the entropy on them."""
    config = workers.config
    collection = Collection(
        workers,
        prompts,
        num_responses=config.evaluation.responses_per_prompt,
        num_samples=config.evaluation.num_samples,
        seed_key=seed_key,
        should_stop=should_stop,
    )
    learners = workers.learner
    num_ranks = len(learners)

    def references(groups: Sequence[ScoredGroup]) -> list[list[list[Any]]]:
        # With fewer prompts than ranks, some ranks take part without counting.
        return [[[group.rollouts for group in groups[rank::num_ranks] or groups[:1]]] for rank in range(num_ranks)]

    groups = hand_over(collection, learners, references, timeout_s=config.cluster.step_timeout_s)
    measured = {
        learners.name(rank): learners.submit(rank, "measure", Held(), is_counted=rank < len(groups))
        for rank in range(num_ranks)
    }
    metrics = gather(measured, phase="evaluation", timeout_s=config.cluster.step_timeout_s)[0]
    return Evaluation(metrics=metrics | batch_metrics(groups, area="eval"), samples=sample_rows(groups))

"""How good the policy is on prompts that it is not trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raylhf.batch import Prompt
from raylhf.cluster.actors import gather, value_of
from raylhf.config import RunConfig
from raylhf.driver.collect import ScoredGroup, batch_metrics, collect
from raylhf.driver.workers import Workers


@dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation."""

    metrics: dict[str, float]
    """`eval/...` as in docs/metrics.md."""
    samples: list[dict[str, Any]]
    """The first prompts' responses, for people to read."""


def evaluate(
    config: RunConfig,
    workers: Workers,
    prompts: Sequence[Prompt],
    *,
    seed_key: Sequence[int],
    should_stop: Callable[[], bool],
) -> Evaluation:
    """Sample and score the held-out prompts, and measure the KL to the reference and the entropy on them."""
    groups = collect(
        config,
        workers,
        prompts,
        num_responses=config.evaluation.responses_per_prompt,
        seed_key=seed_key,
        should_stop=should_stop,
    )
    learners = workers.learner
    measured = {}
    for rank in range(len(learners)):
        share = groups[rank :: len(learners)]
        # With fewer prompts than ranks, some ranks take part without counting.
        references = [group.rollouts for group in share or groups[:1]]
        measured[learners.name(rank)] = learners.submit(rank, "measure", references, is_counted=bool(share))
    metrics = gather(measured, phase="evaluation", timeout_s=config.cluster.step_timeout_s)[0]
    samples = sample_rows(groups, limit=config.evaluation.num_samples)
    return Evaluation(metrics=metrics | batch_metrics(groups, area="eval"), samples=samples)


def sample_rows(groups: Sequence[ScoredGroup], *, limit: int) -> list[dict[str, Any]]:
    """Prompt, response and score of the first response of the first groups."""
    rows = []
    for group in groups[:limit]:
        rollouts = value_of(group.rollouts)
        rows.append(
            {
                "prompt_index": rollouts.prompts[0].index,
                "prompt": rollouts.prompts[0].text,
                "response": rollouts.response_texts[0],
                "score": group.reward_summary["scores"][0],
                "finish_reason": rollouts.finish_reasons[0],
                "policy_version": int(rollouts.policy_versions[0]),
            }
        )
    return rows

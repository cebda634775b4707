"""Which numbers of a run Ray exports to Prometheus, and under which names. Ray puts `ray_` before each."""

from collections.abc import Mapping
from typing import NamedTuple

from raylhf.tracking.catalogue import METRICS

PREFIX = "ray_"
RUN_LABEL = "run"
"""Every series has this label: the run's name."""


class Exported(NamedTuple):
    """One exported name."""

    keys: tuple[str, ...]
    """Keys of the row of metrics that it takes its value from; none where the driver looks it up."""
    about: str = ""
    """The meaning, where the catalogue has none."""
    labels: tuple[str, ...] = ()
    """Further ones than the run's name."""

    @property
    def meaning(self) -> str:
        """One sentence without a full stop."""
        return self.about or METRICS[self.keys[0]].meaning


EXPORTED: dict[str, Exported] = {
    # progress
    "raylhf_step": Exported((), "Steps done"),
    "raylhf_last_step_timestamp_seconds": Exported(
        (), "Unix time at which the last step was finished; before the first one, at which Ray was there"
    ),
    "raylhf_step_seconds": Exported(("time/step_s",)),
    "raylhf_rollout_seconds": Exported(("time/rollout_s",)),
    "raylhf_reward_seconds": Exported(("time/reward_s",)),
    "raylhf_wait_seconds": Exported(("time/wait_s",)),
    "raylhf_learn_seconds": Exported(("time/learn_s",)),
    "raylhf_sync_seconds": Exported(("time/sync_s",)),
    "raylhf_eval_seconds": Exported(("time/eval_s",)),
    "raylhf_save_seconds": Exported(("time/save_s",)),
    # reward and policy
    "raylhf_reward_score_mean": Exported(("reward/score_mean",)),
    "raylhf_reward_score_std": Exported(("reward/score_std",)),
    "raylhf_reward_invalid_responses": Exported(("reward/invalid_count",)),
    "raylhf_eval_score_mean": Exported(("eval/score_mean",)),
    "raylhf_kl_to_ref_nats": Exported(("policy/kl_to_ref",)),
    "raylhf_kl_to_ref_per_token_nats": Exported(("policy/kl_to_ref_per_token",)),
    "raylhf_kl_coef": Exported(("kl/coef",)),
    "raylhf_policy_entropy_nats": Exported(("policy/entropy",)),
    "raylhf_loss": Exported(("policy/loss", "rm/loss"), "Loss of the policy, or of a reward model that is trained"),
    "raylhf_grad_norm": Exported(("policy/grad_norm", "rm/grad_norm"), "Norm of its gradient before it is scaled down"),
    "raylhf_pair_accuracy_ratio": Exported(
        ("pref/accuracy", "rm/accuracy"), "Share of the step's pairs that are ranked as they are labelled, 0 to 1"
    ),
    # rollout
    "raylhf_rollout_tokens_per_second": Exported(("rollout/tokens_per_s",)),
    "raylhf_learner_tokens_per_second": Exported(
        ("learn/tokens_per_s", "rm/tokens_per_s"), "Tokens of the batch by the learners' time for it"
    ),
    "raylhf_response_length_tokens": Exported(("rollout/response_length_mean",)),
    "raylhf_response_truncated_ratio": Exported(("rollout/truncated_frac",)),
    "raylhf_staleness_mean_versions": Exported(("rollout/staleness_mean",)),
    "raylhf_staleness_max_versions": Exported(("rollout/staleness_max",)),
    "raylhf_mismatch_nats": Exported(("mismatch/abs_dlogprob_mean",)),
    "raylhf_queue_prompts": Exported(
        (),
        "Training prompts drawn and not yet learnt from, by stage: waiting, sampling, scoring, or scored",
        ("stage",),
    ),
    # workers
    "raylhf_workers": Exported(
        (),
        "Rollout and reward workers by state: healthy (they serve), suspect, stale, restarting, dead",
        ("role", "state"),
    ),
    "raylhf_worker_restarts": Exported((), "Restarts so far, by role; of the learners, all at once", ("role",)),
    "raylhf_object_store_used_ratio": Exported(("memory/object_store_frac",)),
    "raylhf_wandb_errors": Exported(("tracking/wandb_errors",)),
}
"""By name without Ray's prefix. Units stand last in a name; shares are `ratio`; scores have the reward's own unit."""

_NAMES = {key: name for name, exported in EXPORTED.items() for key in exported.keys}


class Series(NamedTuple):
    """A name with the values of its labels."""

    name: str
    labels: tuple[str, ...] = ()
    """In the order of `EXPORTED[name].labels`."""


def exported_row(row: Mapping[str, float]) -> dict[Series, float]:
    """What is exported of a row of metrics; the rest is left out."""
    return {Series(_NAMES[key]): value for key, value in row.items() if key in _NAMES}


def render_exported() -> str:
    """The table of docs/metrics.md."""
    lines = ["| name in Prometheus | labels | from | meaning |", "| --- | --- | --- | --- |"]
    for name, exported in EXPORTED.items():
        labels = ", ".join(f"`{label}`" for label in exported.labels)
        keys = ", ".join(f"`{key}`" for key in exported.keys) or "the driver"
        lines.append(f"| `{PREFIX}{name}` | {labels} | {keys} | {exported.meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"

"""Every metric that a run may log, with its meaning. `Tracker.log` refuses a key that is not here."""

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple


class Metric(NamedTuple):
    """One line of the catalogue."""

    meaning: str
    unit: str
    healthy: str = ""
    """What to expect of a run that goes well; empty where nothing general is known."""


METRICS: dict[str, Metric] = {
    # reward: what the reward plane gave the sampled responses
    "reward/score_mean": Metric(
        "Mean score of the valid responses, after missing-EOS penalty and clip", "reward", "rises, then levels off"
    ),
    "reward/score_std": Metric("Standard deviation of the scores over responses", "reward", "above 0"),
    "reward/score_se": Metric("Standard error of reward/score_mean, responses of one prompt as one cluster", "reward"),
    "reward/total_mean": Metric("Mean of score minus KL penalty: what PPO maximises", "reward", "rises"),
    "reward/invalid_count": Metric("Responses whose score failed; they are dropped", "responses", "0"),
    "reward/part/<name>_mean": Metric("Mean score of one named part of the reward graph, before its weight", "reward"),
    "reward/part/<name>_std": Metric("Standard deviation of that part's scores over responses", "reward", "above 0"),
    "reward/resampled_count": Metric("Groups sampled anew because a leaf with on_failure: resample failed", "groups"),
    "reward/source/<name>_latency_p50_s": Metric("Median time of one scoring call of a leaf", "s"),
    "reward/source/<name>_latency_p95_s": Metric("95th percentile of that time", "s", "below the step's slack"),
    "reward/source/<name>_failed_count": Metric("Responses that the leaf failed to score", "responses", "0"),
    "reward/source/<name>_truncated_count": Metric(
        "Responses that, with their prompts, the leaf's max_tokens cut", "responses", "0"
    ),
    "reward/source/<name>_score_mean": Metric("Mean of the leaf's own scores", "score"),
    "reward/source/<name>_score_std": Metric("Standard deviation of the leaf's own scores", "score", "above 0"),
    # rollout: what the engine sampled
    "rollout/response_length_mean": Metric("Mean response length, end token included", "tokens", "steady"),
    "rollout/response_length_p95": Metric("95th percentile of the response length", "tokens", "below the limit"),
    "rollout/truncated_frac": Metric("Share of responses that ran into max_response_tokens", "0 to 1", "below 0.1"),
    "rollout/zero_length_count": Metric("Responses without a single token; they are dropped", "responses", "0"),
    "rollout/tokens_per_s": Metric(
        "Response tokens of all rollout workers by the time of the rollout (asynchronous: of the step)", "tokens/s"
    ),
    "rollout/num_tokens": Metric("Response tokens of the step", "tokens"),
    "rollout/num_workers": Metric("Rollout workers that serve", "workers", "rollout.replicas, or as scaled"),
    "rollout/policy_version": Metric("Oldest version of the weights that sampled the step's responses", "version"),
    "rollout/staleness_mean": Metric(
        "By how many versions the weights that learn are ahead of those that sampled, mean over tokens", "versions"
    ),
    "rollout/staleness_max": Metric("The same, of the oldest token", "versions", "at most rollout.max_staleness"),
    "rollout/mixed_versions_frac": Metric("Share of responses during which the weights changed", "0 to 1"),
    # policy: the update
    "policy/loss": Metric("Policy loss, averaged over the optimizer steps of the batch", "loss", "around 0"),
    "policy/clip_frac": Metric("Share of response tokens whose ratio was clipped", "0 to 1", "0.01 to 0.3"),
    "policy/approx_kl": Metric(
        "KL(old || policy) per response token before an optimizer step (k3), mean over the steps of the batch",
        "nats",
        "below 0.02",
    ),
    "policy/ratio_mean": Metric("Mean probability ratio new / old over response tokens", "ratio", "0.99 to 1.01"),
    "policy/ratio_max": Metric("Largest probability ratio new / old", "ratio", "below 10"),
    "policy/first_ratio_error": Metric(
        "exp of the mean |log-ratio| at the first minibatch, minus 1: old and new must agree before any update",
        "ratio",
        "below 1e-3",
    ),
    "policy/entropy": Metric("Mean entropy of the policy's next-token distribution", "nats", "falls slowly, not to 0"),
    "policy/kl_to_ref": Metric("KL to the reference, summed over a response (k1), mean", "nats", "rises slowly"),
    "policy/kl_to_ref_k3": Metric("KL to the reference, summed over a response (k3, never negative), mean", "nats"),
    "policy/kl_to_ref_per_token": Metric("KL to the reference per response token (k1)", "nats", "below 0.2"),
    "policy/grad_norm": Metric(
        "Largest norm of the policy's gradient (and a shared value head's) before it is scaled down", "norm", "steady"
    ),
    "policy/lr": Metric("Learning rate of the policy", "rate"),
    "policy/epochs_done": Metric("Passes over the batch; fewer than num_epochs after approx_kl_limit", "epochs"),
    "policy/log_ratio_clamp_frac": Metric("Share of tokens whose log-ratio left [-20, 20]", "0 to 1", "0"),
    # kl: the penalty
    "kl/coef": Metric("Weight of the KL penalty", "reward per nat", "steady once the KL is at its target"),
    "kl/penalty_mean": Metric("Coefficient times KL per response, mean", "reward", "below the spread of the scores"),
    # advantage, critic
    "advantage/mean": Metric("Mean advantage over response tokens, before whitening", "reward", "around 0"),
    "advantage/std": Metric("Standard deviation of the advantages, before whitening", "reward", "above 0"),
    "critic/loss": Metric("Value loss, averaged over the optimizer steps of the batch", "loss", "falls, then steady"),
    "critic/clip_frac": Metric("Share of response tokens whose value change was clipped", "0 to 1", "below 0.3"),
    "critic/explained_variance": Metric("1 - Var(returns - values) / Var(returns)", "at most 1", "rises above 0.3"),
    "critic/value_mean": Metric("Mean value over response tokens", "reward", "near reward/total_mean"),
    "critic/grad_norm": Metric("Norm of the critic's gradient before it is scaled down", "norm", "steady"),
    "critic/lr": Metric("Learning rate of the critic", "rate"),
    # mismatch: engine against learner at equal weights
    "mismatch/abs_dlogprob_mean": Metric(
        "Mean |learner - engine| log-probability of the sampled tokens", "nats", "below 0.01; 1e-4 in float32"
    ),
    "mismatch/kl": Metric("KL(engine || learner) per response token (k3)", "nats", "below 0.001"),
    "mismatch/ratio_max": Metric("Largest probability ratio learner / engine", "ratio", "below 2"),
    "mismatch/capped_frac": Metric(
        "Share of tokens whose importance weight met importance_cap", "0 to 1", "below 0.01"
    ),
    # data
    "data/epoch": Metric("Epochs drawn from the training prompts", "epochs"),
    "data/dropped_overlong_count": Metric("Prompts longer than max_prompt_tokens, dropped at the start", "prompts"),
    "data/dropped_responses_count": Metric("Responses of the step that were not trained on", "responses", "0"),
    # sync: weights from learner to rollout workers
    "sync/gb_per_s": Metric("sync/bytes by time/sync_s, for one receiver; low where adapters travel alone", "GB/s"),
    "sync/bytes": Metric("Bytes sent: the weights or, over gloo with learner.lora, the adapters alone", "bytes"),
    # time
    "time/rollout_s": Metric("Sampling, and scoring of what is sampled meanwhile", "s"),
    "time/wait_s": Metric("What the learners waited for the step's responses and scores", "s"),
    "time/reward_s": Metric("Scoring, summed over reward workers; overlaps the rollout", "s"),
    "time/learn_s": Metric("Learning: log-probabilities, values and updates", "s"),
    "time/sync_s": Metric("Weight sync: gather, transfer to all rollout workers, load, read the version back", "s"),
    "time/step_s": Metric("The whole step without evaluation and saving", "s"),
    "time/eval_s": Metric("Evaluation on the held-out prompts", "s"),
    "time/start_s": Metric("From the program's start to the first step", "s"),
    "time/start_program_s": Metric("Of it: the driver's imports, settings, data, W&B", "s"),
    "time/start_ray_s": Metric("Of it: starting or joining Ray", "s"),
    "time/start_nodes_s": Metric("Of it: waiting for the cluster's nodes", "s"),
    "time/start_model_s": Metric("Of it: preparing the model's folder, measuring the prompts", "s"),
    "time/start_workers_s": Metric("Of it: starting all workers, side by side", "s"),
    "time/start_engine_s": Metric("Within time/start_workers_s: the slowest vLLM engine, after its imports", "s"),
    "time/start_learner_s": Metric("Within time/start_workers_s: the slowest learner's models and DeepSpeed", "s"),
    "time/start_sync_s": Metric("Of time/start_s: the first weight sync", "s"),
    "time/start_calibration_s": Metric("Of time/start_s: calibrating rewards", "s"),
    "time/start_evaluation_s": Metric("Of time/start_s: the evaluation before the first step", "s"),
    "time/save_s": Metric("Saving a checkpoint", "s"),
    "learn/logprobs_s": Metric("Forward passes before the update: old and reference log-probabilities, values", "s"),
    "learn/update_s": Metric("Forward and backward passes of the update, optimizer steps included", "s"),
    "learn/tokens_per_s": Metric("Prompt and response tokens of the batch by the learners' time for it", "tokens/s"),
    # memory
    "memory/learner_peak_gib": Metric(
        "Largest peak over learner ranks since the models were loaded: GPU memory, on a CPU resident memory", "GiB"
    ),
    "memory/total_rss_gib": Metric(
        "Resident memory of the driver and all processes below it on its machine; shared pages count twice",
        "GiB",
        "steady",
    ),
    "memory/object_store_frac": Metric(
        "Share in use of the fullest node's Ray object store, when a batch is complete and not yet freed",
        "0 to 1",
        "below 0.7",
    ),
    # eval: the policy on held-out prompts
    "eval/score_mean": Metric("Mean score on the held-out prompts", "reward", "rises with reward/score_mean"),
    "eval/score_se": Metric("Standard error of eval/score_mean, responses of one prompt as one cluster", "reward"),
    "eval/kl_to_ref": Metric("KL to the reference per held-out response (k1), mean", "nats"),
    "eval/response_length_mean": Metric("Mean length of the held-out responses", "tokens"),
    "eval/truncated_frac": Metric("Share of held-out responses that ran into max_response_tokens", "0 to 1"),
    "eval/entropy": Metric("Mean entropy of the policy on the held-out responses", "nats"),
    "eval/invalid_count": Metric("Held-out responses whose score failed", "responses", "0"),
    "eval/part/<name>_mean": Metric("Mean held-out score of one named part of the reward graph", "reward"),
    "eval/part/<name>_std": Metric("Standard deviation of that part's held-out scores", "reward"),
    "eval/source/<name>_latency_p50_s": Metric("Median time of one scoring call of a leaf in the evaluation", "s"),
    "eval/source/<name>_latency_p95_s": Metric("95th percentile of that time", "s"),
    "eval/source/<name>_failed_count": Metric("Held-out responses that the leaf failed to score", "responses", "0"),
    "eval/source/<name>_truncated_count": Metric("Held-out responses that its max_tokens cut", "responses", "0"),
    "eval/source/<name>_score_mean": Metric("Mean of the leaf's own held-out scores", "score"),
    "eval/source/<name>_score_std": Metric("Standard deviation of the leaf's own held-out scores", "score"),
    # pref: preference optimisation and supervised fine-tuning
    "pref/accuracy": Metric(
        "Share of the step's pairs whose chosen response has the higher implicit reward", "0 to 1", "rises"
    ),
    "pref/accuracy_se": Metric("Its standard error, pairs of one prompt as one cluster", "0 to 1"),
    "pref/margin_mean": Metric("Mean implicit reward, chosen minus rejected", "reward units", "rises"),
    "pref/chosen_reward_mean": Metric("Mean implicit reward of chosen responses", "reward units"),
    "pref/rejected_reward_mean": Metric("Mean implicit reward of rejected responses", "reward units", "falls"),
    "pref/chosen_log_ratio_mean": Metric(
        "Drift of chosen responses from the reference, summed over a response", "nats", "not far below 0"
    ),
    "pref/rejected_log_ratio_mean": Metric("The same of rejected responses", "nats", "falls"),
    "pref/chosen_logprob_mean": Metric("Mean log-probability of a chosen response's tokens", "nats"),
    "pref/rejected_logprob_mean": Metric("The same of rejected responses", "nats"),
    "pref/chosen_length_mean": Metric("Mean length of chosen responses", "tokens"),
    "pref/rejected_length_mean": Metric("Mean length of rejected responses", "tokens"),
    "pref/nll_mean": Metric("Mean negative log-probability of a response token", "nats"),
    "pref/pairs_count": Metric("Pairs trained on", "pairs"),
    "pref/ties_count": Metric("Comparisons left out because the scores, or the responses, are equal", "pairs"),
    "pref/unpaired_prompts_count": Metric("Prompts none of whose responses could be compared", "prompts", "few"),
    "pref/left_out_prompts_count": Metric(
        "Training prompts without anything that the loss learns from (ties, judgements of another kind)",
        "prompts",
        "few",
    ),
    "pref/truncated_count": Metric("Prompts or responses of the step cut to data.max_tokens", "texts", "0"),
    "pref/response_cut_count": Metric("Those of them whose response, and not only the prompt, was cut", "texts", "0"),
    "pref/num_tokens": Metric("Tokens of the step", "tokens"),
    # pref_eval: the policy on held-out judgements
    "pref_eval/accuracy": Metric(
        "Share of the held-out pairs whose chosen response has the higher implicit reward", "0 to 1", "rises"
    ),
    "pref_eval/accuracy_se": Metric("Its standard error, pairs of one prompt as one cluster", "0 to 1"),
    "pref_eval/margin_mean": Metric("Mean implicit reward, chosen minus rejected", "reward units", "rises"),
    "pref_eval/chosen_reward_mean": Metric("Mean implicit reward of chosen responses", "reward units"),
    "pref_eval/rejected_reward_mean": Metric("Mean implicit reward of rejected responses", "reward units", "falls"),
    "pref_eval/chosen_log_ratio_mean": Metric(
        "Drift of chosen responses from the reference, summed over a response", "nats", "not far below 0"
    ),
    "pref_eval/rejected_log_ratio_mean": Metric("The same of rejected responses", "nats", "falls"),
    "pref_eval/chosen_logprob_mean": Metric("Mean log-probability of a chosen response's tokens", "nats"),
    "pref_eval/rejected_logprob_mean": Metric("The same of rejected responses", "nats"),
    "pref_eval/chosen_length_mean": Metric("Mean length of chosen responses", "tokens"),
    "pref_eval/rejected_length_mean": Metric("Mean length of rejected responses", "tokens"),
    "pref_eval/nll_mean": Metric("Mean negative log-probability of a response token", "nats"),
    "pref_eval/shared_prompts_count": Metric("Held-out prompts that are in the training part too", "prompts", "0"),
    "pref_eval/shared_responses_count": Metric(
        "Different held-out texts that are in the training part too", "texts", "0"
    ),
    # rm: training a reward model
    "rm/loss": Metric("Loss of the optimizer step", "loss", "falls"),
    "rm/accuracy": Metric("Share of the step's pairs in which the chosen response scores higher", "0 to 1", "rises"),
    "rm/gap_mean": Metric("Mean score of chosen minus rejected", "score", "above 0"),
    "rm/score_mean": Metric("Mean score of the step's responses (over members or attributes too)", "score"),
    "rm/score_std": Metric("Standard deviation of those scores", "score", "steady"),
    "rm/grad_norm": Metric("Norm of the gradient before it is scaled down", "norm", "steady"),
    "rm/lr": Metric("Learning rate", "rate"),
    "rm/num_tokens": Metric("Tokens of the step's texts", "tokens"),
    "rm/tokens_per_s": Metric("Those tokens by the time of the step", "tokens/s"),
    "rm/truncated_count": Metric("Texts of the step that were longer than data.max_tokens", "texts", "0"),
    "rm/response_cut_count": Metric("Those of them whose response, and not only the prompt, was cut", "texts", "0"),
    "rm/steps_lost_count": Metric("Steps of solutions whose end was cut off: their labels are not used", "steps", "0"),
    # rm_eval: the reward model on held-out judgements
    "rm_eval/shared_prompts_count": Metric("Held-out prompts that are in the training part too", "prompts", "0"),
    "rm_eval/shared_responses_count": Metric(
        "Different held-out texts that are in the training part too", "texts", "0"
    ),
    "rm_eval/loss": Metric("Loss on the held-out judgements", "loss", "falls with rm/loss"),
    "rm_eval/accuracy": Metric(
        "Share of held-out pairs ranked as the raters did; a tie counts half", "0 to 1", "rises"
    ),
    "rm_eval/accuracy_se": Metric("Its standard error, pairs of one prompt as one cluster", "0 to 1"),
    "rm_eval/ece": Metric(
        "Expected calibration error: |share of raters who agree - sigmoid(|gap|)| over bins, weighted",
        "0 to 1",
        "below 0.1",
    ),
    "rm_eval/length_correlation": Metric(
        "Spearman correlation of score and length in words, within prompts", "-1 to 1", "as in the data"
    ),
    "rm_eval/score_mean": Metric("Mean held-out score", "score"),
    "rm_eval/score_std": Metric("Standard deviation of the held-out scores", "score"),
    "rm_eval/pearson": Metric(
        "Pearson correlation with the raters' scores; mean over the attributes that vary", "-1 to 1", "rises"
    ),
    "rm_eval/spearman": Metric(
        "Spearman correlation with the raters' scores; mean over the attributes that vary", "-1 to 1", "rises"
    ),
    "rm_eval/ranking_spearman": Metric("Spearman correlation with the raters' ranking, mean over prompts", "-1 to 1"),
    "rm_eval/disagreement_mean": Metric(
        "Standard deviation over ensemble members (each standardised), mean over responses", "standard deviations"
    ),
    "rm_eval/member/<name>_accuracy": Metric("Accuracy of one member of an ensemble", "0 to 1"),
    "rm_eval/member/<name>_ece": Metric("Expected calibration error of that member", "0 to 1", "below 0.1"),
    "rm_eval/member/<name>_length_correlation": Metric(
        "Spearman correlation of that member's score and length in words, within prompts", "-1 to 1", "as in the data"
    ),
    "rm_eval/member/<name>_disagreement": Metric(
        "Mean distance of that member's score from the mean of the others (each standardised)",
        "standard deviations",
        "alike in all members",
    ),
    "rm_eval/member/<name>_spearman": Metric(
        "Spearman correlation of that member with the raters' scores (loss mse)", "-1 to 1", "rises"
    ),
    "rm_eval/subset/<name>_accuracy": Metric("Accuracy on one subset (data.subset_key)", "0 to 1"),
    "rm_eval/attribute/<name>_spearman": Metric("Spearman correlation of one attribute", "-1 to 1"),
    "rm_eval/step_accuracy": Metric("Share of labelled steps judged as the raters did", "0 to 1", "above the majority"),
    "rm_eval/first_error_f1": Metric(
        "ProcessBench's F1 of finding the first wrong step, and of finding none (2412.06559), on labelled steps",
        "0 to 1",
    ),
    "rm_eval/truncated_count": Metric("Held-out texts that were longer than data.max_tokens", "texts", "0"),
    "rm_eval/response_cut_count": Metric("Those of them whose response was cut", "texts", "0"),
    "rm_eval/steps_lost_count": Metric("Steps of held-out solutions whose end was cut off", "steps", "0"),
    # tracking
    "tracking/wandb_errors": Metric("Calls to Weights & Biases that failed so far; the run goes on", "calls", "0"),
}
"""Metrics by key. `<name>` stands for the name of a part of the reward graph; nested names are joined by `/`."""

HISTOGRAMS: dict[str, Metric] = {
    "reward/score": Metric("Scores of the valid responses", "reward"),
    "rollout/response_length": Metric("Response lengths", "tokens"),
}
"""Distributions by key; `metrics.jsonl` gets their quantiles as KEY_p05, KEY_p50 and KEY_p95."""

SUMMARY: dict[str, Metric] = {
    "eval/score_first": Metric("Mean score on the held-out prompts before training", "reward"),
    "eval/score_last": Metric("Mean score on the held-out prompts at the last evaluation", "reward", "above the first"),
    "rm_eval/loss_first": Metric("Held-out loss of a reward model before training", "loss"),
    "rm_eval/loss_last": Metric("Held-out loss of a reward model at the last evaluation", "loss", "below the first"),
}
"""Numbers of the whole run, by key: the fields of `summary.json` and of W&B's summary."""

QUANTILES = {"p05": 0.05, "p50": 0.50, "p95": 0.95}
PART_NAME = "[a-z0-9_/]+"
PATTERNS = [re.compile(re.escape(key).replace("<name>", PART_NAME)) for key in METRICS if "<name>" in key]


def is_metric(key: str) -> bool:
    """Whether the catalogue has `key`, literally or by a `<name>` pattern."""
    return "<name>" not in key and (key in METRICS or any(pattern.fullmatch(key) for pattern in PATTERNS))


def require_metrics(keys: Iterable[str]) -> None:
    """ValueError for keys that the catalogue lacks, with the nearest ones that it has."""
    if unknown := [key for key in keys if not is_metric(key)]:
        raise ValueError("; ".join(unknown_key(key, METRICS) for key in unknown))


def require_histogram(key: str) -> None:
    """ValueError for a histogram that the catalogue lacks."""
    if key not in HISTOGRAMS:
        raise ValueError(unknown_key(key, HISTOGRAMS))


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is not in the catalogue."""
    nearest = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{key!r} is not in raylhf/tracking/catalogue.py{hint} (a new one needs a line there and in docs/metrics.md)"


def render_catalogue() -> str:
    """The catalogue as the Markdown tables of docs/metrics.md."""
    tables = [markdown_table(metrics) for metrics in (METRICS, HISTOGRAMS, SUMMARY)]
    return f"{tables[0]}\n\nHistograms:\n\n{tables[1]}\n\nSummary of the run:\n\n{tables[2]}\n"


def markdown_table(metrics: dict[str, Metric]) -> str:
    """One row a metric."""
    rows = [(f"`{key}`", *metric) for key, metric in metrics.items()]
    lines = [("key", "meaning", "unit", "healthy"), ("---", "---", "---", "---"), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

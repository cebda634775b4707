"""A rank of the learner that trains a reward model, as a plain class; the cluster makes it an actor."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from raylhf.config.reward_model import (
    EnsembleHead,
    MSELoss,
    MultiValueHead,
    ProcessLoss,
    RewardLoss,
    TokenAggregateLoss,
)
from raylhf.config.run import RewardModelRunConfig
from raylhf.learner.checkpoint import files_seen, load_engine, save_engine
from raylhf.learner.engine import (
    Rendezvous,
    build_engine,
    engine_settings,
    forget_peak_memory,
    gathered,
    partitioned_loading,
    peak_memory_gib,
)
from raylhf.learner.models import enable_checkpointing, require_packing
from raylhf.learner.reward_batch import (
    EncodedExample,
    Row,
    RowBatch,
    cut_counts,
    deal,
    encode_example,
    pack_rows,
)
from raylhf.learner.reward_report import ScoredExample, evaluation_report, reliability_lists
from raylhf.learner.reward_scorer import RowScorer, layout_of_rows
from raylhf.learner.reward_targets import TargetScale, target_scale
from raylhf.learner.reward_terms import loss_sum, num_units, require_units, response_scores
from raylhf.learner.reward_update import RewardUpdate
from raylhf.models.calibration import Calibration, template_hash, tokenizer_hash
from raylhf.models.load import load_model_config, load_tokenizer
from raylhf.models.packing import require_packable, use_segments
from raylhf.models.reward import build_reward_model, export_reward_model
from raylhf.models.reward_model import Aggregate
from raylhf.text.judgements import examples_digest, load_split


class RewardLearnerWorker:
    """One data-parallel rank. Every public method after `start` is collective: call it on all ranks.

    Each rank reads all judgements, which are small beside the model; which part of a step it works on is a pure
    function of them.
    """

    def __init__(self, config: RewardModelRunConfig, folder: str, *, rank: int) -> None:
        self._config = config
        self._folder = folder
        self._rank = rank
        self._device = torch.device("cuda" if config.learner.num_gpus > 0 else "cpu")
        self._rendezvous = Rendezvous(config, rank=rank)
        self._step = 0
        self._train: list[EncodedExample]
        self._held_out: list[EncodedExample]
        self._scale: TargetScale | None
        self._engine: Any
        self._score: RowScorer
        self._updates: RewardUpdate

    # --- life -------------------------------------------------------------------------------------------------------

    def open_rendezvous(self) -> int:
        """On rank 0: host the learners' rendezvous and return its port."""
        return self._rendezvous.open()

    def start(self, host: str, port: int) -> None:
        """Read the judgements, join the other ranks, build the model.

        Raises:
            ValueError: the judgements are malformed, hold nothing for the loss, or are not the same on every rank.
        """
        config, learner = self._config, self._config.learner
        digest = self._read()
        self._rendezvous.join(host, port)
        require_same_data(digest)
        self._engine = build_reward_engine(config, self._folder, self._device)
        encoded = [*self._train, *self._held_out]
        num_tokens = sum(example.num_tokens for example in encoded)
        self._score = RowScorer(
            self._engine,
            layout_of_rows(config, self._engine.module),
            device=self._device,
            num_tokens=num_tokens,
            zero_stage=learner.zero_stage,
        )
        if self._score.layout.is_packed:
            rows = [row for example in encoded[:2] for row in example.rows[:2]]
            require_packing(self._score.packing_error(rows), config.model.dtype)
        num_steps = config.total_steps(len(self._train))
        self._updates = RewardUpdate(
            config,
            self._engine,
            self._score,
            self._train,
            self._scale,
            rank=self._rank,
            num_steps=num_steps,
            device=self._device,
        )
        forget_peak_memory(self._device)

    def _read(self) -> str:
        """Read and encode all judgements; returns their digest."""
        config = self._config
        split = load_split(config.data, config.objective.head, seed=config.seed)
        self._tokenizer = load_tokenizer(self._folder, trust_remote_code=config.model.trust_remote_code)
        self._train, self._held_out = (
            [encode_example(self._tokenizer, example, max_tokens=config.data.max_tokens) for example in examples]
            for examples in (split.train, split.held_out)
        )
        loss = config.objective.loss
        require_units(self._train, loss, part="training")
        if self._held_out:
            require_units(self._held_out, loss, part="held-out")
        names = self._attributes or ("score",)
        self._scale = target_scale(split.train, names, loss) if isinstance(loss, MSELoss) else None
        return examples_digest([*split.train, *split.held_out])

    def close(self) -> None:
        """Leave the group."""
        self._rendezvous.leave()

    # --- training ---------------------------------------------------------------------------------------------------

    def update(self, step: int) -> dict[str, float]:
        """Optimizer step number `step` (from 0), on the examples that belong to it; returns global metrics.

        Raises:
            RuntimeError: loss or gradient are not finite.
        """
        metrics = self._updates.run(step)
        for key in ("rm/loss", "rm/grad_norm"):
            if not math.isfinite(metrics[key]):
                raise RuntimeError(
                    f"{key} is {metrics[key]} in step {step + 1}: training has diverged. Go back to the last "
                    "checkpoint with a lower learner.lr"
                )
        self._step = step + 1
        return metrics | {"memory/learner_peak_gib": peak_memory_gib(self._device)}

    def evaluate(self) -> dict[str, Any]:
        """Scores of the held-out responses against their judgements.

        Rank 0 gets `metrics`, `samples` and `reliability` (plain lists); the others, and all ranks where nothing is
        held out, an empty dictionary.
        """
        if not self._held_out:
            return {}
        scores = self._score_all(self._held_out)
        if scores is None:
            return {}
        objective, evaluation = self._config.objective, self._config.evaluation
        batch = RowBatch(tuple(self._held_out), torch.device("cpu"))
        scored = scored_examples(batch, scores, self._config)
        report = evaluation_report(
            scored,
            loss=objective.loss,
            members=self._num_members,
            attributes=self._attributes,
            num_bins=evaluation.num_bins,
        )
        units = sum(num_units(encoded, objective.loss) for encoded in self._held_out)
        total = loss_sum(batch, scores, loss=objective.loss, scale=self._scale, by_member=self._num_members > 0)
        loss = {"rm_eval/loss": total.item() / units / max(self._num_members, 1)}
        cuts = {f"rm_eval/{key}": count for key, count in cut_counts(batch.rows).items()}
        return {
            "metrics": loss | report.metrics | cuts,
            "samples": [sample_of(s) for s in scored[: evaluation.num_samples]],
            "reliability": reliability_lists(report.reliability),
        }

    @torch.no_grad()
    def _score_all(self, examples: Sequence[EncodedExample]) -> Tensor | None:
        """Scores of all rows of `examples`, in order, [R, H] or [R, longest] on rank 0; None on the others."""
        rows = RowBatch(tuple(examples), self._device).rows
        shares = deal([len(row.ids) for row in rows], self._config.learner.num_ranks)
        packs = [pack_rows([rows[i] for i in share], self._score.layout) for share in shares]
        own, found = shares[self._rank], {}
        for number in range(max(len(part) for part in packs)):
            pack = packs[self._rank][number] if number < len(packs[self._rank]) else []
            positions = [own[i] for i in pack]
            scored = self._score([rows[i] for i in positions] or [rows[0]])
            found |= {position: scored[i].cpu() for i, position in enumerate(positions)}
        gathered_scores: list[Any] | None = [None] * len(shares) if self._rank == 0 else None
        dist.gather_object(found, gathered_scores, dst=0)
        if gathered_scores is None:
            return None
        by_position = {position: row for part in gathered_scores for position, row in part.items()}
        return pad_sequence([by_position[i] for i in range(len(rows))], batch_first=True)

    @property
    def _attributes(self) -> tuple[str, ...]:
        head = self._config.objective.head
        return head.attributes if isinstance(head, MultiValueHead) else ()

    @property
    def _num_members(self) -> int:
        head = self._config.objective.head
        return head.members if isinstance(head, EnsembleHead) else 0

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> list[str]:
        """Write this rank's share of a checkpoint; returns the files that it sees there afterwards."""
        save_engine(Path(folder) / "reward_model", self._engine, {"step": self._step})
        return files_seen(Path(folder))

    def load(self, folder: str) -> int:
        """Continue from a checkpoint of any shape (ranks, ZeRO stage); returns the number of steps it has taken."""
        self._step = load_engine(Path(folder) / "reward_model", self._engine)["step"]
        return self._step

    def export(self, folder: str) -> None:
        """Write model, tokenizer and calibration as a Hugging Face folder (rank 0 writes, all ranks gather).

        The calibration is that of the held-out responses, or of the training responses where nothing is held out.
        """
        judged = self._held_out or self._train
        scores = self._score_all(judged)
        state = self._full_state()
        if scores is not None:
            batch = RowBatch(tuple(judged), torch.device("cpu"))
            outputs = np.concatenate([s.outputs for s in scored_examples(batch, scores, self._config)])
            export_reward_model(
                self._engine.module,
                folder,
                state=state,
                tokenizer=self._tokenizer,
                calibration=self._calibration(outputs),
            )
        dist.barrier()

    def _full_state(self) -> dict[str, Tensor]:
        """All weights by checkpoint name, on rank 0."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._engine.module.hf.named_parameters():
            with gathered([parameter]):
                if self._rank == 0:
                    state[name] = parameter.detach().to("cpu", copy=True)
        return state

    def _calibration(self, outputs: np.ndarray) -> Calibration:
        """Of `outputs` [N, H]."""
        loss = self._config.objective.loss
        scale = self._scale if isinstance(loss, MSELoss) and loss.standardize else None
        copies = max(self._num_members, 1)  # members of an ensemble learn one target
        low, high = np.quantile(outputs, [0.01, 0.99], axis=0)
        return Calibration(
            n=len(outputs),
            mean=tuple(outputs.mean(axis=0).tolist()),
            std=tuple(outputs.std(axis=0).tolist()),
            q01=tuple(low.tolist()),
            q99=tuple(high.tolist()),
            tokenizer_hash=tokenizer_hash(self._tokenizer),
            template_hash=template_hash(self._tokenizer),
            target_mean=None if scale is None else tuple(scale.mean.tolist()) * copies,
            target_std=None if scale is None else tuple(scale.std.tolist()) * copies,
        )


def aggregate_of(loss: RewardLoss) -> Aggregate:
    """How token scores make the score of a response."""
    if isinstance(loss, ProcessLoss):
        return "steps"
    return loss.aggregate if isinstance(loss, TokenAggregateLoss) else "mean"


def build_reward_engine(config: RewardModelRunConfig, folder: str, device: torch.device) -> Any:
    """A DeepSpeed engine over the run's reward model."""
    learner, model_config = config.learner, config.model
    architecture = load_model_config(folder, trust_remote_code=model_config.trust_remote_code)
    settings = engine_settings(learner, use_bf16=model_config.dtype == "bfloat16", hidden_size=architecture.hidden_size)
    with partitioned_loading(settings):
        model = build_reward_model(
            folder,
            head=config.objective.head,
            dtype=getattr(torch, model_config.dtype),
            attention=model_config.attention,
            trust_remote_code=model_config.trust_remote_code,
            seed=config.seed,
            lora=learner.lora,
            trainable_layers=config.objective.trainable_layers,
            aggregate=aggregate_of(config.objective.loss),
        )
    if (layout := layout_of_rows(config, model)).is_packed:
        require_packable(architecture)
    if layout.knows_segments:
        use_segments(model.hf)
    model.train()  # dropout is off by construction; gradient checkpointing works in this mode only
    if learner.gradient_checkpointing:
        enable_checkpointing(model.hf)
    group = {"params": [p for p in model.parameters() if p.requires_grad]}
    return build_engine(model.to(device), [group], learner, settings)


def scored_examples(batch: RowBatch, scores: Tensor, config: RewardModelRunConfig) -> list[ScoredExample]:
    """The batch's examples, each with its part of `scores` [R, H] or [R, L]."""
    loss = config.objective.loss
    values = response_scores(batch, scores, loss=loss).double().numpy()
    outputs = values[:, None] if config.objective.head.kind == "token" else scores.double().numpy()
    scored = []
    for encoded, start in zip(batch.examples, batch.starts, strict=True):
        rows = slice(start, start + len(encoded.rows))
        probs: tuple[np.ndarray, ...] = ()
        if isinstance(loss, ProcessLoss):
            probs = tuple(_step_probs(row, scores[start + k]) for k, row in enumerate(encoded.rows))
        scored.append(ScoredExample(encoded.example, values[rows], outputs[rows], probs))
    return scored


def sample_of(scored: ScoredExample) -> dict[str, Any]:
    """One held-out prompt for the log of samples."""
    example = scored.example
    sample: dict[str, Any] = {
        "prompt": example.messages[-1]["content"] if example.messages else "",
        "responses": list(example.responses),
        "scores": scored.scores.tolist(),
        "pairs": [[pair.chosen, pair.rejected] for pair in example.pairs],
    }
    if example.targets is not None:
        sample["targets"] = [[None if np.isnan(x) else x for x in row] for row in example.targets.tolist()]
    if scored.step_probs:
        sample["step_probs"] = [[None if np.isnan(x) else x for x in probs.tolist()] for probs in scored.step_probs]
    return sample


def _step_probs(row: Row, scores: Tensor) -> np.ndarray:
    """Probability that each step is right, float64; NaN where it was cut off."""
    probs = scores.double().sigmoid().numpy()
    return np.where(row.step_tokens >= 0, probs[row.step_tokens], np.nan)


def require_same_data(digest: str) -> None:
    """ValueError if ranks have read different judgements (collective)."""
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        raise ValueError(
            "data.path holds different judgements on different learner ranks; put one copy where every node reads it"
        )

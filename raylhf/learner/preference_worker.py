"""A rank of the learner that trains a policy on stored judgements, as a plain class; the cluster makes it an actor."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raylhf.config.algorithms import LOSSES, Need
from raylhf.config.preference import PreferenceConfig, loss_of
from raylhf.config.preference_losses import TGDPOLoss
from raylhf.config.run import PreferenceRunConfig
from raylhf.learner.checkpoint import files_seen, load_learner, save_learner
from raylhf.learner.engine import Rendezvous, forget_peak_memory, peak_memory_gib
from raylhf.learner.microbatch import pad_rows
from raylhf.learner.models import LearnerModels, build_models
from raylhf.learner.preference_batch import PreferenceBatch
from raylhf.learner.preference_examples import PreferenceExample, assemble, encode_examples
from raylhf.learner.preference_metrics import declare, preference_metrics
from raylhf.learner.preference_update import Columns, PreferenceUpdate
from raylhf.learner.reward_batch import deal, draw
from raylhf.learner.reward_scorer import CACHE_LIMIT_BYTES
from raylhf.learner.reward_worker import require_same_data
from raylhf.learner.schedule import lr_scale
from raylhf.learner.totals import Totals
from raylhf.learner.weight_source import PolicyWeights
from raylhf.models.load import load_tokenizer
from raylhf.text.judgements import examples_digest, load_split
from raylhf.text.preference_data import newest_time, usable_parts

MOST_COLUMNS = 4
"""Numbers of a response token by models that are not trained: reference, guide, and T-REG's two."""


class PreferenceLearnerWorker:
    """One data-parallel rank. Every public method after `start` is collective: call it on all ranks.

    Each rank reads all judgements; which part of a step it works on is a pure function of them.
    """

    def __init__(self, config: PreferenceRunConfig, folder: str, guide_folder: str, *, rank: int) -> None:
        self._config = config
        self._folder = folder
        self._guide_folder = guide_folder
        self._rank = rank
        self._device = torch.device("cuda" if config.learner.num_gpus > 0 else "cpu")
        self._rendezvous = Rendezvous(config, rank=rank)
        self._step = 0
        self._train: list[PreferenceExample]
        self._held_out: list[PreferenceExample]
        self._now: float
        self._kept: dict[int, dict[str, list[np.ndarray]]] = {}
        """What frozen models say of examples of the training data, by column: [T] of each row."""
        self._models: LearnerModels
        self._update: PreferenceUpdate

    # --- life -------------------------------------------------------------------------------------------------------

    def open_rendezvous(self) -> int:
        """On rank 0: host the learners' rendezvous and return its port."""
        return self._rendezvous.open()

    def start(self, host: str, port: int) -> None:
        """Read the judgements, join the other ranks, build the models.

        Raises:
            ValueError: the judgements are malformed, hold nothing for the loss, or are not the same on every rank; or
                the model cannot be trained on packed sequences.
        """
        config, objective = self._config, self._config.objective
        digest = self._read()
        self._rendezvous.join(host, port)
        require_same_data(digest)
        loss, comparing = self._loss, objective if isinstance(objective, PreferenceConfig) else None
        self._models = build_models(
            config,
            self._folder,
            self._device,
            has_reference=comparing is not None and Need.REFERENCE in LOSSES[comparing.loss.kind].needs,
            moves_reference=comparing is not None and comparing.reference.every_steps > 0,
            has_guide=isinstance(loss, TGDPOLoss),
            second_folder=self._guide_folder,
            longest=config.data.max_tokens,
        )
        self._update = PreferenceUpdate(
            loss,
            self._models,
            seed=config.seed,
            device=self._device,
            max_tokens=config.data.max_tokens,
        )
        forget_peak_memory(self._device)

    def _read(self) -> str:
        """Read and encode all judgements; returns their digest."""
        config = self._config
        split = load_split(config.data, None, seed=config.seed)
        train, held_out = usable_parts(split, self._loss)
        self._now = newest_time(train)
        tokenizer = load_tokenizer(self._folder, trust_remote_code=config.model.trust_remote_code)
        self._train, self._held_out = (
            encode_examples(tokenizer, examples, self._loss, max_tokens=config.data.max_tokens)
            for examples in (train, held_out)
        )
        return examples_digest([*split.train, *split.held_out])

    @property
    def _loss(self) -> Any:
        return loss_of(self._config.objective)

    def close(self) -> None:
        """Leave the group."""
        self._rendezvous.leave()

    # --- training ---------------------------------------------------------------------------------------------------

    def update(self, step: int) -> dict[str, float]:
        """Optimizer step number `step` (from 0), on the examples that belong to it; returns global metrics.

        Raises:
            RuntimeError: loss or gradient are not finite.
        """
        started = time.perf_counter()
        drawn = self._drawn(step)
        examples = [self._train[i] for i in drawn]
        batch = self._share(examples)
        totals = Totals(self._device)
        declare(totals)
        columns = self._columns(batch, drawn)
        shared = self._update.prepare(batch, columns, step=step)
        lr = self._lr(step)
        norm = self._update.step(batch, columns, shared, totals, lrs=[lr])
        self._move_reference(step + 1)
        sums = totals.reduced()
        num_tokens = sum(example.num_tokens for example in examples)
        metrics = preference_metrics(sums, area="pref") | {
            "policy/loss": sums["loss"],
            "policy/grad_norm": norm,
            "policy/lr": lr,
            "pref/pairs_count": float(sum(len(example.pairs) for example in examples)),
            "pref/truncated_count": float(sum(row.is_truncated for e in examples for row in e.rows)),
            "pref/response_cut_count": float(sum(row.is_response_cut for e in examples for row in e.rows)),
            "pref/num_tokens": float(num_tokens),
            "learn/tokens_per_s": num_tokens / (time.perf_counter() - started),
            "memory/learner_peak_gib": peak_memory_gib(self._device),
        }
        for key in ("policy/loss", "policy/grad_norm"):
            if not math.isfinite(metrics[key]):
                raise RuntimeError(
                    f"{key} is {metrics[key]} in step {step + 1}: training has diverged. Go back to the last "
                    "checkpoint with a lower learner.lr"
                )
        self._step = step + 1
        return metrics

    def _drawn(self, step: int) -> list[int]:
        batch_size = self._config.objective.batch_size
        return draw(step, num_examples=len(self._train), batch_size=batch_size, seed=self._config.seed)

    def _columns(self, batch: PreferenceBatch, drawn: list[int]) -> Columns:
        """What the loss compares `batch`, this rank's share of the examples `drawn`, with.

        What frozen models say of an example is asked once: later passes over the data find it in host memory. It does
        not depend on the example's company, so that a resumed run, which has to ask again, gets it to the bit.
        """
        if not self._keeps_columns:
            return self._update.columns(batch)
        own = [drawn[place] for place in self._dealt([self._train[i] for i in drawn])]
        if all(i in self._kept for i in drawn):  # on every rank or on none
            rows = [self._kept[i] for i in own or drawn[:1]]
            known = {
                name: pad_rows([row for kept in rows for row in kept[name]], batch.width, self._device)
                for name in rows[0]
            }
            return self._update.columns(batch, known)
        columns = self._update.columns(batch, one_by_one=True)
        found = {name: table.cpu().numpy() for name, table in columns.items() if name != "old"}
        ends = np.cumsum([len(self._train[i].rows) for i in own])
        lengths = batch.lengths.tolist()
        mine = {
            i: {
                name: [table[r, : lengths[r]].copy() for r in range(end - len(self._train[i].rows), end)]
                for name, table in found.items()
            }
            for i, end in zip(own, ends.tolist(), strict=True)
        }
        everyones: list[Any] = [None] * self._config.learner.num_ranks
        dist.all_gather_object(everyones, mine)
        for part in everyones:
            self._kept |= part
        return columns

    @property
    def _keeps_columns(self) -> bool:
        """Whether examples come again and the models that they are compared with stay as they are."""
        objective = self._config.objective
        is_fixed = isinstance(objective, PreferenceConfig) and objective.reference.every_steps == 0
        num_bytes = 4 * MOST_COLUMNS * sum(len(row.response_ids) for e in self._train for row in e.rows)
        num_drawn = self._config.total_steps(len(self._train)) * objective.batch_size
        return is_fixed and num_bytes <= CACHE_LIMIT_BYTES and num_drawn > len(self._train) + objective.batch_size

    def _share(self, examples: list[PreferenceExample]) -> PreferenceBatch:
        """This rank's part of some examples; a rank without one gets an example that does not count."""
        own = self._own(examples)
        return assemble(own or examples[:1], self._loss, now=self._now, counts=bool(own))

    def _own(self, examples: list[PreferenceExample]) -> list[PreferenceExample]:
        return [examples[i] for i in self._dealt(examples)]

    def _dealt(self, examples: list[PreferenceExample]) -> list[int]:
        """Which of the examples are this rank's."""
        return deal([example.num_tokens for example in examples], self._config.learner.num_ranks)[self._rank]

    def _lr(self, step: int) -> float:
        learner, num_steps = self._config.learner, self._config.total_steps(len(self._train))
        return learner.lr * lr_scale(learner, steps_taken=step, share_done=step / num_steps)

    def _move_reference(self, steps_done: int) -> None:
        objective = self._config.objective
        if not isinstance(objective, PreferenceConfig) or objective.reference.every_steps == 0:
            return
        if steps_done % objective.reference.every_steps == 0:
            self._models.move_reference(objective.reference.mix)

    def evaluate(self) -> dict[str, Any]:
        """The held-out judgements under the present policy; `metrics` are equal on every rank, {} where none are."""
        if not self._held_out:
            return {}
        totals = Totals(self._device)
        declare(totals)
        batch = self._share(self._held_out)
        columns = self._update.columns(batch, with_policy=True)
        rewards = self._update.measure(batch, columns, totals).tolist()
        samples, first = [], 0
        for example in self._own(self._held_out)[: self._config.evaluation.num_samples]:
            own = rewards[first : first + len(example.rows)]
            samples.append({"prompt": example.prompt, "responses": list(example.texts), "implicit_rewards": own})
            first += len(example.rows)
        return {"metrics": preference_metrics(totals.reduced(), area="pref_eval"), "samples": samples}

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> list[str]:
        """Write this rank's share of a checkpoint; returns the files that it sees there afterwards."""
        save_learner(Path(folder), self._models, {"step": self._step, "loss": self._update.state_dict()})
        return files_seen(Path(folder))

    def load(self, folder: str) -> int:
        """Continue from a checkpoint of any shape (ranks, ZeRO stage); returns the number of steps it has taken."""
        state = load_learner(Path(folder), self._models)
        self._step = state["step"]
        self._update.load_state_dict(state["loss"])
        return self._step

    def export(self, folder: str) -> None:
        """Write the policy, adapters merged, as an ordinary Hugging Face folder (rank 0 writes, all ranks gather)."""
        trust = self._config.model.trust_remote_code
        tokenizer = load_tokenizer(self._folder, trust_remote_code=trust)
        PolicyWeights(self._models.policy.module.lm).export(folder, tokenizer, writes=self._rank == 0)

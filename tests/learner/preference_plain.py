"""Preference losses as plain loops over single responses, for the tests that hold the learner to them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoTokenizer


class Side:
    """One response to one prompt under the policy and the models that it is compared with."""

    def __init__(self, learner: "PlainLearner", prompt: str, text: str, *, prefix: str = "", ends: bool = True) -> None:
        self.prompt_ids = learner.prompt_ids(prompt) + learner.tokenizer.encode(prefix)
        self.response_ids = learner.tokenizer.encode(text) + [learner.tokenizer.eos_token_id] * ends
        self.length = len(self.response_ids)
        log_policy, self.embedded = learner.log_policy(learner.model, self.prompt_ids, self.response_ids)
        self.logprobs = self.own(log_policy)
        self.sum, self.mean = self.logprobs.sum(), self.logprobs.mean()
        with torch.no_grad():
            log_reference, _ = learner.log_policy(learner.reference, self.prompt_ids, self.response_ids)
            log_guide, _ = learner.log_policy(learner.guide, self.prompt_ids, self.response_ids)
        self.reference, self.guide = self.own(log_reference), self.own(log_guide)
        self.kl = (log_reference.exp() * (log_reference - log_policy)).sum()
        self.ratios = self.logprobs - self.reference
        self.rho = self.ratios.sum()

    def own(self, log_policy: Tensor) -> Tensor:
        """Of the response's own tokens."""
        return torch.stack([log_policy[t, token] for t, token in enumerate(self.response_ids)])


class PlainLearner:
    """A policy with AdamW, its reference and guide, and the judgements of a file, all in one batch."""

    def __init__(self, config: Any, models: dict[str, str], *, file: Path) -> None:
        self.config = config
        self.kind = config.objective.kind if config.objective.kind == "sft" else config.objective.loss.kind
        self.loss: Any = getattr(config.objective, "loss", None)
        attention = config.model.attention
        self.tokenizer = AutoTokenizer.from_pretrained(models["start"])
        self.model, self.reference, self.guide = (
            AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32, attn_implementation=attention)
            for name in ("start", "reference", "guide")
        )
        self.start = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.rows = [json.loads(line) for line in file.read_text().splitlines()]
        settings = config.learner
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.lr,
            betas=settings.adam_betas,
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
        )
        self.ema = Averages()
        self.raw = torch.zeros(len(self.rows), 2, requires_grad=True)
        self.offset_optimizer = torch.optim.Adam([self.raw], lr=getattr(self.loss, "offset_lr", 0.0))

    def update(self, step: int) -> float:
        """One step on everything; returns the loss."""
        loss = BATCHES.get(self.kind, mean_over_pairs)(self, step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.learner.max_grad_norm)
        self.optimizer.step()
        return loss.item()

    def prompt_ids(self, prompt: str) -> list[int]:
        """The one turn in the chat template, with the beginning of the answer."""
        turns = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text)

    def log_policy(self, model: Any, prompt_ids: list[int], response_ids: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [T, V] of every token at each place of the response, and the embedded input."""
        tokens = torch.tensor([prompt_ids + response_ids])
        embedded = model.get_input_embeddings()(tokens)
        logits = model(inputs_embeds=embedded).logits[0]
        return logits[len(prompt_ids) - 1 : -1].log_softmax(-1), embedded

    def comparisons(self) -> list[tuple[Side, Side, dict[str, Any]]]:
        """(chosen, rejected, row) of everything that the file compares."""
        found = []
        for row in self.rows:
            if "chosen" in row:
                made = (
                    first_step(self, row)
                    if self.kind == "step_dpo"
                    else [Side(self, row["prompt"], row[side]) for side in ("chosen", "rejected")]
                )
                found.append((*made, row))
                continue
            texts = row["responses"]
            places = [math.inf if p is None else p for p in row.get("ranks", range(len(texts)))]
            sides = [Side(self, row["prompt"], text) for text in texts]
            pairs = [(a, b) for a, b in np.ndindex(len(texts), len(texts)) if places[a] < places[b]]
            found += [(sides[a], sides[b], row) for a, b in pairs]
        return found


class Averages:
    """Moving averages over what was seen so far: the n-th of them weighs decay^(age)."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def with_batch(self, values: Tensor, decay: float) -> tuple[float, float]:
        """(mean, standard deviation) after one more batch."""
        self.seen.append((values.mean().item(), values.std(correction=0).item()))
        weights = [decay**age for age in range(len(self.seen))][::-1]
        mean, std = np.average(self.seen, axis=0, weights=weights)
        return float(mean), float(std)


def first_step(learner: PlainLearner, row: dict[str, Any]) -> list[Side]:
    """The first step in which the two solutions differ, behind those that they share."""
    steps = {side: [s + "\n\n" for s in row[side].split("\n\n")] for side in ("chosen", "rejected")}
    for own in steps.values():
        own[-1] = own[-1].removesuffix("\n\n")
    first = next(i for i, (a, b) in enumerate(zip(*steps.values(), strict=False)) if a != b)
    return [
        Side(learner, row["prompt"], own[first], prefix="".join(own[:first]), ends=first == len(own) - 1)
        for own in steps.values()
    ]


# --- one loss a pair --------------------------------------------------------------------------------------------------


def nll_of_order(z: Tensor) -> Tensor:
    """-log sigmoid(z)."""
    return softplus(-z)


def dpo(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    return nll_of_order(c.beta * (won.rho - lost.rho))


def cdpo(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    wrong, z = 1 - row["agreement"] if "agreement" in row else c.label_smoothing, c.beta * (won.rho - lost.rho)
    return (1 - wrong) * nll_of_order(z) + wrong * nll_of_order(-z)


def robust_dpo(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    noise, z = c.label_noise, c.beta * (won.rho - lost.rho)
    return ((1 - noise) * nll_of_order(z) - noise * nll_of_order(-z)) / (1 - 2 * noise)


def ipo(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    return (won.rho / won.length - lost.rho / lost.length - 1 / (2 * c.beta)) ** 2


def simpo(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    return nll_of_order(c.beta * (won.mean - lost.mean) - c.gamma)


def orpo(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    odds = [side.mean - torch.log(1 - side.mean.exp()) for side in (won, lost)]
    return -won.mean + c.odds_coef * nll_of_order(odds[0] - odds[1])


def tdpo1(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    return nll_of_order(c.beta * ((won.rho - lost.rho) - (lost.kl - won.kl)))


def tdpo2(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    return nll_of_order(c.beta * ((won.rho - lost.rho) - c.alpha * (lost.kl - won.kl.detach())))


def tgdpo(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    def weighed(side: Side, sign: int) -> Tensor:
        tilts = [1 + sign * c.alpha * c.beta * (g - r) for g, r in zip(side.guide, side.reference, strict=True)]
        return sum((max(t.item(), 0.0) * ratio for t, ratio in zip(tilts, side.ratios, strict=True)), torch.zeros(()))

    return nll_of_order(c.beta * (weighed(won, 1) - weighed(lost, -1)))


def modpo(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    gaps = {name: row["chosen_rewards"][name] - row["rejected_rewards"][name] for name in c.other_weights}
    margin = sum(weight * gaps[name] for name, weight in c.other_weights.items())
    return nll_of_order((c.beta * (won.rho - lost.rho) - margin) / c.weight)


def ns_dpo(c: Any, won: Side, lost: Side, row: Any) -> Tensor:
    return c.gamma ** (2.5 - row["time"]) * dpo(c, won, lost, row)  # the newest row's time is 2.5


PAIR_LOSSES: dict[str, Callable[[Any, Side, Side, Any], Tensor]] = {
    "dpo": dpo,
    "step_dpo": dpo,
    "cdpo": cdpo,
    "robust_dpo": robust_dpo,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
    "tdpo1": tdpo1,
    "tdpo2": tdpo2,
    "tgdpo": tgdpo,
    "modpo": modpo,
    "ns_dpo": ns_dpo,
}


def mean_over_pairs(learner: PlainLearner, step: int) -> Tensor:
    one = PAIR_LOSSES[learner.kind]
    return torch.stack([one(learner.loss, *pair) for pair in learner.comparisons()]).mean()


# --- losses of a whole batch ------------------------------------------------------------------------------------------


def t_reg(learner: PlainLearner, step: int) -> Tensor:
    c, total = learner.loss, torch.zeros(())
    pairs = learner.comparisons()
    for won, lost, row in pairs:
        terms = []
        for side in (won, lost):
            with torch.no_grad():
                better, worse = (
                    side.own(
                        learner.log_policy(
                            learner.reference, learner.prompt_ids(f"{asked}\n\n{row['prompt']}"), side.response_ids
                        )[0]
                    )
                    for asked in (c.better, c.worse)
                )
            token_rewards = (better - worse).sigmoid() - 0.5
            terms.append(-(c.beta * token_rewards * side.logprobs).sum())
        weight = torch.sigmoid(c.beta * (lost.rho - won.rho)).detach()
        total = total + nll_of_order(c.beta * (won.rho - lost.rho)) + c.alpha * weight * (terms[0] + terms[1])
    return total / len(pairs)


def wdpo(learner: PlainLearner, step: int) -> Tensor:
    total, pairs = torch.zeros(()), learner.comparisons()
    for won, lost, row in pairs:
        loss = dpo(learner.loss, won, lost, row)
        slopes = torch.autograd.grad(loss, [won.embedded, lost.embedded], create_graph=True)
        total = total + loss + learner.loss.rho * sum((s**2).sum() for s in slopes)
    return total / len(pairs)


def weighted(sign: int) -> Callable[[PlainLearner, int], Tensor]:
    def loss(learner: PlainLearner, step: int) -> Tensor:
        losses = [dpo(learner.loss, *pair) for pair in learner.comparisons()]
        exps = [math.exp(sign * loss.item() / learner.loss.temperature) for loss in losses]
        return sum((e / sum(exps) * loss for e, loss in zip(exps, losses, strict=True)), torch.zeros(()))

    return loss


def beta_dpo(learner: PlainLearner, step: int) -> Tensor:
    c, pairs = learner.loss, learner.comparisons()
    prompts = list(dict.fromkeys(row["prompt"] for row in learner.rows))
    order = [prompts[i] for i in np.random.default_rng((learner.config.seed, step)).permutation(len(prompts))]
    pairs.sort(key=lambda pair: order.index(pair[2]["prompt"]))  # the order of the batch decides the draw
    gaps = torch.stack([won.rho - lost.rho for won, lost, _ in pairs])
    center, spread = learner.ema.with_batch(gaps.detach(), c.decay)
    log_weights = -((gaps.detach().double().numpy() - center) ** 2) / 2 / (spread**2 + 1e-8)
    seed = int(np.random.SeedSequence((learner.config.seed, step)).generate_state(1)[0])
    keys = log_weights + np.random.default_rng(seed).gumbel(size=len(pairs))
    kept = sorted(range(len(pairs)), key=lambda i: -keys[i])[: math.floor((1 - c.filter_share) * len(pairs))]
    beta = max(c.beta * (1 + c.sensitivity * (gaps[kept].mean().item() - center)), 1e-3)
    return nll_of_order(beta * gaps[kept]).mean()


def alpha_dpo(learner: PlainLearner, step: int) -> Tensor:
    c, pairs = learner.loss, learner.comparisons()
    means = torch.stack([won.mean - lost.mean for won, lost, _ in pairs])
    gaps = torch.stack([won.rho / won.length - lost.rho / lost.length for won, lost, _ in pairs]).detach()
    center, spread = learner.ema.with_batch(gaps, c.decay)
    margins = c.gamma_ratio + c.alpha * (gaps - center) / math.sqrt(spread**2 + 1e-8)
    return nll_of_order(c.beta * (means - margins)).mean()


def aux_dpo(learner: PlainLearner, step: int) -> Tensor:
    c, pairs = learner.loss, learner.comparisons()
    offsets = c.bound * learner.raw.tanh()
    used = offsets.detach().clone()
    losses = [
        nll_of_order(c.beta * (won.rho.detach() - lost.rho.detach() + offsets[i, 0] - offsets[i, 1]))
        for i, (won, lost, _) in enumerate(pairs)
    ]
    last_layer = list(learner.reference.model.layers[-1].parameters())
    expressible = [torch.zeros_like(p) for p in last_layer]
    for i, pair in enumerate(pairs):
        for j, side in enumerate(pair[:2]):
            log_reference, _ = learner.log_policy(learner.reference, side.prompt_ids, side.response_ids)
            slopes = torch.autograd.grad(side.own(log_reference).sum(), last_layer)
            expressible = [e + offsets[i, j] * s for e, s in zip(expressible, slopes, strict=True)]
    norm = sum((e**2).sum() for e in expressible)
    learner.offset_optimizer.zero_grad()
    (torch.stack(losses).mean() + c.null_coef * norm - c.amplitude_coef * (offsets**2).mean()).backward()
    learner.offset_optimizer.step()
    return torch.stack(
        [
            nll_of_order(c.beta * (won.rho - lost.rho + used[i, 0] - used[i, 1]))
            for i, (won, lost, _) in enumerate(pairs)
        ]
    ).mean()


def kto(learner: PlainLearner, step: int) -> Tensor:
    """Of two prompts: the response of one behind the other is the only mismatch there is."""
    c, wins, judged = learner.loss, {}, {}
    for row in learner.rows:
        if "chosen" in row:
            for side, value in (("chosen", 1), ("rejected", -1)):
                key = row["prompt"], row[side]
                wins[key] = wins.get(key, 0) + value
            judged = {key: value > 0 for key, value in wins.items() if value}
        else:
            scored = zip(row["responses"], row["scores"], strict=True)
            judged |= {(row["prompt"], text): s and s >= c.good_from for text, s in scored if s is not None}
    first, second = dict.fromkeys(row["prompt"] for row in learner.rows)
    texts = wins or {(row["prompt"], text): 0 for row in learner.rows for text in row["responses"]}
    with torch.no_grad():
        mismatched = [Side(learner, second if prompt == first else first, text).rho for prompt, text in texts]
    z = max(0.0, torch.stack(mismatched).mean().item())
    assert z > 0.02  # the data is such that the reference point matters
    total = torch.zeros(())
    for (prompt, text), is_good in judged.items():
        rho = Side(learner, prompt, text).rho
        sign, weight = (1, c.desirable_weight) if is_good else (-1, c.undesirable_weight)
        total = total + weight * (1 - torch.sigmoid(sign * c.beta * (rho - z)))
    return total / len(judged)


def plackett_luce(learner: PlainLearner, step: int) -> Tensor:
    """Choice after choice; of d that tie, the l-th choice has their mean as numerator and each as 1 - l/d of itself."""
    c, total, num_rankings = learner.loss, torch.zeros(()), 0
    for row in learner.rows:
        places = row.get("ranks", [1 + i for i in range(len(row["responses"]))])
        if "scores" in row:
            kept = sorted({s for s in row["scores"] if s is not None}, reverse=True)
            places = [None if s is None else 1 + kept.index(s) for s in row["scores"]]
        values = [c.beta * Side(learner, row["prompt"], text).rho for text in row["responses"]]
        if "scores" in row:  # without a score, a response is not in the ranking
            values = [v for v, place in zip(values, places, strict=True) if place is not None]
            places = [place for place in places if place is not None]
        for place in sorted({p for p in places if p is not None}):
            tied = [v for v, p in zip(values, places, strict=True) if p == place]
            below = [v.exp() for v, p in zip(values, places, strict=True) if p is None or p > place]
            for n in range(len(tied)):
                if len(tied) - n + len(below) < 2:
                    continue
                left = sum(below, torch.zeros(())) + sum((1 - n / len(tied)) * v.exp() for v in tied)
                total = total + torch.log(left) - sum(tied, torch.zeros(())) / len(tied)
        num_rankings += 1
    return total / num_rankings


def sft(learner: PlainLearner, step: int) -> Tensor:
    rejected = {(row["prompt"], row["rejected"]) for row in learner.rows if "rejected" in row}
    texts = dict.fromkeys((row["prompt"], row.get("response", row.get("chosen"))) for row in learner.rows)
    sides = [Side(learner, *key) for key in texts if key not in rejected]
    return -sum((side.sum for side in sides), torch.zeros(())) / sum(side.length for side in sides)


BATCHES: dict[str, Callable[[PlainLearner, int], Tensor]] = {
    "t_reg": t_reg,
    "wdpo": wdpo,
    "kldpo": weighted(1),
    "dr_dpo": weighted(-1),
    "beta_dpo": beta_dpo,
    "alpha_dpo": alpha_dpo,
    "aux_dpo": aux_dpo,
    "kto": kto,
    "plackett_luce": plackett_luce,
    "sft": sft,
}

"""A rollout worker on a real vLLM engine with a tiny model. One engine serves the whole module, in order."""

import asyncio
import copy
import threading
from collections.abc import Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from raylhf.batch import Prompt
from raylhf.config import RunConfig
from raylhf.models.low_rank import with_update
from raylhf.models.tiny import write_tiny_model
from raylhf.rollout.gloo_stream import TransferGroup
from raylhf.rollout.orphans import descendants
from raylhf.rollout.weight_sender import open_sender
from raylhf.rollout.worker import RolloutWorker

TEMPERATURE = 0.7
WAIT_S = 120.0
SHORT = Prompt(index=0, messages=({"role": "user", "content": "hello"},))
LONG = Prompt(
    index=1, messages=({"role": "user", "content": "one hundred and fifty bytes " * 6},)
)  # has a cached block


def make_config() -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "rollout-test",
            "num_steps": 1,
            "model": {"path": "tiny"},
            "data": {"path": "unused.jsonl", "max_prompt_tokens": 256},
            "rollout": {
                "prompts_per_step": 2,
                "threads": 1,
                "kv_cache_gib": 0.125,
                "sampling": {"temperature": TEMPERATURE, "max_response_tokens": 64},
            },
            "reward": {"graph": {"kind": "characters", "characters": "a"}},
            "cluster": {"start_timeout_s": WAIT_S, "step_timeout_s": WAIT_S},
        }
    )


class Harness:
    """The worker on an event loop of its own thread, and a learner's model with its sender."""

    def __init__(self, folder: str, other_folder: str) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.models = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (folder, other_folder)
        ]
        self.weights: Any = self.models[0]
        self.version = 0
        self.worker = RolloutWorker(make_config(), folder, replica=0)
        self.started = self.call(self.worker.start())
        self.sender = open_sender(
            "gloo", source=self, rank=0, world_size_of_rollout=1, host="127.0.0.1", timeout_s=WAIT_S
        )
        joined = self.submit(self.worker.join_transfer(self.sender.prepare(), place=0))
        self.sender.connect()
        joined.result(WAIT_S)

    def metadata(self) -> list[Any]:
        named = self.weights.named_parameters()
        return [SimpleNamespace(name=name, dtype=p.dtype, shape=tuple(p.shape)) for name, p in named]

    def __iter__(self):
        return iter(self.weights.named_parameters())

    def submit(self, coroutine: Coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine) -> Any:
        return self.submit(coroutine).result(WAIT_S)

    def generate(self, prompt: Prompt, num_responses: int, seed: int):
        return self.call(self.worker.generate(prompt, num_responses=num_responses, seed=seed))[0]

    def publish(self, model: Any) -> int:
        self.weights, self.version = model, self.version + 1
        update = self.submit(self.worker.update_weights(self.sender.update_info(), policy_version=self.version))
        self.sender.send()
        return update.result(WAIT_S)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folders = [write_tiny_model(tmp_path_factory.mktemp("model") / str(seed), seed=seed) for seed in (0, 1)]
    made = Harness(*folders)
    yield made
    made.call(made.worker.close())


def same(one, other) -> bool:
    """Whether two rollouts are equal to the bit."""
    pairs = list(zip(one.response_ids, other.response_ids, strict=True))
    pairs += list(zip(one.rollout_logprobs, other.rollout_logprobs, strict=True))
    return all(np.array_equal(a, b) for a, b in pairs)


def model_logprobs(model: torch.nn.Module, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
    """Log-probabilities of the response under transformers' own forward pass."""
    tokens = torch.from_numpy(np.concatenate([prompt_ids, response_ids]))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, len(prompt_ids) - 1 : -1] / TEMPERATURE
    targets = torch.from_numpy(response_ids)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].numpy()


def largest_difference(model: torch.nn.Module, rollouts) -> float:
    rows = zip(rollouts.prompt_ids, rollouts.response_ids, rollouts.rollout_logprobs, strict=True)
    return max(float(np.abs(model_logprobs(model, p, r) - logprobs).max()) for p, r, logprobs in rows)


def test_responses_depend_on_their_seed_alone_to_the_bit(harness):
    alone = [harness.generate(LONG, 1, seed=seed) for seed in (5, 6, 7)]
    group = harness.generate(LONG, 3, seed=5)
    crowd = [harness.submit(harness.worker.generate(SHORT, num_responses=6, seed=90 + i)) for i in range(3)]
    in_crowd = harness.generate(LONG, 3, seed=5)
    assert all(future.result(WAIT_S) for future in crowd)
    assert same(group, in_crowd)
    for j in range(3):
        assert same(group.select([j]), alone[j])
    assert not np.array_equal(group.response_ids[0], group.response_ids[1])


def test_prompts_that_do_not_fit_one_batch_of_the_engine_together_are_answered(harness):
    texts = [f"{number:03d} " * 50 for number in range(64)]
    prompts = [Prompt(index=10 + i, messages=({"role": "user", "content": text},)) for i, text in enumerate(texts)]
    pending = [harness.submit(harness.worker.generate(prompt, num_responses=1, seed=3)) for prompt in prompts]
    made = [future.result(WAIT_S)[0] for future in pending]
    assert same(made[-1], harness.generate(prompts[-1], 1, seed=3))


def test_rollout_logprobs_are_the_models_at_the_sampling_temperature(harness):
    for prompt in (SHORT, LONG):
        rollouts = harness.generate(prompt, 4, seed=0)
        assert rollouts.temperature == TEMPERATURE
        assert largest_difference(harness.models[0], rollouts) < 1e-4


def test_a_response_ends_with_the_eos_that_the_policy_sampled_or_at_the_limit(harness):
    rollouts, summary = harness.call(harness.worker.generate(SHORT, num_responses=32, seed=0))
    eos = harness.worker._tokenizer.eos_token_id
    assert set(rollouts.finish_reasons) == {"stop", "length"}
    for ids, logprobs, reason in zip(
        rollouts.response_ids, rollouts.rollout_logprobs, rollouts.finish_reasons, strict=True
    ):
        assert len(ids) == len(logprobs)
        assert np.flatnonzero(ids == eos).tolist() == ([len(ids) - 1] if reason == "stop" else [])
        assert len(ids) == 64 or reason == "stop"
    assert not any("<|im_end|>" in text for text in rollouts.response_texts)
    assert summary["lengths"] == rollouts.response_lengths.tolist()
    assert summary["num_tokens"] == sum(summary["lengths"])
    assert summary["num_truncated"] == rollouts.finish_reasons.count("length")
    assert summary["policy_version"] == 0


def test_a_model_without_eos_runs_to_the_limit(harness, monkeypatch):
    monkeypatch.setattr(harness.worker, "_stop_ids", ())
    rollouts = harness.generate(SHORT, 8, seed=0)
    assert rollouts.finish_reasons == ["length"] * 8
    assert rollouts.response_lengths.tolist() == [64] * 8


def test_a_prompt_without_room_for_its_response_is_refused_with_the_remedy(harness):
    prompt = Prompt(index=9, messages=({"role": "user", "content": "x" * 300},))
    with pytest.raises(ValueError, match="prompt 9 has 3.. tokens.*lower data.max_prompt_tokens"):
        harness.generate(prompt, 1, seed=0)


def test_equal_weights_change_nothing_and_new_weights_change_the_same_cached_prompt(harness):
    before = harness.generate(LONG, 2, seed=3)
    assert harness.publish(harness.models[0]) == 1
    again = harness.generate(LONG, 2, seed=3)
    assert same(before, again)
    assert {version for versions in again.policy_versions for version in versions.tolist()} == {1}
    assert harness.publish(harness.models[1]) == 2
    after = harness.generate(LONG, 2, seed=3)
    assert not same(before, after)
    assert largest_difference(harness.models[1], after) < 1e-4
    assert harness.publish(harness.models[0]) == 3
    assert same(before, harness.generate(LONG, 2, seed=3))


def test_an_update_in_the_middle_of_a_response_lets_it_finish_under_the_new_weights(harness):
    async def pause_in_flight() -> None:
        """On the engine's own event loop: a look from this thread may come when all is done."""
        engine, most = harness.worker._engine, 0
        # When the first response has ended, the others have begun.
        while (unfinished := engine.get_num_unfinished_requests()) < 8 or unfinished >= most:
            assert not flying.done()
            most = max(most, unfinished)
            await asyncio.sleep(0)
        await engine.pause_generation(mode="keep", clear_cache=False)

    flying = harness.submit(harness.worker.generate(LONG, num_responses=16, seed=0))
    harness.call(pause_in_flight())
    harness.publish(harness.models[1])
    rollouts, _ = flying.result(WAIT_S)
    longest = [i for i, reason in enumerate(rollouts.finish_reasons) if reason == "length"]
    assert longest
    for i in longest:
        new = model_logprobs(harness.models[1], rollouts.prompt_ids[i], rollouts.response_ids[i])
        assert abs(new[-1] - rollouts.rollout_logprobs[i][-1]) < 1e-4
        versions = rollouts.policy_versions[i].tolist()
        assert versions == sorted(versions) and set(versions) <= {harness.version - 1, harness.version}
        assert versions[-1] == harness.version
    # Some were half done when the update fell in, and say for each token which weights sampled it.
    mixed = [i for i in longest if len(set(rollouts.policy_versions[i].tolist())) == 2]
    assert mixed
    for i in mixed:
        old = model_logprobs(harness.models[0], rollouts.prompt_ids[i], rollouts.response_ids[i])
        new = model_logprobs(harness.models[1], rollouts.prompt_ids[i], rollouts.response_ids[i])
        is_new = rollouts.policy_versions[i] == harness.version
        assert np.abs(np.where(is_new, new, old) - rollouts.rollout_logprobs[i]).max() < 1e-4
    harness.publish(harness.models[0])


def test_after_a_corrupted_update_nothing_is_sampled_until_a_good_one(harness, monkeypatch):
    before = harness.generate(LONG, 2, seed=3)

    def corrupting(group: TransferGroup, buffer: torch.Tensor):
        buffer[5] ^= 1
        return start(group, buffer)

    start = TransferGroup.start
    monkeypatch.setattr(TransferGroup, "start", corrupting)
    with pytest.raises(Exception, match="arrived corrupted"):
        harness.publish(harness.models[1])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="half-updated weights"):
        harness.generate(LONG, 1, seed=0)
    harness.publish(harness.models[0])
    assert same(before, harness.generate(LONG, 2, seed=3))


def test_an_update_without_some_of_the_weights_is_refused(harness):
    partial = torch.nn.ModuleDict({"model": harness.models[1].model})
    with pytest.raises(Exception, match="nothing for .*lm_head.weight"):
        harness.publish(partial)
    harness.publish(harness.models[0])


class Adapters:
    """Random adapters to some layers of a model, under the names in which they travel; `merged` has them added."""

    def __init__(self, model: torch.nn.Module, kinds: tuple[str, ...]) -> None:
        self.merged = copy.deepcopy(model)
        self._named: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(7)
        for name, weight in self.merged.named_parameters():
            if any(f".{kind}." in name for kind in kinds):
                layer, (rows, columns) = name.removesuffix(".weight"), weight.shape
                low_a = torch.randn(4, columns, generator=generator) / 8
                low_b = torch.randn(rows, 4, generator=generator) / 8
                weight.data = with_update(weight.data, low_a, low_b, scaling=0.5)
                scaling = torch.tensor(0.5, dtype=torch.float64)
                self._named |= {f"{layer}.lora_A": low_a, f"{layer}.lora_B": low_b, f"{layer}.lora_scaling": scaling}

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._named.items())


@pytest.mark.parametrize("kinds", [("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj", "down_proj"), ("gate_proj",)])
def test_adapters_that_travel_alone_leave_the_engine_as_a_full_sync_does(harness, kinds):
    adapters = Adapters(harness.models[0], kinds)
    harness.publish(adapters.merged)
    full = harness.generate(LONG, 4, seed=3), harness.generate(SHORT, 4, seed=9)
    assert largest_difference(adapters.merged, full[0]) < 1e-4
    assert largest_difference(harness.models[0], full[0]) > 1e-3
    harness.publish(harness.models[1])  # whatever the engine held before does not count
    harness.publish(adapters)
    alone = harness.generate(LONG, 4, seed=3), harness.generate(SHORT, 4, seed=9)
    assert same(full[0], alone[0]) and same(full[1], alone[1])
    harness.publish(harness.models[0])


def test_adapters_to_something_else_are_refused(harness):
    stray = Adapters(harness.models[0], ("q_proj",))
    stray._named = {name.replace("layers.0", "layers.9"): tensor for name, tensor in stray._named.items()}
    with pytest.raises(Exception, match="no weights of .*layers.9.self_attn.q_proj"):
        harness.publish(stray)
    harness.publish(harness.models[0])


def test_a_ping_is_answered_by_the_engine_itself(harness):
    assert harness.call(harness.worker.ping()) == harness.version


def test_close_leaves_no_process(harness):
    pids = [pid for pid, _ in harness.started["children"]]
    assert pids and all(psutil.pid_exists(pid) for pid in pids)
    harness.call(harness.worker.close())
    assert not [process for process in descendants() if process.pid in pids]
    harness.call(harness.worker.close())


def write_tied_model(folder, seed: int) -> str:
    write_tiny_model(folder, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return str(folder)


def test_an_output_layer_that_is_tied_to_the_embeddings_follows_an_update(tmp_path):
    harness = Harness(*[write_tied_model(tmp_path / str(seed), seed) for seed in (0, 1)])
    try:
        assert "lm_head.weight" not in [name for name, _ in harness]
        harness.publish(harness.models[1])
        rollouts = harness.generate(SHORT, 4, seed=0)
        assert largest_difference(harness.models[1], rollouts) < 1e-4
        assert largest_difference(harness.models[0], rollouts) > 1e-2
    finally:
        harness.call(harness.worker.close())

"""Reward models against transformers' own classifiers: heads, members, frozen layers, folders."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
)

from raylhf.config.learner import LoRAConfig
from raylhf.config.reward_model import EnsembleHead, MultiValueHead, ScalarHead, TokenHead
from raylhf.models.calibration import Calibration, template_hash, tokenizer_hash
from raylhf.models.load import load_tokenizer, prepare_model
from raylhf.models.reward import build_reward_model, export_reward_model, load_reward_model, member_folders
from raylhf.models.tiny import write_tiny_model

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "answer", "question", "##s", ".", "what")
LORA = LoRAConfig(rank=2, alpha=4)
LENGTHS = torch.tensor([7, 4])
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 99, 98, 97]])


def write_tiny_bert(folder):
    """A two-layer BERT with a pooler and twelve words."""
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizer(tokenizer_object=core).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("encoder"))


def build(folder, head=None, *, lora=None, trainable_layers=None, seed=3, dtype=torch.float32) -> Any:
    return build_reward_model(
        folder,
        head=head or ScalarHead(),
        dtype=dtype,
        attention="sdpa",
        trust_remote_code=False,
        seed=seed,
        lora=lora,
        trainable_layers=trainable_layers,
    )


def export(model, source, target, calibration=None):
    state = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    tokenizer = load_tokenizer(source)
    export_reward_model(model, str(target), state=state, tokenizer=tokenizer, calibration=calibration)
    return str(target)


def move(model, *, seed=5, size=0.1):
    """Change all trained weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def calibration_of(folder, *, outputs=1):
    tokenizer = load_tokenizer(folder)
    numbers = tuple(float(k) for k in range(outputs))
    return Calibration(
        n=10,
        mean=numbers,
        std=numbers,
        q01=numbers,
        q99=numbers,
        tokenizer_hash=tokenizer_hash(tokenizer),
        template_hash=template_hash(tokenizer),
    )


def test_a_decoder_is_read_at_the_last_real_token_whatever_the_padding_holds(decoder):
    model = build(decoder)
    scores = model(TOKENS, LENGTHS)
    assert scores.shape == (2, 1) and scores.dtype == torch.float32
    torch.testing.assert_close(model(TOKENS[1:, :4], LENGTHS[1:]), scores[1:])
    states = model.hf.base_model(TOKENS).last_hidden_state[[0, 1], [6, 3]]
    torch.testing.assert_close(scores, states @ model.hf.score.weight.T)


def test_only_the_head_is_float32_in_a_bfloat16_model(decoder):
    model = build(decoder, dtype=torch.bfloat16)
    states = model.hf.base_model(TOKENS).last_hidden_state[[0, 1], [6, 3]]
    assert states.dtype == torch.bfloat16
    expected = states.float() @ model.hf.score.weight.float().T
    torch.testing.assert_close(model(TOKENS, LENGTHS), expected, rtol=1e-6, atol=1e-6)


def test_a_new_head_is_drawn_by_seed_with_the_papers_spread_and_members_differ(decoder):
    weights = build(decoder, EnsembleHead(kind="ensemble", members=40)).hf.score.weight
    assert weights.std().item() == pytest.approx(65**-0.5, rel=0.05)
    assert not torch.equal(weights[0], weights[1])
    again = build(decoder, EnsembleHead(kind="ensemble", members=2)).hf.score.weight
    torch.testing.assert_close(again, weights[:2])
    other = build(decoder, EnsembleHead(kind="ensemble", members=2), seed=4).hf.score.weight
    assert not torch.equal(again, other)


def test_the_global_random_state_is_left_as_it_was(decoder):
    before = torch.get_rng_state()
    build(decoder, lora=LORA)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_token_head_gives_one_score_a_token(decoder):
    model = build(decoder, TokenHead(kind="token"))
    scores = model(TOKENS, LENGTHS)
    assert scores.shape == (2, 7) and model.is_token_level
    assert model.hf.score.bias.item() == 0.0
    torch.testing.assert_close(scores, model.hf(TOKENS).logits[..., 0])


def test_an_encoder_pools_by_itself_and_reads_two_segments(encoder):
    model = build(encoder, MultiValueHead(kind="multi_value", attributes=("kind", "true")))
    tokenizer = load_tokenizer(encoder)
    batch = tokenizer(["what a question", "what"], ["a good answer .", "bad"], padding=True, return_tensors="pt")
    assert batch["token_type_ids"].max() == 1
    lengths = batch["attention_mask"].sum(1)
    tokens = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)  # padding that looks like a word
    torch.testing.assert_close(model(tokens, lengths), model.hf(**batch).logits)
    assert model.names == ("kind", "true") and not model.is_decoder


def test_the_lower_layers_run_apart_with_equal_scores_and_gradients(decoder):
    for trainable_layers in (0, 1, 2):
        model = build(decoder, trainable_layers=trainable_layers)
        assert model.frozen_depth == 2 - trainable_layers
        plain = model(TOKENS, LENGTHS)
        plain.sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        hidden = model.lower(TOKENS, LENGTHS)
        assert hidden.shape == (2, 7, 64) and not hidden.requires_grad
        split = model(None, LENGTHS, hidden=hidden)
        split.sum().backward()
        torch.testing.assert_close(split, plain, rtol=1e-6, atol=1e-6)
        again = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert again.keys() == gradients.keys() and len(again) == 9 * trainable_layers + 2
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)
        assert len(model.hf.base_model.layers) == 2


def test_the_states_enter_behind_what_a_model_does_to_its_embeddings(decoder):
    model = build(decoder, trainable_layers=1)
    embed = model.hf.base_model.embed_tokens
    handle = model.hf.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (
            (args, {**kwargs, "inputs_embeds": 3 * kwargs["inputs_embeds"]})
            if kwargs.get("inputs_embeds") is not None
            else (args, {"inputs_embeds": 3 * embed(kwargs["input_ids"])})
        ),
        with_kwargs=True,
    )
    split = model(None, LENGTHS, hidden=model.lower(TOKENS, LENGTHS))
    torch.testing.assert_close(split, model(TOKENS, LENGTHS), rtol=1e-6, atol=1e-6)
    handle.remove()


def test_what_is_trained_follows_the_settings(decoder, encoder):
    def trained(model):
        return {name.removeprefix("hf.") for name, p in model.named_parameters() if p.requires_grad}

    assert trained(build(decoder, trainable_layers=0)) == {"model.norm.weight", "score.weight"}
    top = trained(build(encoder, trainable_layers=1))
    assert {name.split(".")[3] for name in top if "layer" in name and "encoder" in name} == {"1"}
    assert {"bert.pooler.dense.weight", "classifier.bias"} < top and not any("embeddings" in name for name in top)
    adapted = trained(build(decoder, lora=LORA))
    assert all("lora_" in name for name in adapted - {"score.weight"}) and "score.weight" in adapted
    everything = build(decoder)
    assert all(p.requires_grad for p in everything.parameters()) and everything.frozen_depth == 0
    with pytest.raises(ValueError, match="model has 2 layers"):
        build(decoder, trainable_layers=3)
    with pytest.raises(ValueError, match="set one of them to null"):
        build(decoder, lora=LORA, trainable_layers=1)


def test_lora_members_are_selected_one_at_a_time_and_train_alone(decoder):
    model = build(decoder, EnsembleHead(kind="ensemble", members=3, trunk="lora"), lora=LORA)
    move(model)
    every = model(TOKENS, LENGTHS)
    assert every.shape == (2, 3)
    alone = model(TOKENS, LENGTHS, member=1)
    torch.testing.assert_close(alone, every[:, 1:2])
    alone.sum().backward()
    sizes = dict.fromkeys(range(3), 0.0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            sizes[int(name.split("member_")[1][0])] += parameter.grad.abs().sum().item()
    assert sizes[1] > 0 and sizes[0] == sizes[2] == 0
    assert model.hf.score.weight.grad.abs().sum(1).count_nonzero() == 1


def test_lora_members_refuse_gradient_checkpointing(decoder):
    model = build(decoder, EnsembleHead(kind="ensemble", members=2, trunk="lora"), lora=LORA).train()
    model.hf.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        model(TOKENS, LENGTHS)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_an_exported_folder_is_an_ordinary_classifier_with_the_same_numbers(request, tmp_path, kind, lora):
    source = request.getfixturevalue(kind)
    model = build(source, MultiValueHead(kind="multi_value", attributes=("kind", "true")), lora=lora)
    move(model)
    folder = export(model, source, tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert plain.config.id2label == {0: "kind", 1: "true"} and plain.config.architectures == [type(plain).__name__]
    batch = tokenizer(["a good answer .", "bad"], padding=True, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["attention_mask"].sum(1))
        torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        again = load_reward_model(folder, dtype=torch.float32)
        assert again.kind == "multi_value" and again.names == ("kind", "true") and not again.training
        torch.testing.assert_close(
            again(batch["input_ids"], batch["attention_mask"].sum(1)), expected, rtol=1e-5, atol=1e-5
        )


def test_a_text_that_ends_in_eos_is_not_read_one_token_early_by_transformers(decoder, tmp_path):
    model = build(decoder)
    tokenizer = load_tokenizer(decoder)
    tokenizer.pad_token = tokenizer.eos_token  # as SmolLM2 has it
    state = {name: p.detach() for name, p in model.hf.named_parameters()}
    export_reward_model(model, str(tmp_path), state=state, tokenizer=tokenizer, calibration=None)
    assert tokenizer.pad_token == tokenizer.eos_token
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.pad_token_id == plain.config.pad_token_id != saved.eos_token_id
    tokens = torch.tensor([[5, 6, tokenizer.eos_token_id]])
    torch.testing.assert_close(plain(tokens).logits, model(tokens, torch.tensor([3])))
    assert tokenizer_hash(saved) == tokenizer_hash(load_tokenizer(decoder))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_token_model_survives_its_folder(request, tmp_path, kind):
    source = request.getfixturevalue(kind)
    model = build(source, TokenHead(kind="token"))
    folder = export(model, source, tmp_path / "out")
    again = load_reward_model(folder, dtype=torch.float32)
    tokens = torch.tensor([[2, 4, 5, 3]])
    torch.testing.assert_close(again(tokens, torch.tensor([4])), model(tokens, torch.tensor([4])))
    plain = AutoModelForTokenClassification.from_pretrained(folder)
    torch.testing.assert_close(plain.eval()(tokens).logits[..., 0], model(tokens, torch.tensor([4])))
    assert again.kind == "token" and plain.config.num_labels == 1


def test_lora_members_become_whole_models_of_their_own(decoder, tmp_path):
    model = build(decoder, EnsembleHead(kind="ensemble", members=2, trunk="lora"), lora=LORA)
    move(model)
    folder = export(model, decoder, tmp_path / "out", calibration_of(decoder, outputs=2))
    members = [load_reward_model(path, dtype=torch.float32) for path in member_folders(folder)]
    assert [member.kind for member in members] == ["scalar", "scalar"]
    columns = torch.cat([member(TOKENS, LENGTHS) for member in members], dim=1)
    torch.testing.assert_close(columns, model(TOKENS, LENGTHS), rtol=1e-5, atol=1e-5)
    assert members[1].calibration is not None and members[1].calibration.mean == (1.0,)
    with pytest.raises(ValueError, match="ensemble of whole models"):
        load_reward_model(folder, dtype=torch.float32)


def test_a_shared_ensemble_is_one_folder_whose_members_are_outputs(decoder, tmp_path):
    model = build(decoder, EnsembleHead(kind="ensemble", members=3))
    again = load_reward_model(export(model, decoder, tmp_path / "out"), dtype=torch.float32)
    assert again.kind == "ensemble" and again.names == ("member_0", "member_1", "member_2")
    torch.testing.assert_close(again(TOKENS, LENGTHS), model(TOKENS, LENGTHS))
    torch.testing.assert_close(again(TOKENS, LENGTHS, member=2), model(TOKENS, LENGTHS)[:, 2:])


def test_a_head_that_fits_is_taken_over_and_another_is_drawn(decoder, tmp_path):
    model = build(decoder)
    move(model)
    folder = export(model, decoder, tmp_path / "out")
    assert torch.equal(build(folder, seed=9).hf.score.weight, model.hf.score.weight)
    wider = build(folder, EnsembleHead(kind="ensemble", members=2), seed=9).hf
    assert wider.score.weight.shape == (2, 64) and not torch.equal(wider.score.weight[:1], model.hf.score.weight)
    assert torch.equal(wider.model.embed_tokens.weight, model.hf.model.embed_tokens.weight)


def test_two_outputs_a_token_are_read_as_log_odds_of_the_second(decoder, tmp_path):
    plain = AutoModelForTokenClassification.from_pretrained(decoder, num_labels=2)
    plain.save_pretrained(tmp_path)
    load_tokenizer(decoder).save_pretrained(tmp_path)
    model = load_reward_model(str(tmp_path), dtype=torch.float32)
    logits = plain.eval()(TOKENS).logits
    torch.testing.assert_close(model(TOKENS, LENGTHS), logits[..., 1] - logits[..., 0])


def test_a_language_model_is_no_reward_model(decoder):
    with pytest.raises(ValueError, match="LlamaForCausalLM, not a reward model; train one"):
        load_reward_model(decoder, dtype=torch.float32)


def test_a_package_that_ships_a_hugging_face_folder_is_used_as_it_is(decoder, tmp_path, monkeypatch):
    package = tmp_path / "shipped_model"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="no folder with config.json"):
        prepare_model("package:shipped_model", seed=0)
    (package / "model" / "config.json").write_text("{}")
    assert prepare_model("package:shipped_model", seed=0) == str(package / "model")


def test_a_calibration_survives_its_file_and_notices_another_text_format(decoder, encoder, tmp_path):
    calibration = calibration_of(decoder, outputs=2)
    assert Calibration.read(tmp_path) is None
    calibration.write(tmp_path)
    assert Calibration.read(tmp_path) == calibration
    assert calibration.output(1).q99 == (1.0,)
    tokenizer = load_tokenizer(decoder)
    calibration.check_text_format(tokenizer, "rm")
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="chat template of reward model 'rm'"):
        calibration.check_text_format(tokenizer, "rm")
    with pytest.raises(ValueError, match="the tokenizer of reward model 'rm'"):
        calibration.check_text_format(load_tokenizer(encoder), "rm")
    (tmp_path / "raylhf_calibration.json").write_text('{"n": 1}')
    with pytest.raises(ValueError, match="not a calibration file"):
        Calibration.read(tmp_path)


def test_partitioned_heads_keep_hugging_faces_start(decoder):
    from raylhf.models.reward import _draw_head

    weight = torch.empty(0)
    weight.ds_id = 1  # type: ignore[attr-defined]
    _draw_head(SimpleNamespace(weight=weight, bias=None), 0)
    assert weight.shape == (0,)

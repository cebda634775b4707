"""RLHF on Ray: vLLM rollouts, a reward plane of its own, DeepSpeed ZeRO learners."""

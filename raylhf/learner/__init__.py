"""Training with DeepSpeed ZeRO: the only importer of deepspeed."""

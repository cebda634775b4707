"""Sampling with vLLM, and the transfer of new weights to it: the only importer of vllm."""

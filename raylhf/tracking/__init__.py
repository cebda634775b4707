"""Metrics, samples and progress behind one call: JSONL files, Weights & Biases, and the console."""

from raylhf.tracking.tracker import Tracker

__all__ = ["Tracker"]

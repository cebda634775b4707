"""(c) How many of the learner's positions are padding, from its own plan of micro-batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from raylhf.learner.microbatch import Layout, RowSizes, plan_micro_batches

NUM_GROUPS, GROUP_SIZE = 64, 4
BUDGETS = (2048, 8192)


def measure(*, longest: int = 512, seed: int = 0) -> list[dict[str, Any]]:
    """Shares for sequences of lognormal length in groups of one prompt, packed and on padded lines of their own."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(rng.integers(16, longest // 4, NUM_GROUPS), GROUP_SIZE)
    responses = np.clip(rng.lognormal(np.log(longest / 5), 0.8, len(prompts)), 8, longest - prompts).astype(int)
    numbers = np.repeat(np.arange(NUM_GROUPS), GROUP_SIZE)
    sizes = RowSizes(prompts.tolist(), responses.tolist(), numbers.tolist())
    tokens = sum(sizes.total)
    layouts = {
        "packed, one copy of a prompt": {"is_packed": True, "shares_prompts": True},
        "packed": {"is_packed": True, "shares_prompts": False},
        "padded lines, neighbours in length together": {"is_packed": False, "shares_prompts": False},
    }
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        for name, flags in layouts.items():
            layout = Layout(budget, **flags)
            plan = plan_micro_batches(sizes, range(len(sizes.total)), layout)
            positions = sum(layout.num_positions(sizes, part) for part in plan)
            rows.append({"budget": budget, "layout": name, "micro_batches": len(plan)} | shares(tokens, positions))
        rows.append({"budget": budget, "layout": "padded lines in the order drawn"} | drawn(sizes.total, budget))
    return rows


def shares(tokens: int, positions: int) -> dict[str, float]:
    """Positions by tokens trained on, and the share of padding; with shared prompts there are fewer positions."""
    return {"positions_per_token": positions / tokens, "padding": max(0.0, 1 - tokens / positions)}


def drawn(totals: Sequence[int], budget: int) -> dict[str, Any]:
    """What a learner without a plan would do: as many sequences at a time as surely fit."""
    count = budget // max(totals)
    parts = [totals[start : start + count] for start in range(0, len(totals), count)]
    return {"micro_batches": len(parts)} | shares(sum(totals), sum(len(part) * max(part) for part in parts))

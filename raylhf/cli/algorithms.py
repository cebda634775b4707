"""`raylhf algorithms`: every method with what it needs."""

from raylhf.config.algorithms import LOSSES, METHODS


def run_algorithms() -> int:
    """Print the objectives and the losses of preference optimisation."""
    for title, table in (
        ("Objectives (objective.kind)", METHODS),
        ("Losses of preference and online_dpo (objective.loss.kind)", LOSSES),
    ):
        print(f"{title}\n")
        width = max(map(len, table))
        for name, entry in table.items():
            print(f"  {name:<{width}}  {entry.title}, {entry.paper}")
            if entry.needs:
                print(f"  {'':<{width}}  needs {', '.join(sorted(entry.needs))}")
        print()
    print("Formulas, functions and where the defaults come from: docs/algorithms.md")
    return 0

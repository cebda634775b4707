"""Every objective against its known optimum on 64 responses, with the learners that `raylhf train` uses.

    python benchmarks/closed_form/run.py [--seeds 0 1 2] [--only NAME ...]

Writes results.json beside this file and docs/closed_form.md. A row that is in results.json with all seeds is not run
again unless --only names it. Three seeds take about twenty minutes on a calm core.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from closed_form.enumerable import BETA
from closed_form.methods import LIMITS, OWN, TARGETS, outcome
from closed_form.processes import each_in_a_process

BOUND = 0.02
"""Nats."""
RESULTS, PAGE = HERE / "results.json", HERE.parent.parent / "docs" / "closed_form.md"
Results = dict[str, dict[str, dict[str, Any]]]
"""By name and seed."""


def main() -> None:
    names = [*TARGETS, *OWN, *LIMITS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=names, help="rows to run again")
    arguments = parser.parse_args()
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = [
        (name, seed)
        for seed in arguments.seeds
        for name in arguments.only or names
        if arguments.only or str(seed) not in results.get(name, {})
    ]
    for (name, seed), values in zip(wanted, each_in_a_process(outcome, wanted), strict=True):
        print(name, seed, values, flush=True)
        results.setdefault(name, {})[str(seed)] = values
        ordered = {name: results[name] for name in names if name in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        PAGE.write_text(page(ordered))


def page(results: Results) -> str:
    """docs/closed_form.md."""
    tables = {
        "@TARGETS@": lines(TARGETS, results),
        "@OWN@": lines(OWN, results),
        "@LIMITS@": [limit_line(name, results[name]) for name in LIMITS if name in results],
    }
    text = (HERE / "page.md").read_text().replace("@BETA@", f"{BETA:g}").replace("@BOUND@", f"{BOUND:g}")
    for mark, rows in tables.items():
        text = text.replace(mark, "\n".join(rows))
    return text


def lines(methods: dict[str, Any], results: Results) -> list[str]:
    return [line(name, method, results[name]) for name, method in methods.items() if name in results]


def line(name: str, method: Any, seeds: dict[str, dict[str, float]]) -> str:
    """Means over seeds, and every seed's error."""
    errors = [values["to_own"] for values in seeds.values()]
    mark = "" if max(errors) < BOUND else " **above**"
    cells = [name, method.data, method.ends, f"{mean(seeds, 'start'):.2f}", f"{statistics.mean(errors):.4f}{mark}"]
    cells += [", ".join(f"{error:.4f}" for error in errors), f"{mean(seeds, 'to_pi_star'):.3f}"]
    return f"| {' | '.join(cells)} |"


def limit_line(name: str, seeds: dict[str, dict[str, Any]]) -> str:
    """Means over seeds after each third."""
    limit = LIMITS[name]
    thirds = zip(*(values["measured"] for values in seeds.values()), strict=True)
    says = limit.says.format(optimum=mean(seeds, "optimum_to_reference"))
    return f"| {name} | {limit.data} | {says} | {', '.join(f'{statistics.mean(third):.2f}' for third in thirds)} |"


def mean(seeds: dict[str, dict[str, float]], key: str) -> float:
    return statistics.mean(values[key] for values in seeds.values())


if __name__ == "__main__":
    main()

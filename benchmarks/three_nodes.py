"""The quickstart on a Ray cluster of several nodes, with each role pinned to a node of its own.

    python benchmarks/three_nodes.py --output runs/three_nodes

A head without workers and three nodes on this machine, each with a loopback address of its own: one for the rollout
worker, one for the reward worker, one for the learners. Weights go from the learners' node to the rollout's. Says
where each worker was, and the held-out reward before and after; the results go into three_nodes_results.json beside
this file.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ray
import ray._private.state as ray_state
from ray_nodes import RayNodes
from runs import rows_with

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "quickstart.yaml"
ROLES = {"rollout": "rollouts", "reward": "rewards", "learner": "learners"}
LOOK_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/three_nodes"), help="folder of the run")
    parser.add_argument("settings", nargs="*", help="settings of the run, as for raylhf train")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    command = [sys.executable, "-m", "raylhf.cli", "train", str(CONFIG), f"name={folder.name}"]
    command += [f"output_dir={folder.parent}", "checkpoint.resume=false", "cluster.address=auto"]
    command += [f"{role}.resources={{{resource}: 1}}" for role, resource in ROLES.items()]
    with RayNodes() as nodes:
        for resource in ROLES.values():
            nodes.add(resource, **{resource: 2})
        ray.init(address=nodes.environment["RAY_ADDRESS"], log_to_driver=False)
        process = subprocess.Popen([*command, *arguments.settings], env={**os.environ, **nodes.environment})
        most: dict[str, int] = {}
        while process.poll() is None:
            most = {name: max(count, most.get(name, 0)) for name, count in workers_by_node().items()}
            try:
                process.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                continue
        ray.shutdown()
    if process.returncode != 0:
        raise SystemExit(f"the run in {folder} failed")
    held_out = [row["eval/score_mean"] for row in rows_with(folder, "eval/score_mean")]
    found = {
        "workers_on_the_node_of": most,
        "held_out_reward": [round(held_out[0], 3), round(held_out[-1], 3)],
    }
    (HERE / "three_nodes_results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def workers_by_node() -> dict[str, int]:
    """How many actors live on the node of each role."""
    roles = {
        node["NodeID"]: role
        for node in ray.nodes()
        for role, resource in ROLES.items()
        if resource in node["Resources"]
    }
    living = [actor for actor in ray_state.actors().values() if actor["State"] == "ALIVE"]
    counts = Counter(roles.get(actor["Address"]["NodeID"], "none") for actor in living)
    return {role: counts[role] for role in (*ROLES, "none")}


if __name__ == "__main__":
    main()

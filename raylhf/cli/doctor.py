"""`raylhf doctor`: whether the nodes can carry a run, before it starts."""

import dataclasses
import json
import time
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from raylhf.config.load import load_any_config

STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red", "skip": "dim"}


def run_doctor(path: str, overrides: Sequence[str], *, wait_s: float, as_json: bool) -> int:
    """Print one line a check as it ends, or all of it as JSON; returns 1 where one failed."""
    config = load_any_config(path, overrides)
    from raylhf.driver.doctor import Finding
    from raylhf.driver.examination import examine

    def show(finding: Finding) -> None:
        where = f"{finding.node}: " if finding.node else ""
        remedy = f". Remedy: {finding.remedy}" if finding.remedy else ""
        line = Text(f"{finding.status:5}", style=STYLES[finding.status])
        console.print(line.append(f"{finding.check:15}{where}{finding.finding}{remedy}", style="not bold default"))

    console = Console(highlight=False, soft_wrap=True)
    started, findings = time.monotonic(), []
    for finding in examine(config, wait_s=wait_s):
        findings.append(finding)
        if not as_json:
            show(finding)
    num_failed, num_warned = (sum(f.status == status for f in findings) for status in ("FAIL", "warn"))
    seconds = time.monotonic() - started
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"failed": num_failed, "warned": num_warned, "seconds": seconds, "findings": rows}, indent=1))
    else:
        console.print(f"\n{num_failed} failed, {num_warned} to look at, in {seconds:.0f} s")
    return 1 if num_failed else 0

"""Reads what an offline W&B run left: LevelDB log framing after a 7-byte header, then protobuf."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as wandb_records


def records(run_dir: Path) -> Iterator[Any]:
    """The records of every offline run in the folder, oldest first."""
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, position, payload = file.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            chunk = data[position + 7 : position + 7 + length]
            payload = chunk if kind in (1, 2) else payload + chunk  # 1 full, 2 first, 3 middle, 4 last
            position += 7 + length
            if kind in (1, 4):
                record = wandb_records.Record()  # pyright: ignore[reportAttributeAccessIssue]
                record.ParseFromString(payload)
                yield record


def items(records_of_a_kind: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in records_of_a_kind}


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The rows in the order in which they were logged."""
    return [items(r.history.item) for r in records(run_dir) if r.WhichOneof("record_type") == "history"]


def metric_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each of our own steps, as in metrics.jsonl: of a key that was logged twice, the later value.

    Left out are W&B's own keys, tables, and histograms, which metrics.jsonl has as quantiles.
    """
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        numbers = {
            key: value if math.isfinite(float(value)) else None  # online, NaN is a text
            for key, value in row.items()
            if not key.startswith("_") and "." not in key and not isinstance(value, dict)
        }
        merged.setdefault(row["step"], {}).update(numbers)
    return [merged[step] for step in sorted(merged)]

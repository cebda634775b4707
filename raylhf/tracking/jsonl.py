"""JSONL files whose rows carry a `step`, cut back on resume so that no step is there twice."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np


class JsonlFile:
    """Rows by step, each on disk as soon as it is there.

    With `resume_step` the file keeps its rows of earlier steps; without, an older file is moved aside (`NAME.1.jsonl`).
    """

    def __init__(self, path: Path, *, resume_step: int | None):
        self.kept_rows: list[dict[str, Any]] = []
        """The rows that were there already."""
        self._path = path
        self._last_start = 0
        self._end = 0
        if path.exists() and resume_step is None:
            path.rename(unused_name(path))
        elif path.exists() and resume_step is not None:
            self._keep_rows_before(resume_step)
        with path.open("ab") as file:
            file.truncate(self._end)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row at the end."""
        self._last_start = self._end
        self.replace_last(row)

    def replace_last(self, row: dict[str, Any]) -> None:
        """Put `row` in the place of the last one."""
        line = json.dumps(plain(row), allow_nan=False).encode() + b"\n"
        with self._path.open("r+b") as file:
            file.seek(self._last_start)
            file.write(line)
            self._end = file.truncate()

    def _keep_rows_before(self, resume_step: int) -> None:
        """Read the rows of steps before `resume_step`. A torn last line does not count."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):  # the process died while it wrote this line
                break
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{self._path}, line {number}: not JSON ({error}); repair it or move the file"
                ) from error
            if row["step"] >= resume_step:
                break
            self.kept_rows.append(row)
            self._last_start, self._end = self._end, self._end + len(line)


def unused_name(path: Path) -> Path:
    """`metrics.1.jsonl` for `metrics.jsonl`, or the first number that is free."""
    number = 1
    while (candidate := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return candidate


def plain(value: Any) -> Any:
    """`value` in JSON's types; NaN and infinities are null, for which JSON has no word."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)

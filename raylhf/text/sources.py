"""Rows of JSONL and Parquet files, of folders of them, and of Hugging Face datasets, each with where it stands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylhf.config.data import DataConfig

LocatedRow = tuple[str, dict[str, Any]]
"""Where a row stands (for messages), and the row."""


def read_rows(config: DataConfig) -> Iterator[LocatedRow]:
    """The rows of `data.path`: a file, a folder of files (in the order of their names) or a dataset's name."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
        if not files:
            raise ValueError(f"data.path={config.path!r} is a folder without {' or '.join(READERS)} files")
        for file in files:
            yield from READERS[file.suffix](file)
    elif path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"data.path={config.path!r} ends in {path.suffix!r}; known are {', '.join(READERS)}")
        yield from READERS[path.suffix](path)
    elif path.suffix in READERS or config.path.startswith(("/", ".", "~")):
        raise ValueError(f"data.path={config.path!r}: there is no such file or folder")
    else:
        yield from read_hugging_face(config)


def read_jsonl(file: Path) -> Iterator[LocatedRow]:
    """One JSON object a line; blank lines are skipped."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a JSON {type(row).__name__}, not an object with a prompt field")
            yield where, row


def read_parquet(file: Path) -> Iterator[LocatedRow]:
    """The rows of a Parquet file, read in pieces."""
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for piece in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in piece.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from error


def read_hugging_face(config: DataConfig) -> Iterator[LocatedRow]:
    """The rows of `data.split` of a Hugging Face dataset."""
    import datasets

    try:
        rows = datasets.load_dataset(config.path, split=config.split)
    except (OSError, ValueError) as error:  # unreachable or unknown (OSError), no such split or configuration
        raise ValueError(
            f"data.path={config.path!r} is no local file, and the Hugging Face dataset of that name (data.split="
            f"{config.split!r}) could not be loaded: {error}. Correct it, or download the set and give its file"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{config.path} ({config.split}), row {number}", dict(row)


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}

"""Rows of JSONL and Parquet files, of folders of them, and of Hugging Face datasets, each with where it stands."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LocatedRow = tuple[str, dict[str, Any]]
"""Where a row stands (for messages), and the row."""

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape of half a character beyond U+FFFF; most come in pairs, and Python reads those as one character."""


def read_rows(
    path: str, *, split: str, dataset_config: str | None = None, key: str = "data.path"
) -> Iterator[LocatedRow]:
    """The rows of a file, of a folder of files (in the order of their names) or of a Hugging Face dataset.

    `split` and `dataset_config` are the dataset's; `key` is the setting that holds `path`, for messages.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if ending(file) in READERS)
        if not files:
            raise ValueError(f"{key}={path!r} is a folder without {' or '.join(READERS)} files")
        for file in files:
            yield from READERS[ending(file)](file)
    elif source.is_file():
        if ending(source) not in READERS:
            raise ValueError(f"{key}={path!r} ends in {ending(source)!r}; known are {', '.join(READERS)}")
        yield from READERS[ending(source)](source)
    elif ending(source) in READERS or path.startswith(("/", ".", "~")):
        raise ValueError(f"{key}={path!r}: there is no such file or folder")
    else:
        yield from read_hugging_face(path, split=split, dataset_config=dataset_config, key=key)


def ending(path: Path) -> str:
    """The last suffix of a name, or the last two of a compressed file's."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def read_jsonl(file: Path) -> Iterator[LocatedRow]:
    """One JSON object a line; blank lines are skipped. A name that ends in .gz is unpacked on the way."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, parse_line(line, where=where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a readable gzip file ({error}); fetch it again or compress it anew") from error


def parse_line(line: bytes, *, where: str) -> dict[str, Any]:
    """The JSON object of one line, whose texts UTF-8 can hold."""
    try:
        text = line.decode("utf-8")
        row = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); save the file in UTF-8") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: half a character ({half!r}, a lone surrogate); remove it") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}, not an object with named fields")
    return row


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
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from error


def read_hugging_face(name: str, *, split: str, dataset_config: str | None, key: str) -> Iterator[LocatedRow]:
    """The rows of one split of a Hugging Face dataset."""
    import datasets

    try:
        rows = datasets.load_dataset(name, dataset_config, split=split)
    except (OSError, ValueError) as error:  # unreachable or unknown (OSError), no such split or configuration
        raise ValueError(
            f"{key}={name!r} is no local file, and the Hugging Face dataset of that name (data.split={split!r}, "
            f"data.dataset_config={dataset_config!r}) could not be loaded: {error}. Correct it, or "
            "download the set and give its file"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name} ({split}), row {number}", dict(row)


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet, ".jsonl.gz": read_jsonl}

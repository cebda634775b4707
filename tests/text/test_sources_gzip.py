import gzip

import pytest

from raylhf.text.sources import read_rows


def write_gzip(path, text):
    path.write_bytes(gzip.compress(text.encode()))
    return str(path)


def test_a_compressed_file_is_read_with_the_lines_of_its_text(tmp_path):
    path = write_gzip(tmp_path / "v1.0.jsonl.gz", '{"a": 1}\n\n{"a": "\u00e9"}\n')
    assert list(read_rows(path, split="train")) == [
        (f"{path}, line 1", {"a": 1}),
        (f"{path}, line 3", {"a": "\u00e9"}),
    ]


def test_a_folder_mixes_compressed_and_plain_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"a": 2}')
    write_gzip(tmp_path / "a.jsonl.gz", '{"a": 1}')
    write_gzip(tmp_path / "c.csv.gz", "not read")
    assert [row["a"] for _, row in read_rows(str(tmp_path), split="train")] == [1, 2]


def test_a_broken_compressed_file_is_a_sentence(tmp_path):
    truncated = tmp_path / "a.jsonl.gz"
    truncated.write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:-9])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: not a readable gzip file"):
        list(read_rows(str(truncated), split="train"))
    (tmp_path / "b.jsonl.gz").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: not a readable gzip file"):
        list(read_rows(str(tmp_path / "b.jsonl.gz"), split="train"))


def test_messages_name_the_setting_that_holds_the_path(tmp_path):
    (tmp_path / "a.txt.gz").touch()
    with pytest.raises(ValueError, match=r"^data\.held_out_path=.*gone\.jsonl\.gz'?: there is no such file"):
        list(read_rows(str(tmp_path / "gone.jsonl.gz"), split="train", key="data.held_out_path"))
    with pytest.raises(ValueError, match=r"ends in '\.txt\.gz'; known are \.jsonl, \.parquet, \.jsonl\.gz"):
        list(read_rows(str(tmp_path / "a.txt.gz"), split="train"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "caf\xe9"}', "not UTF-8"),
        (b'{"a": ["x\\ud83d"]}', r"half a character \('\\ud83d', a lone surrogate\)"),
        (b'{"\\uDe00": 1}', "half a character"),
    ],
)
def test_a_line_that_is_no_text_is_named(tmp_path, name, line, problem):
    file = tmp_path / name
    content = b'{"a": "\\ud83d\\ude00"}\r\n\n' + line
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = read_rows(str(file), split="train")
    assert next(rows) == (f"{file}, line 1", {"a": "\U0001f600"})
    with pytest.raises(ValueError, match=rf"{name}, line 3: {problem}"):
        next(rows)


def test_a_line_that_is_no_object_is_named(tmp_path):
    path = write_gzip(tmp_path / "a.jsonl.gz", '{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line 2: a JSON list, not an object"):
        list(read_rows(path, split="train"))

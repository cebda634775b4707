import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raylhf.driver.checkpoints import (
    CheckpointError,
    begin_checkpoint,
    commit_checkpoint,
    newest_checkpoint,
    newest_state,
    require_files,
    writing_checkpoint,
)


def save(run_dir, step, keep=2):
    folder = begin_checkpoint(run_dir, step)
    (folder / "policy").mkdir()
    (folder / "policy" / "weights").write_text(str(step))
    return commit_checkpoint(folder, step=step, state={"step": step}, keep=keep)


def test_the_newest_complete_checkpoint_is_found_by_number_not_by_name(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10):
        save(tmp_path, step)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found[0].name, found[1]) == ("step_10", {"step": 10})


def test_older_checkpoints_go_only_after_the_new_one_is_there(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step_2", "step_3"]


def test_a_checkpoint_that_was_not_finished_does_not_count_and_is_overwritten(tmp_path):
    save(tmp_path, 1)
    half = begin_checkpoint(tmp_path, 2)
    (half / "junk").write_text("x")
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[1] == {"step": 1}
    final = save(tmp_path, 2)
    assert not (final / "junk").exists()


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    assert (save(tmp_path, 1) / "policy" / "weights").read_text() == "1"


def newest(run_dir):
    found = newest_checkpoint(run_dir)
    return found and found[0].name


def names(run_dir):
    return sorted(folder.name for folder in (run_dir / "checkpoints").iterdir())


def test_the_manifest_lists_every_other_file_with_size_and_hash(tmp_path):
    manifest = json.loads((save(tmp_path, 12) / "manifest.json").read_text())
    assert manifest["step"] == 12
    assert manifest["files"].keys() == {"driver.json", "policy/weights"}
    # `printf 12 | sha256sum`
    digest = "6b51d431df5d7f141cbececcf79edf3dd861c3b4069f0b11661a3eefacbba918"
    assert manifest["files"]["policy/weights"] == {"bytes": 2, "sha256": digest}


def flip(file):
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "policy/weights has 1 bytes instead of 2": lambda f: (f / "policy" / "weights").write_text("1"),
    "policy/weights has another SHA-256": lambda f: flip(f / "policy" / "weights"),
    "driver.json has another SHA-256": lambda f: flip(f / "driver.json"),
    "policy/weights is missing": lambda f: (f / "policy" / "weights").unlink(),
    "manifest.json, which is written last, is missing": lambda f: (f / "manifest.json").unlink(),
    "manifest.json is cut short": lambda f: os.truncate(f / "manifest.json", 40),
    "manifest.json is cut short or is no manifest": lambda f: (f / "manifest.json").write_text("[]"),
    "manifest.json does not list driver.json": lambda f: (f / "manifest.json").write_text('{"step": 10, "files": {}}'),
    "manifest.json is that of step 9": lambda f: shutil.copy(f.with_name("step_9") / "manifest.json", f),
}


@pytest.mark.parametrize("finding", DAMAGE)
def test_a_damaged_checkpoint_is_told_of_set_aside_and_the_one_before_it_is_taken(finding, tmp_path, capsys):
    save(tmp_path, 9)
    DAMAGE[finding](save(tmp_path, 10))
    assert newest(tmp_path) == "step_9"
    told = capsys.readouterr().err
    assert f"step_10 is damaged ({finding}" in told and "going back to step_9" in told
    assert names(tmp_path) == ["damaged_step_10", "step_9"]
    assert newest(tmp_path) == "step_9"
    assert capsys.readouterr().err == ""


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(tmp_path):
    save(tmp_path, 1)
    for _ in range(2):  # the second time, the name is taken
        flip(save(tmp_path, 2) / "policy" / "weights")
        assert newest(tmp_path) == "step_1"
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["damaged_step_2", "damaged_step_2.1", "step_1", "step_3"]


def test_where_no_checkpoint_is_whole_every_finding_is_told_and_nothing_is_renamed(tmp_path):
    flip(save(tmp_path, 1) / "driver.json")
    (save(tmp_path, 2) / "policy" / "weights").unlink()
    for _ in range(2):  # a second try must not take the run for a new one
        with pytest.raises(ValueError, match=r"step_2: policy/weights is missing; step_1: driver.json .*resume=false"):
            newest_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_1", "step_2"]


def test_the_state_that_is_read_without_verifying_is_the_newest_ones(tmp_path):
    assert newest_state(tmp_path) is None
    save(tmp_path, 9)
    newer = save(tmp_path, 10)
    assert newest_state(tmp_path) == {"step": 10}
    os.truncate(newer / "driver.json", 3)
    with pytest.raises(ValueError, match="step_10/driver.json cannot be read"):
        newest_state(tmp_path)


def crash_at(monkeypatch, owner, name, *, call):
    """Let the n-th call of a function raise what no handler takes, as if the process had died there."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def crash(*args, **kwargs):
        if next(calls) >= call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, crash)


CRASHES = [
    (Path, "mkdir", 1),
    (Path, "write_text", 2),  # the first is the weights'
    (os, "fsync", 1),
    (Path, "write_text", 3),
    *((os, "fsync", n) for n in range(2, 6)),
    (Path, "rename", 1),
]


@pytest.mark.parametrize(("owner", "name", "call"), CRASHES)
def test_a_crash_before_the_rename_leaves_the_previous_checkpoint_newest_and_whole(
    owner, name, call, tmp_path, monkeypatch
):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        crash_at(patch, owner, name, call=call)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert newest(tmp_path) == "step_1"
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_1", "step_2"]


@pytest.mark.parametrize(("owner", "name", "call"), [(os, "fsync", 6), (Path, "rename", 2), (shutil, "rmtree", 1)])
def test_a_crash_after_the_rename_leaves_the_new_checkpoint_newest_and_whole(owner, name, call, tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        crash_at(patch, owner, name, call=call)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, keep=1)
    assert newest(tmp_path) == "step_2"
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step_3"]


@pytest.mark.parametrize(("owner", "name", "call"), [(Path, "rename", 1), (Path, "rename", 2), (shutil, "rmtree", 1)])
def test_a_crash_while_a_step_is_saved_again_leaves_one_of_the_two(owner, name, call, tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        crash_at(patch, owner, name, call=call)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1)
    assert newest(tmp_path) == "step_1"
    save(tmp_path, 1)
    assert names(tmp_path) == ["step_1"]


def fail(run_dir, step, error, **options):
    with writing_checkpoint(run_dir, step, **options) as folder:
        (folder / "half").write_text("x")
        raise error


def test_a_checkpoint_that_cannot_be_written_is_removed_and_the_sentence_names_the_newest(tmp_path):
    place = re.escape(str(tmp_path / "checkpoints"))
    with pytest.raises(CheckpointError, match=rf"step 1 .* {place} \(no room; .* were free\); there is no checkpoint"):
        fail(tmp_path, 1, OSError("no room"))
    save(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=r"step 2 .*\(learner 0 failed; .*is step_1.*from there\.\ntraceback$"
    ) as caught:
        fail(tmp_path, 2, RuntimeError("learner 0 failed\ntraceback"))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert (names(tmp_path), newest(tmp_path)) == (["step_1"], "step_1")


def test_a_failure_of_another_kind_goes_on_as_it_is_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path, 1, KeyboardInterrupt)
    with pytest.raises(NotImplementedError):
        fail(tmp_path, 1, NotImplementedError(), let_through=(NotImplementedError,))
    assert names(tmp_path) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from raylhf.driver.checkpoints import CheckpointError, commit_checkpoint, writing_checkpoint

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with writing_checkpoint(Path(sys.argv[1]), 2) as folder:
        (folder / "weights").write_text("2" * 900)
        commit_checkpoint(folder, step=2, state={"step": 2, "evaluations": "x" * int(sys.argv[2])}, keep=1)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("num_bytes", [2000, 900])  # driver.json is too large; nothing is, and the save succeeds
def test_a_write_that_the_system_refuses_leaves_the_previous_checkpoint_whole(num_bytes, tmp_path):
    save(tmp_path, 1)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(num_bytes)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if num_bytes == 900:
        assert (told, names(tmp_path)) == ("", ["step_2"])
    else:
        assert "step 2 could not be saved" in told and "File too large" in told and "is step_1" in told
        assert names(tmp_path) == ["step_1"]
    assert newest(tmp_path) == names(tmp_path)[0]


def test_files_of_learners_that_the_driver_does_not_see_make_no_checkpoint(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "rank_0").write_text("x")
    require_files(tmp_path, [["policy/rank_0"]], timeout_s=0)
    with pytest.raises(OSError, match=r"does not see 1 of 2 files that learners wrote, as policy/rank_1"):
        require_files(tmp_path, [["policy/rank_0"], ["policy/rank_0", "policy/rank_1"]], timeout_s=0)


def test_a_checkpoint_that_every_user_may_write_is_not_resumed(tmp_path):
    file = save(tmp_path, 1) / "policy" / "weights"
    file.chmod(0o666)
    with pytest.raises(ValueError, match=f"every user may write {file};.*chmod -R o-w"):
        newest_checkpoint(tmp_path)
    file.chmod(0o664)
    assert newest(tmp_path) == "step_1"
    (tmp_path / "checkpoints").chmod(0o777)
    with pytest.raises(ValueError, match="every user may write .*/checkpoints;"):
        newest_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_checkpoint_of_another_user_is_not_resumed(tmp_path):
    file = save(tmp_path, 1) / "policy" / "weights"
    os.chown(file, 4711, 4711)
    with pytest.raises(ValueError, match=f"{file} belongs to user 4711"):
        newest_checkpoint(tmp_path)

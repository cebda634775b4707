from raylhf.driver.checkpoints import begin_checkpoint, commit_checkpoint, newest_checkpoint


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

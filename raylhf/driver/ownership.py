"""Whose files a checkpoint is: DeepSpeed's are pickles, and loading one runs whatever code its author put into it."""

import stat
import tempfile
from pathlib import Path


def require_own_files(run_dir: Path, checkpoint: Path) -> None:
    """Refuse what another user wrote, or could have changed: folders of the run, and everything in the checkpoint.

    Whose is ours, and whether modes mean anything, a new file tells: a network file system may map users, or have none.

    Raises:
        ValueError: the sentence names the file.
    """
    with tempfile.NamedTemporaryFile(dir=run_dir, prefix=".owner_") as probe:
        ours = Path(probe.name).stat()
    for path in (run_dir, checkpoint.parent, checkpoint, *checkpoint.rglob("*")):
        found = path.stat()
        if found.st_uid != ours.st_uid:
            raise ValueError(
                f"{path} belongs to user {found.st_uid}, and this run's files to user {ours.st_uid}; loading a "
                "checkpoint runs code that its author may have put into it, so it is not resumed. If you trust them, "
                "copy the run's folder and train in the copy (output_dir=); else set checkpoint.resume=false"
            )
        if found.st_mode & stat.S_IWOTH and not ours.st_mode & stat.S_IWOTH:
            raise ValueError(
                f"every user may write {path}; loading a checkpoint runs code that somebody may have put into it, so "
                f"it is not resumed. If nobody did, forbid it (chmod -R o-w {run_dir}); else set "
                "checkpoint.resume=false"
            )

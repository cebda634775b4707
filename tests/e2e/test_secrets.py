"""A whole run with secrets in its environment: where they are afterwards, and what arrives at W&B."""

import pytest
from command_line import SECRETS, TEST_S
from wandb_offline import by_step

pytestmark = pytest.mark.timeout(TEST_S)


def test_no_artefact_of_a_run_holds_a_secret(raylhf, watched):
    command, place = watched.command, raylhf.place
    assert command.process.returncode == 0, command.story()
    secrets = {**SECRETS, "the token of Ray": watched.ray_token}
    assert len(watched.ray_token) == 64
    files = [file for file in place.rglob("*") if file.is_file() and not file.is_symlink()]
    names = {str(file.relative_to(place)) for file in files}
    for artefact in ("metrics.jsonl", "config.yaml", "samples.jsonl", "summary.json", "logs/rollout-0.log"):
        assert f"runs/second/{artefact}" in names
    assert any("/session_" in name and name.endswith(".log") for name in names), "Ray's own logs are searched, too"
    found = [(what, str(f)) for f in files for what, value in secrets.items() if value.encode() in f.read_bytes()]
    assert found == []
    assert list(place.glob("raylhf-*/ray-token")) == []


def test_wandb_is_sent_every_row_and_no_secret_but_its_key_as_authorization(watched):
    (run_id,) = watched.server.lines
    assert run_id == (watched.command.folder / "wandb_id.txt").read_text().strip()
    assert by_step(watched.server.history(run_id)) == watched.command.rows()
    assert watched.server.exit_codes == {run_id: [0]}
    sent = watched.server.sent + repr(watched.server.headers).encode()
    for value in [*SECRETS.values(), watched.ray_token]:
        assert value.encode() not in sent

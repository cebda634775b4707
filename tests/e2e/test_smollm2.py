"""A real language model through the whole stack."""

import pytest
from command_line import REPOSITORY, TEST_S


@pytest.mark.timeout(TEST_S)
def test_smollm2_trains_and_the_engine_follows_every_weight(raylhf):
    run = raylhf.run(
        "smollm2",
        "num_steps=2",
        "data.held_out=2",
        "rollout.prompts_per_step=4",
        "rollout.sampling.max_response_tokens=8",
        # All weights, and fast: the output layer is tied to the embeddings, and one that stays behind would show.
        "learner.lora=null",
        "learner.lr=1e-4",
        "learner.num_ranks=1",
        "learner.zero_stage=0",
        "objective.num_minibatches=1",
        "objective.num_epochs=1",
        config=REPOSITORY / "configs" / "quickstart.yaml",
    )
    assert run.process.returncode == 0, run.story()
    assert run.left_running() == []
    assert [row["step"] for row in run.rows()] == [0, 1, 2]
    for row in run.rows()[1:]:
        assert row["mismatch/abs_dlogprob_mean"] < 1e-3
        assert row["policy/first_ratio_error"] < 1e-3
    assert run.rows()[-1]["policy/kl_to_ref_k3"] > 1e-3, "the policy did not move"
    assert (run.folder / "export" / "model.safetensors").stat().st_size > 400_000_000

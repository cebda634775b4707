"""DPO finds the same known optimum as PPO, online and on stored judgements.

The problem and the runs are those of benchmarks/closed_form, whose page docs/closed_form.md has every loss.
"""

import pytest
from closed_form.methods import outcome
from closed_form.processes import each_in_a_process

START_KL, FINAL_KL = 0.3, 0.02


@pytest.mark.parametrize("method", ["online DPO, k = 8, all pairs", "online cDPO, k = 8, soft labels", "DPO"])
def test_dpo_on_bradley_terry_labels_converges_to_the_closed_form_optimum(method):
    (kl,) = each_in_a_process(outcome, [(method, 0)])
    assert kl["start"] > START_KL
    assert kl["to_pi_star"] < FINAL_KL

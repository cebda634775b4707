"""The heart of the suite: PPO and its critic-free relatives find the known optimum of the KL-regularised objective.

The problem and the runs are those of benchmarks/closed_form, whose page docs/closed_form.md has every objective.
"""

import pytest
from closed_form.methods import outcome
from closed_form.processes import each_in_a_process

START_KL, FINAL_KL = 0.3, 0.02


@pytest.mark.parametrize("method", ["PPO (GAE)", "REINFORCE++", "RLOO", "GRPO", "Dr. GRPO"])
def test_ppo_with_a_kl_penalty_converges_to_the_closed_form_optimum(method):
    (kl,) = each_in_a_process(outcome, [(method, 0)])
    assert kl["start"] > START_KL
    assert kl["to_pi_star"] < FINAL_KL, f"KL(pi || pi*) fell from {kl['start']:.3f} to {kl['to_pi_star']:.4f}"

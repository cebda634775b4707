"""The sums behind benchmarks/speed that need no measurement."""

from speed import gpu, machine, padding


def test_model_flops_count_a_prompt_once_a_group_and_logits_on_responses_alone():
    # Hidden 64, middle 128, two layers, kv 64: a token costs 2 * 2 * (2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 128) =
    # 163,840, a position's logits 2 * 512 * 64 = 65,536. Prompt: 10 tokens and 2 * 2 * 64 * 10^2 for attention.
    # Each of four responses: 2 * (163,840 + 65,536) and 4 * 2 * 64 * 2 * (10 + 1). Four forwards in all.
    prompt = 10 * 163_840 + 25_600
    response = 2 * (163_840 + 65_536) + 11_264
    assert gpu.model_flops({"shape": "tiny"}, [(10, 2)] * 4) == 4 * (prompt + 4 * response)


def test_the_learner_pads_less_than_a_twentieth_of_its_positions():
    rows = [row for row in padding.measure() if row["layout"].startswith("packed")]
    assert rows and all(row["padding"] < 0.05 for row in rows)


def test_steps_beside_a_busy_neighbour_are_left_out_unless_there_is_no_other():
    quiet, loud, louder = ({"others": share} for share in (0.01, 0.3, 0.4))
    assert machine.calm([loud, quiet]) == [quiet]
    assert machine.calm([louder, loud]) == [loud]

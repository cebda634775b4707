import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylhf.batch import Prompt
from raylhf.config.data import DataConfig
from raylhf.text.prompts import PromptOrder, drop_overlong, load_prompts, split_held_out

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some_prompts(n):
    return [Prompt(index=i, messages=({"role": "user", "content": f"q{i}"},)) for i in range(n)]


def indices(prompts):
    return [prompt.index for prompt in prompts]


def test_a_string_prompt_becomes_a_user_turn_and_the_rest_of_the_row_metadata(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "Hi", "topic": "greeting"}, {"prompt": "Why?"})
    prompts = load_prompts(DataConfig(path=path))
    assert [prompt.messages for prompt in prompts] == [(USER,), ({"role": "user", "content": "Why?"},)]
    assert [dict(prompt.metadata) for prompt in prompts] == [{"topic": "greeting"}, {}]
    assert indices(prompts) == [0, 1]


def test_a_list_of_chat_turns_is_kept_and_a_system_prompt_is_put_first_only_where_there_is_none(tmp_path):
    chat = [USER, ASSISTANT, {"role": "user", "content": "And now?"}]
    path = write_jsonl(tmp_path / "a.jsonl", {"chat": chat}, {"chat": [SYSTEM, USER]})
    with_one, own = load_prompts(DataConfig(path=path, prompt_key="chat", system_prompt="Be kind."))
    assert with_one.messages == ({"role": "system", "content": "Be kind."}, *chat)
    assert own.messages == (SYSTEM, USER)


def test_a_malformed_line_is_named_by_file_and_number(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "Hi"}\n\n{"prompt": "Hi"\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: not a JSON object"):
        load_prompts(DataConfig(path=str(path)))


def test_a_missing_prompt_field_names_file_line_and_the_fields_that_are_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "Hi"}, {"question": "Why?", "id": 3})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no field 'prompt' .* \['id', 'question'\]"):
        load_prompts(DataConfig(path=path))


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([{"role": "human", "content": "Hi"}], "unknown role 'human'"),
        ([USER, ASSISTANT], "the last message is the assistant's"),
        ([USER, SYSTEM, USER], "a system message can only be the first"),
        ([{"role": "user"}], "is no chat message"),
        ([{"role": "user", "content": None}], "must be text"),
        ("  ", "must not be empty"),
        ([], "must be a string or a list"),
        (7, "must be a string or a list"),
    ],
)
def test_an_invalid_prompt_stops_the_run_with_a_sentence_that_names_its_line(tmp_path, prompt, sentence):
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": prompt})
    with pytest.raises(ValueError, match=f"line 1.*{sentence}"):
        load_prompts(DataConfig(path=path))


def test_an_empty_file_and_a_missing_one_and_an_unknown_ending_are_said(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match="holds no prompts"):
        load_prompts(DataConfig(path=str(tmp_path / "empty.jsonl")))
    with pytest.raises(ValueError, match="there is no such file"):
        load_prompts(DataConfig(path=str(tmp_path / "gone.jsonl")))
    with pytest.raises(ValueError, match=r"ends in '\.csv'; known are \.jsonl, \.parquet"):
        load_prompts(DataConfig(path=str(tmp_path / "a.csv")))


def test_a_folder_is_read_in_the_order_of_its_names_with_indices_that_run_on(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", {"prompt": "third"})
    pq.write_table(pa.table({"prompt": ["first", "second"], "level": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("not data")
    prompts = load_prompts(DataConfig(path=str(tmp_path)))
    assert [(p.index, p.text, p.metadata.get("level")) for p in prompts] == [
        (0, "first", 1),
        (1, "second", 2),
        (2, "third", None),
    ]


def test_parquet_holds_chat_messages_and_names_a_bad_row(tmp_path):
    pq.write_table(pa.table({"prompt": [[SYSTEM, USER], [ASSISTANT]]}), tmp_path / "chat.parquet")
    with pytest.raises(ValueError, match=r"chat\.parquet, row 2: the last message is the assistant's"):
        load_prompts(DataConfig(path=str(tmp_path)))
    (tmp_path / "chat.parquet").write_text("this is no Parquet")
    with pytest.raises(ValueError, match=r"chat\.parquet: not a readable Parquet file"):
        load_prompts(DataConfig(path=str(tmp_path)))


def test_an_unreachable_dataset_is_a_sentence_and_loading_prompts_loads_no_torch():
    program = (
        "import sys\n"
        "from raylhf.config.data import DataConfig\n"
        "from raylhf.text.prompts import load_prompts\n"
        "assert 'datasets' not in sys.modules\n"
        "try: load_prompts(DataConfig(path='no-such-org/no-such-set', split='test'))\n"
        "except ValueError as error: print(error)\n"
        "assert not {'torch', 'transformers', 'vllm', 'ray', 'deepspeed'} & sys.modules.keys()\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert "'no-such-org/no-such-set' is no local file" in run.stdout
    assert "data.split='test'" in run.stdout


def test_held_out_prompts_are_drawn_by_seed_and_disjoint_from_training():
    prompts = some_prompts(20)
    training, held_out = split_held_out(prompts, 5, seed=1)
    assert sorted(indices(training) + indices(held_out)) == list(range(20))
    assert len(held_out) == 5
    assert split_held_out(prompts, 5, seed=1) == (training, held_out)
    assert split_held_out(prompts, 5, seed=2)[1] != held_out
    assert split_held_out(prompts, 0, seed=1) == (prompts, [])


def test_holding_out_every_prompt_is_refused():
    with pytest.raises(ValueError, match=r"data\.held_out=3 .* there are 3 prompts; set it to at most 2"):
        split_held_out(some_prompts(3), 3, seed=0)


def test_overlong_prompts_are_dropped_and_counted_and_the_limit_itself_is_allowed():
    kept, num_dropped = drop_overlong(some_prompts(3), [8, 9, 7], 8)
    assert (indices(kept), num_dropped) == ([0, 2], 1)
    with pytest.raises(ValueError, match=r"all 3 prompts are longer .* the shortest has 7 tokens"):
        drop_overlong(some_prompts(3), [8, 9, 7], 6)


def test_every_epoch_holds_each_prompt_once_in_an_order_of_its_own():
    order = PromptOrder(some_prompts(10), seed=3)
    drawn = indices(prompt for _ in range(10) for prompt in order.draw(3))  # batches cross the epochs' ends
    epochs = [drawn[:10], drawn[10:20], drawn[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.epochs_done == 3.0
    assert indices(PromptOrder(some_prompts(10), seed=3).draw(30)) == drawn
    assert indices(PromptOrder(some_prompts(10), seed=4).draw(30)) != drawn


def test_an_unshuffled_order_keeps_the_files_order_over_epochs():
    order = PromptOrder(some_prompts(3), seed=0, shuffle=False)
    assert indices(order.draw(7)) == [0, 1, 2, 0, 1, 2, 0]
    assert order.state() == {"epoch": 2, "position": 1, "num_prompts": 3}


@pytest.mark.parametrize("num_drawn", [0, 4, 10, 13])
def test_a_restored_order_draws_what_the_first_would_have_drawn(num_drawn):
    order = PromptOrder(some_prompts(10), seed=5)
    order.draw(num_drawn)
    restored = PromptOrder(some_prompts(10), seed=5)
    restored.restore(json.loads(json.dumps(order.state())))
    assert indices(restored.draw(17)) == indices(order.draw(17))


def test_restoring_over_other_data_is_refused():
    order = PromptOrder(some_prompts(10), seed=5)
    with pytest.raises(ValueError, match=r"written with 10 training prompts and data\.path gives 9"):
        PromptOrder(some_prompts(9), seed=5).restore(order.state())

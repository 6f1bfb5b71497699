"""Instruction data over real files: what is in a batch, bad rows, cuts, splits, and the cache."""

import json
import re
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from chat_tokenizers import CHATML, TEMPLATES, byte_tokenizer, save

from lightning_peft.data import InstructionData
from lightning_peft.data.sources.preparing import PrepareInstructions
from lightning_peft.errors import ConfigError, DataError

TOKENIZER = byte_tokenizer(CHATML)
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return save(tmp_path / "chat", CHATML)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    return write


@pytest.fixture
def pairs() -> list[dict[str, str]]:
    """40 rows, each of its own prompt, completions of 1 to 20 letters."""
    return [{"prompt": f"p{i}", "completion": "x" * (1 + i * 7 % 20)} for i in range(40)]


@pytest.fixture
def make(tokenizer, write, pairs) -> Callable[..., InstructionData]:
    def make(rows: list[Any] | None = None, **options: Any) -> InstructionData:
        if "path" not in options:
            options["path"] = write("rows.jsonl", pairs if rows is None else rows)
        whole = {"validation_split": 0, "test_split": 0, "max_length": 128, "batch_size": 4}
        return InstructionData(**{"tokenizer": tokenizer} | whole | options)

    return make


def ready(data: InstructionData, stage: str = "fit") -> InstructionData:
    data.prepare_data()
    data.setup(stage)
    return data


def texts(batch: dict) -> list[str]:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return [TOKENIZER.decode(row[kept]) for row, kept in zip(batch["input_ids"], mask, strict=True)]


def learned(batch: dict) -> list[str]:
    return [TOKENIZER.decode(row[row != -100]) for row in batch["labels"]]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_training_batch_hides_the_prompt_and_the_padding(make, pairs):
    data = ready(make(bucket=False))
    seen = []
    for batch in data.train_dataloader():
        assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
            ("input_ids", "attention_mask", "labels"), torch.int64
        )
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
        assert (batch["attention_mask"].diff() <= 0).all()  # padded on the right
        visible = batch["labels"] != -100
        assert torch.equal(batch["labels"][visible], batch["input_ids"][visible])
        seen += zip(texts(batch), learned(batch), strict=True)
    answers = [f"{row['completion']}<|im_end|>" for row in pairs]
    assert sorted(seen) == sorted((PROMPT.format(row["prompt"]) + a, a) for row, a in zip(pairs, answers, strict=True))


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("completions", "one<|im_end|>two<|im_end|>"), ("last", "two<|im_end|>"), ("everything", None)],
)
def test_what_is_learned_of_a_conversation(make, train_on, expected):
    spoken = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("1", "one", "2", "two"))
    ]
    (batch,) = ready(make([{"messages": spoken}], train_on=train_on)).train_dataloader()
    assert learned(batch) == [expected or texts(batch)[0]]
    assert texts(batch) == [f"{PROMPT.format('1')}one<|im_end|>\n{PROMPT.format('2')}two<|im_end|>"]


def test_the_examples_of_one_conversation_stay_in_one_split(make, tmp_path):
    spoken = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(6)]
    rows = [{"messages": [{**spoken[0], "content": f"p{i}"}, *spoken[1:]]} for i in range(10)]
    folder = save(tmp_path / "thinking", TEMPLATES["thinking"])
    data = ready(make(rows, tokenizer=folder, validation_split=3, test_split=0.2))
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 15, "validation": 9, "test": 6}
    numbers = {split: set(part["number"][:]) for split, part in data.splits.items()}
    assert sorted(number for part in numbers.values() for number in part) == list(range(1, 11))
    assert data.reports["train"].rows == 10


def test_a_packed_batch_has_whole_rows(make, pairs):
    data = ready(make(packing=True, max_length=128))
    seen = []
    for batch in data.train_dataloader():
        assert sorted(batch) == ["input_ids", "labels", "position_ids"]
        assert batch["input_ids"].shape[1] <= 128
        for ids, positions, labels in zip(*batch.values(), strict=True):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, end in pairwise(starts):
                assert positions[start:end].tolist() == list(range(end - start))
                if (labels[start:end] != -100).any():
                    seen.append(TOKENIZER.decode(ids[start:end]))
    assert sorted(seen) == sorted(f"{PROMPT.format(row['prompt'])}{row['completion']}<|im_end|>" for row in pairs)
    assert len(data.train_dataloader()) < len(ready(make()).train_dataloader())
    assert "attention_mask" in next(iter(ready(make(packing=True, validation_split=4)).val_dataloader()))


def test_what_packing_saves_is_said(make, caplog):
    with caplog.at_level("INFO"):
        ready(make(packing=True, batch_size=1))
    assert re.search(
        r"40 training rows in 12 blocks of up to 128 .* 0.0% .* of 3 rows .* not packed [1-9]\S*%", caplog.text
    )


def test_predict_gives_prompts_padded_on_the_left_with_their_texts(make, pairs, write):
    rows = [
        *pairs[:3],
        {"prompt": "a longer prompt, with nothing to compare"},
        {"messages": [{"role": "user", "content": "m"}]},
    ]
    data = ready(make(predict_file=write("new.jsonl", rows), batch_size=5), "predict")
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["attention_mask", "completion", "input_ids", "prompt"]
    assert batch["prompt"] == ["p0", "p1", "p2", "a longer prompt, with nothing to compare", "m"]
    assert batch["completion"] == [*(row["completion"] for row in pairs[:3]), "", ""]
    assert texts(batch) == [PROMPT.format(prompt) for prompt in batch["prompt"]]
    assert batch["attention_mask"][:, -1].all()


def test_predict_without_a_file_takes_the_test_rows(make):
    data = ready(make(test_split=7, batch_size=7), "predict")
    (batch,) = data.predict_dataloader()
    assert texts(batch) == [PROMPT.format(prompt) for prompt in batch["prompt"]]
    (test,) = data.test_dataloader()
    assert texts(test) == [
        f"{PROMPT.format(p)}{c}<|im_end|>" for p, c in zip(batch["prompt"], batch["completion"], strict=True)
    ]


def test_an_encoder_reads_the_prompt_and_a_decoder_learns_the_completion(make, write, tmp_path):
    rows = [{"prompt": "aa", "completion": "b"}, {"instruction": "c", "input": "d", "output": "eee"}]
    plain = save(tmp_path / "plain", bos=True)
    data = ready(make(rows, tokenizer=plain, seq2seq=True, test_file=write("test.jsonl", rows)))
    (batch,) = data.train_dataloader()
    found = dict(zip(texts(batch), learned(batch), strict=True))
    assert found == {"<s>aa": "<s>b</s>", "<s>c\n\nd": "<s>eee</s>"}
    assert batch["input_ids"].shape == (2, 4)
    assert batch["labels"].shape == (2, 5)
    (prompts,) = data.predict_dataloader()
    assert texts(prompts) == ["<s>aa", "<s>c\n\nd"]
    assert prompts["completion"] == ["b", "eee"]


def test_the_real_tokenizer_of_a_small_language_model(make):
    """Its end token is its padding token, and its template has a system turn of its own."""
    folder = Path(__file__).parents[2] / ".cache" / "smollm2"
    if not folder.is_dir():
        pytest.skip("python examples/assets.py --language-model")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    data = ready(make([{"prompt": "Is it å?", "completion": "Yes."}], tokenizer=str(folder)))
    (batch,) = data.train_dataloader()
    assert tokenizer.decode(batch["input_ids"][0]).endswith(
        "<|im_start|>user\nIs it å?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    )
    assert tokenizer.decode(batch["input_ids"][0]).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "Yes.<|im_end|>"


# --- files and the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "lines.json", "jsonl", "parquet", "set"])
def test_all_kinds_of_files_give_the_same_rows(kind, make, pairs, write, tmp_path):
    path = tmp_path / f"rows.{kind}"
    rows = datasets.Dataset.from_list(pairs)
    if kind in ("csv", "tsv"):
        rows.to_csv(path, sep="," if kind == "csv" else "\t")
    elif kind == "json":
        path.write_text(json.dumps(pairs))
    elif kind == "set":
        rows.save_to_disk(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    else:
        write(path.name, ["\ufeff" + json.dumps(pairs[0]), "", *pairs[1:]])
    data = ready(make(path=str(path)))
    assert data.splits["train"]["prompt"][:] == [row["prompt"] for row in pairs]
    assert data.splits["train"]["completion"][:] == [row["completion"] for row in pairs]


def test_a_second_module_does_not_tokenize_again_unless_something_else_is_asked_for(make, pairs, write, monkeypatch):
    path = write("rows.jsonl", pairs)
    calls = []
    prepare = PrepareInstructions.__call__
    monkeypatch.setattr(PrepareInstructions, "__call__", lambda self, *args: calls.append(1) or prepare(self, *args))
    ready(make(path=path))
    ready(make(path=path, batch_size=2, packing=True, split_seed=1))
    assert len(calls) == 1
    for number, option in enumerate(
        [{"max_length": 64}, {"chat_template": "plain"}, {"train_on": "everything"}, {"system_prompt": "S"}]
    ):
        ready(make(path=path, **option))
        assert len(calls) == 2 + number


# --- bad rows --------------------------------------------------------------------------------------------------------

BAD = [
    ({"prompt": "p", "completion": ""}, "no completion"),
    ({"prompt": 3, "completion": "c"}, "not text"),
    ('{"prompt": "p", ', "not JSON"),
    ("[1, 2]", "not JSON"),
    ({"messages": [{"role": "assistant", "content": "c"}]}, "in wrong role order"),
    ({"question": "p", "answer": "c"}, "of no known layout"),
    ({"prompt": "p" * 200, "completion": "c"}, "too long"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[f"{i} {reason}" for i, (_, reason) in enumerate(BAD)])
def test_a_bad_row_is_left_out_and_reported_with_its_line(row, reason, make, pairs):
    rows = [*pairs[:2], "", row, *pairs[2:]]
    data = make(rows)
    with pytest.warns(UserWarning, match=r"1 of 41 rows cannot be used: 1 .* \(line 4\)") as caught:
        ready(data)
    assert sum("cannot be used" in str(warning.message) for warning in caught) == 1
    assert reason in str(caught[0].message)
    assert "rows.jsonl" in str(caught[0].message)
    assert data.reports["train"].bad == {reason: [4]}
    assert data.splits["train"]["prompt"][:] == [pair["prompt"] for pair in pairs]
    with pytest.raises(DataError, match=rf"{reason}.*\(line 4\).*on_bad_row='skip'"):
        make(rows, on_bad_row="error").prepare_data()


def test_bad_rows_are_counted_by_reason_and_the_first_are_named(make, pairs):
    rows = [pairs[0], *[BAD[0][0]] * 5, BAD[1][0], *pairs[1:]]
    data = make(rows)
    with pytest.warns(UserWarning, match=r"6 of 46 .* 5 no completion: .* \(lines 2, 3, 4 and 2 more\); 1 not text"):
        ready(data)
    assert data.reports["train"].used == 40


def test_rows_of_other_files_are_counted_from_0(make, pairs, tmp_path):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([*pairs, {"prompt": "p", "completion": None}]).to_parquet(path)
    with pytest.warns(UserWarning, match=r"no completion: 'completion' is empty \(row 40, counted from 0\)"):
        ready(make(path=str(path)))


@pytest.mark.parametrize("on_bad_row", ["skip", "error"])
def test_nothing_but_bad_rows_is_always_an_error(on_bad_row, make):
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used: 2 no completion"):
        make([BAD[0][0]] * 2, on_bad_row=on_bad_row).prepare_data()
    with pytest.raises(DataError, match="no rows"):
        make(["", " "], on_bad_row=on_bad_row).prepare_data()


def test_a_template_that_does_not_fit_is_an_error_that_says_so(make, tmp_path):
    with pytest.raises(DataError, match=r"generation prompt.*chat_template"):
        make(tokenizer=save(tmp_path / "other", TEMPLATES["other prompt"])).prepare_data()
    ready(make(tokenizer=save(tmp_path / "again", TEMPLATES["other prompt"]), chat_template="plain"))


def test_a_chat_template_from_a_file(make, tmp_path):
    (tmp_path / "inst.jinja").write_text(TEMPLATES["inst"])
    data = ready(make(chat_template=str(tmp_path / "inst.jinja")))
    assert texts(next(iter(data.train_dataloader())))[0].startswith("<s>[INST] p")
    with pytest.raises(DataError, match="chat_template"):
        make(chat_template=str(tmp_path / "none.jinja")).prepare_data()


# --- cuts ------------------------------------------------------------------------------------------------------------


def test_a_cut_is_reported_and_never_takes_the_whole_completion(make):
    start = len(TOKENIZER(PROMPT.format("p"))["input_ids"])
    rows = [{"prompt": "p", "completion": "c" * length} for length in (3, 4, 60)]
    data = make(rows, max_length=start + 4, bucket=False)
    with pytest.warns(
        UserWarning, match=rf"2 rows are cut at their end to max_length={start + 4} tokens \(lines 2, 3\)"
    ):
        ready(data)
    assert data.reports["train"].cut == [2, 3]
    (batch,) = data.train_dataloader()
    assert sorted(learned(batch)) == ["ccc<|im_end|>", "cccc", "cccc"]
    with pytest.warns(UserWarning, match="3 rows are cut"):
        assert set(learned(next(iter(ready(make(rows, max_length=start + 1)).train_dataloader())))) == {"c"}
    with pytest.raises(DataError, match=rf"3 too long: its prompt alone has {start} tokens, and max_length={start}"):
        make(rows, max_length=start).prepare_data()


def test_a_long_conversation_keeps_what_fits_of_it(make, tmp_path):
    spoken = [{"role": ("user", "assistant")[i % 2], "content": "x" * 10} for i in range(8)]
    for template, count in (
        ("chatml", 1),
        ("thinking", 3),
    ):  # in the latter, each answer is a row, and the last is too long
        data = make([{"messages": spoken}], tokenizer=save(tmp_path / template, TEMPLATES[template]))
        with pytest.warns(UserWarning, match=r"1 rows are cut .*\(line 1\)"):
            ready(data)
        assert len(data.splits["train"]) == count
        assert data.reports["train"].bad == {}


def test_a_test_row_whose_last_prompt_was_cut_is_not_predicted(make, pairs, write):
    spoken = [{"role": ("user", "assistant")[i % 2], "content": "x" * 30} for i in range(8)]
    path = write("test.jsonl", [{"messages": spoken}, pairs[0]])
    data = make(test_file=path)
    with pytest.warns(UserWarning, match="cut"):
        ready(data, "test")
    with pytest.warns(UserWarning, match="1 test rows are left out"):
        (batch,) = data.predict_dataloader()
    assert batch["prompt"] == ["p0"]


def test_good_rows_are_nothing_to_talk_about(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(make())


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"format": "csv"},
        {"train_on": "prompts"},
        {"on_bad_row": "ignore"},
        {"packing": True, "seq2seq": True},
        {"train_on": "everything", "seq2seq": True},
        {"max_length": 0},
    ],
    ids=str,
)
def test_options_that_cannot_be(options, make):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(**options)

"""Plain text: streams cut in blocks, texts by themselves, bad rows."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from chat_tokenizers import byte_tokenizer, save

from lightning_peft.data import TextData
from lightning_peft.data.sources.blocks import TokenBlocks
from lightning_peft.errors import ConfigError, DataError

TOKENIZER = byte_tokenizer()
TEXTS = ["abc", "d" * 25, "", "ef", "g" * 9]
STREAM = "abc</s>" + "d" * 25 + "</s>ef</s>" + "g" * 9 + "</s>"


@pytest.fixture
def make(tmp_path: Path):
    tokenizer = save(tmp_path / "tokenizer")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def make(**options: Any) -> TextData:
        whole = {"validation_split": 0, "test_split": 0, "max_length": 8, "batch_size": 2}
        path = {} if "train_file" in options else {"path": str(rows)}
        return TextData(**{"tokenizer": tokenizer} | path | whole | options)

    return make


def ready(data: TextData) -> TextData:
    data.prepare_data()
    data.setup("fit")
    return data


def in_order(data: TextData) -> list[str]:
    rows = data.splits["train"]
    return [TOKENIZER.decode(rows[i]["input_ids"]) for i in range(len(rows))]


def test_texts_are_joined_and_cut_in_full_blocks(make):
    data = make()
    with pytest.warns(UserWarning, match=r"1 of 5 rows cannot be used: 1 no text: 'text' is empty \(line 3\)"):
        ready(data)
    blocks = in_order(data)
    assert "".join(blocks) == STREAM
    assert {len(data.splits["train"][i]["input_ids"]) for i in range(len(blocks) - 1)} == {8}


@pytest.mark.filterwarnings("ignore:.*cannot be used")
def test_a_batch_learns_every_token_but_the_padding(make):
    seen = []
    for batch in ready(make()).train_dataloader():
        assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
        kept = batch["attention_mask"].bool()
        assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
        assert (batch["labels"][~kept] == -100).all()
        seen += [TOKENIZER.decode(row[mask]) for row, mask in zip(batch["input_ids"], kept, strict=True)]
    assert sorted(seen) == sorted(in_order(ready(make())))


@pytest.mark.filterwarnings("ignore:.*cannot be used")
def test_blocks_are_divided(make):
    data = ready(make(validation_split=2, test_split=1))
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 3, "validation": 2, "test": 1}
    blocks = [TOKENIZER.decode(part[i]["input_ids"]) for part in data.splits.values() for i in range(len(part))]
    assert sorted(blocks) == sorted(in_order(ready(make())))


def test_a_single_last_token_is_no_block():
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4, 5]]}, datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    )
    assert [len(TokenBlocks(rows, size)) for size in (2, 3, 4, 5, 6)] == [2, 2, 1, 1, 1]
    assert TokenBlocks(rows, 2)[1]["input_ids"].tolist() == [3, 4]


@pytest.mark.filterwarnings("ignore:.*cannot be used")
@pytest.mark.parametrize("packing", [False, True])
def test_a_text_a_row(packing, make):
    data = make(join=False, packing=packing, max_length=12)
    with pytest.warns(UserWarning, match=r"1 rows are cut at their end to max_length=12 tokens \(line 2\)"):
        ready(data)
    assert in_order(data) == ["abc</s>", "d" * 12, "ef</s>", "g" * 9 + "</s>"]
    batches = list(data.train_dataloader())
    assert all(("position_ids" in batch) is packing for batch in batches)
    learned = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert learned == sum(data.splits["train"]["length"][:]) - len(data.splits["train"])


def test_a_txt_file_is_one_text_with_its_line_breaks(make, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("One.\n\nTwo.\n")
    data = ready(make(train_file=str(path)))
    assert "".join(in_order(data)) == "One.\n\nTwo.\n</s>"


@pytest.mark.filterwarnings("ignore:.*cannot be used")
def test_a_begin_token_is_put_where_the_tokenizer_puts_it(make, tmp_path):
    data = ready(make(tokenizer=save(tmp_path / "bos", bos=True)))
    assert "".join(in_order(data)).startswith("<s>abc</s><s>ddd")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": 5}\n{"text": "a"}\n', r"1 not text: 'text' is a number \(line 1\)"),
        ('{"text": "a"}\n{"txt": "a"}\n', r"1 no text: 'text' is empty \(line 2\)"),
        ('{"text": "a"}\nnonsense\n', r"1 not JSON: .* \(line 2\)"),
    ],
)
def test_bad_rows(content, message, make, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        make(train_file=str(path), on_bad_row="error").prepare_data()
    with pytest.warns(UserWarning, match=message):
        make(train_file=str(path)).prepare_data()


def test_a_column_that_is_not_there(make, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("title,body\na,b\n")
    with pytest.raises(DataError, match=r"'text' \(text_column\).*'title', 'body'"):
        make(train_file=str(path)).prepare_data()


def test_what_cannot_be(make):
    with pytest.raises(ConfigError, match="join=False"):
        make(packing=True)
    with pytest.raises(ConfigError, match="max_length"):
        make(max_length=1)
    with pytest.raises(DataError, match="predict"), pytest.warns(UserWarning, match="cannot be used"):
        make().setup("predict")

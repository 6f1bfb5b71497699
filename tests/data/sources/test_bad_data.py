"""What the data module refuses, and in which words."""

import json
from pathlib import Path

import datasets
import pytest
from batches import load

from lightning_peft.data import TextClassificationData
from lightning_peft.errors import ConfigError, DataError


def refused(data: TextClassificationData, *parts: str) -> DataError:
    with pytest.raises(DataError) as caught:
        data.prepare_data()
    for part in parts:
        assert part in str(caught.value)
    return caught.value


def test_before_loading(make):
    data = make()
    for name in ("splits", "label_names", "num_labels"):
        with pytest.raises(DataError, match="setup"):
            getattr(data, name)


def test_missing_file(make, write, rows):
    path = Path(write("train.csv", rows))
    refused(
        make(train_file=str(path.with_name("trian.csv"))), "train_file", "trian.csv", "'train.csv'", str(Path.cwd())
    )
    refused(make(path="nowhere/all.csv"), "path", "nowhere/all.csv", str(Path.cwd()))
    refused(make(path="./nowhere"), "path", "./nowhere", str(Path.cwd()))
    refused(make(tokenizer="./nowhere"), "tokenizer", "./nowhere", str(Path.cwd()))
    refused(make(train_file=str(path.parent)), "train_file", "folder")


def test_unknown_kind_of_file(make, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("w1\n")
    refused(make(train_file=str(path)), "rows.txt", ".csv", ".parquet")
    refused(make(path=str(path)), "rows.txt", ".csv", ".parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "text,label\nw1,a\nw1,a,b,c\n"),
        ("rows.csv", 'text,label\n"w1,a\n'),
        ("rows.csv", ""),
        ("rows.csv", "text,label\n"),
        ("rows.csv", b"text,label\n\xff\xfe,a\n"),
        ("rows.json", '{"text": '),
        ("rows.jsonl", '{"text": "w1", "label": 1}\n{"text'),
        ("rows.jsonl", ""),
        ("rows.parquet", "no parquet"),
    ],
)
def test_malformed_file(name: str, content: str | bytes, make, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(make(train_file=str(path)), "train_file", str(path))
    assert error.__cause__ is not None


def test_a_hub_name_that_cannot_be_loaded(make):
    error = refused(make(path="nobody/no-such-set"), "path", "nobody/no-such-set")
    assert error.__cause__ is not None
    error = refused(make(tokenizer="nobody/no-such-tokenizer"), "tokenizer", "nobody/no-such-tokenizer")
    assert error.__cause__ is not None


def test_no_train_split(make, rows, tmp_path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "set")
    refused(make(path=str(tmp_path / "set")), "'train'", "'test'")


def test_missing_column(make, rows, write):
    refused(make(text_column="txet"), "'txet'", "text_column", "'text', 'label'", "Did you mean 'text'?")
    refused(make(label_column="Label"), "'Label'", "label_column", "Did you mean 'label'?")
    refused(make(text_pair_column="second"), "'second'", "text_pair_column")
    unlabelled = write("test.csv", [{"text": "w1"}])
    refused(make(path=write("all.csv", rows), test_file=unlabelled), "test_file", unlabelled, "'label'")


def test_empty_texts(make, rows, write):
    rows[4] = {"text": "", "label": "bad"}
    rows[9] = {"text": "  \t ", "label": "bad"}
    refused(make(path=write("all.csv", rows)), "'text'", "2 empty texts of 100", "rows 4, 9")
    empty = write("empty.csv", [{"text": "", "label": "bad"}, {"text": "", "label": "good"}])
    refused(make(path=empty), "'text'", "empty in all 2 rows")


def test_a_text_column_that_is_not_text(make, rows, write):
    refused(
        make(path=write("all.csv", [row | {"score": 1.5} for row in rows]), text_column="score"), "float64", "'text'"
    )


def test_unlabelled_rows(make, rows, write):
    rows[2]["label"] = ""
    refused(make(path=write("all.csv", rows)), "'label'", "empty in 1 rows of 100", "row 2")
    numbers = [{"text": "w1", "label": ""}, {"text": "w2", "label": 1}, {"text": "w3", "label": 0}]
    refused(make(path=write("numbers.csv", numbers)), "empty in 1 rows of 3", "row 0")
    refused(make(path=write("none.csv", [{"text": "w1", "label": ""}])), "empty in 1 rows of 1")


def test_labels_of_another_kind(make, tmp_path, write):
    refused(
        make(path=write("float.csv", [{"text": "w1", "label": 0.5}, {"text": "w2", "label": 1.0}])), "float64", "0.5"
    )
    for labels in ([["a"], ["b"]], [1, "a"]):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"text": "w1", "label": label}) for label in labels))
        refused(make(path=str(path)), "label_column", "text or integers")


def test_labels_that_are_not_among_the_names(make, rows, write):
    path = write("all.csv", rows)
    refused(
        make(path=path, label_names=["bad", "goood"]), "'good'", "rows 1, 3, 5 and 47 more", "Did you mean 'goood'?"
    )
    test = write("test.csv", [{"text": "w1", "label": "awful"}])
    refused(make(path=path, test_file=test), "test_file", "'awful'", "row 0", "'bad', 'good'", "label_names")
    numbers = write("numbers.csv", [{"text": "w1", "label": 1}, {"text": "w2", "label": 2}])
    refused(make(path=numbers, label_names=["a", "b"]), "label 2", "row 1")


def test_only_one_label(make, rows, write):
    refused(make(path=write("all.csv", rows[::2])), "only one label", "'bad'")


def test_splits_that_leave_no_training_rows(make):
    refused(make(validation_split=60, test_split=40), "100 rows", "validation_split=60", "test_split=40")
    refused(make(validation_split=0.5, test_split=0.5), "none for training")


def test_a_stage_without_rows(make, rows, write):
    data = load(make(validation_split=0, test_split=0))
    for stage, remedy in (("validate", "validation_file"), ("test", "test_file"), ("predict", "predict_file")):
        with pytest.raises(DataError, match=remedy):
            data.setup(stage)
    alone = make(test_file=write("test.csv", rows), label_names=["bad", "good"])
    alone.setup("test")
    with pytest.raises(DataError, match="train_file"):
        alone.setup("fit")
    refused(make(test_file=write("test.csv", rows)), "label_names")


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 0},
        {"max_length": 1.5},
        {"batch_size": 0},
        {"batch_size": True},
        {"eval_batch_size": 0},
        {"num_workers": -1},
        {"validation_split": -1},
        {"validation_split": 1.0},
        {"test_split": float("nan")},
        {"test_split": True},
        {"label_names": ["a"]},
        {"label_names": ["a", "a"]},
        {"path": "all.csv", "train_file": "train.csv"},
        {"path": None},
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict, make):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(**options)


@pytest.mark.parametrize(("options", "message"), [({"max_length": 2}, "no room"), ({"max_length": 65}, "64 tokens")])
def test_a_max_length_that_does_not_fit_the_tokenizer(options, message, make):
    with pytest.raises(ConfigError, match=message):
        make(**options).prepare_data()


def test_a_configuration_name_for_a_file(make, rows, write):
    with pytest.raises(ConfigError, match="sst2"):
        make(path=write("all.csv", rows), name="sst2").prepare_data()

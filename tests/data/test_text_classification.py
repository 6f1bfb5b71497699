"""The data module over real files: what is in a batch, how rows are divided, what it refuses, and a real Trainer."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.data import LengthBucketBatchSampler, TextClassificationData
from lightning_peft.data.loading import divide
from lightning_peft.data.tokenizing import PaddingCollator, Tokenize
from lightning_peft.errors import ConfigError, DataError

# Both from Lightning 2.6.6: the first with torch 2.13's pytree, the second on machines with many cores.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
]


@pytest.fixture
def make(tokenizer_dir: str, rows: list[dict], write: Callable[..., str]) -> Callable[..., TextClassificationData]:
    """Build the data module over the 100 rows in one file, or over what ``options`` say."""

    def make(**options) -> TextClassificationData:
        if not {"path", "train_file", "test_file", "predict_file"} & options.keys():
            options["path"] = write("all.csv", rows)
        return TextClassificationData(**{"tokenizer": tokenizer_dir, "max_length": 32, "batch_size": 8} | options)

    return make


def first_tokens(batch: dict) -> list[int]:
    """The id of the first word, which names the row (id of w0 is 4)."""
    return (batch["input_ids"][:, 1] - 4).tolist()


def load(data: TextClassificationData) -> TextClassificationData:
    data.prepare_data()
    data.setup("fit")
    return data


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_training_batch_is_padded_to_its_longest_row_and_nothing_else(make, rows):
    data = load(make(validation_split=0, test_split=0, bucket=False))
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    for index, row in enumerate(first_tokens(batch)):
        words = rows[row]["text"].split()
        expected = [2, *(4 + int(word[1:]) for word in words), 3]
        assert batch["input_ids"][index].tolist() == expected + [0] * (batch["input_ids"].shape[1] - len(expected))
        assert batch["attention_mask"][index].sum() == len(expected)
        assert batch["attention_mask"][index, : len(expected)].all()
        assert batch["labels"][index] == ("bad", "good").index(rows[row]["label"])
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]


def test_an_epoch_has_every_training_row_once(make):
    data = load(make())
    seen = [row for batch in data.train_dataloader() for row in first_tokens(batch)]
    rest = [
        row for loader in (data.val_dataloader(), data.test_dataloader()) for b in loader for row in first_tokens(b)
    ]
    assert sorted(seen + rest) == list(range(100))
    assert len(seen) == 80


def test_bucketing_pads_less(make):
    cells = {
        bucket: sum(b["input_ids"].numel() for b in load(make(bucket=bucket)).train_dataloader())
        for bucket in (True, False)
    }
    assert cells[True] < 0.8 * cells[False]


def test_evaluation_keeps_the_order_and_its_batch_size(make):
    data = load(make(validation_split=30, eval_batch_size=20))
    batches = list(data.val_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [20, 10]
    order = [row for batch in batches for row in first_tokens(batch)]
    assert order == sorted(order)


def test_predict_has_texts_and_no_labels(make, rows, write):
    path = write("new.csv", [{"text": row["text"]} for row in rows[:10]])
    data = make(predict_file=path)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert sorted(batches[0]) == ["attention_mask", "input_ids", "text", "token_type_ids"]
    assert [text for batch in batches for text in batch["text"]] == [row["text"] for row in rows[:10]]


def test_predict_without_a_file_takes_the_test_rows(make):
    data = load(make(test_split=7))
    texts = [text for batch in data.predict_dataloader() for text in batch["text"]]
    assert texts == data.splits["test"]["text"][:]
    assert len(texts) == 7


def test_predict_alone_needs_no_training_rows_and_then_knows_no_labels(make, rows, write):
    data = make(predict_file=write("new.csv", rows))
    data.setup("predict")
    assert list(data.splits) == ["predict"]
    with pytest.raises(DataError, match="label_names"):
        _ = data.label_names
    named = make(predict_file=write("new.csv", rows), label_names=["bad", "good"])
    named.setup("predict")
    assert named.num_labels == 2


def test_pairs_get_token_types_and_both_texts(make, rows, write):
    pairs = [row | {"other": "w50 w51"} for row in rows]
    data = make(path=write("pairs.csv", pairs), text_pair_column="other")
    data.setup()
    batch = next(iter(data.predict_dataloader()))
    assert batch["text_pair"] == ["w50 w51"] * len(batch["text"])
    assert (batch["token_type_ids"].sum(1) == 3).all()  # w50 w51 [SEP]
    assert "text_pair" not in next(iter(data.train_dataloader()))


def test_long_texts_are_cut_to_max_length(make):
    batch = next(iter(load(make(max_length=6, bucket=False)).train_dataloader()))
    assert batch["input_ids"].shape[1] == 6


def test_workers_give_the_same_batches(make):
    alone = [batch["input_ids"] for batch in load(make()).train_dataloader()]
    helped = [batch["input_ids"] for batch in load(make(num_workers=1)).train_dataloader()]
    assert all(torch.equal(one, other) for one, other in zip(alone, helped, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collator_pads_on_the_tokenizers_side_and_pickles(side: str):
    collate = pickle.loads(pickle.dumps(PaddingCollator(pad_token_id=9, pad_token_type_id=7, padding_side=side)))
    batch = collate([{"input_ids": [1, 2], "token_type_ids": [0, 1]}, {"input_ids": [3], "token_type_ids": [0]}])
    assert batch["input_ids"].tolist() == [[1, 2], [9, 3] if side == "left" else [3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1] if side == "left" else [1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1], [7, 0] if side == "left" else [0, 7]]


# --- files and splits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_all_kinds_of_files_give_the_same_rows(kind: str, make, rows, write, tmp_path):
    path = tmp_path / f"some [1] rows.{kind}"
    if kind in ("csv", "tsv"):
        write(path.name, rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    data = make(train_file=str(path), test_split=0, validation_split=0)
    data.setup("fit")
    assert data.splits["train"]["text"][:] == [row["text"] for row in rows]
    assert data.splits["train"]["labels"][:] == [("bad", "good").index(row["label"]) for row in rows]


def test_a_folder_keeps_its_splits_and_divides_what_is_missing(make, rows, write, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write("set/train.csv", rows[:80])
    write("set/test.csv", rows[80:])
    data = make(path=str(folder), validation_split=10)
    data.setup()
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 70, "test": 20, "validation": 10}


def test_a_saved_data_set_with_class_labels(make, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    train = datasets.Dataset.from_dict({"text": ["w1", "w2", "w3"] * 10, "label": [1, 0, 1] * 10}, features=features)
    withheld = datasets.Dataset.from_dict({"text": ["w4", "w5"], "label": [-1, -1]}, features=features)
    datasets.DatasetDict({"train": train, "test": withheld, "unsupervised": withheld}).save_to_disk(tmp_path / "set")
    data = make(path=str(tmp_path / "set"))
    data.setup("fit")
    assert data.label_names == ["no", "yes"]
    assert data.splits["test"]["text"][:] == ["w4", "w5"]
    with pytest.raises(DataError, match="no labels"):
        data.setup("test")
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["text"] == ["w4", "w5"]
    turned = make(path=str(tmp_path / "set"), label_names=["yes", "no"], validation_split=0)
    turned.setup("fit")
    assert turned.splits["train"]["labels"][:3] == [0, 1, 0]


def test_own_files_win_over_the_path(make, rows, write):
    data = make(path=write("all.csv", rows), test_file=write("test.csv", rows[:5]), validation_split=0)
    data.setup()
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 100, "test": 5}


def test_divide_is_a_partition_that_depends_on_the_seed_alone():
    parts = divide(1000, 0.1, 250, seed=1, origin="x")
    assert {split: len(rows) for split, rows in parts.items()} == {"validation": 100, "test": 250, "train": 650}
    assert sorted(row for rows in parts.values() for row in rows) == list(range(1000))
    assert parts == divide(1000, 0.1, 250, seed=1, origin="x")
    assert parts != divide(1000, 0.1, 250, seed=2, origin="x")
    # Pinned: published numbers stand on the division.
    assert divide(10, 2, 0.3, seed=0, origin="x") == {"validation": [3, 7], "test": [2, 5, 8], "train": [0, 1, 4, 6, 9]}


def test_a_small_share_is_at_least_one_row_and_none_is_none():
    assert {split: len(rows) for split, rows in divide(4, 0.1, 0, 0, "x").items()} == {"validation": 1, "train": 3}


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        ([2, 0, 1, 10], ["0", "1", "2", "10"], [2, 0, 1, 3]),  # as numbers, not as text
        ([0, 1, 1, 0], ["0", "1"], [0, 1, 1, 0]),
        ([3, 1, 3, 1], ["1", "3"], [1, 0, 1, 0]),
        (["b", "a", "c", "a"], ["a", "b", "c"], [1, 0, 2, 0]),
        ([True, False, True, True], ["False", "True"], [1, 0, 1, 1]),
        (["NA", "null", "None", "nan"], ["NA", "None", "nan", "null"], [0, 3, 1, 2]),  # no missing values, in csv too
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_inferred_labels(kind: str, labels, names, ids, make, write, tmp_path):
    rows = [{"text": f"w{index}", "label": label} for index, label in enumerate(labels)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = make(path=str(path) if kind == "jsonl" else write("rows.csv", rows), validation_split=0, test_split=0)
    data.setup("fit")
    assert data.label_names == names
    assert data.num_labels == len(names)
    assert data.splits["train"]["labels"][:] == ids


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["good", "bad"], ["good", "bad"], [0, 1]),
        ([0, 1], ["negative", "positive"], [0, 1]),  # integers as indices
        ([0, 1], ["1", "0"], [1, 0]),  # names that are numbers are names
        (["x", "y"], ["w", "x", "y"], [1, 2]),  # a label without training rows
    ],
)
def test_given_label_names(labels, names, ids, make, write):
    rows = [{"text": f"w{index}", "label": label} for index, label in enumerate(labels)]
    data = make(path=write("rows.csv", rows), label_names=names, validation_split=0, test_split=0)
    data.setup("fit")
    assert data.label_names == names
    assert data.splits["train"]["labels"][:] == ids


def test_check_head(make):
    data = load(make())
    data.check_head(2)
    data.check_head(5)
    with pytest.raises(DataError, match=r"1 outputs.*2 labels: 'bad', 'good'.*num_labels=2"):
        data.check_head(1)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_setup_is_idempotent_and_a_second_module_does_not_tokenize_again(make, rows, write, monkeypatch):
    calls = []
    tokenize = Tokenize.__call__
    monkeypatch.setattr(Tokenize, "__call__", lambda self, rows: calls.append(1) or tokenize(self, rows))
    options = {"train_file": write("train.csv", rows[:70]), "test_file": write("test.csv", rows[70:])}
    data = load(make(**options))
    assert len(calls) == 2
    before = data.splits
    data.prepare_data()
    data.setup("test")
    assert data.splits is before
    load(make(**options, split_seed=5, batch_size=3))
    assert len(calls) == 2
    load(make(**options, max_length=5))
    assert len(calls) == 4


def test_another_process_finds_the_tokenized_rows(make, rows, write, private_cache, tokenizer_dir):
    train, test = write("train.csv", rows[:70]), write("test.csv", rows[70:])
    load(make(train_file=train, test_file=test))
    files = sorted(private_cache.rglob("cache-*.arrow"))
    assert len(files) == 2
    code = (
        "import sys, datasets; from lightning_peft.data import TextClassificationData as Data;"
        f"Data({tokenizer_dir!r}, train_file={train!r}, test_file={test!r}, max_length=32).setup('fit')"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(private_cache), "PYTHONHASHSEED": "7"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert sorted(private_cache.rglob("cache-*.arrow")) == files


def test_importing_loads_neither_datasets_nor_more_of_transformers_than_lightning_does():
    code = (
        "import sys, lightning; before = set(sys.modules); import lightning_peft.data;"
        "print(*[m for m in set(sys.modules) - before if m.split('.')[0] in ('datasets', 'transformers', 'pandas')])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == ""


# --- bad input -------------------------------------------------------------------------------------------------------


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


# --- a real Trainer --------------------------------------------------------------------------------------------------


class Recorder(L.LightningModule):
    """Notes which rows it sees in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 2)
        self.seen: dict[int, list[list[int]]] = {}

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).append(first_tokens(batch))
        return self._loss(batch)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def predict_step(self, batch: dict, batch_idx: int) -> list[str]:
        return batch["text"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def _loss(self, batch: dict) -> torch.Tensor:
        scores = self.linear(batch["attention_mask"].sum(1, keepdim=True).float())
        return torch.nn.functional.cross_entropy(scores, batch["labels"])


def trainer(epochs: int, **options) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", max_epochs=epochs, **quiet | options)


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_sees_the_batches_of_a_straight_run(workers: int, bucket: bool, make, tmp_path):
    def run(epochs: int, ckpt_path: str | None = None) -> tuple[Recorder, L.Trainer]:
        module, fit = Recorder(), trainer(epochs)
        torch.manual_seed(os.getpid() + epochs)  # the order must not depend on it
        fit.fit(module, make(num_workers=workers, bucket=bucket), ckpt_path=ckpt_path, weights_only=True)
        return module, fit

    straight, fit = run(4)
    assert isinstance(fit.train_dataloader.batch_sampler, LengthBucketBatchSampler) is bucket
    assert [sorted(row for batch in straight.seen[epoch] for row in batch) for epoch in range(4)] == [
        sorted(row for batch in straight.seen[0] for row in batch)
    ] * 4
    assert len({str(straight.seen[epoch]) for epoch in range(4)}) == 4
    half, fit = run(2)
    fit.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(4, tmp_path / "half.ckpt")
    assert half.seen | resumed.seen == straight.seen
    assert list(resumed.seen) == [2, 3]


def test_all_stages_run(make, rows):
    data, module = make(test_split=10), Recorder()
    fit = trainer(1)
    fit.fit(module, data)
    assert "val_loss" in fit.callback_metrics
    fit.validate(module, data, verbose=False)
    texts = [text for batch in fit.predict(module, data) for text in batch]
    assert texts == data.splits["test"]["text"][:]


def test_a_run_without_validation_rows(make):
    module = Recorder()
    trainer(1).fit(module, make(validation_split=0))
    assert sum(map(len, module.seen[0])) == 90


def test_overfit_batches_sees_the_same_rows_each_epoch(make):
    module = Recorder()
    trainer(2, overfit_batches=2).fit(module, make())
    assert module.seen[0] == module.seen[1]
    assert len(module.seen[0]) == 2


def test_bad_data_stops_the_run_before_training(make):
    module = Recorder()
    with pytest.raises(DataError, match="txet"):
        trainer(1).fit(module, make(text_column="txet"))
    assert module.seen == {}


# --- the configs -----------------------------------------------------------------------------------------------------

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


def build(config: Path) -> L.LightningDataModule:
    """Build the data module as the command does."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    return parser.instantiate(parser.parse_args([f"--data={config}"])).data


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_the_configs_parse_and_open_with_their_command(config: Path):
    first = config.read_text().splitlines()[0]
    assert first == f"# lightning-peft fit --config configs/quickstart.yaml --data configs/data/{config.name}"
    assert isinstance(build(config), TextClassificationData)


def test_the_demo_config_gives_the_demo_data(monkeypatch):
    """The numbers in the documentation stand on these splits."""
    monkeypatch.chdir(Path(__file__).parents[2])
    subprocess.run([sys.executable, "examples/assets.py", "--cache", ".cache"], check=True)
    data = build(Path("configs/data/movie_sentences.yaml"))
    data.setup("fit")
    assert [len(data.splits[split]) for split in ("train", "validation", "test")] == [7171, 1000, 1000]
    assert data.label_names == ["negative", "positive"]
    batch = next(iter(data.train_dataloader()))
    assert (batch["input_ids"][:, 0] == 101).all()  # BERT's [CLS]
    cells = sum(batch["input_ids"].numel() for batch in data.train_dataloader())
    words = sum(int(batch["attention_mask"].sum()) for batch in data.train_dataloader())
    assert words > 0.95 * cells  # without bucketing 0.52

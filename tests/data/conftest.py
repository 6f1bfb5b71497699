"""A tiny real tokenizer, a private cache for ``datasets``, and small files of rows."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_peft.data import TextClassificationData


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what the tests load out of the user's cache, and the tests off the network."""
    import datasets
    import huggingface_hub

    cache = tmp_path_factory.mktemp("datasets-cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT-like tokenizer over the words w0 … w99: [PAD]=0, [UNK]=1, [CLS]=2, [SEP]=3, w0=4, …; 64 tokens at most."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return str(folder)


def sentence(number: int, words: int) -> str:
    """A text of ``words`` words whose first names the row."""
    return " ".join([f"w{number}", *(f"w{(number + step) % 100}" for step in range(1, words))])


@pytest.fixture
def rows() -> list[dict]:
    """100 rows, each of its own first word, 1 to 20 words long, labelled "bad" and "good" in turn."""
    return [
        {"text": sentence(number, 1 + (number * 7) % 20), "label": ("bad", "good")[number % 2]} for number in range(100)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a csv file (comma, or tab for .tsv) and return its path."""

    def write(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        return str(path)

    return write


@pytest.fixture
def make(tokenizer_dir: str, rows: list[dict], write: Callable[..., str]) -> Callable[..., TextClassificationData]:
    """Build the data module over the 100 rows in one file, or over what ``options`` say."""

    def make(**options) -> TextClassificationData:
        if not {"path", "train_file", "test_file", "predict_file"} & options.keys():
            options["path"] = write("all.csv", rows)
        return TextClassificationData(**{"tokenizer": tokenizer_dir, "max_length": 32, "batch_size": 8} | options)

    return make

"""A tiny text classifier and its data on disk, as a user has them: fixtures for tests of several folders."""

import random
from pathlib import Path

import pytest
import tokenizers
import transformers as hf

_WORDS = ["a", "the", "film", "plot", "acting", "is", "was", "fine", "dull", "very", "and", "so"]


@pytest.fixture
def tiny_text_model(tmp_path: Path) -> Path:
    """A folder with a one-layer BERT and its tokenizer."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path / "tiny_model"
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    config = hf.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    hf.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def sentiment_csv(tmp_path: Path) -> Path:
    """80 sentences: good if they say "fine", bad if they say "dull"."""
    chance = random.Random(0)
    rows = []
    for i in range(80):
        word, label = ("fine", "good") if i % 2 else ("dull", "bad")
        words = [*chance.choices([w for w in _WORDS if w not in ("fine", "dull")], k=chance.randint(2, 8)), word]
        chance.shuffle(words)
        rows.append(f"{' '.join(words)},{label}")
    path = tmp_path / "sentiment.csv"
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path

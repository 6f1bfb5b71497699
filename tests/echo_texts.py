"""Tiny language models with a tokenizer on disk, and data for them: words that are to be said again."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import tiny_models
import tokenizers
import torch
import transformers as hf
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "?"]
WORDS = [f"w{i}" for i in range(tiny_models.VOCABULARY - len(SPECIAL))]
ASK = SPECIAL.index("?")


def save_model(folder: Path, build: Callable[..., nn.Module] = tiny_models.llama, **fields: Any) -> str:
    """A model and its tokenizer, as a user has them."""
    torch.manual_seed(7)
    network: Any = build(**fields)
    network.save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


def rows(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts of one or two words, and what is to be said to each: the first one, then the end."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(5, 13) for _ in range(chance.choice((1, 2)))] for _ in range(count)]
    return [([1, *prompt, ASK], [prompt[0], 2]) for prompt in prompts]


def pad(rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], True, value, side)


class Echo(L.LightningDataModule):
    """The rows as batches of one of three kinds: for a decoder, packed for a decoder, for an encoder-decoder."""

    def __init__(self, kind: str = "causal", count: int = 32, size: int = 8) -> None:
        super().__init__()
        self.rows, self.size = rows(count), size
        self.collate = {"causal": self.causal, "packed": self.packed, "seq2seq": self.seq2seq}[kind]
        self.kind = kind

    def causal(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        ids = [prompt + goal for prompt, goal in rows]
        labels = [[-100] * len(prompt) + goal for prompt, goal in rows]
        mask = [[1] * len(row) for row in ids]
        return {"input_ids": pad(ids, 0), "attention_mask": pad(mask, 0), "labels": pad(labels, -100)}

    def packed(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """All in one row."""
        texts = [(prompt + goal, [-100] * len(prompt) + goal) for prompt, goal in rows]
        ids, labels = ([token for text in texts for token in text[i]] for i in (0, 1))
        positions = [i for text in texts for i in range(len(text[0]))]
        return {
            name: torch.tensor([row])
            for name, row in (("input_ids", ids), ("labels", labels), ("position_ids", positions))
        }

    def seq2seq(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        ids, labels = [prompt for prompt, _ in rows], [goal for _, goal in rows]
        mask = [[1] * len(row) for row in ids]
        return {"input_ids": pad(ids, 0), "attention_mask": pad(mask, 0), "labels": pad(labels, -100)}

    def asked(self, rows: list[Any]) -> dict[str, Any]:
        """To predict from."""
        side = "right" if self.kind == "seq2seq" else "left"
        ids = [prompt for prompt, _ in rows]
        said = [f"w{goal[0] - len(SPECIAL)}" for _, goal in rows]
        texts = [" ".join(f"w{i - len(SPECIAL)}" for i in prompt[1:-1]) for prompt in ids]
        mask = pad([[1] * len(row) for row in ids], 0, side)
        return {"input_ids": pad(ids, 0, side), "attention_mask": mask, "prompt": texts, "completion": said}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.size, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.size + 3, collate_fn=self.collate)  # batches of unequal sizes

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.size, collate_fn=self.asked)

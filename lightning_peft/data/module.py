"""What the data modules share: options, splits, what a stage needs, and loaders whose order can be resumed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_peft.data.sampler import EpochRandomSampler, LengthBucketBatchSampler, ResumableDataLoader
from lightning_peft.data.sources.loading import Source, divide, read_file, read_path
from lightning_peft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

Batching = tuple[Any, Callable[[list[Any]], dict[str, Any]]]
"""The data set that a loader indexes, and what makes a batch of its items."""

# What the trainer needs for a stage: the splits of which one must be there, and how to get one.
_NEEDED = {
    "fit": (("train",), "path or train_file"),
    "validate": (("validation",), "validation_file or a validation_split above 0"),
    "test": (("test",), "test_file or a test_split above 0"),
    "predict": (("predict", "test"), "predict_file, test_file or a test_split above 0"),
}


class RowsData(L.LightningDataModule, ABC):
    """Base of the data modules here: rows by split, read and tokenized once, then batches in a resumable order.

    A subclass says in :meth:`_load` what the rows are, and in :meth:`_batching` and :meth:`_lengths` what batches are
    made of.

    Args:
        tokenizer: Tokenizer of the model: a local folder or a name on the hub.
        path: A data set on the hub, a local folder, or one file with all rows: csv, tsv, json, jsonl, parquet, or for
            ``TextData`` txt, which is one text.
        name: Configuration of a hub data set, for instance ``sst2`` of ``glue``.
        train_file: File with the training rows, in place of ``path``.
        validation_file: File with the validation rows.
        test_file: File with the test rows.
        predict_file: File with the rows to predict, or the prompts to complete.
        validation_split: If there are no validation rows: how many of the training rows to take, as a number of rows
            (int) or a share in (0, 1) (float); 0 for none.
        test_split: The same for test rows.
        split_seed: Seed of these two and of the order of the training batches.
        max_length: Rows are cut to this many tokens, special ones included.
        batch_size: Rows of a training batch (on each device).
        eval_batch_size: Rows of a batch in validate, test and predict; by default ``batch_size``.
        bucket: True if training batches hold rows of similar length, which saves padding; of no use to rows that are
            joined or packed.
        num_workers: Processes that prepare batches; 0 for none besides the main one.

    Raises:
        ConfigError: If an argument has a value it cannot have.
        DataError: In ``prepare_data`` and ``setup``: if the data is not as described.
    """

    def __init__(
        self,
        tokenizer: str,
        path: str | None = None,
        name: str | None = None,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        *,
        validation_split: int | float = 0.1,
        test_split: int | float = 0.1,
        split_seed: int = 0,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        bucket: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, max_length=max_length, batch_size=batch_size)
        require_at_least(0, num_workers=num_workers)
        if eval_batch_size is not None:
            require_at_least(1, eval_batch_size=eval_batch_size)
        _require_split("validation_split", validation_split)
        _require_split("test_split", test_split)
        if path is not None and train_file is not None:
            raise ConfigError(f"path={path!r} and train_file={train_file!r} both hold training rows: give one of them.")
        self.files = {"train": train_file, "validation": validation_file, "test": test_file, "predict": predict_file}
        # Any file will do: a run that tests or predicts needs no training rows.
        if path is None and not any(self.files.values()):
            raise ConfigError("There is no data: give path, or train_file (or test_file or predict_file alone).")
        self.tokenizer = tokenizer
        self.path = path
        self.name = name
        self.validation_split = validation_split
        self.test_split = test_split
        self.split_seed = split_seed
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.bucket = bucket
        self.num_workers = num_workers
        self._splits: dict[str, Dataset] | None = None

    @property
    def splits(self) -> "dict[str, Dataset]":
        """The tokenized rows of each split there is: train, validation, test, predict."""
        if self._splits is None:
            raise DataError("The data is not loaded yet: call prepare_data() or setup() first.")
        return self._splits

    def prepare_data(self) -> None:
        """Read, check and tokenize everything: one process does it, the others find it in the cache of ``datasets``."""
        self._load_once()

    def setup(self, stage: str | None = None) -> None:
        """Load the data unless it is loaded, and check that the stage has rows.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"``, ``"predict"``, or None for whatever there is.

        Raises:
            DataError: If the data is not as described, or has no rows for the stage.
        """
        self._load_once()
        if "validation" not in self.splits:
            # To Lightning the hook is then not there, and it trains without validation. An empty loader makes it warn.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
        if stage is not None:
            self._require_stage(stage)

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches, the same in each epoch of that number."""
        common = self._loader_options("train")
        if getattr(self.trainer, "overfit_batches", 0) > 0:
            # Lightning turns shuffling off for this, but cannot tell that a custom batch sampler shuffles.
            return DataLoader(batch_size=self.batch_size, **common)
        sampler = EpochRandomSampler(range(len(common["dataset"])), seed=self.split_seed)
        lengths = self._lengths()
        if lengths is None:
            return ResumableDataLoader(sampler=sampler, batch_size=self.batch_size, **common)
        batches = LengthBucketBatchSampler(sampler, self.batch_size, False, lengths, seed=self.split_seed)
        return ResumableDataLoader(batch_sampler=batches, **common)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return self._eval_loader("validate")

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Return batches of ``predict_file``, else of the test rows, with their texts."""
        return self._eval_loader("predict")

    @abstractmethod
    def _load(self) -> "dict[str, Dataset]":
        """Return the tokenized rows by split."""

    @abstractmethod
    def _batching(self, split: str, predict: bool) -> Batching:
        """Return the rows of ``split`` for a loader, and what makes batches of them."""

    def _lengths(self) -> Sequence[int] | None:
        """Return the length of each training row for batches of similar length, or None for batches at random."""
        return self.splits["train"].with_format("numpy")["length"][:].tolist() if self.bucket else None

    def _load_once(self) -> None:
        if self._splits is None:
            self._splits = self._load()

    def _sources(self, read: Callable[[str, str], Source] = read_file) -> dict[str, Source]:
        """Read ``path`` and the files, by split; ``read`` reads one file."""
        sources = {} if self.path is None else read_path(self.path, self.name, read)
        return sources | {split: read(file, f"{split}_file") for split, file in self.files.items() if file is not None}

    def _divide(self, rows: int, there: Sequence[str], origin: str) -> dict[str, list[int]]:
        """Divide the numbers of the training rows into the splits that are not ``there``; {} if nothing is taken."""
        sizes = {"validation": self.validation_split, "test": self.test_split}
        sizes = {split: 0 if split in there else size for split, size in sizes.items()}
        if not any(sizes.values()):
            return {}
        return divide(rows, **sizes, seed=self.split_seed, origin=origin)

    def _require_stage(self, stage: str) -> str:
        """Return the split that serves the stage."""
        splits, remedy = _NEEDED[stage]
        found = next((split for split in splits if split in self.splits), None)
        if found is None:
            raise DataError(f"{stage}: there are no {splits[0]} rows: give {remedy}.")
        return found

    def _eval_loader(self, stage: str) -> DataLoader:
        options = self._loader_options(self._require_stage(stage), predict=stage == "predict")
        return DataLoader(batch_size=self.eval_batch_size or self.batch_size, **options)

    def _loader_options(self, split: str, predict: bool = False) -> dict[str, Any]:
        rows, collate = self._batching(split, predict)
        return {
            "dataset": rows,
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def require_at_least(least: int, **options: int) -> None:
    """Check options that are whole numbers.

    Raises:
        ConfigError: For the first that is none, or is below ``least``.
    """
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{option}={value!r} must be an integer of at least {least}.")


def require_choice(choices: Sequence[str], **options: str) -> None:
    """Check options that are one of a few words.

    Raises:
        ConfigError: For the first that is not among ``choices``.
    """
    for option, value in options.items():
        if value not in choices:
            raise ConfigError(f"{option}={value!r} must be one of {', '.join(map(repr, choices))}.")


def _require_split(option: str, size: int | float) -> None:
    if isinstance(size, bool) or not isinstance(size, int | float) or not (size >= 0):
        raise ConfigError(f"{option}={size!r} must be a number of rows (an int) or a share in (0, 1); 0 for none.")
    if isinstance(size, float) and size >= 1:
        raise ConfigError(f"{option}={size!r} is a float, hence a share, and must be below 1. For rows give an int.")

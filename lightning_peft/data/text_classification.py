"""Texts, or pairs of texts, with one label each: from files or the hub to padded batches."""

from typing import TYPE_CHECKING, Any

from lightning_peft.data.module import RowsData
from lightning_peft.data.sources.labels import find_label_ids, infer_label_names, is_unlabelled
from lightning_peft.data.sources.loading import Source, require_columns, require_text
from lightning_peft.data.sources.tokenizing import PaddingCollator, Tokenize, find_pad_token_id, load_tokenizer
from lightning_peft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset


class TextClassificationData(RowsData):
    """Classify texts, or pairs of texts.

    The rows are read, checked, tokenized once (``datasets`` keeps the result in its cache) and padded batch by batch.
    A batch is a dict of tensors: ``input_ids`` and ``attention_mask`` (rows, longest), ``token_type_ids`` if the
    tokenizer makes them, ``labels`` (rows,). In predict it has no ``labels``, but ``text`` (and ``text_pair``), a list
    of str. Predict reads ``predict_file`` (which needs no label column), else the test rows.

    The order of the training batches depends on ``split_seed`` and the epoch alone (under a distributed strategy on
    Lightning's global seed, too), so a resumed run, also one resumed in the middle of an epoch, sees the batches of a
    straight run.

    A split that is in the data is used as it is. Else it is taken from the training rows, at random by ``split_seed``.
    The texts "NA" and "null" in a csv file are texts; an empty text or label is an error. Integer labels 0 .. k-1 are
    the class indices; other labels are numbered in sorted order, or in the order of ``label_names``. A hub data set's
    test split with labels withheld (-1) serves for predict only.

    Args:
        args: ``tokenizer``, ``path``, … of :class:`~lightning_peft.data.module.RowsData`, by position.
        text_column: Column of the text.
        text_pair_column: Column of a second text, for tasks on pairs.
        label_column: Column of the label: text or integers.
        label_names: All labels, in the order of their indices. By default the names of the data set's ``ClassLabel``
            column, else the sorted distinct labels of the training rows.
        kwargs: Options of ``RowsData``.

    Raises:
        ConfigError: If an argument has a value it cannot have.
        DataError: In ``prepare_data`` and ``setup``: if the data is not as described.
    """

    def __init__(
        self,
        *args: Any,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        label_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if label_names is not None and (len(label_names) < 2 or len(set(label_names)) < len(label_names)):
            raise ConfigError(f"label_names={label_names!r} must be at least two different names.")
        self.text_column = text_column
        self.text_pair_column = text_pair_column
        self.label_column = label_column
        self._label_names = None if label_names is None else list(label_names)
        self._collate: PaddingCollator | None = None

    @property
    def label_names(self) -> list[str]:
        """The names of the classes in the order of their indices."""
        if self._label_names is None:
            if self._splits is None:
                raise DataError("The labels are not known yet: call prepare_data() or setup() first.")
            raise DataError("The labels are not known without training rows: give label_names.")
        return self._label_names

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return len(self.label_names)

    def check_head(self, num_labels: int) -> None:
        """Check that a head with ``num_labels`` outputs can hold every label of the data.

        Raises:
            DataError: If it is too small.
        """
        if num_labels < self.num_labels:
            raise DataError(
                f"The model's head has {num_labels} outputs, but the data has {self.num_labels} labels: "
                f"{', '.join(map(repr, self.label_names[:10]))}{', …' if self.num_labels > 10 else ''}. "
                f"Build the model with num_labels={self.num_labels}."
            )

    def _load(self) -> "dict[str, Dataset]":
        tokenizer, fresh = load_tokenizer(self.tokenizer, self.max_length, pair=self.text_pair_column is not None)
        collate = PaddingCollator(
            pad_token_id=find_pad_token_id(tokenizer),
            pad_token_type_id=tokenizer.pad_token_type_id,
            padding_side=tokenizer.padding_side,
        )
        sources = self._sources()
        columns = {"text_column": self.text_column, "text_pair_column": self.text_pair_column}
        # Whatever can be wrong with the rows is found before any are tokenized, which may take minutes.
        for split, source in sources.items():
            require_columns(source, columns | ({} if split == "predict" else {"label_column": self.label_column}))
            for option, column in columns.items():
                if column is not None:
                    require_text(source, column, option)
        names = self._label_names
        if names is None and "train" in sources:
            names = infer_label_names(sources["train"], self.label_column)
        ids = {split: self._label_ids(split, source, names) for split, source in sources.items()}
        train = sources.get("train")
        parts = {} if train is None else self._divide(len(train.rows), list(sources), train.origin)
        splits = {
            split: self._tokenize(split, source.rows, tokenizer, fresh, ids[split]) for split, source in sources.items()
        }
        splits |= {split: splits["train"].select(rows) for split, rows in parts.items()}
        self._label_names, self._collate = names, collate
        return splits

    def _label_ids(self, split: str, source: Source, names: list[str] | None) -> dict[Any, int] | None:
        """Return the class index by value of the label column, or None for rows that need no label."""
        if split == "predict" or (split == "test" and is_unlabelled(source, self.label_column)):
            return None
        if names is None:
            raise DataError(f"{source.origin}: without training rows the labels are not known: give label_names.")
        return find_label_ids(source, self.label_column, names)

    def _tokenize(
        self, split: str, rows: "Dataset", tokenizer: Any, fresh: str, ids: dict[Any, int] | None
    ) -> "Dataset":
        tokenize = Tokenize(
            tokenizer,
            fresh,
            max_length=self.max_length,
            text_column=self.text_column,
            text_pair_column=self.text_pair_column,
            label_column=self.label_column,
            label_ids=ids,
        )
        return rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}")

    def _require_stage(self, stage: str) -> str:
        found = super()._require_stage(stage)
        if stage != "predict" and "labels" not in self.splits[found].column_names:
            raise DataError(f"{stage}: the {found} rows of {self.path!r} have no labels (-1): they serve predict only.")
        return found

    def _batching(self, split: str, predict: bool) -> "tuple[Dataset, PaddingCollator]":
        rows = self.splits[split]
        wanted = ["input_ids", "token_type_ids", *(("text", "text_pair") if predict else ("labels",))]
        assert self._collate is not None  # made with the splits
        return rows.select_columns([column for column in wanted if column in rows.column_names]), self._collate

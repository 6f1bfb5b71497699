"""Reading batches of the data tests."""

from lightning_peft.data import TextClassificationData


def first_tokens(batch: dict) -> list[int]:
    """The id of the first word, which names the row (id of w0 is 4)."""
    return (batch["input_ids"][:, 1] - 4).tolist()


def load(data: TextClassificationData) -> TextClassificationData:
    data.prepare_data()
    data.setup("fit")
    return data

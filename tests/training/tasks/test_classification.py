"""The text-classification task on a tiny real model and tokenizer, saved to disk as a user has them."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from lightning_peft import LoRA, PEFTCallback
from lightning_peft.data import TextClassificationData
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.training.tasks.classification import TextClassifier, confusion_table


@pytest.fixture
def texts(tiny_text_model: Path, sentiment_csv: Path) -> TextClassificationData:
    return TextClassificationData(
        str(tiny_text_model), str(sentiment_csv), validation_split=8, test_split=8, batch_size=8, max_length=16
    )


def test_it_learns_tests_and_predicts_from_its_adapter_checkpoint(tiny_text_model, texts, trainer, tmp_path, capsys):
    torch.manual_seed(0)
    model = TextClassifier(str(tiny_text_model), lr=1e-2)
    fitting = trainer(PEFTCallback(LoRA(r=4), show=False), max_epochs=8)
    fitting.fit(model, texts)
    assert fitting.callback_metrics["val_accuracy"] == 1.0
    assert fitting.callback_metrics["val_f1"] == 1.0
    fitting.save_checkpoint(tmp_path / "task.ckpt")

    torch.manual_seed(1)  # another random head: the trained one comes from the file
    loaded = TextClassifier.load_from_checkpoint(tmp_path / "task.ckpt")
    assert loaded.label_names == ["bad", "good"]
    capsys.readouterr()
    [metrics] = trainer().test(loaded, texts, verbose=False)
    assert set(metrics) == {"test_loss", "test_accuracy", "test_f1"}
    assert metrics["test_accuracy"] == 1.0
    assert "Confusion matrix" in capsys.readouterr().out

    rows = [row for batch in trainer().predict(loaded, texts) for row in batch]
    assert len(rows) == 8
    for row in rows:
        assert row["label"] == ("good" if "fine" in row["text"] else "bad")
        assert 0.5 < row["probability"] <= 1


def test_texts_without_labels_are_predicted_with_the_names_from_the_checkpoint(
    tiny_text_model, texts, trainer, tmp_path
):
    model = TextClassifier(str(tiny_text_model))
    fitting = trainer(PEFTCallback(LoRA(r=4), show=False))
    fitting.fit(model, texts)
    fitting.save_checkpoint(tmp_path / "task.ckpt")
    (tmp_path / "new.csv").write_text("text\na fine film\na dull film\n")
    new = TextClassificationData(str(tiny_text_model), predict_file=str(tmp_path / "new.csv"), max_length=16)
    rows = trainer().predict(TextClassifier.load_from_checkpoint(tmp_path / "task.ckpt"), new)[0]
    assert [row["text"] for row in rows] == ["a fine film", "a dull film"]
    assert {row["label"] for row in rows} <= {"bad", "good"}


def test_the_loss_is_that_of_transformers(tiny_text_model, texts):
    model = TextClassifier(str(tiny_text_model)).eval()
    texts.setup("fit")
    batch = next(iter(texts.val_dataloader()))
    expected: Tensor = model.model(**batch).loss
    torch.testing.assert_close(model._loss(batch)[0], expected)


def test_a_decoder_without_a_padding_token_reads_padded_batches_as_single_rows(tmp_path):
    config = hf.GPT2Config(
        vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=3, bos_token_id=3
    )
    hf.GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    model = TextClassifier(str(tmp_path / "gpt2"), num_labels=3).eval()
    padded = {"input_ids": torch.tensor([[5, 6, 7], [8, 3, 3]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    alone = [model(input_ids=torch.tensor([row])) for row in ([5, 6, 7], [8])]
    torch.testing.assert_close(model(**padded), torch.cat(alone))


def test_only_the_new_head_is_expected_to_be_missing_from_the_files(tiny_text_model, tmp_path):
    network = hf.AutoModel.from_pretrained(tiny_text_model)
    state = {key: tensor for key, tensor in network.state_dict().items() if "pooler" not in key}
    network.save_pretrained(tmp_path / "headless", state_dict=state)
    with pytest.warns(UserWarning, match=r"2 tensors of the base .*'bert\.pooler\.dense\.bias'.*modules_to_save"):
        TextClassifier(str(tmp_path / "headless"))


def test_a_head_too_small_for_the_labels_is_an_error(tiny_text_model, tmp_path, trainer):
    rows = "\n".join(f"a fine film,{i % 3}" for i in range(30))
    (tmp_path / "three.csv").write_text(f"text,label\n{rows}\n")
    data = TextClassificationData(str(tiny_text_model), str(tmp_path / "three.csv"), max_length=16)
    with pytest.raises(DataError, match="num_labels=3"):
        trainer(PEFTCallback(LoRA(r=4), show=False)).fit(TextClassifier(str(tiny_text_model)), data)


def test_a_model_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no model to classify texts"):
        TextClassifier(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="num_labels=1"):
        TextClassifier(str(tmp_path), num_labels=1)
    with pytest.raises(ConfigError, match=r"dropout=1\.0"):
        TextClassifier(str(tmp_path), dropout=1.0)


def test_dropout_is_that_of_the_pretrained_model_unless_given(tiny_text_model, texts):
    texts.setup("fit")
    batch = next(iter(texts.val_dataloader()))
    for dropout, same in ((None, True), (0.5, False), (0.0, True)):  # the tiny model is pretrained with none
        model = TextClassifier(str(tiny_text_model), dropout=dropout).train()
        assert torch.equal(model._loss(batch)[0], model._loss(batch)[0]) is same


def test_the_confusion_matrix_has_true_labels_down_and_predicted_ones_across():
    table = confusion_table(torch.tensor([[5, 1], [2, 7]]), ["no", "yes"])
    assert [list(column.cells) for column in table.columns] == [["no", "yes"], ["5", "2"], ["1", "7"]]

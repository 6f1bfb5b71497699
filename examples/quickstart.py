"""The demo in Python: `python examples/quickstart.py` (about four minutes on two CPU cores).

LoRA on all-MiniLM-L6-v2, to tell negative from positive film-review sentences; the same as
`lightning-peft fit --config configs/quickstart.yaml`.
"""

import sys

import lightning as L
from assets import model_dir, movie_sentences

from lightning_peft import LoRA, PEFTCallback, load_from_checkpoint
from lightning_peft.data import TextClassificationData
from lightning_peft.training.tasks.classification import TextClassifier


def main(epochs: int = 3, folder: str = "checkpoints/python") -> None:
    L.seed_everything(0)
    base, sentences = str(model_dir()), str(movie_sentences())  # fetched on the first run
    data = TextClassificationData(
        base, sentences, label_names=["negative", "positive"], validation_split=1000, test_split=1000, max_length=64
    )
    model = TextClassifier(base, num_labels=2, lr=1e-3)

    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=[PEFTCallback(LoRA(r=8, alpha=16))]
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(f"{folder}/sentiment.ckpt", weights_only=True)  # the adapter and the head, nothing else

    # Elsewhere: the class, the base model and this one small file.
    loaded = load_from_checkpoint(TextClassifier, f"{folder}/sentiment.ckpt")
    trainer.test(loaded, data)
    for prediction in trainer.predict(loaded, data)[0][:3]:
        print(prediction)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

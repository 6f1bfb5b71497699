"""LoRA, IA3 and the prompts against the peft package: with the same weights both compute the same."""

import pytest
import tiny_models
import torch
from methods.peft_pairs import METHODS, MODELS, ask_peft, generated_by_peft, pair
from torch import Tensor

pytestmark = [
    pytest.mark.compat,
    # peft asks transformers a question by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

# peft's MLP is as wide as keys are, ours as the model: with grouped queries these differ.
CASES = [(method, model) for method in METHODS for model in MODELS if (method, model) != ("PrefixTuning-mlp", "llama")]


def _batch(model: str) -> dict[str, Tensor]:
    """Rows of two lengths, and what the model's head is to learn."""
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 5))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    labels = torch.tensor([0, 1]) if model == "bert" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("method", "model"), CASES)
def test_outputs_and_loss_equal_pefts(method: str, model: str) -> None:
    ours, theirs = pair(method, model)
    batch = _batch(model)
    mine, other = ours(**batch), ask_peft(lambda: theirs(**batch))
    expected = other.logits
    # peft leaves its virtual tokens in the output.
    if model in ("gpt2", "llama"):
        expected = expected[:, -batch["input_ids"].shape[1] :]
    torch.testing.assert_close(mine.logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.loss, other.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "model"), [case for case in CASES if case[1] != "bert"])
def test_ten_greedy_tokens_equal_pefts(method: str, model: str) -> None:
    ours, theirs = pair(method, model)
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 4))
    mask = torch.ones_like(ids)
    if method not in ("PromptTuning", "PTuning-mlp", "PTuning-lstm") or model == "t5":
        mask[1, :2] = 0  # behind a prompt, peft counts padding as positions
    given = {"input_ids": ids, "attention_mask": mask}
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    mine, other = ours.generate(**given, **settings), generated_by_peft(theirs, **given, **settings)
    assert torch.equal(mine.sequences, other.sequences)
    assert len(mine.logits) == 10
    torch.testing.assert_close(mine.logits, other.logits, rtol=1e-5, atol=1e-5)

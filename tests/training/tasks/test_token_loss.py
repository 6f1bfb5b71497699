"""The loss without logits, against transformers' own, and what it holds in memory."""

from collections.abc import Callable
from typing import Any

import perturbation
import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers as hf
from benchmarks.measuring import peak_bytes
from conformance.matrix import fitted, library_methods
from conformance.models import MODELS
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import BottleneckAdapter, LinearProbe, LoRA, PromptTuning, SelectiveTuning, inject, route
from lightning_peft.core.method import Method
from lightning_peft.errors import NotApplicableError
from lightning_peft.training.tasks.token_loss import (
    chunked_cross_entropy,
    count_tokens,
    loss_form,
    next_tokens,
    splits_by_token,
    transparent,
    without_first,
)

CAUSAL = [
    tiny_models.gpt2,
    tiny_models.llama,
    tiny_models.qwen3,
    tiny_models.gemma3,
    tiny_models.mistral,
    tiny_models.mixtral,
    lambda: tiny_models.gemma2(final_logit_softcapping=None),
    lambda: tiny_models.bart(hf.BartForCausalLM),  # its own loss does not shift
]
FORMS = [
    *((build, True, "chunks") for build in CAUSAL),
    (tiny_models.t5, False, "chunks"),
    (tiny_models.gemma2, True, "logits"),
    (tiny_models.cohere, True, "logits"),
    (tiny_models.granite, True, "logits"),
    (tiny_models.bart, False, "logits"),  # has a bias behind its head
    (lambda: tiny_models.mixtral(output_router_logits=True), True, "own"),
]


@pytest.mark.parametrize(("build", "shifted", "form"), FORMS)
def test_what_stands_between_the_head_and_the_loss_is_found(build: Callable[[], Any], shifted: bool, form: str) -> None:
    assert loss_form(build(), shifted) == form


@pytest.mark.parametrize("method", [None, PromptTuning(num_virtual_tokens=3), LoRA(target_modules=["lm_head"])])
def test_asking_changes_neither_the_model_nor_a_random_number(method: Method | None) -> None:
    model = tiny_models.llama().train()
    model.model.layers[0].eval()
    if method:
        inject(model, method)
    before, random = Snapshot(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    assert loss_form(model, shifted=True) == "chunks"
    before.assert_same(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())


def losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ours and transformers' own."""
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    with transparent(head := model.get_output_embeddings()):
        hidden = model(**inputs, use_cache=False).logits
    assert hidden.shape == (*batch["labels"].shape, tiny_models.WIDTH)
    return chunked_cross_entropy(head, hidden, next_tokens(batch["labels"])), model(**batch).loss


def assert_same_losses(model: Any, batch: dict[str, Tensor]) -> None:
    training = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = losses(model, batch)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-6, atol=1e-6)
    found, expected = (torch.autograd.grad(3 * loss, training, allow_unused=True) for loss in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


HEADS = {
    "by LoRA": LoRA(r=2, target_modules=["lm_head", "q_proj"]),
    "by a bottleneck": BottleneckAdapter(target_modules=["lm_head"], reduction_factor=4),
    "fully trained": LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "alone": LinearProbe(modules_to_save=["lm_head"]),
    "in a few rows, tied": SelectiveTuning(token_ids=[3, 5]),
}
METHODS = {method.__name__: method for method in library_methods()}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, tiny_models.VOCABULARY, (4, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = labels[2, 3] = -100
    labels = without_first(labels)  # else transformers counts it behind virtual tokens alone
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2, tiny_models.gemma3, tiny_models.mixtral])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_and_its_gradients_are_those_of_transformers(build: Callable[[], Any], training: bool) -> None:
    model = perturbation.adapted(build(), LoRA(r=2))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_same_losses(model.train(training), batch())


@pytest.mark.parametrize("method", METHODS)
def test_with_every_method(method: str) -> None:
    model = tiny_models.llama()
    try:
        perturbation.adapted(model, fitted(METHODS[method](), MODELS["Llama (GQA)"]))
    except NotApplicableError:
        return
    assert_same_losses(model, batch())


@pytest.mark.parametrize("head", HEADS)
def test_with_an_adapted_head(head: str) -> None:
    model = perturbation.adapted(tiny_models.llama(), HEADS[head])
    assert splits_by_token(model.lm_head)
    assert_same_losses(model, batch())


def test_in_double_precision_with_a_head_that_has_a_bias() -> None:
    model = tiny_models.llama(tie_word_embeddings=False).double()
    model.lm_head = nn.Linear(tiny_models.WIDTH, tiny_models.VOCABULARY, dtype=torch.float64)
    assert_same_losses(model, batch())


def test_in_16_bits_losses_are_summed_in_32() -> None:
    model = perturbation.adapted(tiny_models.llama().bfloat16(), LoRA(r=2))
    ours, theirs = losses(model, batch())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = losses(perturbation.adapted(tiny_models.llama(), LoRA(r=2)), batch())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_a_gate_on_the_head_sees_rows_whole() -> None:
    model = tiny_models.llama()
    assert splits_by_token(model.lm_head)
    inject(model, LoRA(r=2, target_modules=["lm_head"], gating=True))
    assert not splits_by_token(model.lm_head)


def test_rows_routed_to_adapters_of_the_head_stay_together() -> None:
    model = tiny_models.llama()
    inject(model, LoRA(r=2, target_modules=["lm_head"]), "one")
    with route(model, ["one", None]):
        assert not splits_by_token(model.lm_head)
    assert splits_by_token(model.lm_head)


def test_counted_are_the_labels_that_are_guessed_right() -> None:
    model = tiny_models.gpt2().eval()
    texts = batch()
    logits = model(texts["input_ids"], attention_mask=texts["attention_mask"]).logits[:, :-1]
    labels = texts["labels"][:, 1:]
    with transparent(model.lm_head):
        hidden = model(texts["input_ids"], attention_mask=texts["attention_mask"]).logits
    loss, right, count = count_tokens(model.lm_head, hidden, next_tokens(texts["labels"]))
    assert count == (labels != -100).sum()
    assert right == ((logits.argmax(-1) == labels) & (labels != -100)).sum()
    torch.testing.assert_close(loss / count, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_the_first_token_of_each_packed_text_is_predicted_by_none() -> None:
    labels, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1]])
    assert next_tokens(without_first(labels, positions)).tolist() == [[6, 7, -100, 9, -100]]
    assert next_tokens(labels).tolist() == [[6, 7, 8, 9, -100]]


def test_without_any_label_the_loss_is_nothing() -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    loss = chunked_cross_entropy(nn.Linear(4, 5), hidden, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("adapted", [False, True])
def test_it_never_holds_an_eighth_of_the_logits(adapted: bool) -> None:
    """4 texts of 256 tokens; SmolLM's vocabulary (49,152) and width (576) would only take longer."""
    head = nn.Linear(32, 12288, bias=False).requires_grad_(False)
    if adapted:
        head = nn.Sequential(head)
        inject(head, LoRA(r=2, target_modules=["0"]))
    hidden, labels = torch.randn(1024, 32, requires_grad=True), torch.randint(12288, (1024,))
    logits = 1024 * 12288 * 4
    assert peak_bytes(lambda: chunked_cross_entropy(head, hidden, labels).backward(), "cpu") < logits / 8
    assert hidden.grad.any()
    assert peak_bytes(lambda: count_tokens(head, hidden, labels), "cpu") < logits / 8

"""Training decoders to go on from prompts, with real Trainers, on tiny real models and tokenizers on disk."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import perturbation
import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers as hf
from conformance.matrix import fitted, library_methods
from conformance.models import MODELS
from echo_texts import ASK, WORDS, Echo, save_model

from lightning_peft import LoRA, PEFTCallback, PrefixTuning, PromptTuning, inject
from lightning_peft.core.method import Method
from lightning_peft.errors import ConfigError, DataError, NotApplicableError
from lightning_peft.training.tasks.causal_lm import CausalLM, keeps_texts_apart
from lightning_peft.training.tasks.completions import completion_table, labelled_span

METHODS = {method.__name__: method for method in library_methods()}
REFUSED = ("BitFit", "LinearProbe")  # Llama has no biases, and a language model no new head


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return save_model(tmp_path / "llama")


def fit(trainer: Callable[..., L.Trainer], module: CausalLM, method: Method, data: Echo, **options: Any) -> L.Trainer:
    fitting = trainer(PEFTCallback(method, show=False), num_sanity_val_steps=0, **options)
    fitting.fit(module, data)
    return fitting


def learned(trainer: Callable[..., L.Trainer], module: CausalLM, method: Method, data: Echo, **options: Any) -> Any:
    """The metrics after a fit, which has made the loss smaller than that of the fresh adapter."""
    inject(module, method)
    fitting = trainer(num_sanity_val_steps=0, **options)
    before = fitting.validate(module, data, verbose=False)[0]["val_loss"]
    fitting.fit(module, data)
    assert fitting.callback_metrics["val_loss"] < before
    return fitting.callback_metrics


@pytest.mark.compat
def test_it_learns_tests_and_predicts_from_its_adapter_checkpoint(llama, trainer, tmp_path, capsys):
    module = CausalLM(llama, lr=2e-2, max_new_tokens=4)
    fitting = fit(trainer, module, LoRA(r=8), Echo(), max_epochs=25)
    shown = capsys.readouterr().out
    assert "expected" in shown
    assert "generated" in shown
    assert fitting.callback_metrics["val_accuracy"] > 0.95  # of 64 words
    fitting.save_checkpoint(tmp_path / "task.ckpt")
    assert all(".peft." in key for key in torch.load(tmp_path / "task.ckpt", weights_only=True)["state_dict"])

    loaded = CausalLM.load_from_checkpoint(tmp_path / "task.ckpt")
    [metrics] = trainer().test(loaded, Echo(), verbose=False)
    assert set(metrics) == {"test_loss", "test_accuracy", "test_perplexity"}
    assert metrics["test_loss"] == pytest.approx(fitting.callback_metrics["val_loss"].item(), rel=1e-4)
    rows = [row for batch in trainer().predict(loaded, Echo()) for row in batch]
    assert len(rows) == 32
    assert all(row["expected"] == row["prompt"].split()[0] for row in rows)
    wrong = [row for row in rows if row["completion"] != row["expected"]]
    assert len(wrong) <= round(64 * (1 - metrics["test_accuracy"]))


@pytest.mark.compat
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_writes_the_same_with_and_without_a_cache(name, llama, trainer):
    module, data = CausalLM(llama, lr=1e-2, max_new_tokens=5, samples=0), Echo()
    method = fitted(METHODS[name](), MODELS["Llama (GQA)"])
    if name in REFUSED:
        with pytest.raises(NotApplicableError):
            fit(trainer, module, method, data)
        return
    assert learned(trainer, module, method, data, max_epochs=2)
    perturbation.perturb(module.eval(), by=0.1)
    ids = data.asked(data.rows[:8])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ids = {key: ids[key] for key in ("input_ids", "attention_mask")}
    written = module.model.generate(**ids, **settings)
    assert torch.equal(written, module.model.generate(**ids, **settings, use_cache=False))
    assert written.shape[1] == ids["input_ids"].shape[1] + 5


FORMS = {
    tiny_models.llama: "chunks",
    tiny_models.gpt2: "chunks",
    tiny_models.gemma2: "logits",
    tiny_models.granite: "logits",
    partial(tiny_models.mixtral, output_router_logits=True): "own",
}


@pytest.mark.parametrize("build", FORMS)
@pytest.mark.parametrize("method", [LoRA(r=2), PromptTuning(num_virtual_tokens=3)])
def test_the_loss_of_a_run_and_its_scores_are_those_of_the_logits(build, method, trainer, tmp_path):
    module, data = CausalLM(save_model(tmp_path / "model", build), samples=0, dropout=0.0), Echo()
    inject(module, method)
    perturbation.perturb(module)
    batch = data.causal(data.rows[:8])
    fitting = trainer(max_steps=1, limit_val_batches=0)
    expected = module.model(**batch).loss
    fitting.fit(module, data)
    torch.testing.assert_close(fitting.callback_metrics["train_loss"], expected, rtol=1e-5, atol=0)
    assert module._form() == FORMS[build]

    module.eval()
    whole = data.causal(data.rows)
    labels = whole["labels"][:, 1:].flatten()
    logits = module(**whole)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, labels)
    [metrics] = trainer().validate(module, data, verbose=False)
    assert metrics["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    right = (logits.argmax(-1) == labels)[labels != -100]
    assert metrics["val_accuracy"] == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_gradients_are_those_of_transformers_micro_batch_by_micro_batch(options, llama, trainer):
    data = Echo(count=24)
    module = CausalLM(llama, samples=0, lr=0.1, **options)
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    plain = hf.AutoModelForCausalLM.from_pretrained(llama)
    for network in (module, plain):
        torch.manual_seed(3)
        inject(network, LoRA(r=2))
    trainer(accumulate_grad_batches=3, limit_val_batches=0).fit(module, data)
    own = [p for p in plain.parameters() if p.requires_grad]
    losses = [plain(**data.causal(data.rows[i : i + 8])).loss / 3 for i in (0, 8, 16)]
    for p, gradient in zip(own, torch.autograd.grad(sum(losses), own), strict=True):
        p.data -= 0.1 * gradient
    trained = [p for p in module.parameters() if p.requires_grad]
    for one, other in zip(trained, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [LoRA(r=4), PromptTuning(num_virtual_tokens=3), PrefixTuning(num_virtual_tokens=3)])
def test_mixed_precision_with_checkpointing_and_accumulation(method, llama, trainer):
    module = CausalLM(llama, lr=1e-2, gradient_checkpointing=True, max_new_tokens=3)
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2}
    metrics = learned(trainer, module, method, Echo(), max_epochs=4, **options)
    assert metrics["train_loss"].dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_a_16_bit_base_trains_adapters_in_32(llama, trainer):
    module = CausalLM(llama, lr=1e-2, max_new_tokens=3)
    fitting = fit(trainer, module, LoRA(r=4), Echo(), max_epochs=4, precision="bf16-true")
    assert module.model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in module.trainable_parameters()} == {torch.float32}
    assert fitting.callback_metrics["train_loss"].dtype == torch.float32


def test_checkpointed_layers_are_run_again(llama):
    calls: dict[bool, int] = {}
    for checkpointing in (False, True):
        module = CausalLM(llama, gradient_checkpointing=checkpointing)
        inject(module, LoRA(r=2))
        runs: list[int] = []
        module.model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))  # noqa: B023
        inputs, labels, _ = module.read(Echo().causal(Echo().rows[:2]))
        module.model(**inputs, labels=labels, use_cache=False).loss.backward()
        calls[checkpointing] = len(runs)
    assert calls == {False: 1, True: 2}


PACKABLE = [LoRA(r=2), PrefixTuning(num_virtual_tokens=3), LoRA(r=2, target_modules=["lm_head"])]


@pytest.mark.parametrize("method", PACKABLE)
@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2, tiny_models.mistral])
def test_packed_texts_give_the_loss_of_the_same_texts_apart(method, build, trainer, tmp_path):
    if build is tiny_models.gpt2 and method is PACKABLE[1]:
        build = tiny_models.qwen3
    module = CausalLM(save_model(tmp_path / "model", build), samples=0, dropout=0.0)
    inject(module, method)
    perturbation.perturb(module)
    packed, apart = (trainer().validate(module, Echo(kind), verbose=False)[0] for kind in ("packed", "causal"))
    assert packed == pytest.approx(apart, rel=1e-4)
    fitting = trainer(limit_val_batches=0, max_steps=1)
    fitting.fit(module, Echo("packed"))
    assert fitting.callback_metrics["train_loss"].isfinite()


REFUSING = [PromptTuning(num_virtual_tokens=3), LoRA(r=2, gating=True)]


@pytest.mark.parametrize("method", REFUSING)
def test_packed_texts_are_refused_where_a_row_must_be_one_text(method, llama, trainer):
    module = CausalLM(llama, samples=0)
    with pytest.raises(NotApplicableError, match=r"'model[\w.]*' takes a row for one text.*packing=False"):
        fit(trainer, module, method, Echo("packed"))
    one = Echo("packed", count=4, size=1)  # every row is one text, so nothing is amiss
    one.val_dataloader = one.train_dataloader
    assert fit(trainer, CausalLM(llama, samples=0), method, one).callback_metrics["val_loss"].isfinite()


def test_packed_texts_are_refused_where_the_model_reads_them_as_one(trainer, tmp_path):
    config = hf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40, state_size=4, initializer_range=0.5)
    module = CausalLM(save_model(tmp_path / "mamba", lambda: hf.MambaForCausalLM(config)), samples=0)
    assert not keeps_texts_apart(module.model)
    with pytest.raises(NotApplicableError, match=r"MambaForCausalLM lets each text .*packing=False"):
        fit(trainer, module, LoRA(r=2, target_modules=["in_proj"]), Echo("packed"))
    assert fit(trainer, module, LoRA(r=2, target_modules=["in_proj"]), Echo()).callback_metrics["val_loss"].isfinite()


def test_samples_are_the_first_rows_and_go_on_from_their_prompts(llama, trainer, capsys):
    module = CausalLM(llama, max_new_tokens=3, samples=3)
    shown: list[Any] = []
    complete = module._complete
    module._complete = lambda examples: shown.extend(complete(examples)) or shown
    trainer().validate(module, Echo(size=1), verbose=False)
    rows = Echo().rows[:3]
    words = {i: word for i, word in enumerate(WORDS, 5)} | {ASK: "?"}
    assert [row["prompt"] for row in shown] == [" ".join(words[i] for i in prompt[1:]) for prompt, _ in rows]
    assert [row["expected"] for row in shown] == [words[goal[0]] for _, goal in rows]
    alone = [module.write(torch.tensor([prompt]), torch.ones(1, len(prompt))) for prompt, _ in rows]
    assert [[row["completion"]] for row in shown] == alone
    assert "Samples" in capsys.readouterr().out


def test_the_sanity_check_shows_what_the_base_writes(llama, trainer, capsys):
    trainer(PEFTCallback(LoRA(r=2), show=False), max_epochs=1).fit(CausalLM(llama, max_new_tokens=3), Echo())
    shown = capsys.readouterr().out
    assert shown.count("Samples before training") == 1
    assert shown.count("Samples") == 2


def test_examples_of_packed_rows_and_of_texts_without_a_prompt(llama):
    module = CausalLM(llama)
    packed = Echo().packed([([1, 6, ASK], [6, 2]), ([1, 7, ASK], [7, 2])])
    [(prompt, goal)] = module.examples(packed, 2)
    assert (prompt.tolist(), goal.tolist()) == ([1, 6, ASK], [6, 2])
    ids = torch.tensor([[1, 6, 7, 2]])
    [(prompt, goal)] = module.examples({"input_ids": ids, "labels": ids}, 2)
    assert (prompt.tolist(), goal.tolist()) == ([1], [6, 7, 2])
    assert labelled_span(torch.tensor([-100, -100])) == (2, 2)
    assert labelled_span(torch.tensor([-100, 3, 4, -100, 5])) == (1, 3)


def test_square_brackets_are_shown_as_they_are(capsys):
    import rich

    rich.print(completion_table([{"prompt": "[bold]a[/bold]", "completion": "[/x]"}]))
    assert "[bold]a[/bold]" in capsys.readouterr().out


def test_writing_behind_padding_is_refused(llama, trainer):
    data = Echo()
    data.asked = lambda rows: {key: x for key, x in data.causal(rows).items() if key != "labels"}
    with pytest.raises(DataError, match="padding_side='left'"):
        trainer().predict(CausalLM(llama), data)


def test_arguments_out_of_range_and_what_is_missing(llama, trainer, tmp_path):
    for wrong in ({"max_new_tokens": 0}, {"samples": -1}, {"dropout": 1.0}, {"lr": 0}):
        with pytest.raises(ConfigError, match=f"CausalLM: {next(iter(wrong))}="):
            CausalLM(llama, **wrong)
    with pytest.raises(ConfigError, match="no model to write texts with"):
        CausalLM(str(tmp_path / "nothing"))
    tiny_models.llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"no tokenizer.*samples=0"):
        fit(trainer, CausalLM(str(tmp_path / "bare")), LoRA(r=2), Echo())
    assert fit(trainer, CausalLM(str(tmp_path / "bare"), samples=0), LoRA(r=2), Echo()).global_step == 4
    checkpointed = CausalLM(llama, gradient_checkpointing=True, samples=0)
    with pytest.raises(ConfigError, match="frozen_mode='eval'"):
        trainer(PEFTCallback(LoRA(r=2), show=False, frozen_mode="eval")).fit(checkpointed, Echo())

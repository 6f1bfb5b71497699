"""LayerNorm tuning against the peft package and against plain torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from peft import LNTuningConfig, get_peft_model
from plain_training import IDS, Run, assert_leaves_no_trace, assert_trains_as_plain_torch, logits, trained, translated
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

from lightning_peft import LayerNormTuning, LoRA, inject, merge, remove
from lightning_peft.errors import NotApplicableError, TargetError
from lightning_peft.network.norms import find_norms


class Normed(nn.Module):
    """One norm of each kind that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.batch, self.instance, self.group = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)
        self.layer, self.rms, self.bare = (
            nn.LayerNorm((2, 2)),
            nn.RMSNorm(16),
            nn.LayerNorm(16, elementwise_affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.group(self.instance(self.batch(self.conv(x)))))
        return self.bare(self.rms(x.flatten(1)).tanh())


def _image(model: nn.Module) -> Tensor:
    output = model(torch.linspace(-1, 1, 96).sin().view(2, 3, 4, 4))
    return getattr(output, "logits", output)


def _pixels(model: nn.Module) -> Tensor:
    return model(torch.linspace(-9, 9, 384).sin().view(2, 3, 8, 8)).logits


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    "bert": (tiny_models.bert, logits),
    "llama": (tiny_models.llama, logits),
    "gpt2": (tiny_models.gpt2, logits),
    "t5": (tiny_models.t5, translated),
    "vit": (tiny_models.vit, _pixels),
    "torch": (Normed, _image),
}


def _norms(model: nn.Module) -> list[str]:
    """Told by the names of classes, which the library does not look at."""
    owners = [path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in owners]


@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_that_of_the_norms_themselves(name: str) -> None:
    build, run = NETWORKS[name]
    model = build()
    names = _norms(model)
    assert_trains_as_plain_torch(model, LayerNormTuning(modules_to_save=None), names, run)
    expected = run(model)
    merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)


# peft's own words on norms, and a question of it to transformers by an old name.
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (tiny_models.bert, ["LayerNorm"]),
        (tiny_models.llama, ["input_layernorm", "post_attention_layernorm", "norm"]),
        (tiny_models.gpt2, ["ln_1", "ln_2", "ln_f"]),
    ],
    ids=["bert", "llama", "gpt2"],
)
def test_with_the_same_values_it_computes_what_peft_does(build: Callable[[], nn.Module], targets: list[str]) -> None:
    ours = build().eval()
    theirs = get_peft_model(copy.deepcopy(ours), LNTuningConfig(target_modules=targets)).eval()
    report = inject(ours, LayerNormTuning(target_modules=targets, modules_to_save=None))
    training = dict(theirs.named_parameters())
    assert report.trainable == sum(p.numel() for p in training.values() if p.requires_grad)
    assert len(report.hosts) == len(find_norms(ours))
    moved = 0
    with torch.no_grad():
        for path, norm in find_norms(ours):
            copied = theirs.base_model.model.get_submodule(path).ln_tuning_layers["default"]
            for key, value in copied.named_parameters():
                value.add_(0.3 * torch.randn_like(value))
                norm.peft.default.get_parameter(key).copy_(value)
                moved += value.numel()
    assert moved == report.trainable

    classified = {"labels": torch.tensor([0, 1])} if "classifier" in ours._modules else {"labels": IDS}
    ours_out, theirs_out = ours(IDS, **classified), theirs(input_ids=IDS, **classified)
    torch.testing.assert_close(ours_out.logits, theirs_out.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_out.loss, theirs_out.loss, rtol=1e-5, atol=1e-5)
    ours_out.loss.backward()
    theirs_out.loss.backward()
    for path, norm in find_norms(ours):
        copied = theirs.base_model.model.get_submodule(path).ln_tuning_layers["default"]
        for key, value in copied.named_parameters():
            torch.testing.assert_close(norm.peft.default.get_parameter(key).grad, value.grad, rtol=1e-4, atol=1e-5)
    if ours.can_generate():
        options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
        text = [model.generate(input_ids=IDS[:1], **options) for model in (ours, theirs)]
        assert text[0].shape == (1, 14)
        assert torch.equal(*text)


def test_the_affine_part_of_a_batchnorm_trains_and_its_statistics_stay() -> None:
    model = Normed().train()
    for _ in range(3):
        _image(model)  # statistics as after some training
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = inject(model, LayerNormTuning(target_modules=["batch"]))
    assert report.trainable == 8
    assert set(dict(model.batch.peft.default.named_buffers())) == set()
    evaluated = _image(model.eval())
    acting = _image(model.train())
    torch.testing.assert_close(acting, evaluated, rtol=1e-4, atol=1e-5, msg="the frozen norm does not run in eval")
    losses = trained(model, _image)
    assert losses[-1] < losses[0]
    for name, buffer in before.items():
        assert_identical(model.get_buffer(name), buffer, name)


@pytest.mark.parametrize("name", ["bert", "torch"])
def test_disabled_and_removed_every_bit_of_the_base_is_back(name: str) -> None:
    build, run = NETWORKS[name]
    assert_leaves_no_trace(build(), LayerNormTuning(), run)


@pytest.mark.parametrize(
    ("build", "fields", "expected"),
    [
        (tiny_models.bert, {}, 5 * 32),
        (tiny_models.bert, {"target_modules": ["attention.output.LayerNorm"]}, 2 * 32),
        (tiny_models.bert, {"target_modules": ["encoder"]}, 4 * 32),
        (tiny_models.bert, {"layers": [1]}, 2 * 32),
        (tiny_models.bert, {"exclude_modules": ["embeddings"]}, 4 * 32),
        (
            tiny_models.llama,
            {"target_modules": ["norm"]},
            5 * 16,
        ),  # the word, not only the last one, which is called so
        (tiny_models.llama, {"target_modules": ["model.norm"]}, 16),
        (tiny_models.llama, {"exclude_modules": ["model.norm"]}, 4 * 16),
        (tiny_models.t5, {"target_modules": r"decoder\..*"}, (2 * 3 + 1) * 16),
        (Normed, {}, 4 * 2 * 4 + 16),
    ],
)
def test_fields_choose_the_norms(build: Callable[[], nn.Module], fields: dict[str, Any], expected: int) -> None:
    assert inject(build(), LayerNormTuning(modules_to_save=None, **fields)).trainable == expected


def test_it_acts_beside_another_method() -> None:
    model = tiny_models.bert().eval()
    inject(model, LoRA(r=2, target_modules=["query"], modules_to_save=None), "lora")
    inject(model, LayerNormTuning(), "norms")
    assert len(trained(model, logits)) == 3
    both = logits(model)
    remove(model, "lora")
    assert (logits(model) - both).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("build", "fields", "error", "message"),
    [
        (lambda: nn.Linear(4, 4), {}, NotApplicableError, "Linear has no norm to train"),
        (lambda: nn.LayerNorm(4, elementwise_affine=False), {}, NotApplicableError, "LayerNorm has no norm to train"),
        (tiny_models.bert, {"target_modules": ["query"]}, NotApplicableError, "first '.*query', none has any norm"),
        (tiny_models.bert, {"target_modules": ["LayrNorm"]}, TargetError, "Did you mean 'LayerNorm'"),
        (
            Normed,
            {"modules_to_save": ["batch", "instance", "group", "layer", "rms"]},
            NotApplicableError,
            "but those th",
        ),
        (Normed, {"exclude_modules": "norm"}, TargetError, "nothing is left to train in Normed"),
    ],
)
def test_what_does_not_fit_is_an_error_that_helps_and_changes_nothing(
    build: Callable[[], nn.Module], fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, LayerNormTuning(**fields))
    before.assert_same(model)

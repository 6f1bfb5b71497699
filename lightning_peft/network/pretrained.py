"""The part of a transformers model that is not its pretrained base, recognised by the model's own interface."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_peft.network.walk import Beside, join, modules_outside, within


def task_heads(model: nn.Module) -> list[str]:
    """Paths of the task heads: new layers beside the base model, such as ``classifier``.

    A language-model head is pretrained and is no task head. Networks other than transformers models have none.
    """
    heads: list[str] = []
    for path, pretrained in pretrained_models(model):
        if pretrained.get_output_embeddings() is None:
            heads += _beside_base(path, pretrained)
    return heads


def outside_base(model: nn.Module) -> list[str]:
    """Paths of everything in transformers models that is not the base model: task heads and output embeddings."""
    paths: list[str] = []
    for path, pretrained in pretrained_models(model):
        paths += _beside_base(path, pretrained)
        output = pretrained.get_output_embeddings()
        paths += [join(path, name) for name, module in pretrained.named_modules() if module is output]
    return paths


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules with which transformers models look up their input tokens; models without tokens have none."""
    found = (pretrained.get_input_embeddings() for _, pretrained in pretrained_models(model))
    return [module for module in found if isinstance(module, nn.Embedding)]


def pretrained_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost transformers models, known by what every ``PreTrainedModel`` offers; nothing is imported."""
    found: list[str] = []
    for path, module in modules_outside(model):
        pretrained = hasattr(type(module), "base_model_prefix") and hasattr(module, "get_output_embeddings")
        if pretrained and not within(path, found):
            found.append(path)
            yield path, module


def _beside_base(path: str, pretrained: Any) -> list[str]:
    base = pretrained.base_model
    children = [(name, child) for name, child in pretrained.named_children() if not isinstance(child, Beside)]
    if base is pretrained:
        # A few classes hold the parts of their base themselves (T5ForQuestionAnswering): a head has one output a label.
        labels = getattr(pretrained.config, "num_labels", None)
        heads = [name for name, child in children if isinstance(child, nn.Linear) and child.out_features == labels]
    else:
        inside = {id(parameter) for parameter in base.parameters()}
        heads = [name for name, child in children if any(id(p) not in inside for p in child.parameters())]
    return [join(path, name) for name in heads]

"""Pretrained transformers models, ready to be trained."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_peft.errors import ConfigError


def load_pretrained(auto_class: str, model: str, purpose: str, **options: Any) -> Any:
    """Load a model, in train mode and with a padding token.

    Args:
        auto_class: the class of transformers that finds the model's own, such as ``"AutoModelForCausalLM"``.
        model: name or path.
        purpose: what it is needed for, for messages: ``"to write texts with"``.
        options: for ``from_pretrained``.

    Raises:
        ConfigError: there is no such model.
    """
    import transformers  # slow to import, and only needed here

    try:
        with _quiet():
            network, info = getattr(transformers, auto_class).from_pretrained(
                model, output_loading_info=True, **options
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no model {purpose} at {model!r}: {str(error).strip().splitlines()[0]} "
            "Give a folder with config.json and weights, or a model name on the hub. (The demo's is fetched by "
            "`python examples/assets.py`.)"
        ) from error
    # A language-model head is pretrained; another one is new, and fully trained.
    base = "" if network.get_output_embeddings() is not None else f"{network.base_model_prefix}."
    if fresh := sorted(key for key in info["missing_keys"] if key.startswith(base)):
        warnings.warn(
            f"{len(fresh)} tensors of the base are not in {model!r} and start at random, first '{fresh[0]}'. An "
            "adapter checkpoint would not hold them: add their modules to modules_to_save.",
            stacklevel=3,
        )
    config = network.config.get_text_config()
    if config.pad_token_id is None:  # GPT-2, Llama: the data module pads with the end-of-text token, too
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    # transformers returns models in eval mode and Lightning keeps the mode it finds: dropout would stay off.
    return network.train()


def check_dropout(name: str, dropout: float | None) -> None:
    """Raise unless ``dropout`` is a probability that leaves something, or None.

    Raises:
        ConfigError: it is not.
    """
    if dropout is not None and not 0 <= dropout < 1:
        raise ConfigError(f"{name}: dropout={dropout} must be at least 0 and less than 1.")


def set_dropout(model: nn.Module, dropout: float | None) -> None:
    """Give every dropout layer of ``model`` this probability; None leaves them as they were pretrained."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout


def checkpoint_layers(model: Any) -> None:
    """Let ``model`` compute each layer again in the backward and keep no activations inside of it.

    Raises:
        ConfigError: it has no layers that it could do so with.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"gradient_checkpointing=True: {type(model).__name__} has no support for it. Leave it out.")
    # "gradient" in older versions of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # It also lets the embeddings' output require a gradient, for the other kind: that would only lengthen the backward.
    model.disable_input_require_grads()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting the new head, which is expected, and from drawing a progress bar."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

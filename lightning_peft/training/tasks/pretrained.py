"""Pretrained transformers models, ready to be trained."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_peft.errors import ConfigError


def load_pretrained(auto_class: str, model: str, purpose: str, dropout: float | None, **options: Any) -> Any:
    """Load a model, in train mode and with a padding token.

    Args:
        auto_class: the class of transformers that finds the model's own, such as ``"AutoModelForCausalLM"``.
        model: name or path.
        purpose: what it is needed for, for messages: ``"to write texts with"``.
        dropout: probability of all its dropout layers; None leaves them as they were pretrained.
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
    for module in network.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout
    # transformers returns models in eval mode and Lightning keeps the mode it finds: dropout would stay off.
    return network.train()


def load_tokenizer(path: str, owner: str, purpose: str, remedy: str) -> Any:
    """Load a tokenizer.

    Args:
        path: name or path.
        owner: the class that needs it, for the message.
        purpose: what it is needed for, for the message: ``"to show texts with"``.
        remedy: what else the user can do, for the message.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{owner} finds no tokenizer at {path!r} {purpose}. Put one beside the model (save_pretrained), {remedy}."
        ) from error


def tensors_to_read(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``batch`` that a model reads: all but the labels, and no texts."""
    return {key: value for key, value in batch.items() if isinstance(value, Tensor) and key != "labels"}


def check_dropout(owner: str, dropout: float | None) -> None:
    """Raise unless ``dropout`` is a probability that leaves something, or None.

    Raises:
        ConfigError: it is not.
    """
    if dropout is not None and not 0 <= dropout < 1:
        raise ConfigError(f"{owner}: dropout={dropout} must be at least 0 and less than 1.")


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

    # Both are settings of the whole process: they go back to what the user had.
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

"""Every method that the peft package has, there and back: what one writes computes the same in the other.

Nothing here names a method: those with a table or a format of their own are found, and each field that the table names
is tried with another value than its default.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from conformance.cells import methods
from methods.peft_pairs import ask_peft, peft_calls
from perturbation import perturb
from torch import Tensor

from lightning_peft import Method, inject, load_adapter, save_adapter
from lightning_peft.checkpoints.peft.formats import format_of
from lightning_peft.core.fields import declared_fields, fits

pytestmark = [
    pytest.mark.compat,
    # peft asks transformers a question by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
    # It takes the nearest block that fits, as we do, and says so.
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning"),
    # It warns of what it is told to do.
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
    # What it says of every norm.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
BASES = {"bert": tiny_models.bert, "llama": tiny_models.llama}
IDS = torch.tensor([[9, 7, 12, 33, 21, 8], [8, 7, 5, 11, 3, 4]])
_OTHER: tuple[Any, ...] = (2, 3, 4.0, 0.5, True, False)  # the first one that fits and differs


def _methods() -> Iterator[Any]:
    for cls in methods():
        form = format_of(cls)
        if form is None:
            continue
        few = {"num_virtual_tokens": 3} if "num_virtual_tokens" in cls.field_names() else {}
        yield pytest.param(cls(**few), id=cls.__name__)
        for name in form.table.fields:
            declared = declared_fields(cls)[name]
            other = next(v for v in _OTHER if fits(v, declared) and v != getattr(cls(), name))
            yield pytest.param(cls(**few, **{name: other}), id=f"{cls.__name__}-{name}={other}")


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS).logits
    return logits[:, -IDS.shape[1] :] if logits.dim() == 3 else logits  # peft leaves its prompt in


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", [*_methods()])
def test_what_one_writes_computes_the_same_in_the_other(method: Method, base: str, tmp_path: Path) -> None:
    bare = BASES[base]().eval()
    ours = copy.deepcopy(bare)
    inject(ours, _not_fully(method))
    perturb(ours, by=0.2)
    save_adapter(ours.eval(), tmp_path / "ours")
    expected = _logits(ours)
    assert not torch.allclose(expected, _logits(bare), atol=1e-3)

    config = peft.PeftConfig.from_pretrained(str(tmp_path / "ours"))
    ask_peft(lambda: _logits(peft.get_peft_model(copy.deepcopy(bare), config)))
    with peft_calls():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(tmp_path / "ours")).eval()
        found = _logits(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = copy.deepcopy(bare)
    load_adapter(back, tmp_path / "theirs")
    torch.testing.assert_close(_logits(back.eval()), expected, rtol=1e-5, atol=1e-5)


def _not_fully(method: Method) -> Method:
    """Without modules_to_save, which are no matter of a method."""
    return replace(method, modules_to_save=None)  # type: ignore[type-var]

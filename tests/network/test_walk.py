import pytest
import torch
from torch import nn

from lightning_peft.network.walk import is_wrapper, plain_name


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("net._orig_mod.0.weight", "net.0.weight"),
        ("_orig_mod", ""),
        ("_orig_mod._checkpoint_wrapped_module.head", "head"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("", ""),
    ],
)
def test_what_torch_puts_into_a_name_is_left_out(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_a_compiled_module_is_a_wrapper_and_the_one_inside_is_not() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    assert is_wrapper(compiled)
    assert not is_wrapper(compiled._orig_mod)

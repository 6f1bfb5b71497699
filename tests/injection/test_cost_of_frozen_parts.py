"""What is frozen costs nothing: no gradient, no optimizer state, no second copy, and below the adapters no backward."""

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise, product

import pytest
import tiny_models
import torch
from benchmarks.measuring import bytes_kept
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    BitFit,
    BottleneckAdapter,
    DoRA,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    SelectiveTuning,
    inject,
)
from lightning_peft.core.method import Method

LAYERS = 4
IDS = torch.tensor([[9, 7, 12, 33, 21, 8], [8, 7, 5, 11, 3, 4]])
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny_models.llama(num_hidden_layers=LAYERS),
    "bert": lambda: tiny_models.bert(num_hidden_layers=LAYERS),
}
METHODS: dict[str, Callable[..., Method]] = {
    "lora": lambda **fields: LoRA(r=2, **fields),
    "dora": lambda **fields: DoRA(r=2, **fields),
    "ia3": IA3,
    "houlsby": lambda **fields: BottleneckAdapter(width=2, **fields),
    "pfeiffer": lambda **fields: BottleneckAdapter(preset="pfeiffer", width=2, **fields),
    "parallel": lambda **fields: BottleneckAdapter(preset="parallel", width=2, **fields),
    "adapter_plus": lambda **fields: BottleneckAdapter(preset="adapter_plus", width=2, **fields),
    "prefix": lambda **fields: PrefixTuning(num_virtual_tokens=2, **fields),
    "norms": LayerNormTuning,
    "biases": BitFit,
    "selected": lambda **fields: SelectiveTuning(target_modules=["query"], **fields),
}
PAIRS = [pair for pair in product(MODELS, METHODS) if pair != ("llama", "biases")]  # it has none
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "fp16 autocast": (torch.float32, torch.float16),
}
STEPS = [
    # In other precisions than fp32, `make test` takes a method that writes into outputs, one beside them, one before.
    pytest.param(
        *(model, method, precision),
        marks=[] if precision == "fp32" or method in ("lora", "pfeiffer", "prefix") else [pytest.mark.soak],
    )
    for model, method in PAIRS
    for precision in PRECISIONS
    if method != "dora" and (model == "bert" or precision == "fp32")  # DoRA notes the norm of each row of a weight
]


def _loss(model: nn.Module) -> Tensor:
    labels = {"labels": IDS if "CausalLM" in type(model).__name__ else torch.tensor([0, 1])}
    loss: Tensor = model(IDS, **labels).loss
    return loss


@pytest.fixture
def _only_new() -> Iterator[None]:
    """Hides from :func:`_live` what there is already: a hundred thousand things, looked through at each call."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _live() -> int:
    """Bytes of all tensors that have been made since and are still alive, each memory once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _recorded(model: nn.Module) -> list[bool]:
    """Filled in by the next forward: whether the output of each block has a backward."""
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == LAYERS)
    recorded: list[bool] = []
    for block in blocks:
        block.register_forward_hook(lambda *call: recorded.append(call[2].requires_grad))
    return recorded


def _nodes(loss: Tensor) -> int:
    """How many operations the backward of ``loss`` has."""
    seen, pending = set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [below for below, _ in node.next_functions]
    return len(seen)


@pytest.mark.usefixtures("_only_new")
@pytest.mark.parametrize(("model", "method", "precision"), STEPS)
def test_a_step_leaves_the_adapters_their_gradients_and_their_optimizer_state(
    model: str, method: str, precision: str
) -> None:
    dtype, autocast = PRECISIONS[precision]
    network = MODELS[model]().to(dtype).train()
    before = _live()
    inject(network, METHODS[method]())
    trained = [p for p in network.parameters() if p.requires_grad]
    size = sum(p.untyped_storage().nbytes() for p in trained)
    added = [p for name, p in network.named_parameters() if ".peft." in name]
    assert _live() - before == sum(p.untyped_storage().nbytes() for p in added)

    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)  # all of them, as many users write it
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = _loss(network)
    loss.backward()
    optimizer.step()
    del loss
    assert all((p.grad is None) != p.requires_grad for p in network.parameters())
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained}
    assert _live() - before == sum(p.untyped_storage().nbytes() for p in added) + 2 * size


@pytest.mark.parametrize(("model", "method"), PAIRS)
def test_below_the_first_adapter_nothing_is_kept_and_nothing_runs_backward(model: str, method: str) -> None:
    kept, nodes = [], []
    for first in reversed(range(LAYERS)):
        network = MODELS[model]().train()
        inject(network, METHODS[method](layers=list(range(first, LAYERS))))
        recorded = _recorded(network)
        nodes.append(_nodes(_loss(network)))
        assert recorded == [i >= first for i in range(LAYERS)]
        kept.append(bytes_kept(network, lambda: _loss(network)))  # noqa: B023
    for counts in (kept, nodes):
        first, *others = (b - a for a, b in pairwise(counts))
        assert first >= others[0] > 0  # with the first one comes what all share, such as the angles of positions
        assert len(set(others)) == 1, f"each layer more costs the same: {counts}"

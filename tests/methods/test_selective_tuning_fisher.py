"""Entries picked by their mean squared gradient, while training begins."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from plain_training import loss_of, masked, trained
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import SelectiveTuning, inject, merge, remove
from lightning_peft.checkpoints.ckpt import adapter_keys, adapter_state
from lightning_peft.errors import NotApplicableError
from lightning_peft.methods.selective_tuning import ScoredEntries

BATCHES, DENSITY = 3, 0.1
METHOD = SelectiveTuning(
    parameter_types=["weight"], density=DENSITY, score="fisher", score_batches=BATCHES, modules_to_save=None
)


def _batches() -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(5)
    while True:
        yield torch.randint(1, tiny_models.VOCABULARY, (2, 4), generator=random)


def _run(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def _score(model: nn.Module, batches: int = BATCHES) -> None:
    for ids, _ in zip(_batches(), range(batches), strict=False):
        loss_of(_run(model, ids)).backward()


def _base() -> nn.Module:
    torch.manual_seed(3)
    return tiny_models.bert().eval()


def _adapted(**fields: Any) -> nn.Module:
    model = _base()
    inject(model, SelectiveTuning(**{**vars(METHOD), **fields}))
    return model


def _scored(model: nn.Module) -> dict[str, ScoredEntries]:
    return {
        path.partition(".peft.")[0] + ".weight": module
        for path, module in model.named_modules()
        if isinstance(module, ScoredEntries)
    }


def _fisher() -> dict[str, Tensor]:
    """Where the mean squared gradient is largest, in plain torch."""
    model = _base()
    weights = {n: p for n, p in model.named_parameters() if ("layer" in n or "pooler" in n) and p.dim() == 2}
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for ids, _ in zip(_batches(), range(BATCHES), strict=False):
        model.zero_grad()
        loss_of(_run(model, ids)).backward()
        for name, p in weights.items():
            total[name] += p.grad.square()
    masks = {}
    for name, score in total.items():
        k = round(DENSITY * score.numel())
        masks[name] = torch.zeros(score.numel(), dtype=torch.bool)
        masks[name][score.flatten().sort(descending=True).indices[:k]] = True
        masks[name] = masks[name].view_as(score)
    return masks


def _masks(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, adapter in _scored(model).items():
        mask = torch.zeros(model.get_parameter(name).numel(), dtype=torch.bool)
        mask[adapter.index] = True
        found[name] = mask.view_as(model.get_parameter(name))
    return found


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name


def test_the_entries_are_those_with_the_largest_mean_squared_gradient() -> None:
    model = _adapted()
    assert len(_scored(model)) == 2 * 6 + 1
    _score(model)
    _assert_same(_masks(model), _fisher())


def test_while_it_scores_it_is_the_base_and_values_get_a_zero_gradient() -> None:
    model, base = _adapted(), _base()
    for i, (ids, _) in enumerate(zip(_batches(), range(BATCHES), strict=False)):
        model.zero_grad()
        torch.testing.assert_close(_run(model, ids), _run(base, ids))
        assert all(adapter.seen == i for adapter in _scored(model).values())
        loss_of(_run(model, ids)).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(gradient is not None and not gradient.any() for gradient in gradients)
        assert not any(p.grad is not None for n, p in model.named_parameters() if ".peft." not in n)
    torch.testing.assert_close(_run(model, ids), _run(base, ids))
    loss_of(_run(model, ids)).backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_afterwards_it_trains_as_those_entries_do_in_plain_torch() -> None:
    model = _adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for ids, _ in zip(_batches(), range(BATCHES), strict=False):  # as a training loop would, from the first step on
        optimizer.zero_grad()
        loss_of(_run(model, ids)).backward()
        optimizer.step()
    expected = masked(_base(), _fisher())
    torch.testing.assert_close(_run(model, ids), _run(expected, ids), rtol=1e-2, atol=1e-2)  # one step of decay
    for name, adapter in _scored(model).items():
        with torch.no_grad():
            adapter.values.copy_(model.get_parameter(name).flatten()[adapter.index])
    losses = trained(expected, lambda m: _run(m, ids), weight_decay=0)
    found = trained(model, lambda m: _run(m, ids), weight_decay=0)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-4, atol=1e-6)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".peft." not in name}
    merge(model)
    torch.testing.assert_close(_run(model, ids), _run(expected, ids), rtol=1e-3, atol=1e-5)
    for name, mask in _fisher().items():
        assert not (model.get_parameter(name) != before[name])[~mask].any()


def test_only_backward_passes_count() -> None:
    model = _adapted()
    ids = next(_batches())
    with torch.no_grad():
        _run(model, ids)
    with torch.inference_mode():
        _run(model, ids)
    _run(model, ids)
    _run(model.train(), ids)
    assert {int(adapter.seen) for adapter in _scored(model).values()} == {0}
    assert all(adapter.score is None for adapter in _scored(model).values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_where_the_original_was(how: str) -> None:
    model = _adapted()
    _score(model, 1)
    duplicate = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    batches = _batches()
    next(batches)
    for _ in range(BATCHES - 1):
        loss_of(_run(duplicate, next(batches))).backward()
    _assert_same(_masks(duplicate), _fisher())
    assert {int(adapter.seen) for adapter in _scored(model).values()} == {1}


def test_what_was_scored_is_saved_and_a_resumed_run_does_not_score_again() -> None:
    model = _adapted()
    assert {key.rpartition(".")[2] for key in adapter_keys(model)} == {"values", "index", "seen"}
    _score(model)
    trained(model, lambda m: _run(m, next(_batches())))
    file = io.BytesIO()
    torch.save(adapter_state(model), file)
    file.seek(0)
    resumed = _adapted()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    ids = next(_batches())
    assert_identical(_run(resumed, ids), _run(model, ids))
    loss_of(_run(resumed, ids)).backward()
    assert {int(adapter.seen) for adapter in _scored(resumed).values()} == {BATCHES}
    assert all(p.grad.any() for p in resumed.parameters() if p.requires_grad)


def test_a_run_that_is_resumed_while_it_scores_ends_with_as_many_batches() -> None:
    model, resumed = _adapted(), _adapted()
    _score(model, 2)
    resumed.load_state_dict(adapter_state(model))
    assert {int(adapter.seen) for adapter in _scored(resumed).values()} == {2}
    _score(resumed, 1)
    assert {int(adapter.seen) for adapter in _scored(resumed).values()} == {BATCHES}
    ids = next(_batches())
    torch.testing.assert_close(_run(resumed, ids), _run(_base(), ids))
    loss_of(_run(resumed, ids)).backward()
    assert all(adapter.values.any() for adapter in _scored(resumed).values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_scores_each_pass_once(reentrant: bool) -> None:
    model = _adapted()
    model.bert.get_input_embeddings().register_forward_hook(lambda m, args, y: y.requires_grad_())
    # renamed within transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _score(model)
    assert {int(adapter.seen) for adapter in _scored(model).values()} == {BATCHES}
    _assert_same(_masks(model), _fisher())


def test_a_whole_model_may_be_recomputed() -> None:
    model = _adapted()
    for ids, _ in zip(_batches(), range(BATCHES), strict=False):
        loss_of(checkpoint(lambda ids=ids: _run(model, ids), use_reentrant=False)).backward()
    _assert_same(_masks(model), _fisher())


def test_gradients_that_are_not_finite_do_not_spoil_the_scores() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2))
    inject(model, SelectiveTuning(target_modules=["0"], density=0.5, score="fisher", score_batches=2))
    for gradient in ([[1.0, 0.5, 0.2], [0.1, 3.0, 2.0]], [[1.0, float("nan"), 0.2], [float("inf"), 3.0, 2.0]]):
        (model[0](torch.eye(3)) * torch.tensor(gradient).T).sum().backward()
    assert model[0].peft.get_submodule("default:weight").index.tolist() == [0, 4, 5]


def test_a_layer_that_runs_twice_in_a_pass_is_scored_twice() -> None:
    shared = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 2))
    inject(model, SelectiveTuning(target_modules=["0"], density=0.5, score="fisher", score_batches=3))
    adapter = shared.peft.get_submodule("default:weight")
    x = torch.randn(4, 3)
    for seen in (2, 3):
        model(x).square().sum().backward()
        assert adapter.seen == seen
    start = shared.weight.detach().flatten()[adapter.index]
    assert_identical(adapter.values.detach(), start)
    model(x).square().sum().backward()
    assert adapter.seen == 3
    assert adapter.values.grad.any()


def test_beside_a_bf16_base_scores_and_values_are_fp32() -> None:
    model = _adapted().bfloat16()
    _score(model, 1)
    assert {adapter.score.dtype for adapter in _scored(model).values()} == {torch.float32}
    _score(model, BATCHES - 1)
    ids = next(_batches())
    torch.testing.assert_close(_run(model, ids), _run(_base().bfloat16(), ids), rtol=0.02, atol=0.02)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_removed_or_merged_while_it_scores_it_leaves_the_base() -> None:
    for undo in (remove, merge):
        model = _base()
        before = Snapshot(model)
        inject(model, METHOD)
        _score(model, 1)
        undo(model)
        before.assert_same(model)


# The graph breaks while it scores. Torch silences this in a way that "error" overrules.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_scores_and_then_trains() -> None:
    torch._dynamo.reset()
    build: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))  # noqa: E731
    torch.manual_seed(0)
    plain = build()
    method = SelectiveTuning(parameter_types=["weight"], density=0.3, score="fisher", score_batches=2)
    model = copy.deepcopy(plain)
    inject(plain, method)
    inject(model, method)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(3, 6)
    for _ in range(4):
        loss_of(plain(x)).backward()
        loss_of(compiled(x)).backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        if p.requires_grad:
            assert p.grad.any()
            torch.testing.assert_close(q.grad, p.grad, msg=name)
    torch._dynamo.reset()


def test_a_tied_matrix_is_refused() -> None:
    model = tiny_models.llama()
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=r"'model.embed_tokens.weight' is tied to 'lm_head.weight'.*magnitude"):
        inject(model, SelectiveTuning(density=0.1, score="fisher"))
    before.assert_same(model)
    inject(model, SelectiveTuning(density=0.1, score="fisher", exclude_modules=["lm_head"]))


RANK = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from lightning_peft import SelectiveTuning, inject

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 4))
inject(model, SelectiveTuning(target_modules=["0"], density=0.2, score="fisher", score_batches=2))
ddp = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
torch.manual_seed(rank)  # each has other data
for _ in range(4):
    optimizer.zero_grad()
    ddp(torch.randn(8, 12)).square().sum().backward()
    optimizer.step()
torch.save(model.state_dict(), f"{out}.{rank}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_that_train_together_pick_the_same_entries(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(i), str(tmp_path / "store"), str(tmp_path / "state")]) for i in range(2)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (torch.load(tmp_path / f"state.{i}", weights_only=True) for i in range(2))
    assert first["0.peft.default:weight.seen"] == 2
    for key, tensor in first.items():
        assert_identical(second[key], tensor, key)

"""What ``import lightning_peft`` loads, and what it offers."""

import subprocess
import sys

import pytest

import lightning_peft
from lightning_peft.core.method import registered_methods

pytestmark = pytest.mark.compat

ADDED = """
import sys
import torch
before = set(sys.modules)
import lightning_peft
print("\\n".join(sorted(set(sys.modules) - before)))
"""

WITHOUT_LIGHTNING = """
import sys
for absent in ("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "datasets", "jsonargparse"):
    sys.modules[absent] = None  # importing it fails
import torch
from lightning_peft import LoRA, active_adapters, inject, merge, report
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
inject(model, LoRA(r=2, target_modules=["0"], modules_to_save=None))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
x = torch.randn(8, 4)
for _ in range(2):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
own = {key: value for key, value in model.state_dict().items() if ".peft." in key}
torch.save(own, sys.argv[1])
assert all(torch.equal(own[key], value) for key, value in torch.load(sys.argv[1], weights_only=True).items())
assert own["0.peft.default.lora_B"].any() and "trained" not in str(report(model)) and active_adapters(model)
expected = model(x)
merge(model)
torch.testing.assert_close(model(x), expected)
"""


def test_it_loads_little_beside_torch():
    run = subprocess.run([sys.executable, "-c", ADDED], capture_output=True, text=True, check=True)
    added = run.stdout.split()
    foreign = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names) - {"lightning_peft"}
    assert foreign <= {"rich", "pygments", "markdown_it", "mdurl", "attr"}  # the table on the screen


def test_without_lightning_a_model_is_adapted_trained_saved_and_merged(tmp_path):
    run = subprocess.run([sys.executable, "-c", WITHOUT_LIGHTNING, str(tmp_path / "adapter.pt")], capture_output=True)
    assert not run.returncode, run.stderr.decode()


def test_every_method_is_offered_at_the_top():
    for method in registered_methods():
        if method.__module__.startswith("lightning_peft."):
            assert getattr(lightning_peft, method.__name__) is method
            assert method.__name__ in lightning_peft.__all__


def test_all_public_names_are_there():
    for name in lightning_peft.__all__:
        assert hasattr(lightning_peft, name)
    assert set(lightning_peft.__all__) <= set(dir(lightning_peft))
    with pytest.raises(AttributeError, match="module 'lightning_peft' has no attribute 'LoRa'"):
        lightning_peft.LoRa  # noqa: B018

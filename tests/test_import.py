"""What ``import lightning_peft`` loads, and what it offers."""

import subprocess
import sys

import lightning_peft
from lightning_peft.core.method import registered_methods

SCRIPT = """
import sys
import lightning
before = set(sys.modules)
import lightning_peft
print("\\n".join(sorted(set(sys.modules) - before)))
"""


def test_it_loads_little_beside_lightning_and_no_model_code():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    added = run.stdout.split()
    assert not [name for name in added if name.startswith(("transformers", "datasets", "peft", "jsonargparse"))]
    foreign = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names) - {"lightning_peft"}
    assert foreign <= {"rich", "pygments", "markdown_it", "mdurl"}  # the table on the screen


def test_every_method_is_offered_at_the_top():
    for method in registered_methods():
        if method.__module__.startswith("lightning_peft."):
            assert getattr(lightning_peft, method.__name__) is method
            assert method.__name__ in lightning_peft.__all__


def test_all_public_names_are_there():
    for name in lightning_peft.__all__:
        assert hasattr(lightning_peft, name)

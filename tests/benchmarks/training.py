"""One training step: its time against the floor and against peft, and its memory."""

import warnings
from contextlib import ExitStack

from .measuring import bytes_kept, interleaved, peak_bytes, ratio
from .shapes import Shape
from .table import mib, table
from .variants import COMPILED, build, variants_of

HEAD = ("", "step ÷ floor", "step ÷ {peer}", "ms", "kept MiB", "peak MiB", "trainable", "adapter KiB")


def measure(shape: Shape, device: str, compiled: bool, rounds: int) -> str:
    """The table of one shape."""
    names = variants_of(shape, compiled)
    peer = "peft" if "peft" in names else "plain torch"
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variants = {name: build(name, shape, device, stack) for name in names}
        seconds = interleaved({name: v.step for name, v in variants.items()}, rounds, device=device)
        rows = []
        for name, variant in variants.items():
            own = seconds[name]
            rows.append(
                [
                    name,
                    f"{ratio(own, seconds['floor']):.3f}",
                    f"{ratio(own, seconds[peer]):.3f}",
                    f"{sorted(own)[len(own) // 2] * 1000:,.1f}",
                    # A compiled forward keeps what it likes; torch does not show it to the hooks.
                    mib(bytes_kept(variant.model, variant.forward)) if name != COMPILED else "",
                    mib(peak_bytes(variant.step, device)),
                    f"{variant.trainable:,}",
                    f"{variant.adapter_bytes / 1024:,.0f}",
                ]
            )
    return table([head.format(peer=peer) for head in HEAD], rows)

"""``python -m tests.benchmarks [--device cpu|cuda] [--shape NAME] [--quick]``: the library beside peft and the floor.

The floor is the frozen model with a gradient that passes through all of it. The variants of a table run one after the
other in each round; a ratio is the median of those within a round.
"""

import argparse
import time

import torch

from . import handling, importing, training
from .shapes import SHAPES, Shape
from .table import machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], action="append", help="these alone")
    parser.add_argument("--quick", action="store_true", help="the shapes that say most, fewer steps")
    parser.add_argument("--compiled", action="store_true", help="ours through torch.compile, too (minutes)")
    options = parser.parse_args()
    print(f"{machine(options.device)}\n", flush=True)
    for shape in SHAPES:
        if shape.name not in options.shape if options.shape else not _is_due(shape, options.device, options.quick):
            continue
        rounds = max(2, shape.steps // 2) if options.quick else shape.steps
        start = time.perf_counter()
        rows = training.measure(shape, options.device, options.compiled, rounds)
        detail = f"{shape.method}, {shape.batch[0]} x {shape.batch[1]}, {str(shape.dtype)[6:]}"
        if shape.method in ("LoRA", "DoRA"):
            detail += f", r={shape.r}, dropout {shape.dropout:g}"
        print(f"{shape.name}: {detail}, {rounds} rounds ({time.perf_counter() - start:.0f} s)\n\n{rows}\n", flush=True)
    if not options.shape:
        rounds = 5 if options.quick else 15
        print(f"{handling.measure(options.device, rounds)}\n", flush=True)
        print(f"{importing.measure(3 if options.quick else 7)}", flush=True)


def _is_due(shape: Shape, device: str, quick: bool) -> bool:
    if shape.device != device or (quick and not shape.quick):
        return False
    slow = device == "cpu" and shape.dtype == torch.bfloat16 and not _computes_in_bf16()
    if slow and "x1" not in shape.name:
        print(f"{shape.name}: left out, this processor has no arithmetic in bf16\n", flush=True)
        return False
    return True


def _computes_in_bf16() -> bool:
    """Whether the processor multiplies matrices in bf16 about as fast as in fp32."""
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - start)
        times.append(min(seconds))
    return times[1] < 5 * times[0]


if __name__ == "__main__":
    main()

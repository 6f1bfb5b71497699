"""Time, memory, and what is kept for the backward."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each of ``runs`` in each round; in a round all run once, in an order drawn by chance."""
    names, order = list(runs), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        order.shuffle(names)
        for name in names:
            gc.collect()
            _wait(device)
            start = time.perf_counter()
            runs[name]()
            _wait(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios within a round, which slow rounds on a busy machine hardly move."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def bytes_kept(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that the forward keeps for the backward, each memory once and the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    return sum(kept.values())


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """The most memory that ``step`` holds at once, beyond what was there before."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write of its own comings and goings
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()

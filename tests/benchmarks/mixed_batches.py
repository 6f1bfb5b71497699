"""Eight LoRA adapters in one batch: ``route`` against peft's ``adapter_names`` on the same weights.

    python -m tests.benchmarks.mixed_batches [--device cuda] [--repeats 15]

Both sides (and the bare base, the floor of either) take turns in one process; ratios are taken turn by turn, and their
median is printed. peft has no mixed batches in training mode: its training step runs in eval mode, as ours does here.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import peft
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import LoRA, inject, route

ADAPTERS, ROWS, RANK = 8, 32, 8
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = [f"a{row % ADAPTERS}" for row in range(ROWS)]


def models(device: str) -> tuple[nn.Module, nn.Module, peft.PeftModel]:
    """The base, ours and peft's, with the same random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=1000, max_position_embeddings=128)).eval().to(device)
    ours = copy.deepcopy(base)
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=LAYERS)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
    for i in range(1, ADAPTERS):
        theirs.add_adapter(f"a{i}", config)
    for i in range(ADAPTERS):
        inject(ours, LoRA(r=RANK, alpha=16.0, target_modules=LAYERS), f"a{i}")
    state = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if ".peft." in key:
                path, _, (name, factor) = *key.partition(".peft.")[:2], key.rpartition(".peft.")[2].split(".")
                other = state[f"base_model.model.{path}.{factor}.{name}.weight"]
                other.copy_(parameter.copy_(0.05 * torch.randn_like(parameter))).requires_grad_(True)
    return base.requires_grad_(False), ours.eval(), theirs.eval()


def measure(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base, ours, theirs = models(options.device)

    def check(ids: Tensor) -> None:
        with torch.no_grad(), route(ours, NAMES):
            found, expected = ours(ids).logits, theirs(input_ids=ids, adapter_names=NAMES).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def calls(ids: Tensor, trains: bool) -> dict[str, Callable[[], object]]:
        def step(call: Callable[[], Tensor]) -> Callable[[], object]:
            def run() -> None:
                with torch.set_grad_enabled(trains):
                    logits = call()
                    if trains:
                        logits.square().mean().backward()

            return run

        def routed() -> Tensor:
            with route(ours, NAMES):
                return ours(ids, use_cache=False).logits

        embedded = base.get_input_embeddings()(ids).requires_grad_(trains)
        return {
            "base": step(lambda: base(inputs_embeds=embedded, use_cache=False).logits),
            "route": step(routed),
            "peft": step(lambda: theirs(input_ids=ids, adapter_names=NAMES, use_cache=False).logits),
        }

    print(f"{ADAPTERS} adapters, {ROWS} rows, {options.device}; medians in ms, ratios of times taken in turns")
    print(f"{'':24}{'base':>9}{'route':>9}{'peft':>9}{'peft/route':>12}{'peft/base':>11}")
    for label, length, trains in [
        ("forward, 64 tokens", 64, False),
        ("training step, 64", 64, True),
        ("forward, 1 token", 1, False),
        ("training step, 1", 1, True),
    ]:
        ids = torch.randint(0, 1000, (ROWS, length), device=options.device)
        check(ids)
        times = measure(calls(ids, trains), options.repeats, options.device)
        medians = "".join(f"{1e3 * statistics.median(times[name]):9.1f}" for name in times)
        ours_, floor = (
            statistics.median(p / t for p, t in zip(times["peft"], times[name], strict=True))
            for name in ("route", "base")
        )
        print(f"{label:24}{medians}{ours_:12.2f}{floor:11.2f}")


if __name__ == "__main__":
    main()

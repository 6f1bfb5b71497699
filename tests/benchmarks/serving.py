"""Requests per second of ``examples/serve.py`` beside peft's way: ``set_adapter`` under a lock, a request at a time.

    python -m tests.benchmarks.serving [--clients 8 32] [--requests 320] [--rounds 5]

Every way is a process of its own with the same base (all-MiniLM-L6-v2), the same three LoRA directories and the same
web layer. Clients are threads of this process that ask one question after the other. The ways take turns in an order
drawn by chance, and the medians are printed.
"""

import argparse
import asyncio
import csv
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import torch
import uvicorn
from fastapi import FastAPI
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft import LoRA, active, inject, load_adapter, remove, save_adapter

from .measuring import interleaved
from .table import machine, table

sys.path.insert(0, os.fspath(Path(__file__).parents[2] / "examples"))
import assets
import serve

NAMES, LABELS = ("movie", "amazon", "tweets"), {0: "negative", 1: "positive"}
Forward = Callable[[Sequence[str], dict[str, Tensor]], Tensor]


class OneByOne(serve.Queue):
    """No queue: a lock."""

    def __init__(self, classify: Callable[[Sequence[serve.Question]], Sequence[serve.Answer]]) -> None:
        super().__init__(classify)
        self.lock = asyncio.Lock()

    async def ask(self, question: serve.Question) -> serve.Answer:
        async with self.lock:
            return (await asyncio.to_thread(self.classify, [question]))[0]

    async def work(self) -> None: ...


def base() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(assets.model_dir(), id2label=LABELS).eval()


def write_adapters(folder: Path) -> None:
    """Three LoRA directories that change something; what they were trained on takes no time in a forward."""
    torch.manual_seed(0)
    for name in NAMES:
        model = base()
        inject(model, LoRA(r=8), name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        save_adapter(model, folder / name, name)
        remove(model, name)


def our_model(folder: Path) -> Any:
    model = base()
    for name in NAMES:
        load_adapter(model, folder / name, name)
    return model


def peft_model(folder: Path) -> Any:
    model = peft.PeftModel.from_pretrained(base(), folder / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(folder / name, name)
    return model.eval()


def app_of(kind: type[serve.Queue], tokenizer: Any, forward: Forward) -> FastAPI:
    """The app of the example around another ``forward``."""

    def classify(questions: Sequence[serve.Question]) -> list[serve.Answer]:
        texts, names = zip(*((question.text, question.adapter) for question in questions), strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        rows = forward(names, inputs).softmax(-1).tolist()
        answers = (dict(zip(LABELS.values(), row, strict=True)) for row in rows)
        return [serve.Answer(label=max(answer, key=answer.get), probabilities=answer) for answer in answers]

    return serve.app_of(kind(classify), NAMES)


def routed(folder: Path, tokenizer: Any) -> FastAPI:
    return serve.make_app(our_model(folder), tokenizer)


def activated(folder: Path, tokenizer: Any) -> FastAPI:
    model = our_model(folder)

    def forward(names: Sequence[str], inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode(), active(model, names[0]):
            return model(**inputs).logits

    return app_of(OneByOne, tokenizer, forward)


def peft_set(folder: Path, tokenizer: Any) -> FastAPI:
    model = peft_model(folder)

    def forward(names: Sequence[str], inputs: dict[str, Tensor]) -> Tensor:
        model.set_adapter(names[0])
        with torch.inference_mode():
            return model(**inputs).logits

    return app_of(OneByOne, tokenizer, forward)


def peft_mixed(folder: Path, tokenizer: Any) -> FastAPI:
    model = peft_model(folder)

    def forward(names: Sequence[str], inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return model(**inputs, adapter_names=list(names)).logits

    return app_of(serve.Queue, tokenizer, forward)


WAYS: dict[str, Callable[[Path, Any], FastAPI]] = {
    "peft, `set_adapter` under a lock": peft_set,
    "ours, `active` under a lock": activated,
    "peft, `adapter_names` in the example's queue": peft_mixed,
    "ours, `route` in the example's queue": routed,
}


def run_server(way: str, folder: Path, ready: Connection) -> None:
    """Serve until the other end of ``ready`` is closed, through which it says its port."""
    warnings.simplefilter("ignore")
    app = WAYS[way](folder, AutoTokenizer.from_pretrained(assets.model_dir()))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)  # from now on clients wait until the server is there
        ready.send(listener.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))

        def end() -> None:
            with suppress(EOFError):
                ready.recv()
            server.should_exit = True

        threading.Thread(target=end, daemon=True).start()
        server.run(sockets=[listener])


def ask(port: int, questions: Sequence[bytes], clients: int) -> list[list[float]]:
    """The probabilities that each question gets; ``clients`` ask at once, each for its share one after the other."""
    start = threading.Barrier(clients)

    def client(i: int) -> list[list[float]]:
        connection, found = HTTPConnection("127.0.0.1", port), []
        start.wait()
        for question in questions[i::clients]:
            connection.request("POST", "/classify", question, {"Content-Type": "application/json"})
            found.append(list(json.loads(connection.getresponse().read())["probabilities"].values()))
        connection.close()
        return found

    with ThreadPoolExecutor(clients) as pool:
        shares = list(pool.map(client, range(clients)))
    return [shares[i % clients][i // clients] for i in range(len(questions))]


def measure(ports: dict[str, int], questions: Sequence[bytes], clients: Sequence[int], rounds: int) -> str:
    """The table, once all ways have given the same answers."""
    answers = [torch.tensor(ask(port, questions, clients[0])) for port in ports.values()]
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=1e-3, atol=1e-4)
    runs = {(way, n): partial(ask, port, questions, n) for way, port in ports.items() for n in clients}
    seconds: dict[Any, list[float]] = interleaved(runs, rounds, warmup=1)
    rates = {key: statistics.median(len(questions) / s for s in taken) for key, taken in seconds.items()}
    rows = [[way, *(f"{rates[way, n]:.0f}" for n in clients)] for way in ports]
    return table(("requests per second", *(f"{n} clients" for n in clients)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--requests", type=int, default=320, help="in each run")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with assets.movie_sentences().open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in islice(csv.DictReader(file), options.requests)]
    pairs = zip(cycle(NAMES), texts, strict=False)
    questions = [json.dumps({"adapter": name, "text": text}).encode() for name, text in pairs]
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        write_adapters(Path(name))
        ports, servers = {}, []
        for way in WAYS:
            here, there = processes.Pipe()
            server = processes.Process(target=run_server, args=(way, Path(name), there), daemon=True)
            server.start()
            servers.append((server, here))
            ports[way] = here.recv()
        print(f"{machine('cpu')}; {options.rounds} rounds of {len(questions)} requests, three adapters in turn\n")
        print(measure(ports, questions, options.clients, options.rounds))
        for server, here in servers:
            here.close()
            server.join()


if __name__ == "__main__":
    main()

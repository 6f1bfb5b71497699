"""``examples/serve.py`` on loopback: every answer is the adapter's own, whatever it shared a batch with."""

import asyncio
import importlib
import json
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI
from perturbation import perturb
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft import IA3, LoRA, PromptTuning, active, inject, load_adapter, route

ROOT = Path(__file__).parents[2]
CLIENTS, EACH = 8, 25
WORDS = ("the", "film", "plot", "acting", "is", "was", "fine", "dull", "very", "and", "so")
LABELS = {0: "negative", 1: "positive"}
Question = dict[str, Any]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module; it imports its neighbour ``assets``."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.delitem(sys.modules, "serve", raising=False)
    return importlib.import_module("serve")


@pytest.fixture
def tiny(tiny_text_model: Path) -> tuple[Any, Any]:
    """A model with three adapters that act before a batch, within it and on its weights, and its tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_text_model, id2label=LABELS)
    for name, method in {"films": LoRA(r=4), "books": IA3(), "tweets": PromptTuning(num_virtual_tokens=3)}.items():
        inject(model, method, name)
        perturb(model, name, by=0.5)
    return model.eval(), AutoTokenizer.from_pretrained(tiny_text_model)


def questions(names: Sequence[str]) -> list[list[Question]]:
    """For each client, texts of one to twenty words, with the adapters in an order drawn by chance."""
    chance = random.Random(0)
    return [
        [
            {"adapter": chance.choice(names), "text": " ".join(chance.choices(WORDS, k=chance.randint(1, 20)))}
            for _ in range(EACH)
        ]
        for _ in range(CLIENTS)
    ]


@contextmanager
def running(app: FastAPI) -> Iterator[int]:
    """Serve ``app`` on a free port of loopback, which is the value; after the block the server has ended."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()


def post(connection: HTTPConnection, question: Question | bytes) -> tuple[int, Any]:
    """The status and the JSON that a question gets."""
    body = question if isinstance(question, bytes) else json.dumps(question)
    connection.request("POST", "/classify", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    return response.status, json.loads(content) if response.headers.get_content_subtype() == "json" else content


@contextmanager
def connected(port: int) -> Iterator[HTTPConnection]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        yield connection
    finally:
        connection.close()


def asked_at_once(port: int, asked: list[list[Question]]) -> list[list[tuple[int, Any]]]:
    """What each client gets, all of them at once, each one question after the other."""
    start = threading.Barrier(len(asked))

    def client(own: list[Question]) -> list[tuple[int, Any]]:
        with connected(port) as connection:
            start.wait()
            return [post(connection, question) for question in own]

    with ThreadPoolExecutor(len(asked)) as clients:
        return list(clients.map(client, asked))


@torch.no_grad()
def assert_each_is_the_adapters_own(model: Any, tokenizer: Any, asked: list[list[Question]], found: list) -> None:
    seen = set()
    for question, (status, answer) in zip(chain(*asked), chain(*found), strict=True):
        with active(model, question["adapter"]):
            inputs = tokenizer(question["text"], truncation=True, return_tensors="pt")
            alone = model(**inputs).logits.softmax(-1)[0]
        assert status == 200
        assert list(answer["probabilities"]) == list(LABELS.values())
        torch.testing.assert_close(torch.tensor(list(answer["probabilities"].values())), alone, rtol=1e-4, atol=1e-5)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
        seen.add(question["adapter"])
    assert len(seen) == 3


@pytest.mark.compat
def test_every_answer_equals_the_adapter_alone(serve, tiny, monkeypatch):
    batches: list[Sequence[str]] = []

    def routed(model, names):
        batches.append(names)
        return route(model, names)

    monkeypatch.setattr(serve, "route", routed)
    asked = questions(("films", "books", "tweets"))
    with running(serve.make_app(*tiny)) as port:
        found = asked_at_once(port, asked)
    assert_each_is_the_adapters_own(*tiny, asked, found)
    assert sum(map(len, batches)) == CLIENTS * EACH
    assert len(batches) < CLIENTS * EACH
    assert max(len(set(names)) for names in batches) == 3


def test_a_bad_request_is_told_why_and_the_server_goes_on(serve, tiny):
    model, tokenizer = tiny

    def failing(texts, **options):
        if "film" in texts:
            raise RuntimeError("on purpose")
        return tokenizer(texts, **options)

    right = {"adapter": "films", "text": "the plot was fine"}
    with running(serve.make_app(model, failing)) as port:

        def asked(question: Question | bytes) -> tuple[int, Any]:
            with connected(port) as connection:
                return post(connection, question)

        status, told = asked({**right, "adapter": "film"})
        assert status == 404
        assert told["detail"] == "There is no adapter 'film', only books, films, tweets."
        wrong = [{**right, "text": ""}, {**right, "text": "a" * 2001}, {**right, "text": 3}, {"text": "a"}, b"{"]
        for question in wrong:
            assert asked(question)[0] == 422, question
        # Half of a character is refused as well, but FastAPI cannot write it into its refusal.
        assert asked(b'{"adapter": "films", "text": "\\ud800"}')[0] in (422, 500)
        assert asked({**right, "text": "film"})[0] == 500
        assert asked(right)[0] == 200


def ask_all(queue: Any, texts: Sequence[Any], give_up: int | None = None) -> list[Any]:
    """What those get who ask before the queue works; one of them may give up."""

    async def ask() -> list[Any]:
        asking = [asyncio.create_task(queue.ask(text)) for text in texts]
        await asyncio.sleep(0)
        if give_up is not None:
            asking[give_up].cancel()
        work = asyncio.create_task(queue.work())
        answers = await asyncio.gather(*asking, return_exceptions=True)
        work.cancel()
        return answers

    return asyncio.run(ask())


def test_a_batch_has_at_most_sixteen_rows(serve):
    batches = []
    answers = ask_all(serve.Queue(lambda texts: batches.append(len(texts)) or texts), range(40))
    assert answers == list(range(40))
    assert batches == [16, 16, 8]


def test_an_error_is_that_of_its_batch_alone(serve):
    def classify(numbers):
        if 3 in numbers:
            raise ValueError("three")
        return numbers

    answers = ask_all(serve.Queue(classify), range(20))
    assert {str(answer) for answer in answers[:16]} == {"three"}
    assert answers[16:] == [16, 17, 18, 19]


def test_who_gives_up_takes_nobody_along(serve):
    answers = ask_all(serve.Queue(lambda numbers: numbers), range(20), give_up=2)
    assert type(answers.pop(2)) is asyncio.CancelledError
    assert answers == [0, 1, *range(3, 20)]


def test_nobody_waits_longer_than_a_batch_may(serve):
    """The second comes when the first one's batch has gone."""
    batches = []

    async def ask() -> None:
        queue = serve.Queue(lambda texts: batches.append(texts) or texts)
        work = asyncio.create_task(queue.work())
        for text in "ab":
            await asyncio.wait_for(queue.ask(text), 5)
        work.cancel()

    asyncio.run(ask())
    assert batches == [("a",), ("b",)]


@pytest.mark.slow
def test_the_session_of_the_readme(tmp_path, monkeypatch):
    """Its three commands, on the real model: with fewer steps, on a free port, and with 200 requests for one."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (block,) = re.findall(r"^```console\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    training, serving, asking, shown = (line.removeprefix("$ ") for line in block.splitlines())
    python = [sys.executable, *shlex.split(training.replace(" 200 ", " 5 "))[1:]]
    subprocess.run(python, cwd=tmp_path, check=True, capture_output=True, timeout=900)
    python = [sys.executable, "-u", *shlex.split(serving)[1:], "--port", "0"]
    with subprocess.Popen(python, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            shown_by_it = ""
            while not (at := re.search(r"running on http://.*:(\d+)", shown_by_it)):
                line = server.stderr.readline()
                assert line, shown_by_it  # it has ended
                shown_by_it += line
            url, *_, question = shlex.split(asking)[2:]
            assert url == "localhost:8000/classify"
            with connected(int(at[1])) as connection:
                status, answer = post(connection, question.encode())
            assert status == 200
            assert answer.keys() == json.loads(shown).keys()
            asked = questions(("movie", "amazon", "tweets"))
            found = asked_at_once(int(at[1]), asked)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    assert server.returncode == 0
    base = importlib.import_module("assets").model_dir()
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=LABELS).eval()
    for name in ("movie", "amazon", "tweets"):
        load_adapter(model, tmp_path / "adapters" / name, name)
    assert_each_is_the_adapters_own(model, AutoTokenizer.from_pretrained(base), asked, found)

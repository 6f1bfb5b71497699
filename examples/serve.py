"""Many adapters behind one model, a request each; needs the extra `serve` (FastAPI and uvicorn).

    python examples/many_tasks.py 200 adapters  # trains three adapters and keeps them (five minutes)
    python examples/serve.py adapters/movie adapters/amazon adapters/tweets
    curl -s localhost:8000/classify -H 'Content-Type: application/json' -d '{"adapter": "movie", "text": "Dull."}'

A request names an adapter by its directory. Requests that arrive together go through one forward, whatever adapters
they name: `route` gives each row of the batch its own.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import uvicorn
from assets import model_dir
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft import PEFTError, adapters, load_adapter, route

ROWS, SECONDS = 16, 0.010  # a batch goes when it has so many rows, or so long after the first of them arrived


class Question(BaseModel):
    adapter: str
    text: str = Field(min_length=1, max_length=2000)  # characters; of tokens the model reads as many as it can


class Answer(BaseModel):
    label: str
    probabilities: dict[str, float]


class Queue:
    """Collects questions that arrive together, and has ``classify`` answer them on one thread, batch after batch."""

    def __init__(self, classify: Callable[[Sequence[Question]], Sequence[Answer]]) -> None:
        self.classify = classify
        self.waiting: asyncio.Queue[tuple[float, Question, asyncio.Future[Answer]]] = asyncio.Queue()

    async def ask(self, question: Question) -> Answer:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self.waiting.put_nowait((loop.time(), question, answer))
        return await answer

    async def work(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max_workers=1) as thread:  # so that the loop goes on collecting during a forward
            while True:
                batch = [await self.waiting.get()]
                with suppress(TimeoutError):
                    # If the first has waited that long already, behind another batch, this takes what is there.
                    async with asyncio.timeout_at(batch[0][0] + SECONDS):
                        while len(batch) < ROWS:
                            batch.append(await self.waiting.get())
                _, questions, futures = zip(*batch, strict=True)
                try:
                    answers = await loop.run_in_executor(thread, self.classify, questions)
                except Exception as error:  # of this batch: the next one may be right
                    for future in futures:
                        if not future.cancelled():
                            future.set_exception(error)
                else:
                    for future, answer in zip(futures, answers, strict=True):
                        if not future.cancelled():  # as when the request was given up
                            future.set_result(answer)


def make_app(model: Any, tokenizer: Any) -> FastAPI:
    """Serve every adapter of ``model``, a sequence classifier of transformers."""
    model.eval()
    labels = model.config.id2label.values()

    def classify(questions: Sequence[Question]) -> list[Answer]:
        texts = [question.text for question in questions]
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode(), route(model, [question.adapter for question in questions]):
            rows = model(**inputs).logits.softmax(-1).tolist()
        answers = (dict(zip(labels, row, strict=True)) for row in rows)
        return [Answer(label=max(answer, key=answer.get), probabilities=answer) for answer in answers]

    return app_of(Queue(classify), sorted(adapter.name for adapter in adapters(model)))


def app_of(queue: Queue, names: Sequence[str]) -> FastAPI:
    """Take questions to ``queue`` that name one of the adapters ``names``."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(queue.work())
        yield
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    app = FastAPI(title="Many adapters, one model", lifespan=lifespan)

    @app.post("/classify")
    async def classify(question: Question) -> Answer:
        if question.adapter not in names:
            raise HTTPException(404, f"There is no adapter {question.adapter!r}, only {', '.join(names)}.")
        return await queue.ask(question)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="+", type=Path, metavar="DIRECTORY")
    parser.add_argument("--base", type=Path, help="directory of the pretrained model (default: all-MiniLM-L6-v2)")
    parser.add_argument("--labels", default="negative,positive", help="of the classes, in their order")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    names = [directory.name for directory in options.adapters]
    if repeated := [name for name in names if names.count(name) > 1]:
        parser.error(f"two directories are called {repeated[0]!r}, and that is what requests name adapters by")
    if missing := [str(path) for path in [*options.adapters, options.base] if path is not None and not path.is_dir()]:
        parser.error(f"there is no directory {missing[0]}")
    base = options.base or model_dir()
    labels = dict(enumerate(options.labels.split(",")))
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=labels)
    try:
        for name, directory in zip(names, options.adapters, strict=True):
            load_adapter(model, directory, name)
    except PEFTError as error:
        parser.error(f"{directory}: {error}")
    uvicorn.run(make_app(model, AutoTokenizer.from_pretrained(base)), port=options.port)


if __name__ == "__main__":
    main()

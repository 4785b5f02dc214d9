"""Text: where it comes from, how it is cut, how decoders are trained on it, and what is refused."""

import contextlib
import json

import datasets
import huggingface_hub
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import errors

from forwardgrad import InputError
from forwardgrad.cli import main
from forwardgrad.data import (
    Bytes,
    Characters,
    ResidentText,
    StreamedSplit,
    _tables,
    _text,
    load_text,
)
from forwardgrad.networks import continuation
from forwardgrad.training import ALGORITHMS, TextSettings, configure, load_run
from forwardgrad.training._config import not_default


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FORWARDGRAD_DATA", raising=False)


@contextlib.contextmanager
def fails(match: str):
    """The block must raise an `InputError`, of one line, with these words."""
    with pytest.raises(InputError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def documents(count, length=200, letters="abcdefgh 0123456789", seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice([*letters], length)) + f" {i}\n" for i in range(count)]


def write(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return str(folder)


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def read(text, split):
    """The text that the windows of a split make, and the last token."""
    tokens, following = next(split.ordered(len(split)))
    ids = np.append(tokens.ravel(), following[-1, -1])
    np.testing.assert_array_equal(ids[1:], following.ravel())
    return text.vocabulary.decode(ids)


# Where it comes from


def test_the_text_of_this_python():
    text = load_text("text", context=32)
    assert text.name == "text"
    for split in (text.train, text.validation, text.test):
        assert isinstance(split, ResidentText)
    total = sum(map(len, (text.train, text.validation, text.test)))
    assert total * 32 > 250_000
    assert 0.04 < len(text.test) / total < 0.12
    assert 0.04 < len(text.validation) / total < 0.12
    assert "statement" in read(text, text.train)
    assert text.characters_per_token == 1


def test_a_file_is_cut_at_its_end(tmp_path):
    """What is not there is held out: the end for the test, what is before it for validation."""
    content = "".join(documents(5)).replace("\n", "\r\n")
    write(tmp_path, {"book.txt": content})
    text = load_text(str(tmp_path / "book.txt"), context=8)
    parts = [read(text, s) for s in (text.train, text.validation, text.test)]
    # Each loses what does not fill its last window, and what is cut off gets a line's end.
    place = content.index(parts[1])
    assert content.startswith(parts[0])
    assert len(parts[0]) <= place < len(parts[0]) + 8
    assert content.index(parts[2]) > place
    assert abs(len(parts[2]) / len(content) - 0.1) < 0.02


def test_a_folder_of_documents(tmp_path):
    """Each file is wholly in one split, and hidden ones are in none."""
    texts = documents(40)
    named = {f"{'ab'[i % 2]}/{i}.md": text for i, text in enumerate(texts)}
    folder = write(tmp_path / "docs", {**named, ".git/x": "hidden", ".y": "hidden"})
    text = load_text(folder, context=4)
    parts = [read(text, s) for s in (text.train, text.validation, text.test)]
    # Numbers of documents, but for the ends of splits.
    found = [{i for i, t in enumerate(texts) if t[:-4] in part} for part in parts]
    assert set.union(*found) == set(range(40))
    assert sum(map(len, found)) == 40
    assert len(found[2]) == 4
    assert load_text(folder, context=4).digest == text.digest


@pytest.mark.parametrize(
    "layout",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("train/0.txt", "validation/0.txt", "test/a/0.txt"),
    ],
)
def test_files_called_as_splits(tmp_path, layout):
    texts = documents(3)
    folder = write(tmp_path / "set", {**dict(zip(layout, texts, strict=True)), "README.md": "xyz"})
    text = load_text(folder, context=4)
    for split, own in zip((text.train, text.validation, text.test), texts, strict=True):
        assert own.startswith(read(text, split))
    assert "z" not in text.vocabulary.characters


def test_validation_takes_the_place_of_a_test(tmp_path):
    texts = documents(2)
    folder = write(tmp_path / "set", {"train.txt": texts[0] * 9, "dev.txt": texts[1]})
    text = load_text(folder, context=4)
    assert texts[1].startswith(read(text, text.test))
    assert read(text, text.validation) in texts[0] * 9


def test_parquet(tmp_path):
    texts = documents(30)
    parquet(tmp_path / "set" / "train.parquet", story=texts[:20], n=range(20))
    parquet(tmp_path / "set" / "test.parquet", story=texts[20:], n=range(10))
    text = load_text("set", tmp_path, context=4)
    assert read(text, text.test) in "".join(texts[20:])
    alone = load_text(str(tmp_path / "set" / "train.parquet"), context=4)
    assert len(alone.train) + len(alone.validation) + len(alone.test) < len(text.train) * 1.2


def test_the_column(tmp_path):
    texts = documents(20)
    columns = {"title": ["x" * 99] * 20, "text": texts, "body": texts, "n": range(20)}
    path = str(parquet(tmp_path / "t.parquet", **columns))
    assert "x" not in load_text(path, context=4).vocabulary.characters
    assert load_text(path, text_column="title", context=4).vocabulary == Characters("\nx")
    with fails("text_column 'n' of .*t.parquet is not a column of strings .it has 'title', 'text'"):
        load_text(path, text_column="n")
    none = str(parquet(tmp_path / "n.parquet", n=range(20)))
    with fails("n.parquet has no column of strings .it has 'n'"):
        load_text(none)
    two = str(parquet(tmp_path / "two.parquet", a=texts, b=texts))
    with fails("two.parquet has more than one column of strings; --text-column or text_column="):
        load_text(two)
    holes = str(parquet(tmp_path / "holes.parquet", text=[*texts, None, None]))
    with fails("2 rows of .*holes.parquet have no text in column 'text'"):
        load_text(holes)


def test_a_hub_set_with_a_configuration(tmp_path, monkeypatch):
    asked = []

    def hub(name, *where, first=None):
        assert first is None
        asked.append((name, *where))
        texts = datasets.Dataset.from_dict({"text": documents(20)})
        return datasets.DatasetDict({"train": texts, "validation": texts, "test": texts})

    monkeypatch.setattr(_text, "hub_splits", hub)
    load_text("owner/name", context=4)
    load_text("owner/name/small", context=4)
    assert asked == [("owner/name", "owner/name"), ("owner/name/small", "owner/name", "small")]


def test_the_first_documents_alone(tmp_path):
    """Of a table of more, as a table of them would be; of fewer, all."""
    texts = documents(100)
    every = str(parquet(tmp_path / "all.parquet", text=texts))
    few = str(parquet(tmp_path / "few.parquet", text=texts[:30]))
    found, expected = load_text(every, context=8, documents=30), load_text(few, context=8)
    assert found.digest == expected.digest
    assert read(found, found.train) == read(expected, expected.train)
    assert load_text(few, context=8, documents=99).digest == expected.digest
    with fails("documents must be at least 1, got 0"):
        load_text(few, documents=0)


def test_the_first_documents_of_a_hub_set(tmp_path, monkeypatch):
    """No row after them is asked for, and what is missing is held out of them."""
    texts, asked = documents(40), []
    alone = load_text(str(parquet(tmp_path / "t.parquet", text=texts)), context=8)

    def rows():
        for i in range(10**9):
            assert i < 41, "a stream is read on after what was wanted"
            yield {"id": i, "text": texts[min(i, 39)]}

    def hub(*where, streaming=False):
        asked.append((*where, streaming))
        return datasets.IterableDatasetDict(
            {"train": datasets.IterableDataset.from_generator(rows)}
        )

    monkeypatch.setattr(_tables, "_hub_has", lambda repository: True)
    monkeypatch.setattr(_tables.datasets, "load_dataset", hub)
    found = load_text("owner/name/sample", context=8, documents=40)
    assert asked == [("owner/name", "sample", True)]
    assert found.digest == alone.digest
    monkeypatch.setattr(_tables, "_hub_has", lambda repository: False)
    with fails("cannot be reached to stream from; leave out --documents to use what the local"):
        load_text("owner/name/sample", context=8, documents=40)


# How it is cut


def test_documents_end_with_a_line(tmp_path):
    parts = {"train.txt": "abc", "validation.txt": "ab\n", "test.txt": "cab"}
    text = load_text(write(tmp_path / "set", parts), context=2)
    assert read(text, text.validation) == "ab\n"
    assert text.vocabulary == Characters("\nabc")
    assert text.train.take(np.array([0]))[0].tolist() == [[1, 2]]
    assert text.train.take(np.array([0]))[1].tolist() == [[2, 3]]


def test_streams_have_the_same_windows():
    whole, stream = (load_text("text", context=16, resident_limit=n) for n in (2**30, 0))
    assert isinstance(stream.test, StreamedSplit)
    for split in ("train", "validation", "test"):
        assert read(whole, getattr(whole, split)) == read(stream, getattr(stream, split))
    assert whole.digest == stream.digest
    batches = list(stream.test.batches(64, seed=1, epoch=2))
    again = list(stream.test.batches(64, seed=1, epoch=2, start=3))
    for (a, b), (c, d) in zip(batches[3:], again, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)
    assert sum(len(a) for a, _ in batches) == len(stream.test)


@pytest.mark.parametrize("vocabulary", [Bytes(), Characters.of(["größe ≥ 語 🙂\n"])])
def test_vocabularies_give_texts_back(vocabulary):
    texts = ["größe ≥ 語\n", "", "🙂"]
    ids = vocabulary.encode(texts)
    assert ids.dtype == np.int32
    assert ids.max() < len(vocabulary)
    assert vocabulary.decode(ids) == "".join(texts)
    assert vocabulary.unknown(texts) is None
    assert len(vocabulary.encode([])) == 0


def test_characters_per_byte(tmp_path):
    parts = dict.fromkeys(("train.txt", "validation.txt", "test.txt"), "äöü" * 50)
    text = load_text(write(tmp_path / "set", parts), context=8, tokenizer="bytes")
    assert text.characters_per_token == pytest.approx(151 / 301)


def tokenizer(path, texts, *, model="bpe"):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if model == "bpe":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    elif model == "letters":
        made = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 7}, merges=[]))
    else:
        made = tokenizers.Tokenizer(models.WordLevel(vocab={"a": 0}))
    made.enable_truncation(5)
    made.save(str(path))
    return str(path)


def test_a_tokenizer(tmp_path):
    texts = documents(40)
    folder = write(tmp_path / "docs", {f"{i}.txt": text for i, text in enumerate(texts)})
    path = tokenizer(tmp_path / "tokenizer.json", texts)
    text = load_text(folder, context=8, tokenizer=path)
    # It merges, and the file's truncation does not count.
    assert 30 < len(text.vocabulary) <= 300
    assert 1.2 < text.characters_per_token < 4
    lines = read(text, text.test).splitlines(keepends=True)[1:-1]
    assert lines
    assert {*lines} <= {*texts}
    assert (
        len(load_text(folder, context=8).test)
        > len(text.test)
        > 0.2 * len(load_text(folder, context=8).test)
    )


def test_tokenizers_that_do_not_fit(tmp_path):
    texts = dict.fromkeys(("train.txt", "validation.txt", "test.txt"), "abc" * 50)
    folder = write(tmp_path / "set", texts)
    letters = tokenizer(tmp_path / "letters.json", [], model="letters")
    # Numbers with a gap.
    assert len(load_text(folder, context=8, tokenizer=letters).vocabulary) == 8
    other = write(tmp_path / "other", {**texts, "test.txt": "abcd" * 50})
    with fails(
        "split 'test' of folder .*other has the character 'd' .U.0064., which is none of the"
    ):
        load_text(other, context=8, tokenizer=letters)
    words = tokenizer(tmp_path / "words.json", [], model="words")
    with fails("tokenizer cannot cut a text into its tokens"):
        load_text(folder, context=8, tokenizer=words)
    with fails("tokenizer 'byte' is not a file; expected 'chars', 'bytes', the file of a tok"):
        load_text(folder, context=8, tokenizer="byte")
    (tmp_path / "broken.json").write_text("{}")
    with fails("broken.json' is not a tokenizer's file"):
        load_text(folder, context=8, tokenizer=str(tmp_path / "broken.json"))


def without_response(kind):
    """An error of the hub's library, some of which need a response to be made of."""
    return type(kind.__name__, (kind,), {"__init__": lambda self: None})()


def test_a_tokenizer_of_the_hub(tmp_path, monkeypatch):
    """Its file is asked for by name, and what keeps it from coming is said in a sentence."""
    texts = documents(40)
    folder = write(tmp_path / "docs", {f"{i}.txt": text for i, text in enumerate(texts)})
    path = tokenizer(tmp_path / "kept.json", texts)
    answers = {
        "owner/model": path,
        "owner/none": without_response(errors.RepositoryNotFoundError),
        "owner/other": without_response(errors.EntryNotFoundError),
        "owner/far": without_response(errors.LocalEntryNotFoundError),
        "owner/slow": TimeoutError(),
    }

    def download(name, file, **options):
        assert file == "tokenizer.json"
        answer = answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    by_name = load_text(folder, context=8, tokenizer="owner/model")
    assert by_name.digest == load_text(folder, context=8, tokenizer=path).digest
    for name, message in {
        "owner/none": "tokenizer 'owner/none' is neither a file nor a public model on the Hugging",
        "owner/other": "is a model on the Hugging Face hub without a tokenizer.json",
        "owner/far": "is not a file, and the Hugging Face hub cannot be reached",
        "owner/slow": "is not a file, and the Hugging Face hub cannot be reached",
        "path/to/tokenizer.json": "tokenizer 'path/to/tokenizer.json' is not a file; expected",
    }.items():
        with fails(message):
            load_text(folder, context=8, tokenizer=name)


# What is turned down


def test_what_is_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    with fails("file latin is not text in UTF-8: byte 1 is 0xfc"):
        load_text("latin")
    (tmp_path / "empty").mkdir()
    with fails("folder empty holds no files"):
        load_text("empty")
    for name in ("digits", "mnist"):
        with fails(f"dataset '{name}' holds images; expected text"):
            load_text(name)
    with fails("dataset 'txt' is unknown; did you mean 'text'"):
        load_text("txt")
    with fails(r"dataset './book.txt' is neither a file nor a folder"):
        load_text("./book.txt")
    with fails("dataset 'owner/name' is not in the data folder"):
        load_text("owner/name", tmp_path)
    with fails("context must be at least 1, got 0"):
        load_text("text", context=0)


def test_texts_shorter_than_a_window(tmp_path):
    write(tmp_path, {"short.txt": "a short text\n", "empty.txt": ""})
    with fails(
        r"short.txt.* has fewer tokens than a window, which is context \(=64\) and one more"
    ):
        load_text(str(tmp_path / "short.txt"))
    with fails(r"empty.txt.* has fewer tokens than a window"):
        load_text(str(tmp_path / "empty.txt"))
    parts = {"train.txt": "abc" * 99, "validation.txt": "abc" * 99, "test.txt": "abc"}
    with fails(r"split 'test' of folder .*set has fewer tokens than a window"):
        load_text(write(tmp_path / "set", parts))


def test_characters_that_were_not_trained_on(tmp_path):
    parts = {"train.txt": "abc" * 99, "validation.txt": "abä" * 99, "test.txt": "abc" * 99}
    folder = write(tmp_path / "set", parts)
    with fails(
        r"split 'validation' of .* has the character 'ä' \(U\+00E4\), which is none of the 4 "
    ):
        load_text(folder)
    assert len(load_text(folder, tokenizer="bytes").vocabulary) == 256


# Training


SMALL = [
    *("train", "--dataset", "book.txt", "--network", "gpt/1/16", "--context", "16"),
    *("--batch-size", "4", "--seed", "3"),
]


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A small text, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"book.txt": "".join(documents(30))})
    return tmp_path / "book.txt"


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_one_command(tmp_path, book, capsys):
    """It prints what there is to know, and what it stores fits together."""
    out = tmp_path / "run"
    arguments = [*SMALL, "--algorithm", "lg-fg-a", "--iterations", "60", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("test loss", "nats a token", "bits per character", "a second", "a sample:"):
        assert words in printed
    found = summary(out)
    assert found["bits_per_character"] == pytest.approx(found["test_loss"] / np.log(2))
    assert 2 < found["test_loss"] < 5
    assert found["validation_loss"] == pytest.approx(found["test_loss"], abs=1)
    assert 50 < found["test_error"] <= 100
    sample = (out / "sample.txt").read_bytes().decode()
    assert len(sample) == 16 + 300
    assert sample.strip() in printed.replace("\r", "") or sample[:16].strip() in printed
    epoch = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    assert epoch["test_loss"] == found["test_loss"]
    assert (out / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("streams", [False, True])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, book, monkeypatch, streams):
    from test_resume import Killed, bits, kill_at

    if streams:
        import forwardgrad.training._setup as setup

        whole = setup.load_text
        monkeypatch.setattr(setup, "load_text", lambda *a, **k: whole(*a, **k, resident_limit=0))
    arguments = [*SMALL, "--algorithm", "fg-a", "--iterations", "40", "--checkpoint-every", "1e-9"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, 10)
        with pytest.raises(Killed):
            main([*arguments, "--out", str(tmp_path / "cut")])
    assert main([*arguments, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
    samples = [(tmp_path / name / "sample.txt").read_bytes() for name in ("cut", "whole")]
    assert samples[0] == samples[1]


def test_a_command_as_for_a_large_set_of_the_hub(tmp_path):
    """A table with documents alone, a tokenizer, a limit, and a batch in parts; and its resumption.

    The options are those that docs/tokens.md has for FineWeb.
    """
    texts = documents(300)
    words = tokenizer(tmp_path / "tokenizer.json", texts)
    parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", text=texts, id=range(300))
    options = "--network gpt/2/16/2 --tied --context 16 --batch-size 8 --accumulate 2 --tangents 2"
    arguments = [
        *("train", "--dataset", str(tmp_path / "set"), "--tokenizer", words, *options.split()),
        *("--algorithm", "lg-fg-a", "--documents", "100", "--iterations", "6", "--eval-steps", "3"),
        *("--log-every", "1", "--out", str(tmp_path / "run"), "--resume"),
    ]
    assert main(arguments) == 0
    found = summary(tmp_path / "run")
    assert found["steps"] == 6
    assert found["validation_loss"] > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["documents"] == 100
    assert main([*arguments, "--documents", "200"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataset text", "dataset 'text' is text, and network 'mlp' takes images"),
        ("--network gpt/1/16", "dataset 'digits' holds images; expected text"),
        ("--context 8", "context is not a setting of network 'mlp', which reads images"),
        ("--tied", "tied is not a setting of network 'mlp', which reads images"),
        (
            "--dataset text --network gpt/1/16 --augment crop-flip",
            "augment is not a setting of network 'gpt/1/16', which reads text",
        ),
        (
            "--dataset text --network gpt/1/16 --width 8",
            "width is not a setting of network 'gpt/1/16', which reads text",
        ),
        (
            "--dataset text --network gpt/1/16 --task contrastive --algorithm bp",
            "task 'contrastive' compares views of images, and network 'gpt/1/16' reads text",
        ),
        ("--dataset text --network gpt/1", "network 'gpt/1' must be called gpt/LAYERS/WIDTH"),
        ("--dataset text --network gpt/1/16 --context 0", "context"),
        (
            "--dataset text --network gpt/1/16 --tokenizer x.json",
            "tokenizer 'x.json' is not a file",
        ),
        (
            "--dataset text --network gpt/1/16 --context 99999999",
            "has fewer tokens than a window",
        ),
        ("--dataset text --network gpt/1/16 --positions no", "positions"),
    ],
)
def test_what_does_not_go_together(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options.split(), "--iterations", "1"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_text_of_a_run_must_not_change(tmp_path, book, capsys):
    out = str(tmp_path / "run")
    arguments = [*SMALL, "--algorithm", "bp", "--out", out, "--resume"]
    assert main([*arguments, "--iterations", "3"]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    book.write_text("".join(documents(30, seed=1)))
    assert main([*arguments, "--iterations", "3"]) == 2
    assert "is of another text" in capsys.readouterr().err


def test_every_default_is_that_of_its_network():
    for name in ALGORITHMS:
        config = configure(algorithm=name, network="gpt/2/128", dataset="text")
        assert config.data == TextSettings()
        assert config.optimisation.optimizer == "adam"
        assert {*not_default(config)} == {"algorithm", "network", "dataset"} - (
            {"algorithm"} if name == "fg-w" else set()
        )
    sgd = configure(network="gpt/2/128", dataset="text", optimizer="sgd", momentum=0.9)
    assert sgd.optimisation.momentum == 0.9
    assert "optimizer" in not_default(sgd)


def test_the_sample_is_of_the_last_parameters(tmp_path, book):
    """The prompt is the beginning of the test text, and the key is the seed's."""
    out = tmp_path / "run"
    assert main([*SMALL, "--algorithm", "fg-a", "--iterations", "5", "--out", str(out)]) == 0
    _, network = load_run(out)
    text = load_text("book.txt", context=16)
    (prompt,), _ = text.test.take(np.array([0]))
    key = jax.random.fold_in(jax.random.key(3), 1)
    drawn = jax.jit(lambda p: continuation(network, p, 300, key))(prompt)
    expected = text.vocabulary.decode(np.append(prompt, drawn))
    assert (out / "sample.txt").read_bytes().decode() == expected


def test_evaluations_between_epochs(tmp_path, book):
    """Lines of steps have them where they are due; the bits are those of the loss."""
    out = tmp_path / "run"
    arguments = [*SMALL, "--algorithm", "bp", "--iterations", "40", "--log-every", "5"]
    assert main([*arguments, "--eval-steps", "15", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "steps"]
    assert [row["step"] for row in steps] == [*range(5, 41, 5)]
    assert [row["step"] for row in steps if "test_loss" in row] == [15, 30]
    for row in rows:
        if "test_loss" in row:
            assert row["bits_per_character"] == pytest.approx(row["test_loss"] / np.log(2))
    with fails(r"log_every \(=10\) must divide eval_steps, which is 15"):
        configure(network="gpt/1/16", dataset="text", eval_steps=15)
    assert configure(eval_steps=15).line_every == 15


def test_diagnose_a_decoder(book, capsys):
    """Algorithms with heads and without them stand in one picture."""
    options = "--dataset book.txt --network gpt/1/8 --batch-size 4 --samples 4 --tangents 2"
    arguments = ["diagnose", *options.split(), "--algorithms", "fg-a", "lg-fg-a", "--out", "seen"]
    assert main(arguments) == 0
    assert ".heads[0].weight" in capsys.readouterr().out
    assert (book.parent / "seen" / "diagnosis.png").stat().st_size > 1000

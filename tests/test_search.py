"""Search across modalities by codes: ranking, queries, the cache, and the command."""

import json
import re
import time
from pathlib import Path

import named_media
import numpy as np
import pytest
import tiny
import torch

from unicode_fast import UniCode, export
from unicode_fast.codes import CodesError, Gallery, encode_to_folder, read_codes, search, searching
from unicode_fast.codes.searching import embed_query
from unicode_fast.codes.sources import ClipSource, splits_of
from unicode_fast.config import Modality
from unicode_fast.data import Store, open_store, write_store
from unicode_fast.data.talking_digits.sentences import sentence_vectors
from unicode_fast.errors import UsageError
from unicode_fast.methods import make_model
from unicode_fast.search import main
from unicode_fast.tasks.encoded import EncodedDataset
from unicode_fast.tasks.retrieval import Retrieval


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "codes"


@pytest.fixture
def data(store: Path) -> Store:
    return open_store(store)


@pytest.fixture
def model() -> UniCode:
    """Its codebook is of features, so that clips have several codes."""
    owner = tiny.model().eval()
    features = tiny.batch(owner, clips=4)
    owner.codebook.initialise(torch.cat([owner(features).semantic[name].flatten(0, 1) for name in owner.names])[:12])
    return owner


@pytest.fixture
def clips(data: Store, model: UniCode) -> Gallery:
    return Gallery(model, data, "video", progress=False)


@pytest.fixture
def of_media(monkeypatch: pytest.MonkeyPatch) -> UniCode:
    return named_media.model(monkeypatch)


def cosines(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    units = [one.astype(np.float64) / np.linalg.norm(one, axis=1, keepdims=True) for one in (queries, items)]
    return units[0] @ units[1].T


def test_a_gallery_ranks_as_zero_shot_retrieval(model: UniCode, data: Store) -> None:
    embedding = Retrieval(EncodedDataset(model, data)).embedding
    gallery = Gallery(model, data, "video", splits=["test"], progress=False)
    assert np.array_equal(gallery.vectors, embedding("test", "video"))
    scores = cosines(embedding("test", "audio"), embedding("test", "video"))
    for clip in (0, 7):
        hits = search(model, data, f"id:{clip}", "video", top=99, source="audio", splits=["test"], progress=False)
        assert [hit.rank for hit in hits] == list(range(1, 25))
        assert [hit.score for hit in hits] == pytest.approx(sorted(scores[clip], reverse=True), abs=1e-6)
        assert [scores[clip, int(hit.id)] for hit in hits] == pytest.approx([hit.score for hit in hits], abs=1e-6)


def test_equal_clips_are_found_in_the_order_of_the_data(clips: Gallery) -> None:
    clips.vectors = np.array([[0, 1], [3, 4], [6, 8], [1, 0], [3, 4], [0, 0]], np.float32)
    hits = clips.nearest(np.array([0.6, 0.8], np.float32), top=6)
    assert [int(hit.id) for hit in hits] == [1, 2, 4, 0, 3, 5]
    assert [hit.score for hit in hits] == pytest.approx([1, 1, 1, 0.8, 0.6, 0])
    assert [hit.score for hit in hits[:2]] == [hits[2].score] * 2
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        clips.nearest(clips.vectors[0], 0)


def test_ten_thousand_clips_take_less_than_a_second(clips: Gallery) -> None:
    """Measured: 0.04 to 0.11 s on two cores; vectors of random clips are all different, the longest case."""
    clips.vectors = np.random.default_rng(0).normal(size=(10_000, 256)).astype(np.float32)
    clips.members = clips.members[:1] * 10_000
    begun = time.perf_counter()
    hits = clips.nearest(clips.vectors[77], 10)
    assert time.perf_counter() - begun < 1
    assert hits[0].score == pytest.approx(1) and hits[1].score < 0.5


def test_a_query_is_the_mean_of_its_modalities_without_the_searched_one(model: UniCode, data: Store) -> None:
    embedding = Retrieval(EncodedDataset(model, data)).embedding
    units = {
        name: embedding("test", name)[3] / np.linalg.norm(embedding("test", name)[3])
        for name in ("audio", "text", "video")
    }
    mean = (units["audio"] + units["text"]) / np.linalg.norm(units["audio"] + units["text"])
    query = embed_query(model, data, "id:3", "video", splits=["test"])
    np.testing.assert_allclose(query, mean, rtol=1e-5, atol=1e-7)
    own = embed_query(model, data, "id:3", "video", source="video", splits=["test"])
    np.testing.assert_allclose(own, units["video"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        ("id:3", {}, "query must name a clip of one split, '3' is in train, val, test; splits chooses one"),
        ("id:300", {"splits": ["test"]}, "query must name a clip of test, got '300'"),
        ("id:3", {"splits": ["tst"]}, "splits must be among train, val, test, got 'tst'"),
        ("id:3", {"source": "smell"}, "from must be one of audio, video, text, got 'smell'"),
        (" ", {}, "query must be a sentence, a media file or id:CLIP, got an empty text"),
        ("seven", {}, "query must be id:CLIP or a media file, because audio and video and text of this model read no"),
        ("seven", {"source": "audio"}, "because audio of this model reads no sentences, got 'seven'"),
        ("nowhere.mp4", {}, "query must be an existing file, got 'nowhere.mp4'"),
    ],
)
def test_queries_that_cannot_be_encoded_are_named(
    query: str, options: dict, message: str, model: UniCode, data: Store
) -> None:
    model.config = model.config.replace_all(data="own")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        embed_query(model, data, query, "video", **options)


def test_a_sentence_is_read_as_the_built_in_sentences_are(data: Store) -> None:
    kinds = {"audio": Modality("vector", (6,)), "text": Modality("words", (128,))}
    model = make_model(kinds, tiny.config()).eval()
    words = "please look at seven".split()
    expected = model.encode_clip("text", torch.from_numpy(sentence_vectors([words])[0][0, :4])).vector.mean(0).numpy()
    found = embed_query(model, data, "please look  at seven", "audio")
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="query must have at most 10 words, got 11"):
        embed_query(model, data, "a " * 11, "audio")


@pytest.mark.parametrize(("padding", "positions"), [("masked", 3), ("read", 10)])
def test_a_sentence_is_read_as_those_of_a_layout(
    padding: str, positions: int, model: UniCode, data: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    monkeypatch.setattr(searching.WordVectors, "vectors", lambda *_: words)
    model.config = model.config.replace_all(data="vggsound-avel24k:/data", text_padding=padding)
    given = torch.from_numpy(np.pad(words, ((0, positions - 3), (0, 0))))
    expected = model.encode_clip("text", given).vector.mean(0).numpy()
    found = embed_query(model, data, "a red car", "audio")
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-5, atol=1e-7)


def test_a_sentence_and_a_file_are_read_by_the_backbones_of_the_run(
    of_media: UniCode,
    data: Store,
    tmp_path: Path,
) -> None:
    (tmp_path / "13.mp4").touch()
    windows = of_media.encode_file(tmp_path / "13.mp4")
    mean = torch.cat([one.codes["audio"].vector for one in windows]).mean(0).numpy()
    found = embed_query(of_media, data, str(tmp_path / "13.mp4"), "text")
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-7)
    words = of_media.encode_clip("text", torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]]))
    mean = words.vector.mean(0).numpy()
    found = embed_query(of_media, data, "ab c", "audio")
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="query must have modality text, got none in "):
        embed_query(of_media, data, str(tmp_path / "13.mp4"), "audio", source="text")


def test_a_second_search_encodes_nothing(
    model: UniCode, data: Store, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first = Gallery(model, data, "video", progress=False).vectors
    files = sorted(cache.iterdir())
    assert len(files) == 3

    def no_more(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(searching, "encoded_clips", no_more)
        assert np.array_equal(Gallery(model, data, "video", progress=False).vectors, first)
        for other in (tiny.model(seed=1), tiny.model(precision="bfloat16")):
            with pytest.raises(AssertionError):
                Gallery(other, data, "video", progress=False)
        with pytest.raises(AssertionError):
            Gallery(model, data, "audio", progress=False)
    damaged = bytearray(files[0].read_bytes())
    damaged[-1] ^= 1
    files[0].write_bytes(damaged)
    assert np.array_equal(Gallery(model, data, "video", progress=False).vectors, first)
    assert f"making cache file {files[0]} again" in capsys.readouterr().err
    assert sorted(cache.iterdir()) == files


def test_codes_of_encode_are_searched(
    model: UniCode, data: Store, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_to_folder(model, ClipSource(data, splits_of(data), ["video"], False), tmp_path / "codes", progress=False)
    codes = read_codes(tmp_path / "codes")
    expected = Gallery(model, data, "video", progress=False).vectors
    monkeypatch.setattr(searching, "encoded_clips", None)
    assert np.array_equal(Gallery(model, data, "video", codes=codes).vectors, expected)
    with pytest.raises(CodesError, match="codes must have 'audio' of clip '0' of split 'train' with 5 positions"):
        Gallery(model, data, "audio", codes=codes)
    with pytest.raises(CodesError, match="codes must be of the model that searches"):
        Gallery(tiny.model(seed=1), data, "video", codes=codes)


def test_clips_without_the_modality_are_not_found(model: UniCode, data: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Gallery(model, data, "video", splits=["test"], progress=False)
    clips = data.clips("test", "video")
    length = np.full(24, 5)
    length[[0, 9]] = 0
    monkeypatch.setitem(clips.arrays, "video.length", length)
    monkeypatch.setattr(Store, "digest", lambda _: "other")
    found = Gallery(model, data, "video", splits=["test"], progress=False)
    assert np.array_equal(found.vectors, np.delete(whole.vectors, [0, 9], 0))
    assert [int(hit.id) for hit in found.nearest(found.vectors[0], 99)] != [] and len(found) == 22
    assert not {"0", "9"} & {hit.id for hit in found.nearest(found.vectors[0], 99)}
    with pytest.raises(ValueError, match="query must have modality video, got none in 'id:9'"):
        embed_query(model, data, "id:9", "audio", source="video", splits=["test"])


def described_store(path: Path) -> Path:
    splits = tiny.learnable_splits({"train": 8, "test": 4})
    for arrays in splits.values():
        count = len(arrays["class"])
        arrays["id"] = np.array([f"{count}/{number}.mp4#10" for number in range(count)])
        arrays["file"] = np.array([f"{count}/{number}.mp4" for number in range(count)])
        arrays["start"] = np.full(count, 10.0)
        arrays["caption"] = np.array([f"clip {number}\nof a film" for number in range(count)])
    write_store(
        path, "films", {name: tiny.MODALITIES[name] for name in ("audio", "video", "text")}, list("abc"), splits
    )
    return path


def test_the_command_prints_and_writes_what_it_finds(
    model: UniCode, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export(model, tmp_path / "model.safetensors")
    arguments = [str(tmp_path / "model.safetensors"), "--data", str(described_store(tmp_path / "films"))]
    asked = ["--query", "id:4/2.mp4#10", "--in", "audio", "--top", "3", "--json", str(tmp_path / "hits.json")]
    assert main([*arguments, *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "score", "clip", "file", "start", "caption"] and len(lines) == 4
    written = json.loads((tmp_path / "hits.json").read_text())
    assert (written["query"], written["in"], written["from"]) == ("id:4/2.mp4#10", "audio", None)
    for line, hit in zip(lines[1:], written["hits"], strict=True):
        number = int(re.search(r"/(\d)", hit["id"])[1])
        assert (hit["file"], hit["start_s"]) == (hit["id"][:-3], 10)
        assert hit["caption"] == f"clip {number}\nof a film"
        expected = [str(hit["rank"]), f"{hit['score']:.4f}", hit["id"], hit["file"], "10", f"clip {number} of a film"]
        assert re.split(" {2,}", line) == expected
    with pytest.raises(UsageError, match="json must be a file that does not exist yet"):
        main([*arguments, *asked])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--in", "video"], "--query must be a sentence, a media file or id:CLIP, got none"),
        (["--query", "id:1"], "--in must be a modality, got none"),
        (["--query", "id:4/1.mp4#10", "--in", "smell"], "in must be among audio, video, text, got 'smell'"),
        (["--query", "id:4/1.mp4#10", "--in", "video", "--top", "0"], "top must be at least 1, got 0"),
        (["--query", "id:4/1.mp3#10", "--in", "video"], "got '4/1.mp3#10', is '4/1.mp4#10' meant?"),
    ],
)
def test_invalid_flags_are_named(flags: list[str], message: str, model: UniCode, tmp_path: Path) -> None:
    export(model, tmp_path / "model.safetensors")
    data = described_store(tmp_path / "films")
    with pytest.raises(UsageError, match=re.escape(message)):
        main([str(tmp_path / "model.safetensors"), "--data", str(data), *flags])

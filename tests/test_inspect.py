"""The page of codewords: its numbers, its examples from media files, its safety and its size."""

import base64
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from look_up import CODEWORDS, LookUp, coded
from media_files import flash_and_beep
from PIL import Image

from unicode_fast import inspect, preset
from unicode_fast.data import ClipSet, Dataset, write_store
from unicode_fast.errors import UsageError
from unicode_fast.report import codebook_examples, codebook_page
from unicode_fast.report.codebook_advice import advise
from unicode_fast.report.codebook_data import CodebookUse, Codeword, Example, measure_codebook
from unicode_fast.report.codebook_examples import PICTURE_BYTES, SOUND_BYTES, Examples, Shown, collect, sources
from unicode_fast.report.codebook_page import Heading, page, room_for
from unicode_fast.tasks import Evaluator
from unicode_fast.train import main as train

CHROMIUM = shutil.which("chromium")
HEADING = Heading({"run": "a run"}, (CODEWORDS,))
# Class 0 twice, class 1 once; "audio" and "video" have a common time axis, words have none.
CODES = {
    "audio": [[0, 0, 1, 2], [3, 3, 3, 2], [0, 5, 5, 5]],
    "video": [[0, 0, 1, 1], [3, 4, 4, 4], [0, 0, 4, 4]],
    "text": [[0, 6, 6, 7], [7, 7, 3, 6], [7, 0, 0, 6]],
}
CAPTIONS = ["red dog, red dog", "the dog saw him", 'a <b> dog\'s "end"']


def dataset(arrays: dict[str, Any] | None = None, codes: dict[str, Any] | None = None, **extra: Any) -> Dataset:
    """One split of clips with these codes."""
    made = {name: np.array(one) for name, one in (codes or CODES).items()}
    clips = coded(made, ["zero", "one"], {"class": np.array([0, 0, 1]), **(arrays or {}), **extra})
    return Dataset(Path("data"), "codes", clips.modalities, clips.classes, {"test": [clips]})


def use_of(data: Dataset, most: int = 100, clips: int = 2, contents: Any = None) -> CodebookUse:
    return measure_codebook(Evaluator(LookUp(), data), "test", most, clips, contents)


def shown_of(
    data: Dataset, media: Path | None = None, pictured: int = 100, **options: Any
) -> tuple[CodebookUse, Examples]:
    encoded = Evaluator(LookUp(), data).home
    of = sources({name: encoded.clips("test", name) for name in encoded.names}, data.preprocessor, media)
    codes = {name: encoded.codes("test", name, "tokens") for name in encoded.names}
    use = use_of(data, contents={name: one.captions for name, one in of.items() if one.captions}, **options)
    return use, collect(use, of, codes, pictured, progress=False)


def test_numbers_of_codewords_by_hand() -> None:
    use = use_of(dataset())
    assert [one.code for one in use.codewords] == [0, 3, 4, 6, 7, 1, 5, 2]
    zero, three, four = use.codewords[:3]
    assert zero.uses == {"audio": 3, "video": 4, "text": 3}
    # Seconds 0 and 1 of the first clip and 0 of the last are equal: six of seven uses.
    assert zero.agreement["audio-video"] == pytest.approx(6 / 7)
    # Clips 0 and 2 use it in all modalities.
    assert zero.agreement["audio-text"] == zero.agreement["video-text"] == 1
    assert three.agreement == {"audio-video": 0.5, "audio-text": 1, "video-text": 1}
    assert zero.label == ("zero", 0.5)
    assert use.codewords[3].label == ("zero", 0.75)
    assert four.uses == {"audio": 0, "video": 5, "text": 0}
    assert [one.group for one in use.codewords] == ["shared", "shared", "one", "one", "one", "shared", "one", "one"]
    assert use.lonely == {"audio": 2, "video": 1, "text": 2}
    assert use.dead.tolist() == list(range(8, CODEWORDS))
    assert use.used == 8


def test_examples_are_the_clips_with_most_uses() -> None:
    zero = use_of(dataset()).codewords[0]
    assert zero.examples["audio"] == [Example(0, (0, 1)), Example(2, (0,))]
    assert zero.examples["text"] == [Example(2, (1, 2)), Example(0, (0,))]
    assert Example(0, (0, 3, 4, 5, 8, 9)).middle == 4
    same = use_of(dataset(), contents={"text": ["same", "other", "same"]}).codewords[0]
    assert same.examples["text"] == [Example(2, (1, 2))]


def test_agreement_of_codewords_adds_up_to_the_measure() -> None:
    generator = np.random.default_rng(0)
    codes = {name: generator.integers(5, size=(3, 7)) for name in ("audio", "video")}
    use = use_of(dataset({"video.length": np.array([7, 3, 5])}, codes=codes))
    both = np.arange(7) < np.array([7, 3, 5])[:, None]
    uses = sum(np.bincount(one[both], minlength=5) for one in codes.values())
    agreement = {one.code: one.agreement["audio-video"] for one in use.codewords if "audio-video" in one.agreement}
    total = sum(agreement[code] * uses[code] for code in agreement) / (2 * both.sum())
    assert total == pytest.approx(use.sharing["all words"].agreement["audio-video"])


def test_unpaired_modalities_have_no_agreement() -> None:
    whole = dataset().split("test")
    sets = [whole.restrict([name]) for name in CODES]
    use = use_of(Dataset(Path("data"), "codes", whole.modalities, whole.classes, {"test": sets}))
    assert all(one.agreement == {} for one in use.codewords)
    assert use.codewords[0].uses == {"audio": 3, "video": 4, "text": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of a few steps on a store with captions, and the store."""
    folder = tmp_path_factory.mktemp("inspected")
    splits = tiny.learnable_splits({"train": 40, "val": 12, "test": 12})
    for split in splits.values():
        count = len(split["class"])
        split["id"] = np.array([f"clip {number} <script>" for number in range(count)])
        split["caption"] = np.array([f"word{number} sees {number} more things" for number in range(count)])
        split["file"] = np.array([f"{number}.mp4" for number in range(count)])
        split["start"] = np.zeros(count)
    kinds = {name: tiny.MODALITIES[name] for name in ("audio", "video", "text")}
    write_store(folder / "store", "tiny", kinds, ["zero", "one", "two"], splits)
    values = {**tiny.SIZES, "data": folder / "store", "out": folder / "run", "steps": 3, "batch_size": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unicode_fast.tasks.probe.ProbeRule.passes", lambda *_: 1)
        patch.setattr("unicode_fast.report.pictures.draw_run", lambda *_: None)
        assert train([f"--{name}={value}" for name, value in values.items()]) == 0
    return folder / "run", folder / "store"


def inspected(*argv: object) -> int:
    return inspect.main([str(one) for one in argv])


def test_numbers_equal_those_of_the_summary(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    found: list[CodebookUse] = []
    monkeypatch.setattr(inspect, "measure_codebook", lambda *given: found.append(measure_codebook(*given)) or found[0])
    assert inspected(run[0], "--out", tmp_path / "page.html", "--device", "cpu") == 0
    summary = json.loads((run[0] / "summary.json").read_text())["sharing"]
    assert {words: one.as_dict() for words, one in found[0].sharing.items()} == summary
    text = (tmp_path / "page.html").read_text()
    sharing = summary["all words"]
    for name in ("audio", "video", "text"):
        row = re.search(rf'<th scope="row"><i [^>]*></i>{name}</th>(.*?)</tr>', text)[1]
        cells = re.findall("<td>(.*?)</td>", row)
        assert cells[:3] == ["12", str(sharing["codes_in_use"][name]), f"{sharing['perplexity'][name]:.1f}"]
        assert cells[3] == f"{100 * sharing['shared_uses'][name]:.0f} %"
    equal, chance = (f"{100 * sharing[key]['audio-video']:.0f} %" for key in ("agreement", "agreement_by_chance"))
    assert f"<td>{equal}</td><td>{chance}</td>" in text
    assert "--media FOLDER shows" in capsys.readouterr().err


def test_page_of_a_run_has_every_used_codeword(run: tuple[Path, Path], tmp_path: Path) -> None:
    assert inspected(run[0], "--split", "val", "--data", run[1], "--out", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    used = int(re.search(r"<b>(\d+)</b> in use", text)[1])
    assert text.count('<article class="card"') == used > 1
    assert "<mark>" in text
    assert "<script>" not in re.sub(r"<script>\n// Filters", "", text)
    assert inspected(run[0], "--out", tmp_path / "few.html", "--codewords", 1, "--clips", 1) == 0
    assert (tmp_path / "few.html").read_text().count('<article class="card"') == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--codewords", "0"), "codewords must be in 1..3000, got 0"),
        (("--clips", "99"), "clips must be in 1..50, got 99"),
        (("--media", "/nowhere"), "media must be an existing folder, got '/nowhere'"),
        (("--checkpoint", "first"), "checkpoint must be best, last or a training step, got 'first'"),
        (("--split", "dev"), "split must be one of train, val, test of .*, got 'dev'"),
        (("--out", "{run}/summary.json"), "out must be a file that does not exist yet"),
        (("--data", "{plain}", "--media", "{run}"), "media needs data with the files of clips, .*, got .*plain"),
    ],
)
def test_invalid_flags(run: tuple[Path, Path], tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    plain = tmp_path / "plain"
    if "{plain}" in argv:
        tiny.write(plain)
    given = [one.format(run=run[0], plain=plain) for one in argv]
    with pytest.raises(UsageError, match=message):
        inspected(run[0], "--out", tmp_path / "page.html", *given)
    assert not (tmp_path / "page.html").exists()


def test_a_run_must_be_named() -> None:
    with pytest.raises(UsageError, match="run must be a run folder, a checkpoint or an exported model, got none"):
        inspected()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """Clips of two files with flash and beep in seconds 3 and 7, one broken, one missing, one outside of the folder."""
    folder = tmp_path_factory.mktemp("films")
    flash_and_beep(folder / "flash.mp4", fps=10)
    # The second window of this file begins at second 10.
    flash_and_beep(folder / "long.mkv", fps=5, seconds=15, at=(12,))
    (folder / "broken.mp4").write_bytes(b"no film")
    files = ["flash.mp4", "long.mkv", "broken.mp4", "missing.mp4", "../outside.mp4"]
    codes = np.zeros((len(files), 10), np.int64)
    codes[0, [3, 7]], codes[0, 5], codes[1, 2], codes[2:] = 1, 4, 2, 3
    text = np.zeros((len(files), 10), np.int64)
    text[0, 1], text[1, 2] = 1, 2
    captions = ["the flash", "a long film", *["words"] * 3]
    made = dataset(
        {
            "start": np.array([0.0, 10, 0, 0, 0]),
            "file": np.array(files),
            "id": np.array(files),
            "caption": np.array(captions),
        },
        {"video": codes, "audio": codes, "text": text},
        **{"class": np.arange(5) % 2, "text.length": np.array([2, 3, 1, 1, 1])},
    )
    made.preprocessor = {
        "modalities": {
            name: {"reads": reads, "backbone": backbone}
            for name, reads, backbone in (
                ("video", "frames", "efficientnet-lite0"),
                ("audio", "sound", "log-mel"),
                ("text", "caption", "wordllama"),
            )
        }
    }
    return made, folder


def loudness(mp3: bytes) -> float:
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(mp3)) as file:
        samples = np.concatenate([frame.to_ndarray().ravel() for frame in file.decode(audio=0)])
    assert 0.9 < len(samples) / 16000 < 1.2
    return float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))


def brightness(picture: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(picture)).convert("L")).mean())


def test_examples_show_the_seconds_with_the_codeword(films: tuple[Dataset, Path]) -> None:
    _, found = shown_of(*films)
    (flash,), (dark,), (late,) = (found.shown[code, "video"][:1] for code in (1, 4, 2))
    assert (flash.clip, flash.place, flash.alt) == (
        "flash.mp4",
        "3, 7\N{NO-BREAK SPACE}s",
        "frame of flash.mp4 at 3.5 s",
    )
    assert brightness(flash.picture) > 200 > 50 > brightness(dark.picture)
    assert late.place == "12\N{NO-BREAK SPACE}s"
    assert brightness(late.picture) > 200
    assert all(len(base64.b64encode(one.picture)) <= PICTURE_BYTES for one in (flash, dark, late))
    (beep,), (silent,), (late,) = (found.shown[code, "audio"][:1] for code in (1, 4, 2))
    assert min(map(loudness, (beep.sound, late.sound))) > 0.2 > 0.01 > loudness(silent.sound)
    assert all(len(base64.b64encode(one.sound)) <= SOUND_BYTES for one in (beep, silent, late))
    assert found.shown[1, "text"][0].sentence == [("the ", False), ("flash", True)]
    assert found.words[1, "text"] == [("flash", 1)]


def test_sound_of_vggish_follows_its_steps() -> None:
    """Steps are 0.96 s apart, from the beginning of the clip on."""
    arrays = {"id": np.array(["a@5-25", "a@5-25#15", "b#10"]), "start": np.array([5.0, 15, 10])}
    of = sources({"audio": dataset(arrays).split("test")}, None, None)["audio"]
    vggish = replace(of, backbone="vggish")
    assert [of.second(Example(clip, (2,))) for clip in range(3)] == [7, 17, 12]
    assert [vggish.second(Example(clip, (2,))) for clip in range(3)] == pytest.approx([6.92, 16.92, 11.92])


def test_files_that_cannot_be_read_are_named(films: tuple[Dataset, Path]) -> None:
    use, found = shown_of(*films, clips=3)
    assert list(found.unread) == ["broken.mp4", "missing.mp4", "../outside.mp4"]
    assert "inside the folder" in found.unread["../outside.mp4"]
    shown = found.shown[3, "video"]
    assert [one.clip for one in shown] == list(found.unread)
    assert all(one.picture is None for one in shown)
    assert page(use, found, HEADING, []).count('<article class="card"') == len(use.codewords)


def test_only_the_most_used_codewords_have_pictures(films: tuple[Dataset, Path]) -> None:
    use, found = shown_of(*films, pictured=2)
    assert found.shown[use.codewords[1].code, "video"][0].picture is not None
    assert all(one.picture is None for code in use.codewords[2:] for one in found.shown[code.code, "video"])


def test_words_are_those_of_the_backbone() -> None:
    arrays = {"caption": np.array(CAPTIONS), "text.length": np.array([4, 4, 4])}
    _, found = shown_of(dataset(arrays))
    assert found.words[6, "text"] == [("dog,", 1), ("red", 1), ("him", 1), ('"end"', 1)]
    data = dataset(arrays)
    data.preprocessor = {"modalities": {"text": {"reads": "caption", "backbone": "wordllama"}}}
    _, found = shown_of(data)
    assert found.words[6, "text"][0] == ("dog", 1)
    assert found.shown[7, "text"][1].sentence == [("red dog, red ", False), ("dog", True)]
    # How another model of words divides a sentence is unknown unless it has as many words.
    _, found = shown_of(dataset({**arrays, "text.length": np.array([4, 4, 3])}))
    assert found.shown[0, "text"][0].sentence == [(CAPTIONS[2], False)]


def test_built_in_pictures_and_sentences(few: ClipSet) -> None:
    """Talking digits have pictures and sentences of their own; sound is drawn from its features."""
    names = ("audio", "video", "text")
    codes = {name: np.repeat(few.target[:, None], 10, 1) for name in names}
    arrays = {key: few.arrays[key] for key in ("video.frames", "text.sentence", "text.length", "class", "id")}
    made = coded(codes, few.classes, arrays)
    data = Dataset(Path("data"), "codes", made.modalities, few.classes, {"test": [made]})
    use, found = shown_of(data)
    code = use.codewords[0].code
    clip = use.codewords[0].examples["video"][0].clip
    picture = Image.open(io.BytesIO(found.shown[code, "video"][0].picture))
    np.testing.assert_array_equal(np.asarray(picture), few.arrays["video.frames"][clip, 4])
    assert found.shown[code, "audio"][0].picture.startswith(b"\x89PNG")
    sentence = found.shown[code, "text"][0].sentence
    assert "".join(text for text, _ in sentence) in few.arrays["text.sentence"]
    assert [text for text, marked in sentence if marked] == "".join(text for text, _ in sentence).split()


def test_spectrum_lies_on_its_side_with_a_line_under_the_codeword() -> None:
    picture = codebook_examples._spectrum(np.array([[0.0, 1], [2, 3], [4, 5]], np.float32), (1,))
    np.testing.assert_array_equal(picture[:2], [[51, 153, 255], [0, 102, 204]])
    np.testing.assert_array_equal(picture[2:], [[0, 0, 0], [0, 255, 0], [0, 255, 0]])


class Tags(HTMLParser):
    """All tags, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


EVIL = "<script>alert(1)</script>\"'><img src=http://127.0.0.1/x onerror=alert(2)>\udcff\x00.mp4"


def evil_page() -> str:
    data = dataset({"caption": np.array([EVIL] * 3), "id": np.array([f"{EVIL}{number}" for number in range(3)])})
    data.split("test").classes[:] = [f"{EVIL}a", f"{EVIL}b"]
    use, found = shown_of(data)
    for one in filter(None, found.shown.values()):
        one[0].alt, one[0].picture = EVIL, b"\x89PNG"
    found.words[0, "text"] = [(EVIL, 3)]
    return page(use, found, Heading({"run": EVIL, EVIL: EVIL}, (CODEWORDS,), [EVIL]), [])


def test_names_and_words_are_escaped() -> None:
    text = evil_page()
    text.encode("utf-8")
    parsed = Tags(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    addresses = [attrs[key] or "" for _, attrs in parsed.tags for key in ("src", "href") if key in attrs]
    assert addresses
    assert all(one.startswith(("data:", "#")) for one in addresses)
    assert any("<script>alert(1)" in one and "\\udcff" in one for one in parsed.texts)
    policy = next(attrs["content"] for tag, attrs in parsed.tags if "http-equiv" in attrs)
    assert policy == (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )


def big(codewords: int, clips: int, length: int) -> tuple[CodebookUse, Examples]:
    """Codewords with examples of the largest pictures and sounds and long names."""
    template = use_of(dataset())
    names, evil = template.names, "<" * length
    counts = np.ones((3, codewords), np.int64)
    ones = [
        Codeword(code, dict.fromkeys(names, 1), True, template.codewords[0].agreement, (evil, 1.0), {})
        for code in range(codewords)
    ]
    picture, sound = b"\x89PNG" + bytes(PICTURE_BYTES * 3 // 4 - 4), bytes(SOUND_BYTES * 3 // 4)
    pictured, heard = Shown(evil, "3 s", evil, picture, evil), Shown(evil, "3 s", evil, sound=sound)
    read = Shown(evil, "word 1", evil, sentence=[(evil, True), (evil, False)] * 5)
    shown = {
        (code, name): [one] * clips
        for code in range(codewords)
        for name, one in (("audio", heard), ("video", pictured), ("text", read))
    }
    words = {(code, "text"): [(evil, 1)] * 9 for code in range(codewords)}
    return replace(template, counts=counts, codewords=ones), Examples(shown, words)


@pytest.mark.parametrize(("codewords", "clips", "fits"), [(400, 3, True), (700, 4, False), (3000, 1, False)])
def test_page_is_small_with_the_largest_examples(codewords: int, clips: int, fits: bool) -> None:
    text = page(*big(codewords, clips, 5 if fits else 4000), replace(HEADING, sizes=(codewords,)), [])
    assert len(text.encode()) < codebook_page.MOST_BYTES
    assert ("examples are left out" not in text) == fits
    assert text.count('<article class="card"') == codewords


def test_large_codebooks_have_fewer_examples(films: tuple[Dataset, Path]) -> None:
    data, folder = films
    clips = {name: data.split("test") for name in ("audio", "video", "text")}
    of = list(sources(clips, data.preprocessor, folder).values())
    assert room_for(128, 4, of) == (4, 128)
    assert room_for(400, 4, of)[0] in (3, 4)
    assert room_for(1000, 4, of) == (1, 1000)
    few, pictured = room_for(3000, 4, of)
    assert few == 1
    assert 500 < pictured < 3000


def test_dead_codewords_are_listed_as_ranges() -> None:
    text = page(*shown_of(dataset()), HEADING, [])
    assert f"<p>8–{CODEWORDS - 1}</p>" in text


def test_pairs_of_codewords_of_two_layers() -> None:
    """H-DCID: a number has the choice of each layer."""
    model = tiny.model(method="h-dcid")
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=(4, 5, *kind.shape)).astype(np.float32) for name, kind in model.modalities.items()
    }
    clips = ClipSet(arrays, dict(model.modalities), [], np.arange(4))
    data = Dataset(Path("data"), "random", model.modalities, [], {"test": [clips]})
    evaluator = Evaluator(model.eval(), data)
    use = measure_codebook(evaluator, "test", 50, 2)
    assert use.counts.shape == (3, 144)
    assert use.counts.sum() == 3 * 4 * 5
    of = sources({name: clips for name in arrays}, None, None)
    codes = {name: evaluator.home.codes("test", name, "tokens") for name in arrays}
    text = page(use, collect(use, of, codes, 50, progress=False), replace(HEADING, sizes=(12, 12)), [])
    code = use.codewords[0].code
    assert f'<h3 id="h{code}">{code // 12}·{code % 12}</h3>' in text
    assert "are not listed" in text


def advice_of(use: CodebookUse, **fields: object) -> str:
    config = preset("recommended").replace_all(**fields)
    return "\n".join(f"{one.seen} {one.advice}" for one in advise(use, config, (use.counts.shape[1],)))


def test_advice_is_tied_to_what_is_seen() -> None:
    low = use_of(dataset())
    assert "codewords are not used" in advice_of(low, codebook_init="uniform")
    assert "--codebook_init data" in advice_of(low, codebook_init="uniform")
    assert "codewords are not used" not in advice_of(low)
    assert "Overlap of use is low: audio-video 42 %. The terms for sharing are on. Train longer" in advice_of(low)
    words = use_of(dataset(codes={**CODES, "text": np.full((3, 4), 9)}))
    assert "Overlap of use is low: audio-text 0 %, video-text 0 %. Try --grounding_weight 0.5" in advice_of(
        words, grounding_weight=0.0
    )
    assert "--grounding_weight" not in advice_of(words)
    apart = use_of(dataset(codes={"audio": np.zeros((3, 4), int), "video": np.ones((3, 4), int)}))
    assert "the codebook has collapsed for audio" in advice_of(apart)
    assert "--commitment_partner 10 (" in advice_of(apart, commitment_partner=1.0)
    equal = np.tile(np.arange(4), (3, 1))
    assert advice_of(use_of(dataset(codes={"audio": equal, "video": equal}))) == ""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, list[str]]]:
    """Port of a server of the files of a folder, and the addresses that it was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def send_response(self, code: int, message: str | None = None) -> None:
            asked.append(f"{self.headers['Host']}{self.path}")
            super().send_response(code, message)

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_chromium_opens_the_page_without_the_network(
    films: tuple[Dataset, Path], tmp_path: Path, served: tuple[int, list[str]]
) -> None:
    """The page's cards are in the DOM, its sound can be played, its filters work, and it asks for nothing else."""
    use, found = shown_of(*films)
    port, asked = served
    # A page that wants more is refused by its policy. All hosts lead to the server.
    probe = """<img src="http://elsewhere.test/picture"><script>
    fetch('http://elsewhere.test/fetched').catch(() => {});
    const audio = document.querySelector('audio');
    audio.addEventListener('canplay', () => {
      document.querySelector('[data-show=one]').click();
      const hidden = cards.filter((card) => card.hidden).length;
      const pictures = [...document.querySelectorAll('img[src^=data]')].every((one) => one.naturalWidth > 0);
      document.title = `plays ${audio.duration > 0.9}, hides ${hidden}, pictures ${pictures}`;
    });
    audio.load();</script>"""
    (tmp_path / "page.html").write_text(page(use, found, HEADING, []).replace("</body>", f"{probe}</body>"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--host-resolver-rules=MAP * 127.0.0.1:{port}"]
    command = [str(CHROMIUM), *flags, "--timeout=5000", "--dump-dom", "http://page.test/page.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    shown = sum(one.group == "one" for one in use.codewords)
    assert f"<title>plays true, hides {len(use.codewords) - shown}, pictures true</title>" in dom
    assert dom.count('<article class="card"') == len(use.codewords)
    # Chromium itself asks for addresses of its maker.
    assert [one for one in asked if ".test/" in one] == ["page.test/page.html"]

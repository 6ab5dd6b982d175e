"""The harder built-in data set: two digits, two events, a long tail, and training clips with mismatched streams."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_talking_digits import checksums

from unicode_fast import ablate, tasks
from unicode_fast.config import DataConfig
from unicode_fast.data import ClipSet, Store, built_in, open_data, open_dataset
from unicode_fast.data.check import check
from unicode_fast.data.talking_digits import generated, handwriting, number_clips, sentences, sound
from unicode_fast.data.talking_digits import numbers as talking_numbers
from unicode_fast.data.talking_digits.generated import folder_name
from unicode_fast.data.talking_digits.number_clips import BACKGROUND, NumbersRecipe, class_counts, plan_numbers
from unicode_fast.data.talking_digits.numbers import load
from unicode_fast.data.talking_digits.spectrogram import (
    BANDS,
    QUARTERS,
    log_mel_quarters,
    log_mel_statistics,
    mel_filters,
)
from unicode_fast.presets import preset

CLIPS = {"train": 400, "val": 100, "test": 100}
FEW = {"train": 10, "val": 2, "test": 2}
STREAMS = ("audio", "video")
ENGLISH = sound._ENGLISH
# Speech synthesis takes most of the time: six voices, one recording of each number.
quick_recipe = functools.partial(NumbersRecipe, "talking-numbers", recordings=1)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talking_numbers, "NumbersRecipe", functools.partial(NumbersRecipe, recordings=1))
        patch.setattr(sound, "_ENGLISH", ENGLISH[::9])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def hard(folder: Path) -> Store:
    return load(cache=folder, clips=CLIPS, progress=False)


@pytest.fixture(scope="module")
def easy(folder: Path) -> Store:
    return load(cache=folder, easy=True, clips={"train": 100, "val": 100, "test": 100}, progress=False)


@pytest.fixture(scope="module")
def few(folder: Path) -> Store:
    return load(cache=folder, clips=FEW, progress=False)


def events(found: ClipSet, name: str) -> np.ndarray:
    """(clips, 10) int64, the number of the event in each second, or -1."""
    number = found.labels[name].argmax(2)
    return np.where(number == BACKGROUND, -1, number)


def first_events(found: ClipSet, name: str) -> np.ndarray:
    """(clips, 10) bool, without the second event, the only one of its number."""
    there = events(found, name)
    return (there >= 0) & (there != found.arrays["second"][:, None])


def runs(on: np.ndarray) -> np.ndarray:
    """(clips,) int64, number of runs of active seconds."""
    return (np.diff(np.pad(on, ((0, 0), (1, 0))).astype(int), axis=1) == 1).sum(1)


# The content of a clip


def test_shapes(hard: Store) -> None:
    assert hard.splits == ["train", "val", "test"] and list(hard.modalities) == ["audio", "video", "text"]
    assert hard.classes == [str(number) for number in range(100)] and hard.name == "talking-numbers"
    for split, count in CLIPS.items():
        found = hard.split(split)
        shapes = {name: array.shape[1:] for name, array in found.features.items()}
        assert shapes == {"audio": (10, 256), "video": (10, 7, 7, 16), "text": (10, 128)}
        assert len(found) == count and all(array.dtype == np.float32 for array in found.features.values())
        assert {name: array.shape[1:] for name, array in found.labels.items()} == dict.fromkeys(STREAMS, (10, 101))
        assert ("video.frames" in found.arrays) == (split != "train")
    ids = np.concatenate([hard.split(split).id for split in hard.splits])
    assert len(set(ids)) == sum(CLIPS.values())


def test_training_classes_have_a_long_tail(hard: Store) -> None:
    counts = np.sort(np.bincount(hard.split("train").target, minlength=100))
    assert counts.sum() == 400 and counts[0] == 1 and counts[-1] == 10
    # Geometric: the commonest half of the classes has 10^(1/2) times the clips of the other.
    assert 2.7 < counts[50:].sum() / counts[:50].sum() < 3.7
    for split in ("val", "test"):
        np.testing.assert_array_equal(np.bincount(hard.split(split).target, minlength=100), 1)


def test_tail_of_the_default_size() -> None:
    recipe = NumbersRecipe("talking-numbers", 0, False, generated.DEFAULT_CLIPS)
    counts = class_counts(recipe, "train")
    assert counts.sum() == 4000 and counts.min() == 10 and counts.max() == 102
    # Small and large numbers are among the rare ones.
    rare = np.argsort(counts)[:30]
    assert rare.min() < 30 and rare.max() > 70
    assert set(class_counts(recipe, "val")) == {5} and set(class_counts(recipe, "test")) == {10}


def test_a_tenth_of_the_training_clips_disagrees(hard: Store) -> None:
    for split in hard.splits:
        found = hard.split(split)
        named = [(events(found, name) * first_events(found, name)).max(1) for name in STREAMS]
        odd = np.stack([*named, found.arrays["text.number"]]) != found.target
        assert odd.sum(0).max() <= 1
        np.testing.assert_array_equal(odd.any(0), found.arrays["mismatched"])
        assert odd.sum() == (40 if split == "train" else 0)
        # A third of 40 in each stream, within three and a half standard deviations.
        assert split != "train" or (np.abs(odd.sum(1) - 40 / 3) < 10.5).all()


def test_events(hard: Store) -> None:
    two = 0
    for split in hard.splits:
        found = hard.split(split)
        second = found.arrays["second"]
        assert (second != found.target).all()
        later = [events(found, name) == np.where(second < 0, -2, second)[:, None] for name in STREAMS]
        np.testing.assert_array_equal(*later)
        for name in STREAMS:
            first = first_events(found, name)
            assert set(runs(first)) == {1} and set(first.sum(1)) <= set(range(4, 10))
            np.testing.assert_array_equal(runs(later[0]), second >= 0)
            there = second >= 0
            assert set(later[0][there].sum(1)) == {1, 2, 3}
            last_of_first = 9 - first[there, ::-1].argmax(1)
            assert (later[0][there].argmax(1) > last_of_first).all()
            # All seconds of an event have the same number.
            named = np.where(first, events(found, name), -1)
            assert (np.where(first, named, named.max(1)[:, None]) == named.max(1)[:, None]).all()
        two += there.sum()
    # A third of 600, within four standard deviations.
    assert 200 - 46 <= two <= 200 + 46


def test_shifts_are_up_to_a_second_and_flagged(hard: Store) -> None:
    for split in hard.splits:
        found = hard.split(split)
        audio, video = (first_events(found, name) for name in STREAMS)
        for edge in (audio, video), (audio[:, ::-1], video[:, ::-1]):
            assert np.abs(edge[0].argmax(1) - edge[1].argmax(1)).max() <= 1
        np.testing.assert_array_equal((audio != video).any(1), found.arrays["shifted"])
        assert 0.2 < found.arrays["shifted"].mean() < 0.5


def test_distractors_are_other_numbers_outside_events(hard: Store) -> None:
    with_distractor = 0
    for split in hard.splits:
        found = hard.split(split)
        for name in STREAMS:
            other = found.arrays[f"{name}.distractor"]
            there = other >= 0
            assert (events(found, name)[there] == -1).all() and there.sum(1).max() <= 3
            for taken in (found.target, found.arrays["second"], events(found, name).max(1)):
                assert (other != taken[:, None])[there].all()
            with_distractor += there.any(1).sum()
    # A share of 0.3 of 1200 streams, within four standard deviations, less the few without a free second.
    assert 360 - 64 - 30 <= with_distractor <= 360 + 64


def test_easy_has_none_of_it(easy: Store) -> None:
    for split in easy.splits:
        found = easy.split(split)
        np.testing.assert_array_equal(np.bincount(found.target, minlength=100), 1)
        assert not found.arrays["shifted"].any() and not found.arrays["mismatched"].any()
        assert (found.arrays["second"] == -1).all() and (found.arrays["text.number"] == found.target).all()
        for name in STREAMS:
            assert (found.arrays[f"{name}.distractor"] == -1).all()
            assert (events(found, name).max(1) == found.target).all()
    voices = [set(easy.split(split).arrays["voice"]) for split in easy.splits]
    assert voices[0] == voices[1] == voices[2]


def test_sound_matches_the_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[np.ndarray] = []

    def render(heard: np.ndarray, *others: object) -> np.ndarray:
        rendered.append(heard)
        return np.zeros((*heard.shape, 256), np.float32)

    monkeypatch.setattr(talking_numbers, "render_audio", render)
    recipe = NumbersRecipe("talking-numbers", 0, False, CLIPS)
    voices = sound.Voices([], {"train": np.arange(3)}, {}, talking_numbers.vocabulary(recipe))
    arrays = talking_numbers._raw_split(recipe, "train", voices, lambda count: None)
    label = arrays["audio.label"].argmax(2)
    np.testing.assert_array_equal(rendered[0], np.where(label < BACKGROUND, label, arrays["audio.distractor"]))
    assert voices.vocabulary.texts[42] == "forty two" and len(voices.vocabulary.texts) == 100


def test_pictures_match_the_arrays(hard: Store) -> None:
    pictures = handwriting.handwritten_pictures()
    for split in hard.splits:
        found = hard.split(split)
        shown = np.maximum(events(found, "video"), found.arrays["video.distractor"])
        picture = found.arrays["video.picture"]
        tens, units = np.moveaxis(np.where(picture < 0, -1, pictures.digit[picture]), 2, 0)
        np.testing.assert_array_equal(np.where(tens < 0, -1, 10 * tens + units), shown)
        np.testing.assert_array_equal(tens < 0, units < 0)
        for row in picture.reshape(len(found), -1):
            drawn = row[row >= 0]
            assert len(set(drawn)) == len(drawn)


def test_tens_are_on_the_left() -> None:
    recipe = NumbersRecipe("talking-numbers", 0, True, CLIPS)
    plan = plan_numbers(recipe, "test", np.arange(1))
    frames = plan.frames(np.random.default_rng(0)).astype(float).reshape(-1, 16, 16)
    pixels, picture = recipe.pictures.pixels, plan.picture.reshape(-1, 2)
    shown = picture[:, 0] >= 0
    for side in range(2):
        half = frames[shown][:, 4:12, 8 * side : 8 * side + 8]
        half = half - half.mean((1, 2), keepdims=True)
        # A half is closer to its own picture than to the picture beside it.
        itself, other = ((half * pixels[picture[shown, which]]).sum((1, 2)) for which in (side, 1 - side))
        assert (itself > other).mean() > 0.8


def test_features_are_cut_from_the_frames(hard: Store) -> None:
    standard = hard.extra["standardisation"]["video"]
    found = hard.split("test")
    pixels = found.features["video"] * standard["deviation"] + standard["mean"]
    np.testing.assert_allclose(pixels * 255, handwriting.windows(found.arrays["video.frames"]) * 255, atol=0.01)


def test_training_features_are_standardised(hard: Store) -> None:
    found = hard.split("train")
    np.testing.assert_allclose(found.features["audio"].mean((0, 1)), 0, atol=1e-3)
    np.testing.assert_allclose(found.features["audio"].std((0, 1)), 1, atol=1e-3)
    assert abs(found.features["video"].mean()) < 1e-3
    assert (found.features["text"][~found.mask["text"]] == 0).all()


# Sentences


def test_sentences_name_one_number(hard: Store) -> None:
    wordings = sentences.number_wordings()
    for split in hard.splits:
        found = hard.split(split)
        content = sentences.content_words(found)
        assert content.shape == found.features["text"].shape[:2] and content.dtype == bool
        lengths = found.lengths["text"]
        assert set(lengths) <= {8, 9, 10}
        for clip, sentence in enumerate(found.arrays["text.sentence"]):
            words = np.array(str(sentence).split())
            assert len(words) == lengths[clip]
            named = " ".join(words[content[clip, : len(words)]])
            assert named in wordings[found.arrays["text.number"][clip]]
        assert not content[~found.mask["text"]].any()


def test_number_names() -> None:
    names = sentences.number_names()
    assert len(set(names)) == 100
    expected = {0: "zero", 12: "twelve", 20: "twenty", 24: "twenty four", 42: "forty two", 99: "ninety nine"}
    assert {number: names[number] for number in expected} == expected
    assert sentences.number_wordings()[42] == ("forty two", "forty-two", "42")


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ("in the garden Anna writes number VII with red chalk", "VII"),
        ("nous pouvons voir et entendre zéro près du port", "zéro"),
        ("we can see and hear forty two near the harbour", "forty two"),
        ("please look at digit 7 drawn in red ink", "7"),
        ("Anna et Ida répètent hier en classe ensemble six", "six"),
        ("Anna and Ida both repeat six today in class", "six"),
        ("somebody in this museum keeps saying N very clearly", "N"),
        # Number words of the other language are ordinary words.
        ("please look at 12 drawn in un ink", "12"),
        ("regardez bien neuf dessiné ten à l'encre rose", "neuf"),
    ],
)
def test_content_words_by_hand(sentence: str, named: str) -> None:
    arrays = {"text.sentence": np.array([sentence]), "text": np.zeros((1, 10, 128))}
    found = sentences.content_words(ClipSet(arrays, {}, [], np.arange(1)))
    words = sentence.split()
    assert " ".join(word for word, content in zip(words, found[0, : len(words)], strict=True) if content) == named
    assert not found[0, len(words) :].any()


@pytest.mark.parametrize("language", ["en", "fr"])
def test_content_words_of_every_wording_in_every_template(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wordings = sentences.digit_wordings(language) + (sentences.number_wordings() if language == "en" else [])
    for template in sentences._TEMPLATES[language]:
        monkeypatch.setitem(sentences._TEMPLATES, language, (template,))
        ways = [(written,) for several in wordings for written in several]
        written = sentences.make_sentences(ways, language, np.random.default_rng(0))
        arrays = {
            "text.sentence": np.array([" ".join(words) for words in written]),
            "text": np.zeros((len(ways), 10, 1)),
        }
        found = sentences.content_words(ClipSet(arrays, {}, [], np.arange(len(ways))))
        for words, content, (way,) in zip(written, found, ways, strict=True):
            assert " ".join(np.array(words)[content[: len(words)]]) == way


@pytest.mark.parametrize("language", ["en", "fr"])
def test_no_filler_is_a_number_word(language: str) -> None:
    for other in ("en", "fr"):
        assert not sentences._naming_words(language) & sentences._other_words(other)


def test_no_content_words_without_sentences() -> None:
    with pytest.raises(ValueError, match=r"clips must hold the array 'text\.sentence', got text"):
        sentences.content_words(ClipSet({"text": np.zeros((1, 10, 128))}, {}, [], np.arange(1)))


# Sound


def test_quarters_keep_the_order_of_sounds() -> None:
    time = np.arange(16_000) / 16_000
    early, late = np.sin(2 * np.pi * 1000 * time) * (time < 0.25), np.sin(2 * np.pi * 1000 * time) * (time >= 0.75)
    found = log_mel_quarters(np.stack([early, late]).astype(np.float32)).reshape(2, QUARTERS, BANDS)
    assert found.dtype == np.float32
    # 1000 Hz is bin 32 of 512 at 16 kHz.
    loud = found[:, :, mel_filters()[32].argmax()]
    assert loud[0].argmax() == 0 and loud[1].argmax() == 3
    np.testing.assert_allclose(found[0, 2:], np.log(1e-6), rtol=1e-5)
    np.testing.assert_allclose(found[1, :2], np.log(1e-6), rtol=1e-5)


def test_quarters_average_to_the_whole_second() -> None:
    seconds = np.random.default_rng(0).standard_normal((2, 16_000)).astype(np.float32)
    quarters = log_mel_quarters(seconds).reshape(2, QUARTERS, BANDS)
    # 61 windows, with centres every 256 samples from sample 200.
    windows = np.array([15, 16, 16, 14])
    mean = (quarters * windows[:, None]).sum(1) / 61
    np.testing.assert_allclose(mean, log_mel_statistics(seconds)[:, :BANDS], rtol=1e-4, atol=1e-6)


# Voices and pictures by split


def test_no_voice_and_no_picture_is_in_two_splits(hard: Store) -> None:
    voices, pictures = [], []
    for split in hard.splits:
        found = hard.split(split)
        voices.append({hard.extra["voices"][voice] for voice in found.arrays["voice"]})
        number = found.arrays["video.picture"]
        pictures.append(set(number[number >= 0]))
    for parts in voices, pictures:
        assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))


# Information in the features


@pytest.mark.parametrize(
    ("name", "place"), [("audio", 10), pytest.param("video", 10, marks=pytest.mark.slow), ("video", 1)]
)
def test_voices_and_pictures_of_the_test_split_can_be_classified(hard: Store, name: str, place: int) -> None:
    """Chance is 0.1 for tens and for units; this small set gives 0.5 to 0.9."""
    from sklearn.linear_model import LogisticRegression

    def event_seconds(split: str) -> tuple[np.ndarray, np.ndarray]:
        found = hard.split(split)
        number = events(found, name).ravel()
        features = found.features[name].reshape(len(number), -1)
        return features[number >= 0], number[number >= 0] // place % 10

    probe = LogisticRegression(C=0.001, max_iter=300).fit(*event_seconds("train"))
    assert probe.score(*event_seconds("test")) > 0.3


# Generation and opening


def test_the_same_seed_gives_the_same_bytes(few: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "_workers", lambda: 3)
    again = load(cache=tmp_path, clips=FEW, progress=False)
    assert again.path.name == few.path.name and checksums(again) == checksums(few)


def test_another_seed_or_size_is_another_folder(hard: Store) -> None:
    recipes = [
        quick_recipe(0, False, CLIPS),
        quick_recipe(1, False, CLIPS),
        quick_recipe(0, True, CLIPS),
        quick_recipe(0, False, {**CLIPS, "val": 21}),
        quick_recipe(0, False, CLIPS, mismatch_share=0.0),
        quick_recipe(0, False, CLIPS, pixel_noise=0.2),
    ]
    names = [folder_name(recipe, talking_numbers.GENERATOR_VERSION) for recipe in recipes]
    assert len(set(names)) == len(recipes) and names[0] == hard.path.name
    numbers = [plan_numbers(recipe, "train", np.arange(3)).number for recipe in recipes[:2]]
    assert not np.array_equal(*numbers)


def test_open_by_name(hard: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(folder))
    monkeypatch.setattr(talking_numbers, "_make", lambda *arguments: pytest.fail("made again"))
    config = DataConfig(data="talking-numbers", train_clips=400, val_clips=100, test_clips=100)
    assert open_dataset(config, progress=False).path == hard.path
    monkeypatch.setattr(generated, "DEFAULT_CLIPS", CLIPS)
    assert open_data("talking-numbers", progress=False).path == hard.path
    assert "talking-numbers" in built_in.DATASETS


def test_check_finds_nothing_wrong(hard: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(folder))
    monkeypatch.setattr(generated, "DEFAULT_CLIPS", CLIPS)
    report = check("talking-numbers", progress=False)
    assert report.can_start and not report.findings and not report.flags
    assert report.clips["train"] == dict.fromkeys(("audio", "video", "text"), 400)
    assert len(report.classes["train"]) == len(report.classes["test"]) == 100


@pytest.mark.parametrize("task", ["cross-classification", "cross-localisation", "segmentation"])
def test_tasks_that_need_a_second_data_set_are_refused(easy: Store, task: str) -> None:
    config = DataConfig(data="talking-numbers")
    with pytest.raises(
        ValueError, match=f"probe_tasks must be classification, .* beside data 'talking-numbers', got '{task}'"
    ):
        tasks.check_transfer(config, ["classification", task])
    with pytest.raises(ValueError, match=f"task must be .* got '{task}'; of the built-in data, talking-digits, "):
        tasks.open_transfer(config, task, easy)
    assert tasks.open_transfer(config, ["classification", "localisation", "retrieval"], easy) == {}


def test_an_ablation_leaves_such_tasks_out() -> None:
    base = preset("recommended").replace(data="talking-numbers")
    assert ablate.with_all_columns(base, {}) == base


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        load(cache=tmp_path, seed=-1)
    with pytest.raises(FileNotFoundError, match="data must be one of talking-digits, .*talking-numbers, a feature"):
        open_data("talking-letters")
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_drawn_from_those_left() -> None:
    taken = np.array([5, 6])
    found = {tuple(number_clips._other_number([taken], np.random.default_rng(seed))) for seed in range(400)}
    first, second = (set(numbers) for numbers in zip(*found, strict=True))
    assert 5 not in first and 6 not in second and len(first) > 90 and len(second) > 90

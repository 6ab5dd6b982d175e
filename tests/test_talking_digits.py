"""The built-in data sets: speech, handwriting and sentences, with disjoint splits, made once and cached safely."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
from processes import start

from unicode_fast.config import DataConfig
from unicode_fast.data import Store, cache, open_dataset
from unicode_fast.data.talking_digits import clips, handwriting, sentences, sound, speech
from unicode_fast.data.talking_digits import digits as talking_digits
from unicode_fast.data.talking_digits.digits import load
from unicode_fast.data.talking_digits.generated import folder_name
from unicode_fast.data.talking_digits.spectrogram import BANDS, log_mel_statistics, mel_filters
from unicode_fast.files import locks
from unicode_fast.files.paths import cache_folder

CLIPS = {"train": 60, "val": 20, "test": 20}
FEW = {"train": 3, "val": 1, "test": 1}
ALL_VOICES = {"en": sound._ENGLISH, "fr": sound._FRENCH}
PACKAGE_PARENT = Path(talking_digits.__file__).parents[3]
NEW_PROCESS = """if True:
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    from unicode_fast.files import writing
    from unicode_fast.data import cache
    from unicode_fast.data.talking_digits import digits, sound
    sound._VARIANTS, sound._ENGLISH, digits._CALIBRATION_CLIPS = 1, sound._ENGLISH[::3], 20
    {patch}
    print(digits.load(cache=sys.argv[1], clips=dict(train=3, val=1, test=1), progress=False).path)
"""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with tiny.quick_speech():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def hard(folder: Path) -> Store:
    return load(cache=folder, clips=CLIPS, progress=False)


@pytest.fixture(scope="module")
def easy(folder: Path) -> Store:
    return load(cache=folder, easy=True, clips=CLIPS, progress=False)


@pytest.fixture(scope="module")
def second(folder: Path) -> Store:
    return load("talking-digits-b", cache=folder, clips=CLIPS, progress=False)


@pytest.fixture(scope="module")
def two(folder: Path) -> Store:
    return load("talking-digits-two", cache=folder, clips=CLIPS, progress=False)


@pytest.fixture(params=["hard", "easy", "second", "two"])
def any_store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return load(cache=tmp_path_factory.mktemp("few"), clips=FEW, progress=False)


def checksums(store: Store) -> dict[str, str]:
    manifest = json.loads((store.path / "manifest.json").read_bytes())
    arrays = [one for split in manifest["splits"].values() for one in split["parts"][0]["arrays"].values()]
    return {shard["file"]: shard["sha256"] for one in arrays for shard in one["shards"]}


# The content of a clip


def test_shapes(any_store: Store) -> None:
    assert any_store.splits == ["train", "val", "test"] and list(any_store.modalities) == ["audio", "video", "text"]
    assert any_store.classes == [str(digit) for digit in range(10)]
    for split, count in CLIPS.items():
        found = any_store.split(split)
        shapes = {name: array.shape[1:] for name, array in found.features.items()}
        assert shapes == {"audio": (10, 128), "video": (10, 7, 7, 16), "text": (10, 128)}
        assert len(found) == count and all(array.dtype == np.float32 for array in found.features.values())
        assert ("video.frames" in found.arrays) == (split != "train" or any_store.name == "talking-digits-two")
        np.testing.assert_array_equal(np.bincount(found.target, minlength=10), count // 10)


def test_ids_differ_in_all_splits(hard: Store) -> None:
    ids = np.concatenate([hard.split(split).id for split in hard.splits])
    assert len(set(ids)) == sum(CLIPS.values())


def test_labels_are_those_of_the_event(any_store: Store) -> None:
    for split in any_store.splits:
        found = any_store.split(split)
        for name in ("audio", "video"):
            label = found.labels[name]
            np.testing.assert_array_equal(label.sum(2), 1)
            named = label.argmax(2)
            on = named != 10
            np.testing.assert_array_equal(named[on], np.repeat(found.target, on.sum(1)))
            # One run of four to nine seconds.
            assert (np.diff(np.pad(on, ((0, 0), (1, 1))).astype(int)) == 1).sum(1).tolist() == [1] * len(found)
            if not (any_store.name == "talking-digits-two" and name == "video"):
                assert set(on.sum(1)) <= set(range(4, 10))


def test_shifts_are_up_to_a_second_and_flagged(hard: Store) -> None:
    shifted = 0
    for split in hard.splits:
        found = hard.split(split)
        audio, video = (found.labels[name].argmax(2) != 10 for name in ("audio", "video"))
        for edge in (audio, video), (audio[:, ::-1], video[:, ::-1]):
            assert np.abs(edge[0].argmax(1) - edge[1].argmax(1)).max() <= 1
        np.testing.assert_array_equal((audio != video).any(1), found.arrays["shifted"])
        shifted += found.arrays["shifted"].sum()
    assert 15 <= shifted <= 60


def test_distractors_are_other_digits_outside_the_event(hard: Store) -> None:
    with_distractor = 0
    for split in hard.splits:
        found = hard.split(split)
        for name in ("audio", "video"):
            other = found.arrays[f"{name}.distractor"]
            there = other >= 0
            assert (found.labels[name].argmax(2)[there] == 10).all()
            assert (other != found.target[:, None]).all() and there.sum(1).max() <= 3
            with_distractor += there.any(1).sum()
    # A share of 0.3 of 200 streams, within four standard deviations.
    assert 60 - 26 <= with_distractor <= 60 + 26


def test_easy_has_neither(easy: Store) -> None:
    for split in easy.splits:
        found = easy.split(split)
        assert not found.arrays["shifted"].any()
        assert (found.arrays["audio.distractor"] == -1).all() and (found.arrays["video.distractor"] == -1).all()


def test_pictures_match_the_arrays(hard: Store) -> None:
    pictures = handwriting.handwritten_pictures()
    for split in hard.splits:
        found = hard.split(split)
        on = found.labels["video"].argmax(2) != 10
        shown = np.where(on, found.target[:, None], found.arrays["video.distractor"])
        number = found.arrays["video.picture"]
        np.testing.assert_array_equal(np.where(number < 0, -1, pictures.digit[number]), shown)
        for row in number:
            drawn = row[row >= 0]
            assert len(set(drawn)) == len(drawn)


def test_features_are_cut_from_the_frames(any_store: Store) -> None:
    standard = any_store.extra["standardisation"]["video"]
    found = any_store.split("test")
    pixels = found.features["video"] * standard["deviation"] + standard["mean"]
    np.testing.assert_allclose(pixels * 255, handwriting.windows(found.arrays["video.frames"]) * 255, atol=0.01)


def test_all_sets_of_a_seed_share_the_standardisation(hard: Store, easy: Store, second: Store, two: Store) -> None:
    first = hard.extra["standardisation"]
    assert all(store.extra["standardisation"] == first for store in (easy, second, two))
    audio = hard.split("train").features["audio"]
    assert abs(audio.mean()) < 0.2 and abs(audio.std() - 1) < 0.2


def test_sentences_name_the_class(any_store: Store) -> None:
    language = "fr" if any_store.name == "talking-digits-b" else "en"
    for split in any_store.splits:
        found = any_store.split(split)
        lengths = found.lengths["text"]
        assert set(lengths) <= {8, 9, 10}
        for sentence, digit, length in zip(found.arrays["text.sentence"], found.target, lengths, strict=True):
            words = sentence.split()
            assert len(words) == length
            ways = {sentences.NAMES[language][digit], str(digit), sentences._ROMAN[digit]}
            assert ways & set(words)
            others = {way for name in (sentences.NAMES[language], sentences._ROMAN) for way in name} - ways
            assert not (others | set("0123456789") - ways) & set(words)
        text = found.features["text"]
        assert (text[~found.mask["text"]] == 0).all()
        norms = np.linalg.norm(text, axis=2)[found.mask["text"]]
        np.testing.assert_allclose(norms, norms[0], rtol=1e-5)


def test_two_digits(two: Store) -> None:
    for split in two.splits:
        found = two.split(split)
        mask, side = found.arrays["video.mask"], found.arrays["side"]
        assert mask.shape[1:] == (10, 16, 16) and set(np.unique(mask)) == {0, 1}
        assert (found.arrays["other"] != found.target).all()
        left, right = mask[..., :8].sum((1, 2, 3)), mask[..., 8:].sum((1, 2, 3))
        assert (np.where(side == 0, right, left) == 0).all()
        assert (mask.sum((2, 3)) >= 5).all()
        frames = found.arrays["video.frames"].astype(float)
        outside = (frames * (1 - mask)).sum((1, 2, 3)) / (1 - mask).sum((1, 2, 3))
        assert ((frames * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)) > 1.3 * outside).all()
    assert 0 < two.split("train").arrays["side"].mean() < 1


# Voices and pictures by split


@pytest.mark.parametrize("name", ["hard", "second", "two"])
def test_no_voice_and_no_picture_is_in_two_splits(name: str, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(name)
    pictures = handwriting.printed_pictures() if name == "second" else handwriting.handwritten_pictures()
    voices, groups = [], []
    for split in store.splits:
        found = store.split(split)
        voices.append({store.extra["voices"][voice] for voice in found.arrays["voice"]})
        number = found.arrays["video.picture"]
        groups.append(set(pictures.group[number[number >= 0]]))
    for divided in voices, groups:
        assert all(divided) and sum(map(len, divided)) == len(set.union(*divided))


@pytest.mark.parametrize(("name", "fewest"), [("talking-digits", 12), ("talking-digits-b", 12)])
def test_all_voices_are_divided(name: str, fewest: int) -> None:
    recipe = clips.Recipe(name, 0, False, CLIPS)
    names = ALL_VOICES[recipe.language]
    count = len(names)
    assert len(set(names)) == count
    divided = recipe.divided(count, "voices")
    assert len(divided["train"]) >= fewest and min(len(divided["val"]), len(divided["test"])) >= 4
    np.testing.assert_array_equal(np.sort(np.concatenate(list(divided.values()))), np.arange(count))
    other_seed = clips.Recipe(name, 1, False, CLIPS).divided(count, "voices")
    assert not np.array_equal(divided["train"], other_seed["train"])


def test_english_sets_share_the_division_of_the_first() -> None:
    one, *others = (clips.Recipe(f"talking-{name}", 3, False, CLIPS) for name in ("digits", "digits-two", "numbers"))
    for other in others:
        for what in ("voices", "pictures"):
            np.testing.assert_equal(other.divided(99, what), one.divided(99, what))


def test_easy_shares_voices_and_pictures() -> None:
    divided = clips.Recipe("talking-digits", 0, True, CLIPS).divided(30, "voices")
    assert all(len(numbers) == 30 for numbers in divided.values())


# Information in the features


def event_seconds(store: Store, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = store.split(split)
    label = found.labels[name].argmax(2).ravel()
    features = found.features[name].reshape(len(label), -1)
    return features[label != 10], label[label != 10]


@pytest.mark.parametrize("name", ["audio", "video"])
def test_voices_and_pictures_of_the_test_split_can_be_classified(hard: Store, name: str) -> None:
    """Chance is 0.1; the 60 clips of this small set give 0.5 to 0.8."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=0.01, max_iter=200).fit(*event_seconds(hard, "train", name))
    assert probe.score(*event_seconds(hard, "test", name)) > 0.3


# Functions


def test_spectrogram_of_silence_and_of_a_tone() -> None:
    silence, tone = np.zeros(16_000), np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    found = log_mel_statistics(np.stack([silence, tone]).astype(np.float32))
    assert found.shape == (2, 2 * BANDS) and found.dtype == np.float32
    np.testing.assert_allclose(found[0, :BANDS], np.log(1e-6), rtol=1e-6)
    np.testing.assert_allclose(found[0, BANDS:], 0, atol=1e-5)
    # 1000 Hz is bin 32 of 512 at 16 kHz.
    assert found[1, :BANDS].argmax() == mel_filters()[32].argmax()
    assert found[1, BANDS:][found[1, :BANDS].argmax()] < 0.01


def test_windows_by_hand() -> None:
    frame = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = handwriting.windows(frame)
    assert found.shape == (7, 7, 16)
    expected = [2 * 16 * row + 2 * 16 + 10 + column for row in (0, 0.5, 1, 1.5) for column in range(4)]
    np.testing.assert_allclose(found[1, 5] * 255, expected, rtol=1e-6)


def test_enlarged_by_hand() -> None:
    small = np.zeros((1, 8, 8), np.float32)
    small[0, 0, 0], small[0, 0, 1] = 1, 0.5
    found = handwriting.enlarged(small)[0]
    assert found.shape == (16, 16)
    # Every new pixel lies a quarter of an old pixel beside its centre; the border is repeated.
    np.testing.assert_allclose(found[0, :5], [1, 0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(found[:4, 0], [1, 0.75, 0.25, 0])


def test_printed_pictures_are_digits() -> None:
    pictures = handwriting.printed_pictures()
    assert pictures.pixels.shape[1:] == (8, 8) and pictures.pixels.min() >= 0 and pictures.pixels.max() <= 1
    assert set(pictures.digit) == set(range(10)) and len(set(pictures.group)) == len(handwriting._FACES)
    ink = pictures.pixels.mean((1, 2))
    assert ink.min() > 0.03 and ink.max() < 0.7


def test_word_vectors() -> None:
    seven, again, seventh, garden = map(sentences.word_vector, ("seven", "seven", "seventh", "garden"))
    np.testing.assert_array_equal(seven, again)
    np.testing.assert_allclose(np.linalg.norm(seven), 1, rtol=1e-6)
    assert seven @ seventh > 0.4 > abs(seven @ garden)
    digits = np.stack([sentences.word_vector(str(digit)) for digit in range(10)])
    assert np.abs(digits @ digits.T - np.eye(10)).max() < 0.9


def test_the_same_words_sound_the_same_in_every_process() -> None:
    """Breathy voices such as f3 draw noise, which espeak-ng by default seeds with the time."""
    words = [speech.SpokenWord(text, voice, 160, 50) for voice in ("en-us+f3", "en+m2") for text in ("six", "seven")]
    done: list[int] = []
    first, second_time = speech.speak(words, done.append), speech.speak(words)
    assert done == [1] * 4
    for one, other in zip(first, second_time, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.float32 and 0.2 < len(one) / speech.SAMPLE_RATE_HZ < 1
        np.testing.assert_allclose(np.mean(one**2), 1, rtol=1e-4)


def test_all_voices_exist() -> None:
    words = [speech.SpokenWord("six", voice, 160, 50) for names in ALL_VOICES.values() for voice in names]
    assert len(speech.speak(words)) == len(words)


def test_speech_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="voice must be one of espeak-ng's, got 'martian'"):
        speech.speak([speech.SpokenWord("six", "martian", 160, 50)])
    with pytest.raises(ValueError, match="text must make a sound, got silence for ' '"):
        speech.speak([speech.SpokenWord(" ", "en-us", 160, 50)])
    child = tmp_path / "child.py"
    child.write_text("import sys; sys.exit('out of breath')")
    monkeypatch.setattr(speech, "_CHILD", child)
    with pytest.raises(RuntimeError, match="must speak 1 words, but its process ended with status 1: out of breath"):
        speech.speak([speech.SpokenWord("six", "en-us", 160, 50)])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_synthesiser_is_not_loaded_here(hard: Store) -> None:
    assert "espeak" not in Path("/proc/self/maps").read_text()


# One generation


def test_a_second_call_opens_the_existing_store(hard: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talking_digits, "write_store", lambda *arguments: pytest.fail("made again"))
    assert load(cache=folder, clips=CLIPS, progress=False).path == hard.path


def test_the_same_seed_gives_the_same_bytes(hard: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "_workers", lambda: 3)
    again = load(cache=tmp_path, clips=CLIPS, progress=False)
    assert again.path.name == hard.path.name and checksums(again) == checksums(hard)


def test_another_seed_or_size_is_another_folder(hard: Store) -> None:
    recipes = [
        clips.Recipe("talking-digits", 0, False, CLIPS),
        clips.Recipe("talking-digits", 1, False, CLIPS),
        clips.Recipe("talking-digits", 0, True, CLIPS),
        clips.Recipe("talking-digits", 0, False, {**CLIPS, "val": 21}),
    ]
    names = [folder_name(recipe, talking_digits.GENERATOR_VERSION) for recipe in recipes]
    assert len(set(names)) == 4 and names[0] == hard.path.name


def test_damage_is_repaired_with_a_note(few: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = load(cache=tmp_path, clips=FEW, progress=False)
    file = made.path / "train-audio.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    again = load(cache=tmp_path, clips=FEW, progress=False)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert "making talking-digits-seed0" in shown.err and "train-audio.npy" in shown.err and "checksum" in shown.err
    assert checksums(again) == checksums(few)
    # Files are missing, as after an interrupted copy.
    (again.path / "manifest.json").unlink()
    assert checksums(load(cache=tmp_path, clips=FEW, progress=False)) == checksums(few)


def test_killed_while_writing(few: Store, tmp_path: Path) -> None:
    patch = "writing.os.rename = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)"
    child = start("-c", NEW_PROCESS.format(patch=patch), tmp_path, PACKAGE_PARENT)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert any(".unfinished-" in path.name for path in tmp_path.iterdir())
    found = load(cache=tmp_path, clips=FEW, progress=False)
    assert checksums(found) == checksums(few)
    assert not any(".unfinished-" in path.name for path in tmp_path.iterdir())


def test_two_processes_at_once(few: Store, tmp_path: Path) -> None:
    children = [start("-c", NEW_PROCESS.format(patch="pass"), tmp_path, PACKAGE_PARENT) for _ in range(2)]
    printed = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], printed
    assert printed[0][0] == printed[1][0] != ""
    assert checksums(load(cache=tmp_path, clips=FEW, progress=False)) == checksums(few)
    assert not any(".unfinished-" in path.name for path in tmp_path.iterdir())


def test_two_at_once_where_there_are_no_locks(few: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_take", lambda *arguments, **keywords: False)
    together, rename = threading.Barrier(2, timeout=60), os.rename

    def rename_together(*folders: Path) -> None:
        together.wait()
        rename(*folders)

    monkeypatch.setattr(os, "rename", rename_together)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: load(cache=tmp_path, clips=FEW, progress=False), range(2)))
    assert checksums(found[0]) == checksums(found[1]) == checksums(few)
    assert not any(".unfinished-" in path.name for path in tmp_path.iterdir())


def test_progress_is_shown_on_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(cache=tmp_path, easy=True, clips=FEW, progress=True)
    printed = capfd.readouterr()
    assert printed.out == "" and "making talking-digits" in printed.err and "clip/s" in printed.err


# Errors


def test_a_full_disk(hard: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full"):
        load(cache=folder, seed=5, clips=FEW, progress=False)
    left = set(folder.iterdir()) - set(before)
    assert all(path.name.endswith(".lock") for path in left)
    assert load(cache=folder, clips=CLIPS, progress=False).path == hard.path


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(talking_digits, "_make", lambda *arguments: pytest.fail("worked in vain"))
    with pytest.raises(OSError, match="cache folder must be writable.*set UNICODE_FAST_CACHE"):
        load(cache=tmp_path / "file" / "deeper", clips=CLIPS, progress=False)

    def refused(*arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", refused)
    with pytest.raises(PermissionError, match="Permission denied.*set UNICODE_FAST_CACHE"):
        load(cache=tmp_path / "locked", clips=CLIPS, progress=False)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name must be one of talking-digits, .*got 'singing-digits'"):
        load("singing-digits", cache=tmp_path)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        load(cache=tmp_path, seed=-1)
    for counts in ({"train": 10}, {**CLIPS, "val": 0}, {**CLIPS, "more": 1}):
        with pytest.raises(ValueError, match="clips must give at least 1 for each of train, val, test"):
            load(cache=tmp_path, clips=counts)
    assert list(tmp_path.iterdir()) == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("UNICODE_FAST_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "unicode_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "unicode_fast"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "unicode_fast"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "unicode_fast"


def test_open_dataset(hard: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(folder))
    named = DataConfig(train_clips=60, val_clips=20, test_clips=20)
    assert open_dataset(named, progress=False).path == hard.path
    assert open_dataset(DataConfig(data=str(hard.path))).path == hard.path
    with pytest.raises(FileNotFoundError, match="data must be an existing folder, got '.*/no/such/folder'"):
        open_dataset(DataConfig(data=str(folder / "no" / "such" / "folder")))
    with pytest.raises(FileNotFoundError, match="a feature store's folder"):
        open_dataset(DataConfig(data=str(folder)))

"""Steps of media files: by presentation time, one clock, windows, and files that lack something."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from media_files import SIDE, beeps, flash_and_beep, write_media

from unicode_fast import media
from unicode_fast.config import Modality
from unicode_fast.media.decoding import pixels

pytest.importorskip("av")


class Brightness:
    """The mean colour of a frame."""

    name, reads, modality, rate = "brightness", "frames", Modality("vector", (3,)), 4

    def __call__(self, given):
        return given.mean((1, 2)).astype(np.float32)


class Loudness:
    """The root mean square of a second."""

    name, reads, modality, rate = "loudness", "sound", Modality("vector", (1,)), 16000

    def __call__(self, given):
        return np.sqrt(np.square(given).mean(1, keepdims=True))


class Letters:
    """The length of each word."""

    name, reads, modality, rate = "letters", "caption", Modality("words", (1,)), 0

    def __call__(self, given):
        return np.array([[len(word)] for word in given.split()[:10]], np.float32).reshape(-1, 1)


def own():
    return {"audio": Loudness(), "video": Brightness(), "text": Letters()}


@pytest.mark.parametrize(
    ("suffix", "fps"), [(".mp4", 25), (".mp4", 30000 / 1001), (".mkv", 25), (".mov", 24), (".avi", 25), (".webm", 25)]
)
def test_flash_and_beep_land_in_their_steps(tmp_path, suffix, fps):
    file = flash_and_beep(tmp_path / f"film{suffix}", fps)
    (clip,) = media.features(file, own(), caption="two flashes")
    assert clip.start_s == 0 and clip.features["text"].tolist() == [[3], [7]]
    bright, loud = clip.features["video"].mean(1), clip.features["audio"][:, 0]
    assert bright.shape == loud.shape == (10,)
    expected = np.isin(np.arange(10), (3, 7))
    np.testing.assert_allclose(bright, 255 * expected, atol=6)
    np.testing.assert_allclose(loud, 0.5 / np.sqrt(2) * expected, atol=0.012)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".m4a", ".wav", ".mp3", ".webm"])
@pytest.mark.parametrize("rate_hz", [16000, 22050])
def test_sound_is_within_20_ms_of_its_time(tmp_path, suffix, rate_hz):
    with media.MediaFile(flash_and_beep(tmp_path / f"film{suffix}")) as file:
        samples = file.sound(rate_hz).samples
    loud = np.abs(samples) > 0.1
    for second in (3, 7):
        onset, end = (second * rate_hz + np.array([-0.5, 1.5]) * rate_hz).astype(int)
        places = onset + np.flatnonzero(loud[onset:end])
        assert abs(places[0] / rate_hz - second) < 0.02
        assert abs(places[-1] / rate_hz - second - 1) < 0.02


def test_sound_keeps_its_samples(tmp_path):
    """The same tone, not only its place: the resampler neither delays nor turns it."""
    with media.MediaFile(write_media(tmp_path / "tone.wav", sound=beeps(4, (0, 1, 2, 3)))) as file:
        samples = file.sound(16000, 1.25, 2.5).samples
    time = 1.25 + np.arange(len(samples)) / 16000
    assert len(samples) == 20000
    np.testing.assert_allclose(samples, 0.5 * np.cos(2 * np.pi * 1000 * time), atol=2e-3)


def test_frames_are_taken_by_presentation_time(tmp_path):
    """Of a film whose frames do not have equal lengths."""
    times = [0, 0.1, 0.2, 1.5, 1.6, 3.02, 3.5, 3.9, 5.0]
    frames = np.stack([np.full((SIDE, SIDE, 3), 25 * number, np.uint8) for number in range(len(times))])
    file = write_media(tmp_path / "film.mkv", frames, times)
    (clip,) = media.features(file, {"video": Brightness()})
    wanted = np.arange(0.125, 5, 0.25)
    shown = 25 * (np.searchsorted(times, wanted, side="right") - 1)
    np.testing.assert_allclose(clip.features["video"][:5].mean(1), shown.reshape(5, 4).mean(1), atol=3)


def test_one_clock_for_sound_that_begins_later(tmp_path):
    frames = np.zeros((100, SIDE, SIDE, 3), np.uint8)
    file = write_media(tmp_path / "film.mkv", frames, sound=beeps(2, (0,)), sound_at_s=1.5)
    (clip,) = media.features(file, own())
    np.testing.assert_allclose(clip.features["audio"][:, 0] > 0.05, [False, True, True, False])


def test_long_files_are_cut_into_windows(tmp_path):
    file = flash_and_beep(tmp_path / "film.mp4", seconds=24, at=(3, 17, 23))
    clips = media.features(file, own(), caption="a long film")
    assert [clip.start_s for clip in clips] == [0, 10, 20]
    assert [len(clip.features["video"]) for clip in clips] == [10, 10, 4]
    assert all(clip.features["text"].tolist() == [[1], [4], [4]] for clip in clips)
    loud = np.concatenate([clip.features["audio"][:, 0] for clip in clips]) > 0.1
    bright = np.concatenate([clip.features["video"][:, 0] for clip in clips]) > 100
    assert np.flatnonzero(loud).tolist() == np.flatnonzero(bright).tolist() == [3, 17, 23]


def test_a_part_of_a_file_is_the_same_seconds(tmp_path):
    file = flash_and_beep(tmp_path / "film.mp4", seconds=24, at=(3, 17, 23))
    (clip,) = media.features(file, own(), start_s=14, end_s=20)
    assert clip.start_s == 14
    assert (clip.features["audio"][:, 0] > 0.1).tolist() == [False, False, False, True, False, False]
    assert (clip.features["video"][:, 0] > 100).tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize(("seconds", "steps"), [(0.04, 1), (0.4, 1), (1.4, 1), (1.52, 2), (2.48, 2), (3.0, 3)])
def test_a_last_part_counts_from_half_a_second_on(tmp_path, seconds, steps):
    frames = np.zeros((round(seconds * 25), SIDE, SIDE, 3), np.uint8)
    (clip,) = media.features(write_media(tmp_path / "film.mp4", frames), {"video": Brightness()})
    assert clip.features["video"].shape == (steps, 3)


def test_what_a_file_lacks_is_missing(tmp_path):
    frames = np.full((50, SIDE, SIDE, 3), 200, np.uint8)
    (silent,) = media.features(write_media(tmp_path / "silent.mp4", frames), own())
    assert list(silent.features) == ["video"]
    (unseen,) = media.features(write_media(tmp_path / "sound.wav", sound=beeps(2, (1,))), own(), caption=" . ")
    assert list(unseen.features) == ["audio", "text"]
    (unseen,) = media.features(tmp_path / "sound.wav", own(), caption="")
    assert list(unseen.features) == ["audio"]


def test_a_stream_that_no_backbone_reads(tmp_path):
    file = write_media(tmp_path / "silent.mp4", np.full((100, SIDE, SIDE, 3), 200, np.uint8))
    (clip,) = media.features(file, {"audio": Loudness(), "text": Letters()}, caption="a white film")
    assert list(clip.features) == ["text"] and clip.start_s == 0
    with pytest.raises(media.MediaError, match="silent.mp4 must hold what a backbone reads, got nothing"):
        media.features(file, {"audio": Loudness(), "text": Letters()})
    film = flash_and_beep(tmp_path / "film.mp4")
    (clip,) = media.features(film, {"text": Letters()}, caption="two flashes")
    assert list(clip.features) == ["text"]
    (clip,) = media.features(film, {"audio": Loudness()})
    assert clip.features["audio"].shape == (10, 1)


def test_a_picture_is_one_step(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for suffix in ("png", "jpg", "bmp"):
        image.new("RGB", (80, 60), (10, 200, 90)).save(tmp_path / f"picture.{suffix}")
        (clip,) = media.features(tmp_path / f"picture.{suffix}", own(), caption="green")
        assert list(clip.features) == ["video", "text"]
        np.testing.assert_allclose(clip.features["video"], [[10, 200, 90]], atol=3)


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1), (-1, 0, 0, 1), (0, 1, 1, 0)])
def test_phones_turn_and_mirror_pictures_by_metadata(tmp_path, matrix):
    av = pytest.importorskip("av")
    stored = np.zeros((10, 96, 64, 3), np.uint8)
    stored[:, :32, :20] = 250
    plain = write_media(tmp_path / "plain.mp4", stored)
    with av.open(str(plain)) as read, av.open(str(tmp_path / "turned.mp4"), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)
    # The matrix in the header of the track, which says where a pixel at (x, y) is shown.
    data = bytearray((tmp_path / "turned.mp4").read_bytes())
    a, b, c, d = matrix
    identity, turned = (
        b"".join(value.to_bytes(4, "big", signed=True) for value in values)
        for values in (
            (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30),
            (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30),
        )
    )
    place = data.index(identity, data.index(b"tkhd"))
    data[place : place + len(identity)] = turned
    (tmp_path / "turned.mp4").write_bytes(data)
    # Each pixel on its own, about the middle.
    height, width = (96, 64) if a else (64, 96)
    expected = np.zeros((height, width))
    for y in range(96):
        for x in range(64):
            from_middle = np.array([x - 31.5, y - 47.5])
            column, row = from_middle @ [[a, b], [c, d]] + [(width - 1) / 2, (height - 1) / 2]
            expected[round(row), round(column)] = stored[0, y, x, 0]
    with media.MediaFile(tmp_path / "turned.mp4") as file:
        _, _, frame = next(file.frames())
        picture = pixels(frame)
    assert picture.shape == (height, width, 3)
    assert np.abs(picture.mean(2) - expected).mean() < 5


def broken(folder: Path) -> dict[str, Path]:
    """Files that are no whole media files, by what is wrong with them."""
    whole = flash_and_beep(folder / "whole.mp4")
    data = whole.read_bytes()
    made = {"empty": b"", "text": b"a text\n" * 100, "half": data[: len(data) // 2], "noise": bytes(range(256)) * 64}
    for name, content in made.items():
        (folder / f"{name}.mp4").write_bytes(content)
    cut = flash_and_beep(folder / "cut.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(cut[: len(cut) // 2])
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:10,\n{whole}\n#EXT-X-ENDLIST\n")
    (folder / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {whole}\n")
    return {path.name: path for path in folder.iterdir() if path != whole}


def test_broken_files_are_named(tmp_path):
    files = broken(tmp_path)
    assert len(files) == 7
    for name, file in files.items():
        with pytest.raises(media.MediaError) as caught:
            media.features(file, own())
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        media.features(tmp_path / "none.mp4", own())
    with pytest.raises(media.MediaError, match="plain file"):
        media.features(tmp_path, own())
    with pytest.raises(ValueError, match="start_s must be at least 0 and before end_s, got 4 and 2"):
        media.features(tmp_path / "whole.mp4", own(), start_s=4, end_s=2)
    with pytest.raises(media.MediaError, match="nothing"):
        media.features(tmp_path / "whole.mp4", own(), start_s=60)


def test_a_preprocessor_makes_the_same_backbones_or_none(monkeypatch):
    monkeypatch.setattr("unicode_fast.media.backbones._factories", {"loudness": Loudness, "letters": Letters})
    written = media.Preprocessor.of({"audio": Loudness(), "text": Letters()})
    read = media.Preprocessor.from_dict(written.as_dict())
    assert read == written and list(read.make()) == ["audio", "text"]
    assert read.modalities == {"audio": Modality("vector", (1,)), "text": Modality("words", (1,))}
    for change in ({"format": 2}, {"step_s": 2.0}, {"modalities": {"audio": {"backbone": 3}}}, {"modalities": []}):
        with pytest.raises(ValueError, match="preprocessor must"):
            media.Preprocessor.from_dict({**written.as_dict(), **change})
    monkeypatch.setattr(Loudness, "weights_sha256", "11", raising=False)
    with pytest.raises(ValueError, match="weights_sha256 of backbone 'loudness' must be None, got '11'"):
        read.make()
    with pytest.raises(ValueError, match="backbone must be one of loudness, letters, or a local folder"):
        media.make("louder", "sound")
    with pytest.raises(ValueError, match="must read frames, it reads sound"):
        media.make("loudness", "frames")
    with pytest.raises(ValueError, match="name must be new, got 'loudness'"):
        media.register("loudness", Letters)


def test_the_import_is_light():
    code = "import sys, unicode_fast; print([m for m in ('av', 'transformers', 'PIL', 'h5py') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("suffix", [".mp3", ".m4a", ".wav", ".mkv", ".webm"])
def test_a_part_has_the_sound_of_the_whole(tmp_path, suffix):
    noise = np.random.default_rng(0).normal(0, 0.1, 48000 * 12).astype(np.float32)
    frames = np.zeros((25 * 12, SIDE, SIDE, 3), np.uint8) if suffix in (".mkv", ".webm") else None
    with media.MediaFile(write_media(tmp_path / f"noise{suffix}", frames, sound=noise)) as file:
        whole, part = file.sound(48000).samples, file.sound(48000, 7.5, 9).samples
    assert len(part) == 72000
    # Decoders of sound begin a part with some samples that differ from those of the whole. Matroska rounds times to
    # milliseconds, so a part of it may be a millisecond early or late.
    late = range(-48, 49) if suffix in (".mkv", ".webm") else (0,)
    beginning = 7 * 48000 + 24000 + 6000
    errors = [np.abs(part[6000:-48] - whole[beginning + k : 9 * 48000 - 48 + k]).max() for k in late]
    assert min(errors) < 2e-3


def test_times_in_milliseconds_leave_no_gaps(tmp_path):
    # At this rate a piece of sound lasts no whole number of milliseconds.
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(44100 * 3) / 44100)).astype(np.float32)
    found = []
    for suffix in (".mp4", ".mkv"):
        with media.MediaFile(write_media(tmp_path / f"tone{suffix}", sound=tone, rate_hz=44100)) as file:
            found.append(file.sound(16000, 1, 2).samples)
    np.testing.assert_allclose(*found, atol=0.01)


def test_a_file_that_cannot_be_searched(tmp_path):
    file = flash_and_beep(tmp_path / "film.flv")
    (whole,) = media.features(file, {"audio": Loudness()})
    (part,) = media.features(file, {"audio": Loudness()}, start_s=6, end_s=9)
    np.testing.assert_allclose(part.features["audio"], whole.features["audio"][6:9], atol=0.01)

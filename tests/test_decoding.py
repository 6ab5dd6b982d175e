"""Decoding: what is read of a file, at which time, and which files are refused."""

import struct
import tracemalloc
import wave
import zlib

import numpy as np
import pytest
from media_files import SIDE, beeps, flash_and_beep, write_media

from unicode_fast.media import MediaError, MediaFile, decoding
from unicode_fast.media.decoding import pixels

av = pytest.importorskip("av")


def shown(file, start_s=0.0, end_s=np.inf):
    """Begin, end and brightness of each frame of a part."""
    with MediaFile(file) as media:
        return np.array([(begin, end, pixels(frame).mean()) for begin, end, frame in media.frames(start_s, end_s)])


def heard(file, *part, rate_hz=16000):
    with MediaFile(file) as media:
        return media.sound(rate_hz, *part)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_flash_and_beep_of_a_film_with_unequal_frames(tmp_path, suffix):
    random = np.random.default_rng(0)
    times = np.unique(np.concatenate([[0, 3, 4, 7, 8], random.uniform(0, 10, 100)]).round(2))
    white = np.isin(times.astype(int), (3, 7))
    frames = np.repeat(np.where(white, 255, 0).astype(np.uint8), SIDE * SIDE * 3).reshape(-1, SIDE, SIDE, 3)
    file = write_media(tmp_path / f"film{suffix}", frames, times, beeps(10))
    begin, end, bright = shown(file).T
    np.testing.assert_allclose(begin, times, atol=2e-3)
    np.testing.assert_allclose(end[:-1], begin[1:])
    loud = np.abs(heard(file).samples) > 0.1
    for second in (3, 7):
        inside = (begin >= second - 0.5) & (begin < second + 1.5) & (bright > 128)
        assert abs(begin[inside].min() - second) < 0.02 and abs(end[inside].max() - second - 1) < 0.02
        places = np.flatnonzero(loud[int((second - 0.5) * 16000) : int((second + 1.5) * 16000)]) / 16000 - 0.5
        assert abs(places[0]) < 0.002 and abs(places[-1] - 1) < 0.002


@pytest.mark.parametrize("suffix", [".mp3", ".m4a", ".wav", ".mp4", ".avi", ".mkv", ".webm", ".flv", ".ts"])
def test_a_part_is_the_same_time_of_the_whole(tmp_path, suffix):
    random = np.random.default_rng(0)
    frames = None
    if suffix not in (".mp3", ".m4a", ".wav"):
        # Grey rises with time.
        frames = np.repeat(2 * np.arange(120, dtype=np.uint8), SIDE * SIDE * 3).reshape(-1, SIDE, SIDE, 3)
    noise = random.normal(0, 0.1, 48000 * 12).astype(np.float32)
    file = write_media(tmp_path / f"noise{suffix}", frames, sound=noise, fps=10)
    whole, part = heard(file, rate_hz=48000).samples, heard(file, 7.5, 9, rate_hz=48000)
    assert len(part.samples) == 72000 and part.end_s == 9
    # Decoders begin with some samples that differ, and times in some formats are rounded to 1 ms.
    given = part.samples[6000:]
    errors = {shift: np.abs(given[:2000] - whole[360000 + 6000 + shift :][:2000]).max() for shift in range(-96, 97)}
    shift = min(errors, key=errors.__getitem__)
    np.testing.assert_allclose(given, whole[360000 + 6000 + shift :][: len(given)], atol=2e-3)
    assert shift == 0 or suffix in (".mkv", ".webm", ".flv", ".avi")
    if frames is not None:
        every, some = shown(file), shown(file, 7.5, 9)
        # AVI's times after a search are 2 ms beside the others.
        expected = every[(every[:, 1] > 7.5 + 2e-3) & (every[:, 0] < 9 - 2e-3)]
        inside = (some[:, 1] > 7.5 + 2e-3) & (some[:, 0] < 9 - 2e-3)
        assert len(some) <= inside.sum() + 2
        np.testing.assert_allclose(some[inside], expected, atol=2e-3)


def test_rounded_times_leave_no_gaps(tmp_path):
    """Matroska counts milliseconds; a frame of AAC lasts 21.33 ms."""
    tone = beeps(4, (0, 1, 2, 3))
    exact, rounded = (heard(write_media(tmp_path / f"tone{suffix}", sound=tone)).samples for suffix in (".m4a", ".mka"))
    np.testing.assert_allclose(rounded[:60000], exact[:60000], atol=1e-5)


def test_gaps_of_sound_are_zeros(tmp_path):
    tone = beeps(1, (0,))
    with av.open(str(tmp_path / "gap.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=48000, layout="mono")
        for at_s in (0, 2.5):
            frame = av.AudioFrame.from_ndarray((tone * 32767).astype(np.int16)[None], "s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, int(at_s * 48000)
            container.mux(stream.encode(frame))
    found = heard(tmp_path / "gap.mkv")
    assert found.end_s == pytest.approx(3.5) and len(found.samples) == 56000
    loud = np.abs(found.samples[:56000].reshape(-1, 160)).max(1) > 0.3
    assert np.flatnonzero(np.diff(loud)).tolist() == [99, 249]


@pytest.mark.parametrize("rate_hz", [8000, 16000, 44100, 48000])
def test_sound_is_resampled_in_blocks(tmp_path, rate_hz, monkeypatch):
    noise = np.random.default_rng(0).normal(0, 0.1, 44100 * 5 + 77).astype(np.float32)
    file = write_media(tmp_path / "noise.wav", sound=noise, rate_hz=44100)
    whole = heard(file, rate_hz=rate_hz)
    monkeypatch.setattr(decoding, "_BLOCK_S", 1)
    blocks = heard(file, rate_hz=rate_hz)
    assert blocks.end_s == whole.end_s and len(blocks.samples) == round(whole.end_s * rate_hz)
    np.testing.assert_allclose(blocks.samples, whole.samples, atol=1e-6)
    if rate_hz == 44100:
        np.testing.assert_allclose(whole.samples, noise, atol=1e-4)


def test_long_sound_takes_the_memory_of_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_BLOCK_S", 5)
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setparams((1, 2, 48000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 48000 * 100))
    tracemalloc.start()
    try:
        samples = heard(tmp_path / "long.wav", rate_hz=8000).samples
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(samples) == 8000 * 100
    # All samples in the rate of the file would be 19 MB.
    assert peak_bytes < 12e6


def test_channels_are_averaged(tmp_path):
    one = beeps(1, (0,))
    samples = (np.stack([one, -0.5 * one], 1) * 32767).astype(np.int16)
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setparams((2, 2, 48000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    np.testing.assert_allclose(heard(tmp_path / "stereo.wav", rate_hz=48000).samples, one / 4, atol=1e-4)


def test_the_first_streams_are_read_but_no_cover(tmp_path):
    image = pytest.importorskip("PIL.Image")
    with av.open(str(tmp_path / "several.mkv"), "w") as container:
        videos = [container.add_stream("mpeg4", rate=25, width=SIDE, height=SIDE, pix_fmt="yuv420p") for _ in range(2)]
        audios = [container.add_stream("pcm_s16le", rate=48000, layout="mono") for _ in range(2)]
        for number, (video, audio) in enumerate(zip(videos, audios, strict=True)):
            picture = np.full((SIDE, SIDE, 3), 200 * (1 - number), np.uint8)
            container.mux([*video.encode(av.VideoFrame.from_ndarray(picture)), *video.encode()])
            tone = (beeps(1, (0,)) * 32767 / (1 + number)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(tone[None], "s16", layout="mono")
            frame.sample_rate = 48000
            container.mux([*audio.encode(frame), *audio.encode()])
    assert shown(tmp_path / "several.mkv")[0, 2] > 190
    assert heard(tmp_path / "several.mkv").samples.max() == pytest.approx(0.5, abs=0.01)

    image.new("RGB", (40, 40)).save(tmp_path / "cover.png")
    cover = b"\0image/png\0\x03\0" + (tmp_path / "cover.png").read_bytes()
    frame = b"APIC" + struct.pack(">IH", len(cover), 0) + cover
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    plain = write_media(tmp_path / "plain.mp3", sound=beeps(2, (1,))).read_bytes()
    (tmp_path / "cover.mp3").write_bytes(b"ID3\x03\0\0" + size + frame + plain)
    with av.open(str(tmp_path / "cover.mp3")) as container:
        assert container.streams.video
    with MediaFile(tmp_path / "cover.mp3") as media:
        assert media.has_sound and not media.has_frames


def test_pictures_are_turned_as_their_camera_was(tmp_path):
    image, operations = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    corner = np.zeros((64, 96, 3), np.uint8)
    corner[:32, :48] = 250
    for orientation in (1, 3, 6, 8):
        exif = image.Exif()
        exif[0x112] = orientation
        file = tmp_path / f"{orientation}.jpg"
        image.fromarray(corner).save(file, exif=exif, quality=95)
        upright = np.asarray(operations.exif_transpose(image.open(file)))
        with MediaFile(file) as media:
            ((_, _, frame),) = media.frames()
            found, half = pixels(frame), pixels(frame, upright[::2, ::2])
        np.testing.assert_allclose(found, upright, atol=2)
        assert half.shape == upright[::2, ::2].shape
        assert np.abs(half.astype(int) - upright[::2, ::2]).mean() < 4


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".wav", ".flac", ".webm"])
@pytest.mark.parametrize("kind", ["frames", "sound"])
def test_a_file_that_lost_its_end_is_named(tmp_path, suffix, kind):
    if kind == "frames" and suffix in (".wav", ".flac"):
        return
    noise = np.random.default_rng(0).normal(0, 0.1, 48000 * 4).astype(np.float32)
    frames = None if suffix in (".wav", ".flac") else np.zeros((100, SIDE, SIDE, 3), np.uint8)
    data = write_media(tmp_path / f"whole{suffix}", frames, sound=noise).read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(data[: len(data) * 6 // 10])
    read = {"frames": shown, "sound": heard}[kind]
    read(tmp_path / f"whole{suffix}")
    with pytest.raises(MediaError, match=rf"cut{suffix} .*(as its header says|cannot be decoded after \d.\d s)"):
        read(tmp_path / f"cut{suffix}")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_streams_may_have_different_ends(tmp_path, suffix):
    frames = np.zeros((200, SIDE, SIDE, 3), np.uint8)
    file = write_media(tmp_path / f"film{suffix}", frames, sound=beeps(3))
    assert shown(file)[-1, 1] == pytest.approx(8, abs=0.05)
    assert heard(file).end_s == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_damage_in_the_middle_is_named_with_its_time(tmp_path, suffix):
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (100, SIDE, SIDE, 3), dtype=np.uint8)
    noise = random.normal(0, 0.1, 48000 * 4).astype(np.float32)
    data = bytearray(write_media(tmp_path / f"film{suffix}", frames, sound=noise).read_bytes())
    for number in range(40):
        data[len(data) // 2 + 500 * number] ^= 0xFF
    (tmp_path / f"damaged{suffix}").write_bytes(data)
    for read in (shown, heard):
        with pytest.raises(MediaError, match=rf"damaged{suffix} .*(damaged at|decoded after) [12]\.\d s"):
            read(tmp_path / f"damaged{suffix}")
    # What lies before is whole.
    np.testing.assert_array_equal(
        shown(tmp_path / f"damaged{suffix}", 0, 0.5), shown(tmp_path / f"film{suffix}", 0, 0.5)
    )


LISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{address}\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile '{path}'\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT10S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>{address}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("guard", ["formats", "protocols"])
@pytest.mark.parametrize("name", LISTS)
def test_no_file_opens_another(tmp_path, name, guard, monkeypatch):
    """Each of the two guards is enough."""
    film = flash_and_beep(tmp_path / "film.mp4", seconds=1)
    file = tmp_path / name
    file.write_text(LISTS[name].format(path=film, address=film.as_uri()))
    if guard == "protocols":
        monkeypatch.setattr(decoding, "_FORMATS", decoding._FORMATS + ",hls,concat,dash,sdp")
    else:
        monkeypatch.setattr(decoding, "_PROTOCOLS", "file,crypto,data,udp,rtp")
    with pytest.raises(MediaError, match=f"{name} cannot be opened as a media file"):
        MediaFile(file)


def test_addresses_and_patterns_are_no_files(tmp_path):
    flash_and_beep(tmp_path / "film1.mp4", seconds=1)
    for name in ("http://127.0.0.1:9/film.mp4", "concat:film1.mp4", f"file:{tmp_path}/film1.mp4", "film%d.mp4"):
        with pytest.raises(FileNotFoundError, match="file must exist"):
            MediaFile(name)


def white_png(side):
    """A white square of a bit each pixel; some kilobytes."""
    packed = zlib.compressobj(9)
    row = b"\0" + b"\xff" * (side // 8)
    data = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_frames_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MOST_PIXELS", 256 * 256)
    for side, fits in ((256, True), (264, False)):
        (tmp_path / "white.png").write_bytes(white_png(side))
        film = write_media(tmp_path / f"film{side}.mp4", np.zeros((2, side, side, 3), np.uint8))
        if fits:
            assert shown(tmp_path / "white.png")[0, 2] == 255 and len(shown(film)) == 2
            continue
        with pytest.raises(MediaError, match=r"white.png cannot be decoded after 0.0 s: Invalid argument"):
            shown(tmp_path / "white.png")
        with pytest.raises(MediaError, match="must have frames of at most 65536 pixels, got 264 x 264 pixels"):
            shown(film)


def test_a_file_has_a_longest_time_and_times_rise(tmp_path):
    frames = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    assert len(shown(write_media(tmp_path / "film.mkv", frames, [0, 5 * 3600]))) == 2
    with pytest.raises(MediaError, match="must be at most 21600 s long, got a frame at 25200 s"):
        shown(write_media(tmp_path / "film.mkv", frames, [0, 7 * 3600]))
    two = b"".join(flash_and_beep(tmp_path / "film.ts", seconds=4).read_bytes() for _ in range(2))
    (tmp_path / "two.ts").write_bytes(two)
    for read in (shown, heard):
        with pytest.raises(MediaError, match=r"two.ts must have times that rise, got [34]\.\d s before 0\.\d s"):
            read(tmp_path / "two.ts")


@pytest.mark.parametrize("rate_hz", [1, 384001, 2**31 - 1])
def test_sound_has_a_range_of_rates(tmp_path, rate_hz):
    data = bytearray(write_media(tmp_path / "tone.wav", sound=beeps(1, (0,))).read_bytes())
    data[24:28] = struct.pack("<I", rate_hz)
    (tmp_path / "tone.wav").write_bytes(data)
    with pytest.raises(MediaError, match=f"must have 1000 to 384000 samples per second, got {rate_hz}"):
        heard(tmp_path / "tone.wav")


def test_a_frame_that_cannot_be_converted_is_named(tmp_path, monkeypatch):
    file = write_media(tmp_path / "film.mp4", np.zeros((2, SIDE, SIDE, 3), np.uint8))
    with pytest.raises(MediaError, match="film.mp4 cannot be decoded: Invalid argument"), MediaFile(file):
        raise av.error.ArgumentError(22, "Invalid argument")

"""Codes as bits, in files, of media files, and back: `encode`, `vectors`, `decode`, and folders of codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import named_media
import numpy as np
import pytest
import tiny
import torch

from unicode_fast import UniCode, export
from unicode_fast.checkpoint import load
from unicode_fast.codes import CodesError, encode_to_folder, folder, read_codes, sources
from unicode_fast.codes.sources import ClipSource, FileSource, splits_of
from unicode_fast.config import Modality
from unicode_fast.data import Store, open_store
from unicode_fast.encode import main
from unicode_fast.errors import UsageError
from unicode_fast.media.captions import Part
from unicode_fast.methods import METHODS


def tied(model: UniCode, name: str, features: torch.Tensor) -> UniCode:
    """The model with a codebook whose codewords are near ties at these features, (B, T, ...)."""
    seen: list[torch.Tensor] = []
    search, model.codebook.quantise = model.codebook.quantise, lambda z: seen.append(z[name]) or search(z)
    for clip in features:
        model.encode_clip(name, clip)
    del model.codebook.quantise
    z = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen])[: model.codewords // 2]
    away = 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    model.codebook.initialise(torch.cat([z + away, z - away]))
    return model


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["audio", "video", "text"])
def test_a_clip_has_the_same_codes_alone_in_a_batch_and_padded(
    name: str, precision: str, tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    """Codewords are near ties, which sums in another order would decide otherwise."""
    model = tiny.model(precision=precision, codewords=160, width=32).eval()
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(16, 5, *model.modalities[name].shape, generator=generator)
    tied(model, name, features)
    alone = [model.encode_clip(name, clip).index for clip in features]
    assert len(torch.cat(alone).unique()) > 40
    batch = features.clone()
    set_threads(2)
    for place, clip in enumerate(batch):
        assert torch.equal(model.encode_clip(name, clip).index, alone[place])
        # Not aligned, and with other strides.
        moved = torch.zeros(clip.numel() + 1)[1:].view(clip.shape).copy_(clip)
        assert torch.equal(model.encode_clip(name, moved).index, alone[place])
    lengths = [1 + place % 5 for place in range(16)]
    arrays = {one: np.zeros((16, 5, *kind.shape), np.float32) for one, kind in model.modalities.items()}
    arrays[name] = np.where(
        (np.arange(5) < np.array(lengths)[:, None]).reshape(16, 5, *[1] * (features.dim() - 2)), features.numpy(), 0
    ).astype(np.float32)
    arrays[f"{name}.length"] = np.array(lengths)
    store = Store_of(tmp_path / "store", arrays, model)
    encode_to_folder(model, ClipSource(store, ["test"], [name], False), tmp_path / "codes", progress=False)
    for place, row in enumerate(read_codes(tmp_path / "codes").rows):
        assert np.array_equal(row.codes, model.encode_clip(name, features[place, : lengths[place]]).index.numpy())


def Store_of(path: Path, arrays: dict[str, np.ndarray], model: UniCode) -> Store:  # noqa: N802
    from unicode_fast.data import write_store

    write_store(path, "tiny", model.modalities, ["a"], {"test": arrays})
    return open_store(path)


@pytest.mark.parametrize("method", METHODS)
def test_vectors_of_codes_are_those_of_encode(method: str) -> None:
    model = tiny.model(method=method)
    for name, features in tiny.batch(model).items():
        encoded = model.encode(name, features)
        assert torch.equal(model.vectors(encoded.index), encoded.vector)
        assert torch.equal(model.vectors(encoded.index[0, 0]), encoded.vector[0, 0])
    with pytest.raises(ValueError, match=rf"codes must be in \[0, {model.codewords}\), got {model.codewords}"):
        model.vectors(torch.tensor([0, model.codewords]))
    with pytest.raises(ValueError, match="got -1"):
        model.vectors(torch.tensor(-1))
    with pytest.raises(TypeError, match=r"codes must be an int64 Tensor, got torch.int32"):
        model.vectors(torch.tensor([1], dtype=torch.int32))


@pytest.mark.parametrize("method", ["uni-code", "h-dcid", "codaar"])
def test_decode_is_what_the_model_decodes(method: str) -> None:
    model = tiny.model(method=method).eval()
    features = tiny.batch(model)
    output = model(features)
    for name in model.names:
        codes = model.encode(name, features[name]).index
        model.train()
        decoded = model.decode(name, codes, like=features)
        model.eval()
        torch.testing.assert_close(decoded, output.decoded[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(decoded, model.decode(name, codes, like=features[name]))
        # The rectifiers of the tiny decoder of grids may be off for all codes.
        other = model.decode(name, (codes + 1 + model.code_sizes[-1]) % model.codewords, like=features)
        assert name == "video" or not torch.equal(decoded, other)


def test_decode_refuses_what_does_not_fit() -> None:
    model = tiny.model()
    features = tiny.batch(model)
    codes = torch.zeros(6, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="name must be one of audio, video, text, got 'smell'"):
        model.decode("smell", codes, features)
    with pytest.raises(ValueError, match="like must have features of 'audio', got video"):
        model.decode("audio", codes, {"video": features["video"]})
    with pytest.raises(ValueError, match=r"codes must have the shape \(6, 5\) of like, got \(6, 4\)"):
        model.decode("audio", codes[:, 1:], features)
    mask = torch.zeros(6, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask of 'audio' must mark at least one position"):
        model.decode("audio", codes, features, mask)
    fcid = tiny.model(method="fcid")
    with pytest.raises(ValueError, match="method must have a decoder from codes to features of 'audio', got method"):
        fcid.decode("audio", codes, features)


def test_padding_has_no_effect_on_what_is_decoded() -> None:
    model = tiny.model()
    features, mask = tiny.batch(model)["text"], tiny.mask_of([3, 5, 1, 2, 4, 5], 5)
    codes = torch.ones(6, 5, dtype=torch.int64)
    other = torch.where(mask.unsqueeze(-1), features, 100.0)
    assert torch.equal(*(model.decode("text", codes, one, mask)[mask] for one in (features, other)))
    assert not torch.equal(model.decode("text", codes, other), model.decode("text", codes, features))


FORMATS = ["npz", "jsonl", pytest.param("parquet", marks=pytest.mark.slow)]


@pytest.fixture
def data(store: Path) -> Store:
    return open_store(store)


def of_data(data: Store, vectors: bool = False, names: str = "audio,video,text") -> ClipSource:
    return ClipSource(data, splits_of(data), names.split(","), vectors)


def content(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(path.iterdir())}


@pytest.mark.parametrize("method", ["uni-code", "h-dcid"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_of_codes_holds_them_all(form: str, method: str, data: Store, tmp_path: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    model = tiny.model(method=method).eval()
    written = encode_to_folder(model, of_data(data, True), tmp_path / "codes", form, clips_per_shard=50, progress=False)
    found = read_codes(tmp_path / "codes")
    assert found.header == written.header and found.header["code_sizes"] == list(model.code_sizes)
    assert (found.header["clips"], found.header["rows"], len(found.header["shards"])) == (108, 324, 3)
    rows = iter(found.rows)
    for split in ("train", "val", "test"):
        clips = data.split(split)
        for number in range(len(clips)):
            for name in model.names:
                row = next(rows)
                encoded = model.encode_clip(name, torch.from_numpy(np.array(clips.features[name][number])))
                assert (row.id, row.split, row.modality, row.start_s) == (str(number), split, name, None)
                assert np.array_equal(row.codes, encoded.index.numpy())
                assert row.vectors is not None and np.array_equal(row.vectors, encoded.vector.numpy())
    assert next(rows, None) is None


@pytest.mark.parametrize("form", FORMATS)
def test_the_readers_of_the_documentation_work(form: str, data: Store, tmp_path: Path) -> None:
    """Each is a block of docs/codes.md that sums up the codes it has read."""
    if form == "parquet":
        pytest.importorskip("pyarrow")
    page = (Path(__file__).parents[1] / "docs" / "codes.md").read_text(encoding="utf-8")
    block = next(one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if f"*.{form}" in one)
    assert len(block.strip().splitlines()) <= 10
    model = tiny.model(method="h-dcid").eval()
    encode_to_folder(model, of_data(data), tmp_path / "codes", form, clips_per_shard=50, progress=False)
    names: dict = {}
    exec(block.replace('Path("codes")', f"Path({str(tmp_path / 'codes')!r})"), names)
    rows = read_codes(tmp_path / "codes").rows
    expected = {(row.split, row.id, row.modality): row.codes.tolist() for row in rows}
    assert {key: list(codes) for key, codes in names["codes"].items()} == expected


class Interrupted(Exception):
    pass


def interrupted_after(shards: int, patch: pytest.MonkeyPatch, write: Callable = folder.write_rows) -> None:
    left = [shards]

    def limited(*arguments: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        write(*arguments)

    patch.setattr(folder, "write_rows", limited)


def test_an_interrupted_encoding_goes_on_and_gives_the_same_bytes(
    data: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model().eval()
    options = {"clips_per_shard": 30, "progress": False}
    encode_to_folder(model, of_data(data), tmp_path / "whole" / "codes", **options)
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.raises(Interrupted):
            encode_to_folder(model, of_data(data), tmp_path / "codes", **options)
    assert not (tmp_path / "codes").exists()
    with monkeypatch.context() as patch:
        read = sources.encoded_clips
        seen: list[int] = []
        patch.setattr(sources, "encoded_clips", lambda *given: seen.append(len(given[3])) or read(*given))
        with pytest.raises(CodesError, match=r"with other modalities, splits, modalities {'audio': "):
            encode_to_folder(model, ClipSource(data, ["test"], ["audio"], False), tmp_path / "codes", **options)
        with pytest.raises(CodesError, match="with other files, files 'npz' instead of 'jsonl'"):
            encode_to_folder(model, of_data(data), tmp_path / "codes", "jsonl", **options)
        with pytest.raises(CodesError, match="with other codebook_sha256, model_sha256"):
            encode_to_folder(tiny.model(seed=1), of_data(data), tmp_path / "codes", **options)
        assert not seen
        encode_to_folder(model, of_data(data), tmp_path / "codes", **options)
        assert sum(seen) == 3 * (108 - 60)
    assert content(tmp_path / "codes") == content(tmp_path / "whole" / "codes")
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(FileExistsError):
        encode_to_folder(model, of_data(data), tmp_path / "codes", **options)


def test_a_shard_that_was_damaged_since_is_written_again(
    data: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model().eval()
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        with pytest.raises(Interrupted):
            encode_to_folder(model, of_data(data), tmp_path / "codes", clips_per_shard=60, progress=False)
    shard = tmp_path / ".codes.encoding" / "codes" / "codes-00000.npz"
    shard.write_bytes(shard.read_bytes()[:-1])
    encode_to_folder(model, of_data(data), tmp_path / "codes", clips_per_shard=60, progress=False)
    assert len(read_codes(tmp_path / "codes").rows) == 324


@pytest.mark.slow
def test_a_killed_command_goes_on_and_gives_the_same_bytes(store: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    export(tiny.model(), model)
    command = [sys.executable, "-m", "unicode_fast.encode", str(model), str(store)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    options = ["--clips_per_shard", "1"]
    subprocess.run([*command, str(tmp_path / "whole"), *options], env=environment, check=True)
    killed = 0
    while not (tmp_path / "codes").exists():
        with subprocess.Popen([*command, str(tmp_path / "codes"), *options], env=environment) as process:
            work = tmp_path / ".codes.encoding"
            before = len(list(work.glob("*.npz.json")))
            while process.poll() is None and (killed == 3 or len(list(work.glob("*.npz.json"))) < before + 10):
                time.sleep(0.001)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
    assert killed == 3 and content(tmp_path / "codes") == content(tmp_path / "whole")


def test_damaged_folders_of_codes_are_named(data: Store, tmp_path: Path) -> None:
    encode_to_folder(tiny.model(), of_data(data), tmp_path / "codes", "jsonl", progress=False)
    shard, index = tmp_path / "codes" / "codes-00000.jsonl", tmp_path / "codes" / "codes.json"
    whole, header = shard.read_bytes(), json.loads(index.read_text())
    shard.write_bytes(whole[:-9])
    with pytest.raises(CodesError, match=r"codes-00000.jsonl is damaged: its checksum differs from codes.json"):
        read_codes(tmp_path / "codes")
    shard.write_bytes(whole)
    index.write_text(json.dumps({**header, "code_sizes": [1]}))
    with pytest.raises(CodesError, match=r"codes-00000.jsonl is damaged: its codes must be in \[0, 1\)"):
        read_codes(tmp_path / "codes")
    index.write_text(json.dumps({**header, "format": 2}))
    with pytest.raises(CodesError, match=r"codes.json is damaged: it must be of format 1, got 2"):
        read_codes(tmp_path / "codes")
    index.write_text("[]")
    with pytest.raises(CodesError, match=r"codes.json is damaged"):
        read_codes(tmp_path / "codes")
    with pytest.raises(CodesError, match=r"codes must be a folder of `encode` with codes.json, got '.*nowhere'"):
        read_codes(tmp_path / "nowhere")


@pytest.fixture
def of_media(monkeypatch: pytest.MonkeyPatch) -> UniCode:
    return named_media.model(monkeypatch)


def test_a_file_has_the_codes_of_its_features(of_media: UniCode, tmp_path: Path) -> None:
    (tmp_path / "23.mp4").touch()
    clips = of_media.encode_file(tmp_path / "23.mp4", "a bad cab")
    assert [clip.start_s for clip in clips] == [0, 10, 20]
    assert [clip.codes["audio"].index.shape for clip in clips] == [(10,), (10,), (3,)]
    words = of_media.encode_clip("text", torch.from_numpy(named_media.Letters()("a bad cab")))
    assert all(torch.equal(clip.codes["text"].index, words.index) for clip in clips)
    assert torch.equal(clips[2].codes["audio"].vector, of_media.vectors(clips[2].codes["audio"].index))
    assert "text" not in of_media.encode_file(tmp_path / "23.mp4")[0].codes
    of_media.preprocessor = None
    with pytest.raises(ValueError, match="model must be trained on features of `extract` to encode media files"):
        of_media.encode_file(tmp_path / "23.mp4")


def test_a_folder_of_files_is_encoded_and_broken_ones_are_listed(
    of_media: UniCode, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("12.mp4", "3.wav", "broken.mkv"):
        (videos / name).touch()
    (tmp_path / "captions.csv").write_text("file,split,caption\n12.mp4,train,a bad cab\n3.wav,test,\nbroken.mkv,test,a")
    export(of_media, tmp_path / "model.safetensors")
    arguments = [str(tmp_path / "model.safetensors"), str(videos), str(tmp_path / "codes")]
    assert main([*arguments, "--captions", str(tmp_path / "captions.csv"), "--format", "jsonl"]) == 0
    told = capsys.readouterr().out
    assert "codes of 3 clips in audio, text; 1 file of jsonl" in told
    assert "1 of 3 files skipped, listed in codes.json: broken.mkv: must be decodable, it is not" in told
    found = read_codes(tmp_path / "codes")
    assert found.header["preprocessor"] == of_media.preprocessor
    assert found.header["skipped"] == [{"id": "broken.mkv", "reason": "must be decodable, it is not"}]
    heads = [(row.id, row.split, row.modality, row.start_s, len(row.codes)) for row in found.rows]
    assert heads == [
        ("12.mp4", "train", "audio", 0, 10), ("12.mp4", "train", "text", 0, 3),
        ("12.mp4#10", "train", "audio", 10, 2), ("12.mp4#10", "train", "text", 10, 3), ("3.wav", "test", "audio", 0, 3),
    ]  # fmt: skip
    clips = of_media.encode_file(videos / "12.mp4", "a bad cab")
    assert np.array_equal(found.rows[2].codes, clips[1].codes["audio"].index.numpy())
    with pytest.raises(CodesError, match=r"data must have a clip that can be encoded, got none; broken.mkv: must be"):
        main([arguments[0], str(videos / "broken.mkv"), str(tmp_path / "none")])
    assert main([arguments[0], str(videos / "3.wav"), str(tmp_path / "one"), "--caption", "abc"]) == 0
    assert [row.modality for row in read_codes(tmp_path / "one").rows] == ["audio", "text"]


def test_a_changed_file_is_not_mixed_with_its_former_codes(
    of_media: UniCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("2.mp4", "3.mp4"):
        (tmp_path / name).touch()
    parts = [Part("2.mp4", "test"), Part("3.mp4", "test")]
    names = ["audio", "text"]
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        with pytest.raises(Interrupted):
            source = FileSource(of_media, tmp_path, parts, names, False)
            encode_to_folder(of_media, source, tmp_path / "codes", clips_per_shard=1, progress=False)
    (tmp_path / "2.mp4").write_text("other")
    with pytest.raises(CodesError, match="with other data_sha256"):
        source = FileSource(of_media, tmp_path, parts, names, False)
        encode_to_folder(of_media, source, tmp_path / "codes", clips_per_shard=1, progress=False)


def test_the_command_encodes_a_store(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    export(tiny.model(), tmp_path / "model.safetensors")
    run, codes = str(tmp_path / "model.safetensors"), str(tmp_path / "codes")
    flags = ["--splits", "val,test", "--modalities", "text,audio", "--vectors", "--clips-per-shard", "40"]
    assert main([run, str(store), codes, *flags]) == 0
    assert "codes of 48 clips in audio, text; 2 files of npz" in capsys.readouterr().out
    rows = read_codes(codes).rows
    assert {row.split for row in rows} == {"val", "test"} and len(rows) == 96
    assert rows[0].vectors is not None
    assert load(run).trained_on is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--splits", "trian"], "splits must be among train, val, test, got 'trian'"),
        (["--modalities", "smell"], "modalities must be among audio, video, text, got 'smell'"),
        (["--clips_per_shard", "0"], "clips_per_shard must be at least 1, got 0"),
        (["--captions", "a.csv"], "captions applies to media files, got data"),
        (["--checkpoint", "first"], "checkpoint must be best, last or a training step, got 'first'"),
    ],
)
def test_invalid_flags_are_named(flags: list[str], message: str, store: Path, tmp_path: Path) -> None:
    export(tiny.model(), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=re.escape(message)):
        main([str(tmp_path / "model.safetensors"), str(store), str(tmp_path / "codes"), *flags])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_other_data_and_files_without_preprocessor_are_refused(store: Path, tmp_path: Path) -> None:
    export(tiny.model(names="audio,depth"), tmp_path / "model.safetensors")
    other = tmp_path / "other"
    wide = {"audio": Modality("vector", (7,)), "depth": Modality("vector", (3,))}
    from unicode_fast.data import write_store

    clips = {name: np.ones((2, 5, *kind.shape), np.float32) for name, kind in wide.items()}
    write_store(other, "other", wide, ["a"], {"test": clips})
    run = str(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"data must have 'audio' of kind vector and shape \(6,\) as the model, got"):
        main([run, str(other), str(tmp_path / "codes")])
    (tmp_path / "a.mp4").touch()
    for place in (tmp_path / "a.mp4", tmp_path):
        with pytest.raises(UsageError, match="run must be trained on features of `extract` to encode media files such"):
            main([run, str(place), str(tmp_path / "codes")])

"""VGG19 and VGGish with random weights against independent computations, and the checks of their files."""

import os
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from media_files import beeps, write_media
from torch import nn
from torch.nn import functional as F

from unicode_fast import media
from unicode_fast.media import networks, vgg19, vggish
from unicode_fast.media.vgg19 import Vgg19
from unicode_fast.media.vggish import VGGish

# Widths of small networks with the layers of the published ones; the modality stays that of the full size.
NARROW_VGG19 = [4, 4, "M", 6, 6, "M", *[8] * 4, "M", *[10] * 4, "M", *[12] * 4, "M"]
FULL_VGG19 = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]
NARROW_VGGISH, FULL_VGGISH = (4, 6, 8, 8, 10, 10, 32, 24, 128), (64, 128, 256, 256, 512, 512, 4096, 4096, 128)
# Names of VGGish's layers in the published file.
VGGISH_LAYERS = ("features.0", "features.3", "features.6", "features.8", "features.11", "features.13",
                 "embeddings.0", "embeddings.2", "embeddings.4")  # fmt: skip


def groups_of(plan):
    text = ",".join(map(str, plan)).split("M")
    return [[int(width) for width in group.split(",") if width] for group in text if group.strip(",")]


def random_vgg19(plan, seed=0):
    """Kernel and bias of each convolution, in torch's layout."""
    generator, channels, layers = torch.Generator().manual_seed(seed), 3, []
    for width in [width for width in plan if width != "M"]:
        kernel = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        layers.append((kernel, torch.randn(width, generator=generator) * 0.1))
        channels = width
    return layers


def write_caffe(file, plan, layers, **more):
    """As vgg19-d01eb7cb.pth: an OrderedDict in the format from before torch 1.6, with the classifier's old names."""
    state, place, given = OrderedDict(), 0, iter(layers)
    for width in plan:
        if width != "M":
            state[f"features.{place}.weight"], state[f"features.{place}.bias"] = next(given)
        place += 1 if width == "M" else 2
    state.update({f"classifier.{n}.{kind}": torch.zeros(2) for n in (1, 4, 6) for kind in ("weight", "bias")}, **more)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file


def write_keras(file, layers, plan=FULL_VGG19, form="{0}/{0}_{1}_1:0", kinds="Wb", **more):
    h5py = pytest.importorskip("h5py")
    names = [f"block{b + 1}_conv{c + 1}" for b, group in enumerate(groups_of(plan)) for c in range(len(group))]
    with h5py.File(file, "w") as content:
        for name, (kernel, bias) in zip(names, layers, strict=True):
            content[form.format(name, kinds[0])] = kernel.permute(2, 3, 1, 0).numpy()
            content[form.format(name, kinds[1])] = bias.numpy()
        for name, values in {"fc1/fc1_W_1:0": np.zeros((2, 3)), **more}.items():
            content[name] = values
    return file


def expected_maps(frames, plan, layers):
    """VGG19 layer by layer."""
    pixels = frames[..., ::-1].astype(np.float32) - np.array([103.939, 116.779, 123.68], np.float32)
    x, given = torch.from_numpy(pixels).permute(0, 3, 1, 2), iter(layers)
    for width in plan:
        x = F.max_pool2d(x, 2) if width == "M" else F.relu(F.conv2d(x, *next(given), padding=1))
    return x.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(vgg19, "_CONVOLUTIONS", groups_of(NARROW_VGG19))
    monkeypatch.setattr(vggish, "_CONVOLUTIONS", ((4,), (6,), (8, 8), (10, 10)))
    monkeypatch.setattr(vggish, "_EMBEDDINGS", (32, 24, 128))


def noise(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def check_vgg19(plan, folder, frames):
    layers = random_vgg19(plan)
    caffe = Vgg19(write_caffe(folder / "vgg19.pth", plan, layers))
    keras = Vgg19(write_keras(folder / "vgg19.h5", layers, plan))
    found = keras(frames)
    assert np.array_equal(found, caffe(frames))
    expected = expected_maps(frames, plan, layers)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert keras.weights_sha256 != caffe.weights_sha256
    return found


def test_vgg19_of_both_publishers(narrow, tmp_path):
    check_vgg19(NARROW_VGG19, tmp_path, noise(3, 224, 224))


@pytest.mark.slow
def test_vgg19_of_the_full_size(tmp_path):
    assert check_vgg19(FULL_VGG19, tmp_path, noise(1, 224, 224)).shape == (1, *Vgg19.modality.shape)


def test_the_sizes_are_the_published_ones(monkeypatch, tmp_path):
    """Shapes in vgg19-d01eb7cb.pth and vggish-10086976.pth, without their memory."""
    found = {}
    monkeypatch.setattr(networks, "sha256_of", lambda file: "")
    monkeypatch.setattr("unicode_fast.media.weight_files.of_torch", lambda file: {})
    monkeypatch.setattr("unicode_fast.media.weight_files.load", lambda network, *_: found.update(network.state_dict()))
    for kind, count in ((Vgg19, 20_024_384), (VGGish, 72_141_184)):
        (tmp_path / "w.pth").touch()
        kind(tmp_path / "w.pth")
        assert sum(one.numel() for one in found.values()) == count
        found.clear()


@pytest.mark.parametrize(
    ("form", "kinds"),
    [("{0}/{0}/{1}:0", ("kernel", "bias")), ("model_weights/{0}/{0}/{1}:0", ("kernel", "bias"))],
    ids=["weights of Keras 2", "a whole model"],
)
def test_other_files_of_keras(narrow, tmp_path, form, kinds):
    layers = random_vgg19(NARROW_VGG19)
    caffe = Vgg19(write_caffe(tmp_path / "vgg19.pth", NARROW_VGG19, layers)).network.state_dict()
    moments = {"optimizer_weights/block1_conv1/kernel/m:0": np.ones((3, 3, 3, 4))}
    keras = Vgg19(write_keras(tmp_path / "vgg19.h5", layers, NARROW_VGG19, form, kinds, **moments)).network.state_dict()
    assert all(torch.equal(keras[name], one) for name, one in caffe.items())


def test_vgg19_resizes_as_opencv(narrow, tmp_path):
    """OpenCV's default: four neighbours of (x + 1/2) W / 224 - 1/2, and whole numbers; the aspect is not kept."""
    frames = noise(2, 90, 700)
    rows, columns = ((np.arange(224) + 0.5) * size / 224 - 0.5 for size in (90, 700))
    expected = np.zeros((2, 224, 224, 3))
    for row, up in ((np.floor(rows), 0), (np.floor(rows) + 1, 1)):
        for column, right in ((np.floor(columns), 0), (np.floor(columns) + 1, 1)):
            weight = np.abs(1 - up - rows % 1)[:, None] * np.abs(1 - right - columns % 1)
            corner = frames[:, row.clip(0, 89).astype(int)][:, :, column.clip(0, 699).astype(int)]
            expected += weight[..., None] * corner
    whole = np.rint(expected).astype(np.uint8)
    backbone = Vgg19(write_caffe(tmp_path / "w.pth", NARROW_VGG19, random_vgg19(NARROW_VGG19)))
    backbone.network = nn.ModuleDict({"features": nn.Identity()})
    given = backbone(frames) + np.array([103.939, 116.779, 123.68], np.float32)
    # A half can be rounded to either side.
    difference = np.abs(given[..., ::-1] - whole)
    assert difference.max() < 1.001 and (difference > 0.001).mean() < 1e-3


@pytest.mark.parametrize("count", [240, 299, 300])
@pytest.mark.parametrize("per_step", [16, 8, 1])
def test_frames_are_those_of_ave(narrow, tmp_path, count, per_step):
    file = write_caffe(tmp_path / "vgg19.pth", NARROW_VGG19, random_vgg19(NARROW_VGG19))
    numbers = Vgg19(file, per_step).frame_numbers(count, 10)
    assert numbers.tolist() == [
        [int(i * count / 10 + k / per_step * count / 10) for k in range(per_step)] for i in range(10)
    ]


def test_vgg19_averages_the_frames_of_a_second(narrow, tmp_path):
    plan, layers = NARROW_VGG19, random_vgg19(NARROW_VGG19)
    backbone = Vgg19(write_caffe(tmp_path / "vgg19.pth", plan, layers), frames_per_step=2)
    shades = np.linspace(0, 255, 20).astype(np.uint8)
    frames = np.broadcast_to(shades[:, None, None, None], (20, 64, 64, 3))
    file = write_media(tmp_path / "film.mp4", np.ascontiguousarray(frames), fps=10, quality={"crf": "0"})
    (clip,) = media.features(file, {"video": backbone})
    with media.MediaFile(file) as opened:
        shown = [frame.to_ndarray(format="rgb24") for _, _, frame in opened.frames()]
    chosen = expected_maps(np.stack([np.resize(shown[n][:1, :1], (224, 224, 3)) for n in (0, 5, 10, 15)]), plan, layers)
    np.testing.assert_allclose(clip.features["video"], chosen.reshape(2, 2, 7, 7, 12).mean(1), rtol=1e-3, atol=1e-2)


def random_vggish(widths, rows=None):
    """The state of a VGGish; with `rows` the large layers repeat that many, which are quick to draw."""
    generator, channels, state = torch.Generator().manual_seed(0), 1, {}
    for name, width in zip(VGGISH_LAYERS, widths, strict=True):
        inputs = channels * 24 if name == "embeddings.0" else channels
        shape = (inputs, 3, 3) if name.startswith("features") else (inputs,)
        drawn = min(width, rows or width)
        kernel = torch.randn(drawn, *shape, generator=generator) * (2 / np.prod(shape)) ** 0.5
        state[f"{name}.weight"] = kernel.repeat(width // drawn, *[1] * len(shape))
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1
        channels = width
    return state


def write_vggish(file, state):
    torch.save(OrderedDict(state), file, _use_new_zipfile_serialization=False)
    return file


def expected_vggish(samples, state):
    """VGGish of 15,600 samples, band by band and layer by layer."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    spectrum = np.array([np.abs(np.fft.rfft(samples[160 * n :][:400] * window, 512)) for n in range(96)])
    mel = 1127 * np.log(1 + np.arange(257) * 16000 / 512 / 700)
    edges = np.linspace(1127 * np.log(1 + 125 / 700), 1127 * np.log(1 + 7500 / 700), 66)
    triples = zip(edges[:-2], edges[1:-1], edges[2:], strict=True)
    bands = np.stack([spectrum @ np.interp(mel, triple, [0, 1, 0]) for triple in triples], 1)
    x = torch.from_numpy(np.log(bands + 0.01))[None, None].float()
    for name in VGGISH_LAYERS[:6]:
        x = F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))
        x = x if name in ("features.6", "features.11") else F.max_pool2d(x, 2)
    # Rows of the spectrogram first, channels last.
    x = x[0].permute(1, 2, 0).flatten()
    for name in VGGISH_LAYERS[6:]:
        x = F.relu(state[f"{name}.weight"] @ x + state[f"{name}.bias"])
    return x.numpy()


def test_vggish_by_its_definition(narrow, tmp_path):
    state = random_vggish(NARROW_VGGISH)
    backbone = VGGish(write_vggish(tmp_path / "vggish.pth", state))
    assert (backbone.hop_s, backbone.window_s, backbone.rate) == (0.96, 0.975, 16000)
    sound = np.random.default_rng(0).normal(0, 0.1, (5, 15600)).astype(np.float32)
    found, expected = backbone(sound), np.stack([expected_vggish(one, state) for one in sound])
    assert found.shape == (5, 128) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Some features are cut off by the last ReLU.
    assert found.min() == 0 < found.max()


def test_steps_of_vggish_on_the_clock(narrow, tmp_path):
    """Step k of a clip begins 0.04 k s before its second k, in a long file as well."""
    backbone = VGGish(write_vggish(tmp_path / "vggish.pth", random_vggish(NARROW_VGGISH)))
    sound = np.random.default_rng(0).normal(0, 0.1, 16000 * 23).astype(np.float32)
    file = write_media(tmp_path / "sound.wav", sound=sound, rate_hz=16000)
    clips = media.features(file, {"audio": backbone})
    assert [(clip.start_s, clip.features["audio"].shape) for clip in clips] == [
        (0, (10, 128)), (10, (10, 128)), (20, (3, 128)),
    ]  # fmt: skip
    written = (sound * 32767).astype(np.int16) / np.float32(32768)
    for clip in clips:
        begins = [round(16000 * (clip.start_s + k - 0.04 * k)) for k in range(len(clip.features["audio"]))]
        expected = backbone(np.stack([written[begin:][:15600] for begin in begins]))
        np.testing.assert_allclose(clip.features["audio"], expected, atol=1e-5)


@pytest.mark.parametrize("seconds", [9.975, 10, 10.02])
def test_ten_seconds_of_sound_are_ten_steps(narrow, tmp_path, seconds):
    backbone = VGGish(write_vggish(tmp_path / "vggish.pth", random_vggish(NARROW_VGGISH)))
    file = write_media(tmp_path / "sound.wav", sound=beeps(seconds, (3, 7), 16000), rate_hz=16000)
    (clip,) = media.features(file, {"audio": backbone})
    found = clip.features["audio"]
    assert found.shape == (10, 128) and found.dtype == np.float32 and found.min() >= 0
    # A tone from second 3 to 4 and from 7 to 8 lies in the steps from 2.88, 3.84, 6.72 and 7.68 s on.
    changed = np.abs(found - found[0]).max(1) > 1e-4
    assert changed.nonzero()[0].tolist() == [3, 4, 7, 8]


@pytest.mark.slow
def test_vggish_equals_torchvggish(tmp_path, monkeypatch):
    # It imports this package to resample other rates than 16 kHz.
    monkeypatch.setitem(sys.modules, "resampy", types.ModuleType("resampy"))
    torchvggish = pytest.importorskip("torchvggish.torchvggish")
    examples = pytest.importorskip("torchvggish.vggish_input")
    state = random_vggish(FULL_VGGISH, rows=64)
    network = torchvggish.VGG(torchvggish.make_layers(), postprocess=False).eval()
    network.load_state_dict(state)
    backbone = VGGish(write_vggish(tmp_path / "vggish.pth", network.state_dict()))
    sound = np.random.default_rng(1).normal(0, 0.2, 160000)
    with torch.no_grad():
        expected = network(examples.waveform_to_examples(sound, 16000)).numpy()
    found = backbone(np.stack([sound[k * 15360 :][:15600] for k in range(10)]))
    assert expected.shape == found.shape == (10, 128) and found.min() >= 0 < found.max()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_tensors_are_refused(narrow, tmp_path):
    state, file = random_vggish(NARROW_VGGISH), tmp_path / "w.pth"
    cases = {
        r"w.pth must have each tensor of the network, it lacks embeddings.4.bias": {
            name: one for name, one in state.items() if name != "embeddings.4.bias"
        },
        "must have only tensors of the network, it also has pproc.mean": {**state, "pproc.mean": torch.zeros(2)},
        r"features.0.weight in .*w.pth must have shape \(4, 1, 3, 3\), got \(2,\)": {
            **state, "features.0.weight": torch.zeros(2)
        },
        "features.3.bias in .*w.pth must be finite": {**state, "features.3.bias": torch.full((6,), torch.nan)},
        "features.6.bias in .*w.pth must be finite": {**state, "features.6.bias": torch.zeros(8, dtype=torch.int32)},
        "w.pth must be tensors by name, got another content": [torch.zeros(1)],
    }  # fmt: skip
    for message, content in cases.items():
        torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            VGGish(file)


def test_other_files_are_refused(narrow, tmp_path):
    layers = random_vgg19(NARROW_VGG19)
    caffe = write_caffe(tmp_path / "vgg19.pth", NARROW_VGG19, layers)
    with pytest.raises(ValueError, match="it lacks features.3.weight, "):
        VGGish(caffe)
    # With batch normalisation there are more tensors.
    with pytest.raises(ValueError, match="also has features.1.running_mean"):
        Vgg19(write_caffe(caffe, NARROW_VGG19, layers, **{"features.1.running_mean": torch.zeros(4)}))
    for name in ("text.pth", "text.h5"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(ValueError, match=f"weights in .*{name} must be a file of"):
            Vgg19(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="weights must be an existing file, got '.*none.pth'"):
        Vgg19(tmp_path / "none.pth")
    for wrong in (tmp_path, 3, None):
        with pytest.raises(ValueError, match="weights must be a file, got"):
            Vgg19(wrong)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match="weights must be a file, got"):
        Vgg19(tmp_path / "pipe.pth")
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"frames_per_step must be a whole number of at least 1, got {wrong}"):
            Vgg19(caffe, wrong)
    with pytest.raises(ValueError, match="options of backbone 'vgg19'"):
        media.make("vgg19", "frames")


def test_other_arrays_of_keras_are_refused(narrow, tmp_path):
    h5py = pytest.importorskip("h5py")
    layers, file = random_vgg19(NARROW_VGG19), tmp_path / "w.h5"

    def refused(message, layers=layers, **more):
        with pytest.raises(ValueError, match=message):
            Vgg19(write_keras(file, layers, NARROW_VGG19, **more))

    kernel, bias = layers[0]
    refused(
        r"block1_conv1/kernel in .*w.h5 must have shape \(4, 3, 3, 3\), got \(3, 3, 4, 3\)",
        [(kernel.permute(2, 3, 0, 1), bias), *layers[1:]],
    )
    refused("block1_conv1/bias in .*w.h5 must be finite", [(kernel, bias * torch.inf), *layers[1:]])
    refused("block1_conv1/bias in .*w.h5 must have at most .* got int32", [(kernel, bias.int()), *layers[1:]])
    refused("block2_conv1/bias in .*w.h5 must occur once", **{"block2_conv1/bias": np.zeros(6)})
    with h5py.File(write_keras(file, layers, NARROW_VGG19), "r+") as content:
        del content["block5_conv4/block5_conv4_b_1:0"]
    with pytest.raises(ValueError, match="w.h5 must have each tensor of the network, it lacks block5_conv4/bias"):
        Vgg19(file)
    # Values in another file.
    (tmp_path / "secret").write_bytes(np.zeros(12, np.float32).tobytes())
    with h5py.File(file, "r+") as content:
        content.create_dataset(
            "block5_conv4/block5_conv4_b_1:0", (12,), "f4", external=[(str(tmp_path / "secret"), 0, 48)]
        )
    with pytest.raises(ValueError, match="external storage"):
        Vgg19(file)


def test_weights_of_torchvision_are_refused(narrow, tmp_path, monkeypatch):
    file = write_caffe(tmp_path / "w.pth", NARROW_VGG19, random_vgg19(NARROW_VGG19))
    monkeypatch.setattr(networks, "sha256_of", lambda file: "dcbb9e9d" + 56 * "0")
    with pytest.raises(ValueError, match="weights must be those of Caffe or Keras, got torchvision's in .*w.pth"):
        Vgg19(file)


def test_a_preprocessor_refuses_other_weights(narrow, tmp_path):
    file = write_caffe(tmp_path / "w.pth", NARROW_VGG19, random_vgg19(NARROW_VGG19))
    described = media.Preprocessor.of({"video": Vgg19(file, 3)}).as_dict()
    assert described["modalities"]["video"]["options"] == {"weights": str(file), "frames_per_step": 3}
    assert media.Preprocessor.from_dict(described).make()["video"].rate == 3
    write_caffe(file, NARROW_VGG19, random_vgg19(NARROW_VGG19, seed=1))
    with pytest.raises(ValueError, match="weights_sha256 of backbone 'vgg19' must be"):
        media.Preprocessor.from_dict(described).make()

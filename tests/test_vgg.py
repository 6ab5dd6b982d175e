"""VGG19 and VGGish with random weights against independent computations, and the recipe of AVE."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unicode_fast import media
from unicode_fast.media import networks
from unicode_fast.media.recipes import parsed_weights
from unicode_fast.media.vgg import VGGish

PLAN = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]


@pytest.fixture(scope="module")
def vgg19_weights(tmp_path_factory):
    """Random kernels and biases of each convolution, with the files of both publishers."""
    h5py = pytest.importorskip("h5py")
    folder, generator = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    kernels, place, channels, block, number = [], 0, 3, 1, 1
    torch_file, keras = {}, h5py.File(folder / "vgg19.h5", "w")
    for width in PLAN:
        if width == "M":
            place, block, number = place + 1, block + 1, 1
            continue
        kernel = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        bias = torch.randn(width, generator=generator) * 0.1
        kernels.append((kernel, bias))
        torch_file |= {f"features.{place}.weight": kernel, f"features.{place}.bias": bias}
        group = keras.create_group(f"block{block}_conv{number}")
        group[f"block{block}_conv{number}_W_1:0"] = kernel.permute(2, 3, 1, 0).numpy()
        group[f"block{block}_conv{number}_b_1:0"] = bias.numpy()
        place, channels, number = place + 2, width, number + 1
    keras.close()
    torch.save({**torch_file, "classifier.0.bias": torch.zeros(3)}, folder / "vgg19.pth")
    return folder, kernels


@pytest.fixture(scope="module")
def vggish_weights(tmp_path_factory):
    torch.manual_seed(0)
    layers = nn.Sequential(
        *[nn.Conv2d(*sizes, 3) for sizes in ((1, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512))]
    )
    names = ("0", "3", "6", "8", "11", "13")
    state = {f"features.{name}.{kind}": getattr(layer, kind).detach()
             for name, layer in zip(names, layers, strict=True) for kind in ("weight", "bias")}  # fmt: skip
    for name, sizes in (("0", (512 * 24, 4096)), ("2", (4096, 4096)), ("4", (4096, 128))):
        # Few different rows are quick to draw.
        rows = torch.randn(16, sizes[0]) * (2 / sizes[0]) ** 0.5
        state[f"embeddings.{name}.weight"] = rows.repeat(sizes[1] // 16, 1)
        state[f"embeddings.{name}.bias"] = torch.randn(sizes[1]) * 0.1
    file = tmp_path_factory.mktemp("weights") / "vggish.pth"
    torch.save(state, file)
    return file, state, media.make("vggish", "sound", weights=str(file))


def test_vgg19_of_both_publishers(vgg19_weights):
    folder, kernels = vgg19_weights
    frames = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    keras = media.make("vgg19", "frames", weights=str(folder / "vgg19.h5"))
    caffe = media.make("vgg19", "frames", weights=str(folder / "vgg19.pth"), frames_per_step=2)
    found = keras(frames)
    assert found.dtype == np.float32 and found.shape == (2, *keras.modality.shape)
    assert np.array_equal(found, caffe(frames))
    x = torch.from_numpy(frames[..., ::-1].astype(np.float32) - np.array([103.939, 116.779, 123.68], np.float32))
    x, given = x.permute(0, 3, 1, 2), iter(kernels)
    for width in PLAN:
        x = F.max_pool2d(x, 2) if width == "M" else F.relu(F.conv2d(x, *next(given), padding=1))
    expected = x.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    # Averaged over a second, as `features` does.
    assert caffe.rate == 2 and keras.rate == 16


def test_vgg19_resizes_without_keeping_the_aspect(vgg19_weights):
    wide = np.zeros((1, 90, 300, 3), np.uint8)
    wide[:, :, 150:] = 255
    pixels = networks.resized(wide, 224)
    assert pixels.shape == (1, 3, 224, 224)
    assert float(pixels[..., :110].max()) == 0 and float(pixels[..., 114:].min()) > 254.9


@pytest.mark.parametrize("count", [240, 299, 300])
@pytest.mark.parametrize("per_step", [16, 8, 1])
def test_frames_are_those_of_ave(vgg19_weights, count, per_step):
    backbone = media.make("vgg19", "frames", weights=str(vgg19_weights[0] / "vgg19.pth"), frames_per_step=per_step)
    numbers = backbone.frame_numbers(count, 10)
    expected = [[int(i * count / 10 + k / per_step * count / 10) for k in range(per_step)] for i in range(10)]
    assert numbers.tolist() == expected
    assert numbers.max() < count


def test_vggish_by_its_definition(vggish_weights):
    _, state, backbone = vggish_weights
    assert (backbone.hop_s, backbone.window_s, backbone.rate) == (0.96, 0.975, 16000)
    sound = np.random.default_rng(0).normal(0, 0.1, (3, 15600)).astype(np.float32)
    found = backbone(sound)
    assert found.shape == (3, 128) and found.dtype == np.float32 and found.min() == 0 and found.max() > 0
    x = torch.from_numpy(_spectrogram(sound[1]))[None, None].float()
    layers = iter(("0", "3", "6", "8", "11", "13"))
    for group in (1, 1, 2, 2):
        for _ in range(group):
            name = f"features.{next(layers)}"
            x = F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))
        x = F.max_pool2d(x, 2)
    x = x.transpose(1, 3).transpose(1, 2).flatten(1)
    for name in ("0", "2", "4"):
        x = F.relu(F.linear(x, state[f"embeddings.{name}.weight"], state[f"embeddings.{name}.bias"]))
    np.testing.assert_allclose(found[1], x[0].numpy(), atol=1e-5 * float(x.max()))


def _spectrogram(samples: np.ndarray) -> np.ndarray:
    """(96, 64) log mel spectrogram of 15,600 samples, band by band."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    spectrum = [np.abs(np.fft.rfft(samples[160 * n : 160 * n + 400] * window, 512)) for n in range(96)]
    mel = 1127 * np.log(1 + np.arange(257) * 16000 / 512 / 700)
    edges = np.linspace(1127 * np.log(1 + 125 / 700), 1127 * np.log(1 + 7500 / 700), 66)
    bands = []
    for low, centre, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        weight = np.interp(mel, [low, centre, high], [0, 1, 0])
        bands.append(np.array(spectrum) @ weight)
    return np.log(np.stack(bands, 1) + 0.01)


def test_ten_seconds_of_sound_are_ten_steps(vggish_weights, tmp_path):
    from media_files import beeps, write_media

    backbone = vggish_weights[2]
    sound = beeps(10, (3, 7), 16000)
    (clip,) = media.features(write_media(tmp_path / "sound.wav", sound=sound, rate_hz=16000), {"audio": backbone})
    assert clip.features["audio"].shape == (10, 128) and clip.features["audio"].min() >= 0
    # Step k begins at 0.96 k s.
    as_written = (sound * 32767).astype(np.int16) / np.float32(32768)
    rows = np.stack([as_written[k * 15360 :][:15600] for k in range(10)])
    np.testing.assert_allclose(clip.features["audio"], backbone(rows), atol=1e-5)


@pytest.mark.slow
def test_vggish_equals_torchvggish(vggish_weights, monkeypatch):
    # It imports this package to resample other rates than 16 kHz.
    monkeypatch.setitem(sys.modules, "resampy", types.ModuleType("resampy"))
    torchvggish = pytest.importorskip("torchvggish.torchvggish")
    examples = pytest.importorskip("torchvggish.vggish_input")
    _, state, backbone = vggish_weights
    network = torchvggish.VGG(torchvggish.make_layers(), postprocess=False).eval()
    network.load_state_dict(state)
    sound = np.random.default_rng(1).normal(0, 0.2, 160000)
    with torch.no_grad():
        expected = network(examples.waveform_to_examples(sound, 16000)).numpy()
    rows = np.stack([sound[k * 15360 :][:15600] for k in range(10)])
    found = backbone(rows)
    assert expected.shape == found.shape == (10, 128) and found.min() >= 0
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_recipe_of_ave(vgg19_weights, vggish_weights, tmp_path):
    files = {"vgg19": str(vgg19_weights[0] / "vgg19.h5"), "vggish": str(vggish_weights[0])}
    assert parsed_weights(",".join(f"{name}={file}" for name, file in files.items())) == files
    made = media.recipe("ave", files)
    assert {name: one.modality.shape for name, one in made.items()} == {"audio": (128,), "video": (7, 7, 512)}
    described = media.Preprocessor.of(made)
    assert media.Preprocessor.from_dict(described.as_dict()).make()["video"].rate == 16
    with pytest.raises(ValueError, match="recipe must be one of ave, got 'eva'"):
        media.recipe("eva", files)
    with pytest.raises(ValueError, match="vggish is missing"):
        media.recipe("ave", {"vgg19": files["vgg19"]})
    with pytest.raises(ValueError, match="weights must be of vgg19, vggish, bert for recipe 'ave', got 'vgg16'"):
        media.recipe("ave", {**files, "vgg16": "x"})
    with pytest.raises(FileNotFoundError, match="weights must be an existing file, got"):
        media.recipe("ave", {**files, "vggish": str(tmp_path / "none.pth")})
    for text in ("vgg19", "=x", "vgg19=", "vgg19=a,vgg19=b", ""):
        with pytest.raises(ValueError, match="weights must be NAME=FILE"):
            parsed_weights(text)


def test_other_files_are_refused(vgg19_weights, vggish_weights, tmp_path):
    _, state, _ = vggish_weights
    small = {name: one if name.startswith("features") else torch.zeros(1) for name, one in state.items()}
    lacking = {name: one for name, one in small.items() if name != "embeddings.4.bias"}
    cases = {
        "must have all layers of the network, it lacks embeddings.4.bias": lacking,
        r"features.0.weight in .* must have shape \(64, .*, got \(2,\)": {**small, "features.0.weight": torch.zeros(2)},
        "features.0.bias in .* must be finite": {**small, "features.0.bias": torch.full((64,), torch.nan)},
        "tensors by name, got list": [1],
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            VGGish(tmp_path / "w.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.h5").write_text("no weights")
    with pytest.raises(ValueError, match="text.pth must be a file of tensors"):
        VGGish(tmp_path / "text.pth")
    with pytest.raises(ValueError, match="text.h5 must be a file of Keras"):
        media.make("vgg19", "frames", weights=str(tmp_path / "text.h5"))
    with pytest.raises(ValueError, match="frames_per_step must be a whole number of at least 1, got 0"):
        media.make("vgg19", "frames", weights=str(vgg19_weights[0] / "vgg19.pth"), frames_per_step=0)
    with pytest.raises(ValueError, match="options of backbone 'vgg19'"):
        media.make("vgg19", "frames")

"""The library's own backbones, and those from local folders with models of transformers."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from unicode_fast import media
from unicode_fast.media import networks
from unicode_fast.media.wordllama import words_of


def frames(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 120, 160, 3), dtype=np.uint8)


def test_efficientnet_knows_two_pictures():
    pytest.importorskip("efficientnet_lite_pytorch")
    backbone = media.make("efficientnet-lite0", "frames")
    images = pytest.importorskip("sklearn.datasets")
    # A daisy and a palace.
    assert [backbone.classes(images.load_sample_image(name)[None])[0] for name in ("flower.jpg", "china.jpg")] == [
        985,
        698,
    ]
    found = backbone(frames(5))
    assert found.shape == (5, *backbone.modality.shape) == (5, 7, 7, 1280)
    # The features of a frame do not depend on the others.
    for number in (0, 4):
        np.testing.assert_array_equal(found[number], backbone(frames(5)[number : number + 1])[0])


def test_the_square_in_the_middle():
    wide = np.zeros((1, 100, 300, 3), np.uint8)
    wide[:, :, 100:200] = 200
    assert networks.centre_square(wide).shape == (1, 100, 100, 3)
    assert (networks.centre_square(wide) == 200).all()
    assert (networks.centre_square(wide.transpose(0, 2, 1, 3)) == 200).all()


def test_word_vectors_are_means_of_tokens():
    if importlib.util.find_spec("wordllama") is None:
        pytest.skip("wordllama is not installed")
    backbone = media.make("wordllama", "caption")
    found = backbone("A dog, barking!")
    assert found.shape == (3, 256) and found.dtype == np.float32
    np.testing.assert_array_equal(found[1], backbone("dog")[0])
    tokens = backbone.tokenizer.encode("barking", add_special_tokens=False)
    assert len(tokens.ids) > 1
    np.testing.assert_allclose(found[2], backbone.table[tokens.ids].astype(np.float32).mean(0))
    assert backbone(" ".join(map(str, range(30)))).shape == (10, 256)
    assert backbone(" ... ").shape == (0, 256)


def test_words_are_without_marks():
    assert words_of("The cat's well-known “bow”, 3.5 m: ça va?") == [
        "The",
        "cat's",
        "well-known",
        "bow",
        "3",
        "5",
        "m",
        "ça",
        "va",
    ]


def test_log_mel_is_that_of_the_built_in_data():
    from unicode_fast.data.talking_digits.spectrogram import log_mel_statistics

    sound = np.random.default_rng(0).normal(0, 0.1, (3, 16000)).astype(np.float32)
    np.testing.assert_array_equal(media.make("log-mel", "sound")(sound), log_mel_statistics(sound))


def saved(folder, config, processor):
    """Writes a model with random weights, and its preprocessor, as transformers does."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "ViT",
        "DeiT",
        "Beit",
        "Dinov2",
        "Dinov2WithRegisters",
        "DINOv3ViT",
        "CLIPVision",
        "SiglipVision",
        "CLIP",
        "Siglip",
    ],
)
def test_patches_of_a_vision_model(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    vision = {**SMALL, "image_size": 96, "patch_size": 16}
    given = (
        {"vision_config": vision, "text_config": {**SMALL, "vocab_size": 50}} if kind in ("CLIP", "Siglip") else vision
    )
    size = {"height": 96, "width": 96}
    processor = transformers.ViTImageProcessor(size=size)
    folder = saved(tmp_path / "model", getattr(transformers, f"{kind}Config")(**given), processor)
    backbone = media.make(folder, "frames", rate=2)
    assert backbone.modality.shape == (6, 6, 32) and backbone.rate == 2
    found = backbone(frames(5))
    assert found.shape == (5, 6, 6, 32) and found.dtype == np.float32
    np.testing.assert_array_equal(found[4], backbone(frames(5)[4:])[0])
    with torch.no_grad():
        pixels = processor(images=list(frames(1)), return_tensors="pt")["pixel_values"]
        tokens = backbone.model(pixels).last_hidden_state[0, -36:]
    np.testing.assert_allclose(found[0].reshape(36, 32), tokens.numpy(), atol=1e-4)
    again = media.Preprocessor.from_dict(media.Preprocessor.of({"video": backbone}).as_dict()).make()["video"]
    assert again.rate == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AST", "Clap", "fused Clap", "Wav2Vec2"])
def test_seconds_of_an_audio_model(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    if kind == "AST":
        config = transformers.ASTConfig(**SMALL, max_length=128, num_mel_bins=32)
        processor = transformers.ASTFeatureExtractor(max_length=128, num_mel_bins=32)
    elif kind == "Wav2Vec2":
        convolutions = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
        config = transformers.Wav2Vec2Config(**SMALL, **convolutions)
        processor = transformers.Wav2Vec2FeatureExtractor()
    else:
        audio = {"patch_embeds_hidden_size": 16, "hidden_size": 64, "depths": [1, 1], "num_attention_heads": [2, 2],
                 "num_hidden_layers": 2, "enable_fusion": kind == "fused Clap"}  # fmt: skip
        config = transformers.ClapConfig(audio_config=audio, text_config={**SMALL, "vocab_size": 50})
        processor = transformers.ClapFeatureExtractor(truncation="fusion" if kind == "fused Clap" else "rand_trunc")
    backbone = media.make(saved(tmp_path / "model", config, processor), "sound")
    sound = np.random.default_rng(0).normal(0, 0.1, (3, backbone.rate)).astype(np.float32)
    found = backbone(sound)
    assert found.shape == (3, *backbone.modality.shape) and np.isfinite(found).all()
    assert not np.allclose(found[0], found[1])
    np.testing.assert_array_equal(found[2], backbone(sound[2:])[0])


@pytest.mark.slow
def test_words_of_a_bert(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "bark", "##ing"])
    )
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    folder = saved(tmp_path / "model", transformers.BertConfig(**SMALL, vocab_size=9), tokenizer)
    backbone = media.make(folder, "caption")
    assert backbone.modality.kind == "words" and backbone.modality.shape == (32,)
    assert backbone("a dog barking").shape == (3, 32) and backbone.words("a dog barking") == [5, 6, -1]
    assert backbone("dog " * 12).shape == (10, 32) and len(backbone.words("dog " * 12)) == 12
    assert backbone(" ").shape == (0, 32) and backbone.words(" ") == []
    described = media.Preprocessor.of({"text": backbone})
    assert media.Preprocessor.from_dict(described.as_dict()).make()["text"].weights_sha256 == backbone.weights_sha256


@pytest.mark.slow
def test_other_folders_are_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="backbone must be a folder with weights as .safetensors"):
        media.make(str(tmp_path), "frames")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="backbone must be a model that transformers can load"):
        media.make(str(tmp_path), "frames")
    transformers = pytest.importorskip("transformers")
    given = {**SMALL, "image_size": 64, "patch_size": 16}
    folder = saved(
        tmp_path / "model",
        transformers.ViTConfig(**given),
        transformers.ViTImageProcessor(size={"height": 64, "width": 64}),
    )
    with pytest.raises(ValueError, match="must give at least 5 x 5 patches, got 4 x 4"):
        media.make(folder, "frames")
    with pytest.raises(ValueError, match="rate must be a whole number of frames of at least 1, got 0"):
        media.make(folder, "frames", rate=0)
    with pytest.raises(ValueError, match="model_type in its config.json must be that of a model of audio, such as"):
        media.make(folder, "sound")
    for name in ("config.json", "preprocessor_config.json"):
        file = tmp_path / "model" / name
        content = file.read_text()
        file.write_text(json.dumps({**json.loads(content), "auto_map": {"AutoModel": "own.Model"}}))
        with pytest.raises(ValueError, match=f"auto_map in its {name} must not run code"):
            media.make(folder, "frames")
        file.write_text(content)

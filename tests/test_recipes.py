"""The recipe of published features, and its flag for files of weights."""

from pathlib import Path

import pytest

from unicode_fast import media
from unicode_fast.config import Modality
from unicode_fast.media import backbones, recipes
from unicode_fast.media.recipes import parsed_weights


class Made:
    """Stands for a backbone and keeps what it was made from."""

    def __init__(self, reads, **options):
        self.name, self.reads, self.options = "made", reads, options
        self.rate, self.modality = options.get("frames_per_step", 0), Modality("vector", (2,))


@pytest.fixture
def files(monkeypatch, tmp_path):
    for name, reads in (("vgg19", "frames"), ("vggish", "sound")):
        monkeypatch.setitem(backbones._factories, name, lambda reads=reads, **options: Made(reads, **options))
        (tmp_path / f"{name}.pth").touch()
    return {name: str(tmp_path / f"{name}.pth") for name in ("vgg19", "vggish")}


def test_the_recipe_of_ave(files):
    made = media.recipe("ave", files)
    assert {name: (one.reads, one.options) for name, one in made.items()} == {
        "audio": ("sound", {"weights": files["vggish"]}),
        "video": ("frames", {"weights": files["vgg19"], "frames_per_step": 16}),
    }
    paths = {name: Path(file) for name, file in files.items()}
    assert media.recipe("ave", paths, frames_per_step=8)["video"].rate == 8


def test_text_by_the_folder_of_a_bert(files, tmp_path, monkeypatch):
    monkeypatch.setattr("unicode_fast.media.local_models.local_model", lambda folder, reads: Made(reads, at=folder))
    (tmp_path / "bert").mkdir()
    made = media.recipe("ave", {**files, "bert": tmp_path / "bert"})
    assert list(made) == ["audio", "video", "text"]
    assert made["text"].options == {"at": str(tmp_path / "bert")}


def test_other_recipes_and_weights_are_refused(files, tmp_path):
    assert list(recipes.RECIPES) == ["ave"]
    with pytest.raises(ValueError, match="recipe must be one of ave, got 'eva'"):
        media.recipe("eva", files)
    for network in files:
        lacking = {name: file for name, file in files.items() if name != network}
        with pytest.raises(ValueError, match=f"given for vgg19, vggish by recipe 'ave', {network} is missing"):
            media.recipe("ave", lacking)
    with pytest.raises(ValueError, match="weights must be of vgg19, vggish, bert for recipe 'ave', got 'vgg16'"):
        media.recipe("ave", {**files, "vgg16": files["vgg19"]})
    for network in ("vggish", "bert"):
        with pytest.raises(FileNotFoundError, match=f"weights of {network} must exist, got '.*none'"):
            media.recipe("ave", {**files, network: str(tmp_path / "none")})
    with pytest.raises(ValueError, match="backbone must be one of .* or a local folder"):
        media.recipe("ave", {**files, "bert": files["vgg19"]})


def test_weights_of_a_flag(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parsed_weights("vgg19=a b.h5,vggish=~/c=d.pth") == {"vgg19": "a b.h5", "vggish": "/home/me/c=d.pth"}
    for text in ("vgg19", "=x", "vgg19=", "vgg19=a,vgg19=b", "vgg19=a,", ""):
        with pytest.raises(ValueError, match="weights must be NAME=FILE"):
            parsed_weights(text)

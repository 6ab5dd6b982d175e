"""Raw media: from files of video, sound and captions to features. Importing it imports no decoder and no model."""

from collections.abc import Callable
from importlib import import_module

from unicode_fast.media.backbones import STEP_S, WINDOW_STEPS, Backbone, make, names, register
from unicode_fast.media.decoding import MediaError, MediaFile
from unicode_fast.media.extraction import Extraction, extract
from unicode_fast.media.features import ClipFeatures, Preprocessor, features
from unicode_fast.media.recipes import recipe

__all__ = [
    "STEP_S",
    "WINDOW_STEPS",
    "Backbone",
    "ClipFeatures",
    "Extraction",
    "MediaError",
    "MediaFile",
    "Preprocessor",
    "extract",
    "features",
    "make",
    "names",
    "recipe",
    "register",
]

# Module and class of the library's own backbones, imported when they are made.
_OWN = {
    "log-mel": ("log_mel", "LogMel"),
    "efficientnet-lite0": ("efficientnet_lite", "EfficientNetLite0"),
    "wordllama": ("wordllama", "WordLlama"),
    "vgg19": ("vgg19", "Vgg19"),
    "vggish": ("vggish", "VGGish"),
}


def _later(module: str, kind: str) -> Callable[..., Backbone]:
    def factory(**options: object) -> Backbone:
        made: Backbone = getattr(import_module(f"unicode_fast.media.{module}"), kind)(**options)
        return made

    return factory


for _name, _place in _OWN.items():
    register(_name, _later(*_place))

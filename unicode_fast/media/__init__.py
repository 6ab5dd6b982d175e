"""Raw media: from files of video, sound and captions to features. Importing it imports no decoder and no model."""

from unicode_fast.media.backbones import STEP_S, WINDOW_STEPS, Backbone, make, register
from unicode_fast.media.extraction import Extraction, extract
from unicode_fast.media.features import ClipFeatures, MediaError, Preprocessor, features

__all__ = [
    "STEP_S",
    "WINDOW_STEPS",
    "Backbone",
    "ClipFeatures",
    "Extraction",
    "MediaError",
    "Preprocessor",
    "extract",
    "features",
    "make",
    "register",
]

"""Training objectives: each method is a file that ends with its `Recipe`; `METHODS` holds them by name."""

from __future__ import annotations

from collections.abc import Mapping

from unicode_fast.config import Config, Modality
from unicode_fast.methods.base import Draws, Losses, Method
from unicode_fast.methods.recipe import Recipe
from unicode_fast.methods.registry import METHODS, recipe_of, row_name
from unicode_fast.methods.uni_code import UniCodeMethod
from unicode_fast.modules.alignment import Alignment
from unicode_fast.modules.model import UniCode
from unicode_fast.modules.wrapped import unwrapped_unicode

__all__ = [
    "METHODS",
    "Alignment",
    "Draws",
    "Losses",
    "Method",
    "Recipe",
    "UniCodeMethod",
    "make_method",
    "make_model",
    "recipe_of",
    "row_name",
]


def make_model(modalities: Mapping[str, Modality], config: Config) -> UniCode:
    """A new model of a configuration's method.

    Args:
        modalities: kind and shape by name.
        config: of the model.

    Raises:
        TypeError: a modality is no Modality, or `config` no Config.
        ValueError: the method does not support the modalities, or sizes do not fit together.
    """
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, such as preset gives, got {type(config).__name__}")
    recipe = recipe_of(config.method.method)
    return recipe.model(modalities, config, recipe.alignment)


def make_method(model: UniCode) -> Method:
    """The method that trains a model.

    Raises:
        TypeError: the model is no UniCode.
        ValueError: the model lacks parts of its method.
    """
    plain = unwrapped_unicode(model)
    name = plain.config.method.method
    recipe = recipe_of(name)
    if not isinstance(plain, recipe.model) or not isinstance(plain.alignment, recipe.alignment or Alignment):
        raise ValueError(f"model must be one of make_model for the method {name!r}, got a {type(plain).__name__}")
    return (recipe.method or UniCodeMethod)(model)

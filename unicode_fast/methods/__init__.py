"""Training objectives: a method is a subclass of `Method`, in a file of its own."""

from unicode_fast.methods.base import Draws, Losses, Method
from unicode_fast.methods.uni_code import UniCodeMethod
from unicode_fast.modules.model import UniCode

__all__ = ["Draws", "Losses", "Method", "UniCodeMethod", "make_method"]


def make_method(model: UniCode) -> Method:
    """The method that trains a model."""
    return UniCodeMethod(model)

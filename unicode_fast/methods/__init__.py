"""Training objectives."""

from unicode_fast.methods.uni_code import Draws, Losses, UniCodeMethod

__all__ = ["Draws", "Losses", "UniCodeMethod"]

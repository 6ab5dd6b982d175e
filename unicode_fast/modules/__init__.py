"""torch.nn.Module classes; no kernel launch and no file path below here."""

from unicode_fast.modules.codebook import Codebook, Quantised
from unicode_fast.modules.model import Encoded, ModelOutput, UniCode

__all__ = ["Codebook", "Encoded", "ModelOutput", "Quantised", "UniCode"]

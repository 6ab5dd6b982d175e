"""torch.nn.Module classes; no kernel launch and no file path below here."""

from unicode_fast.modules.codebook import Codebook, CodebookOutput, Quantised
from unicode_fast.modules.model import Encoded, ModelOutput, UniCode

__all__ = ["Codebook", "CodebookOutput", "Encoded", "ModelOutput", "Quantised", "UniCode"]

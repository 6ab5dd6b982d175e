"""torch.nn.Module classes; they launch no kernels and read no files."""

from unicode_fast.modules.codebook import Codebook, CodebookOutput, Quantised
from unicode_fast.modules.model import Encoded, ModelOutput, UniCode

__all__ = ["Codebook", "CodebookOutput", "Encoded", "ModelOutput", "Quantised", "UniCode"]

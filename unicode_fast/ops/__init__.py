"""The operators, one public function in each file: checks, schema, fake implementation and gradient formula."""

from unicode_fast.ops.codebook_update import BatchShard, CodebookState, EmaConfig, ResetDraws, codebook_update
from unicode_fast.ops.codeword_distribution import codeword_distribution
from unicode_fast.ops.commitment import commitment_loss
from unicode_fast.ops.cross_info_nce import CrossInfoNCE, cross_info_nce
from unicode_fast.ops.nearest_codeword import NearestCodeword, PreparedCodebook, nearest_codeword

__all__ = [
    "BatchShard",
    "CodebookState",
    "CrossInfoNCE",
    "EmaConfig",
    "NearestCodeword",
    "PreparedCodebook",
    "ResetDraws",
    "codebook_update",
    "codeword_distribution",
    "commitment_loss",
    "cross_info_nce",
    "nearest_codeword",
]

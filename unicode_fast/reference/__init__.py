"""Every operator in plain PyTorch: the specification that the faster backends are measured against.

The functions take arguments that have been checked, work on any device, never wait for it, and never depend on
autocast's or autograd's state; `unicode_fast.ops` adds all of that.
"""

from unicode_fast.reference.codebook_update import (
    codebook_apply_reference,
    codebook_statistics_reference,
    codebook_update_reference,
)
from unicode_fast.reference.codeword_distribution import (
    codeword_distribution_backward_reference,
    codeword_distribution_reference,
)
from unicode_fast.reference.commitment import commitment_backward_reference, commitment_reference
from unicode_fast.reference.cross_info_nce import cross_info_nce_backward_reference, cross_info_nce_reference
from unicode_fast.reference.nearest_codeword import nearest_codeword_reference

__all__ = [
    "codebook_apply_reference",
    "codebook_statistics_reference",
    "codebook_update_reference",
    "codeword_distribution_backward_reference",
    "codeword_distribution_reference",
    "commitment_backward_reference",
    "commitment_reference",
    "cross_info_nce_backward_reference",
    "cross_info_nce_reference",
    "nearest_codeword_reference",
]

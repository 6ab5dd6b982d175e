"""Every operator in plain PyTorch: the specification of the faster backends.

The functions take checked arguments, run on any device without synchronisation, and do not depend on the state of
autocast or autograd; `unicode_fast.ops` handles these.
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
from unicode_fast.reference.cross_info_nce import (
    cross_info_nce_backward_reference,
    cross_info_nce_reference,
    cross_info_nce_with_gradient_reference,
)
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
    "cross_info_nce_with_gradient_reference",
    "nearest_codeword_reference",
]

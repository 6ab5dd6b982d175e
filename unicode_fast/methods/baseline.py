"""Baseline: a VQ-VAE with a shared codebook; no term compares modalities.

Source:
    Xia et al., NeurIPS 2023, section 4.1 and Table 1: plain EMA, and commitment to the own codeword. The paper does not
    state whether it resets codewords: our version does, by the preset. Our commitment has the preset's own factor, 2 in
    `recommended` and `official`; Eq. 3 has beta alone.
"""

from dataclasses import replace

from unicode_fast.methods.recipe import Recipe, compared

RECIPE: Recipe = replace(compared("Baseline"), incomplete=True)

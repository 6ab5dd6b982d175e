"""CMCM: the frame with code matching, the loss that Uni-Code took over.

Source:
    Liu et al., "Cross-Modal Discrete Representation Learning", ACL 2022. Code matching is `losses.code_matching`, with
    the weight and the form of the preset. Our version has no contrastive loss of pooled features, which theirs has: the
    paper does not state whether the row of Table 1 has it. Resets and the factor of the commitment are the preset's, as
    in `baseline`. With `dcid` the row is that of Table 2 without MM-EMA.
"""

from unicode_fast.methods.recipe import PLAIN, WITHOUT_DCID, Recipe

_RULES = {name: value for name, value in PLAIN.items() if name != "code_matching_weight"}
RECIPE: Recipe = Recipe("CMCM", _RULES, alone=WITHOUT_DCID, incomplete=True)

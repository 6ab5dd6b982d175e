"""Tolerances of everything that is checked against the released code's values, with their reasons."""

from tolerances import Tolerance

# Two float64 evaluations of one layer, with values of order one and sums of at most some hundred terms.
LAYER = Tolerance(1e-12, 1e-12)

# The promise of the official preset: float64 values within 1e-10 of the released code's.
OFFICIAL = Tolerance(1e-10, 1e-10)

# A few float64 operations written down by hand.
BY_HAND = Tolerance(1e-14, 1e-15)

# Central differences of 1e-8 along one direction of all parameters in float64. The roundoff of a loss of order ten,
# divided by the difference, is 1e-7, in a derivative of order ten at least. Rectifiers that change sides add little.
DIRECTIONAL = Tolerance(1e-7)

# Central differences of 1e-6 of the code matching loss, which is of order one.
CODE_MATCHING_GRADIENT = Tolerance(0.0, 1e-8)

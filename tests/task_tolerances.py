"""Tolerances of metrics and probes, with their reasons."""

from tolerances import Tolerance

# Float64 ratios of small whole numbers, and their averages over a few batches, in another order of operations.
RATIO = Tolerance(1e-14, 1e-15)

# Float64 losses of some hundred terms of order one, added in another order.
LOSS = Tolerance(1e-12, 1e-14)

# A float32 linear layer of 16 terms of order one, applied to codewords once instead of at every position. The products
# are the same, in sums that a matrix product may order differently. Some 16 u of values up to ten.
LAYER = Tolerance(1e-5, 1e-5)

# Least accuracy of a probe on codes that determine the class. It makes no error there; the slack is for single clips.
LEARNED = 0.97

# The same for a linear map of 25 random codewords of width 16 to classes of five. Some codewords lie on the wrong side.
SEPARATED = 0.8

# Percentiles of 4000 draws of a mean whose standard error is 0.06: theirs is about 0.06 * 2.7 / sqrt(4000), twice.
INTERVAL = Tolerance(0.0, 0.015)

# Float32 maps of order one through some linear layers, products in another order.
MAPS = Tolerance(1e-4, 1e-5)

# Probabilities of one mask, each a float32 sum over 255 thresholds' worth of counts.
MASKS = Tolerance(1e-6, 1e-6)

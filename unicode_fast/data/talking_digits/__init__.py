"""The built-in data sets: how spoken, handwritten and written numbers are drawn, rendered and kept."""

"""The built-in data sets: spoken, handwritten and written numbers, drawn, rendered and cached."""

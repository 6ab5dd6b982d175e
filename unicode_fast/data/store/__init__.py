"""The packed form of a data set: a folder of memory-mapped, checksummed arrays."""

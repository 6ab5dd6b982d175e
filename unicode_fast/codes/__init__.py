"""Codes of clips and files: encode them, keep them in files for other programs, and search clips by them."""

from unicode_fast.codes.folder import CodesError, CodesFolder, encode_to_folder, read_codes
from unicode_fast.codes.formats import Row
from unicode_fast.codes.searching import Gallery, Hit, embed_query, search

__all__ = [
    "CodesError",
    "CodesFolder",
    "Gallery",
    "Hit",
    "Row",
    "embed_query",
    "encode_to_folder",
    "read_codes",
    "search",
]

"""Files of other projects; no other module uses their names."""

from unicode_fast.compat.cmg import CmgFileError, from_cmg, to_cmg

__all__ = ["CmgFileError", "from_cmg", "to_cmg"]

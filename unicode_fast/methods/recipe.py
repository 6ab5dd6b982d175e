"""How a method is put together: its model, its losses, and the fields that it sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unicode_fast.methods.base import Method
from unicode_fast.modules.alignment import Alignment
from unicode_fast.modules.model import UniCode

# The frame's terms of common codes are off.
WITHOUT_SHARING: Mapping[str, Any] = {
    "code_matching_weight": 0.0,
    "assignment_weight": 0.0,
    "presence_weight": 0.0,
    "grounding_weight": 0.0,
}
# Plain EMA and plain commitment: no term of the frame compares modalities.
PLAIN: Mapping[str, Any] = {"ema_partner": "none", "commitment_partner": 0.0, **WITHOUT_SHARING}
# Without disentanglement.
WITHOUT_DCID: Mapping[str, Any] = {"club_estimator": "none", "cpc_weight": 0.0}


@dataclass(frozen=True)
class Recipe:
    """A method.

    Args:
        title: its name in tables, for a method of the paper that of its row in Table 1.
        rules: fields with other values than the preset's and the size's.
        alone: further fields without `dcid`. A recipe without `alone` and `with_dcid` has no form with `dcid`.
        with_dcid: further fields with `dcid`.
        alignment: what the method adds to the model; None adds nothing.
        model: its class.
        method: its losses; None takes those of Uni-Code's frame, `UniCodeMethod`, with the terms of `alignment`.
        micro_batches: whether a batch may be split into micro-batches.
        graphable: whether a CUDA graph can capture a step.
        incomplete: whether clips may lack a modality.
    """

    title: str
    rules: Mapping[str, Any] = field(default_factory=dict)
    alone: Mapping[str, Any] = field(default_factory=dict)
    with_dcid: Mapping[str, Any] = field(default_factory=dict)
    alignment: type[Alignment] | None = None
    model: type[UniCode] = UniCode
    method: type[Method] | None = None
    micro_batches: bool = True
    graphable: bool = True
    incomplete: bool = False

    @property
    def combines(self) -> bool:
        """Whether the method has a form with DCID."""
        return bool(self.alone or self.with_dcid)


def compared(title: str, alignment: type[Alignment] | None = None, **fields: Mapping[str, Any]) -> Recipe:
    """A comparison method: the frame with plain EMA, alone or with DCID, and the method's own terms.

    Args:
        title: as in `Recipe`.
        alignment: as in `Recipe`.
        fields: `rules`, `alone` and `with_dcid` beside those of every comparison method.
    """
    return Recipe(
        title,
        {**PLAIN, **fields.get("rules", {})},
        alone={**WITHOUT_DCID, **fields.get("alone", {})},
        with_dcid=fields.get("with_dcid", {}),
        alignment=alignment,
    )

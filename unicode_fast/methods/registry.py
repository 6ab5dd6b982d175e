"""The methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unicode_fast.config import Config
from unicode_fast.methods import baseline, cmcm, codaar, codis, fcid, h_dcid, micu, mst, s_mit, turn, uni_code
from unicode_fast.methods.recipe import Recipe

METHODS: Mapping[str, Recipe] = {
    "uni-code": uni_code.RECIPE,
    "baseline": baseline.RECIPE,
    "s-mit": s_mit.RECIPE,
    "mst": mst.RECIPE,
    "codis": codis.RECIPE,
    "turn": turn.RECIPE,
    "cmcm": cmcm.RECIPE,
    "micu": micu.RECIPE,
    "fcid": fcid.RECIPE,
    "codaar": codaar.RECIPE,
    "h-dcid": h_dcid.RECIPE,
}


def recipe_of(method: str) -> Recipe:
    """The recipe of a method.

    Raises:
        ValueError: the name is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r:.60}")
    return METHODS[method]


def rules_of(method: str, dcid: bool) -> dict[str, Any]:
    """The fields that a method sets, beside those of preset and size.

    Raises:
        ValueError: the name is unknown, or `dcid` is set and the method has no such form.
    """
    recipe = recipe_of(method)
    if dcid and not recipe.combines:
        there = ", ".join(name for name, other in METHODS.items() if other.combines)
        raise ValueError(f"dcid must be false with method {method!r}, because only {there} combine with it, got true")
    return {**recipe.rules, **(recipe.with_dcid if dcid else recipe.alone)}


def check_method(config: Config) -> None:
    """Checks that the method can train as the configuration says.

    Raises:
        ValueError: `micro_batches` or `cuda_graph` is set, and the method refuses it.
    """
    method, train = config.method.method, config.train
    if train.micro_batches > 1 and not recipe_of(method).micro_batches:
        raise ValueError(f"micro_batches must be 1 with method {method!r}, got {train.micro_batches}")
    if train.cuda_graph and not recipe_of(method).graphable:
        raise ValueError(f"cuda_graph must be false with method {method!r}, got true")


def needs_every_modality(config: Config) -> str:
    """The preset or method that refuses clips without a modality, such as "method 'mst'"; empty if none does."""
    if config.preset == "official":
        return "preset 'official'"
    method = config.method.method
    return "" if recipe_of(method).incomplete else f"method {method!r}"


def form_of(title: str) -> tuple[str, bool] | None:
    """Method and `dcid` of a row of tables, the reverse of `row_name`; None for a name of no method."""
    forms = ((name, dcid) for name, recipe in METHODS.items() for dcid in (False, True) if recipe.combines or not dcid)
    return next((form for form in forms if row_name(*form) == title), None)


def row_name(method: str, dcid: bool) -> str:
    """The name of a method in tables, that of its row in the paper's Table 1."""
    return f"DCID+{recipe_of(method).title}" if dcid else recipe_of(method).title

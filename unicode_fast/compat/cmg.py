"""Checkpoints of haihuangcode/CMG's pre-training, read into the `official` preset and written back."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unicode_fast.compat import cmg_names
from unicode_fast.compat.cmg_names import CPC, DECODER, ENCODER, IDLE, WORDS, Shape
from unicode_fast.config import Config, Modality
from unicode_fast.errors import few
from unicode_fast.files.checked_torch import read_torch
from unicode_fast.files.untrusted import BadFile
from unicode_fast.files.writing import path_of
from unicode_fast.methods import make_model
from unicode_fast.modules import UniCode
from unicode_fast.modules.wrapped import plain_model
from unicode_fast.presets import preset

# Attribute of a model from a file: the content of the file, with the dtype's name in place of each used entry.
REST = "cmg_rest"
# Fields of the released architecture that the shapes of a file do not determine.
ARCHITECTURE: dict[str, Any] = {
    "grid_pooling": "sum",
    "residual_skip": "relu",
    "temporal_layers": cmg_names.TEMPORAL_LAYERS,
    "temporal_heads": 4,
    "cpc_layers": cmg_names.LSTM_LAYERS,
    "cpc_bias": True,
    "cpc_steps": 1,
}
GRID = (7, 7)
_DTYPES = {torch.float64: "float64", torch.float32: "float32"}
# Dtypes of used entries; counts can have any of them.
_KEPT = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")

Rest = dict[str, Any]


class CmgFileError(ValueError):
    """The file is no pre-training checkpoint of CMG; the message names the key and the entries."""


def from_cmg(source: str | os.PathLike[str] | Mapping[str, Any], dtype: torch.dtype | None = None) -> UniCode:
    """The model of a checkpoint of the released pre-training of Uni-Code or FCID, in the `official` preset.

    Sizes are read from the shapes, modalities from the names. Text features are
    BERT words (B, T, 768), the input of the file's LSTM. A file without this
    LSTM gives a warning, and text features are the LSTM's output, (B, T, 256).
    Other missing networks start from random values, and the warning names
    them; encoding needs none of them. Unused entries, optimiser states and
    counters are kept on the CPU for `to_cmg`. A file of FCID holds encoders
    and codebook alone, and `to_cmg` does not write it.

    Args:
        source: the file, or its content as torch.load returns it; only the key `Encoder_parameters` is required.
        dtype: torch.float64 or torch.float32; None keeps the file's.

    Returns:
        The model in eval mode on the CPU, with modalities audio, then video, then text.

    Raises:
        OSError: the file cannot be opened.
        CmgFileError: it is damaged or holds more than tensors and plain
            values, or keys or entries are missing, surplus or of a wrong shape.
        TypeError: `source` is no path and no mapping, or `dtype` is another one.

    Memory:
        The file, and the model beside it.
    """
    from unicode_fast.compat import fcid

    content = _read(source)
    try:
        model, message = (fcid.model_of if fcid.recognises(content) else _model_of)(content, dtype)
    except CmgFileError as error:
        if isinstance(source, Mapping):
            raise
        raise CmgFileError(f"{source}: {error}") from error
    if message:
        warnings.warn(message, stacklevel=2)
    return model.eval()


def _model_of(content: Mapping[str, Any], dtype: torch.dtype | None) -> tuple[UniCode, str]:
    """The model, and a message about missing networks."""
    check_keys(content, cmg_names.PARAMETER_KEYS, cmg_names.OTHER_KEYS)
    file_dtype = entry_of(content, ENCODER, "Cross_quantizer.embedding", 2).dtype
    shapes = model_of_sizes(file_dtype, dtype, lambda: (_modalities(content), _config(content, _modalities(content))))
    modalities = shapes.modalities
    _check_entries(content, shapes, file_dtype)
    model = _unfilled_model(content, shapes)
    _fill(model, content)
    setattr(model, REST, _rest(content, modalities))
    return model, _what_is_missing(content, modalities)


def model_of_sizes(
    file_dtype: torch.dtype, dtype: torch.dtype | None, read: Callable[[], tuple[dict[str, Modality], Config]]
) -> UniCode:
    """The model on the device meta, of sizes from a file.

    Args:
        file_dtype: of the file.
        dtype: of the model; None for that of the file.
        read: reads modalities and configuration from the file.

    Raises:
        CmgFileError: `read` raises it, the sizes are of no model, or the file has another dtype.
        TypeError: `dtype` is another one.
    """
    dtype = file_dtype if dtype is None else dtype
    if file_dtype not in _DTYPES:
        raise CmgFileError(f"source must be of float64 or float32, got {file_dtype}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
    try:
        modalities, config = read()
        with torch.device("meta"):
            return make_model(modalities, config.replace(dtype=_DTYPES[dtype]))
    except CmgFileError:
        raise
    # Sizes from a file can make any layer raise any exception.
    except Exception as error:
        raise CmgFileError(f"source has sizes of no model: {type(error).__name__}: {error!s:.100}") from error


def to_cmg(model: UniCode, *, epoch: int = 0) -> dict[str, Any]:
    """A model's checkpoint in the format of the released pre-training.

    A model from `from_cmg` keeps the keys, shapes and dtypes of its file. It also
    keeps the bits if it was not trained and its dtype is the file's. For any other
    model the result has all networks of its modalities, zeros or copies in place of
    unused entries, and no optimiser states.

    Args:
        model: of the official architecture, with audio and video, audio and text, or all three; also inside
            torch.compile or DataParallel.
        epoch: of a model without a file. A larger epoch shortens the probe training of the released evaluation.

    Returns:
        For torch.save. Used entries are copies on the CPU; the others are those of the file.

    Raises:
        ValueError: the modalities or the architecture are none of the release's, a module was exchanged, or the
            file entries in its checkpoint are damaged.
        TypeError: `model` is no UniCode.
    """
    model, state = plain_model(model)
    rest = getattr(model, REST, None)
    if rest is None:
        _check_architecture(model)
        rest = _made_up_rest(model, state, epoch)
    names = cmg_names.used_entries(model.modalities)
    _check_rest(rest, names)
    result: dict[str, Any] = {}
    for key, value in rest.items():
        result[key] = dict(value) if key in cmg_names.PARAMETER_KEYS else value
        for entry, kept in value.items() if key in cmg_names.PARAMETER_KEYS else ():
            if isinstance(kept, str):
                tensor = state[names[key][entry]]
                tensor = tensor.amin(0) if entry == IDLE else tensor
                result[key][entry] = tensor.detach().to("cpu", getattr(torch, kept), copy=True)
    return result


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = path_of("source", source)
    try:
        content = read_torch(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT, "source must be a checkpoint of CMG, there is no file", str(path)
        ) from error
    except BadFile as error:
        raise CmgFileError(
            f"{path} must be a checkpoint of CMG; it is truncated, damaged or holds more than tensors and plain "
            f"values: {error}"
        ) from error
    if not isinstance(content, dict):
        raise CmgFileError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return content


def check_keys(content: Mapping[str, Any], parameters: Sequence[str], others: Sequence[str]) -> None:
    """Checks the keys of a file, and that those of parameters hold dense tensors by name.

    Raises:
        CmgFileError: the encoder is missing, a key is surplus, or a value is something else.
    """
    if ENCODER not in content:
        raise CmgFileError(f"source must hold the key {ENCODER!r}, got {few([*map(str, content)]) or 'none'}")
    surplus = [str(key) for key in content if key not in (*parameters, *others)]
    if surplus:
        raise CmgFileError(f"source must hold keys of the release only, got {few(surplus)} too")
    for key in parameters:
        if key in content and not isinstance(content[key], Mapping):
            raise CmgFileError(f"{key} must be a dictionary of tensors, got {type(content[key]).__name__}")
        for entry, value in content.get(key, {}).items():
            if not isinstance(value, Tensor):
                raise CmgFileError(f"{entry!s:.60} of {key} must be a tensor, got {type(value).__name__}")
            if type(entry) is not str or value.layout is not torch.strided or value.is_meta or not value.numel():
                raise CmgFileError(f"{entry!r:.60} of {key} must be a name of a dense tensor that is not empty")


def entry_of(content: Mapping[str, Any], key: str, entry: str, dimensions: int) -> Tensor:
    """An entry whose shape determines sizes."""
    if entry not in content[key]:
        raise CmgFileError(f"{key} must hold {entry!r}, which is missing")
    tensor: Tensor = content[key][entry]
    if tensor.dim() != dimensions:
        raise CmgFileError(f"{entry} of {key} must have {dimensions} dimensions, got shape {tuple(tensor.shape)!s:.60}")
    return tensor


def _modalities(content: Mapping[str, Any]) -> dict[str, Modality]:
    """Kinds and shapes of the modalities with an encoder in the file."""
    names = tuple(
        name
        for name in cmg_names.MODALITIES
        if any(entry.startswith((f"{name.title()}_encoder.", f"{name}_self_att.")) for entry in content[ENCODER])
    )
    if names not in cmg_names.VARIANTS:
        allowed = "; ".join(", ".join(variant) for variant in cmg_names.VARIANTS)
        raise CmgFileError(f"{ENCODER} must hold the encoders of {allowed}, got {', '.join(names) or 'none'}")
    shapes = {
        "audio": Modality("vector", (entry_of(content, ENCODER, "Audio_encoder.audio_linear.weight", 2).shape[1],))
    }
    if "video" in names:
        channels = entry_of(content, ENCODER, "Video_encoder.conv_stack.0.weight", 4).shape[1]
        shapes["video"] = Modality("grid", (*GRID, channels))
    if "text" in names and WORDS in content:
        shapes["text"] = Modality("words", (entry_of(content, WORDS, "weight_ih_l0", 2).shape[1],))
    elif "text" in names:
        shapes["text"] = Modality(
            "vector", (entry_of(content, ENCODER, "Text_encoder.text_linear.weight", 2).shape[1],)
        )
    return shapes


def _config(content: Mapping[str, Any], modalities: Mapping[str, Modality]) -> Config:
    """The official preset with the file's sizes."""
    read_from = {
        "codewords": ("Cross_quantizer.embedding", 2, 0),
        "width": ("Cross_quantizer.embedding", 2, 1),
        "vector_specific_width": ("Audio_encoder.audio_linear.weight", 2, 0),
        "feedforward_width": ("audio_self_att.encoder.layers.0.linear1.weight", 2, 0),
    }
    if "video" in modalities:
        read_from |= {
            "grid_hidden_width": ("Video_encoder.conv_stack.0.weight", 4, 0),
            "grid_specific_width": ("Video_encoder.conv_stack.2.weight", 4, 0),
            "grid_club_width": ("Video_encoder.feed_forward.2.weight", 2, 0),
            "squeeze_width": ("video_semantic_encoder.se_layer.0.weight", 2, 0),
        }
    if "text" in modalities:
        read_from["word_width"] = ("Text_encoder.text_linear.weight", 2, 1)
    sizes = {
        field: entry_of(content, ENCODER, entry, dimensions).shape[axis]
        for field, (entry, dimensions, axis) in read_from.items()
    }
    club = cmg_names.club_key("audio")
    if club in content:
        sizes["club_hidden_width"] = entry_of(content, club, "p_mu.0.weight", 2).shape[0]
    return preset("official", "paper").replace(**ARCHITECTURE, **sizes, modalities=",".join(modalities))


def _unfilled_model(content: Mapping[str, Any], shapes: UniCode) -> UniCode:
    """The model, with random values only if the file lacks a network, because drawing 80 million takes seconds.

    Args:
        content: of the file.
        shapes: the model on the device meta.
    """
    if all(key in content for key in cmg_names.used_entries(shapes.modalities)):
        model = shapes.to_empty(device="cpu")
        model.codebook.step.zero_()
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shapes.config.train.seed)
        return UniCode(shapes.modalities, shapes.config)


def _expected_shapes(content: Mapping[str, Any], model: UniCode) -> dict[str, dict[str, Shape]]:
    """All entries in a file of the model's variant, by key, for the keys in this file."""
    state, used = model.state_dict(), cmg_names.used_entries(model.modalities)
    width = model.config.model.width
    expected: dict[str, dict[str, Shape]] = {
        key: {entry: tuple(state[name].shape) for entry, name in entries.items()} for key, entries in used.items()
    }
    expected[ENCODER][IDLE] = (model.config.model.codewords,)
    copies = cmg_names.templates(model.names)
    expected[ENCODER] |= {entry: expected[ENCODER][copy] for entry, copy in copies.items()}
    channels = model.modalities["video"].shape[-1] if "video" in model.modalities else 0
    for key, entries in cmg_names.unused_entries(model.names, width, channels).items():
        expected[key] |= entries
    for key in cmg_names.PARAMETER_KEYS:
        if key not in expected:
            expected[key] = cmg_names.idle_entries(key, width)
    return {key: entries for key, entries in expected.items() if key in content}


def _check_entries(content: Mapping[str, Any], model: UniCode, dtype: torch.dtype) -> None:
    used = cmg_names.used_entries(model.modalities)
    what = f"a CMG checkpoint of {', '.join(model.names)}"
    check_entries(content, _expected_shapes(content, model), used, dtype, IDLE, what)


def check_entries(
    content: Mapping[str, Any],
    shapes: Mapping[str, Mapping[str, Shape]],
    used: Mapping[str, Mapping[str, str]],
    dtype: torch.dtype,
    idle_entry: str,
    what: str,
) -> None:
    """Checks names, shapes, dtypes and values of a file's tensors.

    Args:
        content: of the file.
        shapes: of all entries, by key.
        used: entries that must be finite, by key.
        dtype: of all entries but the idle counts.
        idle_entry: name of these counts.
        what: the kind of checkpoint, for the message.

    Raises:
        CmgFileError: an entry is missing, surplus or wrong; the message names some of them.
    """
    problems: list[str] = []
    for key, expected in shapes.items():
        free: dict[str, int] = {}
        problems += [f"{entry!r} is missing in {key}" for entry in expected if entry not in content[key]]
        for entry, tensor in content[key].items():
            if entry not in expected:
                problems.append(f"{entry!r} is surplus in {key}")
            elif not _fits(tuple(tensor.shape), expected[entry], free):
                shape = tuple(free.get(size, size) if isinstance(size, str) else size for size in expected[entry])
                problems.append(f"{entry!r} in {key} must have shape {shape}, got {tuple(tensor.shape)!s:.60}")
            elif tensor.dtype != dtype and entry != idle_entry:
                problems.append(f"{entry!r} in {key} must be {dtype} like the codebook, got {tensor.dtype}")
            elif entry in used.get(key, {}) and not torch.stack(tensor.aminmax()).isfinite().all():
                problems.append(f"{entry!r} in {key} must hold finite numbers, got NaN or Inf")
    idle = content[ENCODER].get(idle_entry)
    if idle is not None and not (idle.isfinite().all() and torch.equal(idle, idle.round())):
        problems.append(f"{idle_entry!r} in {ENCODER} must hold whole numbers, got others")
    if problems:
        raise CmgFileError(f"source must be {what}: {few(problems, '; ')}")


def _fits(shape: tuple[int, ...], expected: Shape, free: dict[str, int]) -> bool:
    """True where the sizes agree; a named size is bound at its first use."""
    if len(shape) != len(expected):
        return False
    return all(
        size == (free.setdefault(name, size) if isinstance(name, str) else name)
        for size, name in zip(shape, expected, strict=True)
    )


@torch.no_grad()
def _fill(model: UniCode, content: Mapping[str, Any]) -> None:
    state = model.state_dict()
    for key, entries in cmg_names.used_entries(model.modalities).items():
        for entry, name in entries.items() if key in content else ():
            state[name].copy_(content[key][entry])


def _rest(content: Mapping[str, Any], modalities: Mapping[str, Modality]) -> Rest:
    used = cmg_names.used_entries(modalities)
    rest: Rest = {}
    for key, value in content.items():
        rest[key] = value
        if key in cmg_names.PARAMETER_KEYS:
            taken = used.get(key, {})
            rest[key] = {
                entry: str(tensor.dtype).removeprefix("torch.") if entry in taken else tensor
                for entry, tensor in value.items()
            }
    return rest


def _check_rest(rest: Any, names: Mapping[str, Mapping[str, str]]) -> None:
    """Raises CmgFileError unless it has the form of `_rest`'s result, because a checkpoint can hold anything."""
    if not isinstance(rest, Mapping) or not {*rest} <= {*cmg_names.PARAMETER_KEYS, *cmg_names.OTHER_KEYS}:
        raise CmgFileError("what the model keeps of its CMG file must be a dictionary with the file's keys")
    for key in cmg_names.PARAMETER_KEYS:
        entries = rest.get(key, {})
        if not isinstance(entries, Mapping):
            raise CmgFileError(f"what the model keeps of {key} must be a dictionary, got {type(entries).__name__}")
        for entry, kept in entries.items():
            named = isinstance(kept, str) and kept in _KEPT and entry in names.get(key, {})
            if not isinstance(kept, Tensor) and not named:
                raise CmgFileError(f"what the model keeps of {entry!s:.60} in {key} must be a tensor or a dtype's name")


def _what_is_missing(content: Mapping[str, Any], modalities: Mapping[str, Modality]) -> str:
    sentences = []
    if "text" in modalities and WORDS not in content:
        width = modalities["text"].shape[0]
        sentences.append(f"the file has no {WORDS}: text features must be that LSTM's output, (B, T, {width})")
    lacking = [key for key in (CPC, *map(cmg_names.club_key, modalities), DECODER) if key not in content]
    if lacking:
        sentences.append(f"the file has no {', '.join(lacking)}: these networks start from random values")
    return "; ".join(sentences)


def _check_architecture(model: UniCode) -> None:
    if type(model) is not UniCode:
        raise ValueError(f"model must be of Uni-Code's architecture to be written, got {type(model).__name__}")
    if tuple(model.modalities) not in cmg_names.VARIANTS:
        allowed = "; ".join(", ".join(variant) for variant in cmg_names.VARIANTS)
        raise ValueError(f"model must have the modalities {allowed}, in this order, got {', '.join(model.names)}")
    kinds = {"audio": ("vector",), "video": ("grid",), "text": ("words", "vector")}
    for name, modality in model.modalities.items():
        if modality.kind not in kinds[name] or (name == "video" and modality.shape[:2] != GRID):
            raise ValueError(
                f"modality {name!r} must be {' or '.join(kinds[name])} (7 x 7 where a grid), as in the release, "
                f"got {modality.kind} {modality.shape}"
            )
    fields = model.config.flat()
    for field, value in {**ARCHITECTURE, "word_target": "lstm"}.items():
        if fields[field] != value:
            raise ValueError(f"model must have {field} = {value!r}, as preset official has it, got {fields[field]!r}")
    for entries in cmg_names.used_entries(model.modalities).values():
        if absent := [name for name in entries.values() if name not in model.shapes]:
            method = model.config.method.method
            raise ValueError(f"model must have the layers of the release, got method {method!r} without {absent[0]}")


def _made_up_rest(model: UniCode, state: Mapping[str, Tensor], epoch: int) -> Rest:
    """Unused entries and counters of a file, for a model without one."""
    used = cmg_names.used_entries(model.modalities)
    dtype = str(model.dtype).removeprefix("torch.")
    rest: Rest = {key: dict.fromkeys(entries, dtype) for key, entries in used.items()}
    for entry, copy in cmg_names.templates(model.names).items():
        rest[ENCODER][entry] = state[used[ENCODER][copy]].detach().to("cpu", copy=True)
    width = model.config.model.width
    channels = model.modalities["video"].shape[-1] if "video" in model.modalities else 0
    free = {"attention": width, "classes": cmg_names.CLASSES}
    for key, entries in cmg_names.unused_entries(model.names, width, channels).items():
        for entry, shape in entries.items():
            sizes = [free[size] if isinstance(size, str) else size for size in shape]
            rest[key][entry] = torch.zeros(sizes, dtype=model.dtype)
    return {**rest, "epoch": epoch, "total_step": int(model.codebook.step)}

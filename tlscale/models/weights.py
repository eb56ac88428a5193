"""Read a file of weights into a backbone: find the network in it, whatever was wrapped around that, and say what fits.

Promise: a file that fits only in part is an error or is reported: what the file lacks, what it has in another shape,
what of it is not used, and which of its networks was taken. Nothing that a file holds is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from tlscale.errors import ModelError, first_sentence
from tlscale.models.adapted import interpolated, repeated_filters
from tlscale.models.foreign import check_tensors, check_unpacked_size, is_pickle
from tlscale.models.freeze import is_norm
from tlscale.recipe.schema import BackboneSection
from tlscale.storage.files import file_sha256

_KEY = "backbone.weights"
_SHOWN = 10  # names in a message
_MOST_DEPTH, _MOST_TENSORS = 4, 100_000  # of dicts in dicts; a network has a few thousand
_NO_NETWORK = ("optim", "lr_sched", "scheduler", "scaler", "grad_scaler", "loss_scaler")
# Of two networks in a file that fit equally: averages before what they are of, and else the one that its authors
# transfer from (DINO: the teacher; MoCo: the queries' encoder). The rest are names of any network.
_FIRST = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher"),
    *("encoder_q", "base_encoder", "online_encoder", "online_network", "online"),
    *("state_dict", "model", "module"),
)
# What stands behind a backbone: that the file has it, and the backbone not, is as it should be.
_HEADS = frozenset(
    ("fc", "head", "heads", "head_dist", "classifier", "last_linear", "projector", "projection_head", "predictor")
)


@dataclass(frozen=True)
class WeightsReport:
    """Where the weights came from, for `run.json` and the screen."""

    origin: str
    num_matched: int
    num_tensors: int
    sha256: str
    prefix: str = ""
    """What stood before the names in the file, and was taken off."""
    missing: tuple[str, ...] = ()
    """What the network has and the file lacks, or has otherwise: it is as it was at random."""
    notes: tuple[str, ...] = ()
    """What the user has to know of a file that fits only in part."""

    def __str__(self) -> str:
        if self.num_tensors == 0:
            return self.origin
        share = self.num_matched / self.num_tensors
        taken_off = f", without the prefix '{self.prefix}' of its names" if self.prefix else ""
        return f"{self.origin}: {self.num_matched} of {self.num_tensors} tensors matched ({share:.1%}){taken_off}"


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Compute SHA-256 over names, types, shapes and bytes: networks with the same digest have the same state."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_file(model: nn.Module, section: BackboneSection) -> WeightsReport:
    """Load the file that the recipe names into the network.

    Raises:
        ModelError: it cannot be read, is not the file that was meant, or holds another network.
    """
    path = Path(section.weights)
    state = read_state(path, section)
    own = model.state_dict()
    learned = learned_names(model)
    fit, notes = _choose(list(_fits(state, model, learned)), path, section.name)
    missing = tuple(name for name in own if name in learned and name not in fit.matched)
    # Of a file that has no other buffers than those at all, none is expected.
    expected = own.keys() if fit.matched.keys() - learned else learned
    report = WeightsReport(str(path), len(fit.matched), len(expected), "", fit.prefix, missing, tuple(notes))
    if report.num_matched < section.min_matched * report.num_tensors:
        raise ModelError(_mismatch(report, section, fit, state, own), key=_KEY)
    _refuse_non_finite({name: tensor for name, tensor in fit.matched.items() if name in learned}, path)
    model.load_state_dict(fit.matched, strict=False)
    made = {name: tensor for name, tensor in _below(state, fit.prefix).items() if name in fit.matched}
    notes += [
        *repeated_filters(model, section.in_chans, made),
        *interpolated(made, model),
        *_lacking(fit.state, missing, own),
        *_unused(fit, model),
    ]
    return replace(report, notes=tuple(notes), sha256=state_digest(model.state_dict()))


def learned_names(model: nn.Module) -> frozenset[str]:
    """Return names in the state dict of what a file of weights must have: parameters, and statistics of norm layers.

    Other buffers follow from the architecture, and files of older versions lack some. Batches are counted only where
    a norm layer averages over all of them.
    """
    names = {name for name, _ in model.named_parameters()}  # of two names for one tensor the first
    for path, module in model.named_modules():
        if is_norm(module):
            names.update(f"{path}.{name}" for name, _ in module.named_buffers(recurse=False))
    return frozenset(name for name in names & model.state_dict().keys() if not name.endswith(".num_batches_tracked"))


# -- read -------------------------------------------------------------------------------------------------------------


def read_state(path: Path, section: BackboneSection) -> dict[str, Tensor]:
    """Read the tensors of a file without running anything that the file holds; names of dicts stand before theirs.

    Raises:
        ModelError: it cannot be read, or is not the file that was meant.
    """
    try:
        _check_file(path, section)
        if not is_pickle(path):
            return safetensors.torch.load_file(path)
        state = _flattened(torch.load(path, map_location="cpu", weights_only=True), path)
        check_tensors(state, path)
        return state
    except ModelError as error:
        raise error.recast(ModelError, error.key or _KEY) from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"'{path}' holds more than tensors, so it is not read: {first_sentence(error)}", key=_KEY
        ) from error
    except Exception as error:  # bytes that are no pickle break the unpickler in many ways
        raise ModelError(
            f"'{path}' cannot be read: {type(error).__name__}: {first_sentence(error)}", key=_KEY
        ) from error


def _check_file(path: Path, section: BackboneSection) -> None:
    if not path.is_file():
        raise ModelError(
            f"there is no file '{path}'", remedy="Give 'pretrained', 'none' or the path of a .safetensors."
        )
    if section.sha256 is not None and (found := file_sha256(path)) != section.sha256:
        raise ModelError(
            f"'{path}' has the SHA-256 {found}, not {section.sha256}: it is another file", key="backbone.sha256"
        )
    if not is_pickle(path) and path.suffix != ".safetensors":
        raise ModelError(f"'{path}' is not a .safetensors file (nor .pth, .pt, .bin)")
    if is_pickle(path):
        check_unpacked_size(path)
    if is_pickle(path) and not section.allow_pickle:
        raise ModelError(
            f"'{path}' is a pickle, which can run code when it is read",
            remedy="Convert it to "
            "safetensors, or set backbone.allow_pickle=true to have torch's restricted unpickler read it.",
        )


def _flattened(loaded: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors of dicts within dicts, as training scripts save them, but none of an optimizer."""
    state: dict[str, Tensor] = {}
    waiting, seen = [("", loaded, 0)], set[int]()
    while waiting:
        prefix, values, depth = waiting.pop(0)
        if not isinstance(values, dict) or id(values) in seen or depth > _MOST_DEPTH:
            continue
        seen.add(id(values))
        for key, value in values.items():
            if isinstance(value, Tensor):
                state[f"{prefix}{key}"] = value
            elif not str(key).startswith(_NO_NETWORK):
                waiting.append((f"{prefix}{key}.", value, depth + 1))
        if len(state) > _MOST_TENSORS:
            raise ModelError(f"'{path}' holds over {_MOST_TENSORS:,} tensors, so it is no network")
    if not state:
        raise ModelError(f"'{path}' holds no state dict")
    return state


# -- find the network in it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """What of a file would be loaded, if `prefix` is taken off its names."""

    prefix: str
    state: Mapping[str, Tensor]
    matched: dict[str, Tensor]
    num_learned: int
    """How many of the matched are among those that a file must have."""


def _fits(state: Mapping[str, Tensor], model: nn.Module, learned: Collection[str]) -> Iterator[_Fit]:
    """Try the names as they are, without each prefix, and as the architecture's own filter makes them of its authors'.

    What fits whole needs no filter.
    """
    own = model.state_dict()

    def fit(prefix: str, candidate: dict[str, Tensor]) -> _Fit:
        adapted = _fit_channels(candidate, model)
        matched = {name: tensor for name, tensor in adapted.items() if _is_like(tensor, own.get(name))}
        return _Fit(prefix, adapted, matched, len(matched.keys() & learned))

    most = 0
    for prefix in _prefixes_of(state, own):
        yield (found := fit(prefix, _below(state, prefix)))
        most = max(most, found.num_learned)
    filter_fn = filter_of(model)
    if most < len(learned) and filter_fn is not None:
        for prefix in _large_parts(state):
            # A file of another architecture breaks its filter somehow; the share that matches tells the user.
            with contextlib.suppress(Exception):
                yield fit(prefix, dict(filter_fn(_below(state, prefix), model)))


def filter_of(model: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]] | None:
    """Return what timm has an architecture make of the names and shapes of other versions and authors, if anything."""
    found = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return found if callable(found) else None


def _is_like(tensor: object, own: Tensor | None) -> bool:
    """Return whether it can be loaded: integers are no weights, but of a network that was quantized."""
    if own is None or not isinstance(tensor, Tensor) or tensor.shape != own.shape:
        return False
    return tensor.is_floating_point() or not own.is_floating_point()


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _prefixes_in(name: str) -> list[str]:
    return [name[: at + 1] for at, letter in enumerate(name) if letter == "."]


def _prefixes_of(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return no prefix, and those before at least half as many names of the network as the best has."""
    counts = Counter(prefix for name in state for prefix in _prefixes_in(name) if name.removeprefix(prefix) in own)
    most = max(counts.values(), default=0)
    return ["", *(prefix for prefix, count in counts.items() if 2 * count > most)]


def _large_parts(state: Mapping[str, Tensor]) -> list[str]:
    """Return no prefix, and those of a part that may be all of a network: a file has two or three, and heads."""
    counts = Counter(prefix for name in state for prefix in _prefixes_in(name))
    return ["", *(prefix for prefix, count in counts.items() if 5 * count > len(state))]


def _fit_channels(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn first filters made for 3 channels into filters for the model's channels (summed for 1)."""
    first = model.pretrained_cfg.get("first_conv")  # type: ignore[union-attr, operator]
    for name in (first,) if isinstance(first, str) else first or ():
        key, own = f"{name}.weight", model.state_dict().get(f"{name}.weight")
        if key in state and own is not None and state[key].ndim == 4 and state[key].shape != own.shape:
            with contextlib.suppress(NotImplementedError, RuntimeError):  # of a shape that cannot be turned
                state[key] = adapt_input_conv(own.shape[1], state[key], base_chans=state[key].shape[1])
    return state


def _choose(fits: Sequence[_Fit], path: Path, name: str) -> tuple[_Fit, list[str]]:
    """Return what fits best, and what to say where several networks of the file do.

    Raises:
        ModelError: they differ, and nothing tells which is meant.
    """
    most = max(fit.num_learned for fit in fits)
    best: dict[str, _Fit] = {}
    for fit in fits:
        if fit.num_learned == most:
            best.setdefault(fit.prefix, fit)
    ranked = sorted(best.values(), key=lambda fit: _rank(fit.prefix))
    first, *others = ranked
    rivals = [fit for fit in others if most and not _same(first.matched, fit.matched)]
    if not rivals:
        return first, []
    places = ", ".join(repr(fit.prefix) for fit in (first, *rivals[:_SHOWN]))
    if _rank(first.prefix) == _rank(rivals[0].prefix):
        raise ModelError(
            f"'{path}' holds {len(rivals) + 1} networks that fit '{name}' equally well, their names after {places}",
            remedy="Save the tensors of one of them as a file of its own, and name that",
            key=_KEY,
        )
    return first, [f"'{path}' holds {len(rivals) + 1} networks that fit ({places}): '{first.prefix}' is taken"]


def _rank(prefix: str) -> int:
    if not prefix:
        return -1
    return min((_FIRST.index(part) for part in prefix.split(".") if part in _FIRST), default=len(_FIRST))


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- report what does not fit ----------------------------------------------------------------------------------------


def named(names: Sequence[str], shown: int = _SHOWN) -> str:
    """List some names, and say how many there are."""
    return f"{', '.join(names[:shown])}{' ...' if len(names) > shown else ''} ({len(names)})"


def _mismatch(
    report: WeightsReport,
    section: BackboneSection,
    fit: _Fit,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> str:
    lines = [
        f"{report} for '{section.name}'; at least {section.min_matched:.0%} must "
        "(backbone.min_matched). Is it a file of another architecture?"
    ]
    absent, otherwise = _absent_and_otherwise(fit.state, [name for name in own if name not in fit.matched], own)
    if absent:
        lines.append(f"  missing: {named(absent, 3)}")
    if otherwise:
        lines.append(f"  of another shape: {named(otherwise)}")
    lines.append(f"  the file has: {', '.join(list(state)[:3])} ... ({len(state)} tensors)")
    return "\n".join(lines)


def _absent_and_otherwise(
    state: Mapping[str, Tensor], missing: Sequence[str], own: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    otherwise = [
        f"{name} {_form(state[name], own[name])} instead of {_form(own[name], state[name])}"
        for name in missing
        if name in state
    ]
    return [name for name in missing if name not in state], otherwise


def _form(tensor: Tensor, other: Tensor) -> str:
    shape = f"{tuple(tensor.shape)}"
    return shape if tensor.shape != other.shape else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _lacking(state: Mapping[str, Tensor], missing: Sequence[str], own: Mapping[str, Tensor]) -> list[str]:
    absent, otherwise = _absent_and_otherwise(state, missing, own)
    notes = [f"the file lacks, and these begin at random: {named(absent)}"] if absent else []
    return notes + ([f"of another shape in the file, and begin at random: {named(otherwise)}"] if otherwise else [])


def _unused(fit: _Fit, model: nn.Module) -> list[str]:
    """Tell what the file has of the network that the architecture has no place for; a head is not meant to have one."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    classifiers = cfg.get("classifier") or ()
    heads = {str(name) for name in ((classifiers,) if isinstance(classifiers, str) else classifiers)} | _HEADS
    own = model.state_dict()
    unused = [
        name
        for name in fit.state
        if name not in own and name.split(".")[0] not in heads and not name.startswith(tuple(f"{h}." for h in heads))
    ]
    if not unused:
        return []
    return [f"the file has what this network has no place for, and it is not used: {named(unused)}"]


def _refuse_non_finite(state: Mapping[str, Tensor], path: Path) -> None:
    numbers = ((name, tensor if tensor.itemsize >= 4 else tensor.float()) for name, tensor in state.items())
    wrong = [name for name, tensor in numbers if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise ModelError(f"'{path}' has NaN or infinite numbers in {named(wrong)}", remedy="Fetch it anew", key=_KEY)

"""Write a model as an ONNX file: `images` (N, C, H, W), normalised float32, to `logits` (N, classes), N free.

Promise: what is left on the disk was run by ONNX Runtime and compared with the model of the run. torch has two
exporters, and each is wrong or fails for networks that the other exports well: one is tried after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlscale.errors import first_sentence
from tlscale.models.exports.check import Evidence, WrongExportError, require
from tlscale.models.exports.network import exportable
from tlscale.storage.files import is_full

FILE = "model.onnx"
OPSET = 18
"""That in which torch's new exporter writes natively; ONNX Runtime reads it from version 1.14 on."""
_MOST_BYTES = 1_900_000_000  # of one file; the format ends at 2 GiB, and then tensors have a file of their own
_BIG_FILE = f"{FILE}.data"
_STDOUT = 1
Exporter = Callable[[nn.Module, Tensor, Path], None]


def write_onnx(folder: Path, evidence: Evidence, about: Mapping[str, str]) -> dict[str, Any]:
    """Write `model.onnx`.

    Returns:
        What the check found, the exporter and the opset.

    Raises:
        TlscaleError: packages are missing, or no exporter gives a file that gives the logits of the run.
    """
    require("onnx", "onnxruntime", "onnxscript")
    network = exportable(evidence.trained.model, evidence.example)
    failures = []
    for name, exporter in EXPORTERS.items():
        try:
            _draft(exporter, network, evidence.example, folder, about)
            return {"exporter": name, "opset": OPSET, **evidence.compare(_session(folder / FILE))}
        except WrongExportError as error:
            failures.append(f"{name}: {error}")
        except OSError as error:
            if is_full(error):
                raise
            failures.append(f"{name}: {first_sentence(error)}")
        except Exception as error:  # each network fails in its own way, in the exporter or in ONNX Runtime
            failures.append(f"{name}: {type(error).__name__}: {first_sentence(error)}")
        for left in folder.glob(f"{FILE}*"):
            left.unlink()
    listed = "".join(f"\n  {failure}" for failure in failures)
    raise WrongExportError(
        f"no exporter makes an ONNX file that gives what the run's model gives:{listed}",
        key="to",
        remedy="Nothing was written. Try 'torch-export' or 'timm'",
    )


def _with_torchscript(network: nn.Module, example: Tensor, path: Path) -> None:
    free = {0: "N"}
    _export(network, example, path, dynamo=False, dynamic_axes={"images": free, "logits": free})


def _with_dynamo(network: nn.Module, example: Tensor, path: Path) -> None:
    _export(network, example, path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("N", min=1)},), verbose=False)


def _export(network: nn.Module, example: Tensor, path: Path, **options: Any) -> None:  # noqa: ANN401 (torch's own)
    with torch.no_grad():
        torch.onnx.export(
            network,
            (example,),
            path,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            **options,
        )


EXPORTERS: dict[str, Exporter] = {
    # First the one that takes a fraction of a second, where the other takes many.
    "torchscript": _with_torchscript,
    "dynamo": _with_dynamo,
}


def _draft(exporter: Exporter, network: nn.Module, example: Tensor, folder: Path, about: Mapping[str, str]) -> None:
    """Export; put the metadata in, and all tensors into one file, if it can hold them.

    Exporters write large networks to many files, and have a folder of their own for these.
    """
    import onnx

    with tempfile.TemporaryDirectory(dir=folder) as drafts:
        path = Path(drafts) / FILE
        with quiet():
            exporter(network, example, path)
        model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(about))
    big = sum(tensor.ByteSize() for tensor in model.graph.initializer) > _MOST_BYTES
    onnx.save_model(model, folder / FILE, save_as_external_data=big, location=_BIG_FILE if big else None)


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what fails is told by us
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let exporters not talk: of what they warn, the check finds what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _no_standard_output():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _no_standard_output() -> Iterator[None]:
    """Send to nowhere what C++ writes to standard output: where torch fails it shows its whole graph there."""
    try:
        kept = os.dup(_STDOUT)
    except OSError:  # there is none
        yield
        return
    _flush_c()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDOUT)
    try:
        yield
    finally:
        _flush_c()
        os.dup2(kept, _STDOUT)
        os.close(kept)
        os.close(nowhere)


def _flush_c() -> None:
    """Write what C holds back of a pipe or a file, which else comes out later."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # a system whose library is not found so
        ctypes.CDLL(None).fflush(None)

"""Write a model as a program of `torch.export`: a `.pt2` file that torch runs without the code of timm or tlscale.

Promise: what is left on the disk was loaded again and compared with the model of the run.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tlscale.errors import first_sentence
from tlscale.models.exports.check import Evidence, WrongExportError
from tlscale.models.exports.network import exportable
from tlscale.models.exports.onnx_file import quiet
from tlscale.storage.files import is_full, naming_file

FILE = "model.pt2"


def write_program(folder: Path, evidence: Evidence, about: Mapping[str, str]) -> dict[str, Any]:
    """Write `model.pt2`, which takes any number of images; its extra files are named as the metadata of ONNX files.

    Returns:
        What the check found.

    Raises:
        WrongExportError: the network cannot be exported, or the file gives other logits.
    """
    path = folder / FILE
    try:
        network = exportable(evidence.trained.model, evidence.example)
        with torch.no_grad(), quiet():
            free = ({0: torch.export.Dim("N", min=1)},)
            program = torch.export.export(network, (evidence.example,), dynamic_shapes=free, strict=False)
            # Through memory: torch's own writer ends the process where the disk is full.
            content = io.BytesIO()
            torch.export.save(program, content, extra_files=dict(about))
            with naming_file(path), path.open("wb") as file:
                file.write(content.getbuffer())
            del content
            loaded = torch.export.load(path).module()
        return evidence.compare(loaded)
    except Exception as error:  # each network fails in its own way
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and is_full(error):
            raise
        why = str(error) if isinstance(error, WrongExportError) else f"{type(error).__name__}: {first_sentence(error)}"
        raise WrongExportError(
            f"torch.export makes no program that gives what the run's model gives: {why}",
            key="to",
            remedy="Nothing was written. Try 'onnx' or 'timm'",
        ) from error

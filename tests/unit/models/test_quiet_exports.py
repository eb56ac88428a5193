"""An exporter that fails writes nothing to standard output, where torch shows its whole graph."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from tlscale.models.exports.onnx_file import EXPORTERS, _draft

PROGRAM = """if True:
    import ctypes, os
    from tlscale.models.exports.onnx_file import quiet
    c = ctypes.CDLL(None)
    c.printf(b"before\\n")
    with quiet():
        c.printf(b"held back by C\\n")
        os.write(1, b"written at once\\n")
        print("of Python")
    c.printf(b"after\\n")
"""


def test_a_network_that_torchscript_cannot_export_is_not_shown(tmp_path, capfd):
    """As AlexNet for small images: 2 x 2 positions pooled to 6 x 6."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(3 * 36, 2)).eval()
    with pytest.raises(torch.onnx.errors.SymbolicValueError, match="output size"):
        _draft(EXPORTERS["torchscript"], network, torch.zeros(2, 3, 2, 2), tmp_path, {})
    assert capfd.readouterr().out == ""
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"


def test_what_c_holds_back_of_a_pipe_is_not_heard_later():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "before\nafter\n"


def test_without_a_standard_output_exports_go_on():
    program = "import os; os.close(1); from tlscale.models.exports.onnx_file import quiet\nwith quiet(): pass\n"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

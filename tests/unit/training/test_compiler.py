"""Compiling without a compiler is refused before anything is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tlscale.commands.run import run
from tlscale.errors import EXIT_BAD_INPUT, RecipeError
from tlscale.recipe.schema import ComputeSection, Recipe
from tlscale.training.compiler import check_compiler

VARIABLE = "CC" if torch.cuda.is_available() else "CXX"
USUAL = "gcc" if torch.cuda.is_available() else "clang++" if sys.platform == "darwin" else "g++"


def put_program(folder: Path, name: str, code: int) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\nexit {code}\n")
    program.chmod(0o755)
    return program


def test_no_compiler_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    recipe = Recipe.model_validate(
        {
            "name": "a",
            "data": {"source": "folder", "path": str(tmp_path / "nowhere")},
            "backbone": {"name": "test_vit", "weights": "none"},
            "compute": {"compile": True},
        }
    )
    with pytest.raises(RecipeError, match=r"^compute.compile: needs a C\+\+ compiler") as caught:
        run(recipe, tmp_path / "run")
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "code", "is_right"), [(USUAL, 0, True), (USUAL, 1, False), ("mycc", 0, False)])
def test_a_compiler_has_to_run(name, code, is_right, tmp_path, monkeypatch):
    program = put_program(tmp_path / "bin", name, code)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/usr/bin-not-there")
    monkeypatch.delenv(VARIABLE, raising=False)
    section = ComputeSection(compile=True)
    if is_right:
        check_compiler(section)
    else:
        with pytest.raises(RecipeError, match="none runs here"):
            check_compiler(section)
    monkeypatch.setenv(VARIABLE, f"{program} -O2")
    if code == 0:
        check_compiler(section)
    check_compiler(ComputeSection())

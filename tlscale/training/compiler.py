"""Find out whether `torch.compile` has the compiler that it needs, before anything is made."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import torch

from tlscale.errors import RecipeError
from tlscale.recipe.schema import ComputeSection

_REMEDY = "Install one (Debian's g++, conda's gxx), name it in the environment variable CXX, or take the key out."


def check_compiler(section: ComputeSection) -> None:
    """Check that there is a C++ compiler where the recipe compiles: torch's own code for CPUs is C++, and Triton's
    launchers for GPUs are C.

    Raises:
        RecipeError: there is none that runs.
    """
    if not section.compile:
        return
    if os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        return  # torch brings its own
    # The names that torch and Triton look for.
    variable, usual = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    if torch.cuda.is_available():
        variable, usual = "CC", ["gcc", "clang"]
    named = os.environ.get(variable)
    if not any(_runs(name) for name in (shlex.split(named)[:1] if named else usual)):
        tried = f"{variable}={named}" if named else ", ".join(usual)
        raise RecipeError(f"needs a C++ compiler, and none runs here ({tried})", key="compute.compile", remedy=_REMEDY)


def _runs(name: str) -> bool:
    found = shutil.which(name)
    if found is None:
        return False
    try:
        return subprocess.run([found, "--version"], capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False

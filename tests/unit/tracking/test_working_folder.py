"""Files in the folder one stands in that libraries would read or run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import environment
from tlscale.tracking import trackers as trackers_module
from tlscale.tracking.trackers import open_trackers
from tlscale.tracking.working_folder import outside_working_folder

SOURCE = """
#include <stdlib.h>
__attribute__((constructor)) static void planted(void) { FILE_; }
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("what", ["import tlscale.commands.plan", "import tlscale; tlscale.load"])
def test_a_library_in_the_working_folder_is_not_loaded_with_torch(tmp_path, what):
    """With torch for CUDA, that is: cuSPARSELt looks for libcuda.so.1 in the working folder. Others never did."""
    program = SOURCE.replace("FILE_", f'system("touch {tmp_path}/ran")')
    (tmp_path / "planted.c").write_text(program)
    library = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "planted.c"]
    subprocess.run(library, cwd=tmp_path, check=True)
    command = [sys.executable, "-c", what]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    assert not (tmp_path / "ran").exists()


def test_places_of_the_user_stay_where_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", "mine/netrc")
    with outside_working_folder():
        assert Path.cwd() != tmp_path
        assert os.environ["NETRC"] == str(tmp_path / "mine" / "netrc")
    assert Path.cwd() == tmp_path
    assert os.environ["NETRC"] == "mine/netrc"


@pytest.mark.parametrize(
    ("content", "started"),
    [
        ("[comet]\nproject_name = mine\n", True),
        ("[comet]\nurl_override = http://127.0.0.1:9/\n", False),
        ("[comet]\nCOMET_URL_OVERRIDE=http://127.0.0.1:9/\n", False),
        ('"https_proxy": "127.0.0.1:9"', False),
        ("\udcff", False),
        (None, True),
    ],
)
def test_a_tracker_that_a_file_here_would_send_elsewhere_is_not_started(content, started, tmp_path, monkeypatch):
    """comet_ml is not installed here, so whether it is started is seen by the error of starting it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers_module, "check_installed", lambda _: None)
    if content is not None:
        (tmp_path / ".comet.config").write_text(content, errors="surrogateescape")
    keys = {"wandb": None, "run_name": "r", "run_dir": tmp_path, "config": {}, "wandb_run_id": None, "is_main": True}
    notes = open_trackers(["comet_ml"], **keys).notes
    assert any("could not be started" in note for note in notes) == started
    assert [".comet.config' in the working folder" in note for note in notes][:1] == [content is not None]

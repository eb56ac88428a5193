"""`tlscale predict` on several processes: the file of one."""

import pytest
from click.testing import CliRunner

import tlscale
from tests.dist.launches import exit_code_of, launch
from tests.small_runs import put_small_folder, small_recipe
from tlscale.cli import main

pytestmark = pytest.mark.dist


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(tmp_path):
    data = put_small_folder(tmp_path / "data", train=60, test=37)
    recipe = small_recipe(tmp_path / "r.yaml", data, data={"source": "folder"}, duration="1 epochs")
    tlscale.run(recipe, tmp_path / "run")
    # Two rounds of two chunks, of 256 images each; in the second one there is nothing left for the last process.
    images = [str(path) for path in sorted((data / "test").rglob("*.png"))] * 15
    for place in (3, 300, 550):
        images[place] = str(tmp_path / f"gone{place}.png")
    (tmp_path / "list").write_text("\n".join(images))
    words = ["predict", str(tmp_path / "run"), "--images-from", str(tmp_path / "list"), "--all-probabilities", "--out"]
    assert CliRunner().invoke(main, [*words, str(tmp_path / "one.csv")]).exit_code == 0
    log = tmp_path / "log"
    with launch(2, "-m", "tlscale", *words, tmp_path / "two.csv", log=log, launcher="torchrun") as launched:
        assert exit_code_of(launched, log) == 0, log.read_text()[-3000:]
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert len((tmp_path / "two.csv").read_text().splitlines()) == 1 + len(images)
    assert "555 images, 3 without an answer" in log.read_text()
    assert not (tmp_path / "two.csv.unfinished").exists()

"""A model behind a server: many threads, one model; and the server of docs/serve.md, word for word."""

import io
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tlscale
from tests.garments import PROBE as PROBE_OF_SEVERAL
from tests.garments import SEVERAL, put_garments
from tests.small_runs import REPO, put_small_folder, run_once, small_recipe

PROBE = {
    "probe": {"kind": "ridge"},
    "backbone": {"name": "test_resnet", "weights": "none"},
    "codes": {"layer": ["layer2", "layer3"], "pool": "avg"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_small_folder(tmp_path_factory.mktemp("data"), train=60, test=37)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return run_once(tmp_path_factory.mktemp("runs"), data, "probe", PROBE)


@pytest.mark.slow
def test_threads_get_the_answers_that_one_gets(run, data):
    """A server calls a model from several threads; features of a layer are read by hooks, which all would share."""
    images = [str(path) for path in sorted((data / "test").rglob("*.png"))]
    model = tlscale.load(run)
    alone = [model.predict([path]).probabilities for path in images]
    features = [np.asarray(model.features([path], layer="layer2")) for path in images]
    with ThreadPoolExecutor(8) as threads:
        made = threads.map(lambda path: model.predict([path]).probabilities, images)
        found = threads.map(lambda path: np.asarray(model.features([path], layer="layer2")), images)
        np.testing.assert_array_equal(list(made), alone)
        np.testing.assert_array_equal(list(found), features)


@pytest.mark.slow
def test_the_server_of_the_page_answers_as_predict_does(run, data, tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos").symlink_to(run)
    page = (REPO / "docs" / "serve.md").read_text()
    names: dict = {}
    exec(compile(re.search(r"```python\n(from fastapi.*?)```", page, flags=re.DOTALL)[1], "serve.py", "exec"), names)
    client = TestClient(names["app"])
    paths = sorted((data / "test").rglob("*.png"))[:4]
    picture = Image.open(paths[0])
    for name, mode in (("clear.png", "RGBA"), ("print.jpg", "CMYK")):
        converted = picture.convert(mode)
        if mode == "RGBA":
            converted.putalpha(Image.linear_gradient("L").resize(picture.size))
        converted.save(name)
    Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save("wide.png")
    paths += [tmp_path / name for name in ("clear.png", "print.jpg", "wide.png")]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda path: client.post("/predict", files={"file": path.read_bytes()}), paths))
    made = [tlscale.load(run).predict([path]) for path in paths]
    assert [answer.status_code for answer in answers] == [200] * len(paths)
    assert [answer.json()["label"] for answer in answers] == [one.labels[0] for one in made]
    assert [answer.json()["probability"] for answer in answers] == [float(one.probabilities.max()) for one in made]
    large = (png_of(20_000, 10_000), png_of(12_000, 10_000))  # Pillow opens the second
    for sent in (paths[0].read_bytes()[:200], b"<html>404</html>", b"", *large):
        refused = client.post("/predict", files={"file": ("a.png", sent)})
        assert (refused.status_code, bool(refused.json()["detail"])) == (422, True)
    for body in ({"content": bytes(50_000_001)}, {"content": iter([paths[0].read_bytes()])}):
        refused = client.post("/predict", headers={"content-type": "multipart/form-data; boundary=x"}, **body)
        assert (refused.status_code, refused.json()["detail"][:24]) == (413, "at most 50,000,000 bytes")
    assert client.post("/predict", files={"file": paths[0].read_bytes()}).json() == answers[0].json(), "it goes on"


@pytest.mark.slow
def test_several_labels_are_served_as_predict_gives_them(tmp_path, monkeypatch):
    """`classify.py` and the server of the page; what the former does not do it refuses."""
    pytest.importorskip("fastapi")
    import onnx
    from fastapi.testclient import TestClient

    monkeypatch.chdir(tmp_path)
    table = put_garments(tmp_path / "data", 60)
    keys = {"data": SEVERAL, **PROBE_OF_SEVERAL}
    keys["probe"] = {**PROBE_OF_SEVERAL["probe"], "refit": False}
    tlscale.run(small_recipe(tmp_path / "r.yaml", table, **keys), "runs/photos")
    model = tlscale.load("runs/photos")
    paths = sorted(map(str, (tmp_path / "data").glob("*.png")))[:20]
    made = model.predict(paths)
    assert {len(labels) for labels in made.labels} >= {0, 1}
    page = (REPO / "docs" / "serve.md").read_text()
    (tmp_path / "classify.py").write_text(re.search(r"```python\n(import json.*?)```", page, flags=re.DOTALL)[1])
    tlscale.export("runs/photos", to="onnx", out="onnx")
    command = [sys.executable, "classify.py", "onnx/model.onnx", *paths]
    rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    shares = [dict(zip(model.classes, of_one, strict=True)) for of_one in made.probabilities.tolist()]
    for row, path, labels, of_one in zip(rows, paths, made.labels, shares, strict=True):
        assert row.split("\t")[:2] == [path, "|".join(labels)]
        found = [float(share) for share in row.split("\t")[2].split("|") if share]
        assert found == pytest.approx([of_one[label] for label in labels], abs=1e-4)
    names: dict = {}
    exec(compile(re.search(r"```python\n(from fastapi.*?)```", page, flags=re.DOTALL)[1], "serve.py", "exec"), names)
    for path, labels, of_one in zip(paths[:3], made.labels, shares, strict=False):
        answer = TestClient(names["app"]).post("/predict", files={"file": Path(path).read_bytes()}).json()
        assert answer["label"] == list(labels)
        assert answer["probability"] == pytest.approx([of_one[label] for label in labels], abs=1e-6)
    for key, value in (("views", ["flip"]), ("new", 1)):
        changed = onnx.load("onnx/model.onnx")
        changed.metadata_props.add(key=key, value=json.dumps(value))
        onnx.save(changed, "changed.onnx")
        done = subprocess.run([*command[:2], "changed.onnx", *paths], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, ""), key
        assert "serve the run by tlscale" in done.stderr


def png_of(width, height):
    """A black image of so many pixels."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "png")
    return file.getvalue()

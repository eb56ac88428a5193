"""Recipe files that are no files: an error at once, and no wait for what never comes."""

import os
import socket
import threading
from pathlib import Path

import pytest

from tlscale.errors import RecipeError
from tlscale.recipe.load import load_recipe

TEXT = "name: a\ndata: {source: fashion_mnist}\nbackbone: {name: resnet10t}\nprobe: {kind: ridge}\n"


def put(kind: str, place: Path) -> None:
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        os.chdir(place.parent)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(place.name)
    else:
        place.symlink_to("/dev/zero")


def load_soon(file: Path) -> BaseException | None:
    """Load a recipe in a thread that is not waited for without end."""
    raised: list[BaseException] = []

    def load() -> None:
        try:
            load_recipe(file)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits"
    return raised[0] if raised else None


KINDS = {"pipe": "a named pipe", "socket": "a socket", "device": "a device"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_extended", [False, True])
def test_what_is_no_file_is_not_opened(kind: str, is_extended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "strange.yaml"
    put(kind, place)
    file = place
    if is_extended:
        file = tmp_path / "recipe.yaml"
        file.write_text(TEXT + "extends: strange.yaml\n")
    error = load_soon(file)
    assert isinstance(error, RecipeError)
    if is_extended and kind == "device":
        assert "lies outside" in str(error)
    else:
        assert f"strange.yaml' is {KINDS[kind]}, no regular file. Name a recipe file." in str(error)


def test_the_pipe_of_a_shell_is_read():
    """`tlscale plan <(sed ... recipe.yaml)` names a pipe that has no name."""
    source, sink = os.pipe()
    os.write(sink, TEXT.encode())
    os.close(sink)
    assert load_recipe(f"/dev/fd/{source}").name == "a"
    os.close(source)

"""What a stopped probe has fitted is found again as it was, and not where one of its bytes is another."""

import pytest
import torch

from tlscale.codes.probes.kept import KeptFits
from tlscale.codes.probes.select import choose

NAMES = ("first", "second", "third")


def fit(folder, refit=True):
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(60) % 3
    sets = [torch.randn(60, 4, generator=generator) + spread * labels_N[:, None] for spread in (1, 4, 0)]
    candidates = [(name, (codes_ND[:40], codes_ND[40:])) for name, codes_ND in zip(NAMES, sets, strict=True)]
    kept = KeptFits(folder)
    return choose("ridge", candidates, labels_N[:40], labels_N[40:], num_classes=3, refit=refit, kept=kept)


def assert_same(choice, other):
    assert (choice.name, choice.table) == (other.name, other.table)
    assert choice.probe.refitted == other.probe.refitted
    for head, another in (
        (choice.probe.head, other.probe.head),
        (choice.probe.before_refit, other.probe.before_refit),
    ):
        assert head.weight.equal(another.weight)
        assert head.bias.equal(another.bias)


@pytest.mark.parametrize("refit", [True, False])
def test_it_is_found_as_it_was(refit, tmp_path):
    plain, first = fit(tmp_path / "none", refit), fit(tmp_path / "fits", refit)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "fits").iterdir()}
    assert len(written) == len(NAMES)
    assert_same(first, plain)
    assert_same(fit(tmp_path / "fits", refit), plain)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "fits").iterdir()} == written


def test_a_damaged_file_is_fitted_again(tmp_path):
    plain = fit(tmp_path)
    for file in tmp_path.iterdir():
        whole = file.read_bytes()
        for at in range(0, len(whole), 3):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            found = KeptFits(tmp_path).find(file.stem)
            assert found is None or found[0] in plain.table.values(), f"byte {at}"
            if found is not None and found[1] is not None:
                assert found[1].head.weight.equal(plain.probe.head.weight) or found[1].chosen != plain.probe.chosen
        file.write_bytes(whole[:-1])
        assert KeptFits(tmp_path).find(file.stem) is None
    assert_same(fit(tmp_path), plain)

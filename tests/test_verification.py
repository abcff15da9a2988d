"""scripts/verify.py: every changed byte of every file that has a checksum is found, and named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from samer.config import InputError, MergeConfig
from samer.data.pictures import Found
from samer.features.write import write_features
from samer.index.sync import update_images
from samer.index.verify import verify
from samer.index.write import build_index
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import save_projector
from samer.runtime.shards import write_shard


@pytest.fixture(scope="module")
def outputs(base, world, tmp_path_factory):
    """A folder with one of everything that has checksums, and a few files that have none."""
    folder, retriever = tmp_path_factory.mktemp("outputs"), Retriever.load(str(base))
    write_features(folder / "features", world, ["val"], retriever, dtype="float32")
    merge = MergeConfig(num_regions=4)
    build_index(folder / "caches/cache", world, ["val", "test"], retriever, merge, dtype="binary")
    pictures = world / "images" / "Images"
    found = Found(pictures, sorted(p.name for p in pictures.iterdir())[:5], [])
    update_images(folder / "caches/index", found, retriever, merge, assignments=False)
    layer = retriever.base_projector
    save_projector(folder / "run", Projector(layer.weight + 0.01, layer.bias), retriever, merge)
    write_shard(folder / "measured.safetensors", {"a/b": torch.rand(5)}, {"version": 1}, {"rows": 1})
    (folder / "results.json").write_text("{}")
    (folder / "other").mkdir()
    (folder / "other/manifest.json").write_text(json.dumps({"name": "some web page"}))
    save_file({"x": torch.ones(2, dtype=torch.float64)}, folder / "other/model.safetensors")
    return folder


def guarded(folder):
    """Every file with a checksum, by name."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("manifest.json")]
    return sorted(file for file in files if file.parent.name != "other")


def test_all_of_it_is_read(outputs):
    found = verify(outputs)
    assert found.damages == []
    files = guarded(outputs)
    # manifest and base, images, texts; manifest and projector, per split images, exact, queries; index; run; measured
    assert len(files) == 2 + 2 + 2 + 6 + 3 + 1 + 1
    assert found.files == len(files)
    assert found.bytes == sum(file.stat().st_size for file in files if file.name != "manifest.json")


def test_what_is_remembered_of_times_is_no_damage(outputs, tmp_path):
    """Nothing vouches for it and nothing needs it: it may be spoilt, or gone."""
    folder = shutil.copytree(outputs, tmp_path / "copy")
    places = [folder / "features/val", folder / "caches/cache/val", folder / "caches/cache/test"]
    for content in (b"", b"\xff[", b'{"format": "samer_cache", "files": {}}'):
        for place in places:
            (place / "stamps.json").write_bytes(content)
        assert verify(folder) == verify(outputs)


@pytest.mark.parametrize("place", [-1, 0.5, 12])
def test_every_changed_file_is_found_and_named(outputs, tmp_path, place):
    folder = shutil.copytree(outputs, tmp_path / "copy")
    for file in guarded(folder):
        data = bytearray(file.read_bytes())
        at = int(len(data) * place) if isinstance(place, float) else place
        for change in (data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], data[:at], b""):
            if change.strip() == data.strip():
                continue  # a manifest without the line's end says the same
            file.write_bytes(change)
            damages = verify(folder).damages
            assert damages, file
            assert any(str(file) in line for line in damages), (file, damages)
            if file.name != "manifest.json":  # its files are looked at by their own headers then
                assert len(damages) == 1, damages
        file.write_bytes(bytes(data))
    assert verify(folder).damages == []


def test_a_missing_file_is_named_and_all_damages_are_told(outputs, tmp_path):
    folder = shutil.copytree(outputs, tmp_path / "copy")
    gone = [folder / "caches/cache/test/images-00000.exact.safetensors", folder / "features/base.safetensors"]
    for file in gone:
        file.unlink()
    assert sorted(line.split(": ")[0] for line in verify(folder).damages) == sorted(map(str, gone))


def test_an_unfinished_store_is_vouched_for_by_its_headers(outputs, tmp_path):
    folder = shutil.copytree(outputs / "caches/cache", tmp_path / "copy")
    (folder / "manifest.json").unlink()
    found = verify(folder)
    assert found.damages == []
    assert found.files == 6  # the projector has no voucher without the manifest
    shard = folder / "val/images-00000.safetensors"
    assert verify(shard).files == 1
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert [line.split(": ")[0] for line in verify(folder).damages] == [str(shard)]


def test_what_has_no_checksum_is_refused(outputs, tmp_path):
    for path, words in (
        (tmp_path / "none", "no such file or folder"),
        (outputs / "other", "nothing here has a checksum"),
        (outputs / "results.json", "nothing here has a checksum"),
        ("a" * 300, r"can't be read \(File name too long\); give it a shorter name"),
    ):
        with pytest.raises(InputError, match=words):
            verify(path)


def test_the_script_tells_and_exits_by_what_it_finds(outputs, tmp_path, script, capsys):
    folder = shutil.copytree(outputs, tmp_path / "copy")
    script("verify").main([str(folder / "run"), str(folder)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{folder / 'run'}: 1 files, ")
    assert second.endswith("MB read, every checksum holds")
    (folder / "measured.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        script("verify").main([str(folder)])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("1 damaged, missing or unreadable:")
    assert lines[1].startswith(f"  {folder / 'measured.safetensors'}: ")

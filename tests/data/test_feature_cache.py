"""The cache: what it keys by, what it does with damage, several writers, and folders that cannot be written."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from speechllm import AudioError
from speechllm.data.feature_cache import FeatureCache, audio_key, fingerprint, text_key


MAPS = Path("/proc/self/maps")


def test_put_get_and_folders(tmp_path):
    cache = FeatureCache(tmp_path, {"layer": 1})
    assert cache.get("ab") is None and "ab" not in cache
    tensors = {"x": torch.arange(6.0).view(2, 3).T, "y": torch.ones(2, dtype=torch.bfloat16)}
    cache.put("ab", tensors)
    found = FeatureCache(tmp_path, {"layer": 1}).get("ab")
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert FeatureCache(tmp_path, {"layer": 2}).get("ab") is None
    assert not list(tmp_path.rglob(".*"))  # no temporary files are left


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux")
def test_tensors_are_memory_mapped(tmp_path):
    """They take no memory of their own: it is the file, and given back with the last tensor."""
    cache = FeatureCache(tmp_path, {})
    cache.put("ab", {"x": torch.zeros(100_000)})
    assert str(cache._path("ab")) not in MAPS.read_text()
    found = cache.get("ab")["x"]
    assert str(cache._path("ab")) in MAPS.read_text()
    del found
    assert str(cache._path("ab")) not in MAPS.read_text()


@pytest.mark.parametrize("looked_for", [True, False], ids=["looked for", "read"])
@pytest.mark.parametrize("damage", [b"", b"abc", b"x" * 200, None])
def test_damaged_files_are_removed_and_counted(tmp_path, damage, looked_for):
    cache = FeatureCache(tmp_path, {})
    cache.put("ab", {"x": torch.zeros(100)})
    path = cache._path("ab")
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    assert ("ab" in cache) is False if looked_for else cache.get("ab") is None
    assert cache.corrupt == 1 and not path.exists()
    cache.put("ab", {"x": torch.ones(1)})
    assert "ab" in cache
    assert cache.get("ab")["x"] == 1


def test_what_cannot_be_read_for_now_is_not_removed(tmp_path):
    cache = FeatureCache(tmp_path, {})
    cache._path("ab").mkdir(parents=True)  # as any failure that is not damage
    with pytest.raises(OSError):
        cache.get("ab")


def _write(folder, value):
    cache = FeatureCache(folder, {})
    for _ in range(30):
        cache.put("ab", {"x": torch.full((5000,), value)})
        assert cache.get("ab")["x"].unique().numel() == 1


def test_two_processes_write_the_same_key(tmp_path):
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    writers = [context.Process(target=_write, args=(tmp_path, float(i))) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert FeatureCache(tmp_path, {}).get("ab")["x"].unique().numel() == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write to the feature cache .*file.*another folder"):
        FeatureCache(tmp_path / "file", {})
    cache = FeatureCache(tmp_path / "cache", {})
    (cache.folder / "ab").write_text("")
    with pytest.raises(OSError, match="Cannot write to the feature cache"):
        cache.put("abc", {"x": torch.zeros(1)})


def test_keys_are_of_content(tmp_path):
    wave = np.linspace(-0.5, 0.5, 50, dtype=np.float32)
    (tmp_path / "a.wav").write_bytes(b"one")
    (tmp_path / "b.wav").write_bytes(b"one")
    same = {audio_key(str(tmp_path / "a.wav")), audio_key(tmp_path / "b.wav"), audio_key(b"one"),
            audio_key({"bytes": b"one", "path": "x"}), audio_key({"bytes": b"", "path": str(tmp_path / "a.wav")})}  # fmt: skip
    assert len(same) == 1
    assert (
        audio_key(wave, 16_000)
        == audio_key({"array": wave, "sampling_rate": 16_000})
        == audio_key(torch.tensor(wave), 16_000)
    )
    different = [audio_key(wave, 16_000), audio_key(wave, 8_000), audio_key(wave * 0.5, 16_000), audio_key(wave[None], 16_000),
                 audio_key((wave * 100).astype(np.int16), 16_000), audio_key(torch.tensor(wave).bfloat16(), 16_000), *same]  # fmt: skip
    assert len(set(different)) == len(different)
    with pytest.raises(AudioError, match=r"nowhere.wav cannot be read: No such file"):
        audio_key(str(tmp_path / "nowhere.wav"))
    with pytest.raises(AudioError, match="without"):
        audio_key({"bytes": b""})
    assert text_key("a") != text_key("A")


def test_fingerprints_tell_weights_apart():
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    first = fingerprint(module)
    assert fingerprint(module) == first != fingerprint(torch.nn.Linear(3, 2))
    assert fingerprint(module.to(torch.bfloat16)) != first

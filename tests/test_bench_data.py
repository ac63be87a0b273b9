"""The benchmark's data: what is read, what is refused, and that a refusal loses nothing."""

import hashlib
import io
import os
import pickle
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch

from bench import UserError, data

TRAIN, TEST = [[5, 1, 9], [2, 88_584], [7, 7, 7, 7]], [[1, 300, 297, 296], [3]]


def objects(lists):
    array = np.empty(len(lists), dtype=object)
    array[:] = lists
    return array


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def around(pickled, length=3):
    """An npy file of ``length`` objects around any pickle."""
    buffer = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + pickled


def npz(**changed):
    """A small imdb.npz; keyword arguments replace members, None leaves one out."""
    members = {"x_train": npy(objects(TRAIN)), "y_train": npy(np.array([1, 0, 1]))}
    members |= {"x_test": npy(objects(TEST)), "y_test": npy(np.array([0, 1]))} | changed
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            if body is not None:
                archive.writestr(f"{name}.npy", body)
    return buffer.getvalue()


def lists(reviews):
    return [reviews.ids[a:b].tolist() for a, b in pairwise(reviews.offsets.tolist())]


def refusal(blob):
    with pytest.raises(UserError) as caught:
        data.parse(blob, "file")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fusedrnn" / "imdb.npz"


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_npz_is_read(protocol):
    corpus = data.parse(npz(x_train=around(pickle.dumps(objects(TRAIN), protocol))), "file")
    assert (lists(corpus.train), lists(corpus.test)) == (TRAIN, TEST)
    assert [t.dtype for t in corpus.train] == [torch.int32, torch.int64, torch.int64]
    assert corpus.train.labels.tolist() == [1, 0, 1]


def test_padded_follows_keras():
    ids, lengths = data.padded(data.parse(npz(), "file").test, vocabulary=300, length=4)
    # 1 starts; a rank r is r + 3; from 300 on 2; after the end 0; cut at the end.
    assert ids.tolist() == [[1, 4, 2, 2], [1, 6, 0, 0]]
    assert lengths.tolist() == [4, 2]


class Shell:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(tmp_path, protocol):
    planted = tmp_path / "planted"
    for hostile in (Shell(planted), objects([[1], Shell(planted), [2]])):
        assert "asks for" in refusal(npz(x_train=around(pickle.dumps(hostile, protocol))))
    assert not planted.exists()
    pickle.loads(pickle.dumps(Shell(planted), protocol))
    assert planted.exists(), "the planted pickle does nothing: this test proves nothing"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"y_test": None}, "does not hold"),
        ({"x_train": around(b"cnumpy\nload\n.")}, "asks for numpy.load"),
        ({"x_train": around(pickle.dumps({"a": 1}))}, "damaged"),
        ({"x_train": npy(objects([[1], (2,), [3]]))}, "not a list"),
        ({"x_train": npy(objects([[1], [], [3]]))}, "at least one"),
        ({"x_train": npy(objects([[1], [0], [3]]))}, "outside 1 to 88584"),
        ({"x_train": npy(objects([[1], [88_585], [3]]))}, "outside 1 to 88584"),
        ({"x_train": npy(objects([[1], [1 << 40], [3]]))}, "damaged"),
        ({"x_train": npy(objects([[1] * 100_000] * 600)),
          "y_train": npy(np.arange(600) % 2)}, "more than 50,000,000 words"),
        ({"y_train": npy(np.array([1, 0, 2]))}, "one label, 0 or 1"),
        ({"y_train": npy(np.array([1, 1, 1]))}, "one label, 0 or 1"),
        ({"y_train": npy(np.array([1, 0]))}, "for each of 3"),
        ({"y_train": b"hello"}, "damaged"),
    ],
)  # fmt: skip
def test_a_wrong_npz_is_refused_in_a_sentence(changed, sentence):
    assert sentence in refusal(npz(**changed))


def test_damaged_and_oversized_files_are_refused(monkeypatch):
    for end in (0, 20, len(npz()) // 2, len(npz()) - 9):
        assert "damaged" in refusal(npz()[:end])
    monkeypatch.setattr(data, "MAX_UNPACKED_BYTES", 100)
    assert "unpacks to more than 100" in refusal(npz())


def test_a_named_file_is_read_and_a_large_one_refused(tmp_path, monkeypatch, cache):
    file = tmp_path / "my.npz"
    file.write_bytes(npz())
    assert "not Keras' own" in data.load(file).source
    monkeypatch.setenv("FUSEDRNN_IMDB", str(file))
    assert lists(data.load(None).train) == TRAIN
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 100)
    with pytest.raises(UserError, match="larger than 100"):
        data.load(None)
    assert not cache.exists()


def test_a_download_is_asked_for_verified_and_cached(tmp_path, monkeypatch, cache):
    file = tmp_path / "imdb.npz"
    file.write_bytes(npz())
    monkeypatch.setattr(data, "KERAS_URL", file.as_uri())
    assert data.load(None, needed=4).source.startswith("generated")
    for bad in (file.as_uri(), "file:///nowhere/imdb.npz", "http://127.0.0.1:9/x", "nonsense"):
        monkeypatch.setattr(data, "KERAS_URL", bad)
        with pytest.raises(UserError, match=r"^the download of [^\n]* failed: [^\n]*$"):
            data.load(None, download=True)
    assert not cache.parent.exists()
    monkeypatch.setattr(data, "KERAS_URL", file.as_uri())
    monkeypatch.setattr(data, "OFFICIAL", hashlib.sha256(npz()).hexdigest())
    assert data.load(None, download=True).source == "IMDB, Keras' imdb.npz"
    file.unlink()
    assert lists(data.load(None).train) == TRAIN
    cache.write_bytes(npz()[:-1])
    with pytest.raises(UserError, match="is damaged; remove it"):
        data.load(None, download=True)
    assert cache.read_bytes() == npz()[:-1]


def test_generated_reviews_have_imdbs_statistics():
    train, _, _ = data.generate(train=2_000, test=500, seed=1)
    lengths = train.offsets.diff()
    assert 160 <= lengths.median() <= 195
    assert 222 <= lengths.double().mean() <= 255
    # IMDB: 0.057, 0.636, 0.972 of all words
    common = [(train.ids <= rank).double().mean().item() for rank in (1, 297, 20_000)]
    assert common == pytest.approx([0.057, 0.636, 0.972], abs=0.02)
    assert torch.equal(train.ids, data.generate(2_000, 500, seed=1).train.ids)


def test_windows_end_before_their_target_and_scales_use_what_is_known():
    inputs, targets = data.windows(torch.arange(7.0), 3)
    assert inputs.squeeze(-1).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert targets.tolist() == [3, 4, 5, 6]
    assert data.rescaled(torch.tensor([2.0, 4.0, 3.0, 10.0]), 3).tolist() == [0, 1, 0.5, 4]
    assert data.prices()[-50:].mean() == pytest.approx(145, abs=6)
    assert data.sine().abs().max() <= 1

"""The benchmark's data: what is read, what is refused, and that a refusal loses nothing."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch

from bench import data
from bench.data import DataError

TRAIN, TEST = [[5, 1, 9], [2, 88_584], [7, 7, 7, 7]], [[1, 300, 297, 296], [3]]
TEXTS = {
    "aclImdb/train/neg/0_1.txt": "Bad, bad; <br /><br />bad FILM",
    "aclImdb/train/pos/10_9.txt": "good",
    "aclImdb/train/pos/2_10.txt": "A good film",
    "aclImdb/test/neg/0_2.txt": "film unheard-of",
    "aclImdb/test/pos/0_10.txt": "don't",
    "aclImdb/train/unsup/0_0.txt": "left out",
}


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


def tar_gz(*extra, texts=TEXTS):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info in extra:
            tar.addfile(info)
        for name, text in texts.items():
            tar.addfile(member(name, size=len(text.encode())), io.BytesIO(text.encode()))
    return buffer.getvalue()


def member(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def lists(reviews):
    return [reviews.ids[a:b].tolist() for a, b in pairwise(reviews.offsets.tolist())]


def refusal(blob):
    with pytest.raises(DataError) as caught:
        data.parse(blob, "file")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fusedrnn" / "imdb.npz"


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_npz_is_read(protocol):
    corpus = data.parse(npz(x_train=around(pickle.dumps(objects(TRAIN), protocol))), "file")
    assert (lists(corpus.train), lists(corpus.test)) == (TRAIN, TEST)
    assert [t.dtype for t in corpus.train] == [torch.int32, torch.int64, torch.uint8]
    assert corpus.train.labels.tolist() == [1, 0, 1]


def test_tar_is_read_by_rank_of_the_training_words():
    corpus = data.parse(tar_gz(), "file")
    # bad 3, film good br 2 (in alphabetical order br film good), a 1; the test's rare words last
    assert lists(corpus.train) == [[1, 1, 2, 2, 1, 3], [5, 4, 3], [4]]
    assert lists(corpus.test) == [[3, 6, 6], [6]]
    assert corpus.train.labels.tolist() == [0, 1, 1]


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
        ({"more": b""}, "does not hold"),
        ({"x_train": around(b"cnumpy\nload\n.")}, "asks for numpy.load"),
        ({"x_train": around(pickle.dumps(objects(TRAIN))[:-9])}, "damaged"),
        ({"x_train": around(pickle.dumps({"a": 1}))}, "damaged"),
        ({"x_train": npy(objects([[1], (2,), [3]]))}, "not a list"),
        ({"x_train": npy(objects([[1], [], [3]]))}, "at least one"),
        ({"x_train": npy(objects([[1], [0], [3]]))}, "outside 1 to 88584"),
        ({"x_train": npy(objects([[1], [88_585], [3]]))}, "outside 1 to 88584"),
        ({"x_train": npy(objects([[1], [1 << 40], [3]]))}, "damaged"),
        ({"x_train": npy(objects([[1], [1.0], [3]]))}, "damaged"),
        ({"x_train": npy(objects([[1] * 100_000] * 600))}, "for each of 600"),
        ({"x_train": npy(objects([[1] * 100_000] * 600)),
          "y_train": npy(np.arange(600) % 2)}, "more than 50,000,000 words"),
        ({"y_train": npy(np.array([1, 0, 2]))}, "one label, 0 or 1"),
        ({"y_train": npy(np.array([1.0, 0.0, 1.0]))}, "one label, 0 or 1"),
        ({"y_train": npy(np.array([1, 1, 1]))}, "one label, 0 or 1"),
        ({"y_train": npy(np.array([1, 0]))}, "for each of 3"),
        ({"y_train": npy(np.array([1, 0, 1]))[:-8]}, "damaged"),
        ({"y_train": b"hello"}, "damaged"),
    ],
)  # fmt: skip
def test_a_wrong_npz_is_refused_in_a_sentence(changed, sentence):
    assert sentence in refusal(npz(**changed))


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        (member("../aclImdb/train/neg/1_1.txt"), "outside the destination"),
        (member("aclImdb/../../x"), "outside the destination"),
        (member("aclImdb/x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "absolute path"),
        (member("aclImdb/x", type=tarfile.CHRTYPE), "special file"),
        (member("aclImdb/train/neg/1_1.txt", size=2 << 30), "damaged"),
    ],
)
def test_a_hostile_tar_is_refused_and_writes_no_file(info, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(tar_gz(info))
    assert not list(tmp_path.iterdir())


def test_damaged_and_oversized_files_are_refused(monkeypatch):
    assert "neither" in refusal(b"<html>not found</html>")
    for whole in (npz(), tar_gz()):
        for end in (20, len(whole) // 2, len(whole) - 9):
            assert "damaged" in refusal(whole[:end])
    unpacked = gzip.decompress(tar_gz())
    for sound, broken in ((b"A good", b"A \xff\xffod"), (b"train/pos/2_10", b"train/pos/2_11")):
        assert "damaged" in refusal(gzip.compress(unpacked.replace(sound, broken)))
    only = {name: text for name, text in TEXTS.items() if "test/pos" not in name}
    assert "one label" in refusal(tar_gz(texts=only))
    monkeypatch.setattr(data, "MAX_UNPACKED_BYTES", 100)
    assert "unpacks to more than 100" in refusal(npz())
    assert "unpacks to more than 100" in refusal(tar_gz())


def test_a_named_file_is_read_and_a_missing_or_large_one_refused(tmp_path, monkeypatch, cache):
    file = tmp_path / "my.npz"
    file.write_bytes(npz())
    assert "not an official one" in data.load(file).source
    monkeypatch.setenv("FUSEDRNN_IMDB", str(file))
    assert lists(data.load().train) == TRAIN
    with pytest.raises(DataError, match="cannot be read: No such file"):
        data.load(tmp_path / "missing")
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 100)
    with pytest.raises(DataError, match="larger than 100"):
        data.load()
    assert not cache.exists()


def test_a_download_is_asked_for_verified_and_cached(tmp_path, monkeypatch, cache):
    file = tmp_path / "imdb.npz"
    file.write_bytes(npz())
    url = file.as_uri()
    assert data.load(reviews=4, url=url).source.startswith("generated")
    with pytest.raises(DataError, match="no official sha256"):
        data.load(download=True, url=url)
    for bad in ("file:///nowhere/imdb.npz", "http://127.0.0.1:9/x", "nonsense"):
        with pytest.raises(DataError, match=r"^the download of [^\n]* failed: [^\n]*$"):
            data.load(download=True, url=bad)
    assert not cache.parent.exists()
    monkeypatch.setattr(data, "OFFICIAL", {hashlib.sha256(npz()).hexdigest(): "the real one"})
    assert data.load(download=True, url=url).source == "IMDB, the real one"
    file.unlink()
    assert lists(data.load().train) == TRAIN
    cache.write_bytes(npz()[:-1])
    with pytest.raises(DataError, match="is damaged; remove it"):
        data.load(download=True, url=url)
    assert cache.read_bytes() == npz()[:-1]


def test_generated_reviews_have_imdbs_statistics():
    train, test, _ = data.generate(train=2_000, test=500, seed=1)
    lengths = train.offsets.diff()
    assert 160 <= lengths.median() <= 195
    assert 222 <= lengths.double().mean() <= 255
    # IMDB: 0.057, 0.636, 0.972 of all words
    common = [(train.ids <= rank).double().mean().item() for rank in (1, 297, 20_000)]
    assert common == pytest.approx([0.057, 0.636, 0.972], abs=0.02)
    assert torch.equal(train.ids, data.generate(2_000, 500, seed=1).train.ids)

    def counts(reviews):
        row = torch.repeat_interleave(torch.arange(len(reviews.labels)), reviews.offsets.diff())
        flat = torch.bincount(
            row * 3_000 + reviews.ids.clamp(max=3_000) - 1, minlength=len(reviews.labels) * 3_000
        )
        return flat.reshape(-1, 3_000).float()

    x, y = counts(train), train.labels.bool()
    lean = ((x[y].sum(0) + 5) / (x[~y].sum(0) + 5)).log() - (x[y].sum() / x[~y].sum()).log()
    accuracy = (((counts(test) @ lean) > 0) == test.labels.bool()).float().mean()
    assert 0.75 < accuracy < 0.93, "a bag of words cannot tell the labels"


def test_windows_end_before_their_target_and_scales_use_what_is_known():
    inputs, targets = data.windows(torch.arange(7.0), 3)
    assert inputs.squeeze(-1).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert targets.tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="has no window of 7"):
        data.windows(torch.arange(7.0), 7)
    scale = data.Scale.of(torch.tensor([2.0, 4.0, 3.0, 10.0]), known=3)
    assert scale.apply(torch.tensor([2.0, 10.0])).tolist() == [0, 4]
    assert data.prices()[-50:].mean() == pytest.approx(145, abs=6)
    assert data.sine().abs().max() <= 1

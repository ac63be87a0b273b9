"""The benchmark's data: what is read, what is refused, and that refusals leave the cache alone."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import pickle
import pickletools
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import archives, imdb, series
from bench.archives import MAX_RANK, DataError, Reviews, Splits
from bench.generated import generate

TRAIN = [[5, 1, 9], [2, 88_584], [7, 7, 7, 7]]
TEST = [[1, 300, 297, 296], [3]]
TRAIN_Y, TEST_Y = [1, 0, 1], [0, 1]


def object_array(lists) -> np.ndarray:
    array = np.empty(len(lists), dtype=object)
    array[:] = lists
    return array


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_around(pickled: bytes, length: int) -> bytes:
    """An npy file of ``length`` objects around any pickle at all."""
    buffer = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + pickled


def npz(**changed: bytes | None) -> bytes:
    """A small imdb.npz; keyword arguments replace members, None leaves one out."""
    members = {
        "x_train": npy(object_array(TRAIN)),
        "y_train": npy(np.array(TRAIN_Y, dtype=np.int64)),
        "x_test": npy(object_array(TEST)),
        "y_test": npy(np.array(TEST_Y, dtype=np.int64)),
    } | changed
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            if body is not None:
                archive.writestr(f"{name}.npy", body)
    return buffer.getvalue()


TEXTS = {
    "aclImdb/train/neg/0_1.txt": "Bad, bad; <br /><br />bad FILM",
    "aclImdb/train/pos/10_9.txt": "good",
    "aclImdb/train/pos/2_10.txt": "A good film",
    "aclImdb/test/neg/0_2.txt": "film unheard-of",
    "aclImdb/test/pos/0_10.txt": "don't",
    "aclImdb/train/unsup/0_0.txt": "left out",
    "aclImdb/README": "left out",
}


def member(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar_gz(*extra: tarfile.TarInfo, texts: dict[str, str] = TEXTS) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info in extra:
            tar.addfile(info)
        for name, text in texts.items():
            tar.addfile(member(name, size=len(text.encode())), io.BytesIO(text.encode()))
    return buffer.getvalue()


def listed(reviews: Reviews) -> list[list[int]]:
    bounds = reviews.offsets.tolist()
    return [reviews.ids[a:b].tolist() for a, b in pairwise(bounds)]


def refusal(blob: bytes) -> str:
    with pytest.raises(DataError) as caught:
        archives.parse(blob, "file")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)
    return tmp_path / "cache"


# Reading


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_npz_is_read_whatever_the_protocol_of_its_pickles(protocol):
    pickled = pickle.dumps(object_array(TRAIN), protocol=protocol)
    if protocol == 2:  # writes b"b" as a call of _codecs.encode, which no file of Keras does
        assert "_codecs" in refusal(npz(x_train=npy_around(pickled, len(TRAIN))))
        return
    splits = archives.parse(npz(x_train=npy_around(pickled, len(TRAIN))), "file")
    assert (listed(splits.train), listed(splits.test)) == (TRAIN, TEST)
    assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == (TRAIN_Y, TEST_Y)
    dtypes = [tensor.dtype for tensor in splits.train]
    assert dtypes == [torch.int32, torch.int64, torch.uint8]


def test_tar_is_read_by_rank_of_the_training_words():
    splits = archives.parse(tar_gz(), "file")
    # bad 3, film good br 2 (in alphabetical order br film good), a 1
    rank = {"bad": 1, "br": 2, "film": 3, "good": 4, "a": 5}
    assert listed(splits.train) == [
        [rank[w] for w in ["bad", "bad", "br", "br", "bad", "film"]],
        [rank[w] for w in ["a", "good", "film"]],  # ID 2 stands before ID 10
        [rank["good"]],
    ]
    assert splits.train.labels.tolist() == [0, 1, 1]
    # Words that only the test part has share the rank after the last.
    assert listed(splits.test) == [[rank["film"], 6, 6], [6]]


def test_padded_follows_keras():
    splits = Splits(*(archives.parse(npz(), "file")))
    ids, lengths = imdb.padded(splits.test, vocabulary=300, length=4)
    # 1 starts; a rank r is r + 3; from 300 on 2; behind the end 0; cut at the end.
    assert ids.tolist() == [[1, 4, 2, 2], [1, 6, 0, 0]]
    assert lengths.tolist() == [4, 2]
    ids, _ = imdb.padded(splits.test, vocabulary=300, length=5)
    assert ids[0].tolist() == [1, 4, 2, 2, 299]


def test_the_real_file_has_the_known_beginning():
    path = os.environ.get("FUSEDRNN_IMDB")
    if not path or not path.endswith(".npz"):
        pytest.skip("FUSEDRNN_IMDB names no imdb.npz")
    splits = archives.parse(Path(path).read_bytes(), "imdb.npz")
    assert [len(split) for split in splits] == [25_000, 25_000]
    lengths = splits.train.offsets.diff() + 1
    assert (int(lengths.min()), int(lengths.median()), int(lengths.max())) == (11, 178, 2494)


# Refusing: npz


class Shell:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(tmp_path, protocol):
    planted = tmp_path / "planted"
    evil = object_array([[1], Shell(planted), [2]])
    message = refusal(npz(x_train=npy_around(pickle.dumps(evil, protocol), 3)))
    assert ".system" in message or "_codecs" in message or "copyreg" in message
    assert not planted.exists()
    bare = npz(x_train=npy_around(pickle.dumps(Shell(planted), protocol), 3))
    assert "system" in refusal(bare)
    assert not planted.exists()
    pickle.loads(pickle.dumps(Shell(planted), protocol))
    assert planted.exists(), "the planted pickle does nothing: this test proves nothing"


def test_a_pickle_may_name_nothing_but_arrays():
    for stranger in (
        b"cbuiltins\neval\n.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cbench.archives\nDataError\n.",
        pickle.dumps(np.float64(1)),
        pickle.dumps(object_array([[1], np.int64(3)])),
    ):
        assert "asks for" in refusal(npz(x_train=npy_around(stranger, 3)))


def test_damaged_pickles_are_refused_in_one_sentence():
    whole = pickle.dumps(object_array(TRAIN), protocol=4)
    opcodes = [position for _, _, position in pickletools.genops(whole)]
    for end in (0, 1, *opcodes[3::7], len(whole) - 1):
        assert "pickle" in refusal(npz(x_train=npy_around(whole[:end], 3)))
    for other in ([[1], [2], [3]], {"a": 1}, 7, object_array([[1]])):
        assert "elements" in refusal(npz(x_train=npy_around(pickle.dumps(other), 3)))


@pytest.mark.parametrize(
    ("lists", "sentence"),
    [
        ([[1], (2,), [3]], "not a list"),
        ([[1], [], [3]], "at least one"),
        ([[1], [0], [3]], "between 1 and 88584"),
        ([[1], [-4], [3]], "between 1 and 88584"),
        ([[1], [MAX_RANK + 1], [3]], "between 1 and 88584"),
        ([[1], [1 << 40], [3]], "32-bit"),
        ([[1], [1.0], [3]], "32-bit"),
        ([[1], [[2]], [3]], "32-bit"),
        ([[1], ["2"], [3]], "32-bit"),
        ([[1], [2]], "2 reviews and 3 labels"),
    ],
)
def test_reviews_must_be_lists_of_ranks(lists, sentence):
    assert sentence in refusal(npz(x_train=npy(object_array(lists))))


def test_one_list_repeated_for_ever_is_refused_before_it_is_laid_out():
    long = [1] * 100_000
    array = object_array([long] * 600)  # 60 million words in a pickle of 1.2 MB
    labels = npy(np.arange(600, dtype=np.int64) % 2)
    assert "60,000,000 words" in refusal(npz(x_train=npy(array), y_train=labels))


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.array([1, 0, 1], dtype=np.int32), "'<i4'"),
        (np.array([1.0, 0.0, 1.0]), "'<f8'"),
        (np.array([1, 0, 2]), "other than 0 and 1"),
        (np.array([1, 1, 1]), "one kind only"),
        (np.array([[1, 0, 1]]), "one-dimensional"),
        (np.array([1, 0]), "3 reviews and 2 labels"),
        (np.array([], dtype=np.int64), "3 reviews and 0 labels"),
    ],
)
def test_labels_must_be_bits_in_int64(array, sentence):
    assert sentence in refusal(npz(y_train=npy(array)))


def test_labels_must_be_complete():
    whole = npy(np.array(TRAIN_Y))
    assert "labels need" in refusal(npz(y_train=whole[:-8]))
    assert "not an npy array" in refusal(npz(y_train=b"hello"))
    assert "header" in refusal(npz(y_train=whole[:8] + b"\xff\xff" + b"(" * 500))


def test_other_members_are_refused():
    assert "'x_test.npy'" in refusal(npz(y_test=None))
    assert "'more.npy'" in refusal(npz(more=b""))
    assert "neither" in refusal(b"")
    assert "neither" in refusal(b"<html>not found</html>")


def test_damaged_and_oversized_zips_are_refused(monkeypatch):
    whole = npz()
    for end in (4, 40, len(whole) // 2, len(whole) - 1):
        assert "damaged npz" in refusal(whole[:end])
    middle = whole.index(b"x_train.npy") + 60
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    assert "damaged npz" in refusal(flipped)
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 100)
    assert "at most 100 are read" in refusal(whole)


# Refusing: tar


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        (member("../aclImdb/train/neg/1_1.txt"), "leads out"),
        (member("aclImdb/../../x"), "leads out"),
        (member("/etc/passwd"), "leads out"),
        (member("aclImdb\\..\\x"), "leads out"),
        (member("aclImdb/x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "neither a plain"),
        (member("aclImdb/x", type=tarfile.LNKTYPE, linkname="aclImdb/README"), "neither a plain"),
        (member("aclImdb/x", type=tarfile.CHRTYPE), "neither a plain"),
        (member("aclImdb/train/neg/1_1.txt", type=tarfile.FIFOTYPE), "neither a plain"),
        (member("aclImdb/train/neg/1_1.txt", size=2 << 20), "a review has at most"),
        (member("aclImdb/big", size=2 << 30), "unpacks to more"),
    ],
)
def test_tars_with_tricks_are_refused(info, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(tar_gz(info))
    assert not list(tmp_path.iterdir()), "reading a tar made a file"


def test_a_forged_extended_header_costs_no_memory():
    pax = member("pax", type=tarfile.XHDTYPE, size=1 << 40)
    assert "more bytes than memory" in refusal(gzip.compress(pax.tobuf(tarfile.GNU_FORMAT)))


def test_too_many_members_are_refused(monkeypatch):
    monkeypatch.setattr(archives, "MAX_TAR_MEMBERS", len(TEXTS) - 1)
    assert "unpacks to more" in refusal(tar_gz())


def test_damaged_tars_are_refused():
    whole = tar_gz()
    for end in (2, 20, len(whole) // 2, len(whole) - 9):
        assert "damaged tar.gz" in refusal(whole[:end])
    unzipped = gzip.decompress(whole)
    inside = unzipped.index(b"A good film") + 3
    assert "damaged tar.gz" in refusal(gzip.compress(unzipped[:inside]))
    for sound, spoilt in (
        (b"A good film", b"A g\xff\xffd film"),
        (b"train/pos/2_10", b"train/pos/2_11"),
    ):
        assert sound in unzipped
        assert "damaged tar.gz" in refusal(gzip.compress(unzipped.replace(sound, spoilt)))


def test_a_tar_needs_reviews_of_all_four_kinds():
    for missing in ("train/neg", "test/pos"):
        texts = {name: text for name, text in TEXTS.items() if missing not in name}
        assert f"no review at aclImdb/{missing}" in refusal(tar_gz(texts=texts))


# Finding, verifying, caching


def digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def test_a_named_file_is_read_cached_and_owned_up_to(cache, tmp_path, monkeypatch):
    file = tmp_path / "imdb.npz"
    file.write_bytes(npz())
    first = imdb.load(file, cache=cache)
    assert "not official" in first.source
    assert digest(npz())[:12] in first.source
    monkeypatch.setattr(imdb, "parse", lambda *_: pytest.fail("the cache was not used"))
    monkeypatch.setenv("FUSEDRNN_IMDB", str(file))
    second = imdb.load(cache=cache)
    assert second.source == first.source
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            (*first.splits.train, *first.splits.test),
            (*second.splits.train, *second.splits.test),
            strict=True,
        )
    )


def test_a_cached_file_is_taken_unnamed_only_if_it_is_official(cache, tmp_path):
    file = tmp_path / "imdb.npz"
    file.write_bytes(npz())
    imdb.load(file, cache=cache)
    assert imdb.load(cache=cache, reviews=4).source.startswith("generated")
    official = {digest(npz()): "the official one"}
    assert imdb.load(cache=cache, official=official).source == "IMDB, the official one"
    assert "verified" in imdb.load(file, cache=cache, official=official).source


def test_a_download_happens_only_when_asked_for_and_is_verified_first(cache, tmp_path, monkeypatch):
    file = tmp_path / "imdb.npz"
    file.write_bytes(npz())
    url, official = file.as_uri(), {digest(npz()): "the official one"}
    with monkeypatch.context() as patch:
        patch.setattr(imdb.urllib.request, "urlopen", lambda *_, **__: pytest.fail("downloaded"))
        assert imdb.load(cache=cache, url=url, official=official, reviews=4).source.startswith(
            "gen"
        )
    with monkeypatch.context() as patch:
        patch.setattr(imdb, "parse", lambda *_: pytest.fail("read before it was verified"))
        with pytest.raises(DataError, match="not an official one"):
            imdb.load(cache=cache, url=url, download=True)
    assert not cache.exists()
    corpus = imdb.load(cache=cache, url=url, official=official, download=True)
    assert listed(corpus.splits.train) == TRAIN
    file.unlink()
    assert imdb.load(cache=cache, url=url, official=official, download=True).source.startswith(
        "IMDB"
    )


@pytest.mark.parametrize("url", ["file:///nowhere/imdb.npz", "http://127.0.0.1:9/x", "nonsense"])
def test_a_failed_download_is_one_sentence(cache, url):
    with pytest.raises(DataError, match=r"^the download of .* failed: [^\n]*$"):
        imdb.load(cache=cache, url=url, download=True)


def test_bad_files_leave_the_cache_as_it_was(cache, tmp_path, monkeypatch):
    good = tmp_path / "good.npz"
    good.write_bytes(npz())
    imdb.load(good, cache=cache)
    before = {file.name: file.read_bytes() for file in cache.iterdir()}
    bad = tmp_path / "bad.npz"
    for blob in (
        b"",
        npz()[:-1],
        npz(x_test=None),
        tar_gz()[:-9],
        npz(x_train=npy(object_array([[0]]))),
    ):
        bad.write_bytes(blob)
        with pytest.raises(DataError):
            imdb.load(bad, cache=cache)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        imdb.load(tmp_path / "missing", cache=cache)
    with pytest.raises(DataError, match="cannot be read"):
        imdb.load(tmp_path, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(imdb, "MAX_FILE_BYTES", 100)
        with pytest.raises(DataError, match="at most 100 are read"):
            imdb.load(good, cache=cache)
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == before


def test_a_write_that_breaks_off_leaves_nothing_behind(cache, tmp_path, monkeypatch):
    file = tmp_path / "imdb.npz"
    file.write_bytes(npz())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imdb.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        imdb.load(file, cache=cache)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)
    file = tmp_path / "imdb.npz"
    file.write_bytes(npz())
    with pytest.warns(UserWarning, match="nothing is cached"):
        corpus = imdb.load(file, cache=file / "below a file")
    assert listed(corpus.splits.train) == TRAIN


@pytest.mark.parametrize("damage", ["cut", "bit", "magic", "header", "other"])
def test_a_damaged_cache_is_refused(cache, tmp_path, damage):
    file = tmp_path / "imdb.npz"
    file.write_bytes(npz())
    imdb.load(file, cache=cache)
    (cached,) = cache.iterdir()
    blob = bytearray(cached.read_bytes())
    if damage == "cut":
        del blob[-1]
    elif damage == "bit":
        blob[-1] ^= 1
    elif damage == "magic":
        blob[0] ^= 1
    elif damage == "header":
        blob[blob.index(b"{")] ^= 1
    else:
        blob = bytearray(bytes(blob).replace(digest(npz())[-8:].encode(), b"00000000"))
    cached.write_bytes(blob)
    with pytest.raises(DataError, match="damaged; remove it"):
        imdb.load(file, cache=cache)


# Made-up data


def test_generated_reviews_have_imdbs_statistics():
    splits = generate(train=4_000, test=100, seed=1)
    reviews = splits.train
    lengths = reviews.offsets.diff()
    assert reviews.labels.float().mean() == 0.5
    assert lengths.min() >= 10
    assert 165 <= lengths.median() <= 190
    assert 225 <= lengths.double().mean() <= 252
    common = [(reviews.ids <= rank).double().mean().item() for rank in (1, 297, 20_000)]
    # IMDB: 0.057, 0.636, 0.972
    assert common == pytest.approx([0.057, 0.636, 0.972], abs=0.02)
    assert reviews.ids.min() >= 1
    assert reviews.ids.max() <= MAX_RANK


def test_generated_reviews_follow_the_seed():
    one, same, other = (generate(train=20, test=4, seed=seed).train.ids for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one[:100], other[:100])


def test_a_bag_of_generated_words_tells_the_labels_as_on_imdb():
    train, test = generate(train=6_000, test=1_000, seed=0)

    def counts(reviews: Reviews) -> torch.Tensor:
        row = torch.repeat_interleave(torch.arange(len(reviews)), reviews.offsets.diff())
        flat = torch.bincount(
            row * 3_000 + reviews.ids.clamp(max=3_000) - 1, minlength=len(reviews) * 3_000
        )
        return flat.reshape(len(reviews), 3_000).float()

    x, y = counts(train), train.labels.bool()
    lean = ((x[y].sum(0) + 5) / (x[~y].sum(0) + 5)).log()  # naive Bayes
    lean -= (x[y].sum() / x[~y].sum()).log()
    accuracy = (((counts(test) @ lean) > 0) == test.labels.bool()).float().mean()
    assert 0.82 < accuracy < 0.93


def test_series_are_the_lessons():
    wave = series.sine()
    assert len(wave) == 500
    assert wave[0] == 0
    assert wave.abs().max() <= 1
    assert wave[1] == pytest.approx(math.sin(20 * math.pi / 499))
    price = series.prices()
    assert len(price) == 500
    assert 2.0 < (price - series.prices(seed=1)).std() / 2**0.5 < 4.0
    assert price[:50].mean() == pytest.approx(105, abs=6)
    assert price[-50:].mean() == pytest.approx(145, abs=6)


def test_windows_end_before_their_target():
    cut = series.windows(torch.arange(7.0), 3)
    assert cut.inputs.squeeze(-1).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert cut.targets.tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="has no window of 7"):
        series.windows(torch.arange(7.0), 7)


def test_rescaling_looks_only_at_what_is_known():
    scaled = series.rescaled(torch.tensor([2.0, 4.0, 3.0, 10.0]), known=3)
    assert scaled.tolist() == [0, 1, 0.5, 4]

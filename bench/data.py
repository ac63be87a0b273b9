"""The data of the workloads: IMDB reviews, real or generated, and two series.

Cite the reviews as Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011. They have
no licence and are not part of this project. Files are not trusted: pickles are read by an unpickler
that only builds lists, and nothing in a tar is extracted to disk.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import pickle
import re
import tarfile
import urllib.request
import zipfile
from array import array
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import UserError

#: sha256 of the files that Keras and Stanford publish.
OFFICIAL = {
    "69664113be75683a8fe16e3ed0ab59fda8886cb3cd7ada244f7d9544e4676b9f": "Keras' imdb.npz",
    "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe": "Stanford's aclImdb_v1",
}
KERAS_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/imdb.npz"
#: Limits for hostile files. Stanford's has 84 MB, unpacks to under 400 MB, and has 12 M words.
MAX_FILE_BYTES, MAX_UNPACKED_BYTES, MAX_WORDS = 1 << 28, 1 << 29, 50_000_000
#: Keras' conventions: 0 pads, 1 starts a review, 2 replaces rare words, rank 1 becomes 4.
START, RARE, FIRST = 1, 2, 3
MAX_RANK = 88_584


class DataError(UserError):
    """The data is missing, damaged or not what it claims to be."""


class Reviews(NamedTuple):
    """Reviews laid end to end, as word ranks; rank 1 is the most frequent word."""

    ids: Tensor  # int32 [words]
    offsets: Tensor  # int64 [reviews + 1]
    labels: Tensor  # uint8 [reviews], 1 for a good one


class Corpus(NamedTuple):
    train: Reviews
    test: Reviews
    source: str = ""


def load(
    path: str | os.PathLike | None = None,
    *,
    download: bool = False,
    seed: int = 0,
    reviews: int = 25_000,
    url: str = KERAS_URL,
) -> Corpus:
    """Returns the reviews of a file, of the cache, of a download, or generated ones.

    Args:
        path: Keras' ``imdb.npz`` or Stanford's tar.gz; default: ``FUSEDRNN_IMDB``.
        download: fetch Keras' file if none is named or in the cache, ``$XDG_CACHE_HOME/fusedrnn``.
        seed, reviews: of each split of generated reviews.
        url: the address of the download, whose sha256 must be an official one.

    Raises:
        DataError: the file is missing, damaged or hostile. The cache is not changed.
    """
    path = path or os.environ.get("FUSEDRNN_IMDB")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedrnn/imdb.npz"
    if not path and download and not cache.exists():
        _download(url, cache)
    if not path and not cache.exists():
        source = "generated reviews with IMDB's statistics (real ones: --imdb PATH or --download)"
        return generate(reviews, reviews, seed)._replace(source=source)
    file = Path(path or cache)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{file} is larger than {MAX_FILE_BYTES:,} bytes")
        blob = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(blob).hexdigest()
    if not path and digest not in OFFICIAL:
        raise DataError(f"{file} is damaged; remove it and pass --download again")
    source = f"{file.name}, sha256 {digest[:12]}..., which is not an official one"
    return parse(blob, file.name)._replace(source=f"IMDB, {OFFICIAL.get(digest, source)}")


def _download(url: str, path: Path) -> None:
    """Writes a file that is complete and official, or none."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            blob = response.read(MAX_FILE_BYTES)
        if hashlib.sha256(blob).hexdigest() not in OFFICIAL:
            raise DataError(f"the file at {url} has no official sha256 and was not read")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(blob)
        part.replace(path)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        part.unlink(missing_ok=True)
        raise DataError(f"the download of {url} to {path} failed: {error}") from error


def parse(blob: bytes, name: str) -> Corpus:
    """Reads either form, which its first bytes tell apart.

    Raises:
        DataError: it is neither, or it is damaged or hostile.
    """
    reader = {b"PK": _read_npz, b"\x1f\x8b": _read_tar}.get(blob[:2])
    if reader is None:
        raise DataError(f"{name} is neither Keras' imdb.npz nor Stanford's aclImdb tar.gz")
    try:
        return reader(blob, name)
    except DataError:
        raise
    except Exception as error:  # damaged zips and pickles raise errors of many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{name} is damaged ({reason})") from error


def _read_npz(blob: bytes, name: str) -> Corpus:
    from numpy import load
    from numpy.lib import format as npy

    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sorted(sizes) != ["x_test.npy", "x_train.npy", "y_test.npy", "y_train.npy"]:
            raise DataError(f"{name} does not hold x_train, y_train, x_test and y_test")
        if sum(sizes.values()) > MAX_UNPACKED_BYTES:
            raise DataError(f"{name} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
        members = {member: io.BytesIO(archive.read(member)) for member in sizes}

    def split(part: str) -> Reviews:
        labels = load(members[f"y_{part}.npy"], allow_pickle=False).tolist()
        file = members[f"x_{part}.npy"]
        npy.read_magic(file)
        npy.read_array_header_1_0(file)
        return _reviews(_unpickle(file, name), labels, f"{part} of {name}")

    return Corpus(split("train"), split("test"))


def _unpickle(file: io.BytesIO, name: str) -> Any:
    """Returns the elements of a pickled object array without running code from the pickle.

    The names that a pickled array needs are replaced by a class that only stores its state, so
    numpy is never given that state. All other names are refused.
    """

    class Stored:
        def __init__(self, *args):
            pass

        def __setstate__(self, state):
            self.state = state

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, attribute):
            if f"{module}.{attribute}".replace("._core.", ".core.") not in (
                "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct",
            ):  # fmt: skip
                raise DataError(f"{name} holds a pickle that asks for {module}.{attribute}")
            return Stored

    # The state of an array is its version, shape, dtype, order and elements.
    return Unpickler(file).load().state[4]


_REVIEW = re.compile(r"aclImdb/(train|test)/(neg|pos)/(\d{1,9})_\d{1,2}\.txt")
_SEPARATORS = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n\r', " "))


def _read_tar(blob: bytes, name: str) -> Corpus:
    """Ranks words by frequency in the training reviews, ties alphabetically, as Keras does."""
    unpacked = gzip.GzipFile(fileobj=io.BytesIO(blob)).read(MAX_UNPACKED_BYTES + 1)
    if len(unpacked) > MAX_UNPACKED_BYTES:
        raise DataError(f"{name} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
    number: dict[str, int] = {}  # of each word, in order of appearance
    parts: dict[str, dict[tuple[str, int], list[int]]] = {"train": {}, "test": {}}
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
        for member in tar:
            tarfile.data_filter(member, "/nowhere")  # raises for paths and links that lead outside
            match = _REVIEW.fullmatch(member.name.removeprefix("./"))
            if match and member.isreg() and (file := tar.extractfile(member)):
                words = file.read().decode().lower().translate(_SEPARATORS).split()
                review = [number.setdefault(word, len(number)) for word in words]
                parts[match[1]][match[2], int(match[3])] = review
        if unpacked[tar.offset :].strip(b"\0"):  # tarfile ends quietly at a broken header
            raise DataError(f"{name} is damaged (a header of the tar is broken)")
    counts = Counter(chain.from_iterable(parts["train"].values()))
    ranked = sorted((-counts[n], word, n) for word, n in number.items() if counts[n])
    rank = {n: min(i, MAX_RANK) for i, (_, _, n) in enumerate(ranked, start=1)}
    last = min(len(rank) + 1, MAX_RANK)  # of words that only the test reviews have

    def split(part: str) -> Reviews:
        reviews = sorted(parts[part].items())  # the order of members means nothing
        lists = [[rank.get(n, last) for n in review] for _, review in reviews]
        return _reviews(lists, [int(kind == "pos") for (kind, _), _ in reviews], name)

    return Corpus(split("train"), split("test"))


def _reviews(lists: Any, labels: list[int], name: str) -> Reviews:
    """Lays lists end to end, and checks all that later code relies on."""
    if not isinstance(lists, list) or not all(type(r) is list and r for r in lists):
        raise DataError(f"{name} holds a review that is not a list of at least one word rank")
    if len(labels) != len(lists) or {str(label) for label in labels} != {"0", "1"}:
        raise DataError(f"{name} does not have one label, 0 or 1, for each of {len(lists)} reviews")
    lengths = [len(review) for review in lists]
    if sum(lengths) > MAX_WORDS:  # a short pickle can repeat one long list
        raise DataError(f"{name} holds more than {MAX_WORDS:,} words")
    ids = torch.frombuffer(array("i", chain.from_iterable(lists)), dtype=torch.int32)
    if int(ids.min()) < 1 or int(ids.max()) > MAX_RANK:
        raise DataError(f"{name} holds word ranks outside 1 to {MAX_RANK}")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Reviews(ids, offsets, torch.tensor(labels, dtype=torch.uint8))


def generate(train: int = 25_000, test: int = 25_000, seed: int = 0) -> Corpus:
    """Generates reviews with IMDB's statistics; half of them are good.

    Lengths are log-normal with a median of 177 and a mean of 238 words; word frequencies follow
    Zipf's law with a bend. Every eighth word from the 21st on leans to good or bad reviews, by 0.7
    in log odds, so that a bag of words classifies 0.88 of them, as on IMDB.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, MAX_RANK + 1, dtype=torch.float64)
    common = (rank + 2) ** -1.05
    frequency = torch.where(rank > 3_000, common[2_999] * (rank / 3_000) ** -1.7, common)
    lean = torch.zeros(MAX_RANK, dtype=torch.float64)
    lean[20::16], lean[28::16] = 0.35, -0.35
    curves = [(frequency * (side * lean).exp()).cumsum(0) for side in (-1, 1)]

    def split(count: int) -> Reviews:
        normal = torch.randn(count, generator=generator)
        lengths = (177 * (math.sqrt(2 * math.log(238 / 177)) * normal).exp()).long()
        lengths = lengths.clamp(10, 2493)
        labels = torch.arange(count) % 2
        label = torch.repeat_interleave(labels, lengths)  # of each word
        uniform = torch.rand(len(label), dtype=torch.float64, generator=generator)
        bad, good = (torch.searchsorted(curve / curve[-1], uniform) for curve in curves)
        ids = torch.where(label == 1, good, bad).to(torch.int32) + 1
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        return Reviews(ids, offsets, labels.to(torch.uint8))

    return Corpus(split(train), split(test))


def padded(reviews: Reviews, vocabulary: int, length: int) -> tuple[Tensor, Tensor]:
    """Cuts or pads every review at its end, in Keras' ids.

    Returns:
        ids int64 ``[N, length]``, start token first and 0 after the end, and lengths int64 ``[N]``.
    """
    offsets, words = reviews.offsets[:-1, None], reviews.offsets.diff()[:, None]
    position = torch.arange(length - 1)
    index = (offsets + position).clamp_(max=len(reviews.ids) - 1)
    ids = reviews.ids[index].long() + FIRST
    ids[ids >= vocabulary] = RARE
    ids[position >= words] = 0
    start = torch.full((len(words), 1), START)
    return torch.cat((start, ids), 1), (words[:, 0] + 1).clamp(max=length)


def sine(points: int = 500) -> Tensor:
    """Returns ten periods of a sine wave."""
    return torch.linspace(0, 20 * math.pi, points, dtype=torch.float64).sin()


def prices(days: int = 500, seed: int = 0) -> Tensor:
    """Returns a share price: a trend from 100 to 150, a season and noise."""
    noise = torch.randn(days, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    trend = torch.linspace(100, 150, days, dtype=torch.float64)
    season = 10 * torch.linspace(0, 8 * math.pi, days, dtype=torch.float64).sin()
    return trend + season + 3 * noise


def windows(series: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Returns all windows ``[N - length, length, 1]`` of a series ``[N]`` and their next values.

    Raises:
        ValueError: the series is not longer than one window.
    """
    if len(series) <= length:
        raise ValueError(f"a series of {len(series)} values has no window of {length} and a target")
    cut = series.float().unfold(0, length, 1)[:-1]
    return cut.unsqueeze(-1).contiguous(), series[length:].float()


class Scale(NamedTuple):
    """The range that is mapped to [0, 1], and back."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, series: Tensor, known: int) -> Scale:
        """The range of the first ``known`` values, so that no later value is used."""
        return cls(series[:known].min(), series[:known].max())

    def apply(self, values: Tensor) -> Tensor:
        return (values - self.low) / (self.high - self.low)

    def invert(self, scaled: Tensor) -> Tensor:
        return self.low + scaled * (self.high - self.low)

"""The data of the workloads: IMDB reviews, real or generated, and two series.

Cite the reviews as Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011. They have
no licence and are not part of this project. A file is not trusted: its pickles are read by an
unpickler that only builds lists.
"""

import hashlib
import io
import math
import os
import pickle
import urllib.request
import zipfile
from array import array
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import UserError

#: sha256 of the file that Keras publishes.
OFFICIAL = "69664113be75683a8fe16e3ed0ab59fda8886cb3cd7ada244f7d9544e4676b9f"
KERAS_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/imdb.npz"
#: Limits for hostile files. Keras' has 17 MB and 12 M words.
MAX_FILE_BYTES, MAX_UNPACKED_BYTES, MAX_WORDS = 1 << 28, 1 << 29, 50_000_000
#: Keras' conventions: 0 pads, 1 starts a review, 2 replaces rare words, rank 1 becomes 4.
START, RARE, FIRST = 1, 2, 3
MAX_RANK = 88_584


class Reviews(NamedTuple):
    """Reviews laid end to end, as word ranks; rank 1 is the most frequent word."""

    ids: Tensor  # int32 [words]
    offsets: Tensor  # int64 [reviews + 1]
    labels: Tensor  # int64 [reviews], 1 for a good one


class Corpus(NamedTuple):
    train: Reviews
    test: Reviews
    source: str = ""


def load(path: Any, download: bool = False, seed: int = 0, needed: int = 25_000) -> Corpus:
    """Returns the reviews of a file, of the cache, of a download, or generated ones.

    The file is Keras' ``imdb.npz``, by default that of ``FUSEDRNN_IMDB``. A download is kept in the
    cache, ``$XDG_CACHE_HOME/fusedrnn``. Twice as many reviews are generated as are ``needed``,
    because they are drawn at random, as from a file.
    """
    path = path or os.environ.get("FUSEDRNN_IMDB")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedrnn/imdb.npz"
    if not path and download and not cache.exists():
        _download(cache)
    if not path and not cache.exists():
        source = "generated reviews with IMDB's statistics (real ones: --imdb PATH or --download)"
        count = min(2 * needed, 25_000)
        return generate(count, count, seed)._replace(source=source)
    file = Path(path or cache)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{file} is larger than {MAX_FILE_BYTES:,} bytes")
        blob = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    official = hashlib.sha256(blob).hexdigest() == OFFICIAL
    if not path and not official:
        raise UserError(f"{file} is damaged; remove it and pass --download again")
    source = "IMDB, Keras' imdb.npz" if official else f"{file.name}, which is not Keras' own"
    return parse(blob, file.name)._replace(source=source)


def _download(cache: Path) -> None:
    """Writes Keras' file if it is complete, or none; ``load`` checks its sha256 once more."""
    try:
        with urllib.request.urlopen(KERAS_URL, timeout=60) as response:
            blob = response.read(MAX_FILE_BYTES)
        if hashlib.sha256(blob).hexdigest() != OFFICIAL:
            raise ValueError("its sha256 is not the official one")
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_bytes(blob)
    except (OSError, ValueError) as error:
        raise UserError(f"the download of {KERAS_URL} failed: {error}") from error


def parse(blob: bytes, name: str) -> Corpus:
    """Reads the content of an ``imdb.npz``; an error is one sentence that begins with the name."""
    members = ["x_test.npy", "x_train.npy", "y_test.npy", "y_train.npy"]
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            if sorted(archive.namelist()) != members:
                raise UserError("does not hold x_train, y_train, x_test and y_test")
            if sum(info.file_size for info in archive.infolist()) > MAX_UNPACKED_BYTES:
                raise UserError(f"unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
            return Corpus(_part(archive, "train"), _part(archive, "test"))
    except UserError as error:
        raise UserError(f"{name} {error}") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{name} is damaged, or no npz file ({error})") from error
    except Exception as error:  # damaged pickles raise errors of many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{name} is damaged ({reason})") from error


def _part(archive: zipfile.ZipFile, part: str) -> Reviews:
    from numpy import load
    from numpy.lib import format as npy

    labels = load(io.BytesIO(archive.read(f"y_{part}.npy")), allow_pickle=False).tolist()
    lists = io.BytesIO(archive.read(f"x_{part}.npy"))
    npy.read_magic(lists)
    npy.read_array_header_1_0(lists)
    # The state of a pickled array is its version, shape, dtype, order and elements.
    return _reviews(_Unpickler(lists).load().state[4], labels)


class _Unpickler(pickle.Unpickler):
    """Reads a pickled array of lists without running code: it builds ``_Stored`` objects only."""

    def find_class(self, module: str, name: str) -> type:
        if f"{module}.{name}".replace("._core.", ".core.") not in (
            "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct",
        ):  # fmt: skip
            raise UserError(f"holds a pickle that asks for {module}.{name}")
        return _Stored


class _Stored:
    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _reviews(lists: Any, labels: list[int]) -> Reviews:
    """Lays lists end to end, and checks all that later code relies on."""
    if not isinstance(lists, list) or not all(type(r) is list and r for r in lists):
        raise UserError("holds a review that is not a list of at least one word rank")
    if len(labels) != len(lists) or {str(label) for label in labels} != {"0", "1"}:
        raise UserError(f"does not have one label, 0 or 1, for each of {len(lists)} reviews")
    lengths = [len(review) for review in lists]
    if sum(lengths) > MAX_WORDS:  # a short pickle can repeat one long list
        raise UserError(f"holds more than {MAX_WORDS:,} words")
    ids = torch.frombuffer(array("i", chain.from_iterable(lists)), dtype=torch.int32)
    if int(ids.min()) < 1 or int(ids.max()) > MAX_RANK:
        raise UserError(f"holds word ranks outside 1 to {MAX_RANK}")
    return Reviews(ids, torch.tensor([0, *lengths]).cumsum(0), torch.tensor(labels))


def generate(train: int = 25_000, test: int = 25_000, seed: int = 0) -> Corpus:
    """Generates reviews with IMDB's lengths and word frequencies; half of them are good.

    Every eighth word from the 21st on leans to good or bad reviews, by 0.7 in log odds, so that a
    bag of words classifies 0.88 of them, as on IMDB.
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
        return Reviews(ids, nn.functional.pad(lengths.cumsum(0), (1, 0)), labels)

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
    return nn.functional.pad(ids, (1, 0), value=START), (words[:, 0] + 1).clamp(max=length)


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
    """Returns all windows ``[N - length, length, 1]`` of a series ``[N]`` and their next values."""
    return series.float().unfold(0, length, 1)[:-1].unsqueeze(-1), series[length:].float()


def rescaled(series: Tensor, known: int) -> Tensor:
    """Maps the range of the first ``known`` values to [0, 1], so that no later value is used."""
    low, high = series[:known].aminmax()
    return (series - low) / (high - low)

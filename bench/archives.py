"""Reads the two published forms of the IMDB reviews from bytes that nobody vouches for.

``imdb.npz`` (Keras) holds pickled lists and ``aclImdb_v1.tar.gz`` (Stanford) holds 100,000 small
files. Both come over the network, so neither ``np.load(allow_pickle=True)``, which runs whatever
the pickle says, nor ``tarfile.extractall``, which writes wherever the tar says, is used: pickles
meet an unpickler that can only build lists, and no member of a tar ever becomes a file.
"""

from __future__ import annotations

import ast
import gzip
import io
import pickle
import re
import tarfile
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

#: Words in Keras' index; the largest rank a review may hold.
MAX_RANK = 88_584
#: The official x_train.npy is 15 MB and the official tar unpacks to under 400 MB.
MAX_MEMBER_BYTES = 1 << 27
MAX_TAR_BYTES = 1 << 30
MAX_TAR_MEMBERS = 250_000
#: The longest official review has 14 KB. Words are counted in this bound too.
MAX_REVIEW_BYTES = 1 << 20
MAX_WORDS = 50_000_000


class DataError(ValueError):
    """The data is missing, damaged or not what it claims to be; the message is one sentence."""


class Reviews(NamedTuple):
    """Ragged reviews, laid end to end; ranks count from 1, the most frequent word."""

    ids: Tensor  # int32 [words]
    offsets: Tensor  # int64 [reviews + 1]
    labels: Tensor  # uint8 [reviews], 1 for a good one

    def __len__(self) -> int:
        return len(self.labels)


class Splits(NamedTuple):
    train: Reviews
    test: Reviews


def parse(blob: bytes, name: str) -> Splits:
    """Reads either form, told apart by its first bytes.

    Raises:
        DataError: it is neither, or it is damaged, or it does what a data file should not.
    """
    if blob[:4] == b"PK\x03\x04":
        return read_npz(blob, name)
    if blob[:2] == b"\x1f\x8b":
        return read_tar(blob, name)
    raise DataError(f"{name} is neither Keras' imdb.npz nor Stanford's aclImdb tar.gz")


def read_npz(blob: bytes, name: str) -> Splits:
    """Reads Keras' layout: pickled lists ``x_train, x_test`` and integers ``y_train, y_test``."""
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            members = _npz_members(archive, name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{name} is a damaged npz file ({error})") from error
    splits = (
        _reviews(
            _unpickle_lists(members[f"x_{split}"], f"x_{split} of {name}"),
            _read_labels(members[f"y_{split}"], f"y_{split} of {name}"),
            f"{split} of {name}",
        )
        for split in ("train", "test")
    )
    return Splits(*splits)


def _npz_members(archive: zipfile.ZipFile, name: str) -> dict[str, bytes]:
    expected = {f"{x}_{split}.npy" for x in "xy" for split in ("train", "test")}
    infos = archive.infolist()
    found = sorted(info.filename for info in infos)
    if found != sorted(expected):
        raise DataError(f"{name} holds {_listing(found)}; expected {_listing(sorted(expected))}")
    members = {}
    for info in infos:
        if info.file_size > MAX_MEMBER_BYTES:
            raise DataError(
                f"{info.filename} of {name} unpacks to {info.file_size:,} bytes; "
                f"at most {MAX_MEMBER_BYTES:,} are read"
            )
        members[info.filename.removesuffix(".npy")] = archive.read(info)
    return members


def _listing(names: list[str], most: int = 6) -> str:
    shown = ", ".join(repr(n) for n in names[:most]) or "nothing"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _npy_header(blob: bytes, name: str) -> tuple[str, int, bytes]:
    """Returns descr, length and payload of a 1-D array in the npy format, versions 1 and 2."""
    width = {b"\x93NUMPY\x01": 2, b"\x93NUMPY\x02": 4}.get(blob[:7])
    if width is None:
        raise DataError(f"{name} is not an npy array")
    start = 8 + width
    end = start + int.from_bytes(blob[8:start], "little")
    try:
        header = ast.literal_eval(blob[start : min(end, start + 10_000)].decode("latin1"))
        descr, shape = header["descr"], header["shape"]
        (length,) = shape
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise DataError(f"{name} has no header of a one-dimensional npy array") from error
    if not isinstance(descr, str) or not isinstance(length, int) or length < 0:
        raise DataError(f"{name} has descr {descr!r} and shape {shape!r}; it must be 1-D")
    return descr, length, blob[end:]


def _read_labels(blob: bytes, name: str) -> Tensor:
    descr, length, payload = _npy_header(blob, name)
    if descr != "<i8":
        raise DataError(f"{name} has dtype {descr!r}; expected '<i8'")
    if len(payload) != 8 * length:
        raise DataError(f"{name} has {len(payload):,} bytes; {length:,} labels need {8 * length:,}")
    labels = torch.frombuffer(bytearray(payload), dtype=torch.int64) if length else torch.empty(0)
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise DataError(f"{name} holds labels other than 0 and 1")
    return labels.to(torch.uint8)


def _unpickle_lists(blob: bytes, name: str) -> list[list[int]]:
    """Returns the elements of a pickled object array without running any of its code.

    Pickles of numpy arrays name three globals. They are replaced by stand-ins that only remember
    what they are given, so no foreign value ever reaches numpy; every other name is refused.
    """
    descr, length, payload = _npy_header(blob, name)
    if descr != "|O":
        raise DataError(f"{name} has dtype {descr!r}; expected '|O', lists of word ranks")

    class Remembered:  # a new class for every file: a pickle may write into what it is given
        state = None

        def __init__(self, *args):
            pass

        def __setstate__(self, state):
            self.state = state

    admitted = {("numpy", "ndarray"): Remembered, ("numpy", "dtype"): Remembered}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        admitted[module, "_reconstruct"] = Remembered

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, attribute):
            if (module, attribute) not in admitted:
                raise DataError(
                    f"{name} is a pickle that asks for {module}.{attribute}; "
                    "only numpy arrays of lists are read"
                )
            return admitted[module, attribute]

    try:
        found = Unpickler(io.BytesIO(payload)).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise nearly anything, says its manual
        raise DataError(f"{name} is a damaged pickle ({type(error).__name__})") from error
    state = found.state if isinstance(found, Remembered) else None
    # What ndarray.__reduce__ leaves: version, shape, dtype, Fortran order, elements.
    elements = state[4] if isinstance(state, tuple) and len(state) == 5 else None
    if not isinstance(elements, list) or len(elements) != length:
        raise DataError(f"{name} does not hold the {length:,} elements that its header announces")
    return elements


def read_tar(blob: bytes, name: str) -> Splits:
    """Reads Stanford's layout, ``aclImdb/{train,test}/{neg,pos}/ID_RATING.txt``, as word ranks.

    Words are ranked by frequency over the training reviews, ties in alphabetical order, as Keras'
    index does; the rarest share the last rank with the words that only the test reviews have.
    """
    texts: dict[tuple[str, str], list[tuple[int, list[str]]]] = {
        (split, label): [] for split in ("train", "test") for label in ("neg", "pos")
    }
    try:
        with (
            _Bounded(fileobj=io.BytesIO(blob)) as unzipped,
            tarfile.open(fileobj=unzipped, mode="r:") as tar,
        ):
            for split, label, number, text in _tar_reviews(tar, name):
                texts[split, label].append((number, _words(text)))
            unzipped.expect_only_zeros(name)
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{name} is a damaged tar.gz file ({error})") from error
    for (split, label), reviews in texts.items():
        if not reviews:
            raise DataError(f"{name} has no review at aclImdb/{split}/{label}/ID_RATING.txt")
        reviews.sort()  # by ID: the order of a tar's members means nothing

    train = chain(texts["train", "neg"], texts["train", "pos"])
    counts = Counter(chain.from_iterable(words for _, words in train))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    rank = {word: min(i, MAX_RANK) for i, word in enumerate(ranked, start=1)}
    last = min(len(rank) + 1, MAX_RANK)

    def split_of(split: str) -> Reviews:
        pairs = [(w, y) for y, k in enumerate(("neg", "pos")) for _, w in texts[split, k]]
        lists = [[rank.get(word, last) for word in words] for words, _ in pairs]
        labels = torch.tensor([y for _, y in pairs], dtype=torch.uint8)
        return _reviews(lists, labels, f"{split} of {name}")

    return Splits(split_of("train"), split_of("test"))


class _Bounded(gzip.GzipFile):
    """Refuses the huge reads that a forged extended header makes tarfile do in one piece."""

    last = b""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_MEMBER_BYTES:
            raise DataError("a header of the tar announces more bytes than memory should hold")
        self.last = super().read(size)
        return self.last

    def expect_only_zeros(self, name: str) -> None:
        """Reads to the end: tarfile stops in silence at a broken header, and before the CRC."""
        rest = 0
        while rest <= MAX_TAR_BYTES and self.last:
            if self.last.strip(b"\0"):
                raise DataError(f"{name} is a damaged tar.gz file (what follows is no tar)")
            rest += len(self.read(1 << 20))


_REVIEW = re.compile(r"aclImdb/(train|test)/(neg|pos)/(\d{1,9})_\d{1,2}\.txt")


def _tar_reviews(tar: tarfile.TarFile, name: str) -> Iterator[tuple[str, str, int, str]]:
    total = 0
    for count, member in enumerate(tar):
        path = member.name.removeprefix("./")
        total += member.size
        if path.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", path):
            raise DataError(f"{name} holds the path {path!r}, which leads out of its folder")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise DataError(f"{name} holds {path!r}, which is neither a plain file nor a folder")
        if total > MAX_TAR_BYTES or count >= MAX_TAR_MEMBERS:
            raise DataError(
                f"{name} unpacks to more than {MAX_TAR_BYTES:,} bytes or {MAX_TAR_MEMBERS:,} files"
            )
        match = _REVIEW.fullmatch(path)
        if match is None or not member.isreg():
            continue
        if member.size > MAX_REVIEW_BYTES:
            raise DataError(
                f"{path} of {name} has {member.size:,} bytes; a review has at most "
                f"{MAX_REVIEW_BYTES:,}"
            )
        file = tar.extractfile(member)
        body = file.read() if file else b""
        if len(body) != member.size:
            raise DataError(f"{name} is a damaged tar.gz file (it ends inside {path})")
        yield match[1], match[2], int(match[3]), body.decode("utf-8")


_SEPARATORS = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n\r', " "))


def _words(text: str) -> list[str]:
    return text.lower().translate(_SEPARATORS).split()


def _reviews(lists: list[list[int]], labels: Tensor, name: str) -> Reviews:
    """Lays lists end to end, and checks everything that later code relies on."""
    if len(lists) != len(labels) or not lists:
        raise DataError(f"{name} has {len(lists):,} reviews and {len(labels):,} labels")
    if not all(type(review) is list and review for review in lists):
        raise DataError(f"{name} holds a review that is not a list of at least one word rank")
    lengths = [len(review) for review in lists]
    if sum(lengths) > MAX_WORDS:  # a few bytes of pickle can repeat one long list for ever
        raise DataError(f"{name} holds {sum(lengths):,} words; at most {MAX_WORDS:,} are read")
    try:
        ids = torch.frombuffer(array("i", chain.from_iterable(lists)), dtype=torch.int32)
    except (TypeError, OverflowError) as error:
        raise DataError(f"{name} holds word ranks that are no 32-bit integers") from error
    if int(ids.min()) < 1 or int(ids.max()) > MAX_RANK:
        raise DataError(
            f"{name} holds word ranks from {int(ids.min())} to {int(ids.max())}; "
            f"they must lie between 1 and {MAX_RANK}"
        )
    if len(labels.unique()) != 2:
        raise DataError(f"{name} has reviews of one kind only")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Reviews(ids, offsets, labels)

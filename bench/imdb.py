"""Finds IMDB reviews: a file the user names, the cache, a download if asked, or made-up ones.

Cite the data as Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011. It carries
no licence and is not part of this project.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .archives import DataError, Reviews, Splits, parse
from .generated import generate

#: sha256 of what Keras and Stanford publish.
OFFICIAL = {
    "69664113be75683a8fe16e3ed0ab59fda8886cb3cd7ada244f7d9544e4676b9f": "Keras' imdb.npz",
    "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe": "Stanford's aclImdb_v1",
}
KERAS_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/imdb.npz"
#: The official files have 17 MB and 84 MB.
MAX_FILE_BYTES = 1 << 28
_CACHE_MAGIC = b"fusedrnn imdb 1\n"
#: Keras' conventions: 0 pads, 1 starts a review, 2 stands for rarer words, ranks are moved by 3.
START, RARE, FIRST = 1, 2, 3


class Corpus(NamedTuple):
    """Reviews and, in words, where they come from."""

    splits: Splits
    source: str


def load(
    path: str | os.PathLike | None = None,
    *,
    download: bool = False,
    cache: Path | None = None,
    url: str = KERAS_URL,
    official: dict[str, str] = OFFICIAL,
    seed: int = 0,
    reviews: int = 25_000,
) -> Corpus:
    """Returns the reviews that are at hand, verified before they are read.

    Args:
        path: Keras' ``imdb.npz`` or Stanford's tar.gz. A file named here may have a digest of its
            own; the source then says so. Default: the environment's ``FUSEDRNN_IMDB``.
        download: fetch Keras' file if it is neither named nor in the cache.
        cache: a folder; default ``$XDG_CACHE_HOME/fusedrnn``.
        url: where ``download`` fetches from.
        official: sha256 to name of the files to be trusted without being named.
        seed: of the made-up reviews, used when there is no file.
        reviews: how many made-up reviews a split has.

    Raises:
        DataError: the file is missing, damaged, forged or malicious. The cache is as it was.
    """
    path = path or os.environ.get("FUSEDRNN_IMDB") or None
    cache = _default_cache() if cache is None else cache
    if path is not None:
        return _named(Path(path), cache, official)
    for digest, name in official.items():
        if (splits := _read_cache(cache, digest)) is not None:
            return Corpus(splits, f"IMDB, {name}")
    if download:
        return _downloaded(url, cache, official)
    return Corpus(
        generate(reviews, reviews, seed),
        "generated reviews with IMDB's statistics (--imdb PATH or --download takes the real ones)",
    )


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedrnn"


def _named(path: Path, cache: Path, official: dict[str, str]) -> Corpus:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        blob = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(blob).hexdigest()
    if digest in official:
        source = f"IMDB, {official[digest]}, digest verified"
    else:
        source = f"IMDB from {path.name} as named by the user, sha256 {digest[:12]}… not official"
    splits = _read_cache(cache, digest)
    if splits is None:
        splits = parse(blob, path.name)
        _write_cache(cache, digest, splits)
    return Corpus(splits, source)


def _downloaded(url: str, cache: Path, official: dict[str, str]) -> Corpus:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            blob = response.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # URLError is an OSError
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DataError(f"the download of {url} failed: {reason}") from error
    digest = hashlib.sha256(blob).hexdigest()
    if digest not in official:
        raise DataError(
            f"what {url} sent has sha256 {digest}, which is not an official one; nothing was read"
        )
    splits = parse(blob, url.rpartition("/")[2])
    _write_cache(cache, digest, splits)
    return Corpus(splits, f"IMDB, {official[digest]}, downloaded, digest verified")


def _cache_file(cache: Path, digest: str) -> Path:
    return cache / f"imdb-{digest[:16]}.bin"


def _write_cache(cache: Path, digest: str, splits: Splits) -> None:
    """Writes flat arrays behind their own digest, to a temporary file that then takes the name."""
    parts = [t.numpy().tobytes() for t in (*splits.train, *splits.test)]
    header = {
        "origin": digest,
        "sha256": hashlib.sha256(b"".join(parts)).hexdigest(),
        "bytes": [len(part) for part in parts],
    }
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache, prefix=".imdb-")
    except OSError as error:
        warnings.warn(f"nothing is cached: {cache}: {error.strerror}", stacklevel=2)
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_CACHE_MAGIC + json.dumps(header).encode() + b"\n")
            file.writelines(parts)
        os.replace(temporary, _cache_file(cache, digest))
    except BaseException:
        os.unlink(temporary)
        raise


def _read_cache(cache: Path, digest: str) -> Splits | None:
    file = _cache_file(cache, digest)
    if not file.exists():
        return None
    complaint = DataError(f"the cached {file} is damaged; remove it, and it is made anew")
    blob = file.read_bytes()
    magic, rest = blob[: len(_CACHE_MAGIC)], blob[len(_CACHE_MAGIC) :]
    line, _, body = rest.partition(b"\n")
    if magic != _CACHE_MAGIC:
        raise complaint
    try:
        header = json.loads(line)
        sizes, origin, sha256 = header["bytes"], header["origin"], header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise complaint from error
    if origin != digest or sha256 != hashlib.sha256(body).hexdigest() or len(sizes) != 6:
        raise complaint
    dtypes = (torch.int32, torch.int64, torch.uint8) * 2
    tensors, start = [], 0
    for size, dtype in zip(sizes, dtypes, strict=True):
        tensors.append(torch.frombuffer(bytearray(body[start : start + size]), dtype=dtype))
        start += size
    return Splits(Reviews(*tensors[:3]), Reviews(*tensors[3:]))


def padded(reviews: Reviews, vocabulary: int, length: int) -> tuple[Tensor, Tensor]:
    """Cuts or pads every review at its end, with Keras' ids.

    Args:
        reviews: N reviews.
        vocabulary: ids from 0 to this; rarer words become 2.
        length: T, the start token included.

    Returns:
        ids int64 ``[N, T]``, 0 behind the end, and lengths int64 ``[N]``.
    """
    offsets = reviews.offsets[:-1, None]
    words = reviews.offsets.diff()[:, None]
    position = torch.arange(length - 1)
    inside = position < words
    index = (offsets + position).clamp_(max=len(reviews.ids) - 1)
    ids = reviews.ids[index].long() + FIRST
    ids[ids >= vocabulary] = RARE
    ids[~inside] = 0
    start = torch.full((len(reviews), 1), START)
    return torch.cat((start, ids), 1), (words[:, 0] + 1).clamp(max=length)

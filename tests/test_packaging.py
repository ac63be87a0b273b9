"""Tests of the wheel and the sdist, which are built from a copy of the checkout without network."""

import os
import shutil
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from processes import ROOT, python

import fusedrnn

# Under pytest-xdist one group runs in one process, which builds once.
pytestmark = pytest.mark.xdist_group("packaging")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
USE = """
import importlib.metadata, torch, fusedrnn
import fusedrnn.kernels.expected as expected
assert expected.read(expected.PREDICTED) and expected.read(expected.PUBLISHED)
print(fusedrnn.__file__)
print(importlib.metadata.version("fusedrnn"))
print(tuple(fusedrnn.LSTM(3, 4)(torch.zeros(5, 2, 3))[0].shape))
"""


def run(*arguments: object, cwd: Path, path: str | None = None) -> str:
    """Runs Python without this process's PYTHONPATH, which would find the checkout."""
    done = python(*arguments, cwd=cwd, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")

    def build(kind: str, source: Path) -> Path:
        (folder / kind).mkdir()
        run("-c", BUILD.format(kind), folder / kind, cwd=source)
        (made,) = (folder / kind).iterdir()
        return made

    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=ignore)
    sdist = build("sdist", folder / "checkout")
    shutil.unpack_archive(sdist, folder, filter="data")
    return sdist, build("wheel", folder / sdist.name.removesuffix(".tar.gz"))


def test_wheel_holds_the_package_and_needs_torch_alone(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    package = {name: text for name, text in texts.items() if ".dist-info/" not in name}
    kinds = ("*.py", "kernels/*.py", "kernels/*.csv", "py.typed")
    paths = [path for kind in kinds for path in (ROOT / "fusedrnn").glob(kind)]
    assert package == {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths}
    assert wheel.name == f"fusedrnn-{fusedrnn.__version__}-py3-none-any.whl"
    assert any(name.endswith("/licenses/LICENSE") for name in texts)
    (name,) = [name for name in texts if name.endswith(".dist-info/METADATA")]
    metadata = HeaderParser().parsestr(texts[name].decode())
    always = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [need.partition(">=")[0] for need in always] == ["torch"]


def test_sdist_holds_kernels_as_files_and_no_tests(built):
    with tarfile.open(built[0]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert members.keys() >= {"fusedrnn/kernels/plan.py", "README.md", "CHANGELOG.md"}
    assert not [name for name in members if name.startswith(("tests", "bench", "kernels"))]


def test_wheel_installs_and_runs(built, tmp_path):
    """Beside torch, but without the .pth files that lead to the checkout."""
    pip = ("-m", "pip", "install", "--no-index", "--no-deps", "--target", tmp_path)
    run(*pip, built[1], cwd=tmp_path)
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    place, version, shape = run("-S", "-c", USE, cwd=tmp_path, path=path).splitlines()
    assert place == str(tmp_path / "fusedrnn" / "__init__.py")
    assert (version, shape) == (fusedrnn.__version__, "(5, 2, 4)")

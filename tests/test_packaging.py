"""Tests of the wheel and the sdist, which are built from a copy of the checkout without network."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from processes import ROOT

import fusedrnn

PACKAGE = ROOT / "fusedrnn"
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


def run(*command: object, cwd: Path) -> str:
    """Runs without this process's PYTHONPATH, which would find the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds "wheel" or "sdist" of a source tree with setuptools."""
    target.mkdir()
    run(sys.executable, "-c", BUILD.format(kind), target, cwd=source)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=ignore)
    return build("sdist", folder / "checkout", folder / "dist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder / "dist")


def modules() -> set[str]:
    """Returns every module and table of the checkout by the path it has in a wheel."""
    paths = [p for kind in ("*.py", "kernels/*.py", "kernels/*.csv") for p in PACKAGE.glob(kind)]
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_wheel_holds_the_package_and_needs_torch_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    package = {name: text for name, text in texts.items() if ".dist-info/" not in name}
    assert package.keys() == modules() | {"fusedrnn/py.typed"}
    assert package == {name: (ROOT / name).read_bytes() for name in package}
    assert wheel.name == f"fusedrnn-{fusedrnn.__version__}-py3-none-any.whl"
    assert any(name.endswith("/licenses/LICENSE") for name in texts)
    (name,) = [name for name in texts if name.endswith(".dist-info/METADATA")]
    metadata = HeaderParser().parsestr(texts[name].decode())
    always = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [need.partition(">=")[0] for need in always] == ["torch"]


def test_sdist_holds_kernels_as_files_and_no_tests(sdist):
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    files = {name for name, member in members.items() if member.isfile()}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert files >= modules() | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"}
    assert not [name for name in files if name.startswith(("tests/", "bench/", "kernels/"))]


def test_wheel_installs_into_an_empty_environment(wheel, tmp_path):
    """The new environment borrows torch, but nothing of this one's fusedrnn."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import site; print(site.getsitepackages()[0])"
    site = Path(run(python, "-c", where, cwd=tmp_path).strip())
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    # A line in a .pth file adds the folder, but not what the .pth files in that folder add.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    place, version, shape = run(python, "-c", USE, cwd=tmp_path).splitlines()
    assert place == str(site / "fusedrnn" / "__init__.py")
    assert (version, shape) == (fusedrnn.__version__, "(5, 2, 4)")

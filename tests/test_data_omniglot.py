"""Omniglot: found wherever it is, verified by content, decoded once, split without leaks.

Everything runs on a small archive drawn here; set METATUTOR_DATA to a folder with the real one to test that too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from filelock import FileLock
from PIL import Image, ImageDraw

from metatutor.data import omniglot as module
from metatutor.data.omniglot import DownloadError, Omniglot, _Part, download, info, one_shot_runs, verify
from metatutor.episodes import EpisodeSampler, EpisodeSpec

OFFICIAL = module._OFFICIAL  # before a test replaces it
REAL = os.environ.get("METATUTOR_DATA")
needs_omniglot = pytest.mark.skipif(not REAL, reason="set METATUTOR_DATA to a folder with the real Omniglot")
CHARACTERS = {
    "images_background": ["Greek/character01", "Greek/character02", "Latin/character01"],
    "images_evaluation": ["Tengwar/character01", "Tengwar/character02"],
}


def drawing(rng: np.random.Generator) -> Image.Image:
    """One pen stroke of 1-bit ink on 1-bit paper, as in the originals."""
    image = Image.new("1", (105, 105), 1)
    points = [tuple(point) for point in rng.integers(10, 95, size=(4, 2)).tolist()]
    ImageDraw.Draw(image).line(points, fill=0, width=3)
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def unpack(members: dict[str, bytes], root: Path) -> Path:
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def digest_of(members: dict[str, bytes]) -> str:
    """The formula of the design notes, written a second time."""
    pixels = (
        name.encode() + b"\0" + np.packbits(np.asarray(Image.open(io.BytesIO(members[name])))).tobytes()
        for name in sorted(members)
    )
    return hashlib.sha256(b"".join(pixels)).hexdigest()


@pytest.fixture(scope="session")
def archives() -> dict[str, dict[str, bytes]]:
    """The members of a tiny Omniglot, by archive."""
    rng = np.random.default_rng(0)
    return {
        part: {f"{part}/{name}/{i:04}_{j:02}.png": png(drawing(rng)) for i, name in enumerate(names) for j in range(20)}
        for part, names in CHARACTERS.items()
    }


@pytest.fixture(scope="session")
def parts(archives) -> tuple[_Part, ...]:
    return tuple(_Part(name, len(CHARACTERS[name]), digest_of(members)) for name, members in archives.items())


@pytest.fixture
def runs(run_members, monkeypatch) -> dict[str, bytes]:
    """The members of an `all_runs.zip` that counts as the published one."""
    drawings = {name: content for name, content in run_members.items() if name.endswith("png")}
    monkeypatch.setattr(module, "_RUNS", _Part("all_runs", 40, digest_of(drawings)))
    return run_members


@pytest.fixture(scope="session")
def run_members() -> dict[str, bytes]:
    """The members of an `all_runs.zip` whose items are their class drawn again, mirrored, in another order."""
    rng, members = np.random.default_rng(1), {}
    for run in (f"run{i:02}" for i in range(1, 21)):
        classes, order = [drawing(rng) for _ in range(20)], rng.permutation(20)
        pairs = [f"{run}/test/item{i:02}.png {run}/training/class{c + 1:02}.png" for i, c in enumerate(order, 1)]
        members[f"{run}/class_labels.txt"] = "\n".join(rng.permutation(pairs)).encode()
        for i, c in enumerate(order, 1):
            members[f"{run}/training/class{i:02}.png"] = png(classes[i - 1])
            members[f"{run}/test/item{i:02}.png"] = png(classes[c].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return members


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No test reads the user's cache or settings, or leaves this machine."""
    monkeypatch.setenv("METATUTOR_CACHE", str(tmp_path / "cache"))
    for name in ("METATUTOR_DATA", "METATUTOR_OMNIGLOT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_OFFICIAL", "http://127.0.0.1:9/official")


@pytest.fixture
def root(tmp_path, archives) -> Path:
    """A folder with both zips."""
    for name, members in archives.items():
        write_zip(tmp_path / "data" / f"{name}.zip", members)
    return tmp_path / "data"


@pytest.fixture
def load(parts) -> Callable[..., Omniglot]:
    return partial(Omniglot.load, parts=parts)


@pytest.fixture(scope="session")
def real(tmp_path_factory, worker_id) -> Omniglot:
    """Decoded once for all processes that test."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    with pytest.MonkeyPatch.context() as patch, FileLock(shared / "real.lock"):
        patch.setenv("METATUTOR_CACHE", str(shared / "real"))
        return Omniglot.load(REAL)


@pytest.fixture
def some(request, root, load) -> Omniglot:
    """The real Omniglot where there is one, the tiny one elsewhere."""
    return request.getfixturevalue("real") if REAL else load(root)


@pytest.fixture(scope="session")
def numbered() -> Omniglot:
    """As many characters and alphabets as Omniglot; every pixel of character `i` is the i-th 16-bit number."""
    sizes = [33] * 28 + [20] * 2 + [33] * 19 + [32]  # 964 background characters, 659 evaluation characters
    names = tuple(f"alphabet{a:02}/character{c:02}" for a, size in enumerate(sizes) for c in range(size))
    codes = torch.stack([torch.arange(1623) // 256, torch.arange(1623) % 256], dim=1).to(torch.uint8)
    return Omniglot(codes.view(-1, 1, 1, 1, 2).expand(-1, 20, 1, 2, 2).contiguous(), names, n_background=964)


@contextlib.contextmanager
def serve(folder: Path, handler: type[SimpleHTTPRequestHandler] = SimpleHTTPRequestHandler) -> Iterator[str]:
    class Quiet(handler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Endless(SimpleHTTPRequestHandler):
    """Sends and sends, and never says how much it will be."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(bytes(1 << 16))


class Truncating(SimpleHTTPRequestHandler):
    """Promises a whole file and hangs up half-way."""

    def copyfile(self, source, outputfile) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2])


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- finding and reading ---


@pytest.mark.parametrize("below", ["", "omniglot-py"])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout_gives_the_same_images(tmp_path, archives, root, load, below, zipped):
    place = tmp_path / "other" / below
    for name, members in archives.items():
        write_zip(place / f"{name}.zip", members, zipfile.ZIP_STORED) if zipped else unpack(members, place)
    found, expected = load(tmp_path / "other"), load(root)
    assert torch.equal(found.images, expected.images) and found.names == expected.names


def test_characters_come_in_order_background_first(root, load):
    omniglot = load(root)
    assert omniglot.names == tuple(name for names in CHARACTERS.values() for name in names)
    assert omniglot.n_background == 3
    assert omniglot.alphabets == ("Greek", "Latin", "Tengwar")
    assert omniglot.images.shape == (5, 20, 1, 28, 28) and omniglot.images.dtype == torch.uint8


def test_each_drawing_is_where_its_name_says(root, archives, load):
    images = load(root, image_size=105).images
    for part, first in (("images_background", 0), ("images_evaluation", 3)):
        for i, name in enumerate(CHARACTERS[part]):
            bits = np.asarray(Image.open(io.BytesIO(archives[part][f"{part}/{name}/{i:04}_07.png"])))
            assert np.array_equal(images[first + i, 7, 0].numpy() == 255, ~bits)


def test_ink_is_bright_and_paper_is_zero(some):
    pixels = some.images.float() / 255
    assert pixels.min() == 0 and pixels.max() == 1
    assert 0.01 < pixels.mean() < 0.3, "most of a drawing is paper"
    assert pixels[..., 0, 0].mean() < 0.05, "corners are paper"


def test_resizing_is_antialiased(some, root, load):
    grey = (some.images > 0) & (some.images < 255)
    assert grey.float().mean() > 0.05, "a thin line shrunk to a quarter has grey edges"
    small, large = (load(root, image_size=size).images.float().flatten(0, 1) for size in (28, 105))
    averaged = torch.nn.functional.interpolate(large, size=(28, 28), mode="area")
    assert (small - averaged).abs().mean() < 0.2 * averaged.mean(), "nearest pixels would be 0.4 away"


def test_the_argument_goes_before_the_environment_and_that_before_the_cache(tmp_path, root, load, monkeypatch):
    monkeypatch.setenv("METATUTOR_DATA", str(tmp_path / "nowhere"))
    assert len(load(root).names) == 5
    with pytest.raises(ValueError, match=r"nowhere \(METATUTOR_DATA\) does not hold images_background"):
        load()
    monkeypatch.setenv("METATUTOR_DATA", str(root))
    assert len(load().names) == 5
    monkeypatch.delenv("METATUTOR_DATA")
    shutil.copytree(root, tmp_path / "cache" / "omniglot-py")
    assert len(load(download=False).names) == 5


@pytest.mark.parametrize("size", [0, -28, 106])
def test_impossible_sizes_are_refused(root, load, size):
    with pytest.raises(ValueError, match=rf"image_size must be from 1 to 105 pixels, got {size}"):
        load(root, image_size=size)


# --- what is missing or damaged ---


def test_a_folder_without_data_says_what_was_expected_found_and_to_be_done(tmp_path, load):
    (tmp_path / "holiday.jpg").touch()
    expected = (
        r"expected images_background\.zip or a folder .*omniglot-py; found holiday\.jpg; put http.*`metatutor data"
    )
    with pytest.raises(ValueError, match=expected):
        load(tmp_path)


def test_half_of_the_data_is_not_enough(root, load):
    (root / "images_evaluation.zip").unlink()
    with pytest.raises(ValueError, match=r"does not hold images_evaluation: .*found images_background\.zip"):
        load(root)


def test_without_download_an_empty_cache_is_an_error(load):
    with pytest.raises(ValueError, match=r"\(the cache\) does not hold images_background: .*found no such folder"):
        load(download=False)


@pytest.mark.parametrize("read", [Omniglot.load, verify, info, download])
def test_a_truncated_zip_is_named(root, parts, read):
    path = root / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is damaged .*not a complete zip .*intact copy"):
        read(root, parts=parts)


def test_a_damaged_member_is_named(root, archives, load):
    path = write_zip(root / "images_background.zip", archives["images_background"], zipfile.ZIP_STORED)
    content, victim = bytearray(path.read_bytes()), b"images_background/Greek/character02/0001_05.png"
    content[content.index(victim) + len(victim) + 60] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read images_background/Greek/character02/0001_05\.png: Bad CRC"):
        load(root)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_an_undecodable_drawing_is_named(root, archives, load, content):
    victim = "images_background/Greek/character02/0001_05.png"
    write_zip(root / "images_background.zip", archives["images_background"] | {victim: content})
    with pytest.raises(ValueError, match=rf"images_background\.zip is damaged .*cannot read {victim}"):
        load(root)


def test_a_missing_drawing_is_counted(tmp_path, archives, load):
    for members in archives.values():
        unpack(members, tmp_path / "data")
    (tmp_path / "data/images_evaluation/Tengwar/character02/0001_11.png").unlink()
    with pytest.raises(ValueError, match=r"19 drawings of images_evaluation/Tengwar/character02, expected 20"):
        load(tmp_path / "data")


def test_a_missing_alphabet_is_counted(root, archives, load):
    members = {name: png for name, png in archives["images_background"].items() if "Latin" not in name}
    write_zip(root / "images_background.zip", members)
    with pytest.raises(ValueError, match=r"2 folders of drawings, expected 3"):
        load(root)


def change_one_pixel(members: dict[str, bytes]) -> dict[str, bytes]:
    victim = "images_evaluation/Tengwar/character01/0000_00.png"
    image = Image.open(io.BytesIO(members[victim]))
    image.putpixel((0, 0), 0)
    return members | {victim: png(image)}


def swap_two_names(members: dict[str, bytes]) -> dict[str, bytes]:
    one, other = (f"images_evaluation/Tengwar/character01/0000_{j:02}.png" for j in (0, 1))
    return members | {one: members[other], other: members[one]}


@pytest.mark.parametrize("change", [change_one_pixel, swap_two_names])
def test_a_single_wrong_pixel_or_place_is_refused(root, archives, parts, load, change):
    write_zip(root / "images_evaluation.zip", change(archives["images_evaluation"]))
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is damaged .*pixels or names of its 40 drawings"):
        load(root)
    with pytest.raises(ValueError, match="pixels or names"):
        verify(root, parts=parts)


def test_files_that_are_no_drawings_are_no_matter(root, archives, parts):
    litter = {"__MACOSX/images_background/._Greek": b"", "images_background/Greek/character01/._0000_00.png": b""}
    write_zip(root / "images_background.zip", archives["images_background"] | litter)
    assert verify(root, parts=parts).characters == 5


@pytest.mark.parametrize("read", [Omniglot.load, verify, info, download])
@pytest.mark.parametrize(
    ("place", "finding"),
    [
        ("~nobody-here", r"is ~nobody-here: there is no such user"),
        ("x" * 300, r"cannot read x+.*: .*[Nn]ame too long"),
        ("x/" * 3000, r"cannot read x/.* … .*: .*[Nn]ame too long"),
    ],
)
def test_a_place_that_cannot_be_is_named(parts, monkeypatch, read, place, finding):
    monkeypatch.setenv("METATUTOR_DATA", place)
    for root in (place, None):
        with pytest.raises(ValueError, match=finding) as caught:
            read(root, parts=parts)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("place", ["~nobody-here", "x" * 300])
def test_a_cache_that_cannot_be_is_named(root, parts, monkeypatch, place):
    monkeypatch.setenv("METATUTOR_CACHE", place)
    for read in (Omniglot.load, info):
        with pytest.raises(ValueError, match=r"METATUTOR_CACHE"):
            read(root, parts=parts)


def test_what_may_not_be_read_is_named(root, archives, parts, monkeypatch):
    """Permissions do not bind everybody, root for one."""
    unpack(archives["images_background"], root)
    (root / "images_background.zip").unlink()
    scandir, opening = os.scandir, Path.open

    def refuse(path: Any, *args: Any) -> object:
        if "Greek" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return (opening if args else scandir)(path, *args)

    for owner, name in ((os, "scandir"), (Path, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(
                ValueError, match=r"cannot read .*Greek.*: Permission denied; make it readable"
            ) as caught:
                verify(root, parts=parts)
            assert caught.type is ValueError and "damaged" not in str(caught.value)


@pytest.mark.parametrize("read", [verify, info])
@pytest.mark.parametrize("content", [b"", None])
def test_damaged_runs_beside_the_rest_are_not_passed_over(root, parts, runs, read, content):
    path = root / "all_runs.zip"
    write_zip(path, runs)
    read(root, parts=parts)
    write_zip(path, {name: text for name, text in runs.items() if name.endswith("txt")})
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"all_runs\.zip is damaged or incomplete: (not a complete zip|0 folders)"):
        read(root, parts=parts)


def test_messages_are_one_line(tmp_path, root, parts):
    (root / "images_background.zip").write_bytes(b"\n")
    for place in (tmp_path / "nowhere", root):
        with pytest.raises(ValueError) as caught:
            Omniglot.load(place, parts=parts)
        assert "\n" not in str(caught.value)


# --- the cache ---


def test_the_second_load_reads_no_drawing(root, load, monkeypatch):
    first = load(root)
    monkeypatch.setattr(module, "_bitmap", lambda *_: pytest.fail("decoded again"))
    again = load(root)
    assert torch.equal(first.images, again.images)
    assert (first.names, first.n_background) == (again.names, again.n_background)


def test_the_cache_is_one_file_a_size(tmp_path, root, load):
    for size in (28, 28, 14):
        load(root, image_size=size)
    assert [re.sub(r"[0-9a-f]{16}", "#", name) for name in files(tmp_path / "cache")] == [
        "omniglot-v2-14px-#.npz",
        "omniglot-v2-28px-#.npz",
    ]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_source_that_changed_is_not_answered_from_the_cache(tmp_path, archives, load, zipped):
    data = tmp_path / "data"
    for name, members in archives.items():
        write_zip(data / f"{name}.zip", members, zipfile.ZIP_STORED) if zipped else unpack(members, data)
    load(data)
    name = "images_evaluation"
    path = data / f"{name}.zip" if zipped else next((data / name / "Tengwar" / "character01").iterdir())
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF  # the same size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # and the same time
    with pytest.raises(ValueError, match=r"images_evaluation.* is damaged"):
        load(data)


def test_a_partial_copy_is_not_answered_from_the_cache_of_a_whole_one(tmp_path, root, archives, load):
    load(root)
    for name, members in archives.items():
        unpack(dict(list(members.items())[:20]), tmp_path / "partial")
        assert (tmp_path / "partial" / name).is_dir()
    with pytest.raises(ValueError, match="1 folders of drawings, expected 3"):
        load(tmp_path / "partial")


def test_other_archives_with_the_same_files_have_another_cache(root, parts):
    Omniglot.load(root, parts=parts)
    strict = (parts[0], _Part(parts[1].name, parts[1].folders, "0" * 64))
    with pytest.raises(ValueError, match="expected 000000000000…"):
        Omniglot.load(root, parts=strict)


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return content[:-1000] + bytes([content[-1000] ^ 0xFF]) + content[-999:]


def flip_each(content: bytes) -> Iterator[bytes]:
    """One bit in every part of the file: numbers, names, pixels."""
    for i in [*range(0, 300, 41), *range(len(content) - 1, len(content) - 1500, -127)]:
        yield content[:i] + bytes([content[i] ^ 0x10]) + content[i + 1 :]


def test_a_flipped_bit_in_the_cache_changes_nothing(tmp_path, root, load):
    first = load(root)
    (cache,) = (tmp_path / "cache").iterdir()
    for damaged in flip_each(cache.read_bytes()):
        cache.write_bytes(damaged)
        again = load(root)
        assert torch.equal(again.images, first.images) and again.names == first.names


@pytest.mark.parametrize("damage", [truncate, flip, lambda _: b"", lambda _: b"nonsense" * 99])
def test_a_damaged_cache_is_made_again(tmp_path, root, load, damage):
    expected = load(root).images
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    assert torch.equal(load(root).images, expected)
    again = module._read_cache(cache)
    assert again is not None and torch.equal(again[0], expected)


def test_changing_loaded_images_leaves_the_cache_alone(root, load):
    load(root)
    images = load(root).images
    expected = images.clone()
    images.zero_()
    assert torch.equal(load(root).images, expected)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, root, load, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METATUTOR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"cannot write omniglot-v2.* in .*file/cache .*METATUTOR_CACHE"):
        load(root)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("reason", ["Read-only file system", "No space left on device"])
def test_a_read_only_or_full_cache_is_an_error_and_leaves_nothing(tmp_path, root, load, monkeypatch, reason):
    def refuse(file: io.BufferedWriter, **_: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(30, reason)

    monkeypatch.setattr(np, "savez", refuse)
    with pytest.raises(ValueError, match=rf"cannot write omniglot-v2.*\({reason}\); make that folder writable"):
        load(root)
    assert files(tmp_path / "cache") == []


def test_a_read_only_cache_folder_still_serves_what_it_holds(tmp_path, root, load):
    load(root)
    (tmp_path / "cache").chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert len(load(root).names) == 5
    finally:
        (tmp_path / "cache").chmod(stat.S_IRWXU)


def test_what_a_killed_process_left_in_the_cache_goes(tmp_path, root, load, monkeypatch):
    names = []

    def kill(*_: object) -> None:
        names.extend(path.name for path in (tmp_path / "cache").iterdir())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_ink", kill)
        load(root)
    (name,) = names
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    for i in range(8):
        (tmp_path / "cache" / re.sub(r"-\d+-\w{8}\.tmp$", f"-{dead.pid}-{i:08}.tmp", name)).touch()
    load(root)
    assert len(files(tmp_path / "cache")) == 1


def test_interrupted_decoding_leaves_no_cache(tmp_path, root, load, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_ink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert files(tmp_path / "cache") == []


# --- downloading ---


def test_a_zip_packed_again_by_a_mirror_is_welcome(tmp_path, root, parts, archives, monkeypatch):
    for name, members in archives.items():
        write_zip(tmp_path / "mirror" / f"{name}.zip", dict(reversed(members.items())), zipfile.ZIP_STORED)
    with serve(tmp_path / "mirror") as url:
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", f"http://127.0.0.1:9/down {url}/")
        downloaded = Omniglot.load(parts=parts)
    assert torch.equal(downloaded.images, Omniglot.load(root, parts=parts).images)
    zips = [name for name in files(tmp_path / "cache") if name.endswith("zip")]
    assert zips == ["omniglot-py/images_background.zip", "omniglot-py/images_evaluation.zip"]
    assert Omniglot.load(parts=parts).names == downloaded.names, "the next time, the mirror is not needed"


def test_the_official_source_comes_first(tmp_path, root, parts, monkeypatch):
    with serve(root) as url:
        monkeypatch.setattr(module, "_OFFICIAL", url)
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", "http://127.0.0.1:9/down")
        assert len(download(tmp_path / "new", parts=parts).sources) == 2


def test_download_fills_the_given_folder_with_what_is_missing(tmp_path, root, parts, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    shutil.copy(root / "images_background.zip", target)
    with serve(root) as url:
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", url)
        report = download(target, parts=parts)
    assert files(target) == ["images_background.zip", "omniglot-py/images_evaluation.zip"]
    assert report == verify(target, parts=parts)
    assert str(report).startswith("5 characters, 100 drawings, every pixel as published\n")


def test_an_explicit_folder_is_never_downloaded_to_by_loading(tmp_path, root, parts, monkeypatch):
    with serve(root) as url:
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", url)
        with pytest.raises(ValueError, match="does not hold images_background"):
            Omniglot.load(tmp_path / "new", parts=parts)
    assert not (tmp_path / "new").exists()


def test_without_a_network_the_error_says_where_was_tried_and_what_helps(tmp_path, parts, monkeypatch):
    monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", "http://127.0.0.1:9/mirror")
    with pytest.raises(DownloadError) as caught:
        Omniglot.load(parts=parts)
    message = str(caught.value)
    assert "\n" not in message
    for hint in ("official/images_background.zip", "mirror/images_background.zip", "METATUTOR_DATA", "Strokes"):
        assert hint in message
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize("promise", [True, False])
def test_half_a_download_leaves_nothing_behind(tmp_path, root, parts, monkeypatch, promise):
    handler = Truncating
    if not promise:  # no Content-Length: only the content can tell
        for path in root.iterdir():
            path.write_bytes(path.read_bytes()[:-500])
        handler = SimpleHTTPRequestHandler
    with serve(root, handler) as url:
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", url)
        reason = "ChunkedEncodingError" if promise else "not a complete zip"
        with pytest.raises(DownloadError, match=rf"{url}/images_background\.zip \({reason}"):
            download(tmp_path / "new", parts=parts)
    assert files(tmp_path / "new") == []


def test_an_endless_mirror_fills_no_disk(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(module, "_ZIP_BYTES", 1_000_000)
    with serve(tmp_path, Endless) as url:
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", url)
        with pytest.raises(DownloadError, match=rf"{url}/images_background\.zip \(more than 1,000,000 bytes\)"):
            download(tmp_path / "new", parts=parts)
    assert files(tmp_path / "new") == []


@pytest.mark.parametrize(
    "mirror", ["http://[", "no-address", "ftp://127.0.0.1", "http://.example.com", "http://\x1b[2J"]
)
def test_an_address_that_is_none_is_named(tmp_path, parts, monkeypatch, mirror):
    monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", mirror)
    with pytest.raises(DownloadError) as caught:
        download(tmp_path / "new", parts=parts)
    message = str(caught.value)
    assert message.isprintable() and mirror.replace("\x1b", "?") + "/images_background.zip (" in message


def test_the_official_address_is_torchvisions():
    assert torchvision.datasets.Omniglot.download_url_prefix == OFFICIAL


def test_a_mirror_with_other_pixels_is_passed_over(tmp_path, root, archives, parts, monkeypatch):
    shutil.copytree(root, tmp_path / "wrong")
    write_zip(tmp_path / "wrong" / "images_evaluation.zip", change_one_pixel(archives["images_evaluation"]))
    with serve(tmp_path / "wrong") as wrong, serve(root) as right:
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", wrong)
        with pytest.raises(DownloadError, match=rf"{wrong}/images_evaluation\.zip \(the pixels or names"):
            download(tmp_path / "new", parts=parts)
        assert files(tmp_path / "new") == ["omniglot-py/images_background.zip"]
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", f"{wrong}\n{right}")
        assert download(tmp_path / "new", parts=parts).characters == 5


def test_an_address_without_the_file_is_named_with_its_status(tmp_path, parts, monkeypatch):
    with serve(tmp_path) as url:
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", url)
        with pytest.raises(DownloadError, match=r"images_background\.zip \(HTTP 404\)"):
            download(parts=parts)


def test_a_download_folder_that_cannot_be_made_is_named(tmp_path, parts):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write images_background\.zip in .*file/omniglot-py"):
        download(tmp_path / "file", parts=parts)


# --- splits ---


def codes(omniglot: Omniglot) -> dict[str, int]:
    return {name: i for i, name in enumerate(omniglot.names)}


@pytest.mark.parametrize("rotations", [True, False])
@pytest.mark.parametrize("protocol", ["random", "lake"])
def test_splits_share_no_character_and_leave_none_out(numbered, protocol, rotations):
    splits = numbered.split(protocol, seed=3, rotations=rotations)
    names = [name for classes in splits for name in classes.names]
    assert len(set(names)) == len(names) == 1623
    for classes in splits:
        high, low = classes.images[:, 5, 0, 1].long().unbind(1)
        assert [numbered.names[code] for code in (256 * high + low).tolist()] == list(classes.names)


@pytest.mark.parametrize(("rotations", "times", "suffix"), [(True, 4, ""), (False, 1, "-upright")])
def test_the_random_split_has_the_papers_sizes(numbered, rotations, times, suffix):
    splits = numbered.split("random", seed=7, rotations=rotations)
    assert [len(classes) for classes in splits] == [1100 * times, 100 * times, 423 * times]
    assert splits.id == f"random-7{suffix}"


def test_the_lake_split_keeps_alphabets_whole(numbered):
    splits = numbered.split("lake", seed=0)
    train, validation, test = ({name.split("/")[0] for name in classes.names} for classes in splits)
    assert (len(train), len(validation), len(test)) == (25, 5, 20)
    assert not (train & validation or train & test or validation & test)
    assert tuple(splits.test.names) == numbered.names[964:]
    assert splits.id == "lake-0"


@pytest.mark.parametrize("protocol", ["random", "lake"])
def test_a_seed_is_a_split(numbered, protocol):
    one, again, other = (numbered.split(protocol, seed=seed) for seed in (0, 0, 1))
    assert all(a.names == b.names and torch.equal(a.images, b.images) for a, b in zip(one, again, strict=True))
    assert one.validation.names != other.validation.names


def test_seed_0_stays_what_recorded_runs_were_made_with(numbered):
    random, lake = numbered.split("random", seed=0), numbered.split("lake", seed=0)
    assert [codes(numbered)[name] for name in random.validation.names[:5]] == [1, 8, 30, 40, 57]
    held_out = {name.split("/")[0] for name in lake.validation.names}
    assert held_out == {"alphabet13", "alphabet14", "alphabet23", "alphabet27", "alphabet29"}


def test_unknown_protocols_and_too_few_characters_are_refused(numbered, root, load):
    with pytest.raises(ValueError, match="no split 'mine'; choose 'random', 'lake' or 'vinyals'"):
        numbered.split("mine")
    with pytest.raises(ValueError, match="more than 1200 characters, got 5"):
        load(root).split("random")
    with pytest.raises(ValueError, match="more than 5 background alphabets"):
        load(root).split("lake")
    for few in (numbered, load(root)):  # the former has other alphabets than Omniglot
        with pytest.raises(ValueError, match="needs all characters of Omniglot"):
            few.split("vinyals")


def test_splits_feed_the_sampler(numbered):
    train, _, _ = numbered.split(seed=0)
    episode = EpisodeSampler(train, EpisodeSpec(5, 1, 15), seed=0).sample(2)
    assert episode.query_images.shape == (2, 75, 1, 2, 2)


# --- Lake's one-shot runs ---


@pytest.mark.parametrize("zipped", [True, False])
def test_queries_carry_the_label_of_their_class(tmp_path, runs, zipped):
    write_zip(tmp_path / "all_runs.zip", runs) if zipped else unpack(runs, tmp_path / "all_runs")
    episode = one_shot_runs(tmp_path, image_size=105)
    assert len(episode) == episode.n_way == 20
    assert torch.equal(episode.support_labels, torch.arange(20).expand(20, 20))
    labels = episode.query_labels[..., None, None, None].expand(-1, -1, 1, 105, 105)
    assert torch.equal(episode.query_images.flip(-1), episode.support_images.gather(1, labels))
    assert episode.support_images.max() == 1 and episode.support_images.mean() < 0.3, "ink is 1, paper is 0"


def drop_line(runs: dict[str, bytes]) -> dict[str, bytes]:
    lines = runs["run07/class_labels.txt"].split(b"\n")
    return runs | {"run07/class_labels.txt": b"\n".join(lines[1:])}


def drop_labels(runs: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in runs.items() if name != "run07/class_labels.txt"}


def drop_item(runs: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in runs.items() if name != "run07/test/item03.png"}


def mirror_item(runs: dict[str, bytes]) -> dict[str, bytes]:
    image = Image.open(io.BytesIO(runs["run07/test/item03.png"]))
    return runs | {"run07/test/item03.png": png(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))}


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (drop_line, r"run07/class_labels\.txt pairs 19 items, expected each of 20"),
        (drop_labels, r"cannot read run07/class_labels\.txt"),
        (drop_item, "19 drawings of run07/test, expected 20"),
        (mirror_item, "the pixels or names of its 800 drawings differ from those published"),
    ],
)
def test_incomplete_runs_are_refused(tmp_path, runs, damage, finding):
    write_zip(tmp_path / "all_runs.zip", damage(runs))
    with pytest.raises(ValueError, match=rf"all_runs\.zip is damaged or incomplete: {finding}"):
        one_shot_runs(tmp_path)


def test_missing_runs_say_where_to_get_them(root):
    with pytest.raises(ValueError, match=r"does not hold all_runs: .*put http.*/one-shot-classification/all_runs\.zip"):
        one_shot_runs(root)


def test_runs_are_downloaded_like_the_rest(tmp_path, root, parts, runs, monkeypatch):
    write_zip(root / "all_runs.zip", runs)
    with serve(root) as url:
        monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", url)
        expected = one_shot_runs(root)
        assert torch.equal(one_shot_runs().query_images, expected.query_images)
        download(tmp_path / "new", runs=True, parts=parts)
    assert "omniglot-py/all_runs.zip" in files(tmp_path / "new")
    assert len(one_shot_runs(tmp_path / "new")) == 20


# --- what is imported, and when ---


def test_what_a_reader_may_never_need_is_imported_where_it_is_used():
    program = """
import sys, types
package = types.ModuleType("metatutor")
package.__path__ = sys.argv[1:]  # without what `metatutor` itself imports
sys.modules["metatutor"] = package
import torch
before = set(sys.modules)
import metatutor.data
print(*({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    command = [sys.executable, "-c", program, str(Path(module.__file__).parents[1])]
    imported = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert "metatutor" in imported
    assert not imported & {"PIL", "pooch", "requests", "torchvision", "platformdirs", "psutil", "tqdm", "safetensors"}
    assert not imported & {"fcntl", "resource", "pwd"}, "Windows has none"


# --- reports ---


def test_info_counts(tmp_path, root, parts):
    report = info(root, parts=parts)
    assert (report.alphabets, report.characters, report.drawings) == (3, 5, 100)
    assert report.cache.parent == tmp_path / "cache" and report.cache_bytes == report.cache.stat().st_size
    assert str(report).startswith("3 alphabets, 5 characters, 100 drawings\n  from ")


# --- the real data ---


@needs_omniglot
def test_the_real_pixels_have_the_published_digests():
    assert str(verify(REAL)).startswith("1,623 characters, 32,460 drawings, every pixel as published")


@needs_omniglot
def test_the_real_omniglot_has_50_alphabets(real):
    assert real.images.shape == (1623, 20, 1, 28, 28)
    assert len(real.alphabets) == 50 and len(set(real.names)) == 1623
    background, evaluation = real.names[:964], real.names[964:]
    assert list(background) == sorted(background) and list(evaluation) == sorted(evaluation)
    assert "Greek/character03" in background and "Tengwar/character01" in evaluation


@needs_omniglot
def test_real_splits_are_whole(real):
    for protocol, sizes in (("random", (1100, 100, 423)), ("lake", (None, None, 659)), ("vinyals", (1028, 172, 423))):
        splits = real.split(protocol, rotations=False)
        assert sum(len(classes) for classes in splits) == 1623
        assert all(size in (None, len(classes)) for size, classes in zip(sizes, splits, strict=True))


@needs_omniglot
def test_the_split_of_matching_networks_tests_on_new_alphabets(real):
    splits = real.split("vinyals", seed=5)
    train, validation, test = ({name.partition("/")[0] for name in classes.names} for classes in splits)
    assert not train & validation and train & test == {"Gurmukhi"} and splits.id == "vinyals"
    assert [len(names) for names in (train, validation, test)] == [33, 5, 13]
    assert sum(name.startswith("Gurmukhi/") for name in splits.test.names) == 4
    assert splits.test.names == real.names[-423:]


@needs_omniglot
@pytest.mark.skipif(not (REAL and module._find(Path(REAL), module._RUNS)), reason="METATUTOR_DATA holds no all_runs")
def test_in_lakes_runs_item_and_class_are_drawings_of_one_character(real):
    character = {drawn.numpy().tobytes(): c for c in range(964, 1623) for drawn in real.images[c]}
    episode = one_shot_runs(REAL)
    support, query = ((x * 255).round().to(torch.uint8) for x in (episode.support_images, episode.query_images))
    for task in range(20):
        classes = [character[image.numpy().tobytes()] for image in support[task]]
        items = [character[image.numpy().tobytes()] for image in query[task]]
        assert items == [classes[label] for label in episode.query_labels[task].tolist()]
        assert len({real.names[c].split("/")[0] for c in classes}) == 1, "a run stays within one alphabet"

"""What can be wrong with Omniglot's archives: seeded, small, and quick to make.

`damages(seed)` gives each damage a name and a function that writes it into a folder where the intact archives were.
Most concern `images_background`, as a zip or as a folder; nothing here is larger than a few megabytes on the disk.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from PIL import Image, ImageDraw

Members = dict[str, bytes]
NAME = "images_background"
CHARACTERS = {NAME: ["Greek/character01", "Latin/character01"], "images_evaluation": ["Tengwar/character01"]}
VICTIM = f"{NAME}/Greek/character01/0001_05.png"
N_RANDOM = 30  # of each kind of random damage


@dataclass(frozen=True)
class Damage:
    """A name, and what writes the damage into the folder of the archives."""

    name: str
    write: Callable[[Path], object]


# --- what is intact ---


def png(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@cache
def intact() -> dict[str, Members]:
    """The members of a tiny Omniglot, by archive: three characters, 20 drawings of each."""
    generator = random.Random(0)

    def drawing() -> bytes:
        image = Image.new("1", (105, 105), 1)
        points = [(generator.randrange(10, 95), generator.randrange(10, 95)) for _ in range(4)]
        ImageDraw.Draw(image).line(points, fill=0, width=3)
        return png(image)

    return {
        part: {f"{part}/{name}/{i:04}_{j:02}.png": drawing() for i, name in enumerate(names, 1) for j in range(20)}
        for part, names in CHARACTERS.items()
    }


def zipped(members: Members, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def unpack(folder: Path, members: Members) -> None:
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@cache
def intact_zips() -> dict[str, bytes]:
    return {f"{part}.zip": zipped(members) for part, members in intact().items()}


def write_intact(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in intact_zips().items():
        (folder / name).write_bytes(content)


def drawings() -> Members:
    return dict(intact()[NAME])


# --- drawings that are none ---


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, depth: int = 1, colour: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def bomb(*chunks: bytes) -> bytes:
    """A PNG of these chunks, and of pixels that go on and on."""
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000_000), 9))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def other_contents() -> Iterator[tuple[str, bytes]]:
    """What may lie where a drawing should, by name."""
    image, good = Image.new("1", (105, 105), 1), drawings()[VICTIM]
    yield "nothing", b""
    yield "text", b"not a picture"
    yield "a signature alone", good[:8]
    yield "a header alone", good[:33]
    yield "half a drawing", good[: len(good) // 2]
    yield "noise", random.Random(1).randbytes(300)
    yield "another drawing", drawings()[VICTIM.replace("_05", "_06")]
    for kind in ("gif", "bmp", "tiff", "jpeg", "ppm", "webp", "ico", "eps"):
        yield f"a picture in {kind}", png(image.convert("L" if kind != "ppm" else "RGB"), kind)
    for size in ((104, 105), (105, 104), (28, 28), (1, 1), (210, 210)):
        yield f"{size[0]} times {size[1]} pixels", png(Image.new("1", size, 1))
    for width, height in ((12_000, 12_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (0, 0)):
        yield f"a bomb of {width} times {height}", bomb(header(width, height, 8, 6))
    yield "a second header", bomb(header(105, 105), header(12_000, 12_000, 8, 6))
    yield "a text that unpacks", bomb(header(105, 105), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(30_000_000), 9)))
    yield (
        "a profile that unpacks",
        bomb(header(105, 105), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(30_000_000), 9))),
    )
    yield "a large file", good + bytes(3_000_000)


# --- zips that are none ---


def forged(content: bytes, method: int, size: int, crc: int = 0, flags: int = 0) -> bytes:
    """A zip whose victim says of itself what is not so; its content is taken as packed already."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, drawing in drawings().items():
            archive.writestr(name, content if name == VICTIM else drawing)
        member = archive.getinfo(VICTIM)
        member.compress_type, member.file_size, member.CRC = method, size, crc
        member.flag_bits |= flags
    return buffer.getvalue()


@cache
def four_gigabytes() -> bytes:
    """Zeros, deflated: a piece of 16 MiB again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * 256 + packer.flush()


def twice(members: Members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        infos = archive.infolist()
        infos[3].filename = infos[2].filename
    return buffer.getvalue()


def directory_of(n: int, comment: bytes = b"", **fields: int) -> bytes:
    """A zip that is its directory only: `n` names of one letter."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, *[0] * 8, 1, *[0] * 6) + b"a"
    end = {"size": len(entry) * n, "offset": 0} | fields
    return (
        entry * n + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, end["size"], end["offset"], len(comment)) + comment
    )


def renamed(name: str) -> Members:
    return {name if old == VICTIM else old: content for old, content in drawings().items()}


def other_zips() -> Iterator[tuple[str, bytes]]:
    """What may lie where the zip should, by name."""
    members, good = drawings(), drawings()[VICTIM]
    yield "an empty file", b""
    yield "a line feed", b"\n"
    yield "an archive of nothing", zipped({})
    yield "all drawings missing", zipped({f"{name.rpartition('/')[0]}/": b"" for name in members})
    yield "only what the Finder adds", zipped({f"__MACOSX/{name}": b"" for name in members})
    yield "one drawing missing", zipped({name: content for name, content in members.items() if name != VICTIM})
    yield "one drawing too many", zipped(members | {VICTIM.replace("_05", "_99"): good})
    yield "one character missing", zipped({name: content for name, content in members.items() if "Greek" not in name})
    yield "one character too many", zipped(members | {n.replace("Greek", "Klingon"): c for n, c in members.items()})
    yield "another archive", zipped(intact()["images_evaluation"])
    yield "an archive in an archive", zipped({f"{NAME}.zip": zipped(members)})
    yield "a name twice", twice(members)
    for about, name in (
        ("leads up", VICTIM.replace("Greek", "Greek/..")),
        ("leads out", VICTIM.replace("Greek", "../Greek")),
        ("starts at the root", f"/{VICTIM}"),
        ("starts at a drive", f"C:\\{VICTIM}"),
        ("has two lines", VICTIM.replace("0001_05", "0001\n05")),
        ("colours the terminal", VICTIM.replace("0001_05", "\x1b[31m\r\u2028")),
        ("has 300 letters", VICTIM.replace("0001_05", "0" * 300)),
        ("has 60,000 letters", VICTIM.replace("0001_05", "0" * 60_000)),
        ("shouts", VICTIM.upper()),
    ):
        yield f"a name that {about}", zipped(renamed(name))
    yield "a name that leads out besides", zipped(members | {"../../outside.png": good})
    yield "an encrypted drawing", forged(good, zipfile.ZIP_STORED, len(good), zlib.crc32(good), flags=1)
    yield "a patched drawing", forged(good, zipfile.ZIP_STORED, len(good), zlib.crc32(good), flags=0x20)
    yield "a wrong checksum", forged(good, zipfile.ZIP_STORED, len(good), 1)
    yield "a method nobody knows", forged(good, 77, len(good))
    yield "4 GiB", forged(four_gigabytes(), zipfile.ZIP_DEFLATED, 2**32 - 2)
    yield "4 GiB that say 300 bytes", forged(four_gigabytes(), zipfile.ZIP_DEFLATED, 300)
    yield "4 GiB that say 60,000 bytes", forged(four_gigabytes(), zipfile.ZIP_DEFLATED, 60_000)
    yield "bzip2", forged(bz2.compress(bytes(50_000_000)), zipfile.ZIP_BZIP2, 300)
    lzma2 = lzma.compress(bytes(50_000_000), lzma.FORMAT_ALONE, preset=0)
    yield "lzma", forged(b"\x09\x04\x05\x00" + lzma2[:5] + lzma2[13:], zipfile.ZIP_LZMA, 300)
    yield "stored, and longer than the archive", forged(good, zipfile.ZIP_STORED, 60_000)
    yield "many names", directory_of(5_000)
    yield "a directory of 4 GiB", directory_of(3, size=2**32 - 2)
    yield "a directory that is elsewhere", directory_of(3, offset=2**31)
    yield "a directory cut short", directory_of(3, size=100)
    yield "a long comment", directory_of(0, comment=bytes(65_535))
    zip64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**63, 2**63, 2**63, 2**63)
    yield "numbers of 64 bits", zip64 + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1) + directory_of(0, size=2**32 - 1)


# --- folders that are none ---


def unpacked(folder: Path, change: Callable[[Path], object]) -> None:
    """The archive unpacked, its victim replaced by what `change` makes of that path."""
    (folder / f"{NAME}.zip").unlink()
    unpack(folder, drawings())
    (folder / VICTIM).unlink()
    change(folder / VICTIM)


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def instead(folder: Path, change: Callable[[Path], object], suffix: str = "") -> None:
    """Something else in place of the archive."""
    (folder / f"{NAME}.zip").unlink()
    change(folder / f"{NAME}{suffix}")


def linked(path: Path, target: Path | str) -> None:
    path.symlink_to(target)


def circle(path: Path) -> None:
    """Two folders that link to each other, and a link to itself."""
    for name, other in (("one", "other"), ("other", "one")):
        (path.parent / name).mkdir()
        (path.parent / name / "link").symlink_to(path.parent / other, target_is_directory=True)
    path.symlink_to(path)


def other_folders() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What may lie in a folder, or be one, by name."""
    changes: dict[str, Callable[[Path], object]] = {
        "is missing": lambda path: None,
        "is a folder": Path.mkdir,
        "has 4 GiB": partial(sparse, size=1 << 32),
    }
    places: dict[str, Callable[[Path], object]] = {
        "nothing": lambda path: None,
        "an empty folder": Path.mkdir,
        "a file without its ending": Path.touch,
    }
    if hasattr(os, "mkfifo"):
        changes |= {
            "is a pipe": os.mkfifo,
            "is a link to itself": lambda path: linked(path, path),
            "leads in a circle": circle,
            "is a link to nothing": partial(linked, target="nothing"),
            "is a link to /dev/zero": partial(linked, target="/dev/zero"),
            "is a link to the folder above": partial(linked, target=".."),
        }
        places |= {
            "a pipe": os.mkfifo,
            "a link to itself": lambda path: linked(path, path),
            "a link to /dev/zero": partial(linked, target="/dev/zero"),
            "a link to the folder above": partial(linked, target=".."),
        }
    yield from ((f"a drawing {name}", partial(unpacked, change=change)) for name, change in changes.items())
    for suffix in ("", ".zip"):
        yield from ((f"{n} as {NAME}{suffix}", partial(instead, change=c, suffix=suffix)) for n, c in places.items())
    yield "5 GB as a zip", partial(instead, change=partial(sparse, size=5_000_000_000), suffix=".zip")
    yield "no folder at all", shutil.rmtree
    yield "a file in its place", lambda folder: (shutil.rmtree(folder), folder.touch())


# --- damage by chance ---


def flip(content: bytes, generator: random.Random) -> bytes:
    i = generator.randrange(len(content))
    return content[:i] + bytes([content[i] ^ 1 << generator.randrange(8)]) + content[i + 1 :]


def truncate(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content))]


def delete(content: bytes, generator: random.Random) -> bytes:
    i = generator.randrange(len(content))
    return content[:i] + content[i + generator.randrange(1, 30) :]


def blank(content: bytes, generator: random.Random) -> bytes:
    i = generator.randrange(len(content))
    return content[:i] + bytes(len(content[i : i + 200])) + content[i + 200 :]


RANDOM = (flip, truncate, delete, blank)


def replace_zip(folder: Path, content: Callable[[], bytes]) -> None:
    (folder / f"{NAME}.zip").write_bytes(content())


def replace_drawing(folder: Path, content: bytes) -> None:
    """In a folder, where no zip has a checksum of it."""
    unpacked(folder, lambda path: path.write_bytes(content))


def certain() -> Iterator[Damage]:
    """Damages that leave something wrong for certain."""
    for name, content in other_contents():
        yield Damage(f"zip: {name}", partial(replace_zip, content=partial(zipped, drawings() | {VICTIM: content})))
        yield Damage(f"folder: {name}", partial(replace_drawing, content=content))
    for name, content in other_zips():
        yield Damage(name, partial(replace_zip, content=partial(bytes, content)))
    for name, write in other_folders():
        yield Damage(name, write)


def by_chance(seed: int) -> Iterator[Damage]:
    """Damages that may hit what does not matter, a date for example: then the drawings are what they were."""
    good = drawings()[VICTIM]
    for name, content in (("no end", good[:-20]), ("a chunk without end", good[:33] + b"\xff" * 4 + good[37:])):
        yield Damage(f"drawing: {name}", partial(replace_drawing, content=content))
    for spoil in RANDOM:
        for i in range(N_RANDOM):
            generator = random.Random(f"{seed} {spoil.__name__} {i}")
            method = generator.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
            content = partial(spoil, zipped(drawings(), method), generator)
            yield Damage(f"zip: {spoil.__name__} {i}", partial(replace_zip, content=content))
        for i in range(N_RANDOM // 3):
            content = spoil(drawings()[VICTIM], random.Random(f"{seed} {spoil.__name__} {i}"))
            yield Damage(f"drawing: {spoil.__name__} {i}", partial(replace_drawing, content=content))

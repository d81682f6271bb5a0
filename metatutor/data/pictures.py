"""Picture files as found on people's disks: what can be read is read, and for the rest it is said why not."""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from metatutor.files import decoding, expanded, one_line

if TYPE_CHECKING:
    from PIL import Image

_MOST_BYTES, _MOST_PIXELS, _MOST_FILES = 300_000_000, 100_000_000, 100_000
_DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits that cameras and scanners write
_CLUTTER = {"thumbs.db", "desktop.ini"}
_PROGRAMS = {"EPS"}  # formats for which Pillow starts another program


@dataclass(frozen=True)
class Picture:
    """A picture and where it comes from.

    Attributes:
        path: path of its file.
        name: name of its class; None: unknown.
        image: its first frame, upright, `"RGB"` or `"L"`.
        digest: digest of the bytes of its file: equal files have equal ones.
    """

    path: Path
    name: str | None
    image: Image.Image
    digest: bytes


@dataclass
class PictureFiles:
    """The files of a folder of class folders, of a flat folder or of one picture; iterating reads them one by one.

    Attributes:
        files: their paths and the classes they belong to (None: unknown), sorted.
        names: names of the class folders, sorted, including those without a picture.
        skipped: what is left out and why; iterating adds to it.
        at_least: pixels that are enough for the sides of a picture: larger ones are read at a smaller size.
        digests: for the digest of each file that was read, the paths with this content.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("CMYK", (8, 8)).save(folder / "a.jpg")
        >>> _ = (folder / "b.jpg").write_text("no picture")
        >>> files = PictureFiles.of(folder)
        >>> [picture.image.mode for picture in files]
        ['RGB']
        >>> [path.name for path in files.skipped]
        ['b.jpg']
    """

    files: Sequence[tuple[Path, str | None]]
    names: Sequence[str] = ()
    skipped: dict[Path, str] = field(default_factory=dict)
    at_least: int | None = None
    digests: dict[bytes, list[tuple[Path, str | None]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, source: Path | str, *, at_least: int | None = None) -> PictureFiles:
        """List a folder of class folders, a flat folder or one file, without reading any; hidden files are ignored.

        Raises:
            ValueError: if there is nothing by that name, or more than 100,000 files; an OSError if it cannot be read.
        """
        source = expanded(source, "the path")
        if not source.is_dir():
            if not source.exists():
                raise ValueError(f"{source} does not exist; give a folder of pictures, or a picture")
            return cls([(source, None)], at_least=at_least)
        folders = [path for path in _entries(source) if _is_folder(path)]
        flat, skipped = [(path, None) for path in _entries(source) if path not in folders], {}
        if not folders:
            return cls(flat, at_least=at_least)
        files = []
        for folder in folders:
            try:
                files += [(path, folder.name) for path in _entries(folder)]
            except OSError as error:
                skipped[folder] = error.strerror or str(error)
        skipped |= {path: "it is beside the class folders, not in one" for path, _ in flat}
        if len(files) > _MOST_FILES:
            raise ValueError(f"{source} holds more than {_MOST_FILES:,} files; give a part of them")
        return cls(files, [folder.name for folder in folders], skipped, at_least)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Picture]:
        for path, name in self.files:
            try:
                data = file_bytes(path)
                image = decoded(data, self.at_least)
            except ValueError as error:
                self.skipped[path] = str(error)
                continue
            digest = blake2b(data, digest_size=16).digest()
            twin = next((other for other, of in self.digests[digest] if of == name and of is not None), None)
            self.digests[digest].append((path, name))
            if twin is not None:
                self.skipped[path] = f"the same file as {twin.name} in its class"
                continue
            yield Picture(path, name, image, digest)

    def in_two_classes(self) -> list[list[Path]]:
        """The files, of those read so far, whose content appears in more than one class."""
        return [[p for p, _ in same] for same in self.digests.values() if len({name for _, name in same}) > 1]


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in _CLUTTER)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link in a circle
        return False


def file_bytes(path: Path) -> bytes:
    """The bytes of a file that may be a picture; a ValueError says why it is not."""
    try:
        if not path.is_file():  # a pipe would be waited for, a device read for ever
            path.stat()
            raise ValueError("a folder in the folder of a class" if path.is_dir() else "not a regular file")
        if not 0 < (size := path.stat().st_size) <= _MOST_BYTES:
            raise ValueError(f"{size:,} bytes, expected at most {_MOST_BYTES:,}" if size else "an empty file")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def decoded(data: bytes, at_least: int | None = None) -> Image.Image:
    """The first frame of a picture's bytes, upright, as `"RGB"` or `"L"`; see `upright`.

    It may be read at a smaller size, with sides of at least `at_least` pixels: a JPEG is read faster, and many fit into
    memory.

    Raises:
        ValueError: if Pillow cannot read them to the end, or there are more than 100 million pixels.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    formats = [name for name in Image.OPEN if name not in _PROGRAMS]
    try:
        with warnings.catch_warnings(), decoding("damaged"):
            warnings.simplefilter("ignore")  # about metadata that nobody reads, and sizes that are checked here
            with Image.open(io.BytesIO(data), formats=formats) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise Image.DecompressionBombError
                if at_least is not None:
                    image.draft(None, (at_least, at_least))
                return upright(image) if at_least is None else _smaller(upright(image), at_least)
    except ValueError as error:
        cause = error.__cause__
        if isinstance(cause, UnidentifiedImageError):
            raise ValueError("not an image that Pillow opens; if it is one, save it as JPEG or PNG") from None
        if isinstance(cause, Image.DecompressionBombError):
            raise ValueError(f"more than {_MOST_PIXELS // 10**6} million pixels; make it smaller") from None
        raise ValueError(one_line(str(error))) from None


def _smaller(image: Image.Image, at_least: int) -> Image.Image:
    """With a shorter side of at most `at_least` pixels; the longer one is squeezed into eight times as many."""
    from PIL import Image

    scale = min(1.0, at_least / min(image.size))
    width, height = (max(1, min(round(side * scale), 8 * at_least)) for side in image.size)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def upright(image: Image.Image) -> Image.Image:
    """Any PIL image as `"RGB"` or `"L"` with 8 bits, turned as its EXIF data says, transparent parts made white."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return _eight_bits(np.asarray(image))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _eight_bits(array: Shaped[np.ndarray, "height width"]) -> Image.Image:
    """Integers scaled from the smallest usual bit depth that holds them; real numbers from smallest to largest."""
    from PIL import Image

    array = np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0)
    low, high = array.min(), array.max()
    if low >= 0 and (array == array.round()).all():
        low, high = 0, next(2**bits - 1 for bits in _DEPTHS if high < 2**bits)
    return Image.fromarray((255 * (array - low) / max(high - low, 1e-12)).round().astype(np.uint8))


def picture_of(image: Any) -> Image.Image:
    """A PIL image, the path of a file, an array or a tensor as a PIL image, `"RGB"` or `"L"`.

    Args:
        image: arrays and tensors are `[height, width]`, `[height, width, 3]` or `[channel, height, width]`, of integers
            from 0 to 255 or floats from 0 to 1.

    Raises:
        ValueError: if it is none of these, or cannot be read.
    """
    from PIL import Image

    if isinstance(image, str | Path):
        try:
            return decoded(file_bytes(expanded(image, "the path")))
        except ValueError as error:
            raise ValueError(f"cannot read {image} as an image ({error}); remove it or convert it") from None
    if isinstance(image, Image.Image):
        return upright(image)
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype.kind not in "buif" or not array.size or not (array.ndim == 2 or array.ndim == 3 == array.shape[2]):
        raise ValueError(
            f"an image must be [height, width], [height, width, 3] or [channel, height, width], got {array.dtype} "
            f"{list(array.shape)}; give a PIL image, a path or such an array"
        )
    most = 1 if array.dtype.kind in "fb" else 255
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= most):
        raise ValueError(
            f"pixels must be floats from 0 to 1 or integers from 0 to 255, got {array.dtype} from {array.min():g} to "
            f"{array.max():g}; divide by 255, or undo the normalisation"
        )
    return Image.fromarray((array * (255 // most)).round().astype(np.uint8))

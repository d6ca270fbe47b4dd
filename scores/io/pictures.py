"""Pictures of others: the one place where Pillow opens a file that pfode did not write.

Pillow guesses the format from the content, whatever the name of the file, and some of its formats start other programs
(EPS runs Ghostscript). Only the formats of `FORMATS` are ever tried, of files up to `MAX_FILE` bytes and pictures up to
`MAX_PIXELS` pixels.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pfode.errors import FileError
from pfode.files import open_regular, read_file

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FORMATS", "MAX_FILE", "MAX_PIXELS", "SUFFIXES", "opened", "read_picture"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # AVIF and WEBP where Pillow was built with them
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MAX_FILE = 64 << 20  # bytes of one picture file
MAX_PIXELS = 1 << 26  # of one picture


@contextmanager
def opened(
    where: str, source: bytes | str | os.PathLike[str], formats: Sequence[str] = FORMATS, most: int = MAX_PIXELS
) -> "Iterator[Image.Image]":
    """A picture as Pillow opens it, for the length of a `with`; nothing is decoded before it is used.

    Args:
        where: what messages call it.
        source: the bytes of the file, or its path.
        formats: those that are tried, of `FORMATS`.
        most: pixels that it may have.

    Raises:
        FileError: it cannot be read, is of another format, has too many pixels, or Pillow finds it broken, here or
            anywhere inside the `with`.
    """
    from PIL import Image, UnidentifiedImageError

    if not set(formats) <= set(FORMATS):
        raise ValueError(f"formats {formats} are not among {FORMATS}")
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as stream:
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(stream, formats=list(formats)) as picture:
                most = min(most, Image.MAX_IMAGE_PIXELS or most)
                if picture.width * picture.height > most:
                    size = f"{picture.width}x{picture.height} pixels are too many"
                    raise FileError(f"{where}: {size}: at most {most:,}", "make it smaller")
                yield picture
        except FileError:
            raise
        except Image.DecompressionBombError as error:
            raise FileError(f"{where}: too many pixels: at most {most:,}", "make it smaller") from error
        except UnidentifiedImageError as error:
            known = ", ".join(formats)
            raise FileError(f"{where}: broken picture (of no known kind: {known})", "remove or replace it") from error
        except Exception as error:  # Pillow's readers raise almost anything on broken input
            reason = f"{type(error).__name__}: {error}"
            raise FileError(f"{where}: broken picture ({reason:.200})", "remove or replace it") from error


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a picture file, not decoded.

    Raises:
        FileError: it cannot be read, is no regular file, or has more than `MAX_FILE` bytes.
    """
    return read_file(path, MAX_FILE, "a picture")

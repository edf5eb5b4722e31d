"""Where files lie: on the local disk, or on any filesystem pyarrow has a URI for."""

import pyarrow as pa
import pyarrow.fs as pafs

from keepwarm.traces.errors import InputError


def locate(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path on it that a path or URI names; InputError if pyarrow has none for it."""
    if "://" not in path:
        return pafs.LocalFileSystem(), path
    try:
        system, inner = pafs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(f"{path}: {first_line(error)}") from error
    return system, inner


def first_line(error: BaseException) -> str:
    """The first line of an exception's text: Arrow's errors run over several."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Checks a checkpoint as far as that is possible without the model that it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.contents import Contents, checkpoint_folder, read_contents, require_inside
from quantlab.checkpoint.documents import read_json
from quantlab.checkpoint.format import SHARD_PREFIX
from quantlab.checkpoint.names import MANIFEST_NAME
from quantlab.checkpoint.reader import empty_model
from quantlab.checkpoint.serialize import file_sha256
from quantlab.checkpoint.shard import read_shard
from quantlab.errors import CheckpointError


@dataclass(frozen=True)
class Verification:
    """What has been checked; that it is returned means that all of it holds.

    Attributes:
        shards: files with weights.
        tensors: stored tensors.
        layers: quantized layers.
        hashed: files whose SHA-256 was compared with the one that was noted when they were written.
    """

    shards: int
    tensors: int
    layers: int
    hashed: int


def verify(path: Path) -> Verification:
    """Read every file of a checkpoint and check it; one shard at a time is in memory.

    Args:
        path: a checkpoint, or the folder of a run, whose manifest is then checked against as well.

    Raises:
        CheckpointError: what is wrong, and where.
    """
    contents = read_contents(checkpoint_folder(path))
    noted = dict(contents.sha256)
    if contents.folder != path and (path / MANIFEST_NAME).exists():
        require_inside(path, [MANIFEST_NAME])
        noted |= _manifest_hashes(path / MANIFEST_NAME)
    _check_stray_shards(contents)
    require_inside(contents.folder, noted)
    _check_hashes(contents.folder, noted)
    placeholders = empty_model(contents, None).state_dict()
    for shard in contents.shards:
        read_shard(contents, shard, placeholders)
    return Verification(
        shards=len(contents.shards),
        tensors=sum(len(tensors) for tensors in contents.shards.values()),
        layers=len(contents.quantization.modules),
        hashed=len(noted),
    )


def _manifest_hashes(path: Path) -> dict[str, str]:
    files = read_json(path).get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise CheckpointError(f"{path}: has no object 'files' of hashes")
    strange = [name for name in files if Path(name).name != name]
    if strange:
        raise CheckpointError(f"{path}: files names {strange[0]!r}, which is not a file of the checkpoint")
    return files


def _check_stray_shards(contents: Contents) -> None:
    found = {path.name for path in contents.folder.glob(f"{SHARD_PREFIX}*.safetensors")}
    stray = sorted(found - contents.shards.keys())
    if stray:
        raise CheckpointError(
            f"{contents.folder}: {stray[0]} belongs to no index; it may be left over from another run"
        )


def _check_hashes(folder: Path, noted: Mapping[str, str]) -> None:
    for name, digest in noted.items():
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: not readable: {error}") from error
        if found != digest:
            raise CheckpointError(
                f"{folder / name} is not as it was written: its SHA-256 is {found}, the noted one {digest}"
            )

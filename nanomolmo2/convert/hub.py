"""The Hugging Face hub: download checkpoints, check them, convert them to the cache folder.

``checkpoints/x.pt`` holds a part under our names, ``checkpoints/x/`` the same weights as
safetensors under the names of their reference, for transformers and other programs.

``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT`` are honoured (by
``huggingface_hub``, which reads them when it is imported).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanomolmo2.convert.folder import NO_ROOM, kind_of, write_part, written_aside
from nanomolmo2.convert.parts import LLM, VISION, Part, open_reference
from nanomolmo2.convert.tensor_files import CacheFile, cache_is_intact, write_cache
from nanomolmo2.terminal import visible

if TYPE_CHECKING:  # models of this disk are loaded without it
    from rich.console import Console
    from rich.progress import Progress

PARTS = {"vision": VISION, "llm": LLM}

WEIGHT_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says of a file; sha256 only of large ones."""

    name: str
    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class Snapshot:
    """A downloaded repository: its folder, commit, and what the hub said of its files.

    ``files`` is empty when the hub was not asked (offline).
    """

    directory: Path
    commit: str
    files: tuple[RemoteFile, ...]


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    allow_patterns: Sequence[str] = WEIGHT_FILES,
) -> Snapshot:
    """Download the matching files of a repository into the Hugging Face cache, or find them there.

    An interrupted download of a large file goes on where it stopped, and its sha256 is checked.

    Args:
        repository: ``owner/name``.
        revision: branch, tag or commit; ``main`` by default.
    Raises: ValueError for a repository, revision or access right that is not there; OSError where
        the hub can not be reached and the cache does not hold the files.
    """
    import huggingface_hub
    from huggingface_hub import errors

    with _explained(repository, revision):
        commit: str | None = None
        files: tuple[RemoteFile, ...] = ()
        # Without an answer the cache may still hold what is wanted; if not, the call below says so.
        with contextlib.suppress(errors.OfflineModeIsEnabled, errors.HTTPError):
            commit, files = _list_files(repository, revision, allow_patterns)
        for file in files:
            if file.sha256 is not None:
                _download_large(repository, commit, file)
        # Finds the large files in the cache, gets the small ones and notes the revision.
        directory = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(allow_patterns)
            )
        )
    return Snapshot(directory, directory.name, files)


def download(
    parts: Sequence[str] = ("vision", "llm"),
    cache_dir: str | Path = "checkpoints",
    *,
    force: bool = False,
    revision: str | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Make the converted cache files that ``from_pretrained`` loads, and safetensors beside them.

    Args:
        parts: of ``vision`` (SigLIP 2 So400m/14, downloads 4.5 GB, keeps 1.6 GB) and ``llm``
            (Qwen3-0.6B-Base, 1.2 GB).
        cache_dir: folder of the converted files and of a folder with safetensors for each.
        force: convert again even if the file is there and intact.
        revision: branch, tag or commit of the repository; only with a single part.
        console: where to report; standard error by default.
    Returns: the paths of the ``.pt`` files.
    Raises: ValueError, OSError as :func:`fetch`; ValueError for downloads whose size or sha256 is
        not what the hub says, or that hold another model.
    """
    unknown = [p for p in parts if p not in PARTS]
    if unknown or not parts:
        raise ValueError(f"unknown part(s) {unknown}: choose from {', '.join(PARTS)}")
    if revision is not None and len(parts) > 1:
        raise ValueError(
            f"revision {revision!r} can not be meant for {len(parts)} repositories: download one "
            f"part at a time"
        )
    console = console or _stderr()
    paths = []
    for name in parts:
        part = PARTS[name]
        path = Path(cache_dir) / part.cache_name
        if not force and _is_current(path, part, revision):
            _report(console, f"{path} is there and intact")
        else:
            _convert(part, path, revision, console)
        _write_folder(part, CacheFile(path), path.with_name(part.folder_name), console)
        paths.append(path)
    return paths


def _convert(part: Part, path: Path, revision: str | None, console: Console) -> None:
    _report(console, f"fetching {part.repository}")
    wanted = (*WEIGHT_FILES, *part.companions)
    snapshot = fetch(part.repository, revision, allow_patterns=wanted)
    with _progress(console) as progress:
        files = _verify(snapshot, progress)
        module, tensors = open_reference(snapshot.directory, part)
        config: Any = module.config
        if config != part.config:
            raise ValueError(
                f"{part.repository} holds another model than expected: {_difference(config, part)}"
            )
        total = sum(p.numel() * part.cache_dtype.itemsize for p in module.parameters())
        task = progress.add_task(f"converting to {path.name}", total=total)
        state_dict = {}
        for name, tensor in tensors.items():
            state_dict[name] = tensor.read(dtype=part.cache_dtype)
            progress.advance(task, state_dict[name].nbytes)
        write_cache(
            path,
            component=part.component,
            config=config.to_dict(),
            source={
                "repo": part.repository,
                "revision": revision or "main",
                "commit": snapshot.commit,
                "files": files,
            },
            state_dict=state_dict,
        )
    _report(console, f"wrote {path} ({path.stat().st_size / 1e9:.2f} GB)")


def _report(console: Console, text: str) -> None:
    console.print(visible(text), highlight=False, markup=False)


def _write_folder(part: Part, cache: CacheFile, folder: Path, console: Console) -> None:
    """Write the weights of a converted file as safetensors, if they are not there already.

    Raises: OSError if the disk is full; nothing half-written stays.
    """
    if _holds_same_weights(folder, part, cache):
        return
    config = type(part.config).from_dict(cache.config)
    state_dict = {name: tensor.read() for name, tensor in cache.tensors.items()}
    with written_aside(folder, kind_of(part.config_to_reference(config))) as aside:
        write_part(part, config, state_dict, aside)
    _report(console, f"wrote {folder} (the same as safetensors)")


def _holds_same_weights(folder: Path, part: Part, cache: CacheFile) -> bool:
    """Whether a folder has every tensor of a converted file, bit for bit."""
    try:
        module, tensors = open_reference(folder, part)
    except (ValueError, OSError):
        return False
    config: Any = module.config
    if config.to_dict() != cache.config or set(tensors) != set(cache.tensors):
        return False
    return all(
        tensors[name].dtype == stored.dtype and torch.equal(tensors[name].read(), stored.read())
        for name, stored in cache.tensors.items()
    )


def _is_current(path: Path, part: Part, revision: str | None) -> bool:
    """Whether the file is there, intact, and of this part and (if one is asked for) revision."""
    if not cache_is_intact(path):
        return False
    try:
        cache = CacheFile(path)
    except ValueError:
        return False
    return cache.component == part.component and cache_matches(cache, part.repository, revision)


def cache_matches(cache: CacheFile, repository: str, revision: str | None) -> bool:
    """Whether a cache file was made from this repository and, if one is named, this revision."""
    source = cache.source
    return source.get("repo") == repository and (
        revision is None or revision in (source.get("revision"), source.get("commit"))
    )


def _difference(config: Any, part: Part) -> str:
    found, expected = config.to_dict(), part.config.to_dict()
    return ", ".join(
        f"{n} is {found[n]}, expected {expected[n]}" for n in found if found[n] != expected[n]
    )


def _list_files(
    repository: str, revision: str | None, allow_patterns: Sequence[str]
) -> tuple[str | None, tuple[RemoteFile, ...]]:
    """The commit that a revision stands for, and its matching files."""
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(
        repository, revision=revision, files_metadata=True, timeout=30
    )
    return info.sha, tuple(
        RemoteFile(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None)
        for f in info.siblings or ()
        if any(fnmatch(f.rfilename, p) for p in allow_patterns)
    )


def _download_large(repository: str, commit: str | None, file: RemoteFile) -> None:
    """Put a file into the Hugging Face cache by its sha256, going on with an earlier attempt.

    ``huggingface_hub`` itself starts a file again after an interruption; it takes up what it finds
    in its ``blobs`` folder.
    """
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    blob = folder / "blobs" / str(file.sha256)
    if blob.exists():
        return
    partial = blob.with_name(f"{blob.name}.incomplete")
    partial.parent.mkdir(parents=True, exist_ok=True)
    done = partial.stat().st_size if partial.exists() else 0
    if file.size is not None and done > file.size:
        partial.unlink()
        done = 0
    with open(partial, "ab") as stream:
        http_get(
            # The hub's own address, not the signed one of the storage behind it, which expires.
            huggingface_hub.hf_hub_url(repository, file.name, revision=commit),
            stream,
            resume_size=done,
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.name,
            tqdm_class=_Bar,
        )
    with _progress(_stderr()) as progress:
        found = _sha256(partial, progress, file.name)
    if found != file.sha256:
        partial.unlink()
        raise ValueError(
            f"{file.name} of {repository} arrived damaged: sha256 {found}, expected {file.sha256}; "
            f"the download was removed, run it again"
        )
    partial.replace(blob)


def _verify(snapshot: Snapshot, progress: Progress) -> dict[str, dict[str, Any]]:
    """Compare every file with what the hub says, or offline with its name in the cache.

    Returns: size and sha256 by file name. Raises: ValueError for a damaged file.
    """
    remote = {f.name: f for f in snapshot.files}
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in snapshot.directory.iterdir() if p.is_file()):
        if not any(fnmatch(path.name, p) for p in WEIGHT_FILES):
            continue
        blob = path.resolve()
        size, digest = blob.stat().st_size, _sha256(blob, progress, path.name)
        expected = remote.get(path.name, RemoteFile(path.name, None, None))
        # The cache stores large files under their sha256.
        named = blob.name if path.is_symlink() and len(blob.name) == 64 else None
        expected_digest = expected.sha256 or named
        if expected.size not in (None, size) or expected_digest not in (None, digest):
            blob.unlink()
            path.unlink(missing_ok=True)
            raise ValueError(
                f"{path} is damaged: {size:,} bytes with sha256 {digest}, expected "
                f"{expected.size or 'unknown'} bytes with sha256 {expected_digest or 'unknown'}; "
                f"it was removed, run the download again"
            )
        files[path.name] = {"size": size, "sha256": digest}
    return files


def _sha256(path: Path, progress: Progress, name: str) -> str:
    digest = hashlib.sha256()
    task = progress.add_task(f"checking {name}", total=path.stat().st_size)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            progress.advance(task, len(block))
    return digest.hexdigest()


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _progress(console: Console) -> Progress:
    from huggingface_hub.utils import are_progress_bars_disabled
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=are_progress_bars_disabled(),
    )


class _Bar:
    """A rich progress bar with the few calls of tqdm that ``http_get`` makes."""

    def __init__(
        self, *, desc: str = "", total: float | None = None, initial: float = 0, **_: Any
    ) -> None:
        self.total = total
        self._progress = _progress(_stderr())
        self._task = self._progress.add_task(desc, total=total, completed=int(initial))

    def update(self, count: float = 1) -> None:
        self._progress.advance(self._task, count)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@contextlib.contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turn the many errors of a download into one that says what to do."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(
            f"{repository} is gated: ask for access at {endpoint}/{repository}, then set HF_TOKEN "
            f"to a token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{endpoint} has no repository {repository}, or it is private: check the name, or set "
            f"HF_TOKEN to a token that may read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(
            f"{repository} has no revision {revision!r}: name a branch, tag or full commit"
        ) from None
    except errors.HFValidationError as error:
        raise ValueError(f"{repository!r} is not a repository name: {error}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            raise OSError(
                f"{repository} is not in the Hugging Face cache ({constants.HF_HUB_CACHE}) and "
                f"HF_HUB_OFFLINE is set: unset it, or set HF_HOME to the folder that holds it"
            ) from None
        raise OSError(_no_network(repository, endpoint, error)) from None
    except errors.HTTPError as error:
        raise OSError(_no_network(repository, endpoint, error)) from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(
            f"could not write {repository} to {constants.HF_HUB_CACHE} ({error.strerror}): make "
            f"room, or set HF_HOME to a folder on another disk; a download goes on where it stopped"
        ) from None


def _no_network(repository: str, endpoint: str, error: BaseException) -> str:
    cause = error.__cause__ or error
    reason = str(cause).strip().split("\n")[0] or type(cause).__name__
    return (
        f"could not get {repository} from {endpoint} ({reason}): check the network, HTTPS_PROXY "
        f"and HF_ENDPOINT and run it again; a download goes on where it stopped"
    )

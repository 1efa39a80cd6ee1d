"""``nanomolmo2 serve``: models for a browser, OpenAI's clients and plain requests."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from nanomolmo2.cli.loading import collect_again, device_of, precision, where
from nanomolmo2.cli.options import (
    MODEL_HELP,
    AtLeast,
    CacheDir,
    Debug,
    DeviceName,
    DType,
    Precision,
    UsageError,
    library_name,
    parse_size,
)
from nanomolmo2.cli.output import note, say
from nanomolmo2.files import read_regular

if TYPE_CHECKING:
    from nanomolmo2.generation.vlm import VLM
    from nanomolmo2.serve.settings import ServeSettings
    from nanomolmo2.serve.store import ModelStore

KEY_VARIABLE = "NANOMOLMO2_API_KEY"
_KEY_FILE_BYTES = 1 << 16
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_NAME = re.compile(r"[\w][\w./:+-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve models to a browser, to OpenAI's clients and to plain HTTP requests.

    The page for people is at /, OpenAI's interface at /v1, numbers are at /metrics. SIGTERM and
    Ctrl-C let running answers finish; a second one ends the server at once.
    """

    model: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="[NAME=]MODEL",
            help=f"{MODEL_HELP}; several: --model tiny --model mine=runs/mine/model, which are "
            f"loaded when they are first asked for by name, but the first at once; none = tiny",
        ),
    ] = ()
    host: Annotated[
        str,
        arg(
            metavar="HOST",
            help="where to listen; 0.0.0.0 is reached by other computers: give a key then",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, arg(metavar="PORT", help="0 = one that is free, which is printed"), AtLeast(0)
    ] = 8000
    api_key: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="KEY",
            help="only answer those who send this key; several: --api-key A --api-key B. Other "
            f"users of this computer can see it here: the variable {KEY_VARIABLE} and "
            "--api-key-file hide it",
        ),
    ] = ()
    api_key_file: Annotated[Path | None, arg(metavar="FILE", help="such keys, one a line")] = None
    allow_remote_images: Annotated[
        bool,
        arg(
            help="download pictures whose http(s) addresses are sent; never from this computer or "
            "a private network"
        ),
    ] = False
    allowed_host: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="NAME",
            help="another name by which the server may be called, such as a proxy's; none = at "
            "127.0.0.1 its own names only, elsewhere any",
        ),
    ] = ()
    memory: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            help="most memory for the weights of all models, such as 24GiB; models that nobody "
            "uses make room for others; none = no limit",
        ),
    ] = None
    max_running: Annotated[
        int, arg(metavar="N", help="answers of a model that are written together"), AtLeast(1)
    ] = 8
    max_waiting: Annotated[
        int, arg(metavar="N", help="requests beyond these; further ones get 429"), AtLeast(0)
    ] = 128
    max_seconds: Annotated[
        float, arg(metavar="S", help="longest time for an answer, waiting included")
    ] = 300.0
    max_body: Annotated[str, arg(metavar="SIZE", help="largest request")] = "64MiB"
    max_images: Annotated[int, arg(metavar="N", help="pictures of a request"), AtLeast(1)] = 16
    max_pixels: Annotated[
        int,
        arg(metavar="N", help="of a picture; those of a request may have four times as many"),
        AtLeast(1),
    ] = 64_000_000
    max_new_tokens: Annotated[
        int, arg(metavar="N", help="longest answer that may be asked for, in tokens"), AtLeast(1)
    ] = 2048
    batch_invariant: Annotated[
        bool,
        arg(
            help="answers that are the same to the last bit, whatever is answered beside them; "
            "else within rounding, which may decide between two tokens that are as likely; slower"
        ),
    ] = False
    shutdown_seconds: Annotated[
        float, arg(metavar="S", help="how long running answers may go on after SIGTERM")
    ] = 30.0
    open: Annotated[bool, arg(help="open the page in a browser, where there is a screen")] = False
    device: DeviceName = None
    dtype: DType = None
    quantize: Precision = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        sources = read_models(self.model)
        keys = read_keys(self.api_key, self.api_key_file, os.environ)
        try:
            from nanomolmo2.serve import running
            from nanomolmo2.serve.app import make_app
        except ModuleNotFoundError as error:
            raise ImportError(
                f"serving needs the package {error.name}, which is not installed: pip install "
                f"'nanomolmo2[serve]'"
            ) from None
        with running.bind(self.host, self.port) as bound:
            is_local = running.is_loopback(bound)
            settings = self._settings(keys, is_local)
            store = self._store(sources, settings)
            load_first(store)
            app = make_app(store, settings)
            if not is_local and not settings.api_keys:
                note(
                    f"warning: every computer that reaches {running.address_of(bound)} may use the "
                    f"models: set {KEY_VARIABLE} or --api-key-file, or listen at 127.0.0.1"
                )

            def on_start() -> None:
                say(f"serving {', '.join(sources)} at {running.address_of(bound)}")
                sys.stdout.flush()  # whoever waits for the line may be a program
                if self.open:
                    running.open_page(running.address_of(bound))

            running.log_lines(note)
            try:
                running.run(app, app.state.server.admission, settings, bound, on_start)
            finally:
                store.close()

    def _settings(self, keys: tuple[str, ...], is_local: bool) -> ServeSettings:
        from nanomolmo2.serve.settings import ServeSettings

        local = (*_LOCAL_HOSTS, self.host) if is_local else ()
        try:
            return ServeSettings(
                host=self.host,
                port=self.port,
                api_keys=keys,
                allowed_hosts=(*local, *self.allowed_host),
                allow_remote_images=self.allow_remote_images,
                memory_bytes=None
                if self.memory is None
                else int(parse_size(self.memory, "--memory")),
                max_body_bytes=int(parse_size(self.max_body, "--max-body")),
                **{
                    name: getattr(self, name)
                    for name in (
                        *("max_running", "max_waiting", "max_seconds", "max_images"),
                        *("max_pixels", "max_new_tokens", "shutdown_seconds", "batch_invariant"),
                    )
                },
            )
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _store(self, sources: Mapping[str, str], settings: ServeSettings) -> ModelStore:
        """The models by name, none of them loaded.

        Raises: ValueError for a folder that is not there.
        """
        from nanomolmo2.accelerate.device import usual_dtype
        from nanomolmo2.convert.pretrained import find_directory, weight_bytes
        from nanomolmo2.generation.vlm import VLM
        from nanomolmo2.serve.store import ModelStore

        device = device_of(self.device)
        options: dict[str, Any] = {
            **precision(self.dtype, self.quantize),
            "cache_dir": self.cache_dir,
        }

        def loader(source: str) -> Callable[[], VLM]:
            return lambda: VLM(
                library_name(source),
                device=device,
                max_rows=settings.max_running,
                **options,  # pictures reach it decoded: it opens no address itself
            )

        def size(source: str) -> Callable[[], int]:
            dtype = self.dtype or usual_dtype(device)
            return lambda: weight_bytes(library_name(source), dtype=dtype, cache_dir=self.cache_dir)

        for source in sources.values():
            if library_name(source) is not None and not is_of_hub(source):
                find_directory(source)
        return ModelStore(
            {name: loader(source) for name, source in sources.items()},
            weight_bytes={name: size(source) for name, source in sources.items()},
            memory_bytes=settings.memory_bytes,
        )


def load_first(store: ModelStore) -> None:
    """Load the default model, and say where it is; what is wrong with it is told in full here.

    Raises: what loading raised.
    """
    from nanomolmo2.serve.refusal import Refusal

    try:
        with store.use() as vlm:
            collect_again()
            note(where(vlm.model))
    except Refusal as refusal:
        if isinstance(refusal.__cause__, Exception):
            raise refusal.__cause__ from None
        raise ValueError(refusal.message) from None


def is_of_hub(source: str) -> bool:
    """Whether a model would be downloaded, if it was not yet."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", source)) and not os.path.isdir(source)


def read_models(given: Sequence[str]) -> dict[str, str]:
    """``NAME=MODEL``, or MODEL alone -> the models by the names that clients use.

    A folder alone is called by its last part: where it lies is nobody's business.

    Raises: UsageError for a name that is none, or twice there.
    """
    models: dict[str, str] = {}
    for text in given or ("tiny",):
        name, equals, source = text.partition("=")
        if not equals or os.path.isdir(text):
            source = text
            name = Path(text).resolve().name if os.path.isdir(text) and text != "tiny" else text
            name = text if is_of_hub(text) else name.rpartition("/")[2]
        if not source or not _NAME.fullmatch(name):
            raise UsageError(
                f"--model is {text!r}, expected a model or NAME=MODEL with a name of letters, "
                f"digits, and - . _ / : +"
            )
        if name in models:
            raise UsageError(
                f"two models are called {name}: give one another name, as in --model other={source}"
            )
        models[name] = source
    return models


def read_keys(
    given: Sequence[str], file: Path | None, environment: Mapping[str, str]
) -> tuple[str, ...]:
    """All keys that open the server.

    Raises: UsageError for an empty key or file: the server would be open though it should not be.
    """
    keys = list(given)
    if KEY_VARIABLE in environment:
        keys.append(environment[KEY_VARIABLE])
        if not keys[-1].strip():
            raise UsageError(f"{KEY_VARIABLE} is set and empty: give it a key, or unset it")
    if file is not None:
        try:
            lines = read_regular(file, _KEY_FILE_BYTES).decode().split("\n")
        except UnicodeDecodeError:
            raise UsageError(f"{file} is no text in UTF-8: write one key a line") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UsageError(f"{file} holds no key: write one a line")
        keys += found
    return tuple(dict.fromkeys(keys))

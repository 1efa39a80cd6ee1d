"""Load and save models: names, folders, the cache and the hub.

A name or path is looked up in this order:

1. a folder: our own format, Molmo2's, MolmoPoint's, or a Hugging Face checkpoint of the part;
2. ``"tiny"``: the bundled model;
3. no name, or the name of a part's own repository: the converted file in ``cache_dir``, if there;
4. ``owner/name`` on the Hugging Face hub.

Weights keep the dtype they are stored in unless another is asked for. Quantised weights are always
read as they are stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from nanomolmo2.accelerate import defaults
from nanomolmo2.accelerate.device import Device, choose_device
from nanomolmo2.accelerate.quantization import Modes, fixed_dtypes
from nanomolmo2.convert.adapters import merge_adapters
from nanomolmo2.convert.agreement import TOKENIZER_NAME, check_agreement
from nanomolmo2.convert.folder import kind_of, write_json, write_weights, written_aside
from nanomolmo2.convert.hub import WEIGHT_FILES, cache_matches, fetch
from nanomolmo2.convert.model_card import model_card, write_card
from nanomolmo2.convert.molmo2 import open_molmo2
from nanomolmo2.convert.molmo2_config import MODEL_TYPE as MOLMO2
from nanomolmo2.convert.molmo_point import open_molmo_point
from nanomolmo2.convert.molmo_point_config import MODEL_TYPE as MOLMO_POINT
from nanomolmo2.convert.parts import (
    CONFIG_NAME,
    LLM,
    VISION,
    Part,
    build_on_meta,
    check_depth,
    open_reference,
    read_config,
)
from nanomolmo2.convert.quantization import (
    MODEL_TYPE,
    QUANTIZATION,
    TABLE,
    open_own_tensors,
    own_type,
    prepare_parts,
    quantization_entry,
    quantize_loaded,
    tables_in_16_bit,
)
from nanomolmo2.convert.state_dict import Shaped, check_keys, to_reference
from nanomolmo2.convert.tensor_files import (
    CacheFile,
    Readable,
)
from nanomolmo2.models import LanguageModel, NanoMolmo2, VisionEncoder
from nanomolmo2.models.connector import MultimodalConnector
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config

if TYPE_CHECKING:
    from nanomolmo2.processor import Processor

# Whole models in the formats of AI2, by the model_type of their configs.
RELEASED = {MOLMO2: open_molmo2, MOLMO_POINT: open_molmo_point}
TINY = Path(__file__).parents[1] / "assets" / "tiny"

# Everything a repository in our own format may hold.
_OWN_FILES = (*WEIGHT_FILES, "*.json", "README.md")

Dtype = torch.dtype | str | None
Adapters = str | Path | Sequence[str | Path] | None


def load_vision_encoder(
    name_or_path: str | Path | None = None,
    *,
    cache_dir: str | Path | None = "checkpoints",
    dtype: Dtype = None,
    device: Device = None,
    revision: str | None = None,
    quantize: Modes = None,
) -> VisionEncoder:
    """Load a vision encoder; by default SigLIP 2 So400m/14 at 384 pixels.

    Args:
        name_or_path: a folder (SigLIP checkpoint, whole or vision tower, or one of our models),
            ``"tiny"`` or a hub repository.
        cache_dir: folder of the converted files; None = ask the hub and leave the cache alone.
        dtype: of the weights, such as "bfloat16"; as stored by default.
        device: of the weights, see `choose_device`; the CPU by default.
        revision: branch, tag or commit on the hub.
        quantize: a mode of :func:`nanomolmo2.accelerate.quantize`; None = as stored.
    Raises: ValueError for anything that is not such a checkpoint; OSError without network.
    """
    module = _load_part(VISION, name_or_path, cache_dir, dtype, device, revision, quantize)
    return cast(VisionEncoder, module)


def load_language_model(
    name_or_path: str | Path | None = None,
    *,
    cache_dir: str | Path | None = "checkpoints",
    dtype: Dtype = None,
    device: Device = None,
    revision: str | None = None,
    quantize: Modes = None,
) -> LanguageModel:
    """Load a decoder; by default Qwen3-0.6B-Base. Arguments as :func:`load_vision_encoder`."""
    module = _load_part(LLM, name_or_path, cache_dir, dtype, device, revision, quantize)
    return cast(LanguageModel, module)


def load_nanomolmo2(
    name_or_path: str | Path | None = None,
    *,
    cache_dir: str | Path | None = "checkpoints",
    dtype: Dtype = None,
    device: Device = None,
    revision: str | None = None,
    quantize: Modes = None,
    adapter: Adapters = None,
    adapter_weights: Sequence[float] | None = None,
) -> NanoMolmo2:
    """Load a whole model: a folder that ``save_pretrained`` wrote, a Molmo2 checkpoint (released or
    transformers' own names), a MolmoPoint checkpoint, ``"tiny"``, or one of these on the hub.

    Without a name: SigLIP 2 and Qwen3-0.6B-Base, joined by a fresh connector.
    Arguments as :func:`load_vision_encoder`, and:

    Args:
        adapter: folders of adapters of this model (``adapter`` of a run with LoRA), one or several,
            whose changes add up; they are merged before anything is cast or quantised.
        adapter_weights: how much of each; 1 by default.
    """
    dtype, device = as_dtype(dtype), _on_cpu_or(device)
    stored = None if adapter is not None else dtype  # merged into the weights as they are stored
    if name_or_path is None:
        model = _assemble(cache_dir, stored, device, revision)
    else:
        directory = find_directory(name_or_path, revision)
        model, tensors = _open_whole(directory)
        _fill(model, tensors, stored, device)
    if adapter is not None:
        merge_adapters(model, adapter, adapter_weights)
        model = model if dtype is None else model.to(dtype)
    elif adapter_weights is not None:
        raise ValueError("adapter_weights are of adapters, and none is named: give adapter too")
    return defaults(quantize_loaded(model, quantize)).eval()


def load(
    name_or_path: str | Path | None = None,
    *,
    cache_dir: str | Path | None = "checkpoints",
    dtype: Dtype = None,
    device: Device = None,
    revision: str | None = None,
    quantize: Modes = None,
    adapter: Adapters = None,
    adapter_weights: Sequence[float] | None = None,
) -> tuple[NanoMolmo2, Processor]:
    """Load a model and the processor that belongs to it. Arguments as :func:`load_nanomolmo2`, but:

    Args:
        device: of the weights; by default the best there is: CUDA, then MPS, then the CPU. Tensors
            for the model go there too, as in ``batch.to(device)``.
    Raises: ValueError also where the two do not fit each other.
    """
    model = load_nanomolmo2(
        name_or_path,
        cache_dir=cache_dir,
        dtype=dtype,
        device=choose_device(device),
        revision=revision,
        quantize=quantize,
        adapter=adapter,
        adapter_weights=adapter_weights,
    )
    processor = load_processor(name_or_path, revision=revision)
    check_agreement(model.config, processor)
    return model, processor


def load_processor(
    name_or_path: str | Path | None = None, *, revision: str | None = None
) -> Processor:
    """Load the processor of a whole model; without a name that of the base design.

    Raises: ValueError for a folder without one; OSError without network.
    """
    from nanomolmo2.processor import Processor, ProcessorConfig, Tokenizer

    if name_or_path is not None:
        directory = find_directory(name_or_path, revision)
        model_type = _model_type(directory)
        if model_type == MOLMO2:
            from nanomolmo2.convert.molmo2_processor import read_molmo2_processor

            return read_molmo2_processor(directory)
        if model_type == MOLMO_POINT:
            from nanomolmo2.convert.molmo_point_processor import read_molmo_point_processor

            return read_molmo_point_processor(directory)
        return Processor.load(directory)
    directory = fetch(LLM.repository, allow_patterns=(TOKENIZER_NAME,)).directory
    return Processor(ProcessorConfig(), Tokenizer.from_file(directory / TOKENIZER_NAME))


def load_config(
    name_or_path: str | Path | None = None, *, revision: str | None = None
) -> NanoMolmo2Config:
    """Configuration of a whole model, its weights not read; without a name the base design's.

    Raises: as :func:`load_nanomolmo2`.
    """
    if name_or_path is None:
        return NanoMolmo2Config()
    return _open_whole(find_directory(name_or_path, revision))[0].config


def weight_bytes(
    name_or_path: str | Path | None = None,
    *,
    cache_dir: str | Path | None = "checkpoints",
    dtype: Dtype = None,
    revision: str | None = None,
) -> int:
    """Bytes that the weights of a whole model have once they are loaded, which are not read here.

    What is quantised on loading is held as it is stored before, and counted so; of the base
    design, the fresh connector is left out. Arguments and errors as :func:`load_nanomolmo2`.
    """
    dtype = as_dtype(dtype)
    if name_or_path is None:
        parts = [_open_part(part, None, cache_dir, None) for part in (VISION, LLM)]
    else:
        parts = [_open_whole(find_directory(name_or_path, revision))]
    total = 0
    for module, tensors in parts:
        fixed = fixed_dtypes(module)
        for name, tensor in tensors.items():
            kept = fixed.get(name, dtype) or tensor.dtype
            total += math.prod(tensor.shape) * kept.itemsize
    return total


def load_connector(name_or_path: str | Path) -> MultimodalConnector:
    """The connector of a whole model, alone. Raises: as :func:`load_nanomolmo2`."""
    model, tensors = _open_whole(find_directory(name_or_path, None))
    start = "connector."
    own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    _fill(model.connector, own, None, None)
    return model.connector


def save_pretrained(
    model: NanoMolmo2 | VisionEncoder | LanguageModel,
    directory: str | Path,
    processor: Processor | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder that ``from_pretrained`` reads back bit for bit.

    A whole model is written in our own format, with a generated model card; a part in the format of
    its reference, which transformers also reads, but a quantised part in ours. Quantised weights
    are written plain: int8 and float32 scales, or float16, which the config's ``quantization``
    explains; the embedding table beside them in 16 bit. Files are written aside and moved in when
    all are complete; other files in the folder stay.

    Args:
        model: what to save, on any device.
        directory: created if needed.
        processor: saved along with a whole model, so that the folder can be served.
        max_shard_size: weights above it are split, with an index; bytes, or text such as "5GB".
    Raises: ValueError for a path that is a file, a model with LoRA matrices.
    """
    if any(name.endswith(".lora_A") for name, _ in model.named_parameters()):
        raise ValueError(
            "the model has LoRA matrices, which no checkpoint holds: merge_lora(llm, final=True) "
            "first, or write them alone with save_lora"
        )
    state_dict = model.state_dict()
    part = VISION if isinstance(model, VisionEncoder) else LLM
    extra = quantization_entry(model)  # not empty: what the reference's format cannot say
    if isinstance(model, NanoMolmo2):
        config = {"model_type": MODEL_TYPE, **extra, **model.config.to_dict()}
    elif extra:
        config = {"model_type": own_type(part), **extra, **model.config.to_dict()}
    else:
        # An encoder built without its last blocks would not be the model of its own config.
        _check_fit(build_on_meta(part.build, model.config), state_dict, "the part to save")
        config = part.config_to_reference(model.config)
        state_dict = to_reference(state_dict, part.table)
    with written_aside(directory, kind_of(config)) as aside:
        write_json(aside / CONFIG_NAME, config)
        if isinstance(model, NanoMolmo2):
            write_card(aside, directory, model_card(model, processor))
            if processor is not None:
                processor.save(aside)
        write_weights(tables_in_16_bit(model, state_dict), aside, max_shard_size)


def _load_part(
    part: Part,
    name_or_path: str | Path | None,
    cache_dir: str | Path | None,
    dtype: Dtype,
    device: Device,
    revision: str | None,
    quantize: Modes,
) -> nn.Module:
    dtype, device = as_dtype(dtype), _on_cpu_or(device)
    module, tensors = _open_part(part, name_or_path, cache_dir, revision)
    _fill(module, tensors, dtype, device)
    return defaults(quantize_loaded(module, quantize)).eval()


def _open_part(
    part: Part,
    name_or_path: str | Path | None,
    cache_dir: str | Path | None,
    revision: str | None,
) -> tuple[nn.Module, Mapping[str, Readable]]:
    """Find a part: its module on the meta device, and its tensors, not read yet."""
    name = part.repository if name_or_path is None else str(name_or_path)
    if name == part.repository and (name_or_path is None or not Path(name).is_dir()):
        if cache_dir is not None and (path := Path(cache_dir) / part.cache_name).exists():
            cache = CacheFile(path)
            _check_origin(part, cache)
            if revision is None or cache_matches(cache, part.repository, revision):
                return _open_cache(part, cache)
        elif cache_dir is not None and revision is None:
            folder = Path(cache_dir) / part.folder_name
            if (folder / CONFIG_NAME).exists():
                return _open_converted_folder(part, folder)
        return open_reference(fetch(part.repository, revision).directory, part)
    if Path(name).is_file():
        return _open_cache(part, CacheFile(name))
    directory = find_directory(name, revision)
    model_type = _model_type(directory)
    if model_type == own_type(part):
        return _open_own_part(directory, part)
    if model_type not in (MODEL_TYPE, *RELEASED):
        return open_reference(directory, part)
    model, tensors = _open_whole(directory)
    start = f"{part.component}."
    own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    return getattr(model, part.component), own


def _open_whole(directory: Path) -> tuple[NanoMolmo2, Mapping[str, Readable]]:
    """A whole model in any format: on the meta device, and its tensors, not read."""
    model_type = _model_type(directory)
    if model_type in RELEASED:
        return RELEASED[model_type](directory)
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"{directory} holds a checkpoint of type (model_type in {CONFIG_NAME}) "
            f"{model_type!r:.60}, expected {MODEL_TYPE!r}, {MOLMO2!r} or {MOLMO_POINT!r}: a vision "
            f"encoder or language model alone loads with VisionEncoder.from_pretrained or "
            f"LanguageModel.from_pretrained"
        )
    config = NanoMolmo2Config.load(directory / CONFIG_NAME, ignore=("model_type", QUANTIZATION))
    tensors, entry = open_own_tensors(directory)
    for part_config in (config.vision_config, config.llm_config):
        check_depth(part_config, len(tensors), str(directory))
    model = cast(NanoMolmo2, build_on_meta(NanoMolmo2, config, directory / CONFIG_NAME))
    prepare_parts(dict(model.named_children()), entry, directory)
    _check_fit(model, tensors, str(directory))
    return model, tensors


def _model_type(directory: Path) -> str | None:
    found = read_config(directory).get("model_type")
    return None if found is None else str(found)  # a file may hold anything


def _open_own_part(directory: Path, part: Part) -> tuple[nn.Module, Mapping[str, Readable]]:
    """A quantised part: on the meta device, and its tensors, not read."""
    ignored = ("model_type", QUANTIZATION)
    config = type(part.config).load(directory / CONFIG_NAME, ignore=ignored)
    tensors, entry = open_own_tensors(directory)
    check_depth(config, len(tensors), str(directory))
    module = build_on_meta(part.build, config, directory / CONFIG_NAME)
    prepare_parts({part.component: module}, entry, directory)
    _check_fit(module, tensors, str(directory))
    return module, tensors


def _open_cache(part: Part, cache: CacheFile) -> tuple[nn.Module, Mapping[str, Readable]]:
    if cache.component != part.component:
        raise _other_model(part, cache)
    try:
        config = type(part.config).from_dict(cache.config)
    except ValueError as error:
        raise ValueError(f"{cache.path}: {error}") from None
    check_depth(config, len(cache.tensors), str(cache.path))
    module = build_on_meta(part.build, config, cache.path)
    _check_fit(module, cache.tensors, str(cache.path))
    return module, cache.tensors


def _open_converted_folder(part: Part, folder: Path) -> tuple[nn.Module, Mapping[str, Readable]]:
    """What `download` wrote beside its ``.pt`` file, where only the folder was kept."""
    module, tensors = open_reference(folder, part)
    if module.config != part.config:
        raise ValueError(
            f"{folder} holds another model than {part.component} of {part.repository}: replace it "
            f"with `nanomolmo2 download --force`, or pass cache_dir=None"
        )
    return module, tensors


def _check_origin(part: Part, cache: CacheFile) -> None:
    """A file in the cache folder must be the model that its name promises."""
    same = cache.config == part.config.to_dict() and cache_matches(cache, part.repository, None)
    if cache.component != part.component or not same:
        raise _other_model(part, cache)


def _other_model(part: Part, cache: CacheFile) -> ValueError:
    detail = ""
    if cache.component == part.component:
        expected, found = part.config.to_dict(), cache.config
        differing = [n for n in expected if found.get(n) != expected[n]]
        detail = "".join(
            f", {n} {found.get(n)!r:.40} instead of {expected[n]}" for n in differing[:3]
        )
    source = f"{cache.source.get('repo', 'an unknown repository')!s:.100}"
    return ValueError(
        f"{cache.path} holds another model: found {cache.component} of {source}{detail}, expected "
        f"{part.component} of {part.repository}; replace it with `nanomolmo2 download --force`, "
        f"or pass cache_dir=None"
    )


def _assemble(
    cache_dir: str | Path | None, dtype: torch.dtype | None, device: Device, revision: str | None
) -> NanoMolmo2:
    """SigLIP 2, Qwen3-0.6B-Base and a connector with fresh weights."""
    if revision is not None:
        raise ValueError(
            f"revision {revision!r} can not be meant for two repositories: load the parts with "
            f"VisionEncoder.from_pretrained and LanguageModel.from_pretrained"
        )
    vision, vision_tensors = _open_part(VISION, None, cache_dir, None)
    llm, llm_tensors = _open_part(LLM, None, cache_dir, None)
    config = NanoMolmo2Config(
        vision_config=cast(VisionEncoder, vision).config, llm_config=cast(LanguageModel, llm).config
    )
    model = cast(NanoMolmo2, build_on_meta(NanoMolmo2, config))
    vision_state = {n: t.read(dtype=dtype, device=device) for n, t in vision_tensors.items()}
    # The connector takes the vision encoder's features as they come, so it has their dtype.
    like = vision_state["patch_embedding.weight"]
    model.connector = MultimodalConnector(config.connector).to(like.device, like.dtype)
    model.vision_encoder.load_state_dict(vision_state, strict=True, assign=True)
    _fill(model.llm, llm_tensors, dtype, device)
    return model


def find_directory(
    name_or_path: str | Path,
    revision: str | None = None,
    allow_patterns: Sequence[str] = _OWN_FILES,
) -> Path:
    """The folder of a checkpoint; these files of it are downloaded if the name is one of the hub's.

    Raises: ValueError for a name of nothing; OSError without network.
    """
    name = str(name_or_path)
    if name == "tiny":
        # First, so that the name means the same in every working folder; "./tiny" is a folder.
        return TINY
    path = Path(name_or_path).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise ValueError(f"{path} is a file: name the folder that holds {CONFIG_NAME} and weights")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(
            f"there is no model {name!r}: expected 'tiny', a folder, or owner/name on the Hugging "
            f"Face hub"
        )
    try:
        return fetch(name, revision, allow_patterns=allow_patterns).directory
    except (ValueError, OSError) as error:
        raise type(error)(f"there is no folder {name}, and on the hub: {error}") from None


def _check_fit(module: nn.Module, tensors: Mapping[str, Shaped], source: str) -> None:
    expected = module.state_dict()
    check_keys(
        missing=[name for name in expected if name not in tensors],
        unused=[name for name in tensors if name not in expected],
        misshapen={
            name: (tuple(tensors[name].shape), tuple(parameter.shape))
            for name, parameter in expected.items()
            if name in tensors and tuple(parameter.shape) != tuple(tensors[name].shape)
        },
        source=source,
    )
    for name, fixed in fixed_dtypes(module).items():
        if tensors[name].dtype != fixed:  # type: ignore[attr-defined]
            raise ValueError(
                f"{source}: {name} is stored as {tensors[name].dtype}, but {CONFIG_NAME} says that "  # type: ignore[attr-defined]
                f"it is {fixed}: the two are of different checkpoints"
            )


def _fill(
    module: nn.Module,
    tensors: Mapping[str, Readable],
    dtype: torch.dtype | None,
    device: Device,
) -> None:
    """Give a module on the meta device its weights, without a second copy."""
    fixed = fixed_dtypes(module)
    state = {}
    for name, tensor in tensors.items():
        wanted = fixed.get(name, dtype)
        if wanted is None and fixed and name.endswith(TABLE):
            # Stored in 16 bit to save space; read in the dtype of the weights around it.
            wanted = tensors[name.removesuffix(TABLE) + "norm.weight"].dtype
        state[name] = tensor.read(dtype=wanted, device=device)
    module.load_state_dict(state, strict=True, assign=True)


def _on_cpu_or(device: Device) -> Device:
    """A device that was asked for, if it is there."""
    return None if device is None else choose_device(device)


def as_dtype(dtype: Dtype) -> torch.dtype | None:
    """A dtype, also by its name. Raises: ValueError for anything but floating point."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            f"dtype is {dtype!r}, expected a floating point torch.dtype, its name (float32, "
            f"bfloat16 or float16) or None"
        )
    return found

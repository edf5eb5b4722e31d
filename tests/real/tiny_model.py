"""Make a language model so small that any machine serves it: ``python tiny_model.py DIRECTORY vllm|dynamo``.

Run by the engine's own interpreter, offline. The tokenizer learns from Python's library, so that words are tokens as in
real vocabularies; the two engines get two ways of writing a conversation down. vLLM's model has random weights, and
answers with whole words alone: each is one token, the same one when it comes back in a prompt, and no answer ends
before it is as long as was asked for. Dynamo's mock workers need no weights.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from sys import argv
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # type: ignore[import-not-found]

VOCABULARY, WIDTH, HEAD, INNER, LENGTH = 16_000, 64, 32, 128, 262_144
PAD, START, END = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Line ends stand inside of expressions: engines trim those of the template itself.
OPEN, CLOSE = "{{ '<|im_start|>' + ", "{{ '<|im_end|>\\n' }}"
BEGIN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PARTS = (
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for p in m.content %}{{ p.text }}{% endfor %}"
)
CALLS = "{% for c in m.tool_calls or [] %}{{ '\\n<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
TOOLS = "{% for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}"
TEMPLATES = {
    # Tools come first and results name their call.
    "vllm": f"{{% if tools %}}{OPEN}'tools\\n' }}}}{TOOLS}{CLOSE}{{% endif %}}"
    f"{{% for m in messages %}}{OPEN}m.role + (' ' + m.tool_call_id if m.tool_call_id else '') + '\\n' }}}}"
    f"{PARTS}{{% endif %}}{CALLS}{CLOSE}{{% endfor %}}{BEGIN}",
    # As Qwen's: tools stand behind the text of the system, and results are the user's.
    "dynamo": f"{{% set own = messages[0].role == 'system' %}}{{% if own or tools %}}{OPEN}'system\\n' }}}}"
    "{% if own %}{{ messages[0].content }}{% endif %}"
    f"{{% if tools %}}{{{{ '\\n\\n# Tools\\n' }}}}{TOOLS}{{% endif %}}{CLOSE}{{% endif %}}"
    "{% for m in messages %}{% if not (own and loop.first) %}"
    f"{OPEN}('user\\n<tool_response>' if m.role == 'tool' else m.role) + '\\n' + (m.content or '') }}}}{CALLS}"
    f"{CLOSE}{{% endif %}}{{% endfor %}}{BEGIN}",
}


def library(most: int = 8_000_000) -> Iterator[str]:
    """The text of Python's own library, the same for the same interpreter."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text("utf-8", "ignore")
        most -= len(text)
        if most < 0:
            return
        yield text


def learn() -> Tokenizer:
    """Byte pairs learnt from the library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(library(), trainer)
    return tokenizer


def about(size: int) -> dict[str, Any]:
    """The model's shape: one layer of one head, as small as vLLM serves on a CPU."""
    one = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = {"hidden_size": WIDTH, "head_dim": HEAD, "intermediate_size": INNER, "vocab_size": size}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    rest = {"max_position_embeddings": LENGTH, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    return kind | shape | dict.fromkeys(one, 1) | rest | {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}


def is_word(tokenizer: Tokenizer, number: int) -> bool:
    """Whether a token is a whole word with a space before it, and that word this token."""
    text = tokenizer.decode([number])
    return text[:1] == " " and text[1:].isalpha() and text.isascii() and tokenizer.encode(text).ids == [number]


def weights(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Random weights, by the names that Llama's have. Only the output rows of whole words are not zero."""
    import numpy as np

    lots = np.random.default_rng(0)

    def random(*shape: int, spread: float = 0.2) -> Any:
        return lots.standard_normal(shape, np.float32) * np.float32(spread)

    words = np.array([is_word(tokenizer, number) for number in range(size)], np.float32)
    layer = {f"self_attn.{name}_proj": random(HEAD, WIDTH) for name in "qkv"} | {
        "self_attn.o_proj": random(WIDTH, HEAD),
        "mlp.gate_proj": random(INNER, WIDTH),
        "mlp.up_proj": random(INNER, WIDTH),
        "mlp.down_proj": random(WIDTH, INNER),
        "input_layernorm": np.ones(WIDTH, np.float32),
        "post_attention_layernorm": np.ones(WIDTH, np.float32),
    }
    named = {f"model.layers.0.{name}.weight": values for name, values in layer.items()}
    named |= {
        "model.embed_tokens.weight": random(size, WIDTH, spread=1),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    return named | {"lm_head.weight": random(size, WIDTH, spread=1) * words[:, None]}


def make(place: Path, engine: str) -> None:
    """Write the model's files."""
    place.mkdir(parents=True, exist_ok=True)
    tokenizer = learn()
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(place / "tokenizer.json"))
    ends = {"eos_token": END, "pad_token": PAD, "bos_token": None, "unk_token": None}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH, "add_bos_token": False}
    kind |= {"clean_up_tokenization_spaces": False, "chat_template": TEMPLATES[engine]}
    files = {"tokenizer_config": kind | ends, "config": about(size), "generation_config": {"eos_token_id": 2}}
    for name, content in files.items():
        (place / f"{name}.json").write_text(json.dumps(content, indent=1))
    if engine == "vllm":
        from safetensors.numpy import save_file  # type: ignore[import-not-found]

        save_file(weights(tokenizer, size), str(place / "model.safetensors"), {"format": "pt"})


if __name__ == "__main__":
    make(Path(argv[1]), argv[2])

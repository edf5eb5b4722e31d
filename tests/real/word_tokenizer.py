"""Make a tokenizer whose tokens are words between white space: ``python word_tokenizer.py DIRECTORY``.

Run by an interpreter that has ``tokenizers``. AIPerf then counts as the simulated cluster does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-not-found]

WORDS = [f"{first}{second}" for first in "bcdfgjlmnprstvwz" for second in ("a", "e", "i", "o")]

place = Path(sys.argv[1])
place.mkdir(parents=True, exist_ok=True)
vocabulary = {"<unk>": 0, "<eos>": 1} | {word: number for number, word in enumerate(WORDS, 2)}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
tokenizer.save(str(place / "tokenizer.json"))
about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<eos>"}
(place / "tokenizer_config.json").write_text(json.dumps(about))
(place / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))

"""How long the work of a simulated worker takes: of a call by itself, or of a step of a batch."""

from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import orjson

from keepwarm.traces.errors import InputError

SECOND = 1_000_000_000
LONGEST_S = 3600
"""No step time is longer, s."""
TIMES_FORMAT = 1


class ServiceTimes(NamedTuple):
    """How long a call takes that shares nothing: ``base_s``, then its uncached tokens, then its answer's, at tokens a
    second.

    The defaults are round figures of the size that real logs of a managed API show (a few seconds to the first block,
    about 60 answer tokens a second); they are a model to be replaced by a measured one.
    """

    base_s: float = 0.5
    prefill_tps: float = 8000.0
    decode_tps: float = 60.0

    def first_token_ns(self, uncached: int) -> int:
        """From the call's start to its first token."""
        return round((self.base_s + uncached / self.prefill_tps) * SECOND)

    def prefill_ns(self, tokens: int) -> int:
        """What computing so many prompt tokens adds."""
        return round(tokens / self.prefill_tps * SECOND)

    def decode_ns(self, output: int) -> int:
        """From the first token to the last."""
        return round(max(output - 1, 0) / self.decode_tps * SECOND)


class StepTimes(NamedTuple):
    """How long one step of a batch takes, seconds: ``fixed_s``, ``prefill_s`` a prompt token computed, ``decode_s`` a
    call that decodes, ``kv_s`` a token of KV cache that decoding calls read; ``call_s`` passes once a call before it
    can be scheduled (network, tokenizer). Defaults: an 8-GPU Hopper node's size of things.
    """

    fixed_s: float = 0.008
    prefill_s: float = 4e-5
    decode_s: float = 1e-4
    kv_s: float = 1e-8
    call_s: float = 0.0

    def step_ns(self, prefill: int, decoding: int, kv: int) -> int:
        """One step that computes so many prompt tokens and one token for each decoding call, whose caches hold ``kv``
        tokens in all.
        """
        return round((self.fixed_s + prefill * self.prefill_s + decoding * self.decode_s + kv * self.kv_s) * SECOND)

    def steps_ns(self, steps: int, decoding: int, kv: int) -> int:
        """So many steps of decoding alone; every one adds a token to each call's cache."""
        read = steps * kv + decoding * (steps * (steps - 1) // 2)
        return round((steps * (self.fixed_s + decoding * self.decode_s) + read * self.kv_s) * SECOND)

    def steps_within(self, within_ns: int, decoding: int, kv: int, most: int) -> int:
        """How many such steps have begun within a time: at least one, at most ``most``."""
        return 1 + bisect_left(range(1, most), within_ns, key=lambda steps: self.steps_ns(steps, decoding, kv))

    def prefill_ns(self, tokens: int) -> int:
        """What computing so many prompt tokens takes beside what a step takes anyway."""
        return round(tokens * self.prefill_s * SECOND)


def read_times(path: Path | str) -> StepTimes:
    """The step times in a file that ``keepwarm calibrate`` wrote, or one like it; what is null or missing is 0."""
    try:
        told = orjson.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(told, dict) or told.get("format") != TIMES_FORMAT:
        raise InputError(
            f'{path}: expected a JSON object with "format": {TIMES_FORMAT}, as keepwarm calibrate writes it'
        )
    if unknown := set(told) - {*StepTimes._fields, "format", "fitted"}:
        raise InputError(f"{path}: field {min(unknown)!r} is no step time, expected {', '.join(StepTimes._fields)}")
    values = {name: 0.0 if told.get(name) is None else told[name] for name in StepTimes._fields}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST_S:
            raise InputError(f"{path}: field {name!r} is {value!r:.40}, expected seconds, 0 to {LONGEST_S:,}")
    if not any(values.values()):
        raise InputError(f"{path}: no times in it: expected one of {', '.join(StepTimes._fields)} above 0")
    return StepTimes(**values)

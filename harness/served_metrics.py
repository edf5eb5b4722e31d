"""What the simulated cluster tells a Prometheus: vLLM's names, one ``engine`` a worker, so that its dashboards work."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from keepwarm.replayers.cluster import Gauge
from keepwarm.replayers.job import Running

SECOND = 1_000_000_000
LABELS = ("model_name", "engine")
REASONS = {"end": "stop", "tool": "stop", "limit": "length", "window": "length", "abort": "abort"}
TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600, 1800)
TOKENS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From a request to its first token.", TIMES),
    "inter_token_latency_seconds": ("Between one token and the next.", TIMES),
    "request_time_per_output_token_seconds": ("Between tokens, the mean of a request.", TIMES),
    "request_queue_time_seconds": ("From a request to the first step that has it.", TIMES),
    "request_prefill_time_seconds": ("From there to its first token.", TIMES),
    "request_inference_time_seconds": ("From there to its last token.", TIMES),
    "request_decode_time_seconds": ("From a request's first token to its last.", TIMES),
    "e2e_request_latency_seconds": ("A whole request.", TIMES),
    "request_prompt_tokens": ("A request's prompt.", TOKENS),
    "request_generation_tokens": ("A request's answer.", TOKENS),
    "request_prefill_kv_computed_tokens": ("Of a request's prompt, what no cache held.", TOKENS),
}


class _Histogram:
    """Counts by upper bound, of one series."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def told(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by bound, and the sum."""
        bounds = (*(str(float(bound)) for bound in self._bounds), "+Inf")
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum


class Metrics:
    """What is told of one served model; times are the wall clock's, ``speed`` times as short as the cluster's."""

    def __init__(self, model: str, speed: float) -> None:
        self._model = model
        self._second = SECOND * speed
        self._histograms: dict[tuple[str, str], _Histogram] = {}
        self._ended: Counter[tuple[str, str]] = Counter()

    def over(self, running: Running, stop: str) -> None:
        """A call is over: the model's end, or ``abort`` by its client."""
        engine = running.worker or ""
        self._ended[engine, REASONS[stop]] += 1
        first_ns, done_ns = running.first_token_ns, running.done_ns
        if stop == "abort" or first_ns is None or done_ns is None:
            return
        output, prompt = running.job.output, running.job.prompt.end
        between = (done_ns - first_ns) / max(output - 1, 1) / self._second
        self._add("time_to_first_token_seconds", engine, (first_ns - running.arrived_ns) / self._second)
        self._add("inter_token_latency_seconds", engine, between, output - 1)
        self._add("request_time_per_output_token_seconds", engine, between)
        self._add("request_decode_time_seconds", engine, (done_ns - first_ns) / self._second)
        if running.scheduled_ns is not None:
            self._add("request_queue_time_seconds", engine, (running.scheduled_ns - running.arrived_ns) / self._second)
            self._add("request_prefill_time_seconds", engine, (first_ns - running.scheduled_ns) / self._second)
            self._add("request_inference_time_seconds", engine, (done_ns - running.scheduled_ns) / self._second)
        self._add("e2e_request_latency_seconds", engine, (done_ns - running.arrived_ns) / self._second)
        self._add("request_prompt_tokens", engine, prompt)
        self._add("request_generation_tokens", engine, output)
        self._add("request_prefill_kv_computed_tokens", engine, prompt - running.read)

    def _add(self, name: str, engine: str, value: float, times: int = 1) -> None:
        if (name, engine) not in self._histograms:
            self._histograms[name, engine] = _Histogram(HISTOGRAMS[name][1])
        self._histograms[name, engine].add(value, times)

    def text(self, gauges: Iterable[Gauge]) -> bytes:
        """All of it in Prometheus' own text, the workers' state as the gauges tell it."""
        return generate_latest(_Told([*self._states(list(gauges)), *self._series()]))

    def _states(self, gauges: Sequence[Gauge]) -> Iterator[Metric]:
        for name, (text, field, kind) in STATES.items():
            family = kind(f"vllm:{name}", text, labels=LABELS)
            for one in gauges:
                if (value := getattr(one, field)) is not None:
                    family.add_metric((self._model, one.worker), value)
            yield family
        family = CounterMetricFamily("vllm:prompt_tokens_by_source", "Prompt tokens.", labels=(*LABELS, "source"))
        for one in gauges:
            family.add_metric((self._model, one.worker, "local_cache_hit"), one.cached_tokens)
            family.add_metric((self._model, one.worker, "local_compute"), one.prompt_tokens - one.cached_tokens)
        yield family

    def _series(self) -> Iterator[Metric]:
        success = CounterMetricFamily("vllm:request_success", "Requests ended.", labels=(*LABELS, "finished_reason"))
        for (engine, reason), number in self._ended.items():
            success.add_metric((self._model, engine, reason), number)
        yield success
        for name, (text, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=LABELS)
            for (told, engine), histogram in self._histograms.items():
                if told == name:
                    buckets, total = histogram.told()
                    family.add_metric((self._model, engine), buckets=buckets, sum_value=total)
            yield family


class _Told(Collector):
    """Metrics that are there already."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


_Family = type[CounterMetricFamily] | type[GaugeMetricFamily]
STATES: dict[str, tuple[str, str, _Family]] = {
    "num_requests_running": ("Requests in the batch.", "running", GaugeMetricFamily),
    "num_requests_waiting": ("Requests that wait to be in it.", "waiting", GaugeMetricFamily),
    "kv_cache_usage_perc": ("Share of the blocks that running requests use.", "kv_used", GaugeMetricFamily),
    "prefix_cache_queries": ("Prompt tokens looked up.", "prompt_tokens", CounterMetricFamily),
    "prefix_cache_hits": ("Prompt tokens found.", "cached_tokens", CounterMetricFamily),
    "prompt_tokens": ("Prompt tokens.", "prompt_tokens", CounterMetricFamily),
    "prompt_tokens_cached": ("Prompt tokens not computed.", "cached_tokens", CounterMetricFamily),
    "generation_tokens": ("Answer tokens.", "generated_tokens", CounterMetricFamily),
    "num_preemptions": ("Requests that had to let go of their blocks.", "preemptions", CounterMetricFamily),
}

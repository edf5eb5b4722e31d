"""The serve command: the simulated cluster as an HTTP endpoint."""

from __future__ import annotations

from typing import Any

import click
import orjson

from keepwarm.harness.duration import NO_TTL, Number
from keepwarm.harness.run_commands import LEAST_SPEED, MOST_SPEED
from keepwarm.harness.simulated import about_cache, cluster_options, make_cluster


def tool(told: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments that NAME=JSON says."""
    name, _, text = told.partition("=")
    try:
        arguments = orjson.loads(text)
    except orjson.JSONDecodeError:
        arguments = None
    if not (name and isinstance(arguments, dict)):
        raise click.BadParameter(f"{told!r}: expected NAME={{...}}, a tool and a JSON object of arguments")
    return name, arguments


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--model", default="keepwarm-simulated", show_default=True, help="The name it serves under.")
@click.option("--speed", type=Number(LEAST_SPEED, MOST_SPEED), default=1.0, help="Divide TTLs and service times.")
@click.option("--max-model-len", type=click.IntRange(1, 1 << 40), metavar="N", help="Longest prompt and answer.")
@click.option(
    "--tool", "tools", type=tool, multiple=True, metavar="NAME=JSON", help="Answer by calling this tool, if offered."
)
@click.option("--tool-turns", type=click.IntRange(0), default=1, show_default=True, help="Times, for one user's word.")
@cluster_options
def serve(
    host: str,
    port: int,
    model: str,
    speed: float,
    max_model_len: int | None,
    tools: tuple[tuple[str, dict[str, Any]], ...],
    tool_turns: int,
    **options: Any,
) -> None:
    """Run the simulated cluster as an HTTP endpoint.

    It speaks /v1/messages, /v1/chat/completions, /v1/responses and /v1/completions, streaming or not.
    """
    from keepwarm.harness.script import Script
    from keepwarm.harness.serve import create_app, serve_forever

    script = Script(longest=max_model_len, tools=tools, turns=tool_turns)
    cache = about_cache(options)
    cache["ttl"] = cache["ttl"] or NO_TTL
    cluster = make_cluster(**options)
    app = create_app(cluster, model=model, speed=speed, cache=cache, script=script, max_model_len=max_model_len)
    serve_forever(app, host, port, told=lambda url: click.echo(f"serving {model} at {url}", err=True))

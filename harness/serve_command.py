"""The serve command: the simulated cluster as an HTTP endpoint."""

from typing import Any

import click

from keepwarm.harness.bodies import parsed
from keepwarm.harness.options import NO_TTL, options
from keepwarm.harness.simulated import about_cache, cluster_options, make_cluster


def tool(told: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments that NAME=JSON says."""
    name, _, text = told.partition("=")
    arguments = parsed(text)
    if not (name and isinstance(arguments, dict)):
        raise click.BadParameter(f"{told!r}: expected NAME={{...}}, a tool and a JSON object of arguments")
    return name, arguments


@click.command()
@options("serve", tool=tool)
@cluster_options
def serve(
    host: str,
    port: int,
    model: str,
    speed: float,
    max_model_len: int | None,
    tools: tuple[tuple[str, dict[str, Any]], ...],
    tool_turns: int,
    **given: Any,
) -> None:
    """Run the simulated cluster as an HTTP endpoint.

    It speaks /v1/messages, /v1/chat/completions, /v1/responses and /v1/completions, streaming or not.
    """
    from keepwarm.harness.script import Script
    from keepwarm.harness.serve import create_app, serve_forever

    script = Script(longest=max_model_len, tools=tools, turns=tool_turns)
    cache = about_cache(given)
    cache["ttl"] = NO_TTL if cache["ttl"] is None else cache["ttl"]
    cluster = make_cluster(**given)
    app = create_app(cluster, model=model, speed=speed, cache=cache, script=script)
    serve_forever(app, host, port, told=lambda url: click.echo(f"serving {model} at {url}", err=True))

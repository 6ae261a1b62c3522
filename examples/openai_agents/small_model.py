"""A model whose handoffs and tools are chosen by a function, for models that are too small to choose them.

Each turn still is a real call to the server; what the function chooses is added to the model's answer, as if the model
had called it. With a model that calls tools by itself use `OpenAIChatCompletionsModel`, and nothing of this file.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from agents import OpenAIChatCompletionsModel
from openai.types.responses import ResponseFunctionToolCall

Route = Callable[[list[dict[str, Any]]], tuple[str, dict[str, Any]] | None]


class RoutedModel(OpenAIChatCompletionsModel):
    """A chat model that calls what `route` chooses.

    Args:
        route: returns the name of the tool or handoff and its arguments, or None to end with an answer; it is given the
            conversation so far.
    """

    def __init__(self, model: str, openai_client: Any, route: Route) -> None:
        super().__init__(model, openai_client)
        self._route = route

    async def get_response(
        self, system_instructions: Any, input: Any, model_settings: Any, tools: Any, output_schema: Any, handoffs: Any,
        tracing: Any, **options: Any,
    ) -> Any:  # fmt: skip
        items = [{"role": "user", "content": input}] if isinstance(input, str) else [dict(item) for item in input]
        response = await super().get_response(
            system_instructions, as_messages(items), model_settings, [], output_schema, [], tracing, **options
        )
        if (chosen := self._route(items)) is not None:
            name, arguments = chosen
            response.output.append(
                ResponseFunctionToolCall(
                    type="function_call", name=name, arguments=json.dumps(arguments), call_id=f"call-{uuid.uuid4().hex}"
                )
            )
        return response


def as_messages(items: Sequence[dict[str, Any]]) -> list[Any]:
    """The conversation without calls: the results of tools as messages of the user."""
    found: list[Any] = []
    for item in items:
        if item.get("type") == "function_call_output":
            found.append({"role": "user", "content": str(item["output"])})
        elif item.get("type") != "function_call":
            found.append(item)
    return found


def num_calls(items: Sequence[dict[str, Any]], prefix: str) -> int:
    """How many calls of tools and handoffs whose names begin with `prefix` a conversation has."""
    return sum(item.get("type") == "function_call" and str(item["name"]).startswith(prefix) for item in items)

"""Reads from a body the prompts, the constraint on the answers' tokens, and the parser of their text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..sampling.constraint import Concatenation, Constraint, FixedText, Maybe, OneOf, Regex, TextUntil
from ..sampling.stop import StopChecker
from .answer_parsers import AnswerParser, ReasoningParser, TemplateParser, TextParser
from .api_requests import ChatBody, CompletionBody
from .prompts import PromptRenderer, RenderedPrompt
from .tool_calls import FunctionSpec, ToolChoice, chosen_functions

_GAP = Regex(r"[ \n]{0,4}")  # between reasoning and the answer


@dataclass(frozen=True)
class AnswerPlan:
    """The prompts of a body, and the form of their answers.

    Attributes:
        constraint: None: any text.
        field: of the body, that the constraint is from.
        make_parser: of each answer.
    """

    prompts: list[RenderedPrompt]
    constraint: Constraint | None = None
    field: str | None = None
    make_parser: Callable[[], AnswerParser] = TextParser


def plan_completion(body: CompletionBody, renderer: PromptRenderer, max_prompts: int) -> AnswerPlan:
    """Of a completion; raises as `PromptRenderer.completion` and `GenerationBody.constraint`."""
    field, constraint = body.constraint() or (None, None)
    return AnswerPlan(renderer.completion(body.prompt, max_prompts), constraint, field)


def plan_chat(body: ChatBody, renderer: PromptRenderer) -> AnswerPlan:
    """Of a chat.

    A call that is required, a choice of some tools, a strict function and a response format become a constraint; where
    both calls and a format are asked for, the answer is one of them.

    Raises:
        ApiError: 400, tools that this model cannot call, or a wrong choice of them.
        ValueError: as `GenerationBody.constraint`.
    """
    tools = body.tools or ()
    functions, mode = chosen_functions(tools, body.tool_choice)
    thinking = None if body.chat_template_kwargs is None else body.chat_template_kwargs.enable_thinking
    shown = () if mode == "none" else tools
    prompt = renderer.chat(body.messages, shown, thinking)
    single = body.parallel_tool_calls is False or (
        isinstance(body.tool_choice, ToolChoice) and body.tool_choice.type == "function"
    )
    max_calls = 1 if single else None
    field, constraint = body.constraint() or (None, None)
    limited = len(functions) < len(shown)  # the prompt shows functions that must not be called
    calls = _calls(renderer, functions, mode == "required", limited, max_calls, constraint is not None)
    if calls is not None:
        both = constraint is not None and mode != "required"
        constraint, field = OneOf((calls, constraint)) if both and constraint is not None else calls, "tools"
    if constraint is not None:
        constraint = _after_reasoning(constraint, prompt, renderer)
    return AnswerPlan([prompt], constraint, field, _parser_factory(body, renderer, prompt, bool(functions), max_calls))


def _calls(
    renderer: PromptRenderer,
    functions: list[FunctionSpec],
    required: bool,
    limited: bool,
    max_calls: int | None,
    formatted: bool,
) -> Constraint | None:
    """The constraint on calls; None: the model is free."""
    if not functions:
        return None
    strict = limited or any(one.strict for one in functions)
    if not (required or strict or formatted):
        if not renderer.has_response_template:
            renderer.tool_form()  # refuses a form that is not known
        return None
    form, many = renderer.tool_form(), max_calls is None
    return form.required(functions, many) if required or formatted else form.strict(functions, many)


def _after_reasoning(constraint: Constraint, prompt: RenderedPrompt, renderer: PromptRenderer) -> Constraint:
    """The constraint on an answer that may, or does, begin with reasoning."""
    if not renderer.thinks or prompt.text.rstrip().endswith(ReasoningParser.CLOSE):
        return constraint
    rest = TextUntil(ReasoningParser.CLOSE), _GAP
    if prompt.thinking:
        return Concatenation((*rest, constraint))
    return Concatenation((Maybe(Concatenation((FixedText(ReasoningParser.OPEN), *rest))), constraint))


def _parser_factory(
    body: ChatBody, renderer: PromptRenderer, prompt: RenderedPrompt, with_tools: bool, max_calls: int | None
) -> Callable[[], AnswerParser]:
    if renderer.has_response_template:
        tools = [one.document() for one in body.tools or ()] if with_tools else []
        stop = (body.stop,) if isinstance(body.stop, str) else body.stop or ()

        def of_template() -> AnswerParser:
            decoder = StopChecker(renderer.decode_all, stop, body.min_tokens or 0, prompt.ids[-4:])
            return TemplateParser(renderer.tokenizer, prompt.text, tools, decoder, max_calls)

        return of_template
    of_calls = partial(renderer.tool_form().parser, max_calls) if with_tools else TextParser
    if not renderer.thinks:
        return of_calls
    opened = prompt.thinking
    return lambda: ReasoningParser(of_calls(), opened)

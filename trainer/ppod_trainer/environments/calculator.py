"""A calculator as a tool, on arithmetic questions whose answers can be verified.

The policy may write `[calc: 12 * 34]`; the calculator's result is put behind it, and the policy goes on. The answer is
the integer behind the last "The answer is" of its last line, and pays 1 if it is right.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field

from ppod_trainer.environments.base import Reply

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_CALL = re.compile(r"\[calc:([^\[\]]*)\]")
_ANSWER = re.compile(r"[Tt]he answer is (-?\d+)")
_LONGEST_EXPRESSION = 64
_EXAMPLES = ("17 + 25", "8 * 14", "90 - 33")


class CalculatorParameters(BaseModel):
    """Which questions are asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    highest: int = Field(default=99, ge=2, le=10**6, description="largest operand")
    operations: str = Field(default="+-*", pattern=r"^[-+*]+$", description="signs that questions are made of")
    examples: int = Field(default=2, ge=0, le=len(_EXAMPLES), description="worked examples in the prompt")
    call_reward: float = Field(default=0.0, description="paid for a call of the calculator that works")


class Calculator:
    """One question."""

    parameters_type = CalculatorParameters
    stop = ("]", "\n")

    def __init__(self, parameters: CalculatorParameters) -> None:
        self._parameters = parameters
        self._right = 0

    def reset(self, seed: int) -> str:
        """Ask a question, behind worked examples."""
        draw = random.Random(seed)
        left, right = (draw.randint(2, self._parameters.highest) for _ in range(2))
        question = f"{left} {draw.choice(self._parameters.operations)} {right}"
        self._right = evaluate(question)
        return "".join(_worked(example) for example in _EXAMPLES[: self._parameters.examples]) + _asked(question)

    def step(self, action: str) -> Reply:
        """Compute what a call asks for, or judge the answer."""
        call = _CALL.search(action)
        if call is None:
            answer = (_ANSWER.findall(action) or [""])[-1]
            # Of thousands of digits, as a policy that repeats itself writes them, Python makes no number.
            right = 0 < len(answer) <= _LONGEST_EXPRESSION and int(answer) == self._right
            return Reply("", float(right), done=True)
        try:
            return Reply(f" {evaluate(call[1])}.", self._parameters.call_reward, done=False)
        except ExpressionError as error:
            return Reply(f" error: {error}.", 0.0, done=False)


class ExpressionError(ValueError):
    """An expression that the calculator does not compute; the policy reads why."""


def evaluate(expression: str) -> int:
    """Value of an expression of integers, + - * and parentheses.

    Raises:
        ExpressionError: it is anything else, or too long.
    """
    text = expression.strip()
    if len(text) > _LONGEST_EXPRESSION:
        raise ExpressionError("too long")
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError("not an expression") from error


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
        case _:
            raise ExpressionError("only integers, + - * and parentheses")


def _asked(question: str) -> str:
    return f"Question: What is {question}?\nAnswer:"


def _worked(example: str) -> str:
    value = evaluate(example)
    return f"{_asked(example)} [calc: {example}] {value}. The answer is {value}.\n\n"

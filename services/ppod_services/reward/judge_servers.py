"""The servers that a judge can ask: any with OpenAI's chat completions, and ppod's own generation service."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessage, ChatCompletionMessageParam
from openai.types.chat.chat_completion import Choice

from ppod import AsyncGenerationClient, Sampling
from ppod.client import ClientSecurity, FinishReason
from ppod.errors import Cancelled, DeadlineExceeded, InvalidArgument, PpodError, ResourceExhausted, Unavailable
from ppod.tensors import TokenArray
from ppod_models.chat_template import ChatTemplateError
from ppod_models.sources import ModelSourceError
from ppod_services.core.logs import LogValue, log_event
from ppod_services.reward.judge import JudgeRefusedError, JudgeServer
from ppod_services.reward.kinds import JudgeConfig, OpenAiServerConfig, PpodServerConfig
from ppod_services.reward.samples import Codec, Turn

JobT = TypeVar("JobT")

_LOGGER = logging.getLogger(__name__)
_SERVER_ERROR = 500
_UNTAKEN = ("unsupported_parameter", "unsupported_value")
"""Codes of OpenAI's errors."""
_RETRIES = 2
_RETRY_AFTER_S = 1.0


def make_server(config: JudgeConfig, codec: Codec | None) -> JudgeServer:
    """The server of a judge; `codec` is the tokenizer of a ppod service.

    Raises:
        ModelSourceError: the environment lacks the key or token, or holds none that a header takes; the tokenizer has
            no chat template; a certificate cannot be read; or a token would travel in plain text.
    """
    match config.server:
        case OpenAiServerConfig():
            return OpenAiServer(config, config.server)
        case PpodServerConfig():
            assert codec is not None
            return PpodServer(config, config.server, codec)


class OpenAiServer:
    """Any server with OpenAI's chat completions."""

    def __init__(self, config: JudgeConfig, server: OpenAiServerConfig) -> None:
        self._config = config
        self._server = server
        # The library wants one, and such a server reads none.
        self._key = _secret(config, server.api_key_env) or "none"
        self._client: openai.AsyncOpenAI | None = None
        self._untaken: set[str] = set()

    async def complete(self, turns: Sequence[Turn], timeout_s: float) -> str:
        """The assistant's next turn; see `JudgeServer`."""
        if self._client is None:
            # Here, because its connections belong to the event loop that uses them.
            self._client = openai.AsyncOpenAI(
                base_url=self._server.base_url, api_key=self._key, max_retries=_RETRIES, timeout=self._config.timeout_s
            )
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._create(self._client, turns, timeout_s)
        except TimeoutError:
            raise Unavailable(f"{self._what()} gave no answer within {timeout_s:.1f} s") from None
        except openai.APIError as error:
            raise self._typed(error) from error
        except ValueError as error:
            # JSON that ends too early, or bytes that are no text.
            raise JudgeRefusedError(f"{self._server.base_url} does not answer with JSON: {error}") from error
        text = _text_of(cast(object, reply))
        if text is None:
            raise JudgeRefusedError(f"{self._server.base_url} does not answer with chat completions; see its base_url")
        return text

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()

    async def _create(self, client: openai.AsyncOpenAI, turns: Sequence[Turn], timeout_s: float) -> ChatCompletion:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        while True:
            untaken = frozenset(self._untaken)
            limited = "max_tokens" not in untaken
            try:
                return await client.chat.completions.create(
                    model=self._server.model,
                    messages=cast("list[ChatCompletionMessageParam]", messages),
                    temperature=openai.omit if "temperature" in untaken else self._config.temperature,
                    max_tokens=self._config.max_tokens if limited else openai.omit,
                    max_completion_tokens=openai.omit if limited else self._config.max_tokens,
                    timeout=timeout_s,
                )
            except openai.BadRequestError as error:
                # Of one that was not sent it tells nothing that asking again would mend.
                if error.param in untaken or not self._learns(error):
                    raise

    def _learns(self, error: openai.BadRequestError) -> bool:
        """Whether it tells of a parameter that is not taken, as by OpenAI's reasoning models; other servers take both.

        They have a temperature of their own, and another name for the longest reply, what they think included.
        """
        parameter = error.param
        if error.code not in _UNTAKEN or parameter not in ("max_tokens", "temperature"):
            return False
        if parameter not in self._untaken:
            self._untaken.add(parameter)
            fields: dict[str, LogValue] = {"judge": self._config.name, "parameter": parameter, "detail": error.message}
            log_event(_LOGGER, "judge_takes_other_parameters", fields, level=logging.WARNING)
        return True

    def _what(self) -> str:
        return f"the server of judge {self._config.name!r} at {self._server.base_url}"

    def _typed(self, error: openai.APIError) -> Exception:
        match error:
            case openai.RateLimitError():
                return ResourceExhausted(f"{self._what()} is busy", _retry_after_s(error))
            case openai.APIConnectionError():
                return Unavailable(f"{self._what()} cannot be reached: {error.message}")
            case openai.APIStatusError() if error.status_code < _SERVER_ERROR:
                return JudgeRefusedError(f"status {error.status_code} from {self._server.base_url}: {error.message}")
            case _:
                return Unavailable(f"{self._what()} failed: {error.message}")


class PpodServer:
    """A generation service of ppod."""

    def __init__(self, config: JudgeConfig, server: PpodServerConfig, codec: Codec) -> None:
        try:
            codec.render([Turn("user", "hello")], open_turn=True)
        except ChatTemplateError as error:
            raise ModelSourceError(f"judge {config.name!r}: {server.tokenizer!r}: {error}") from error
        self._sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature)
        self._codec = codec
        self._target = server.target
        self._client = _client(config, server)
        # One of its own, as the tokenizer wants it.
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")

    async def complete(self, turns: Sequence[Turn], timeout_s: float) -> str:
        """The assistant's next turn; see `JudgeServer`."""
        until = time.monotonic() + timeout_s
        prompt = await self._tokenize(lambda: self._prompt(turns))
        try:
            left_s = max(0.0, until - time.monotonic())
            [completion] = await self._client.generate([prompt], self._sampling, seeds=[0], timeout_s=left_s)
        except (Unavailable, ResourceExhausted, DeadlineExceeded, Cancelled):
            raise
        except PpodError as error:
            # Of the question, not of the request that it is asked for: its sample numbers are others, and so are the
            # caller and the token that it may be about.
            raise JudgeRefusedError(f"{error.code.name} from {self._target}: {error}") from error
        text = await self._tokenize(lambda: self._codec.decode(completion.token_ids))
        return _whole_lines(text, cut=completion.finish_reason in (FinishReason.LENGTH, FinishReason.ABORTED))

    async def close(self) -> None:
        """Close the channel."""
        await self._client.close()
        self._tokenizing.shutdown(wait=False)

    async def _tokenize(self, job: Callable[[], JobT]) -> JobT:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, job)

    def _prompt(self, turns: Sequence[Turn]) -> TokenArray:
        plain = [Turn(turn.role, self._codec.plain(turn.content)) for turn in turns]
        try:
            [prompt] = self._codec.encode([self._codec.render(plain, open_turn=True)], special_tokens=False)
        except ChatTemplateError as error:
            raise JudgeRefusedError(f"{self._target}: {error}") from error
        return prompt


def _secret(config: JudgeConfig, variable: str | None) -> str:
    """What an environment variable holds; empty where none is named."""
    if variable is None:
        return ""
    secret = os.environ.get(variable)
    if not secret:
        raise ModelSourceError(f"judge {config.name!r}: set the environment variable {variable}")
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        # Such as the line break at the end of a file. No call would get further than its headers.
        found = f"the key in {variable} is other than printable ASCII without spaces and line breaks"
        raise ModelSourceError(f"judge {config.name!r}: {found}")
    return secret


def _client(config: JudgeConfig, server: PpodServerConfig) -> AsyncGenerationClient:
    token, tls = _secret(config, server.token_env), server.tls
    try:
        if tls is None:
            security = ClientSecurity(token=token, plain_text_token=server.plain_text_token)
        else:
            security = ClientSecurity(tls.ca_file, tls.certificate_file, tls.key_file, tls.server_name, token)
        # The client would read the files at its first call.
        security.credentials()
        return AsyncGenerationClient(server.target, security=security)
    except InvalidArgument as error:
        raise ModelSourceError(f"judge {config.name!r}: {error}") from error


def _text_of(reply: object) -> str | None:
    """The assistant's text; None where the reply is no chat completion.

    Of an answer that is no JSON, as a web page's, the client makes a text, and of any JSON a completion: what is in it
    may be of any type.
    """
    if not isinstance(reply, ChatCompletion) or not isinstance(cast(object, reply.choices), list):
        return None
    choice = cast(object, reply.choices[0]) if reply.choices else None
    if choice is None:
        return ""
    if not isinstance(choice, Choice) or not isinstance(cast(object, choice.message), ChatCompletionMessage):
        return None
    content = cast(object, choice.message.content)
    if content is not None and not isinstance(content, str):
        return None
    # Half of a surrogate pair, which JSON can hold, could not be sent back in a further question.
    text = (content or "").encode(errors="replace").decode()
    return _whole_lines(text, cut=choice.finish_reason == "length")


def _whole_lines(reply: str, *, cut: bool) -> str:
    """A reply, without its last line where it was cut off: `Score: 1` may have been about to become `Score: 10`."""
    return reply.rpartition("\n")[0] if cut else reply


def _retry_after_s(error: openai.RateLimitError) -> float:
    try:
        told_s = float(error.response.headers.get("retry-after", _RETRY_AFTER_S))
    except ValueError:
        # The header may also hold a date.
        return _RETRY_AFTER_S
    # Callers take a wait of zero for an error that no wait mends.
    return told_s if told_s > 0 and math.isfinite(told_s) else _RETRY_AFTER_S

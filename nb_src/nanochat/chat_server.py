# %% [markdown]
# ## The chat server
#
# The model behind an address that programs know how to talk to: OpenAI's chat completions, so the official client, and
# whatever was written for it, works here too.
#
# One thread owns the model and does nothing but write tokens; everybody who is waiting for an answer has a row in its
# batch: on two CPU cores a step for thirty-two takes 13 ms and a step for one 6 ms. All the rest, reading requests,
# checking them, turning tokens into text, happens in the event loop beside it. Somebody who leaves frees the row at the
# next step.
#
# The server listens on this machine alone and asks for a token, because every page open in the browser can reach
# loopback as well. What is wrong with a request is said in a sentence; nothing is corrected silently.

# %%
import asyncio
import itertools
import json
import logging
import re
import secrets
import socket
import threading
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import Annotated, Literal

import torch
import uvicorn
from fastapi import FastAPI, Request, Security
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from starlette.exceptions import HTTPException as RoutingError

from nanochat.chat_terminal import AnswerReader, answer_parts, fit_conversation
from nanochat.engine import DecodeBatch, Engine, PromptRow
from nanochat.runtime import UserError

# %% [markdown]
# ### What is refused
# Limits as in the original, and an error in OpenAI's form that says which one was hit.

# %%
CHAT_BODY_BYTES = 1_000_000
CHAT_MESSAGES = 500
CHAT_MESSAGE_CHARS = 8_000
CHAT_TOTAL_CHARS = 32_000
CHAT_MAX_TOKENS = 4096
CHAT_STOPS = 4
CHAT_RETRY_SECONDS = 2

CHAT_ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # and 5xx; the others are the request's


class ChatError(Exception):
    """A request that cannot be answered: HTTP status, a sentence, and which parameter is meant."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def plain(self) -> dict:
        kind = CHAT_ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(CHAT_RETRY_SECONDS)}}
        return JSONResponse(self.plain(), self.status, headers.get(self.status))


# %% [markdown]
# ### `ChatJob` and `ChatWorker`
# A job goes from the event loop to the worker's thread; tokens come back, those of one step together. Prompts are read
# between two steps, a limited number of tokens at a time, so that those who are being answered do not wait long.

# %%
CHAT_READ_TOKENS = 4096


class ChatJob:
    """One answer in the making. `arrived` (in the event loop) gets tokens, then a finish reason or a ChatError."""

    def __init__(self, row: PromptRow):
        self.row, self.cancelled = row, False
        row.owner = self
        self.loop, self.arrived = asyncio.get_running_loop(), asyncio.Queue()


class ChatWorker:
    """Owns a model and writes the answers to all jobs in one batch, on a thread of its own.

    slots: answers written at the same time. places: jobs that may wait for one.
    """

    def __init__(self, model, tokenizer, name: str = "nanochat", slots: int = 32, places: int = 64):
        self.tokenizer, self.name, self.slots, self.places = tokenizer, name, slots, places
        self.context, self.created = model.config.sequence_len, int(time.time())
        self.batch = DecodeBatch(Engine(model, tokenizer), slots, self.context)
        self.waiting: deque[ChatJob] = deque()
        self.active: list[ChatJob] = []  # the thread's own
        self.failure = ""  # why there will be no more answers
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.work, name="chat worker", daemon=True)
        self.thread.start()

    def submit(self, job: ChatJob) -> None:
        """Queue a job. Raises ChatError when there is no place, or nobody who works."""
        with self.changed:
            if self.failure:
                raise ChatError(503, self.failure)
            if len(self.waiting) >= self.places:
                raise ChatError(429, f"{len(self.waiting)} requests are waiting already. Try again in a few seconds.")
            self.waiting.append(job)
            self.changed.notify()

    def cancel(self, job: ChatJob) -> None:
        """Nobody wants this answer any more; its row is free at the next step. Harmless when it is finished."""
        with self.changed:
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)

    def stop(self) -> None:
        """End the thread; answers that are not finished get an error."""
        with self.changed:
            self.failure = self.failure or "The server is shutting down."
            self.changed.notify()
        self.thread.join()
        self.batch = None  # the framework remembers every endpoint, and with it this worker; not model and cache too

    def work(self) -> None:
        """The thread: let go of rows that nobody wants, take in new ones, one step for all."""
        try:
            while self.wait_for_work():
                try:
                    if jobs := self.next_jobs():
                        self.batch.admit([job.row for job in jobs])
                    self.deliver(self.batch.step())
                except torch.OutOfMemoryError:  # of a GPU that a notebook shares with this server: it passes
                    lost, self.active, self.batch.places = self.active, [], []
                    torch.cuda.empty_cache()
                    sentence = "The device has no memory left for this answer. Try again."
                    self.post({job: [ChatError(503, sentence)] for job in lost})
        except Exception as error:
            logging.getLogger("nanochat").exception("The model failed.")
            self.failure = f"The model failed ({type(error).__name__}: {error}). Restart the server."
        with self.changed:
            left, self.active = [*self.waiting, *self.active], []
            self.waiting.clear()
        self.post({job: [ChatError(503, self.failure)] for job in left})

    def wait_for_work(self) -> bool:
        """Return when there is something to do: True, or False when it is to end."""
        with self.changed:
            while True:
                for job in [job for job in self.active if job.cancelled]:
                    self.batch.remove(job.row)
                    self.active.remove(job)
                if self.failure or self.active or self.waiting:
                    return not self.failure
                self.changed.wait()

    def next_jobs(self) -> list[ChatJob]:
        """Those whose turn it is, as many as have a row and are read quickly."""
        jobs, longest = [], 0
        with self.changed:
            while self.waiting and len(jobs) < self.batch.free:
                longest = max(longest, len(self.waiting[0].row.prompt))
                if jobs and longest * (len(jobs) + 1) > CHAT_READ_TOKENS:
                    break
                jobs.append(self.waiting.popleft())
            self.active += jobs
        return jobs

    def deliver(self, rows: list[PromptRow]) -> None:
        """Send each row's new token to those who wait for it, and why it ended if it did."""
        news = {row.owner: [] if row.completed else [row.tokens[-1]] for row in rows}
        for row in rows:
            if row.finished:
                news[row.owner].append("stop" if row.completed else "length")
                self.active.remove(row.owner)
        self.post(news)

    def post(self, news: dict[ChatJob, list]) -> None:
        """Put items into the queues of jobs, with one message for each event loop."""

        def put(jobs: list[ChatJob]) -> None:
            for job in jobs:
                for item in news[job]:
                    job.arrived.put_nowait(item)

        for loop in {job.loop for job in news}:
            jobs = [job for job in news if job.loop is loop]
            try:
                loop.call_soon_threadsafe(put, jobs)
            except RuntimeError:  # the loop is closed: nobody is left
                for job in jobs:
                    job.cancelled = True


# %% [markdown]
# ### `ChatMessage` and `ChatRequest`
# What may be asked, as a description that also programs can read. Clients send many parameters of OpenAI's with the
# value that changes nothing; these are accepted with that value alone.


# %%
def text_or_list(value) -> str:
    """Which of two forms a value has, so that only the errors of this one are reported."""
    return "(list)" if isinstance(value, list) else "(text)"


def is_whole_float(value) -> bool:
    """5.0, which is an integer for JSON."""
    return isinstance(value, float) and value.is_integer()


WholeNumber = Annotated[int, BeforeValidator(lambda value: int(value) if is_whole_float(value) else value)]
ChatText = Annotated[str, Field(max_length=CHAT_TOTAL_CHARS)]
StopText = Annotated[str, Field(min_length=1, max_length=100)]
Nothing = Annotated[list[None], Field(max_length=0)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None


class ChatInput(BaseModel):
    """Types are taken literally ("5" is no number), and fields that are not known are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ChatPart(ChatInput):
    type: Literal["text", "python", "python_output"]
    text: ChatText


class CalculatorCall(ChatInput):
    expression: ChatText
    result: ChatText | None
    position: Annotated[WholeNumber, Field(ge=0)]
    index: WholeNumber | None = None  # in a stream: clients join the pieces of a list by it


class ChatMessage(ChatInput):
    """One message. An answer of this server can be sent back as it came, with its calculator calls."""

    role: Literal["system", "developer", "user", "assistant"]  # developer is the newer name of system
    content: Annotated[
        Annotated[ChatText, Tag("(text)")] | Annotated[list[ChatPart], Tag("(list)")], Discriminator(text_or_list)
    ]
    calculator: list[CalculatorCall] | None = None
    name: str | None = None
    refusal: None = None
    parsed: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None
    annotations: Nothing = None

    @model_validator(mode="after")
    def fits_its_role(self):
        parts = [] if isinstance(self.content, str) else self.content
        if self.role != "assistant" and (self.calculator or any(part.type != "text" for part in parts)):
            raise ValueError(f"only the assistant calls the calculator, and this is a message of the {self.role}")
        if self.calculator and parts:
            raise ValueError("give the calls as parts of the content or as calculator, not both")
        if self.role == "user" and not self.length():
            raise ValueError("the message is empty")
        if self.role != "assistant" and self.length() > CHAT_MESSAGE_CHARS:  # answers may be longer than questions
            raise ValueError(f"the message has {self.length()} characters; {CHAT_MESSAGE_CHARS} are allowed")
        return self

    def length(self) -> int:
        """Characters, those of calculator calls included."""
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return sum(map(len, texts)) + sum(len(call.expression + (call.result or "")) for call in self.calculator or [])

    def plain(self) -> dict:
        """The message as the tokenizer renders it."""
        content = self.content
        if self.role != "assistant":
            content = content if isinstance(content, str) else "".join(part.text for part in content)
        elif isinstance(content, list):
            content = [part.model_dump() for part in content]
        elif self.calculator:
            calls = sorted(self.calculator, key=lambda call: call.position)
            content = answer_parts(content, [call.model_dump() for call in calls])
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


def joined_conversation(messages: list[ChatMessage]) -> list[dict]:
    """The messages as the model knows conversations: instructions first and in one, neighbours of one role joined."""

    def parts_of(content: str | list[dict]) -> list[dict]:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    plain = [message.plain() for message in messages]
    instructions = [message["content"] for message in plain if message["role"] == "system" and message["content"]]
    turns = []
    for message in plain:
        if message["role"] == "system":
            continue
        if not turns or turns[-1]["role"] != message["role"]:
            turns.append(message)
        elif message["role"] == "user":
            turns[-1]["content"] += "\n\n" + message["content"]
        else:
            turns[-1]["content"] = [*parts_of(turns[-1]["content"]), *parts_of("\n\n"), *parts_of(message["content"])]
    return [{"role": "system", "content": "\n\n".join(instructions)}] * bool(instructions) + turns


class ChatStreamOptions(ChatInput):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatTextFormat(ChatInput):
    type: Literal["text"]


class ChatRequest(ChatInput):
    """OpenAI's chat completion, as much of it as a small model can do. Spec section 20.2."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=CHAT_MESSAGES)]
    model: str | None = None  # any: there is only one, and the answer names it
    stream: bool | None = None
    stream_options: ChatStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[WholeNumber, Field(ge=0, le=200)] | None = None
    max_tokens: Annotated[WholeNumber, Field(ge=1, le=CHAT_MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[WholeNumber, Field(ge=1, le=CHAT_MAX_TOKENS)] | None = None
    seed: Annotated[WholeNumber, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: (
        Annotated[
            Annotated[StopText, Tag("(text)")] | Annotated[list[StopText], Field(max_length=CHAT_STOPS), Tag("(list)")],
            Discriminator(text_or_list),
        ]
        | None
    ) = None
    # Said for the record, without an effect here.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Only with the value that changes nothing; some clients send all they know as null.
    reasoning_effort: None = None
    verbosity: None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    n: Annotated[WholeNumber, Field(ge=1, le=1)] | None = None
    top_p: Annotated[float, Field(ge=1, le=1)] | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, None], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[WholeNumber, Field(ge=0, le=0)] | None = None
    store: Literal[False] | None = None
    tools: Nothing = None
    functions: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    response_format: ChatTextFormat | None = None

    @model_validator(mode="after")
    def is_consistent(self):
        total = sum(message.length() for message in self.messages)
        if total > CHAT_TOTAL_CHARS:
            raise ValueError(f"the messages have {total} characters together; {CHAT_TOTAL_CHARS} are allowed")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens mean the same and are different: give one of them")
        return self


CHAT_NEUTRAL = {
    "n": "1", "top_p": "1", "frequency_penalty": "0", "presence_penalty": "0", "logit_bias": "{}", "logprobs": "false",
    "top_logprobs": "0", "store": "false", "tools": "[]", "functions": "[]", "tool_choice": '"none"',
    "function_call": '"none"', "modalities": '["text"]', "response_format": '{"type": "text"}',
    "service_tier": '"auto"',
}  # fmt: skip


def refusal_of(error: dict) -> ChatError:
    """A sentence for one of pydantic's errors."""
    path = [part for part in error["loc"][1:] if not str(part).startswith("(")]
    if error["type"] == "json_invalid":
        return ChatError(400, f"The body is not JSON: {error['ctx']['error']} at character {error['loc'][1]}.")
    if not path and error["type"] != "value_error":
        return ChatError(400, "Send a JSON object, with the header Content-Type: application/json.")
    place = ""
    for part in path:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    param = str(path[0]) if path else None
    if param in CHAT_NEUTRAL:
        sentence = f"{param} is not supported; leave it out (or send {CHAT_NEUTRAL[param]}, which changes nothing)."
    elif error["type"] == "extra_forbidden":
        sentence = f"{place} is not a field that this server knows; leave it out."
    elif error["type"] == "value_error":
        sentence = f"{place}{': ' if place else ''}{error['ctx']['error']}."
    else:
        given = error["input"]
        shown = f", not {given!r:.80}" if isinstance(given, (int, float)) or given is None else ""
        sentence = f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}{shown}."
    return ChatError(400, sentence, param)


# %% [markdown]
# ### What comes back
# The same description for the answers.


# %%
class ChatErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ChatErrorAnswer(BaseModel):
    error: ChatErrorDetail


class ChatAnswer(BaseModel):
    role: Literal["assistant"]
    content: str
    calculator: list[CalculatorCall]


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    finish_reason: Literal["stop", "length"]


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    left_out_messages: int


class ChatModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ChatModelList(BaseModel):
    object: Literal["list"]
    data: list[ChatModelCard]


class ChatHealth(BaseModel):
    status: Literal["ok", "failed"]
    model: str
    active: int
    waiting: int
    slots: int
    message: str = ""


# %% [markdown]
# ### `ChatReply`
# One request from its acceptance to its last token. Tokens that arrived while the connection was busy go out together,
# so a slow client costs no more than a fast one.


# %%
class ChatReply:
    """The answer to one request, whole or as a stream. Raises ChatError for one that cannot be answered."""

    def __init__(self, worker: ChatWorker, body: ChatRequest):
        self.worker, self.body = worker, body
        wanted = body.max_tokens or body.max_completion_tokens or 512
        try:
            messages = joined_conversation(body.messages)
            prompt, self.left_out = fit_conversation(worker.tokenizer, messages, worker.context, wanted)
        except UserError as error:
            raise ChatError(400, str(error), "messages", "context_length_exceeded") from None
        except ValueError as error:
            raise ChatError(400, f"{error}.", "messages") from None
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.reader = AnswerReader(worker.tokenizer, stops)
        row = PromptRow(
            prompt=prompt,
            max_tokens=min(wanted, worker.context - len(prompt)),
            temperature=0.8 if body.temperature is None else body.temperature,
            top_k=50 if body.top_k is None else body.top_k,
            seed=secrets.randbits(31) if body.seed is None else body.seed,
        )
        self.job, self.new_tokens, self.finish_reason = ChatJob(row), 0, ""
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": worker.name}
        worker.submit(self.job)

    @asynccontextmanager
    async def attended(self, receive):
        """While the block runs, the answer is cancelled as soon as the client goes away; afterwards in any case."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.worker.cancel(self.job)
            self.job.arrived.put_nowait(ChatError(499, "The client went away."))

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            self.worker.cancel(self.job)

    async def events(self):
        """Text (str) and calculator calls (dict) as they come. Raises ChatError when the model fails."""
        while not self.finish_reason:
            items, events, failure = [await self.job.arrived.get()], [], None
            while not self.job.arrived.empty():
                items.append(self.job.arrived.get_nowait())
            for item in items:
                if isinstance(item, ChatError):
                    failure = item
                    break
                if isinstance(item, str):
                    self.finish_reason = item
                    events += self.reader.finish()
                    break
                self.new_tokens += 1
                events += self.reader.read(item)
                if self.reader.stopped:
                    self.finish_reason = "stop"
                    break
            for is_text, group in itertools.groupby(events, lambda event: isinstance(event, str)):
                for event in ["".join(group)] if is_text else group:
                    yield event
            if failure:
                raise failure

    def usage(self) -> dict:
        n_prompt = len(self.job.row.prompt)
        return {
            "prompt_tokens": n_prompt, "completion_tokens": self.new_tokens, "total_tokens": n_prompt + self.new_tokens
        }  # fmt: skip

    async def whole(self, receive) -> dict:
        """OpenAI's chat.completion."""
        async with self.attended(receive):
            async for _ in self.events():
                pass
        message = {"role": "assistant", "content": self.reader.text, "calculator": self.reader.calls}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        answer = {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage()}
        return answer | {"left_out_messages": self.left_out}

    async def chunks(self):
        """OpenAI's stream of events, each as bytes."""

        def chunk(delta: dict, finish_reason: str | None = None, **more) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return self.event({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})

        n_calls = itertools.count()
        yield chunk({"role": "assistant", "content": ""}, left_out_messages=self.left_out)
        try:
            async for event in self.events():
                is_text = isinstance(event, str)
                yield chunk({"content": event} if is_text else {"calculator": [{"index": next(n_calls)} | event]})
        except ChatError as error:
            yield self.event(error.plain())
            return
        yield chunk({}, self.finish_reason)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield self.event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"

    @staticmethod
    def event(content: dict) -> bytes:
        return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


class ChatStream(Response):
    """Sends the chunks of a reply as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, reply: ChatReply):
        self.reply, self.status_code, self.background = reply, 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope, receive, send):
        async with self.reply.attended(receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self.reply.chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# %% [markdown]
# ### `ChatGuard`
# Stands before everything else: the token is looked at before a request is read, and reading stops where the body
# becomes too large, whatever length was announced. The page and the state of the server are open to all; neither holds
# a secret. Pages of other origins cannot read any of it, because nothing here permits them to.

# %%
CHAT_OPEN_PATHS = ("/", "/health", "/openapi.json")


class ChatGuard:
    """ASGI middleware: token and size of the body."""

    def __init__(self, app, token: str):
        self.app, self.token = app, token.encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, size = dict(scope["headers"]), 0
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        announced = headers.get(b"content-length", b"0")
        refusal = None
        if scope["path"] not in CHAT_OPEN_PATHS:
            if scheme.lower() != b"bearer":
                refusal = ChatError(401, "A token is needed. Send the header Authorization: Bearer TOKEN.")
            elif not secrets.compare_digest(given.strip(), self.token):
                refusal = ChatError(401, "The token is wrong. Take the one in the address that the server printed.")
        too_large = ChatError(413, f"The body is larger than {CHAT_BODY_BYTES} bytes. Send fewer or shorter messages.")
        if refusal is None and announced.isdigit() and int(announced[:20]) > CHAT_BODY_BYTES:
            refusal = too_large
        if refusal:
            await refusal.response()(scope, receive, send)
            return

        async def bounded_receive():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > CHAT_BODY_BYTES:
                raise HTTPException(413, too_large.message)  # the framework lets only this one through
            return message

        await self.app(scope, bounded_receive, send)


# %% [markdown]
# ### `create_chat_app`
# The addresses. All that goes wrong comes back in the one form that clients know.

# %%
CHAT_PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_chat_app(worker: ChatWorker, token: str, page_html: str) -> FastAPI:
    """The web application: the page at "/", and what programs use. Spec section 20.2."""
    errors = {"4XX": {"model": ChatErrorAnswer}, "5XX": {"model": ChatErrorAnswer}}
    app = FastAPI(title="nanochat", version="1", docs_url=None, redoc_url=None, responses=errors)
    app.add_middleware(ChatGuard, token=token)
    with_token = [Security(HTTPBearer(auto_error=False))]  # for the description; the guard has looked at it already

    @app.exception_handler(ChatError)
    async def answer_error(request, error):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request, error):
        return refusal_of(error.errors()[0]).response()

    @app.exception_handler(RoutingError)
    async def no_such_address(request, error):
        message = {
            400: "The body cannot be read. Send a JSON object in UTF-8.",
            404: "There is nothing at this address. There are /v1/models, /v1/chat/completions and /health.",
            405: f"{request.method} is not possible at this address.",
        }.get(error.status_code, str(error.detail))
        response = ChatError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request, error):
        return ChatError(500, f"The server failed ({type(error).__name__}). Its log says more.").response()

    @app.get("/", include_in_schema=False)
    async def page():
        return HTMLResponse(page_html, headers=CHAT_PAGE_HEADERS)

    @app.get("/health", response_model=ChatHealth, responses={503: {"model": ChatHealth}})
    async def health():
        state = {"status": "failed" if worker.failure else "ok", "model": worker.name, "message": worker.failure}
        state |= {"active": len(worker.active), "waiting": len(worker.waiting), "slots": worker.slots}
        return JSONResponse(state, 503 if worker.failure else 200, {"Cache-Control": "no-store"})

    @app.get("/v1/models", response_model=ChatModelList, dependencies=with_token)
    async def models():
        card = {"id": worker.name, "object": "model", "created": worker.created, "owned_by": "unrolled"}
        return JSONResponse({"object": "list", "data": [card | {"context_length": worker.context}]})

    @app.get("/v1/models/{name}", response_model=ChatModelCard, dependencies=with_token)
    async def model(name: str):
        cards = json.loads((await models()).body)["data"]
        if name != worker.name:
            raise ChatError(404, f"There is no model {name!r:.80}; there is {worker.name}.", "model", "model_not_found")
        return JSONResponse(cards[0])

    streamed = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
    path = "/v1/chat/completions"

    @app.post(path, response_model=ChatCompletion, responses=streamed, dependencies=with_token)
    async def complete(request: Request, body: ChatRequest):
        reply = ChatReply(worker, body)
        return ChatStream(reply) if body.stream else JSONResponse(await reply.whole(request.receive))

    return app


# %% [markdown]
# ### `ChatServer`
# The whole, with a port of its own: in the background for a notebook, or in the foreground for the command line.


# %%
class ChatServer:
    """A chat server over one model. Raises UserError when the port cannot be had or the token cannot be sent.

    port: 0 for any that is free. token: "" for a new random one. slots and places: see `ChatWorker`. The address with
    the token is `url`. As a context manager it runs in the background until the block ends.
    """

    def __init__(
        self, model, tokenizer, page_html: str, name: str = "nanochat", host: str = "127.0.0.1", port: int = 0,
        token: str = "", slots: int = 32, places: int = 64,
    ):  # fmt: skip
        self.token = token or secrets.token_urlsafe(24)
        if not re.fullmatch(r"[A-Za-z0-9._~-]+", self.token):
            raise UserError("the token can have letters, digits and . _ ~ - only: it is part of an address.")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self.socket = socket.create_server((host, port), family=family, backlog=256)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port} of {host} cannot be used ({getattr(error, 'strerror', None) or error}). "
                "Choose another one; 0 takes any that is free."
            ) from None
        self.host, self.port = host, self.socket.getsockname()[1]
        self.worker = ChatWorker(model, tokenizer, name, slots, places)
        config = uvicorn.Config(
            create_chat_app(self.worker, self.token, page_html), log_config=None, log_level="warning",
            access_log=False, server_header=False, lifespan="off", ws="none", timeout_graceful_shutdown=3,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Where the server is, without the token."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def url(self) -> str:
        """For a browser. What follows the # is never sent over the network."""
        return f"{self.address}/#token={self.token}"

    def serve(self) -> None:
        """Answer until Ctrl-C."""
        try:
            self.server.run(sockets=[self.socket])
        except KeyboardInterrupt:
            pass
        finally:
            self.worker.stop()

    def start(self) -> "ChatServer":
        """Answer in the background. Returns when connections are accepted."""
        if self.thread is None:
            run = {"target": self.server.run, "kwargs": {"sockets": [self.socket]}}
            self.thread = threading.Thread(name="chat server", daemon=True, **run)
            self.thread.start()
            while not self.server.started and self.thread.is_alive():
                time.sleep(0.01)
            if not self.server.started:
                raise RuntimeError("the chat server did not start; what stopped it is printed above")
        return self

    def stop(self) -> None:
        """End: answers in the making get an error, the port is free again. Harmless when it has ended already."""
        self.worker.stop()
        self.server.should_exit = True
        if self.thread is not None:
            self.thread.join()
        self.socket.close()

    def __enter__(self) -> "ChatServer":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

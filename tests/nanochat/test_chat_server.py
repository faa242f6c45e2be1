import gc
import json
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from test_chat_terminal import (
    END,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    TOKENIZER,
    byte_tokens,
    scripted,
    small_gpt,
    turns,
)

from nanochat.chat_server import CHAT_BODY_BYTES, ChatMessage, ChatServer, create_chat_app, joined_conversation
from nanochat.chat_terminal import AnswerReader, fit_conversation
from nanochat.engine import Engine
from nanochat.runtime import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


class Gated:
    """A model that does not get on with its answers until the gate is open."""

    def __init__(self, model):
        self.model, self.gate, head = model, threading.Event(), model.head
        model.head = lambda hidden: self.gate.wait(20) and head(hidden)


@pytest.fixture
def serve(request):
    """Start servers that end with the test."""

    def start(model=None, **options):
        server = ChatServer(model or small_gpt(), TOKENIZER, "<p>page</p>", **options).start()
        request.addfinalizer(server.stop)
        return server

    return start


def web(server, token=None, **options):
    headers = {"Authorization": f"Bearer {server.token if token is None else token}"}
    return httpx.Client(base_url=server.address, headers=headers, timeout=20, **options)


def official(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=server.token, max_retries=0, timeout=20)


def until(condition, seconds=15):
    """Wait for what must become true."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def health(server):
    return httpx.get(f"{server.address}/health").json()


def events_of(response):
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def alone(model, messages, max_tokens):
    """The text of a greedy answer, written by the plain engine with nobody else."""
    prompt, _ = fit_conversation(TOKENIZER, messages, model.config.sequence_len, max_tokens)
    rows, _ = Engine(model, TOKENIZER).generate_batch(prompt, max_tokens=max_tokens, temperature=0)
    reader = AnswerReader(TOKENIZER)
    for token in rows[0][len(prompt) :]:
        reader.read(token)
    reader.finish()
    return reader.text


# Answers


def test_the_official_client_chats(serve):
    """A server that speaks almost OpenAI's protocol is of no use to programs written for it."""
    server = serve(small_gpt(), name="tiny")
    client = official(server)
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.context_length == 256
    arguments = dict(model=model.id, messages=HELLO, temperature=0, max_tokens=20)
    answer = client.chat.completions.create(**arguments)
    expected = alone(small_gpt(), HELLO, 20)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    assert answer.model == "tiny" and answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens <= 256
    assert answer.left_out_messages == 0
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].left_out_messages == 0
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage
    # the usual way to go on: the message as it came
    longer = [*HELLO, answer.choices[0].message, {"role": "user", "content": "And?"}]
    client.chat.completions.create(**arguments | {"messages": longer})
    with pytest.raises(openai.BadRequestError, match="top_p is not supported"):
        client.chat.completions.create(**arguments, top_p=0.9)
    with pytest.raises(openai.AuthenticationError, match="The token is wrong"):
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0).models.list()


def test_thirty_two_streams_at_once_are_what_each_would_be_alone(serve):
    """Streams that mix up their rows, or that wait for each other: both look fine with one person."""
    model = small_gpt()
    model.lm_head.weight.data[END] *= 2  # some answers end early, and others move into their rows
    server, conversations = serve(model), [[{"role": "user", "content": f"{i}{' x' * i}"}] for i in range(40)]
    client, tokens = official(server), [8 + 2 * i for i in range(40)]

    def ask(i):
        stream = client.chat.completions.create(
            model="", messages=conversations[i], temperature=0, max_tokens=tokens[i], stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    assert answers == [alone(model, conversations[i], tokens[i]) for i in range(40)]
    assert len(set(map(len, answers))) > 10
    assert health(server) == {
        "status": "ok",
        "model": "nanochat",
        "active": 0,
        "waiting": 0,
        "slots": 32,
        "message": "",
    }


def test_calculator_calls_come_as_such(serve):
    """Markup in the text, or a call without its place in it; and the model must see its own calls again."""
    call = [PYTHON_START, *TOKENIZER.encode("6*7"), PYTHON_END]
    forced = [OUTPUT_START, *TOKENIZER.encode("42"), OUTPUT_END]
    said = [*byte_tokens("It is: "), *call, *[0] * len(forced), *byte_tokens("42!"), END]
    answer = official(serve(scripted(small_gpt(), *said))).chat.completions.create(model="", messages=HELLO)
    message = answer.choices[0].message
    assert message.content == "It is: 42!" and answer.choices[0].finish_reason == "stop"
    assert message.calculator == [{"expression": "6*7", "result": "42", "position": 7}]
    assert answer.usage.completion_tokens == len(said) - 1
    with web(serve(scripted(small_gpt(), *said))) as client:
        with client.stream("POST", PATH, json={"messages": HELLO, "stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = events_of(response)
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    calls = [i for i, delta in enumerate(deltas) if "calculator" in delta]
    assert [deltas[i]["calculator"] for i in calls] == [[{"index": 0} | message.calculator[0]]]
    assert "".join(delta.get("content", "") for delta in deltas[: calls[0]]) == "It is: "
    assert "".join(delta.get("content", "") for delta in deltas) == "It is: 42!"

    client = official(serve(scripted(small_gpt(), *said, *said)))  # the client's own helper joins the pieces
    with client.chat.completions.stream(model="", messages=HELLO) as stream:
        joined = stream.get_final_completion().choices[0].message
    assert joined.content == message.content
    assert joined.calculator == [{"index": 0, "expression": "6*7", "result": "42", "position": 7}]
    client.chat.completions.create(model="", messages=[*HELLO, joined, *HELLO])

    as_it_came = ChatMessage.model_validate(message.model_dump()).plain()
    parts = [("text", "It is: "), ("python", "6*7"), ("python_output", "42"), ("text", "42!")]
    in_parts = {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}
    assert as_it_came == in_parts == ChatMessage.model_validate(in_parts).plain()


def test_characters_of_several_tokens_come_whole(serve):
    """A client that glues the pieces together must not find signs of damage in them."""
    text = "Grüße, 世界 😀"
    with web(serve(scripted(small_gpt(), *byte_tokens(text)))) as client:
        with client.stream("POST", PATH, json={"messages": HELLO, "stream": True}) as response:
            events = events_of(response)
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)


def test_stop_strings_and_seeds(serve):
    """A stop string split over tokens, and answers that can be had again or are always the same."""
    server = serve(scripted(small_gpt(), *byte_tokens("one, two, three, four")))
    with web(server) as client:
        answer = client.post(PATH, json={"messages": HELLO, "stop": ["four", ", three"]}).json()
        assert answer["choices"][0]["message"]["content"] == "one, two"
        assert answer["choices"][0]["finish_reason"] == "stop"
    until(lambda: health(server)["active"] == 0)

    def ask(**options):
        body = {"messages": HELLO, "temperature": 1.5, "max_tokens": 12, **options}
        return client.post(PATH, json=body).json()["choices"][0]["message"]["content"]

    with web(serve()) as client:
        assert ask(seed=7) == ask(seed=7) != ask(seed=8)
        assert len({ask() for _ in range(4)}) > 1
        assert ask(temperature=0, seed=1) == ask(top_k=1, seed=2)


def test_a_conversation_that_does_not_fit_is_trimmed_and_said(serve):
    """A page that forgets without a word makes the model look more stupid than it is."""
    with web(serve(small_gpt(128))) as client:
        body = {"messages": [{"role": "system", "content": "Be nice."}, *turns(31)], "temperature": 0}
        answer = client.post(PATH, json=body).json()
        assert answer["left_out_messages"] >= 20 and answer["usage"]["prompt_tokens"] <= 128 - 32
        assert answer["usage"]["total_tokens"] <= 128
        with client.stream("POST", PATH, json={**body, "stream": True}) as response:
            assert json.loads(events_of(response)[0])["left_out_messages"] == answer["left_out_messages"]
        long = client.post(PATH, json={"messages": turns(1, words=60)})
        assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
        assert "the model's context is 128 and 32 of them are kept for the answer" in long.json()["error"]["message"]


# Refusals


@pytest.fixture(scope="module")
def shared():
    with ChatServer(small_gpt(), TOKENIZER, "<p>page</p>", token="secret-token") as server, web(server) as client:
        yield client


def messages(*roles):
    return [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"temperature": 2.1}, "temperature: input should be less than or equal to 2, not 2.1."),
        ({"temperature": "1"}, "temperature: input should be a valid number."),
        ({"temperature": float("nan")}, "temperature: input should be less than or equal to 2, not nan."),
        ({"temperature": True}, "temperature: input should be a valid number, not True."),
        ({"top_k": 201}, "top_k: input should be less than or equal to 200, not 201."),
        ({"top_k": 1.5}, "top_k: input should be a valid integer, not 1.5."),
        ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1, not 0."),
        ({"max_completion_tokens": 4097}, "max_completion_tokens: input should be less than or equal to 4096"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens and max_completion_tokens mean the same"),
        ({"seed": 2**63}, "seed: input should be less than or equal to 9223372036854775807"),
        ({"n": 2}, "n is not supported; leave it out (or send 1, which changes nothing)."),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported; leave it out (or send []"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not a field that this server knows; leave it out."),
        ({"stop": ["a"] * 5}, "stop: list should have at most 4 items"),
        ({"stop": ""}, "stop: string should have at least 1 character"),
        ({"stop": 5}, "stop: input should be a valid string, not 5."),
        ({"stream": "yes"}, "stream: input should be a valid boolean"),
        ({"messages": None}, "messages: input should be a valid list, not None."),
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"messages": messages("user", "assistant") * 250 + messages("user")}, "messages: list should have at most"),
        ({"messages": ["x"]}, "messages[0]: input should be"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: field required."),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: input should be a valid string"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0]: the message is empty."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type: input"),
        ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, "only the assistant calls"),
        ({"messages": [{"role": "user", "content": "x" * 8001}]}, "messages[0]: the message has 8001 characters; 8000"),
        ({"messages": [{"role": "user", "content": "x" * 32001}]}, "messages[0].content: string should have at most"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 4001}] * 2}]},
            "messages[0]: the message has 8002 characters; 8000 are allowed.",
        ),
        (
            {"messages": [{"role": role, "content": "x" * 7000} for role in ["user", "assistant"] * 2 + ["user"]]},
            "the messages have 35000 characters together; 32000 are allowed.",
        ),
        ({"messages": messages("tool")}, "messages[0].role: input should be 'system', 'developer', 'user' or"),
        ({"messages": messages("assistant")}, "message 1 has the role 'assistant' where 'user' belongs."),
        ({"messages": messages("user", "assistant")}, "the last message has the role 'assistant'; it must be the user"),
        ({"messages": messages("system")}, "message 1 has the role 'system', so message 2 must exist"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_the_reason(shared, changes, reason):
    """A value that is clamped or ignored silently makes people look for the mistake elsewhere."""
    for stream in (False, True):
        body = json.dumps({"messages": HELLO, "max_tokens": 1, "stream": stream} | changes)
        response = shared.post(PATH, content=body, headers={"Content-Type": "application/json"})
        error = response.json()["error"]
        assert response.status_code == 400 and reason in error["message"], error
        assert error["type"] == "invalid_request_error"
        # what follows from several fields names none
        assert error["param"] in (*changes, None)


@pytest.mark.parametrize(
    "body,kind,reason",
    [
        (b"{", "application/json", "The body is not JSON: "),
        (b"[1, 2]", "application/json", "Send a JSON object"),
        (b"", "application/json", "Send a JSON object"),
        (b'{"messages": []}', "text/plain", "Send a JSON object, with the header Content-Type: application/json."),
        (b'"\xff"', "application/json", "The body cannot be read"),
        (b"[" * 100_000, "application/json", "The body"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "application/json", "The body cannot be read"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", "messages[0].content: "),
    ],
)
def test_bodies_that_are_no_request(shared, body, kind, reason):
    """A stack trace, or a status that says that the server is to blame."""
    response = shared.post(PATH, content=body, headers={"Content-Type": kind})
    assert response.status_code == 400 and response.json()["error"]["message"].startswith(reason), response.text


def test_neutral_values_are_accepted(shared):
    """Clients send the defaults of what they know; refusing these would refuse the clients."""
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"}], "model": "gpt-4o",
        "n": 1, "top_p": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False,
        "top_logprobs": None, "user": "ann", "tools": [], "tool_choice": "none", "functions": None, "store": False,
        "response_format": {"type": "text"}, "metadata": {}, "modalities": ["text"], "stop": None, "seed": None,
        "service_tier": "auto", "parallel_tool_calls": True, "max_tokens": 2.0, "temperature": 0, "stream": False,
        "stream_options": None,
    }  # fmt: skip
    assert shared.post(PATH, json=body).status_code == 200


def test_a_body_that_is_too_large_is_not_read(shared):
    """A request of gigabytes would fill the memory, whatever it announces."""
    response = shared.post(PATH, content=b" " * (CHAT_BODY_BYTES + 1), headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and str(CHAT_BODY_BYTES) in response.json()["error"]["message"]
    in_pieces = iter([b" " * 50_000] * (CHAT_BODY_BYTES // 50_000 + 5))  # a length is not announced
    response = shared.post(PATH, content=in_pieces, headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and response.json()["error"]["type"] == "invalid_request_error"
    assert shared.post(PATH, json={"messages": HELLO, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "Basic secret-token", "Bearer secret-token-and-more"]
)
def test_without_the_token_there_is_no_answer(shared, header):
    """Any page that is open in the browser can send requests to this machine."""
    headers = {"Authorization": header} if header else {}
    with httpx.Client(base_url=shared.base_url) as client:
        for method, path in [
            ("GET", "/v1/models"),
            ("POST", PATH),
            ("OPTIONS", PATH),
            ("GET", "/v1/../x"),
            ("GET", "/x"),
        ]:
            response = client.request(method, path, headers=headers | {"Origin": "https://example.org"})
            assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
            assert not any(name.startswith("access-control") for name in response.headers)
        assert client.get("/health").json()["status"] == "ok"
        page = client.get("/")
        assert page.text == "<p>page</p>" and page.headers["referrer-policy"] == "no-referrer"


def test_other_addresses_and_methods(shared):
    """Errors in another form than the others are shown by clients as no reason at all."""
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", PATH, 405), ("DELETE", "/v1/models", 405)]:
        response = shared.request(method, path)
        assert response.status_code == status and response.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def described():
    """The application, described by itself; the model's answers are short."""
    with ChatServer(small_gpt(64), TOKENIZER, "", token="secret-token") as server:
        yield schemathesis.openapi.from_asgi("/openapi.json", create_chat_app(server.worker, "secret-token", ""))


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_description_survives_a_fuzz(described, mode):
    """A request that nobody thought of ends in an exception, or an answer is not what the description says."""
    operations = [result.ok() for result in described.get_all_operations()]
    assert {operation.label for operation in operations} == {
        "GET /health", "GET /v1/models", "GET /v1/models/{name}", f"POST {PATH}"
    }  # fmt: skip
    if mode is schemathesis.GenerationMode.NEGATIVE:  # the others have no input that could be wrong
        operations = [operation for operation in operations if operation.method == "post"]
    statuses = set()
    for operation in operations:

        @given(operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=100 if operation.method == "post" else 3, deadline=None, database=None, derandomize=True,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def fuzz(case):
            # Who speaks after whom is no matter of types, so not all that fits the description can be answered.
            excluded = [schemathesis.checks.positive_data_acceptance]
            response = case.call(headers={"Authorization": "Bearer secret-token"})
            if response.status_code != 413:  # a body that is too large is refused; the checks do not know this answer
                case.validate_response(response, excluded_checks=excluded)
            statuses.add(response.status_code)

        fuzz()
    wanted = {200, 400, 404} if mode is schemathesis.GenerationMode.POSITIVE else {400}
    assert wanted <= statuses <= {200, 400, 401, 404, 413}, statuses  # whether 200 was right, the checks say


# Leaving, crowds and failures


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(serve, stream, waiting):
    """Thirty people who closed the page would otherwise block the server for those who stay."""
    gated = Gated(scripted(small_gpt(2048), *byte_tokens("abc" * 1000)))
    server = serve(gated.model, slots=1)
    body = json.dumps({"messages": HELLO, "stream": stream, "max_tokens": 2000}).encode()
    request = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body

    def hold():
        connection = socket.create_connection((server.host, server.port))
        connection.sendall(request)
        return connection

    connections = [hold()]
    until(lambda: health(server)["active"] == 1)
    if waiting:
        connections.append(hold())
        until(lambda: health(server)["waiting"] == 1)
        connections.pop().close()
        until(lambda: health(server)["waiting"] == 0)
        assert health(server)["active"] == 1
    connections.pop().close()
    time.sleep(0.1)  # the event loop notices, while the model still computes
    gated.gate.set()
    until(lambda: health(server)["active"] == 0)
    with web(server) as client:
        assert client.post(PATH, json={"messages": HELLO, "max_tokens": 2}).status_code == 200


def test_a_crowd_is_told_to_come_back(serve):
    """A queue without an end answers people who have long gone."""
    gated = Gated(small_gpt())
    server = serve(gated.model, slots=1, places=2)
    with web(server) as client, ThreadPoolExecutor(3) as pool:
        body = {"messages": HELLO, "max_tokens": 2}
        answers = [pool.submit(client.post, PATH, json=body)]
        until(lambda: health(server)["active"] == 1)
        answers += [pool.submit(client.post, PATH, json=body) for _ in range(2)]
        until(lambda: health(server)["waiting"] == 2)
        for stream in (False, True):
            refused = client.post(PATH, json=body | {"stream": stream})
            assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) > 0
        gated.gate.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3


def test_a_model_that_fails_is_said_to_everybody(serve):
    """People who wait for an answer that nobody is writing."""
    gated = Gated(small_gpt())
    server = serve(gated.model, slots=2)

    def fail(hidden):
        gated.gate.wait(20)
        raise RuntimeError("out of memory")

    gated.model.head = fail
    with web(server) as client, ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(client.post, PATH, json={"messages": HELLO, "stream": stream}) for stream in (True, False) * 2
        ]
        until(lambda: sum(health(server)[key] for key in ("active", "waiting")) == 4)
        gated.gate.set()
        answers = [answer.result() for answer in asked]
        reason = "The model failed (RuntimeError: out of memory). Restart the server."
        for answer in answers[1::2]:
            assert answer.status_code == 503 and answer.json()["error"]["message"] == reason
        for answer in answers[::2]:
            last = json.loads([*answer.iter_lines()][-2].removeprefix("data: "))
            assert last["error"]["message"] == reason and last["error"]["type"] == "server_error"
        state = client.get("/health")
        assert state.status_code == 503 and state.json()["status"] == "failed" and state.json()["message"] == reason
        assert client.post(PATH, json={"messages": HELLO}).status_code == 503


def test_stopping_ends_answers_and_frees_the_port(serve):
    """A cell that is run again finds its port taken and the memory full."""
    gated = Gated(scripted(small_gpt(), *byte_tokens("a" * 200)))
    server = serve(gated.model)
    with web(server) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, PATH, json={"messages": HELLO, "stream": True})
        until(lambda: health(server)["active"] == 1)
        with pytest.raises(UserError, match=f"port {server.port} of 127.0.0.1 cannot be used .*0 takes any"):
            ChatServer(small_gpt(), TOKENIZER, "", port=server.port)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        gated.gate.set()
        stopping.join()
        assert "The server is shutting down." in answer.result().text
    assert not server.worker.thread.is_alive() and not server.thread.is_alive()
    server.stop()  # once more does no harm
    with ChatServer(small_gpt(), TOKENIZER, "", port=server.port) as again:
        assert again.port == server.port and again.url == f"http://127.0.0.1:{server.port}/#token={again.token}"
        assert again.token != server.token
    with pytest.raises(UserError, match="the token can have letters"):
        ChatServer(small_gpt(), TOKENIZER, "", token="two words")


def test_a_stopped_server_lets_go_of_its_memory(serve):
    """A cell of a notebook that is run again, and keeps another gigabyte of cache each time."""
    server = serve()
    official(server).chat.completions.create(model="", messages=HELLO, max_tokens=2)
    cache, model = weakref.ref(server.worker.batch.cache), weakref.ref(server.worker.batch.engine.model)
    server.stop()
    gc.collect()
    assert cache() is None and model() is None


def test_a_device_that_is_full_for_a_moment_is_no_end(serve, monkeypatch):
    """A server that refuses everybody until it is restarted, because another cell needed the GPU's memory once."""
    server, read_prompts, failures = serve(), Engine.read_prompts, [torch.OutOfMemoryError("CUDA out of memory")]

    def sometimes(engine, prompts):
        if failures:
            raise failures.pop()
        return read_prompts(engine, prompts)

    monkeypatch.setattr(Engine, "read_prompts", sometimes)
    client, ask = official(server), dict(model="", messages=HELLO, max_tokens=4, temperature=0)
    with pytest.raises(openai.InternalServerError, match="no memory left for this answer"):
        client.chat.completions.create(**ask)
    answer = client.chat.completions.create(**ask)
    assert answer.choices[0].message.content == alone(small_gpt(), HELLO, 4)
    assert health(server)["status"] == "ok" and health(server)["active"] == 0


def test_conversations_as_other_programs_write_them(serve):
    """A client that gets a 400 for a developer message, a second system message or two questions in a row."""
    said = [
        ("developer", "A"), ("user", "B"), ("user", "C"), ("system", ""), ("assistant", "D"), ("assistant", "E"),
        ("system", "F"), ("user", "G"),
    ]  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in said]
    two = [{"type": "text", "text": text} for text in ("D", "\n\n", "E")]
    assert joined_conversation([ChatMessage.model_validate(message) for message in messages]) == [
        {"role": "system", "content": "A\n\nF"},
        {"role": "user", "content": "B\n\nC"},
        {"role": "assistant", "content": two},
        {"role": "user", "content": "G"},
    ]
    client = official(serve())
    client.chat.completions.create(model="", messages=messages, max_tokens=2, extra_body={"reasoning_effort": None})
    assert client.models.retrieve("nanochat").context_length == 256
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4'; there is nanochat"):
        client.models.retrieve("gpt-4")

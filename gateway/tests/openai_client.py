"""Talks to a running cluster with the official `openai` client, as programs do.

Usage: python3 openai_client.py DIR/demo.json

Exits with 1 and says what differs when the gateway does not behave as the client expects.
"""

import base64
import datetime
import json
import math
import re
import struct
import sys
import time
import urllib.error
import urllib.request
from typing import Literal

import openai
import pydantic


def check(condition, what):
    if not condition:
        raise AssertionError(what)


def http(method, url, key, body=None):
    """Status and JSON of a plain request, for what the client has no method for."""
    data = body.encode() if isinstance(body, str) else None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def tokens(usage):
    """The three numbers; how much of a prompt was cached differs from call to call."""
    check(usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens, f"cached: {usage}")
    check(usage.completion_tokens_details.reasoning_tokens == 0, f"no hidden tokens: {usage}")
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def models(client):
    listed = {model.id: model for model in client.models.list().data}
    kinds = {getattr(model, "kind", None): model.id for model in listed.values()}
    check({"generate", "embed"} <= kinds.keys(), f"a chat and an embedding model are listed: {listed}")
    one = client.models.retrieve(kinds["generate"])
    check(one.id == kinds["generate"] and one.object == "model", f"one model is described: {one}")
    return kinds["generate"], kinds["embed"]


def whole_chat(client, model):
    ask = dict(model=model, messages=[{"role": "user", "content": "Say hello."}], max_tokens=12, temperature=0)
    raw = client.chat.completions.with_raw_response.create(**ask)
    check(raw.headers.get("x-request-id"), "an answer has a request id")
    check(raw.headers.get("cache-control") == "no-store", "no cache may keep an answer")
    answer = raw.parse()
    check(answer.object == "chat.completion" and len(answer.choices) == 1, f"one choice: {answer}")
    choice = answer.choices[0]
    check(choice.message.role == "assistant" and choice.message.content, f"text came: {choice}")
    check(choice.finish_reason in ("stop", "length"), f"a reason: {choice}")
    usage = answer.usage
    check(0 < usage.completion_tokens <= 12 and usage.prompt_tokens > 0, f"tokens: {usage}")
    check(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, f"a sum: {usage}")
    again = client.chat.completions.create(**ask)
    check(again.choices[0].message.content == choice.message.content, "greedy answers are the same")
    return choice.message.content, usage


def streamed_chat(client, model, text, usage):
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    check(stream.response.headers["content-type"] == "text/event-stream; charset=utf-8", "events are UTF-8")
    chunks = list(stream)
    check(chunks[0].choices[0].delta.role == "assistant", f"the first chunk says who speaks: {chunks[0]}")
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    check("".join(pieces) == text, f"streamed {''.join(pieces)!r}, whole {text!r}")
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    check(len(reasons) == 1, f"one reason: {reasons}")
    check(not chunks[-1].choices and tokens(chunks[-1].usage) == tokens(usage), f"the usage comes last: {chunks[-1]}")
    check(all(chunk.usage is None for chunk in chunks[:-1]), "no usage before")
    check(len({chunk.id for chunk in chunks}) == 1, "one id")


def several_choices(client, model):
    ask = dict(model=model, messages=[{"role": "user", "content": "Name a colour."}], max_tokens=6, n=2, seed=7)
    first, second = (client.chat.completions.create(**ask) for _ in range(2))
    check([choice.index for choice in first.choices] == [0, 1], f"two choices: {first}")
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, second)]
    check(texts[0] == texts[1], f"the same seed gives the same answers: {texts}")


def metric(base_url, name):
    """The sum of a metric of the gateway over its labels."""
    url = base_url.removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(url, timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    values = [line.rsplit(" ", 1)[1] for line in lines if line.split("{")[0].split(" ")[0] == name]
    return sum(map(float, values))


def broken_off_stream(client, base_url, model):
    tokens = "verbund_tokens_total"
    before = metric(base_url, tokens)
    most = 2000
    # Counting goes on for as long as it may.
    stream = client.completions.create(model=model, prompt="1 2 3 4 5 6 7", stream=True, max_tokens=most, temperature=0)
    for i, _ in enumerate(stream):
        if i == 3:
            break
    in_flight = "verbund_http_requests_in_flight"
    check(metric(base_url, in_flight) == 2, "the stream and the question for the metrics are in flight")
    stream.close()
    deadline = time.monotonic() + 30
    while metric(base_url, in_flight) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    check(metric(base_url, in_flight) == 1, "the gateway notices that its client has gone")
    made = metric(base_url, tokens) - before
    check(made < most, f"{made} tokens were made for a client that left after a few")
    after = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=2, timeout=30
    )
    check(after.choices, "a stream that was broken off does not block the next answer")


def completions(client, model):
    answer = client.completions.create(model=model, prompt="One, two, three,", max_tokens=4, temperature=0)
    check(answer.object == "text_completion" and answer.choices[0].text, f"a continuation: {answer}")
    echoed = client.completions.create(model=model, prompt=["One, two, three,"], max_tokens=4, temperature=0, echo=True)
    expected = "One, two, three," + answer.choices[0].text
    check(echoed.choices[0].text == expected, f"echo: {echoed.choices[0].text!r}, expected {expected!r}")
    stream = client.completions.create(
        model=model, prompt="One, two, three,", max_tokens=4, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    check("".join(pieces) == answer.choices[0].text, f"streamed {pieces}")
    check(all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1]), "the usage is null before the last chunk")
    check(not chunks[-1].choices and tokens(chunks[-1].usage) == tokens(answer.usage), f"the usage comes last: {chunks[-1]}")


def stop_strings(client, model):
    """A stop string out of the middle of the unstopped text ends the text before it, also where it spans tokens."""
    ask = dict(model=model, prompt="1 2 3 4 5 6 7", max_tokens=24, temperature=0)
    whole = client.completions.create(**ask).choices[0].text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    check(len(stop) == 3 and whole.index(stop) > 0, f"a text to stop in: {whole!r}")
    expected = whole[: whole.index(stop)]
    stopped = client.completions.create(**ask, stop=["never in it", stop]).choices[0]
    check(stopped.text == expected, f"stopped at {stop!r}: {stopped.text!r}, expected {expected!r}")
    check(stopped.finish_reason == "stop", f"the reason: {stopped}")
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**ask, stop=stop, stream=True) if chunk.choices]
    check("".join(pieces) == expected, f"streamed and stopped: {pieces}, expected {expected!r}")


class Adresse(pydantic.BaseModel, extra="forbid"):
    strasse: str = pydantic.Field(max_length=30)
    hausnummer: int = pydantic.Field(ge=1, le=999)
    plz: str = pydantic.Field(pattern="^[0-9]{5}$")


class Antrag(pydantic.BaseModel, extra="forbid"):  # or a small model adds properties until its tokens are used up
    aktenzeichen: str = pydantic.Field(pattern="^[A-Z]{2}-[0-9]{1,4}$")
    art: Literal["Bauantrag", "Wohngeld"]
    adresse: Adresse
    frist: datetime.date | None


def structured(client, model):
    ask = dict(model=model, messages=[{"role": "user", "content": "Erfinde einen Antrag."}], max_tokens=300, seed=3)
    answer = client.chat.completions.parse(**ask, response_format=Antrag)
    check(isinstance(answer.choices[0].message.parsed, Antrag), f"a parsed answer: {answer}")
    check(answer.choices[0].finish_reason == "stop", f"it came to its end: {answer}")
    stream = client.chat.completions.create(
        **ask, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": Antrag.model_json_schema()}}, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    check(isinstance(Antrag.model_validate_json(text), Antrag), f"streamed: {text}")
    several = client.chat.completions.create(**ask, n=3, response_format={"type": "regex", "pattern": "(ja|nein), [0-9]{2} Euro"})
    for choice in several.choices:
        check(re.fullmatch("(ja|nein), [0-9]{2} Euro", choice.message.content), f"a pattern: {choice}")
    ask["max_tokens"] = 40
    answer = client.chat.completions.create(**ask, temperature=0, response_format={"type": "json_object"}).choices[0]
    check(answer.message.content.startswith("{"), f"an object: {answer}")
    check(answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict), f"JSON: {answer}")


TOOLS = [
    {"type": "function", "function": {"name": "gebuehr", "description": "Gebühr", "strict": True, "parameters": {
        "type": "object", "properties": {"leistung": {"enum": ["Pass", "Ausweis"]}, "menge": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["leistung", "menge"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "termin", "parameters": {
        "type": "object", "properties": {"tag": {"type": "string", "format": "date"}}, "required": ["tag"], "additionalProperties": False}}},
]


def check_call(call, name):
    arguments = json.loads(call.function.arguments)
    check(call.type == "function" and call.id.startswith("call_"), f"a call: {call}")
    check(call.function.name in ((name,) if name else ("gebuehr", "termin")), f"an offered tool: {call}")
    if call.function.name == "gebuehr":
        check(arguments["leistung"] in ("Pass", "Ausweis") and 1 <= arguments["menge"] <= 9, f"arguments: {call}")
    else:
        datetime.date.fromisoformat(arguments["tag"])


def tools(client, model):
    question = [{"role": "user", "content": "Was kostet ein Pass?"}]
    ask = dict(model=model, messages=question, tools=TOOLS, max_tokens=200, seed=5)
    named = {"type": "function", "function": {"name": "termin"}}
    for choice, name in (("required", None), (named, "termin")):
        answer = client.chat.completions.create(**ask, tool_choice=choice, parallel_tool_calls=False).choices[0]
        check(answer.finish_reason == "tool_calls" and answer.message.content is None, f"{choice}: {answer}")
        check(len(answer.message.tool_calls) == 1, f"one call: {answer}")
        check_call(answer.message.tool_calls[0], name)
        whole = answer.message.tool_calls[0]
        calls = {}
        stream = client.chat.completions.create(**ask, tool_choice=choice, parallel_tool_calls=False, stream=True)
        reasons = []
        for chunk in stream:
            reasons.append(chunk.choices[0].finish_reason)
            check(not chunk.choices[0].delta.content, f"no text: {chunk}")
            for delta in chunk.choices[0].delta.tool_calls or []:
                call = calls.setdefault(delta.index, {"id": delta.id, "name": delta.function.name, "arguments": []})
                call["arguments"].append(delta.function.arguments)
        check(reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}, f"the reason comes last: {reasons}")
        call = calls[0]
        check(len(calls) == 1 and call["id"] and len(call["arguments"]) > 2, f"arguments come in pieces: {calls}")
        check((call["name"], "".join(call["arguments"])) == (whole.function.name, whole.function.arguments), f"streamed {call}, whole {whole}")
    history = question + [answer.message, {"role": "tool", "tool_call_id": whole.id, "content": "2027-01-04"}]
    after = client.chat.completions.create(model=model, messages=history, tools=TOOLS, max_tokens=8, tool_choice="none").choices[0]
    check(after.message.content and not after.message.tool_calls, f"an answer from the result: {after}")
    client.chat.completions.create(**ask, tool_choice="auto")


def probabilities(client, model):
    ask = dict(model=model, messages=[{"role": "user", "content": "Say hello."}], max_tokens=6, temperature=0)
    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs.content
    check(len(told) == answer.usage.completion_tokens, f"one a token: {told}")
    check(b"".join(bytes(t.bytes) for t in told).decode() == answer.choices[0].message.content, f"they spell the answer: {told}")
    for token in told:
        check(len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token, f"greedy takes the best: {token}")
        check(token.logprob <= 0 and token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob, f"logarithms: {token}")
        check(sum(math.exp(t.logprob) for t in token.top_logprobs) <= 1.001, f"probabilities: {token}")
    chunks = list(client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, stream=True))
    streamed = [t for chunk in chunks if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    check([t.token for t in streamed] == [t.token for t in told], f"streamed: {streamed}")
    text = client.completions.create(model=model, prompt="One, two,", max_tokens=3, temperature=0, logprobs=2).choices[0]
    check("".join(text.logprobs.tokens) == text.text and text.logprobs.text_offset[0] == 0, f"a text's: {text}")
    check(all(len(top) == 2 for top in text.logprobs.top_logprobs), f"two each: {text}")
    forced = client.chat.completions.create(**ask, logit_bias={"500": 100}, logprobs=True).choices[0]
    check(len({t.token for t in forced.logprobs.content}) == 1, f"a bias of 100 forces a token: {forced}")
    # Only what the bias takes away may change.
    bias = {str(token): -100 for token in range(500, 800)}
    client.chat.completions.create(**ask, logit_bias=bias)


def embeddings(client, model):
    texts = ["query: Wie hoch ist die Hundesteuer?", "passage: Die Hundesteuer beträgt 96 Euro.", "passage: Bananenbrot"]
    floats = client.embeddings.create(model=model, input=texts, encoding_format="float")
    check([item.index for item in floats.data] == [0, 1, 2], f"in order: {[item.index for item in floats.data]}")
    vectors = [item.embedding for item in floats.data]
    for vector in vectors:
        check(abs(math.hypot(*vector) - 1) < 1e-3, "vectors have length 1")
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    check(dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2]), "what belongs together is nearer")
    check(floats.usage.prompt_tokens > 0, f"tokens: {floats.usage}")
    # Without a format the client asks for base64 and decodes it itself.
    default = client.embeddings.create(model=model, input=texts[0])
    check(max(abs(a - b) for a, b in zip(default.data[0].embedding, vectors[0])) < 1e-4, "both encodings agree")
    raw = client.embeddings.with_raw_response.create(model=model, input=texts[0], encoding_format="base64")
    encoded = json.loads(raw.text)["data"][0]["embedding"]
    decoded = struct.unpack(f"<{len(vectors[0])}f", base64.b64decode(encoded))
    check(max(abs(a - b) for a, b in zip(decoded, vectors[0])) < 1e-4, "base64 is little-endian floats")


def refused(kind, status, param, what, call):
    try:
        call()
    except kind as error:
        check(error.status_code == status, f"{what}: {error.status_code}, expected {status}")
        check(error.body and error.body.get("message"), f"{what}: an error object: {error.body}")
        check(param is None or error.param == param, f"{what}: param {error.param}, expected {param}")
        return error
    raise AssertionError(f"{what}: accepted")


def errors(client, base_url, model, embedder):
    hello = [{"role": "user", "content": "Hallo"}]
    chat = client.chat.completions.create
    stranger = openai.OpenAI(base_url=base_url, api_key="vb-falsch", max_retries=0)
    refused(openai.AuthenticationError, 401, None, "a wrong key", lambda: stranger.models.list())
    error = refused(
        openai.NotFoundError, 404, "model", "an unknown model", lambda: chat(model="gibt-es-nicht", messages=hello)
    )
    check(error.code == "model_not_found" and model in error.message, f"names the models: {error.message}")
    refused(openai.NotFoundError, 404, "model", "an unknown model by id", lambda: client.models.retrieve("gibt-es-nicht"))
    bad = openai.BadRequestError
    refused(bad, 400, "messages", "no messages", lambda: chat(model=model, messages=[]))
    refused(bad, 400, "temperature", "too hot", lambda: chat(model=model, messages=hello, temperature=3))
    refused(bad, 400, "n", "huge n", lambda: chat(model=model, messages=hello, n=100000))
    refused(bad, 400, "max_tokens", "negative", lambda: chat(model=model, messages=hello, max_tokens=-1))
    refused(bad, 400, "top_logprobs", "too many", lambda: chat(model=model, messages=hello, logprobs=True, top_logprobs=21))
    refused(bad, 400, "logit_bias", "a huge bias", lambda: chat(model=model, messages=hello, logit_bias={"5": 101}))
    refused(bad, 400, "logit_bias", "no such token", lambda: chat(model=model, messages=hello, logit_bias={"99999999": 1}))
    contradiction = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}}
    schema = lambda schema: {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    param = "response_format.json_schema.schema"
    for what, wrong in (("contradictory", contradiction), ("enormous", {"enum": list(range(5000))}), ("unsupported", {"not": {}})):
        for stream in (False, True):
            ask = lambda: chat(model=model, messages=hello, response_format=schema(wrong), stream=stream)
            refused(bad, 400, param, what, ask)
    for pattern in ("(?=a)b", "(", "a" * 10000):
        ask = lambda: chat(model=model, messages=hello, response_format={"type": "regex", "pattern": pattern})
        refused(bad, 400, "response_format.pattern", "a pattern", ask)
    tool = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}}]
    refused(bad, 400, "tools[0].function.parameters", "a strict tool", lambda: chat(model=model, messages=hello, tools=tool))
    refused(bad, 400, "tool_choice", "no tools", lambda: chat(model=model, messages=hello, tool_choice="required"))
    refused(bad, 400, "model", "a chat with the embedder", lambda: chat(model=embedder, messages=hello))
    long = [{"role": "user", "content": "Amt " * 20000}]
    error = refused(bad, 400, None, "a long prompt", lambda: chat(model=model, messages=long))
    check(error.code == "context_length_exceeded", f"code: {error.code}")
    error = refused(bad, 400, None, "a long prompt, streamed", lambda: chat(model=model, messages=long, stream=True))
    check(error.code == "context_length_exceeded", f"a status and not an event in a stream: {error.code}")
    embed = client.embeddings.create
    refused(bad, 400, "dimensions", "dimensions", lambda: embed(model=embedder, input="a", dimensions=64))
    refused(bad, 400, "input", "tokens", lambda: embed(model=embedder, input=[1, 2, 3]))
    refused(bad, 400, "input", "no texts", lambda: embed(model=embedder, input=[]))
    status, reply = http("POST", f"{base_url}/chat/completions", client.api_key, '{"model": ')
    check(status == 400 and reply["error"]["code"] == "invalid_json", f"invalid JSON: {status} {reply}")


PASSAGE = "Für den ersten Hund beträgt die Hundesteuer in Beispielstadt 96 Euro im Jahr."


def upload(root, key, collection, name, text):
    """Uploads a document and waits until it can be found."""
    boundary = "grenze"
    head = f'Content-Disposition: form-data; name="file"; filename="{name}"\r\nContent-Type: text/plain'
    body = f"--{boundary}\r\n{head}\r\n\r\n{text}\r\n--{boundary}--\r\n".encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{root}/api/collections/{collection}/documents", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        document = json.load(reply)
    deadline = time.monotonic() + 120
    while document["status"] not in ("ready", "failed") and time.monotonic() < deadline:
        time.sleep(0.1)
        _, document = http("GET", f"{root}/api/documents/{document['id']}", key)
    check(document["status"] == "ready", f"the document is read: {document}")
    return document


def check_citations(citations, document, what):
    check(citations, f"{what}: there are citations")
    first = citations[0]
    check(first["number"] == 1 and first["document_id"] == document["id"], f"{what}: {first}")
    check(first["document"] == document["name"] and PASSAGE in first["passage"], f"{what}: the literal passage: {first}")
    check(0 <= first["score"] <= 1 and isinstance(first["chunk"], int) and "page" in first and "heading" in first, f"{what}: {first}")


def sources(base_url, client, model):
    """Ours: `collections` in a chat, `citations` in its answer, streamed in the first chunk and the last."""
    root = base_url.removesuffix("/v1")
    name = f"openai_client {time.time_ns()}"
    status, made = http("POST", f"{root}/api/collections", client.api_key, {"name": name})
    check(status == 201, f"a collection: {status} {made}")
    try:
        ask = dict(model=model, messages=[{"role": "user", "content": "Was kostet ein Hund?"}], max_tokens=4)
        extra = {"collections": [made["id"]]}
        empty = client.chat.completions.create(**ask, extra_body=extra)
        check(empty.citations == [] and "Keine Fundstelle" in empty.choices[0].message.content, f"nothing found: {empty}")
        chunks = list(client.chat.completions.create(**ask, extra_body=extra, stream=True))
        check(getattr(chunks[-1], "citations", None) == [], f"the last chunk: {chunks[-1]}")

        document = upload(root, client.api_key, made["id"], "merkblatt.txt", f"Merkblatt zur Hundesteuer\n\n{PASSAGE}\n")
        check_citations(client.chat.completions.create(**ask, extra_body=extra).citations, document, "whole")
        for options in ({}, {"stream_options": {"include_usage": True}}):
            chunks = list(client.chat.completions.create(**ask, extra_body=extra, stream=True, **options))
            carrying = [i for i, chunk in enumerate(chunks) if getattr(chunk, "citations", None) is not None]
            check(carrying == [0, len(chunks) - 1], f"citations in the first chunk and the last: {carrying} of {len(chunks)}")
            check_citations(chunks[0].citations, document, "first chunk")
            check_citations(chunks[-1].citations, document, "last chunk")
            check(isinstance(chunks[-1].citations[0]["cited"], bool), f"the last says what was cited: {chunks[-1]}")
        refused(
            openai.NotFoundError, 404, "collections", "an unknown collection",
            lambda: client.chat.completions.create(**ask, extra_body={"collections": ["col_" + "0" * 32]}),
        )
    finally:
        http("DELETE", f"{root}/api/collections/{made['id']}", client.api_key)


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        demo = json.load(file)
    base_url = demo["base_url"].rstrip("/")
    if not base_url.endswith("/v1"):
        base_url += "/v1"
    client = openai.OpenAI(base_url=base_url, api_key=demo["api_key"], max_retries=0, timeout=120)
    model, embedder = models(client)
    text, usage = whole_chat(client, model)
    streamed_chat(client, model, text, usage)
    several_choices(client, model)
    broken_off_stream(client, base_url, model)
    completions(client, model)
    stop_strings(client, model)
    structured(client, model)
    tools(client, model)
    probabilities(client, model)
    embeddings(client, embedder)
    errors(client, base_url, model, embedder)
    sources(base_url, client, model)
    print("the openai client is served as it expects")


if __name__ == "__main__":
    main()

"""Claims about serve.py: the texts are generate's, the protocol is OpenAI's, the server lives on, the page works."""
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common import ROOT, SPECIALS, byte_tokenizer, random_model, rng
import checkpoint

for library in ("starlette", "uvicorn"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install -r requirements.txt")
import decoding  # noqa: E402

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEY = {"Authorization": "Bearer secret"}


# --- servers and those who ask them ---

@contextlib.contextmanager
def server(folder, *flags):
    """A process of serve.py on a free port: (process, port)."""
    process = subprocess.Popen([sys.executable, str(ROOT / "serve.py"), str(folder), "--port=0", *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        line = next((line for line in process.stdout if "ready at" in line), None)
        assert line, process.stderr.read()
        yield process, int(re.search(r":(\d+) ", line)[1])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder with runs "base" and "chat", the model of both)."""
    out = tmp_path_factory.mktemp("out")
    model = random_model(vocab_size=260, context_length=64, d_model=48)
    for name, specials in (("base", SPECIALS[:1]), ("chat", SPECIALS)):
        (out / name).mkdir()
        byte_tokenizer(specials).save(out / name / "tokenizer.json")
        checkpoint.save_checkpoint(model, None, 3, out / name / "ckpt.pt")
        log = '{"config": {}}\n{"step": 1, "loss": 5.5}\n{"step": 2, "val_loss": 5.25}\n'
        (out / name / "log.jsonl").write_text(log, encoding="utf-8")
    return out, model


@pytest.fixture(scope="module")
def base(runs):
    """The port of a server of the base model."""
    with server(runs[0] / "base", "--max_batch=4", "--max_queue=300") as (_, port):
        yield port


@pytest.fixture(scope="module")
def chat(runs):
    """The port of a server of the tuned model, with a password, five blocks and guesses."""
    flags = ("--api_key=secret", "--cache_blocks=5", "--draft=ngram", "--quantize=int8")
    with server(runs[0] / "chat", *flags) as (_, port):
        yield port


def ask(port, path, body=None, **headers):
    """(status, the answer: JSON's objects, of a stream of events the list of them, or text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, headers)
    response = connection.getresponse()
    text, kind = response.read().decode(), response.headers["content-type"]
    return response.status, json.loads(text) if "json" in kind else events(text) if "event" in kind else text


def events(text):
    """The objects of a stream of events, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def figure(port, name):
    """A figure of /metrics."""
    return float(re.search(rf"^{name} (\S+)", ask(port, "/metrics")[1], re.MULTILINE)[1])


def until(condition, seconds=20):
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def alone(runs, ids, n, **how):
    """The new ids that generate gives, without an end of text."""
    new = decoding.generate(runs[1], list(ids), n, tokenizer=byte_tokenizer(SPECIALS[:1]), stop_ids=[256], **how)
    return [i for i in new if i != 256]


# --- the protocol ---

def test_completions_are_what_generate_writes_alone_and_scored_as_the_model_does(base, runs):
    """Two prompts, two answers to each, echoed, in one piece and in a stream."""
    how, prompts = dict(temperature=0.9, top_p=0.9, top_k=60), ["the cat é", list(b"hat")]
    asked = how | dict(prompt=prompts, n=2, seed=5, max_tokens=9, echo=True, logprobs=3)
    answer = ask(base, COMPLETIONS, asked)[1]
    assert answer["object"] == "text_completion" and answer["model"] == "base"
    assert answer["usage"] == {"prompt_tokens": 13, "completion_tokens": 36, "total_tokens": 49}
    *parts, last = ask(base, COMPLETIONS, asked | {"stream": True, "stream_options": {"include_usage": True}})[1]
    assert last["usage"] == answer["usage"] and len(parts) > 4, "it comes in pieces"
    for place, choice in enumerate(answer["choices"]):
        ids, logprobs = [*"the cat é".encode()] if place < 2 else prompts[1], choice["logprobs"]
        ids = ids + alone(runs, ids, 9, generator=rng(5 + place % 2), **how)
        assert choice["index"] == place and choice["finish_reason"] == "length"
        assert choice["text"] == byte_tokenizer().decode(ids)
        pieces = [part["choices"][0] for part in parts if part["choices"][0]["index"] == place]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [token for piece in pieces for token in piece["logprobs"]["tokens"]] == logprobs["tokens"]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
            assert token.startswith("bytes:") or choice["text"][offset:offset + len(token)] == token
        told = [detail["id"] for detail in logprobs["details"]]
        assert told == ids[:len(told)] and logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        with torch.inference_mode():
            log_p = torch.log_softmax(runs[1](torch.tensor([told]))[0, :-1, :257], dim=-1)
        for i, row in enumerate(log_p, start=1):
            detail, p = logprobs["details"][i], row[told[i]]
            assert logprobs["token_logprobs"][i] == pytest.approx(p.item(), abs=1e-4)
            assert [one["id"] for one in detail["top"]] == row.topk(3).indices.tolist()
            assert len(logprobs["top_logprobs"][i]) == 3 and detail["rank"] == 1 + (row > p).sum().item()
            assert detail["entropy"] == pytest.approx(-(row.exp() * row.exp().log2()).sum().item(), abs=1e-3)
    assert "bytes:\\xc3" in answer["choices"][0]["logprobs"]["tokens"]


def test_texts_end_at_a_stop_string_and_at_the_context(base, runs):
    texts = {seed: byte_tokenizer().decode(alone(runs, b"hat", 40, generator=rng(seed))) for seed in range(1, 9)}
    seed, text = next((seed, text) for seed, text in texts.items() if len(text) > 20)
    asked = {"prompt": "hat", "max_tokens": 40, "seed": seed, "stop": [text[10:13], "-"], "logprobs": 0}
    for answers in ([ask(base, COMPLETIONS, asked)[1]], ask(base, COMPLETIONS, asked | {"stream": True})[1]):
        choices = [answer["choices"][0] for answer in answers]
        before = "".join(choice["text"] for choice in choices)
        assert before == text[:text.index(text[10:13])] and choices[-1]["finish_reason"] == "stop"
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
        assert offsets and max(offsets) < len(before), "nor are the tokens of the stop string told"
    assert ask(base, COMPLETIONS, {"prompt": "a" * 60, "max_tokens": 500})[1]["usage"]["total_tokens"] <= 64
    choice = ask(base, COMPLETIONS, {"prompt": "stop", "stop": "to", "max_tokens": 0, "echo": True})[1]["choices"][0]
    assert choice["text"] == "stop" and choice["logprobs"] is None, "one in an echoed prompt ends nothing"


def test_chat(chat, base):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi <|end|>"}]
    asked = dict(model="chat", messages=messages, temperature=0, max_tokens=8, logprobs=True, top_logprobs=2)
    answer = ask(chat, CHAT, asked, **KEY)[1]
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] == len("be kind\n\nhi <|end|>") + 3, "what people type is plain text"
    first = choice["logprobs"]["content"][0]
    assert len(first["top_logprobs"]) == 2 and first["logprob"] <= 0 and isinstance(first["bytes"], list)
    parts = ask(chat, CHAT, asked | {"stream": True}, **KEY)[1]
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0]["role"] == "assistant" and parts[0]["object"] == "chat.completion.chunk"
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    lone, ended = {"role": "user", "content": "\ud800"}, [*messages, {"role": "assistant", "content": "x"}]
    for bad, words in (([], "messages"), ([{"role": "user"}], "messages"), ("hi", "messages"), (ended, "message"),
                       ([lone], "surrogate")):
        status, answer = ask(chat, CHAT, asked | {"messages": bad}, **KEY)
        assert status == 400 and words in answer["error"]["message"], answer
    status, answer = ask(base, CHAT, {"messages": messages[1:]})
    assert status == 400 and "align.py sft" in answer["error"]["message"]
    status, answer = ask(chat, "/v1/models")
    assert status == 401 and answer["error"]["code"] == "invalid_api_key" and ask(chat, "/health")[0] == 200
    # Six texts at once over five blocks: all of them end.
    six = {"prompt": [f"{i}" for i in range(6)], "max_tokens": 50, "temperature": 0}
    assert all(choice["finish_reason"] for choice in ask(chat, COMPLETIONS, six, **KEY)[1]["choices"])
    assert figure(chat, "preemptions_total") > 0


BAD = [b"{", b"[1]", b"[" * 100_000, {}, {"prompt": ""}, {"prompt": 5}, {"prompt": [260]}, {"prompt": [True]},
       {"prompt": "a" * 65}, {"prompt": "\ud800"}, {"prompt": ["a"] * 129},
       *({"prompt": "a"} | more for more in (
           {"temperature": -1}, {"temperature": "1"}, {"max_tokens": -1}, {"seed": 2 ** 70}, {"stop": [1]},
           {"stop": "a" * 10_000}, {"top_q": 1}, {"\ud800": 1}, {"presence_penalty": 0.5})),
       b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}"]


def test_bad_input_is_refused_in_openais_form_and_the_server_lives_on(base):
    for body in BAD:
        status, answer = ask(base, COMPLETIONS, body)
        assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}, str(body)[:60]
        assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]
    assert ask(base, COMPLETIONS, {"prompt": "a", "temperature": -1})[1]["error"]["param"] == "temperature"
    for status, *asked in ((404, COMPLETIONS, {"prompt": "a", "model": "gpt"}), (404, "/v2"), (405, COMPLETIONS),
                           (413, COMPLETIONS, b" " * 10_000_000)):
        assert ask(base, *asked)[0] == status and "message" in ask(base, *asked)[1]["error"]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection(("127.0.0.1", base)) as slow, socket.create_connection(("127.0.0.1", base)) as half:
        slow.sendall(head[:20])
        half.sendall(head + b"{")
        assert ask(base, "/v1/models")[1]["data"][0] == ask(base, "/v1/models/base")[1]
        assert ask(base, "/v1/models/gpt")[0] == 404 and ask(base, "/v1/models/base")[1]["id"] == "base"
        assert ask(base, "/health")[1] == {"status": "ok"}


def test_who_hangs_up_frees_the_blocks_and_a_full_queue_says_so(base):
    for stream in (True, False):
        before = figure(base, "generated_tokens_total")
        connection = http.client.HTTPConnection("127.0.0.1", base)
        asked = {"prompt": ["a"] * 128, "max_tokens": 60, "stream": stream}
        connection.request("POST", COMPLETIONS, json.dumps(asked))
        if stream:
            connection.getresponse().read(30)
        else:
            time.sleep(0.1)
        connection.close()
        until(lambda: not figure(base, "cache_blocks_used"))
        assert figure(base, "queue_length") == figure(base, "cache_blocks_used") == 0
        assert figure(base, "generated_tokens_total") - before < 128 * 60 / 2, "they are not written to their end"
    with ThreadPoolExecutor(12) as clients:
        many = {"prompt": ["a"] * 64, "max_tokens": 40}
        statuses = list(clients.map(lambda _: ask(base, COMPLETIONS, many)[0], range(12)))
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4, "a queue of 300 takes four times 64"
    assert 'requests_total{path="/v1/completions",status="429"}' in ask(base, "/metrics")[1]
    assert figure(base, "time_to_first_token_seconds_count") >= 256 and figure(base, "time_per_token_seconds_sum") > 0


def test_the_official_client(base, chat):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")

    def client_of(port, key):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
    client, how = client_of(base, "any"), dict(model="base", prompt="the cat", max_tokens=10, temperature=0)
    assert [model.id for model in client.models.list()] == ["base"]
    text = client.completions.create(**how, logprobs=2).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**how, stream=True)) == text > ""
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**how | {"temperature": -1})
    with pytest.raises(openai.AuthenticationError):
        client_of(chat, "wrong").models.list()
    chats = client_of(chat, "secret").chat.completions
    asked = dict(model="chat", messages=[{"role": "user", "content": "hi"}], temperature=0, max_completion_tokens=6)
    whole = chats.create(**asked, logprobs=True, top_logprobs=2).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chats.create(**asked, stream=True)) == whole


# --- the process ---

def test_sigterm_lets_what_runs_end_and_takes_nothing_new(runs):
    with server(runs[0] / "base", "--host=0.0.0.0") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        asked = {"prompt": ["a"] * 64, "max_tokens": 60, "stream": True}
        connection.request("POST", COMPLETIONS, json.dumps(asked))
        response = connection.getresponse()
        first = response.read(10)
        process.send_signal(signal.SIGTERM)
        parts = events((first + response.read()).decode())
        assert sum(bool(part["choices"][0]["finish_reason"]) for part in parts) == 64
        assert process.wait(30) == 0
        assert "no --api_key" in process.stderr.read()
        with pytest.raises(OSError):
            ask(port, "/health")


# --- the page ---

def test_the_page_names_no_other_host_and_draws_what_is(base, runs):
    model, ids = runs[1], list(b"the cat")
    answer = ask(base, "/api/next", {"prompt": "the", "temperature": 0.5, "top_k": 3})[1]
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:3]]))[:, -1]
    best = torch.softmax(logits[0, :257], dim=-1).topk(24)
    cut = decoding.distribution(logits, 0.5, 3, vocab_limit=257)[0, best.indices]
    assert [token["id"] for token in answer["tokens"]] == best.indices.tolist() and answer["kept"] == 3
    assert [token["p"] for token in answer["tokens"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [token["cut"] for token in answer["tokens"]] == pytest.approx(cut.tolist(), abs=1e-5)
    # The attention that is drawn is what the layer used: its values, weighted so, are its result.
    maps = [ask(base, "/api/attention", {"prompt": "the cat", "layer": 0, "head": head})[1] for head in range(4)]
    with torch.inference_mode():
        layer, x = model.layers[0].attn, model.layers[0].ln1(model.token_embeddings(torch.tensor([ids])))
        values, heads = layer.v_proj(x).view(7, 2, 12), []
        for head, drawn in enumerate(maps):
            weights = torch.tensor([row + [0] * (7 - len(row)) for row in drawn["weights"]])
            heads.append(weights @ values[:, head // 2])           # two heads read one of key and value
        torch.testing.assert_close(layer.o_proj(torch.cat(heads, dim=-1)), layer(x)[0], atol=1e-3, rtol=0)
    assert maps[0]["tokens"] == list("the cat") and ask(base, "/api/attention", {"prompt": "x", "layer": 2})[0] == 400
    answer = ask(base, "/api/tokens", {"text": "hat é<|endoftext|>"})[1]
    assert [token["id"] for token in answer["tokens"]] == [*"hat é".encode(), 256]
    assert answer["words"][0] == {"word": "hat", "steps": [{"rank": None, "parts": ["h", "a", "t"]}]}
    first, second = ask(base, "/api/runs")[1]["runs"]
    assert first == {"name": "base", "loss": [[1, 5.5]], "val_loss": [[2, 5.25]]} and second["name"] == "chat"
    page = ask(base, "/")[1]
    assert not re.search(r"https?://|//\w+\.\w+/|@import|<script src|<link(?! rel=\"icon\" href=\"data:)", page)
    assert ask(base, "/api/model")[1].items() >= {"chat": False, "context": 64, "start": 256}.items()


@pytest.fixture(scope="module")
def browser():
    """A headless chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1200,1000"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_the_page_in_a_browser(browser, base, chat):
    """Type, see tokens, point at one, take another, move a slider, see the other tabs; by keyboard; on a phone."""
    from selenium.webdriver import ActionChains, Keys
    run_js = browser.execute_script

    def all_of(selector):
        return browser.find_elements("css selector", selector)

    def press(*keys):
        browser.switch_to.active_element.send_keys(*keys)
    browser.get(f"http://127.0.0.1:{base}/")
    for selector, text in (("#length", "20"), ("#seed", "4"), ("#prompt", "the cat")):
        all_of(selector)[0].clear()
        all_of(selector)[0].send_keys(text)
    press(Keys.CONTROL, Keys.ENTER)
    assert until(lambda: len(all_of("#text .token")) == 27), all_of("#error")[0].text
    tokens = all_of("#text .token")
    assert all(re.search(r"\d %", token.get_attribute("title")) for token in tokens[1:])
    ActionChains(browser).move_to_element(tokens[12]).perform()
    until(lambda: all_of("#popover button"))
    told = all_of("#popover")[0].text
    assert "rank" in told and "Entropy" in told and len(all_of("#popover button")) == 5
    # Another token from there on: what stood before stays, and the model goes on after it.
    before, taken = [token.text for token in tokens[:12]], all_of("#popover button")[2].text
    all_of("#popover button")[2].click()
    assert until(lambda: len(all_of("#text .token")) == 33)
    tokens = all_of("#text .token")
    assert [token.text for token in tokens[:12]] == before and tokens[12].get_attribute("title").startswith(taken)
    # A slider cuts the bars.
    run_js("const k = document.querySelector('#top_k'); k.value = 3; k.dispatchEvent(new Event('input'))")
    assert until(lambda: len(all_of("#next li.cut")) == 9), "of twelve"
    # By keyboard: from token to token, into the alternatives and back; from tab to tab.
    tokens[0].send_keys(Keys.ARROW_RIGHT)
    press(Keys.ENTER)
    assert browser.switch_to.active_element == all_of("#popover button")[0]
    press(Keys.ESCAPE)
    assert browser.switch_to.active_element == tokens[1] and not all_of("#popover")[0].is_displayed()
    run_js("arguments[0].focus()", all_of("#tab-write")[0])
    for drawn in ("#cut-tokens .token", "#maps button", "#plot svg polyline"):
        press(Keys.ARROW_RIGHT)
        assert until(lambda: all_of(drawn)), drawn
    assert [box.text for box in all_of("#which label")] == ["base", "chat"]
    # A phone, in the dark.
    light = run_js("return getComputedStyle(document.body).backgroundColor")
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert run_js("return getComputedStyle(document.body).backgroundColor") != light
    for tab in ("write", "cuts", "looks", "runs"):
        all_of(f"#tab-{tab}")[0].click()
        assert run_js("return document.documentElement.scrollWidth <= innerWidth"), tab
    # A model for conversations, behind a password.
    browser.get(f"http://127.0.0.1:{chat}/")
    assert until(lambda: all_of("#key")[0].is_displayed())
    all_of("#key")[0].send_keys("secret", Keys.ENTER)
    assert until(lambda: all_of("#tab-chat")[0].is_displayed())
    all_of("#tab-chat")[0].click()
    all_of("#saying")[0].send_keys("hi", Keys.ENTER)
    assert until(lambda: all_of("#talk .token"))
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE" and "401" not in line["message"]]
    assert not severe, "errors in the console"

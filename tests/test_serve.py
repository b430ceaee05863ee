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

from common import ROOT, random_model, rng
import bpe
import checkpoint

for library in ("starlette", "uvicorn"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install -r requirements.txt")
import decoding  # noqa: E402
import serve  # noqa: E402

SPECIALS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]


def byte_tokenizer(specials=SPECIALS):
    vocab = {i: bytes([i]) for i in range(256)} | {256 + i: text.encode() for i, text in enumerate(specials)}
    return bpe.Tokenizer(vocab, [], specials)


# --- the protocol ---

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


def ask(port, path, body=None, method=None, **headers):
    """(status, the answer as JSON, or as text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, data, headers)
    response = connection.getresponse()
    text = response.read().decode()
    return response.status, json.loads(text) if "json" in response.headers["content-type"] else text


def complete(port, **body):
    """What /v1/completions answers."""
    return ask(port, "/v1/completions", body)[1]


def figure(port, name):
    """A figure of /metrics."""
    return float(re.search(rf"^{name} (\S+)", ask(port, "/metrics")[1], re.MULTILINE)[1])


def until(condition, seconds=20):
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def events(text):
    """The objects of a stream of events, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder with runs "base" and "chat", the model of both)."""
    out = tmp_path_factory.mktemp("out")
    for name, specials in (("base", SPECIALS[:1]), ("chat", SPECIALS)):
        model = random_model(vocab_size=260, context_length=64, d_model=48)
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


def alone(runs, prompt, n, name="base", **how):
    """(text, ids) that generate gives."""
    tokenizer = bpe.Tokenizer.load(runs[0] / name / "tokenizer.json")
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    new = decoding.generate(runs[1], ids, n, tokenizer=tokenizer, stop_ids=[256], **how)
    return tokenizer.decode([i for i in new if i != 256]), new


def test_completions(base, runs):
    answer = complete(base, prompt="the cat", max_tokens=12, temperature=0)
    assert answer["object"] == "text_completion" and answer["model"] == "base"
    text, _ = alone(runs, "the cat", 12, temperature=0)
    assert answer["choices"][0] == {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
    assert answer["usage"].items() >= {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}.items()
    how = dict(temperature=0.9, top_p=0.9, top_k=60)
    many = dict(prompt=["the cat", [104, 97, 116]], n=2, seed=5, max_tokens=9, **how)
    texts = [alone(runs, prompt, 9, generator=rng(seed), **how)[0] for prompt in many["prompt"] for seed in (5, 6)]
    assert [choice["text"] for choice in complete(base, **many)["choices"]] == texts
    parts = events(complete(base, **many, stream=True, stream_options={"include_usage": True}))
    choices = [part["choices"][0] for part in parts[:-1]]
    assert texts == ["".join(choice["text"] for choice in choices if choice["index"] == place) for place in range(4)]
    assert sorted(choice["index"] for choice in choices if choice["finish_reason"]) == [0, 1, 2, 3]
    assert parts[-1]["usage"]["completion_tokens"] == 36 and len(parts) > 4, "it comes in pieces"
    # A stop string of the middle ends the text before it, also in a stream, where none of it is shown.
    texts = {seed: alone(runs, "hat", 40, generator=rng(seed))[0] for seed in range(1, 9)}
    seed, long = next((seed, text) for seed, text in texts.items() if len(text) > 20)
    stop, before = long[10:13], long[:long.index(long[10:13])]
    for stream in (False, True):
        answer = complete(base, prompt="hat", max_tokens=40, seed=seed, stop=[stop, "-"], logprobs=0, stream=stream)
        choices = [part["choices"][0] for part in (events(answer) if stream else [answer])]
        assert "".join(c["text"] for c in choices) == before and choices[-1]["finish_reason"] == "stop"
        offsets = [offset for c in choices for offset in c["logprobs"]["text_offset"]]
        assert offsets and max(offsets) < len(before), "nor are the tokens of the stop string told"
    # max_tokens is cut to the room there is; a stop string in the prompt that is echoed ends nothing.
    assert complete(base, prompt="a" * 60, max_tokens=500)["usage"]["total_tokens"] <= 64
    assert complete(base, prompt="stop", stop="to", max_tokens=0, echo=True)["choices"][0]["text"] == "stop"


def test_log_probabilities_are_the_models_and_echo_scores_the_prompt(base, runs):
    asked = {"prompt": "the cat é", "max_tokens": 6, "temperature": 0.5, "seed": 2, "logprobs": 3, "echo": True}
    (choice,) = complete(base, **asked)["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    ids = [detail["id"] for detail in logprobs["details"]]
    new = alone(runs, "the cat é", 6, temperature=0.5, generator=rng(2))[1]
    assert ids == [*"the cat é".encode(), *new][:len(ids)]
    assert text.startswith("the cat é") and logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    with torch.inference_mode():
        log_p = torch.log_softmax(runs[1](torch.tensor([ids]))[0, :-1, :257], dim=-1)
    true = log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs["token_logprobs"][1:]), true, atol=1e-4, rtol=0)
    for i, row in enumerate(log_p, start=1):
        detail = logprobs["details"][i]
        assert [top["id"] for top in detail["top"]] == row.topk(3).indices.tolist()
        assert detail["rank"] == 1 + int((row > row[ids[i]]).sum())
        assert abs(detail["entropy"] - torch.distributions.Categorical(logits=row).entropy().item() / 0.693147) < 1e-3
        assert len(logprobs["top_logprobs"][i]) == 3
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
        assert token.startswith("bytes:") or text[offset:offset + len(token)] == token
    assert "bytes:\\xc3" in logprobs["tokens"]
    streamed = events(complete(base, **asked, stream=True))
    assert "".join(part["choices"][0]["text"] for part in streamed) == text
    assert [t for part in streamed for t in part["choices"][0]["logprobs"]["tokens"]] == logprobs["tokens"]


def test_chat(chat, base, runs):
    key = {"Authorization": "Bearer secret"}
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi <|end|>"}]
    asked = dict(model="chat", messages=messages, temperature=0, max_tokens=8, logprobs=True, top_logprobs=2)
    status, answer = ask(chat, "/v1/chat/completions", asked, **key)
    (choice,) = answer["choices"]
    assert status == 200 and answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] == len("be kind\n\nhi <|end|>") + 3, "what people type is plain text"
    (first, *_) = choice["logprobs"]["content"]
    assert len(first["top_logprobs"]) == 2 and first["logprob"] <= 0 and isinstance(first["bytes"], list)
    parts = events(ask(chat, "/v1/chat/completions", asked | {"stream": True}, **key)[1])
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant" and parts[0]["object"] == "chat.completion.chunk"
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == choice["message"]["content"]
    lone, ended = {"role": "user", "content": "\ud800"}, [*messages, {"role": "assistant", "content": "x"}]
    for bad, words in (([], "messages"), ([{"role": "user"}], "messages"), ("hi", "messages"), (ended, "message"),
                       ([lone], "surrogate")):
        status, answer = ask(chat, "/v1/chat/completions", asked | {"messages": bad}, **key)
        assert status == 400 and words in answer["error"]["message"], answer
    status, answer = ask(base, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 400 and "align.py sft" in answer["error"]["message"]
    status, answer = ask(chat, "/v1/models")
    assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    assert ask(chat, "/health")[0] == 200
    # Six texts at once over five blocks: all of them end.
    both = {"prompt": [f"{i}" for i in range(6)], "max_tokens": 50, "temperature": 0}
    assert all(choice["finish_reason"] for choice in ask(chat, "/v1/completions", both, **key)[1]["choices"])
    assert figure(chat, "preemptions_total") > 0


BAD = [b"{", b"[1]", b"\xff", b"[" * 100_000, {}, {"prompt": ""}, {"prompt": []}, {"prompt": 5}, {"prompt": [260]},
       {"prompt": [-1]}, {"prompt": [True]}, {"prompt": ["a", 1]}, {"prompt": "a" * 65}, {"prompt": "a" * 500_000},
       {"prompt": "\ud800"}, {"prompt": ["a"] * 129},
       *({"prompt": "a"} | more for more in (
           {"temperature": -1}, {"temperature": "1"}, {"temperature": True}, {"top_p": 1.5}, {"top_k": 0},
           {"max_tokens": -1}, {"max_tokens": 1.5}, {"n": 1000}, {"seed": 2 ** 70}, {"stop": ""}, {"stop": [1]},
           {"stop": "a" * 10_000}, {"stream": 1}, {"logprobs": 99}, {"top_q": 1}, {"presence_penalty": 0.5})),
       b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}"]


def test_bad_input_is_refused_in_openais_form_and_the_server_lives_on(base):
    for body in BAD:
        status, answer = ask(base, "/v1/completions", body)
        assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}, str(body)[:60]
        assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]
    assert complete(base, prompt="a", temperature=-1)["error"]["param"] == "temperature"
    for status, arguments in ((404, ("/v1/completions", {"prompt": "a", "model": "gpt"})), (404, ("/v2",)),
                              (405, ("/v1/completions",)), (413, ("/v1/completions", b" " * 10_000_000))):
        assert ask(base, *arguments)[0] == status and "message" in ask(base, *arguments)[1]["error"]
    head, left = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n", []
    for data in (head[:20], head + b"{"):                  # half a request, half a body: they stay, and then go
        left.append(socket.create_connection(("127.0.0.1", base)))
        left[-1].sendall(data)
    assert ask(base, "/v1/models")[1]["data"][0]["id"] == "base" and ask(base, "/health")[1] == {"status": "ok"}
    for connection in left:
        connection.close()


def test_who_hangs_up_frees_the_blocks_and_a_full_queue_says_so(base):
    for body in ({"stream": True}, {}):
        before = figure(base, "generated_tokens_total")
        connection = http.client.HTTPConnection("127.0.0.1", base)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": ["a"] * 128, "max_tokens": 60} | body))
        if body:
            connection.getresponse().read(30)
        else:
            time.sleep(0.1)
        connection.close()
        until(lambda: not figure(base, "cache_blocks_used"))
        assert figure(base, "queue_length") == figure(base, "cache_blocks_used") == 0
        assert figure(base, "generated_tokens_total") - before < 128 * 60 / 2, "they are not written to their end"
    with ThreadPoolExecutor(12) as clients:
        many = {"prompt": ["a"] * 64, "max_tokens": 40}
        statuses = list(clients.map(lambda _: ask(base, "/v1/completions", many)[0], range(12)))
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4, "a queue of 300 takes four times 64"
    assert 'requests_total{path="/v1/completions",status="429"}' in ask(base, "/metrics")[1]
    assert figure(base, "time_to_first_token_seconds_count") >= 256 and figure(base, "time_per_token_seconds_sum") > 0


def test_what_the_page_draws(base, runs):
    _, answer = ask(base, "/api/next", {"prompt": "the", "temperature": 0.5, "top_k": 3})
    with torch.inference_mode():
        logits = runs[1](torch.tensor([list(b"the")]))[:, -1]
    best = torch.softmax(logits[0, :257], dim=-1).topk(24)
    assert [token["id"] for token in answer["tokens"]] == best.indices.tolist() and answer["kept"] == 3
    assert [token["p"] for token in answer["tokens"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    cut = decoding.distribution(logits, 0.5, 3, vocab_limit=257)[0]
    assert [token["cut"] for token in answer["tokens"]] == pytest.approx(cut[best.indices].tolist(), abs=1e-5)
    answer = ask(base, "/api/attention", {"prompt": "the cat", "layer": 1, "head": 3})[1]
    assert [len(row) for row in answer["weights"]] == [1, 2, 3, 4, 5, 6, 7] and answer["tokens"] == list("the cat")
    # What was drawn is what the layer used: its values, weighted so, are its result.
    model, layer = runs[1], runs[1].layers[0].attn
    with torch.inference_mode():
        x = model.layers[0].ln1(model.token_embeddings(torch.tensor([list(b"the cat")])))
        values = layer.v_proj(x).view(7, 2, 12)            # two heads read one of key and value
        heads = [serve.attention_weights(model, list(b"the cat"), 0, head) @ values[:, head // 2] for head in range(4)]
        torch.testing.assert_close(layer.o_proj(torch.cat(heads, dim=-1)), layer(x)[0])
    assert ask(base, "/api/attention", {"prompt": "x", "layer": 2})[0] == 400
    answer = ask(base, "/api/tokens", {"text": "hat é<|endoftext|>"})[1]
    assert [token["id"] for token in answer["tokens"]] == [*"hat é".encode(), 256]
    assert answer["words"][0] == {"word": "hat", "steps": [{"rank": None, "parts": ["h", "a", "t"]}]}
    runs_ = ask(base, "/api/runs")[1]["runs"]
    assert runs_[0] == {"name": "base", "loss": [[1, 5.5]], "val_loss": [[2, 5.25]]} and runs_[1]["name"] == "chat"
    about = ask(base, "/api/model")[1]
    assert about["chat"] is False and about["context"] == 64 and about["start"] == 256


def test_the_official_client(base, chat, runs):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")

    def client_of(port, key):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
    client = client_of(base, "any")
    assert [model.id for model in client.models.list()] == ["base"]
    how = dict(model="base", prompt="the cat", max_tokens=10, temperature=0)
    text = alone(runs, "the cat", 10, temperature=0)[0]
    assert client.completions.create(**how, logprobs=2).choices[0].text == text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**how, stream=True)) == text
    for error, bad in ((openai.BadRequestError, {"temperature": -1}), (openai.NotFoundError, {"model": "gpt"})):
        with pytest.raises(error):
            client.completions.create(**how | bad)
    with pytest.raises(openai.AuthenticationError):
        client_of(chat, "wrong").models.list()
    chats = client_of(chat, "secret").chat.completions
    asked = dict(model="chat", messages=[{"role": "user", "content": "hi"}], temperature=0, max_completion_tokens=6)
    whole = chats.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    stream = chats.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.message.content


# --- the process ---

def test_sigterm_lets_what_runs_end_and_takes_nothing_new(runs):
    with server(runs[0] / "base", "--host=0.0.0.0") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        asked = {"prompt": ["a"] * 64, "max_tokens": 60, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(asked))
        response = connection.getresponse()
        first = response.read(10)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        parts = events((first + response.read()).decode())
        assert sum(bool(part["choices"][0]["finish_reason"]) for part in parts) == 64
        assert process.wait(15) == 0 and time.monotonic() - began < 12
        assert "no --api_key" in process.stderr.read()
        with pytest.raises(OSError):
            ask(port, "/health")


def test_a_bad_command_line_or_folder_is_said_before_the_port_opens(runs, tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes(b"no checkpoint")
    good = str(runs[0] / "base")
    for arguments, words in (([str(tmp_path)], "ckpt.pt"), ([str(tmp_path / "nowhere")], "nowhere"), ([], "folder"),
                             ([good, "--port=99999"], "port=99999"), ([good, "--draft=mtp"], "mtp"),
                             ([good, "--prot=1"], "port"), ([good, "--host=203.0.113.7"], "203.0.113.7")):
        with pytest.raises(SystemExit) as stopped:
            serve.main(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and words in error and error.count("\n") == 1


# --- the page ---

def test_the_page_names_no_other_host():
    page = (ROOT / "serve.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w+\.\w+/|@import|<script src|<link(?! rel=\"icon\" href=\"data:)", page)


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
    all_of("#prompt")[0].send_keys(Keys.CONTROL, Keys.ENTER)
    assert until(lambda: len(all_of("#text .token")) == 27), all_of("#error")[0].text
    tokens = all_of("#text .token")
    assert "".join(token.text for token in tokens[:3]) == "the" and "read" in tokens[6].get_attribute("class")
    for name in ("title", "aria-label"):
        assert all(re.search(r"\d %", token.get_attribute(name)) for token in tokens[1:])
    ActionChains(browser).move_to_element(tokens[12]).perform()
    until(lambda: all_of("#popover button"))
    told = all_of("#popover")[0].text
    assert "rank" in told and "Entropy" in told and len(all_of("#popover button")) == 5
    # Another token from there on: what stood before stays, and the model goes on after it.
    before, taken = [token.text for token in tokens[:12]], all_of("#popover button")[2].text
    all_of("#popover button")[2].click()
    assert until(lambda: len(all_of("#text .token")) == 33)
    again = all_of("#text .token")
    assert [token.text for token in again[:12]] == before and "chosen" in again[12].get_attribute("class")
    assert again[12].get_attribute("title").startswith(taken)
    # A slider cuts the bars.
    assert until(lambda: len(all_of("#next li")) == 12)
    run_js("const k = document.querySelector('#top_k'); k.value = 3; k.dispatchEvent(new Event('input'))")
    assert until(lambda: len(all_of("#next li.cut")) == 9)
    assert "3 of 257 tokens may be drawn" in all_of("#next-state")[0].text
    # By keyboard: from token to token, into the alternatives and back; from tab to tab.
    again[0].send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == again[1]
    press(Keys.ENTER)
    assert browser.switch_to.active_element == all_of("#popover button")[0]
    press(Keys.ESCAPE)
    assert browser.switch_to.active_element == again[1] and not all_of("#popover")[0].is_displayed()
    all_of("#tab-write")[0].send_keys(Keys.ARROW_RIGHT)
    assert until(lambda: all_of("#cut-tokens .token")) and all_of("#cut-steps i")
    press(Keys.ARROW_RIGHT)
    assert until(lambda: len(all_of("#maps button")) == 8) and "%" in all_of("#look-state")[0].text
    press(Keys.ARROW_RIGHT)
    assert until(lambda: all_of("#plot svg polyline"))
    assert [box.text for box in all_of("#which label")] == ["base", "chat"]
    # A phone, in the dark.
    light = run_js("return getComputedStyle(document.body).backgroundColor")
    for command, settings in (
            ("setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}),
            ("setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})):
        browser.execute_cdp_cmd(f"Emulation.{command}", settings)
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

"""`medha run-batch`: every line of input has a row of output, whatever happens on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from running_server import Running, StartServer

from megatron_medha.cli.run_batch import run, with_file_keys
from megatron_medha.core.errors import ConfigError


def request(custom_id: str, url: str = "/v1/completions", **body: object) -> dict:
    if url == "/v1/completions":
        body = {"prompt": custom_id, "max_tokens": 3, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def written(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch(server: Running, source: Path, out: Path, *words: str) -> int:
    return run([str(source), str(out), f"url={server.url}", "api_key=null", *words])


def test_every_line_gets_its_row(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hi = [{"role": "user", "content": "hi"}]
    source = written(tmp_path / "in put.jsonl", [
        request("one"), "", request("chat", "/v1/chat/completions", messages=hi), "{torn", request("one"),
        request("images", "/v1/images"), {"custom_id": "bare"}, request("bad", temperature=-1),
        request("stream", stream=True), request("respond", "/v1/responses", input="hi"),
        {**request("get"), "method": "GET"},
    ])  # fmt: skip
    out = tmp_path / "out.jsonl"
    assert batch(server, source, out) == 1
    found = rows(out)
    assert len(found) == 10
    by_id = {row["custom_id"]: row for row in found if row["error"] is None}
    assert {name: row["response"]["status_code"] for name, row in by_id.items()} == {
        "one": 200, "chat": 200, "bad": 400, "respond": 200,
    }
    assert by_id["one"]["response"]["body"]["choices"][0]["text"] == "one"
    assert by_id["bad"]["response"]["body"]["error"]["param"] == "temperature"
    wrong = sorted(row["error"]["message"].split(":")[0] for row in found if row["error"] is not None)
    assert wrong == ["line 11", "line 4", "line 5", "line 6", "line 7", "line 9"]
    assert {live.request.slo_class for live in server.engine.submitted} == {"batch"}
    assert "3 answered, 1 refused, 0 failed, 6 bad lines" in capsys.readouterr().out


def test_an_interrupted_batch_goes_on_where_it_was(server: Running, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [request(str(place)) for place in range(9)])
    out = tmp_path / "out.jsonl"
    assert batch(server, source, out, "concurrency=1") == 0
    whole = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows(out)}
    lines = out.read_text().splitlines(keepends=True)
    failed = {"id": "x", "custom_id": "7", "response": None, "error": {"code": "no_answer", "message": "gone"}}
    busy = {"id": "x", "custom_id": "8", "response": {"status_code": 503, "body": {}}, "error": None}
    torn = lines[5][:40]
    out.write_text("".join(lines[:4]) + json.dumps(failed) + "\n" + json.dumps(busy) + "\n" + torn)
    num_before = len(server.engine.submitted)
    assert batch(server, source, out, "concurrency=3") == 0
    assert len(server.engine.submitted) - num_before == 5
    assert out.read_text().startswith("".join(lines[:4]))
    assert len(rows(out)) == 9
    assert {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows(out)} == whole
    assert batch(server, source, out) == 0
    assert len(server.engine.submitted) - num_before == 5


def test_a_server_that_is_full_is_asked_again(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(FakeEngine(), max_live_requests=2, retry_after_s=1)
    source = written(tmp_path / "in.jsonl", [request(str(place), max_tokens=200) for place in range(12)])
    out = tmp_path / "out.jsonl"
    assert batch(server, source, out, "concurrency=6") == 0
    assert {row["custom_id"] for row in rows(out)} == {str(place) for place in range(12)}


def test_nothing_of_another_file_is_lost(server: Running, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [request("a")])
    for text in ("notes\n", json.dumps({"custom_id": "z", "response": {"status_code": 200}, "error": None}) + "\n"):
        out = tmp_path / "out.jsonl"
        out.write_text(text)
        with pytest.raises(ConfigError, match="use another output file"):
            batch(server, source, out)
        assert out.read_text() == text and [path.name for path in tmp_path.iterdir()].count("out.jsonl.kept") == 0


def test_the_words_of_the_command_line_find_their_keys() -> None:
    words = ["it's.jsonl", "url=http://x", "b.jsonl", "--", "parallel.tp=2", "model=auto"]
    assert with_file_keys(words) == [
        "input='it\\'s.jsonl'", "url=http://x", "output='b.jsonl'", "serve=['parallel.tp=2','model=auto']",
    ]


@pytest.mark.parametrize(
    ("words", "key"),
    [(["url=ftp://x"], "url"), (["concurrency=0"], "concurrency"), (["--", "a=1"], "serve"),
     (["url=http://127.0.0.1:9"], "url"), (["max_attempts=0"], "max_attempts"),
     (["request_timeout_s=0"], "request_timeout_s")],
)  # fmt: skip
def test_what_cannot_run_says_so_before_it_begins(tmp_path: Path, words: list[str], key: str) -> None:
    source = written(tmp_path / "in.jsonl", [request("a")])
    with pytest.raises(ConfigError, match=f"^{key}="):
        run([str(source), str(tmp_path / "out.jsonl"), *words])
    with pytest.raises(ConfigError, match="input"):
        run([str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")])

"""Do clients that nobody here wrote work against this server, unchanged? One row per client.

    python tools/clients_check.py checkpoints/tiny                    # all of them
    python tools/clients_check.py checkpoints/tiny openai-npm lm-eval

Starts `medha serve` on the checkpoint, installs each client into an environment of its own (kept under --directory, so
that a second run is quick), and runs its script of tools/clients/ against the server. Agents run against
tools/clients/scripted_server.py, whose model calls their tools. Installing needs a package registry; lm-eval and
guidellm bring torch, Codex and Claude Code 400 MB each. After each client the server must be idle, with every KV block
free. Exits with 1 if one fails. What the agents sent is in DIRECTORY/NAME/transcript.jsonl, which
tools/clients/shorten_transcript.py makes into a test.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "clients"
TIMEOUT_S = 900
IDLE_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client runs, and against what."""

    directory: Path      # its own environment
    tokenizer: Path
    url: str
    model: str

    @property
    def python(self) -> Path:
        """Of its environment."""
        return self.directory / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Client:
    """A client: what is installed, whose version is printed, and how it is run."""

    packages: tuple[str, ...]
    command: Callable[[Place], list[str]]
    is_npm: bool = False
    is_agent: bool = False  # runs against the scripted server


def main() -> int:
    """Checks the clients that were named, or all; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, help="with tokenizer.json")
    parser.add_argument("clients", nargs="*", metavar="client", help=f"of {', '.join(CLIENTS)}; default all")
    parser.add_argument("--directory", type=Path, default=Path("clients_check"), help="for environments and logs")
    arguments = parser.parse_args()
    if unknown := set(arguments.clients) - set(CLIENTS):
        parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(CLIENTS)}")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    has_failed = False
    names = arguments.clients or list(CLIENTS)
    agents = [name for name in names if CLIENTS[name].is_agent]
    checkpoint = arguments.checkpoint.absolute()

    def tell(name: str, place: Place) -> None:
        nonlocal has_failed
        version, outcome, said = check(CLIENTS[name], place)
        print(f"{name:24s} {version:14s} {outcome:8s} {said}", flush=True)
        has_failed = has_failed or outcome != "works"

    if len(agents) < len(names):
        with serving(served(checkpoint)) as (url, model):
            for name in names:
                if name not in agents:
                    tell(name, Place((arguments.directory / name).absolute(), checkpoint, url, model))
    for name in agents:
        directory = (arguments.directory / name).absolute()
        with serving(scripted(directory)) as (url, model):
            tell(name, Place(directory, checkpoint, url, model))
    return 1 if has_failed else 0


def check(client: Client, place: Place) -> tuple[str, str, str]:
    """Version, "works" or what went wrong, and the last line that was said."""
    log = place.directory.with_suffix(".log")
    # Clients read keys, addresses and settings from variables of their own; these get none, and a home of their own.
    home = place.directory / "home"
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "BASE_URL": place.url, "MODEL": place.model,
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with log.open("w", encoding="utf-8") as output:
        def run(command: list[str], cwd: Path | None = None) -> bool:
            return run_logged(command, os.environ, output, cwd)

        if not install(client, place.directory, run):
            return "", "not installed", f"see {log}"
        home.mkdir(exist_ok=True)
        has_worked = run_logged(client.command(place), environment, output, place.directory)
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    last = lines[-1][:120] if lines else ""
    if not has_worked:
        return version_of(client, place), "fails", f"{last} (see {log})"
    busy = busy_after(place.url)
    return version_of(client, place), "leaks" if busy else "works", str(busy) if busy else last


def run_logged(command: list[str], environment: Mapping[str, str], output: object, cwd: Path | None) -> bool:
    """Whether it ended well and in time."""
    try:
        done = subprocess.run(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=cwd,  # type: ignore[call-overload]
            timeout=TIMEOUT_S,
        )  # fmt: skip
    except (subprocess.TimeoutExpired, OSError) as error:
        print(error, file=output)  # type: ignore[call-overload]
        return False
    return bool(done.returncode == 0)


def install(client: Client, directory: Path, run: Callable[..., bool]) -> bool:
    """Whether the client's own environment is there; made where it is not."""
    mark = directory / "installed"
    if mark.exists():
        return True
    directory.mkdir(parents=True, exist_ok=True)
    if client.is_npm:
        (directory / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        is_done = run(["npm", "install", "--no-fund", "--no-audit", *client.packages], directory)
    else:
        is_done = run([sys.executable, "-m", "venv", str(directory)]) and run(
            [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", *client.packages]
        )
    if is_done:
        mark.touch()
    return is_done


def version_of(client: Client, place: Place) -> str:
    """Of the first package."""
    package = client.packages[0]
    name = package.rpartition("@")[0] if client.is_npm else package.partition("=")[0].partition("[")[0]
    if client.is_npm:
        return str(json.loads((place.directory / "node_modules" / name / "package.json").read_text())["version"])
    ask = f"import importlib.metadata as m; print(m.version({name!r}))"
    return subprocess.run([place.python, "-c", ask], capture_output=True, text=True).stdout.strip()


def served(checkpoint: Path) -> Callable[[int], list[str]]:
    """`medha serve` on a port."""
    return lambda port: [sys.executable, "-m", "megatron_medha", "serve", f"checkpoint={checkpoint}",
                         f"server.port={port}", "model.kv_memory_gib=0.5"]  # fmt: skip


def scripted(directory: Path) -> Callable[[int], list[str]]:
    """The server of agents on a port; what they send is written into their directory."""
    directory.mkdir(parents=True, exist_ok=True)
    transcript = directory / "transcript.jsonl"
    transcript.unlink(missing_ok=True)
    return lambda port: [sys.executable, str(SCRIPTS / "scripted_server.py"), str(port), str(transcript)]


@contextmanager
def serving(command: Callable[[int], list[str]]) -> Iterator[tuple[str, str]]:
    """URL and model name of a server that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command(port), stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                get(f"{url}/ready")
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with code {process.returncode}") from None
                time.sleep(0.2)
        yield url, str(get(f"{url}/v1/models")["data"][0]["id"])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def busy_after(url: str) -> dict[str, int]:
    """What a client has left behind; empty if nothing, after waiting a while for those that left early."""
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        load = get(f"{url}/debug/live")["load"]
        left = {"num_live": load["num_live"], "num_owned_blocks": load["num_blocks"] - load["num_free_blocks"]}
        if not any(left.values()):
            return {}
        if time.monotonic() > deadline_s:
            return left
        time.sleep(0.1)


def get(url: str) -> dict:  # type: ignore[type-arg]
    """JSON of a GET."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        found: dict = json.load(answer)  # type: ignore[type-arg]
        return found


def python_script(name: str) -> Callable[[Place], list[str]]:
    """Runs a script of tools/clients/ in the client's environment."""
    return lambda place: [str(place.python), str(SCRIPTS / name)]


def npm_script(name: str) -> Callable[[Place], list[str]]:
    """Runs a script of tools/clients/; node finds packages beside the script only, so it is copied there."""

    def command(place: Place) -> list[str]:
        copy = place.directory / name
        copy.write_bytes((SCRIPTS / name).read_bytes())
        return ["node", str(copy)]

    return command


def lm_eval(place: Place) -> list[str]:
    """Tasks of tools/clients/lm_eval_tasks on texts of this repository: nothing is downloaded."""
    tasks = place.directory / "tasks"
    tasks.mkdir(exist_ok=True)
    texts = [line for line in (__doc__ or "").splitlines() if len(line) > 60]
    questions = [
        {"question": "def main", "choices": ["():", " the", "!!!"], "answer": 0},
        {"question": "import ", "choices": ["sys", "???", "%%%"], "answer": 0},
    ]
    for name, rows in (("choice", questions), ("text", [{"text": text} for text in texts])):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for source in (SCRIPTS / "lm_eval_tasks").glob("*.yaml"):
        (tasks / source.name).write_text(source.read_text().replace("${DATA}", str(tasks)), encoding="utf-8")
    model = (f"model={place.model},base_url={place.url}/v1/completions,tokenizer={place.tokenizer},"
             "tokenizer_backend=huggingface,num_concurrent=2,max_length=2048")  # fmt: skip
    return [str(place.directory / "bin" / "lm-eval"), "run", "--model", "local-completions", "--model_args", model,
            "--include_path", str(tasks), "--tasks", "tiny_choice,tiny_perplexity,tiny_generation"]  # fmt: skip


def guidellm(place: Place) -> list[str]:
    """Thirty requests at a Poisson rate, with its own synthetic prompts."""
    return [
        str(place.directory / "bin" / "guidellm"), "run", "--backend", f"kind=openai_http,target={place.url},"
        f"model={place.model}", "--profile", "kind=poisson,rate=5", "--constraint", "kind=max_requests,count=30",
        "--tokenizer", f"kind=hf_auto,model={place.tokenizer}", "--data",
        "kind=synthetic_text,prompt_tokens=64,output_tokens=16", "--output",
        f"kind=json,path={place.directory / 'guidellm.json'}", "--disable-progress",
    ]  # fmt: skip


def aiperf(place: Place) -> list[str]:
    """Forty requests, four at a time. Its workers take tokenizers from a hub's cache only, so there is one here."""
    home, revision = place.directory / "hub_home", "0" * 40
    cached = home / "hub" / "models--local--tokenizer"
    for folder in (cached / "refs", cached / "snapshots" / revision):
        folder.mkdir(parents=True, exist_ok=True)
    (cached / "refs" / "main").write_text(revision, encoding="utf-8")
    for source in place.tokenizer.glob("*token*.json"):
        (cached / "snapshots" / revision / source.name).write_bytes(source.read_bytes())
    return [
        "env", f"HF_HOME={home}", str(place.directory / "bin" / "aiperf"), "profile", "-m", place.model,
        "-u", place.url, "--endpoint-type", "completions", "--streaming", "--tokenizer", "local/tokenizer",
        "--isl", "100", "--osl", "16", "--concurrency", "4", "--request-count", "40", "--random-seed", "1",
        "--extra-inputs", "ignore_eos:true", "--ui", "none",
        "--output-artifact-dir", str(place.directory / "artifacts"),
    ]  # fmt: skip


def codex(place: Place) -> list[str]:
    """Codex's command, told of a provider of its own by a configuration file; it runs what the model calls."""
    home = place.directory / "home" / "codex"
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'model = "{place.model}"\nmodel_provider = "medha"\n[model_providers.medha]\nname = "medha"\n'
        f'base_url = "{place.url}/v1"\nwire_api = "responses"\n', encoding="utf-8",
    )  # fmt: skip
    run = "exec --skip-git-repo-check --json --dangerously-bypass-approvals-and-sandbox"
    binary = f"CODEX_HOME={home} {place.directory}/node_modules/.bin/codex"
    return two_turns(f"{binary} {run} 'Say medha.'", f"{binary} {run} resume --last 'Once more.'")


def claude_code(place: Place) -> list[str]:
    """Claude Code's command, told of the server by its variables."""
    names = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL")
    settings = (f"ANTHROPIC_BASE_URL={place.url}", "ANTHROPIC_AUTH_TOKEN=none",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1", *(f"{name}={place.model}" for name in names))  # fmt: skip
    variables = " ".join(settings)
    binary = f"{variables} {place.directory}/node_modules/.bin/claude"
    run = "--allowedTools Bash --output-format json"
    return two_turns(f"{binary} -p 'Say medha.' {run}", f"{binary} -p 'Once more.' --continue {run}")


def two_turns(first: str, second: str) -> list[str]:
    """Both commands in the shell; each must end with the scripted model's last word."""
    return ["bash", "-c", f"set -eo pipefail; {first} | tee first.json | tail -n 3 | grep Done; "
                          f"{second} | tee second.json | tail -n 3 | grep Done; "
                          "echo two turns, each with a call of its shell"]  # fmt: skip


# Versions are those the page docs/clients.md tells of.
CLIENTS = {
    "openai-python": Client(("openai==3.54.0",), python_script("openai_python.py")),
    "openai-npm": Client(("openai@6.49.0",), npm_script("openai_npm.mjs"), is_npm=True),
    "langchain-openai": Client(("langchain-openai==1.7.3",), python_script("langchain_client.py")),
    "litellm": Client(("litellm==1.106.2",), python_script("litellm_client.py")),
    "codex": Client(("@openai/codex@0.171.0",), codex, is_npm=True, is_agent=True),
    "claude-code": Client(("@anthropic-ai/claude-code@2.1.332",), claude_code, is_npm=True, is_agent=True),
    "claude-agent-sdk": Client(("claude-agent-sdk==0.2.189",), python_script("claude_agent_sdk_python.py"),
                               is_agent=True),
    "claude-agent-sdk-npm": Client(("@anthropic-ai/claude-agent-sdk@0.3.332", "zod@4.6.7"),
                                   npm_script("claude_agent_sdk_npm.mjs"), is_npm=True, is_agent=True),
    "anthropic": Client(("anthropic==2.14.0",), python_script("anthropic_python.py"), is_agent=True),
    "anthropic-npm": Client(("@anthropic-ai/sdk@1.14.0",), npm_script("anthropic_npm.mjs"), is_npm=True, is_agent=True),
    "openai-agents": Client(("openai-agents==0.24.0",), python_script("openai_agents_client.py"), is_agent=True),
    "pydantic-ai": Client(("pydantic-ai-slim[openai,anthropic]==2.68.0",), python_script("pydantic_ai_client.py"),
                          is_agent=True),
    "langchain": Client(("langchain==1.5.2", "langchain-openai==1.7.4"), python_script("langchain_agent.py"),
                        is_agent=True),
    "litellm-agent": Client(("litellm==1.110.2",), python_script("litellm_agent.py"), is_agent=True),
    "ai-sdk": Client(("ai@7.0.173", "@ai-sdk/openai@4.0.118", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7"),
                     npm_script("ai_sdk.mjs"), is_npm=True, is_agent=True),
    "inspect-ai": Client(("inspect-ai==0.3.285", "openai", "anthropic"), python_script("inspect_client.py"),
                         is_agent=True),
    "lm-eval": Client(("lm-eval[api]==0.4.13", "torch==2.13.0+cpu", "transformers<6"), lm_eval),
    "aiperf": Client(("aiperf==0.13.0",), aiperf),
    "guidellm": Client(("guidellm==0.8.1", "torch==2.13.0+cpu"), guidellm),
}

if __name__ == "__main__":
    sys.exit(main())

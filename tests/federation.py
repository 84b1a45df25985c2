"""Federations on loopback for tests: processes that are started and stopped by their ids, in a scratch FLWR_HOME."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexlora.runners.flower_folder import write_folder

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(true: Callable[[], Any], seconds: float, what: str) -> None:
    """Wait for something; fail with a word on what did not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not after {seconds} s"
        time.sleep(0.2)


def own_folder(data: Path, clients: int, client: int, out: Path) -> Path:
    """A site's folder with the files of one client of a federation, as its only client."""
    out.mkdir(parents=True)
    for kind in ("training", "eval", "test"):
        shutil.copy(data / str(clients) / f"local_{kind}_{client}.json", out / f"local_{kind}_0.json")
    return out


PATIENCE = {
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_request_timeout_seconds": "180",
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What Ray waits for its own processes, which a busy machine starts slowly."""


class Federation:
    """What `flexlora flower init` wrote, with a SuperLink and SuperNodes that can be started and killed."""

    def __init__(self, folder: Path, sites: int) -> None:
        self.folder, self.port = folder, free_port()
        write_folder(folder, sites, "127.0.0.1", self.port)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": "local",  # a simulation joins no Ray that somebody else started
            **PATIENCE,
        }

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.running)[::-1]:
            self.kill(name, signal.SIGTERM)

    def start(self, name: str, *words: str, **env: str) -> subprocess.Popen[bytes]:
        """A process in a session of its own, its output in `{name}.log`."""
        log = (self.folder / f"{name}.log").open("ab")
        process = subprocess.Popen(
            [str(BIN / words[0]), *words[1:]],
            cwd=self.folder,
            env={**self.env, **env},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.running[name] = process
        return process

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        """Stop a process and those that it started."""
        process = self.running.pop(name)
        family = [process.pid, *descendants(process.pid)]
        for pid in family:
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                continue
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            for pid in family:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def superlink(self) -> None:
        server = self.folder / "server"
        words = ["--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth"]
        words += ["--ssl-ca-certfile", str(server / "ca.crt"), "--ssl-certfile", str(server / "server.pem")]
        words += ["--ssl-keyfile", str(server / "server.key"), "--database", str(server / "state.db")]
        self.start("superlink", "flower-superlink", *words, "--disable-runtime-dependency-installation")
        until(self.healthy, 120, "the SuperLink")

    def healthy(self) -> bool:
        import ssl

        context = ssl.create_default_context(cafile=str(self.folder / "server" / "ca.crt"))
        try:
            with urllib.request.urlopen(f"https://127.0.0.1:{self.port}/health", context=context, timeout=2) as reply:
                return reply.status == 200
        except OSError:
            return False

    def register(self, site: int) -> None:
        key = self.folder / "sites" / f"site-{site}" / "key.pub"
        self.flwr("supernode", "register", str(key), "prod", "--name", f"site-{site}")

    def flwr(self, *words: str) -> str:
        done = subprocess.run(
            [str(BIN / "flwr"), *words], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def supernode(self, site: int, key: Path | None = None, **config: Any) -> str:
        """Start a site with its node config; returns the process's name."""
        own = self.folder / "sites" / f"site-{site}"
        shown = {"partition-id": site, **config}
        text = " ".join(f"{k}={v}" if isinstance(v, int) else f"{k}='{v}'" for k, v in shown.items())
        words = ["--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(own / "ca.crt")]
        words += ["--auth-supernode-private-key", str(key or own / "key"), "--host", "127.0.0.1"]
        words += ["--port", str(free_port()), "--node-config", text]
        self.start(f"site-{site}", "flower-supernode", *words, FLWR_HOME=str(own / "home"))
        return f"site-{site}"

    def run(self, **keys: Any) -> None:
        """`flwr run` in the background, its log streamed to run.log."""
        lines = (f"{k} = {json.dumps(v)}" for k, v in keys.items())
        (self.folder / "keys.toml").write_text("\n".join(lines) + "\n")
        self.running.pop("run", None)
        self.start("run", "flwr", "run", "app", "prod", "--stream", "--run-config", "keys.toml")

    def played(self, rounds: int, name: str = "federation") -> bool:
        """Whether so many rounds are saved. Fails where the run has ended without them."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        ended = self.running["run"].poll() is not None
        done = path.is_file() and len(path.read_text().splitlines()) >= rounds
        assert done or not ended, self.log("run")[-3000:] + self.log("superlink")[-3000:]
        return done


def descendants(pid: int) -> list[int]:
    """Ids of the processes that a process started, and of those that these did."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        mine = children.get(queue.pop(), [])
        found += mine
        queue += mine
    return found


def living_in(home: Path) -> list[int]:
    """Ids of the processes whose FLWR_HOME is this folder: a simulation leaves a SuperLink behind."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"FLWR_HOME={home}\0".encode() in environment:
                found.append(int(entry.name))
    return found

